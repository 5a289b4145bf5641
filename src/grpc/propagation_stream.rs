//! Streams the propagation of a change, while the caller is authorized to see it.
//!
//! Waiting for replicas belongs in `replication/propagation.rs`.

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
    replication::propagation::{PropagationReport, PropagationWaiter},
    service_error::ServiceError,
};

use super::{convert, management_session::ManagementSession};

/// How long the idle stream of a revoked caller may stay open.
const REAUTHORIZE_INTERVAL: Duration = Duration::from_secs(1);

type ReportResult = Result<WatchPropagationResponse, Status>;

/// The state of one stream.
struct ReportStream {
    received: mpsc::Receiver<ReportResult>,
    session: ManagementSession,
    reauthorize_timer: Interval,
}

/// Reports each step until the change is in force on every replica. Ends when the caller loses its rights.
pub(super) fn stream_reports(
    propagation: PropagationWaiter,
    revision: Revision,
    session: ManagementSession,
) -> BoxStream<'static, ReportResult> {
    let (reports, received) = mpsc::channel(1);
    tokio::spawn(follow_change(propagation, revision, reports));
    let mut timer = interval(REAUTHORIZE_INTERVAL);
    timer.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let reports = ReportStream { received, session, reauthorize_timer: timer };
    stream::unfold(reports, async |mut reports| Some((reports.next_report().await?, reports))).boxed()
}

impl ReportStream {
    async fn next_report(&mut self) -> Option<ReportResult> {
        loop {
            let item = tokio::select! {
                biased;
                item = self.received.recv() => Some(item?),
                _ = self.reauthorize_timer.tick() => None,
            };
            // A revoked caller gets no further reports.
            if let Err(refusal) = self.session.reauthorize() {
                return Some(Err(refusal.into()));
            }
            if item.is_some() {
                return item;
            }
        }
    }
}

/// Follows a change until it is in force on every replica or the stream is closed. A slow client may miss reports;
/// later ones repeat their contents.
async fn follow_change(
    propagation: PropagationWaiter,
    revision: Revision,
    reports: mpsc::Sender<ReportResult>,
) {
    let message = |report: PropagationReport| WatchPropagationResponse {
        revision: report.revision.0,
        propagation: Some(convert::propagation_to_proto(report)),
    };
    let mut last = None;
    let result = {
        let mut send_progress = |report: PropagationReport| {
            let seen = (report.confirmed.clone(), report.unconfirmed.clone());
            if !report.complete && last.as_ref() != Some(&seen) {
                last = Some(seen);
                let _ = reports.try_send(Ok(message(report)));
            }
        };
        tokio::select! {
            result = propagation.watch(revision, &mut send_progress) => result,
            () = reports.closed() => return,
        }
    };
    let item = result.map(message).map_err(|incomplete| ServiceError::from(incomplete).into());
    let _ = reports.send(item).await;
}
