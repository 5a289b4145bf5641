//! An HTTP/1.1 client that sends what it is told, byte by byte: headers twice, names and values that no library
//! would send, paths that a library would tidy up. One connection, many requests.

use std::{
    io::{self, BufRead as _, BufReader, ErrorKind, Read as _, Write as _},
    net::{SocketAddr, TcpStream},
};

use serde_json::Value;

use crate::process::WAIT_TIMEOUT;

/// A request that is being written.
#[derive(Clone, Debug)]
pub(crate) struct RawRequest {
    line: String,
    host: Option<String>,
    headers: Vec<(Vec<u8>, Vec<u8>)>,
    body: Vec<u8>,
}

impl RawRequest {
    /// The target stands in the request line as it is.
    pub(crate) fn new(method: &str, target: &str) -> RawRequest {
        let line = format!("{method} {target} HTTP/1.1");
        RawRequest { line, host: Some("api.test".to_owned()), headers: Vec::new(), body: Vec::new() }
    }

    pub(crate) fn get(target: &str) -> RawRequest {
        RawRequest::new("GET", target)
    }

    pub(crate) fn host(mut self, host: &str) -> RawRequest {
        self.host = Some(host.to_owned());
        self
    }

    /// One more header, after those before.
    pub(crate) fn header(mut self, name: impl AsRef<[u8]>, value: impl AsRef<[u8]>) -> RawRequest {
        self.headers.push((name.as_ref().to_vec(), value.as_ref().to_vec()));
        self
    }

    pub(crate) fn bearer(self, token: &str) -> RawRequest {
        self.header("authorization", format!("Bearer {token}"))
    }

    pub(crate) fn body(mut self, kind: &str, body: impl Into<Vec<u8>>) -> RawRequest {
        self.body = body.into();
        self.header("content-type", kind)
    }

    pub(crate) fn json(self, body: &Value) -> RawRequest {
        self.body("application/json", body.to_string())
    }

    fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = self.line.clone().into_bytes();
        let mut header = |name: &[u8], value: &[u8]| {
            bytes.extend([b"\r\n", name, b": ", value].concat());
        };
        if let Some(host) = &self.host {
            header(b"host", host.as_bytes());
        }
        for (name, value) in &self.headers {
            header(name, value);
        }
        if !self.body.is_empty() {
            header(b"content-length", self.body.len().to_string().as_bytes());
        }
        bytes.extend(b"\r\n\r\n");
        bytes.extend(&self.body);
        bytes
    }

    /// Sends it over a connection of its own.
    #[track_caller]
    pub(crate) fn send(&self, to: SocketAddr) -> RawResponse {
        RawConnection::open(to).and_then(|mut connection| connection.send(self)).unwrap()
    }
}

/// What came back.
#[derive(Clone, Debug)]
pub(crate) struct RawResponse {
    pub(crate) status: u16,
    /// In the order and spelling in which they came.
    pub(crate) headers: Vec<(String, String)>,
    pub(crate) body: Vec<u8>,
}

impl RawResponse {
    /// All values of a header, in whatever case it is spelt.
    pub(crate) fn header_values(&self, name: &str) -> Vec<&str> {
        let named = self.headers.iter().filter(|(found, _)| found.eq_ignore_ascii_case(name));
        named.map(|(_, value)| value.as_str()).collect()
    }

    /// A header that is there once at the most.
    #[track_caller]
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        let all = self.header_values(name);
        assert!(all.len() < 2, "{name} is there {} times: {self:?}", all.len());
        all.first().copied()
    }

    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    #[track_caller]
    pub(crate) fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|error| panic!("{error}: {}", self.text()))
    }
}

/// A connection that stays open while the other side keeps it.
pub(crate) struct RawConnection(BufReader<TcpStream>);

impl RawConnection {
    pub(crate) fn open(to: SocketAddr) -> io::Result<RawConnection> {
        let stream = TcpStream::connect_timeout(&to, WAIT_TIMEOUT)?;
        stream.set_read_timeout(Some(WAIT_TIMEOUT))?;
        stream.set_nodelay(true)?;
        Ok(RawConnection(BufReader::new(stream)))
    }

    /// Sends a request and reads the whole answer.
    pub(crate) fn send(&mut self, request: &RawRequest) -> io::Result<RawResponse> {
        // A refusal may come, and the connection go, before all is sent: the answer is what counts.
        let sent = self.0.get_mut().write_all(&request.to_bytes());
        let head = request.line.starts_with("HEAD ");
        self.read(head).map_err(|error| sent.err().unwrap_or(error))
    }

    fn read(&mut self, head: bool) -> io::Result<RawResponse> {
        loop {
            let mut response = self.read_head()?;
            if response.status >= 200 {
                let empty = head || matches!(response.status, 204 | 304);
                response.body = if empty { Vec::new() } else { self.read_body(&response)? };
                return Ok(response);
            }
        }
    }

    fn read_line(&mut self) -> io::Result<String> {
        let mut line = Vec::new();
        self.0.read_until(b'\n', &mut line)?;
        let line = line.strip_suffix(b"\r\n").ok_or(ErrorKind::UnexpectedEof)?;
        Ok(String::from_utf8_lossy(line).into_owned())
    }

    fn read_head(&mut self) -> io::Result<RawResponse> {
        let line = self.read_line()?;
        let status = line.split(' ').nth(1).and_then(|status| status.parse().ok());
        let status = status.ok_or_else(|| io::Error::other(format!("no status: {line}")))?;
        let mut headers = Vec::new();
        loop {
            let line = self.read_line()?;
            let Some((name, value)) = line.split_once(':') else { break };
            headers.push((name.to_owned(), value.trim().to_owned()));
        }
        Ok(RawResponse { status, headers, body: Vec::new() })
    }

    fn read_body(&mut self, response: &RawResponse) -> io::Result<Vec<u8>> {
        let mut body = Vec::new();
        if response.header("transfer-encoding") == Some("chunked") {
            loop {
                let size = usize::from_str_radix(&self.read_line()?, 16).map_err(io::Error::other)?;
                let start = body.len();
                body.resize(start + size, 0);
                self.0.read_exact(&mut body[start..])?;
                // After the last chunk as after each one: an empty line. Nobody sends trailers here.
                self.read_line()?;
                if size == 0 {
                    return Ok(body);
                }
            }
        }
        match response.header("content-length") {
            Some(length) => {
                body.resize(length.parse().map_err(io::Error::other)?, 0);
                self.0.read_exact(&mut body)?;
            }
            None => {
                self.0.read_to_end(&mut body)?;
            }
        }
        Ok(body)
    }
}
