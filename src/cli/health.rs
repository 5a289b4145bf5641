//! `keyward health`: asks a server's admin page whether it answers Checks.
//!
//! It serves as the health check of a container image that has no shell and no HTTP client.

use std::{
    io::{self, Read as _, Write as _},
    net::{TcpStream, ToSocketAddrs as _},
    time::Duration,
};

use super::{console::Console, error::CliError};
use crate::config::server::HealthArgs;

/// The longest response that is read; the page is one line.
const MAX_READYZ_BYTES: u64 = 4096;

/// Requests `/readyz`. Exit codes: 0 ready, 1 not ready, 2 no answer.
pub(super) fn run(args: &HealthArgs, console: &mut Console) -> Result<u8, CliError> {
    let address = &args.admin_listen;
    let response = request_readyz(address, args.timeout).map_err(|error| {
        CliError::new(format!("no answer from http://{address}/readyz: {error}")).with_hint(
            "is the server running? --admin-listen or KEYWARD_ADMIN_LISTEN names its admin address",
        )
    })?;
    match parse_status_code(&response) {
        Some("200") => {
            console.print("ready\n")?;
            Ok(0)
        }
        Some("503") => Err(CliError::refused("not ready: the server runs, but answers no Checks")),
        _ => Err(CliError::new(format!("http://{address}/readyz is not an admin page of Keyward"))),
    }
}

fn request_readyz(address: &str, timeout: Duration) -> io::Result<String> {
    let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
    for address in address.to_socket_addrs()? {
        match TcpStream::connect_timeout(&address, timeout) {
            Ok(stream) => return send_readyz_request(stream, timeout),
            Err(error) => last = error,
        }
    }
    Err(last)
}

fn send_readyz_request(mut stream: TcpStream, timeout: Duration) -> io::Result<String> {
    stream.set_read_timeout(Some(timeout))?;
    stream.set_write_timeout(Some(timeout))?;
    stream.write_all(b"GET /readyz HTTP/1.1\r\nhost: keyward\r\nconnection: close\r\n\r\n")?;
    let mut response = Vec::new();
    stream.take(MAX_READYZ_BYTES).read_to_end(&mut response)?;
    Ok(String::from_utf8_lossy(&response).into_owned())
}

/// Returns the status code of an HTTP/1.1 response.
fn parse_status_code(response: &str) -> Option<&str> {
    response.strip_prefix("HTTP/1.1 ")?.get(..3)
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::{super::console::CapturedOutput, *};

    /// Runs the command against a server that always sends `response`; returns the exit code and the output.
    fn run_against(response: &'static str) -> (u8, String) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let admin_listen = listener.local_addr().unwrap().to_string();
        let server = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut received = [0; 512];
            assert!(stream.read(&mut received).unwrap() > 0);
            stream.write_all(response.as_bytes()).unwrap();
        });
        let (out, err) = (CapturedOutput::default(), CapturedOutput::default());
        let args = HealthArgs { admin_listen, timeout: Duration::from_secs(20) };
        let result = run(&args, &mut CapturedOutput::capture_console(&out, &err));
        server.join().unwrap();
        match result {
            Ok(code) => (code, out.text()),
            Err(failure) => (failure.exit_code(), failure.to_string()),
        }
    }

    #[test]
    fn the_exit_code_says_whether_checks_are_answered() {
        assert_eq!(run_against("HTTP/1.1 200 OK\r\n\r\nready\n"), (0, "ready\n".to_owned()));
        let (code, text) = run_against("HTTP/1.1 503 Service Unavailable\r\n\r\nnot ready\n");
        assert!(code == 1 && text.contains("not ready"), "{text}");
    }

    #[test]
    fn what_is_no_admin_page_is_no_answer() {
        for response in ["HTTP/1.1 404 Not Found\r\n\r\n", "SSH-2.0-x\r\n", ""] {
            assert_eq!(run_against(response).0, 2, "{response:?}");
        }
    }

    #[test]
    fn nobody_there_is_no_answer_and_says_how_to_name_another() {
        let gone = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let args = HealthArgs { admin_listen: gone.to_string(), timeout: Duration::from_secs(20) };
        let (out, err) = (CapturedOutput::default(), CapturedOutput::default());
        let failure = run(&args, &mut CapturedOutput::capture_console(&out, &err)).unwrap_err();
        assert_eq!(failure.exit_code(), 2);
        assert!(failure.to_string().contains("KEYWARD_ADMIN_LISTEN"), "{failure}");
    }
}
