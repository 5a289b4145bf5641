//! Serves small in-memory responses over HTTP/1.1: the admin pages and the gateway's HTTP endpoint. Request bodies are
//! discarded. The contents of the pages belong to `admin` and `forward_auth`.

mod metered_stream;

use std::{convert::Infallible, net::SocketAddr, sync::Arc, time::Duration};

use bytes::Bytes;
use http::{HeaderName, HeaderValue, Request, Response, StatusCode, request::Parts};
use http_body_util::{BodyExt as _, Full};
use hyper::{
    body::{Body as _, Incoming},
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{Semaphore, watch},
    task::JoinSet,
    time::timeout,
};
use tokio_io_timeout::TimeoutWriter;

use crate::transport::{
    fd_limit,
    memory_budget::{ConnectionMemoryBudget, MemoryBudget},
};

use metered_stream::MeteredStream;

const HEADER_READ_TIMEOUT: Duration = Duration::from_secs(5);
/// Time limit for writing a response while the peer's buffers are full.
const WRITE_TIMEOUT: Duration = Duration::from_secs(10);
/// Time limit and maximum size in bytes of a discarded body. A proxy that is still sending when the connection closes
/// may miss the response.
const BODY_READ_TIMEOUT: Duration = Duration::from_secs(5);
const MAX_DISCARDED_BYTES: usize = 16 << 20;
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// Maximum size of a request's head, in bytes. Proxies admit 60 KiB of headers.
const MAX_HEAD_BYTES: usize = 128 * 1024;
const MAX_HEADERS: usize = 256;

#[derive(Clone, Debug)]
pub(crate) struct PageResponse {
    pub(crate) status: StatusCode,
    /// Headers by lower-case name. A value that is invalid in a header is left out.
    pub(crate) headers: Vec<(&'static str, String)>,
    pub(crate) body: String,
}

impl PageResponse {
    #[must_use]
    pub(crate) fn from_text(status: StatusCode, body: impl Into<String>) -> PageResponse {
        let kind = "text/plain; version=0.0.4; charset=utf-8".to_owned();
        PageResponse { status, headers: vec![("content-type", kind)], body: body.into() }
    }

    fn into_response(self) -> Response<Full<Bytes>> {
        let mut response = Response::new(Full::new(Bytes::from(self.body)));
        *response.status_mut() = self.status;
        for (name, value) in self.headers {
            if let Ok(value) = HeaderValue::try_from(value) {
                response.headers_mut().append(HeaderName::from_static(name), value);
            }
        }
        response
    }
}

/// Serves pages until `stopping` turns true; calls in flight then finish. Requests reserve their memory from `memory`.
/// The peer's address is an extension of the request.
pub(crate) async fn serve<P, F>(
    listener: TcpListener,
    memory: Arc<MemoryBudget>,
    page: P,
    mut stopping: watch::Receiver<bool>,
) where
    P: Fn(Parts) -> F + Send + Sync + 'static,
    F: Future<Output = PageResponse> + Send + 'static,
{
    let max = fd_limit::max_http1_connections();
    let (page, permits) = (Arc::new(page), Arc::new(Semaphore::new(max)));
    let mut connections = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            Some(_) = connections.join_next() => continue,
            () = wait_until_stopping(&mut stopping) => break,
        };
        match accepted {
            Ok((stream, peer)) => {
                let Ok(permit) = permits.clone().try_acquire_owned() else {
                    tracing::warn!(%peer, limit = max, "connection refused: limit reached");
                    continue;
                };
                // A page is written at once, so its packets must not wait for more bytes.
                if let Err(error) = stream.set_nodelay(true) {
                    tracing::debug!(error = &error as &dyn std::error::Error, "TCP_NODELAY not set");
                }
                let (page, stopping) = (page.clone(), stopping.clone());
                let stream = MeteredStream::new(stream, ConnectionMemoryBudget::new(memory.clone()));
                connections.spawn(async move {
                    serve_connection(stream, peer, page, stopping).await;
                    drop(permit);
                });
            }
            Err(error) => {
                tracing::warn!(error = &error as &dyn std::error::Error, "accepting failed");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
    while connections.join_next().await.is_some() {}
}

async fn serve_connection<P, F>(
    stream: MeteredStream<TcpStream>,
    peer: SocketAddr,
    page: Arc<P>,
    mut stopping: watch::Receiver<bool>,
) where
    P: Fn(Parts) -> F + Send + Sync + 'static,
    F: Future<Output = PageResponse> + Send + 'static,
{
    let mut stream = TimeoutWriter::new(stream);
    stream.set_timeout(Some(WRITE_TIMEOUT));
    let service = service_fn(move |request: Request<Incoming>| {
        let (mut parts, body) = request.into_parts();
        parts.extensions.insert(peer);
        let page = page(parts);
        async move {
            if !body.is_end_stream() {
                let _ = timeout(BODY_READ_TIMEOUT, discard_body(body)).await;
            }
            Ok::<_, Infallible>(page.await.into_response())
        }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_READ_TIMEOUT)
        .max_buf_size(MAX_HEAD_BYTES)
        .max_headers(MAX_HEADERS)
        .serve_connection(TokioIo::new(Box::pin(stream)), service);
    tokio::pin!(connection);
    let ended = tokio::select! {
        ended = &mut connection => ended,
        () = wait_until_stopping(&mut stopping) => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = ended {
        tracing::debug!(error = &error as &dyn std::error::Error, %peer, "connection closed by an error");
    }
}

/// Reads and discards a body, up to a limit. A client that breaks off gets the same response.
async fn discard_body(mut body: Incoming) {
    let mut left = MAX_DISCARDED_BYTES;
    while let Some(Ok(frame)) = body.frame().await {
        left = left.saturating_sub(frame.data_ref().map_or(0, Bytes::len));
        if left == 0 {
            break;
        }
    }
}

async fn wait_until_stopping(stopping: &mut watch::Receiver<bool>) {
    // The sender lives as long as the server.
    let _ = stopping.wait_for(|stop| *stop).await;
}
