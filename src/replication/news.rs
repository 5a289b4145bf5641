//! Hearing what other replicas have committed, before a change is judged here: who makes an account on one replica
//! finds it on another. And seeing, before something is said not to be there, that it was looked for in the newest
//! state. The guarantee does not rest on it: what takes rights away has been waited for. That a fault is no verdict does.

use std::{sync::Arc, time::Duration};

use tokio::{
    sync::{mpsc, oneshot},
    time::Instant,
};

use crate::store::{
    StoreError,
    fleet::{Fleet, MOST_ROWS},
};

use super::{feed::Sight, follow::Follow};

/// How many may wait for one reading; those beyond wait for a place.
const QUEUE: usize = 1024;

/// How long a reading is waited for. A database that says nothing is not asked the whole time that a call has.
const PATIENCE: Duration = Duration::from_secs(2);

/// The way to the newest changes.
#[derive(Clone)]
pub struct News(Option<Source>);

#[derive(Clone)]
struct Source {
    asks: mpsc::Sender<oneshot::Sender<bool>>,
    fleet: Arc<dyn Fleet>,
    sight: Arc<Sight>,
}

impl std::fmt::Debug for News {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("News").field("from_others", &self.0.is_some()).finish_non_exhaustive()
    }
}

impl News {
    /// Where nobody else commits.
    #[must_use]
    pub const fn none() -> News {
        News(None)
    }

    /// Where others do. Readings run on the current runtime for as long as anybody may ask.
    #[must_use]
    pub fn over(fleet: Arc<dyn Fleet>, follow: Arc<Follow>, sight: Arc<Sight>) -> News {
        let (asks, asked) = mpsc::channel(QUEUE);
        tokio::spawn(read(fleet.clone(), follow, asked));
        News(Some(Source { asks, fleet, sight }))
    }

    /// Whether everything is in the index that was committed before: else the database has failed to tell, and what
    /// is not there may be there all the same.
    pub async fn heard(&self) -> bool {
        let Some(Source { asks, .. }) = &self.0 else { return true };
        let (answer, heard) = oneshot::channel();
        let asked = async {
            match asks.send(answer).await {
                Ok(()) => heard.await.unwrap_or(false),
                Err(_) => false,
            }
        };
        tokio::time::timeout(PATIENCE, asked).await.unwrap_or(false)
    }

    /// Whether what was read from the database since then was the newest there was: else it may be one that another has
    /// replaced, and what is not there may be in the other.
    pub async fn was_newest(&self, since: Instant) -> bool {
        let Some(Source { fleet, sight, .. }) = &self.0 else { return true };
        let Some(id) = sight.id() else { return false };
        let proven = tokio::time::timeout(PATIENCE, fleet.prove(id, since)).await;
        matches!(proven, Ok(Ok(true)))
    }
}

/// One reading for all who asked before it was begun.
async fn read(fleet: Arc<dyn Fleet>, follow: Arc<Follow>, mut asked: mpsc::Receiver<oneshot::Sender<bool>>) {
    let mut waiting = Vec::new();
    while asked.recv_many(&mut waiting, QUEUE).await > 0 {
        let heard = catch_up(&*fleet, &follow).await.unwrap_or_else(|error| {
            tracing::warn!(error = &error as &dyn std::error::Error, "the newest changes were not read");
            false
        });
        for answer in waiting.drain(..) {
            // Whoever has gone away does not hear of it.
            let _ = answer.send(heard);
        }
    }
}

/// Reads what was there when it began. What does not fit is the feed's to deal with.
async fn catch_up(fleet: &dyn Fleet, follow: &Follow) -> Result<bool, StoreError> {
    while let Some(at) = follow.at() {
        let rows = fleet.follow(at.revision).await?;
        let last = rows.len() < MOST_ROWS as usize;
        if follow.hear(rows)?.is_err() {
            return Ok(false);
        }
        if last {
            return Ok(true);
        }
    }
    Ok(false)
}
