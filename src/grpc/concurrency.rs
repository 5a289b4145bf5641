//! Limits concurrent calls that run for long: management calls, calls that wait for replicas,
//! and responses of server reflection.
//!
//! A caller, an account and a connection each have a share of a limit. A part is reserved for calls that restrict
//! rights, and for operators. Short Checks are limited in `load_shed.rs`.
//!
//! A permit is acquired once the request has arrived, so a call that sends nothing holds none.

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
    caller::{Caller, CallerIdentity},
    domain::{
        name::{AccountId, KeyId},
        time::Timestamp,
    },
    log_throttle::LogThrottle,
    transport::{OverloadLimits, memory_budget::CallPriority},
};

use super::{
    rpc::RpcSpec,
    status::{deadline_exceeded, overloaded},
};

/// Calls that may wait for replicas, or watch a change, per management call that may run.
const WAITING_PER_RUNNING: usize = 4;
/// Concurrent responses of server reflection, each of which is large. Its callers are anonymous, and may fill half.
const MAX_REFLECTION_CALLS: usize = 128;
/// Time limit of a reflection response.
const REFLECTION_TIMEOUT: Duration = Duration::from_secs(60);

/// A subject that may use only a share of each limit.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum LimitSubject {
    Key(KeyId),
    Certificate(String),
    Account(AccountId),
    Connection(u64),
}

impl LimitSubject {
    /// The limit is divided by this number to get the share. Operators provision for all accounts, so
    /// they have twice as much.
    fn share_divisor(&self, priority: CallPriority) -> usize {
        match (self, priority) {
            (LimitSubject::Account(_), _)
            | (_, CallPriority::Operator | CallPriority::RestrictingOperator) => 2,
            (LimitSubject::Key(_) | LimitSubject::Certificate(_) | LimitSubject::Connection(_), _) => 4,
        }
    }
}

/// The subjects that a call counts against, and the priority that decides how far it may fill the limits.
#[derive(Clone, Debug)]
pub(super) struct PermitHolder {
    subjects: Vec<LimitSubject>,
    priority: CallPriority,
}

impl PermitHolder {
    /// An anonymous call on this connection.
    pub(super) fn from_connection(connection: u64) -> PermitHolder {
        PermitHolder {
            subjects: vec![LimitSubject::Connection(connection)],
            priority: CallPriority::Anonymous,
        }
    }

    /// A call of an anonymous proxy, which is trusted if the listener serves Envoy alone.
    pub(super) fn from_proxy(trusted: bool, connection: u64) -> PermitHolder {
        let priority = if trusted { CallPriority::Caller } else { CallPriority::Anonymous };
        PermitHolder { priority, ..PermitHolder::from_connection(connection) }
    }

    /// A call of this caller. The operators' reserve is not for operators that act for a person, nor for callers that
    /// only prove possession, since their key may be revoked.
    pub(super) fn from_caller(caller: &Caller, rpc: &RpcSpec, connection: u64) -> PermitHolder {
        let possession = matches!(caller.identity, CallerIdentity::Possession(..));
        let credential_subject = match &caller.identity {
            CallerIdentity::Key(key, _) | CallerIdentity::Possession(key, _) => LimitSubject::Key(key.id()),
            CallerIdentity::Certificate(identity) => {
                LimitSubject::Certificate(identity.actor_name().to_owned())
            }
        };
        let mut subjects = vec![LimitSubject::Connection(connection), credential_subject];
        let operator = caller.account.is_operator() && !possession;
        // The reserve for operators already bounds the operator account.
        subjects.extend((!operator).then(|| LimitSubject::Account(caller.account.clone())));
        let priority = match (rpc.is_restricting(), operator && caller.acting_user.is_none()) {
            (false, false) => CallPriority::Caller,
            (true, false) => CallPriority::Restricting,
            (false, true) => CallPriority::Operator,
            (true, true) => CallPriority::RestrictingOperator,
        };
        PermitHolder { subjects, priority }
    }

    pub(super) fn priority(&self) -> CallPriority {
        self.priority
    }
}

/// The permits of one limit, and their holders.
#[derive(Debug)]
struct PermitPool {
    limit: usize,
    usage: Mutex<PoolUsage>,
}

#[derive(Debug, Default)]
struct PoolUsage {
    total: usize,
    by_subject: HashMap<LimitSubject, usize>,
}

impl PermitPool {
    fn new(limit: usize) -> Arc<PermitPool> {
        Arc::new(PermitPool { limit, usage: Mutex::default() })
    }

