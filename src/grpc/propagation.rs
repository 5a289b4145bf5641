//! Streams how far a change has come, for as long as its caller may know.

use std::time::Duration;

use futures_util::{
    StreamExt as _,
    stream::{self, BoxStream},
};
use tokio::{
    sync::mpsc,
    time::{Interval, MissedTickBehavior, interval},
};
use tonic::Status;

use crate::{
    domain::time::Revision,
    pb::WatchPropagationResponse,
    refusal::Refusal,
    replication::propagation::{Propagation, Report},
};

use super::{convert, session::CallerSession};

/// How long the stream of a revoked caller may stay open when nothing happens.
const LOOK_EVERY: Duration = Duration::from_secs(1);

type Item = Result<WatchPropagationResponse, Status>;

/// A stream under way.
struct Reports {
    received: mpsc::Receiver<Item>,
    session: CallerSession,
    look: Interval,
}

/// Reports each step of a change until it is in force everywhere. Ends when the caller loses its rights.
pub(super) fn stream_reports(
    propagation: Propagation,
    revision: Revision,
    session: CallerSession,
) -> BoxStream<'static, Item> {
    let (reports, received) = mpsc::channel(1);
    tokio::spawn(watch(propagation, revision, reports));
    let mut look = interval(LOOK_EVERY);
    look.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let reports = Reports { received, session, look };
    stream::unfold(reports, async |mut reports| Some((reports.next().await?, reports))).boxed()
}

impl Reports {
    async fn next(&mut self) -> Option<Item> {
        loop {
            let item = tokio::select! {
                biased;
                item = self.received.recv() => Some(item?),
                _ = self.look.tick() => None,
            };
            // What a revoked caller began tells it nothing any more.
            if let Err(refusal) = self.session.reauthorize() {
                return Some(Err(refusal.into()));
            }
            if item.is_some() {
                return item;
            }
        }
    }
}

/// Follows a change until it is in force everywhere, or nobody listens any more. What a slow listener misses is
/// repeated by what comes after.
async fn watch(propagation: Propagation, revision: Revision, reports: mpsc::Sender<Item>) {
    let message = |report: Report| WatchPropagationResponse {
        revision: report.revision.0,
        propagation: Some(convert::propagation(report)),
    };
    let mut last = None;
    let ended = {
        let mut each = |report: Report| {
            let seen = (report.confirmed.clone(), report.unconfirmed.clone());
            if !report.complete && last.as_ref() != Some(&seen) {
                last = Some(seen);
                let _ = reports.try_send(Ok(message(report)));
            }
        };
        tokio::select! {
            ended = propagation.watch(revision, &mut each) => ended,
            () = reports.closed() => return,
        }
    };
    let item = ended.map(message).map_err(|incomplete| Refusal::from(incomplete).into());
    let _ = reports.send(item).await;
}
