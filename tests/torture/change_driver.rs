//! Those who change: each owns the keys that it makes, changes one thing after the other, and sends a change again, to
//! another replica, until it is OK. Every attempt is in the history before it is sent.

use std::{
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use keyward::pb;
use tonic::{Code, Request, Response, Status};

use crate::{
    dice::ScheduleRng,
    judge::{AcknowledgedChange, ChangeOutcome, GateId, PropagationClaim, ms},
    process::AuthorizedClients,
    shared_state::{RunRecords, SharedState, format_status},
};

/// How long a change is waited for. The shorter ones end before a silent replica's lease does.
const CHANGE_TIMEOUTS: [Duration; 4] =
    [Duration::from_millis(300), Duration::from_secs(1), Duration::from_secs(4), Duration::from_secs(10)];

/// What answers to changes have in common.
pub(crate) trait ChangeReply {
    /// The revision of the change.
    fn revision(&self) -> u64;
    /// How far it has come; None = the call does not report that.
    fn report(&self) -> Option<Option<&pb::Propagation>>;
}

macro_rules! replies {
    ($($reply:ty = $report:expr;)*) => {
        $(impl ChangeReply for $reply {
            fn revision(&self) -> u64 {
                self.revision
            }
            fn report(&self) -> Option<Option<&pb::Propagation>> {
                let report: fn(&$reply) -> Option<Option<&pb::Propagation>> = $report;
                report(self)
            }
        })*
    };
}

replies! {
    pb::CreateKeyResponse = |_| None;
    pb::CreateAccountResponse = |_| None;
    pb::ResumeAccountResponse = |_| None;
    pb::RevokeKeyResponse = |reply| Some(reply.propagation.as_ref());
    pb::DisableKeyResponse = |reply| Some(reply.propagation.as_ref());
    pb::EnableKeyResponse = |reply| Some(reply.propagation.as_ref());
    pb::UpdateKeyResponse = |reply| Some(reply.propagation.as_ref());
    pb::RotateKeyResponse = |reply| Some(reply.propagation.as_ref());
    pb::PutRoleResponse = |reply| Some(reply.propagation.as_ref());
    pb::PutMemberResponse = |reply| Some(reply.propagation.as_ref());
    pb::RemoveMemberResponse = |reply| Some(reply.propagation.as_ref());
    pb::SuspendAccountResponse = |reply| Some(reply.propagation.as_ref());
}

/// A change, as the books know it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ChangeStep<'s> {
    /// The call.
    pub(crate) call: &'static str,
    /// As the log calls it.
    pub(crate) action: &'static str,
    /// The key's id, or else the account's; empty = the answer tells.
    pub(crate) subject: &'s str,
    /// What it closes (true) or opens.
    pub(crate) gate: Option<(GateId, bool)>,
}

/// The run is over, or the change was refused for good.
#[derive(Debug)]
pub(crate) struct AbandonedChange;

/// A change that is OK.
#[derive(Debug)]
pub(crate) struct ConfirmedChange<T> {
    pub(crate) reply: T,
    /// An attempt before this one ended without an answer: it may yet be done.
    pub(crate) doubtful: bool,
}

/// One of those who change.
pub(crate) struct ChangeDriver {
    pub(crate) field: Arc<SharedState>,
    pub(crate) callers: Vec<AuthorizedClients>,
    pub(crate) dice: ScheduleRng,
}

impl ChangeDriver {
    /// Sends a change until it is OK.
    pub(crate) async fn retry_until_ok<T, F>(
        &mut self,
        step: ChangeStep<'_>,
        send: impl Fn(AuthorizedClients, CallTimeout) -> F,
    ) -> Result<ConfirmedChange<T>, AbandonedChange>
    where
        T: ChangeReply,
        F: Future<Output = Result<Response<T>, Status>>,
    {
        let mut replica = self.dice.below(self.callers.len() as u64) as usize;
        let mut doubtful = false;
        loop {
            if self.field.is_stopping() {
                return Err(AbandonedChange);
            }
            match self.attempt(step, replica, &send).await {
                Ok(reply) => return Ok(ConfirmedChange { reply, doubtful }),
                Err(status) if is_final(status.code()) => {
                    // An attempt that got lost may have made the member or the account, or removed it.
                    let explained = doubtful && ["RemoveMember", "Create account"].contains(&step.call);
                    if !explained {
                        self.refused(step, replica, &status);
                    }
                    return Err(AbandonedChange);
                }
                Err(_) => doubtful = true,
            }
            self.sleep_random_ms(2, 60).await;
            replica = (replica + 1) % self.callers.len();
        }
    }

