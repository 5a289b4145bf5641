//! Small pages over HTTP/1.1, made from memory: the admin pages, and what proxies ask over HTTP. Bodies are discarded.
//! What the pages say, and whether they wait for it, is their module's business.

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
/// How long a peer may leave an answer unread when its buffers are full.
const WRITE_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a body may take to arrive, and how much of one is taken, in bytes. A proxy that is still sending when the
/// connection is closed may not see the answer.
const BODY_READ_TIMEOUT: Duration = Duration::from_secs(5);
const MAX_DISCARDED_BYTES: usize = 16 << 20;
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// The largest head of a request: proxies admit 60 KiB of headers.
const MAX_HEAD_BYTES: usize = 128 * 1024;
const MAX_HEADERS: usize = 256;

/// What is answered.
#[derive(Clone, Debug)]
pub struct PageResponse {
    /// The status.
    pub status: StatusCode,
    /// Headers by lower-case names. A value that no header can have is left out.
    pub headers: Vec<(&'static str, String)>,
    /// The body.
    pub body: String,
}

impl PageResponse {
    /// Plain text.
    #[must_use]
    pub fn from_text(status: StatusCode, body: impl Into<String>) -> PageResponse {
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

/// Serves pages until `stopping` turns true; calls in flight end then. Requests take their memory from `memory`. A
/// request's extensions tell the peer's address.
pub async fn serve<P, F>(
    listener: TcpListener,
    memory: Arc<MemoryBudget>,
    page: P,
    mut stopping: watch::Receiver<bool>,
) where
    P: Fn(Parts) -> F + Send + Sync + 'static,
    F: Future<Output = PageResponse> + Send + 'static,
{
    let most = fd_limit::max_http1_connections();
    let (page, room) = (Arc::new(page), Arc::new(Semaphore::new(most)));
    let mut connections = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            Some(_) = connections.join_next() => continue,
            () = wait_until_stopping(&mut stopping) => break,
        };
        match accepted {
            Ok((stream, peer)) => {
                let Ok(permit) = room.clone().try_acquire_owned() else {
                    tracing::warn!(%peer, "refused: there are {most} connections already");
                    continue;
                };
                // A page is written at once; nothing may wait for more.
                if let Err(error) = stream.set_nodelay(true) {
                    tracing::debug!(error = &error as &dyn std::error::Error, "TCP_NODELAY was not set");
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
        tracing::debug!(error = &error as &dyn std::error::Error, %peer, "a connection ended with an error");
    }
}

/// Reads a body and keeps nothing of it, up to a bound. Whoever breaks off gets the same answer.
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
    // The sender is gone only when the server is.
    let _ = stopping.wait_for(|stop| *stop).await;
}
