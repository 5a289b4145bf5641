//! The admin pages over HTTP/1.1: `/healthz` (the process is alive), `/readyz` (it answers Checks) and `/metrics`
//! (Prometheus text, see `metrics`).
//!
//! They expose no secret and change nothing.

use std::{future::ready, sync::Arc};

use http::{StatusCode, request::Parts};
use tokio::{net::TcpListener, sync::watch};

use crate::{
    http1::{self, PageResponse},
    metrics::{self, MetricsSources},
    transport::memory_budget::MemoryBudget,
};

/// Serves the pages until `stopping` turns true.
pub(crate) async fn serve(
    listener: TcpListener,
    memory: Arc<MemoryBudget>,
    sources: MetricsSources,
    stopping: watch::Receiver<bool>,
) {
    let page = move |request: Parts| ready(render_page(request.uri.path(), &sources));
    http1::serve(listener, memory, page, stopping).await;
}

/// Serves the pages while the server waits for its database, until this is dropped or `stopping` turns true.
pub(crate) async fn serve_not_ready(
    listener: TcpListener,
    memory: Arc<MemoryBudget>,
    stopping: watch::Receiver<bool>,
) {
    let page = |path: &str| match path {
        "/healthz" => PageResponse::from_text(StatusCode::OK, "ok\n"),
        _ => PageResponse::from_text(
            StatusCode::SERVICE_UNAVAILABLE,
            "not ready: the database is unreachable\n",
        ),
    };
    http1::serve(listener, memory, move |request: Parts| ready(page(request.uri.path())), stopping).await;
}

fn render_page(path: &str, sources: &MetricsSources) -> PageResponse {
    let ready = *sources.ready.borrow();
    match path {
        "/healthz" => PageResponse::from_text(StatusCode::OK, "ok\n"),
        "/readyz" if ready => PageResponse::from_text(StatusCode::OK, "ready\n"),
        "/readyz" => PageResponse::from_text(StatusCode::SERVICE_UNAVAILABLE, "not ready\n"),
        "/metrics" => PageResponse::from_text(StatusCode::OK, metrics::render_metrics(sources)),
        _ => PageResponse::from_text(
            StatusCode::NOT_FOUND,
            "not found; the pages are /healthz, /readyz and /metrics\n",
        ),
    }
}
