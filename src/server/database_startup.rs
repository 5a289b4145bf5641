//! Waits for the database at the start, opens it, and checks the required revision.

use std::{sync::Arc, time::Duration};

use anyhow::bail;
use tokio::{
    net::TcpListener,
    sync::watch,
    time::{Instant, sleep},
};

use crate::{
    admin,
    clock::SystemClock,
    config::server::ServerSettings,
    store::{self, OpenError, SchemaPolicy, Store},
    transport::memory_budget::MemoryBudget,
};

const INITIAL_BACKOFF: Duration = Duration::from_millis(250);
const MAX_BACKOFF: Duration = Duration::from_secs(5);

/// Waits for an unreachable database server with growing pauses, up to `database_wait`. Meanwhile `/healthz` is served,
/// `/readyz` returns 503, and the gRPC port is closed.
///
/// Fails if the server is still unreachable. Other faults show when the database is opened.
pub(crate) async fn wait_for_database(settings: &ServerSettings) -> anyhow::Result<()> {
    let end = Instant::now() + settings.lifecycle.database_wait;
    let mut pause = INITIAL_BACKOFF;
    let mut pages = None;
    while let Err(error @ OpenError::Unreachable { .. }) = store::check_reachable(&settings.database).await {
        if Instant::now() + pause > end {
            return Err(error.into());
        }
        tracing::warn!(
            error = &error as &dyn std::error::Error,
            again_in_ms = u64::try_from(pause.as_millis()).unwrap_or(u64::MAX),
            "database unreachable; the start waits for it"
        );
        if pages.is_none() {
            pages = StartupAdminServer::start(settings).await;
        }
        sleep(pause).await;
        pause = (pause * 2).min(MAX_BACKOFF);
    }
    if let Some(pages) = pages {
        pages.stop().await;
    }
    Ok(())
}

/// The admin pages while the database is unreachable.
struct StartupAdminServer {
    stopping: watch::Sender<bool>,
    task: tokio::task::JoinHandle<()>,
}

impl StartupAdminServer {
    /// `None` if the address cannot be bound; the start reports that later.
    async fn start(settings: &ServerSettings) -> Option<StartupAdminServer> {
        let listener = TcpListener::bind(&settings.admin_listen).await.ok()?;
        let memory = MemoryBudget::new(settings.overload.request_bytes, Arc::new(SystemClock));
        let (stopping, is_stopping) = watch::channel(false);
        Some(StartupAdminServer {
            stopping,
            task: tokio::spawn(admin::serve_not_ready(listener, memory, is_stopping)),
        })
    }

    /// Stops serving and frees the address.
    async fn stop(mut self) {
        self.stopping.send_replace(true);
        if tokio::time::timeout(Duration::from_secs(1), &mut self.task).await.is_err() {
            self.task.abort();
            let _ = self.task.await;
        }
    }
}

/// Opens the store, and checks that its log reaches the required revision.
pub(super) async fn open_store(settings: &ServerSettings) -> anyhow::Result<Arc<dyn Store>> {
    let schema =
        if settings.lifecycle.auto_migrate { SchemaPolicy::Migrate } else { SchemaPolicy::RequireCurrent };
    let end = Instant::now() + settings.lifecycle.database_wait;
    let store = loop {
        match store::open_with_schema(&settings.database, schema).await {
            // It became unreachable again while it was opened.
            Err(OpenError::Unreachable { .. }) if Instant::now() < end => {
                sleep(INITIAL_BACKOFF).await;
                wait_for_database(settings).await?;
            }
            opened => break opened?,
        }
    };
    let Some(required) = settings.lifecycle.require_revision else { return Ok(store) };
    let head = store.log_head().await?.revision;
    if head < required {
        store.close().await;
        bail!(
            "the database ends at revision {head}, and --require-revision asks for {required}: it was restored from a \
             backup that is too old, or it is another database. Keys that were revoked since would be valid again. \
             Restore a newer backup; or, if this is the newest one, repeat those revocations, and start without \
             --require-revision"
        );
    }
    Ok(store)
}
