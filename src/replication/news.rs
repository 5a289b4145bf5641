//! Hearing what other replicas have committed, before a change is judged here: who makes an account on one replica
//! finds it on another. Nothing rests on it but convenience: what takes rights away has been waited for.

use std::sync::Arc;

use tokio::sync::{mpsc, oneshot};

use crate::store::fleet::Fleet;

use super::follow::Follow;

/// How many may wait for one reading; those beyond wait for a place.
const QUEUE: usize = 1024;

/// The way to the newest changes.
#[derive(Clone, Debug)]
pub struct News(Option<mpsc::Sender<oneshot::Sender<()>>>);

impl News {
    /// Where nobody else commits.
    #[must_use]
    pub const fn none() -> News {
        News(None)
    }

    /// Where others do. Readings run on the current runtime for as long as anybody may ask.
    #[must_use]
    pub fn over(fleet: Arc<dyn Fleet>, follow: Arc<Follow>) -> News {
        let (asks, asked) = mpsc::channel(QUEUE);
        tokio::spawn(read(fleet, follow, asked));
        News(Some(asks))
    }

    /// Returns when everything is in the index that was committed before, or the database has failed to tell.
    pub async fn heard(&self) {
        let Some(asks) = &self.0 else { return };
        let (answer, heard) = oneshot::channel();
        if asks.send(answer).await.is_ok() {
            // No answer: the server is stopping.
            let _ = heard.await;
        }
    }
}

/// One reading for all who asked before it was begun.
async fn read(fleet: Arc<dyn Fleet>, follow: Arc<Follow>, mut asked: mpsc::Receiver<oneshot::Sender<()>>) {
    let mut waiting = Vec::new();
    while asked.recv_many(&mut waiting, QUEUE).await > 0 {
        if let Some(at) = follow.at() {
            let taken = match fleet.follow(at.revision).await {
                Ok(rows) => follow.take_rows(rows).map(drop),
                Err(error) => Err(error),
            };
            if let Err(error) = taken {
                tracing::debug!(error = &error as &dyn std::error::Error, "the newest changes were not read");
            }
        }
        for answer in waiting.drain(..) {
            // Whoever has gone away does not hear of it.
            let _ = answer.send(());
        }
    }
}
