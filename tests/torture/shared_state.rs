//! What everybody in a run shares: the replicas, the clock, the books.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use keyward::pb;
use tonic::{
    Status,
    transport::{Channel, Endpoint},
};
use tonic_types::StatusExt as _;

use crate::{
    judge::{AcknowledgedChange, ChangeHistory, CheckAnswer, Nanos, ObservedCheck, TokenId},
    process::AuthorizedClients,
    replicas::ReplicaProcess,
};

/// A question to ask in Checks.
#[derive(Clone, Debug)]
pub(crate) struct CheckTarget {
    pub(crate) id: TokenId,
    pub(crate) key: String,
    pub(crate) token: String,
    pub(crate) environment: &'static str,
    pub(crate) scope: &'static str,
    pub(crate) account: Option<String>,
    /// The revision from which on it is granted.
    pub(crate) since: u64,
}

impl CheckTarget {
    /// The request; with `fresh`, from a state that knows the key.
    pub(crate) fn request(&self, fresh: bool) -> pb::CheckRequest {
        pb::CheckRequest {
            token: self.token.clone(),
            environment: self.environment.to_owned(),
            scopes: vec![self.scope.to_owned()],
            account: self.account.clone(),
            min_revision: fresh.then_some(self.since),
            ..Default::default()
        }
    }
}

/// How often narrowing changes returned OK, and how long that took.
#[derive(Debug, Default)]
pub(crate) struct RestrictionTimes {
    pub(crate) revokes: Vec<Duration>,
    pub(crate) others: Vec<Duration>,
    /// Attempts that did not return OK, although they were to be repeated.
    pub(crate) repeated: u64,
}

/// What was written down besides the history.
#[derive(Debug, Default)]
pub(crate) struct RunRecords {
    pub(crate) acknowledged: Vec<AcknowledgedChange>,
    pub(crate) narrowings: RestrictionTimes,
    /// How keys must be found at the end; None = in any state.
    pub(crate) keys: BTreeMap<String, Option<pb::KeyState>>,
    /// What went wrong with calls: the call, the code, the reason.
    pub(crate) failures: BTreeMap<(&'static str, String), u64>,
    /// Reports that cannot come with OK.
    pub(crate) false_reports: Vec<(Nanos, String)>,
    /// Changes that were refused for good, and should not have been.
    pub(crate) refusals: Vec<(Nanos, String)>,
}

impl RunRecords {
    pub(crate) fn record_failure(&mut self, call: &'static str, status: &Status) {
        *self.failures.entry((call, format_status(status))).or_default() += 1;
    }
}

/// A status's code and reason.
pub(crate) fn format_status(status: &Status) -> String {
    let reason = status.get_details_error_info().map(|info| info.reason);
    format!("{:?} {}", status.code(), reason.as_deref().unwrap_or("(no answer)"))
}

/// The field.
pub(crate) struct SharedState {
    pub(crate) replicas: Vec<ReplicaProcess>,
    pub(crate) root: String,
    began: Instant,
    history: Mutex<ChangeHistory>,
    books: Mutex<RunRecords>,
    stopping: AtomicBool,
    recorders: Mutex<Vec<Arc<CheckRecorder>>>,
    /// Checks that were invoked; those that were not answered are not judged.
    pub(crate) invoked: AtomicU64,
}

impl SharedState {
    pub(crate) fn new(replicas: Vec<ReplicaProcess>, root: String, began: Instant) -> SharedState {
        SharedState {
            replicas,
            root,
            began,
            history: Mutex::default(),
            books: Mutex::default(),
            stopping: AtomicBool::new(false),
            recorders: Mutex::default(),
            invoked: AtomicU64::new(0),
        }
    }

    /// Nanoseconds since the run began.
    pub(crate) fn now(&self) -> Nanos {
        Nanos::try_from(self.began.elapsed().as_nanos()).unwrap()
    }

    pub(crate) fn history(&self) -> MutexGuard<'_, ChangeHistory> {
        self.history.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn records(&self) -> MutexGuard<'_, RunRecords> {
        self.books.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the clients are to come to an end.
    pub(crate) fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::Relaxed)
    }

    pub(crate) fn stop(&self) {
        self.stopping.store(true, Ordering::Relaxed);
    }

    /// A connection of its own to a replica.
    pub(crate) fn channel(&self, replica: usize) -> Channel {
        let endpoint = Endpoint::from_shared(format!("http://{}", self.replicas[replica].address)).unwrap();
        endpoint.connect_timeout(Duration::from_secs(2)).tcp_nodelay(true).connect_lazy()
    }

    /// The operator, over a connection of its own to each replica.
    pub(crate) fn operator(&self) -> Vec<AuthorizedClients> {
        (0..self.replicas.len())
            .map(|at| AuthorizedClients::with_token(self.channel(at), &self.root))
            .collect()
    }

    /// A place for one client to write its Checks down.
    pub(crate) fn recorder(&self) -> Arc<CheckRecorder> {
        let recorder = Arc::new(CheckRecorder::default());
        self.recorders.lock().unwrap_or_else(PoisonError::into_inner).push(recorder.clone());
        recorder
    }

    /// The Checks that had returned by then and were not taken before.
    pub(crate) fn take_checks(&self, until: Nanos) -> Vec<ObservedCheck> {
        let recorders = self.recorders.lock().unwrap_or_else(PoisonError::into_inner);
        recorders.iter().flat_map(|recorder| recorder.take(until)).collect()
    }
}

/// The Checks of one client, until they are judged.
#[derive(Default)]
pub(crate) struct CheckRecorder(Mutex<Vec<ObservedCheck>>);

impl CheckRecorder {
    pub(crate) fn record(&self, check: ObservedCheck) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(check);
    }

    fn take(&self, until: Nanos) -> Vec<ObservedCheck> {
        let mut checks = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        checks.extract_if(.., |check| check.returned <= until).collect()
    }
}

/// What a Check's answer says.
pub(crate) fn parse_answer(
    asked: &CheckTarget,
    result: &Result<pb::CheckResponse, Status>,
) -> (CheckAnswer, u64) {
    match result {
        Ok(response) if response.allowed && response.key_id == asked.key => {
            (CheckAnswer::Allowed, response.revision)
        }
        Ok(response) if response.allowed => (CheckAnswer::AllowedAnother, response.revision),
        Ok(response) => (CheckAnswer::Denied(response.reason()), response.revision),
        Err(status) => match status.code() {
            tonic::Code::Unauthenticated | tonic::Code::PermissionDenied => (CheckAnswer::Stranger, 0),
            _ => (CheckAnswer::None, 0),
        },
    }
}
