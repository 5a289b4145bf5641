//! The admin pages, over HTTP/1.1: `/healthz` (the process lives), `/readyz` (it answers Checks) and `/metrics`
//! (Prometheus text). No secret is served here, and nothing can be changed.

use std::{convert::Infallible, fmt::Write as _, sync::Arc};

use bytes::Bytes;
use http::{Request, Response, StatusCode};
use http_body_util::Full;
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{net::TcpListener, sync::watch};

use crate::{domain::decision::Reason, engine::Engine};

const HEADER_PATIENCE: std::time::Duration = std::time::Duration::from_secs(5);
const ACCEPT_PAUSE: std::time::Duration = std::time::Duration::from_millis(50);

/// Serves the pages until the task is dropped.
pub async fn serve(listener: TcpListener, engine: Arc<Engine>, ready: watch::Receiver<bool>) {
    loop {
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!(error = &error as &dyn std::error::Error, "accepting failed");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let (engine, ready) = (engine.clone(), ready.clone());
        tokio::spawn(async move {
            let service = service_fn(move |request: Request<Incoming>| {
                let response = page(request.uri().path(), &engine, *ready.borrow());
                async move { Ok::<_, Infallible>(response) }
            });
            let connection = http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(HEADER_PATIENCE)
                .serve_connection(TokioIo::new(stream), service);
            if let Err(error) = connection.await {
                tracing::debug!(error = &error as &dyn std::error::Error, "an admin connection ended");
            }
        });
    }
}

fn page(path: &str, engine: &Engine, ready: bool) -> Response<Full<Bytes>> {
    let (status, text) = match path {
        "/healthz" => (StatusCode::OK, "ok\n".to_owned()),
        "/readyz" if ready => (StatusCode::OK, "ready\n".to_owned()),
        "/readyz" => (StatusCode::SERVICE_UNAVAILABLE, "not ready\n".to_owned()),
        "/metrics" => (StatusCode::OK, metrics(engine, ready)),
        _ => (StatusCode::NOT_FOUND, "there are /healthz, /readyz and /metrics\n".to_owned()),
    };
    let mut response = Response::new(Full::new(Bytes::from(text)));
    *response.status_mut() = status;
    let kind = http::HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");
    response.headers_mut().insert(http::header::CONTENT_TYPE, kind);
    response
}

fn metrics(engine: &Engine, ready: bool) -> String {
    let mut text =
        String::from("# HELP keyward_checks_total Checks answered.\n# TYPE keyward_checks_total counter\n");
    for (reason, count) in engine.answered() {
        let result = if reason == Reason::Ok { "allowed" } else { "denied" };
        // Writing to a String does not fail.
        let _ = writeln!(
            text,
            "keyward_checks_total{{result=\"{result}\",reason=\"{}\"}} {count}",
            reason.as_str()
        );
    }
    for (name, help, value) in [
        ("keyward_index_keys", "Keys held in memory.", engine.index.len() as u64),
        ("keyward_revision", "Newest change applied.", engine.index.revision().unwrap_or_default().0),
        ("keyward_ready", "1 while Checks are answered.", u64::from(ready)),
    ] {
        let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} gauge\n{name} {value}");
    }
    text
}
