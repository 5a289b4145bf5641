//! Limits how many calls run for long at the same time: management calls, calls that wait for replicas, and answers of
//! server reflection. A caller, an account and a connection have shares of each limit, and a part is kept for calls that
//! take rights away and for operators.
//!
//! A permit is acquired when a request has arrived: a call that sends nothing holds none.

use std::{
    cell::RefCell,
    collections::HashMap,
    pin::Pin,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use http_body::Frame;
use tokio::time::{Sleep, sleep};
use tonic::{Status, body::Body};

use crate::{
    access::{Caller, Proof},
    domain::{
        name::{AccountId, KeyId},
        time::Timestamp,
    },
    quiet::Quiet,
    transport::{Overload, budget::Priority},
};

use super::{
    rpc::Rpc,
    status::{deadline_exceeded, overloaded},
};

/// Calls that may wait for replicas, or follow a change, for each management call that may run.
const WAITING_FOR_EACH: usize = 4;
/// Answers of server reflection at the same time, each of which is large. Its callers are anonymous, and fill half.
const REFLECTIONS: usize = 128;
/// Time limit of such an answer.
const REFLECTION_TIMEOUT: Duration = Duration::from_secs(60);

/// A subject that may use only a share of each limit.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Share {
    Key(KeyId),
    Certificate(String),
    Account(AccountId),
    Connection(u64),
}

impl Share {
    /// The share is the limit divided by this number. An operator provisions for all accounts, and has twice as much.
    fn divisor(&self, priority: Priority) -> usize {
        match (self, priority) {
            (Share::Account(_), _) | (_, Priority::Operator | Priority::RestrictingOperator) => 2,
            (Share::Key(_) | Share::Certificate(_) | Share::Connection(_), _) => 4,
        }
    }
}

/// The shares that a call counts on, and the priority that decides how far it may fill them.
#[derive(Clone, Debug)]
pub(super) struct Occupant {
    shares: Vec<Share>,
    priority: Priority,
}

impl Occupant {
    /// An anonymous call over the connection with this number.
    pub(super) fn anonymous(connection: u64) -> Occupant {
        Occupant { shares: vec![Share::Connection(connection)], priority: Priority::Anonymous }
    }

    /// A call of a proxy without a credential, which is trusted if the listener serves Envoy alone.
    pub(super) fn proxy(trusted: bool, connection: u64) -> Occupant {
        let priority = if trusted { Priority::Caller } else { Priority::Anonymous };
        Occupant { priority, ..Occupant::anonymous(connection) }
    }

    /// A call of this caller. An operator that acts for a person leaves the operators' part to the others, and so does a
    /// caller that proves possession alone: its key may be revoked already.
    pub(super) fn caller(caller: &Caller, rpc: &Rpc, connection: u64) -> Occupant {
        let possession = matches!(caller.proof, Proof::Possession(..));
        let proof = match &caller.proof {
            Proof::Key(key, _) | Proof::Possession(key, _) => Share::Key(key.id()),
            Proof::Certificate(identity) => Share::Certificate(identity.name().to_owned()),
        };
        let mut shares = vec![Share::Connection(connection), proof];
        let operator = caller.account.is_operator() && !possession;
        // The parts that are kept for operators bound the operator account.
        shares.extend((!operator).then(|| Share::Account(caller.account.clone())));
        let priority = match (rpc.restricts(), operator && caller.acting_user.is_none()) {
            (false, false) => Priority::Caller,
            (true, false) => Priority::Restricting,
            (false, true) => Priority::Operator,
            (true, true) => Priority::RestrictingOperator,
        };
        Occupant { shares, priority }
    }

    pub(super) fn priority(&self) -> Priority {
        self.priority
    }
}

/// The permits of one limit.
#[derive(Debug)]
struct Permits {
    limit: usize,
    used: Mutex<Used>,
}

#[derive(Debug, Default)]
struct Used {
    total: usize,
    shares: HashMap<Share, usize>,
}

impl Permits {
    fn new(limit: usize) -> Arc<Permits> {
        Arc::new(Permits { limit, used: Mutex::default() })
    }