    fn usage(&self) -> MutexGuard<'_, PoolUsage> {
        self.usage.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn acquire(self: &Arc<Self>, holder: PermitHolder) -> Option<CallPermit> {
        let fits = |used: usize, limit: usize| used < holder.priority.share_of(limit);
        let mut used = self.usage();
        let subject_fits = |subject: &LimitSubject| {
            let count = used.by_subject.get(subject).copied().unwrap_or(0);
            fits(count, self.limit.div_ceil(subject.share_divisor(holder.priority)))
        };
        if !fits(used.total, self.limit) || !holder.subjects.iter().all(subject_fits) {
            return None;
        }
        used.total += 1;
        for subject in &holder.subjects {
            *used.by_subject.entry(subject.clone()).or_default() += 1;
        }
        drop(used);
        Some(CallPermit { pool: self.clone(), holder })
    }
}

/// A permit to run, released on drop.
#[derive(Debug)]
pub(super) struct CallPermit {
    pool: Arc<PermitPool>,
    holder: PermitHolder,
}

impl Drop for CallPermit {
    fn drop(&mut self) {
        let mut used = self.pool.usage();
        used.total -= 1;
        for subject in &self.holder.subjects {
            if let Some(count) = used.by_subject.get_mut(subject) {
                *count -= 1;
                if *count == 0 {
                    used.by_subject.remove(subject);
                }
            }
        }
    }
}

/// The limits of the process.
#[derive(Debug)]
pub(super) struct ConcurrencyLimits {
    management: Arc<PermitPool>,
    waiting: Arc<PermitPool>,
    reflection: Arc<PermitPool>,
    refused_calls: AtomicU64,
    log_throttles: [LogThrottle; 2],
}

impl ConcurrencyLimits {
    pub(super) fn new(overload: OverloadLimits) -> ConcurrencyLimits {
        ConcurrencyLimits {
            management: PermitPool::new(overload.management_calls),
            waiting: PermitPool::new(overload.management_calls.saturating_mul(WAITING_PER_RUNNING)),
            reflection: PermitPool::new(MAX_REFLECTION_CALLS),
            refused_calls: AtomicU64::new(0),
            log_throttles: std::array::from_fn(|_| LogThrottle::once_per_minute()),
        }
    }

    /// Acquires a permit for a management call. `is_watch`: the call only watches a change, for as long as that takes.
    pub(super) fn acquire_management(
        &self,
        holder: PermitHolder,
        is_watch: bool,
        now: Timestamp,
    ) -> Result<CallPermit, Status> {
        let pool = if is_watch { &self.waiting } else { &self.management };
        pool.acquire(holder)
            .ok_or_else(|| self.refuse(0, "call refused: overload.management_calls reached", pool, now))
    }

    /// Acquires a permit for a response of server reflection.
    pub(super) fn acquire_reflection(
        &self,
        holder: PermitHolder,
        now: Timestamp,
    ) -> Result<CallPermit, Status> {
        self.reflection
            .acquire(holder)
            .ok_or_else(|| self.refuse(1, "call refused: reflection limit reached", &self.reflection, now))
    }

    fn refuse(&self, log: usize, event: &'static str, pool: &PermitPool, now: Timestamp) -> Status {
        let refused = self.refused_calls.fetch_add(1, Ordering::Relaxed) + 1;
        if self.log_throttles.get(log).is_some_and(|log| log.allow(now)) {
            let (limit, used) = (pool.limit, pool.usage().total);
            tracing::warn!(used, limit, refused, "{event}");
        }
        overloaded()
    }

    pub(super) fn refused_calls(&self) -> u64 {
        self.refused_calls.load(Ordering::Relaxed)
    }

    /// Runs a management call with its permit, which [`exchange_permit_for_waiting`] may exchange. Returns
    /// the permit with the response.
    pub(super) async fn run<T>(
        &self,
        permit: CallPermit,
        call: impl Future<Output = T>,
    ) -> (T, Option<CallPermit>) {
        let running = RunningCall { permit: RefCell::new(Some(permit)), waiting_pool: self.waiting.clone() };
        RUNNING_CALL
            .scope(running, async {
                let answer = call.await;
                (answer, RUNNING_CALL.with(|running| running.permit.take()))
            })
            .await
    }
}

tokio::task_local! {
    static RUNNING_CALL: RunningCall;
}

struct RunningCall {
    permit: RefCell<Option<CallPermit>>,
    waiting_pool: Arc<PermitPool>,
}