    async fn attempt<T, F>(
        &mut self,
        step: ChangeStep<'_>,
        replica: usize,
        send: &impl Fn(AuthorizedClients, CallTimeout) -> F,
    ) -> Result<T, Status>
    where
        T: ChangeReply,
        F: Future<Output = Result<Response<T>, Status>>,
    {
        let patience = CallTimeout(self.dice.pick(&CHANGE_TIMEOUTS));
        let (field, place) = (self.field.clone(), u8::try_from(replica).unwrap());
        let begun = field.now();
        let change = step.gate.map(|(gate, closes)| field.history().begin_change(gate, closes, place, begun));
        let result = send(self.callers[replica].clone(), patience).await.map(Response::into_inner);
        let (ended, wall) = (field.now(), wall_clock());
        if let Some(change) = change {
            let outcome =
                result.as_ref().map_or(ChangeOutcome::Unknown, |reply| ChangeOutcome::Done(reply.revision()));
            field.history().end_change(change, outcome, ended);
        }
        let mut books = field.records();
        match &result {
            Ok(reply) => {
                let took = Duration::from_nanos(ended - begun);
                record_restriction(&mut books, &step, took);
                record_acknowledged(&mut books, &step, reply.revision());
                if let Some(report) = reply.report()
                    && !report.is_some_and(|report| to_claim(report).is_sound(wall))
                {
                    let story =
                        format!("{} on replica {replica} at {}: OK, {report:?}", step.call, ms(ended));
                    books.false_reports.push((ended, story));
                }
            }
            Err(status) => {
                books.record_failure(step.call, status);
                books.narrowings.repeated += u64::from(step.gate.is_some_and(|(_, closes)| closes));
            }
        }
        drop(books);
        result
    }

    /// A change that may be made was refused for good: a state was taken for the newest that is not.
    fn refused(&self, step: ChangeStep<'_>, replica: usize, status: &Status) {
        let now = self.field.now();
        let story = format!(
            "{} of {:?} on replica {replica}, until {}: {}, {}",
            step.call,
            step.subject,
            ms(now),
            format_status(status),
            status.message()
        );
        self.field.records().refusals.push((now, story));
    }

    /// Waits for a time between these milliseconds.
    pub(crate) async fn sleep_random_ms(&mut self, from: u64, to: u64) {
        tokio::time::sleep(Duration::from_micros(self.dice.between(from * 1000, to * 1000))).await;
    }
}

/// How long a call may take, which is told to the server.
#[derive(Clone, Copy, Debug)]
pub(crate) struct CallTimeout(Duration);

impl CallTimeout {
    /// The request of a call that may take so long.
    pub(crate) fn request<T>(self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        request.set_timeout(self.0);
        request
    }
}

/// Sends a clone of a request: `sending!(keys.revoke(request))`.
macro_rules! sending {
    ($service:ident.$method:ident($request:expr)) => {
        |mut caller: $crate::process::AuthorizedClients, patience: $crate::change_driver::CallTimeout| {
            let request = patience.request($request.clone());
            async move { caller.$service.$method(request).await }
        }
    };
}
pub(crate) use sending;

/// Whether it helps nothing to send it again.
fn is_final(code: Code) -> bool {
    matches!(
        code,
        Code::InvalidArgument
            | Code::NotFound
            | Code::AlreadyExists
            | Code::PermissionDenied
            | Code::Unauthenticated
            | Code::FailedPrecondition
            | Code::OutOfRange
            | Code::Unimplemented
    )
}

fn record_restriction(books: &mut RunRecords, step: &ChangeStep<'_>, took: Duration) {
    match step.gate {
        Some((_, true)) if step.call == "Revoke" => books.narrowings.revokes.push(took),
        Some((_, true)) => books.narrowings.others.push(took),
        _ => {}
    }
}

fn record_acknowledged(books: &mut RunRecords, step: &ChangeStep<'_>, revision: u64) {
    if !step.subject.is_empty() {
        let (action, subject) = (step.action, step.subject.to_owned());
        books.acknowledged.push(AcknowledgedChange { revision, action, subject });
    }
}

fn to_claim(report: &pb::Propagation) -> PropagationClaim {
    PropagationClaim {
        complete: report.complete,
        unconfirmed: report.unconfirmed.len(),
        complete_by: report.complete_by.map(|by| by.seconds * 1_000_000 + i64::from(by.nanos) / 1000),
    }
}

/// Microseconds since 1970.
fn wall_clock() -> i64 {
    i64::try_from(SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_micros()).unwrap()
}