    fn used(&self) -> MutexGuard<'_, Used> {
        self.used.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn acquire(self: &Arc<Self>, occupant: Occupant) -> Option<Permit> {
        let fits = |used: usize, limit: usize| used < occupant.priority.part_of(limit);
        let mut used = self.used();
        let share_fits = |share: &Share| {
            let count = used.shares.get(share).copied().unwrap_or(0);
            fits(count, self.limit.div_ceil(share.divisor(occupant.priority)))
        };
        if !fits(used.total, self.limit) || !occupant.shares.iter().all(share_fits) {
            return None;
        }
        used.total += 1;
        for share in &occupant.shares {
            *used.shares.entry(share.clone()).or_default() += 1;
        }
        drop(used);
        Some(Permit { permits: self.clone(), occupant })
    }
}

/// Permission to run, until this is dropped.
#[derive(Debug)]
pub(super) struct Permit {
    permits: Arc<Permits>,
    occupant: Occupant,
}

impl Drop for Permit {
    fn drop(&mut self) {
        let mut used = self.permits.used();
        used.total -= 1;
        for share in &self.occupant.shares {
            if let Some(count) = used.shares.get_mut(share) {
                *count -= 1;
                if *count == 0 {
                    used.shares.remove(share);
                }
            }
        }
    }
}

/// The limits of the whole process.
#[derive(Debug)]
pub(super) struct ConcurrencyLimits {
    management: Arc<Permits>,
    waiting: Arc<Permits>,
    reflection: Arc<Permits>,
    refused: AtomicU64,
    log: [Quiet; 2],
}

impl ConcurrencyLimits {
    pub(super) fn new(overload: Overload) -> ConcurrencyLimits {
        ConcurrencyLimits {
            management: Permits::new(overload.management_calls),
            waiting: Permits::new(overload.management_calls.saturating_mul(WAITING_FOR_EACH)),
            reflection: Permits::new(REFLECTIONS),
            refused: AtomicU64::new(0),
            log: std::array::from_fn(|_| Quiet::once_a_minute()),
        }
    }

    /// A permit for a management call. `follows`: the call only follows a change, as long as that takes.
    pub(super) fn management(
        &self,
        occupant: Occupant,
        follows: bool,
        now: Timestamp,
    ) -> Result<Permit, Status> {
        let permits = if follows { &self.waiting } else { &self.management };
        permits
            .acquire(occupant)
            .ok_or_else(|| self.refuse(0, "call refused: overload.management_calls reached", permits, now))
    }

    /// A permit for an answer of server reflection.
    pub(super) fn reflection(&self, occupant: Occupant, now: Timestamp) -> Result<Permit, Status> {
        self.reflection
            .acquire(occupant)
            .ok_or_else(|| self.refuse(1, "call refused: reflection limit reached", &self.reflection, now))
    }

    fn refuse(&self, log: usize, event: &'static str, permits: &Permits, now: Timestamp) -> Status {
        let refused = self.refused.fetch_add(1, Ordering::Relaxed) + 1;
        if self.log.get(log).is_some_and(|log| log.may(now)) {
            let (limit, used) = (permits.limit, permits.used().total);
            tracing::warn!(used, limit, refused, "{event}");
        }
        overloaded()
    }

    /// Calls that were refused.
    pub(super) fn refused(&self) -> u64 {
        self.refused.load(Ordering::Relaxed)
    }

    /// Runs a management call with its permit, which [`exchange_permit_for_waiting`] exchanges. The permit comes back with the answer.
    pub(super) async fn run<T>(&self, permit: Permit, call: impl Future<Output = T>) -> (T, Option<Permit>) {
        let running = Running { permit: RefCell::new(Some(permit)), waiting: self.waiting.clone() };
        RUNNING
            .scope(running, async {
                let answer = call.await;
                (answer, RUNNING.with(|running| running.permit.take()))
            })
            .await
    }
}

tokio::task_local! {
    static RUNNING: Running;
}

struct Running {
    permit: RefCell<Option<Permit>>,
    waiting: Arc<Permits>,
}

/// Exchanges the permit of the current call, which has made its change and only waits for replicas, for a permit to wait.
/// If none is free, the call keeps its permit.
pub(super) fn exchange_permit_for_waiting() {
    // Without a permit there is nothing to give back.
    let _ = RUNNING.try_with(|running| {
        let mut permit = running.permit.borrow_mut();
        let occupant = permit.as_ref().map(|permit| permit.occupant.clone());
        if let Some(waiting) = occupant.and_then(|occupant| running.waiting.acquire(occupant)) {
            *permit = Some(waiting);
        }
    });
}