/// Exchanges the permit of the current call for a waiting permit. Called once the change is made and only replicas are
/// awaited. If no waiting permit is free, the call keeps its own.
pub(super) fn exchange_permit_for_waiting() {
    // Outside of `run` there is no permit to exchange.
    let _ = RUNNING_CALL.try_with(|running| {
        let mut permit = running.permit.borrow_mut();
        let holder = permit.as_ref().map(|permit| permit.holder.clone());
        if let Some(waiting) = holder.and_then(|holder| running.waiting_pool.acquire(holder)) {
            *permit = Some(waiting);
        }
    });
}

/// A body that holds a permit until it ends, and may have a time limit.
pub(super) struct PermitBody {
    body: Body,
    timeout: Option<Pin<Box<Sleep>>>,
    _permit: Option<CallPermit>,
}

impl PermitBody {
    /// A body without a time limit.
    pub(super) fn new(body: Body, permit: Option<CallPermit>) -> PermitBody {
        PermitBody { body, timeout: None, _permit: permit }
    }

    /// A body of a reflection response, with its time limit.
    pub(super) fn for_reflection(body: Body, permit: CallPermit) -> PermitBody {
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

    fn permit_holder(key: u128, account: &str, connection: u64, priority: CallPriority) -> PermitHolder {
        let subjects = vec![
            LimitSubject::Key(KeyId::from_bytes(key.to_be_bytes())),
            LimitSubject::Account(AccountId::parse(account).unwrap()),
            LimitSubject::Connection(connection),
        ];
        PermitHolder { subjects, priority }
    }

    /// Acquires as many permits as possible, each for the holder of its number.
    fn acquire_all(pool: &Arc<PermitPool>, holder: impl Fn(u64) -> PermitHolder) -> Vec<CallPermit> {
        (0..1000).map_while(|at| pool.acquire(holder(at))).collect()
    }

    #[test]
    fn a_key_a_connection_and_an_account_take_no_more_than_their_shares() {
        let pool = PermitPool::new(64);
        let key = acquire_all(&pool, |at| permit_holder(1, &format!("a{at}"), at, CallPriority::Caller));
        assert_eq!(key.len(), 12, "three quarters of a quarter");
        let connection = acquire_all(&pool, |at| {
            permit_holder(5000 + u128::from(at), &format!("b{at}"), 2000, CallPriority::Caller)
        });
        assert_eq!(connection.len(), 12);
        drop((key, connection));
        let account = acquire_all(&pool, |at| permit_holder(at.into(), "acme", at, CallPriority::Caller));
        assert_eq!(account.len(), 24, "three quarters of a half");
        drop(account);
        let used = pool.usage();
        assert!(used.total == 0 && used.by_subject.is_empty(), "{used:?}");
    }

    #[test]
    fn calls_that_take_rights_away_and_operators_find_room_when_others_have_filled_theirs() {
        let pool = PermitPool::new(64);
        let crowd = |priority| move |at: u64| permit_holder(at.into(), &format!("a{at}"), at, priority);
        let mut held = Vec::new();
        for (priority, sum) in [
            (CallPriority::Anonymous, 32),
            (CallPriority::Caller, 48),
            (CallPriority::Restricting, 56),
            (CallPriority::Operator, 60),
            (CallPriority::RestrictingOperator, 64),
        ] {
            held.extend(acquire_all(&pool, crowd(priority)));
            assert_eq!(held.len(), sum, "{priority:?}");
        }
    }

    #[test]
    fn a_caller_with_no_room_for_creates_still_revokes() {
        let pool = PermitPool::new(64);
        let _creates = acquire_all(&pool, |_| permit_holder(1, "acme", 1, CallPriority::Caller));
        assert!(pool.acquire(permit_holder(1, "acme", 1, CallPriority::Restricting)).is_some());
    }

    #[tokio::test]
    async fn a_call_that_only_waits_for_replicas_leaves_its_permit_to_others() {
        let limits =
            ConcurrencyLimits::new(OverloadLimits { management_calls: 1, ..OverloadLimits::default() });
        let now = Timestamp::from_micros(0);
        let call = |at: u64| permit_holder(at.into(), &format!("a{at}"), at, CallPriority::Caller);
        let permit = limits.acquire_management(call(1), false, now).unwrap();
        let one = limits
            .run(permit, async {
                assert!(limits.acquire_management(call(2), false, now).is_err());
                exchange_permit_for_waiting();
                limits.acquire_management(call(2), false, now)
            })
            .await;
        assert!(one.0.is_ok() && one.1.is_some());
        drop(one);
        assert_eq!((limits.waiting.usage().total, limits.refused_calls()), (0, 1));
    }
}
