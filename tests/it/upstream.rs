//! A service behind a proxy: it answers whatever it is asked with what arrived, so that a test sees which headers
//! reached it. It speaks HTTP/1.1, HTTP/2, and gRPC well enough for an answer of one message.

use std::{
    convert::Infallible,
    net::SocketAddr,
    sync::{Arc, Mutex},
};

use bytes::{BufMut as _, Bytes, BytesMut};
use http::{HeaderMap, Request, Response};
use http_body_util::{BodyExt as _, Full, combinators::BoxBody};
use hyper::{
    body::{Frame, Incoming},
    server::conn::{http1, http2},
    service::service_fn,
};
use hyper_util::rt::{TokioExecutor, TokioIo};
use serde_json::{Value, json};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::oneshot,
};

/// A request as it arrived.
#[derive(Clone, Debug)]
pub(crate) struct ReceivedRequest {
    pub(crate) method: String,
    /// Path and query.
    pub(crate) target: String,
    /// With lower-case names, `host` among them in HTTP/2 too.
    pub(crate) headers: Vec<(String, String)>,
    pub(crate) body: String,
}

impl ReceivedRequest {
    /// All values of a header.
    pub(crate) fn header_values(&self, name: &str) -> Vec<&str> {
        self.headers.iter().filter(|(found, _)| found == name).map(|(_, value)| value.as_str()).collect()
    }

    async fn read(request: Request<Incoming>) -> Result<ReceivedRequest, hyper::Error> {
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let (head, body) = request.into_parts();
        let host = head.uri.authority().map(|host| ("host".to_owned(), host.to_string()));
        let headers = head.headers.iter().map(|(name, value)| (name.to_string(), text(value.as_bytes())));
        Ok(ReceivedRequest {
            method: head.method.to_string(),
            target: head.uri.path_and_query().map_or_else(|| head.uri.to_string(), ToString::to_string),
            headers: host.into_iter().chain(headers).collect(),
            body: text(&body.collect().await?.to_bytes()),
        })
    }

    fn json(&self) -> Value {
        json!({"method": self.method, "target": self.target, "headers": self.headers, "body": self.body})
    }

    /// Reads what the upstream answered.
    #[track_caller]
    pub(crate) fn from_answer(answer: &[u8]) -> ReceivedRequest {
        let text = String::from_utf8_lossy(answer);
        let value: Value = serde_json::from_slice(answer).unwrap_or_else(|error| panic!("{error}: {text}"));
        let word = |value: &Value| value.as_str().unwrap().to_owned();
        let headers = value["headers"].as_array().unwrap();
        ReceivedRequest {
            method: word(&value["method"]),
            target: word(&value["target"]),
            headers: headers.iter().map(|pair| (word(&pair[0]), word(&pair[1]))).collect(),
            body: word(&value["body"]),
        }
    }
}

/// The service, on a thread of its own; it ends with this value.
pub(crate) struct EchoUpstream {
    pub(crate) address: SocketAddr,
    received: Arc<Mutex<Vec<ReceivedRequest>>>,
    _stop: oneshot::Sender<()>,
}

impl EchoUpstream {
    pub(crate) fn start() -> EchoUpstream {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        let address = listener.local_addr().unwrap();
        let arrived = Arc::<Mutex<Vec<ReceivedRequest>>>::default();
        let (stop, stopped) = oneshot::channel::<()>();
        let noted = arrived.clone();
        std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let listener = TcpListener::from_std(listener).unwrap();
                tokio::select! { () = accept(listener, noted) => {}, _ = stopped => {} }
            });
        });
        EchoUpstream { address, received: arrived, _stop: stop }
    }

    /// Takes all that has arrived so far, in order.
    pub(crate) fn take_received(&self) -> Vec<ReceivedRequest> {
        std::mem::take(&mut self.received.lock().unwrap())
    }
}

async fn accept(listener: TcpListener, arrived: Arc<Mutex<Vec<ReceivedRequest>>>) {
    loop {
        let Ok((stream, _)) = listener.accept().await else { continue };
        tokio::spawn(serve(stream, arrived.clone()));
    }
}

async fn serve(stream: TcpStream, arrived: Arc<Mutex<Vec<ReceivedRequest>>>) {
    let service = service_fn(move |request: Request<Incoming>| echo_request(request, arrived.clone()));
    // No method of HTTP/1.1 starts as HTTP/2's first bytes do; both write them in one go.
    let mut start = [0; 3];
    let _ = stream.peek(&mut start).await;
    let io = TokioIo::new(stream);
    // Peers come and go as they like.
    if &start == b"PRI" {
        let _ = http2::Builder::new(TokioExecutor::new()).serve_connection(io, service).await;
    } else {
        let _ = http1::Builder::new().serve_connection(io, service).await;
    }
}

type UpstreamResponse = Response<BoxBody<Bytes, Infallible>>;

async fn echo_request(
    request: Request<Incoming>,
    noted: Arc<Mutex<Vec<ReceivedRequest>>>,
) -> Result<UpstreamResponse, hyper::Error> {
    let arrived = ReceivedRequest::read(request).await?;
    let text = arrived.json().to_string();
    let grpc = arrived.header_values("content-type").iter().any(|kind| kind.starts_with("application/grpc"));
    noted.lock().unwrap().push(arrived);
    Ok(if grpc { grpc_response(&text) } else { plain_response(text) })
}

fn plain_response(text: String) -> UpstreamResponse {
    let body = Full::new(Bytes::from(text)).boxed();
    Response::builder().header("content-type", "application/json").body(body).unwrap()
}

/// The text as the one message of a gRPC answer, whatever method was called.
fn grpc_response(text: &str) -> UpstreamResponse {
    let mut message = BytesMut::new();
    message.put_u8(0);
    message.put_u32(u32::try_from(text.len()).unwrap());
    message.put_slice(text.as_bytes());
    let trailers = HeaderMap::from_iter([("grpc-status".parse().unwrap(), "0".parse().unwrap())]);
    let frames = [Frame::data(message.freeze()), Frame::trailers(trailers)];
    let frames = futures_util::stream::iter(frames.map(Ok::<_, Infallible>));
    let body = BoxBody::new(http_body_util::StreamBody::new(frames));
    Response::builder().header("content-type", "application/grpc").body(body).unwrap()
}
