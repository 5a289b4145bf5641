//! The head of the chain, told to the server's own log: whoever collects that elsewhere holds a copy against which the
//! chain can be verified, also by people who may change the database.

use std::{sync::Arc, time::Duration};

use crate::{
    domain::token::HexBytes,
    store::{LogHead, Store},
};

/// How often the head is looked at.
const PUBLISH_INTERVAL: Duration = Duration::from_secs(60);

/// What was told last.
#[derive(Debug, Default)]
pub(crate) struct HeadPublisher(tokio::sync::Mutex<Option<LogHead>>);

impl HeadPublisher {
    /// Tells the head now, if it has moved since it was told.
    pub(crate) async fn publish(&self, store: &dyn Store) {
        let mut told = self.0.lock().await;
        match store.log_head().await {
            Ok(head) if *told == Some(head) => {}
            Ok(head) => {
                let (revision, hash) = (head.revision.0, HexBytes(&head.hash).to_string());
                tracing::info!(target: "keyward::audit", revision, hash, "the head of the audit log");
                *told = Some(head);
            }
            Err(error) => {
                tracing::warn!(
                    error = &error as &dyn std::error::Error,
                    "the head of the audit log was not read; it is told later"
                );
            }
        }
    }

    /// Tells it now and every minute, for ever.
    pub(crate) async fn run(self: Arc<Self>, store: Arc<dyn Store>) {
        loop {
            self.publish(&*store).await;
            tokio::time::sleep(PUBLISH_INTERVAL).await;
        }
    }
}