/// A body that holds a permit until its end, and may have a time limit.
pub(super) struct PermitBody {
    body: Body,
    timeout: Option<Pin<Box<Sleep>>>,
    _permit: Option<Permit>,
}

impl PermitBody {
    /// A body without a time limit.
    pub(super) fn new(body: Body, permit: Option<Permit>) -> PermitBody {
        PermitBody { body, timeout: None, _permit: permit }
    }

    /// An answer of server reflection.
    pub(super) fn reflection(body: Body, permit: Permit) -> PermitBody {
        PermitBody {
            timeout: Some(Box::pin(sleep(REFLECTION_TIMEOUT))),
            ..PermitBody::new(body, Some(permit))
        }
    }
}

impl http_body::Body for PermitBody {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        if self.timeout.as_mut().is_some_and(|timeout| timeout.as_mut().poll(cx).is_ready()) {
            return Poll::Ready(Some(Err(deadline_exceeded())));
        }
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn occupant(key: u128, account: &str, connection: u64, priority: Priority) -> Occupant {
        let shares = vec![
            Share::Key(KeyId::from_bytes(key.to_be_bytes())),
            Share::Account(AccountId::parse(account).unwrap()),
            Share::Connection(connection),
        ];
        Occupant { shares, priority }
    }

    /// Acquires as many permits as there are, each from another key and connection where they differ.
    fn all(permits: &Arc<Permits>, occupant: impl Fn(u64) -> Occupant) -> Vec<Permit> {
        (0..1000).map_while(|at| permits.acquire(occupant(at))).collect()
    }

    #[test]
    fn a_key_a_connection_and_an_account_take_no_more_than_their_shares() {
        let permits = Permits::new(64);
        let key = all(&permits, |at| occupant(1, &format!("a{at}"), at, Priority::Caller));
        assert_eq!(key.len(), 12, "three quarters of a quarter");
        let connection =
            all(&permits, |at| occupant(5000 + u128::from(at), &format!("b{at}"), 2000, Priority::Caller));
        assert_eq!(connection.len(), 12);
        drop((key, connection));
        let account = all(&permits, |at| occupant(at.into(), "acme", at, Priority::Caller));
        assert_eq!(account.len(), 24, "three quarters of a half");
        drop(account);
        let used = permits.used();
        assert!(used.total == 0 && used.shares.is_empty(), "{used:?}");
    }

    #[test]
    fn calls_that_take_rights_away_and_operators_find_room_when_others_have_filled_theirs() {
        let permits = Permits::new(64);
        let crowd = |priority| move |at: u64| occupant(at.into(), &format!("a{at}"), at, priority);
        let mut held = Vec::new();
        for (priority, sum) in [
            (Priority::Anonymous, 32),
            (Priority::Caller, 48),
            (Priority::Restricting, 56),
            (Priority::Operator, 60),
            (Priority::RestrictingOperator, 64),
        ] {
            held.extend(all(&permits, crowd(priority)));
            assert_eq!(held.len(), sum, "{priority:?}");
        }
    }

    #[test]
    fn a_caller_with_no_room_for_creates_still_revokes() {
        let permits = Permits::new(64);
        let _creates = all(&permits, |_| occupant(1, "acme", 1, Priority::Caller));
        assert!(permits.acquire(occupant(1, "acme", 1, Priority::Restricting)).is_some());
    }

    #[tokio::test]
    async fn a_call_that_only_waits_for_replicas_leaves_its_permit_to_others() {
        let limits = ConcurrencyLimits::new(Overload { management_calls: 1, ..Overload::default() });
        let now = Timestamp::from_micros(0);
        let call = |at: u64| occupant(at.into(), &format!("a{at}"), at, Priority::Caller);
        let permit = limits.management(call(1), false, now).unwrap();
        let one = limits
            .run(permit, async {
                assert!(limits.management(call(2), false, now).is_err());
                exchange_permit_for_waiting();
                limits.management(call(2), false, now)
            })
            .await;
        assert!(one.0.is_ok() && one.1.is_some());
        drop(one);
        assert_eq!((limits.waiting.used().total, limits.refused()), (0, 1));
    }
}
