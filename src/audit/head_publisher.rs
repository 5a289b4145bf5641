//! Publishes the head of the audit log to the server's own log, every minute while it moves.
//!
//! With a copy collected elsewhere, the chain can be verified even if the database was tampered with.

use std::{sync::Arc, time::Duration};

use crate::{
    domain::token::HexBytes,
    store::{LogHead, Store},
};

const PUBLISH_INTERVAL: Duration = Duration::from_secs(60);

/// The head that was published last.
#[derive(Debug, Default)]
pub(crate) struct HeadPublisher(tokio::sync::Mutex<Option<LogHead>>);

impl HeadPublisher {
    /// Publishes the head, if it has moved since it was last published.
    pub(crate) async fn publish(&self, store: &dyn Store) {
        let mut published = self.0.lock().await;
        match store.log_head().await {
            Ok(head) if *published == Some(head) => {}
            Ok(head) => {
                let (revision, hash) = (head.revision.0, HexBytes(&head.hash).to_string());
                tracing::info!(target: "keyward::audit", revision, hash, "the head of the audit log");
                *published = Some(head);
            }
            Err(error) => {
                tracing::warn!(
                    error = &error as &dyn std::error::Error,
                    "the head of the audit log cannot be read; it is published later"
                );
            }
        }
    }

    /// Publishes the head now and every minute. Never returns.
    pub(crate) async fn run(self: Arc<Self>, store: Arc<dyn Store>) {
        loop {
            self.publish(&*store).await;
            tokio::time::sleep(PUBLISH_INTERVAL).await;
        }
    }
}
