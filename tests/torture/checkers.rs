//! Those who ask: each hammers one replica with Checks, of what is being changed right now above all. While there are
//! answers, one follows the other; while there are none, more are sent all the same, so that whatever stands still
//! wakes up to questions of every age.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, PoisonError, atomic::Ordering},
    time::Duration,
};

use arc_swap::ArcSwapOption;
use futures_util::{StreamExt as _, stream::FuturesUnordered};
use tonic::Request;

use crate::{
    dice::ScheduleRng,
    judge::ObservedCheck,
    process::AuthorizedClients,
    shared_state::{CheckRecorder, CheckTarget, SharedState, parse_answer},
};

/// How long a question is waited for: most, and some that outlive a replica that stands still.
const CHECK_TIMEOUTS: [Duration; 5] = [
    DEFAULT_CHECK_TIMEOUT,
    DEFAULT_CHECK_TIMEOUT,
    DEFAULT_CHECK_TIMEOUT,
    Duration::from_secs(3),
    Duration::from_secs(9),
];
const DEFAULT_CHECK_TIMEOUT: Duration = Duration::from_secs(1);
/// After so long without an answer, the next is asked.
const NEXT_CHECK_AFTER: Duration = Duration::from_millis(25);
/// So many questions of one checker are under way at the most.
const MAX_CHECKS_IN_FLIGHT: usize = 48;
/// So many dead keys are remembered.
const MAX_RETIRED: usize = 4_000;
/// So many of them are fresh.
const RECENTLY_RETIRED: usize = 16;

/// What there is to ask.
pub(crate) struct CheckTargets {
    /// What each squad works on.
    pub(crate) hot: Vec<ArcSwapOption<CheckTarget>>,
    /// Live keys that nobody changes.
    pub(crate) stock: Vec<Arc<CheckTarget>>,
    /// What must never be allowed.
    pub(crate) never: Vec<Arc<CheckTarget>>,
    retired: Mutex<VecDeque<Arc<CheckTarget>>>,
}

impl CheckTargets {
    pub(crate) fn new(
        squads: usize,
        stock: Vec<Arc<CheckTarget>>,
        never: Vec<Arc<CheckTarget>>,
    ) -> CheckTargets {
        let hot = (0..squads).map(|_| ArcSwapOption::empty()).collect();
        CheckTargets { hot, stock, never, retired: Mutex::default() }
    }

    /// A key that is dead, to be asked about for long.
    pub(crate) fn retire(&self, asked: Arc<CheckTarget>) {
        let mut graves = self.retired.lock().unwrap_or_else(PoisonError::into_inner);
        if graves.len() == MAX_RETIRED {
            graves.pop_front();
        }
        graves.push_back(asked);
    }

    /// One of the dead; every other time a fresh one, which a replica that was silent may not know to be dead.
    fn pick_retired(&self, dice: &mut ScheduleRng) -> Option<Arc<CheckTarget>> {
        let graves = self.retired.lock().unwrap_or_else(PoisonError::into_inner);
        let among = if dice.one_chance_in(2) { graves.len().min(RECENTLY_RETIRED) } else { graves.len() };
        let at = graves.len().checked_sub(1 + dice.below(among as u64) as usize)?;
        graves.get(at).cloned()
    }

    fn pick(&self, squad: usize, dice: &mut ScheduleRng) -> Arc<CheckTarget> {
        let pick = |from: &[Arc<CheckTarget>], dice: &mut ScheduleRng| {
            from[dice.below(from.len() as u64) as usize].clone()
        };
        let asked = match dice.below(100) {
            0..70 => self.hot[squad].load_full(),
            70..88 => self.pick_retired(dice),
            88..90 => Some(pick(&self.never, dice)),
            _ => None,
        };
        asked.unwrap_or_else(|| pick(&self.stock, dice))
    }
}

/// One of them.
pub(crate) struct Checker {
    pub(crate) field: Arc<SharedState>,
    pub(crate) board: Arc<CheckTargets>,
    pub(crate) squad: usize,
    pub(crate) replica: usize,
    pub(crate) dice: ScheduleRng,
}

impl Checker {
    /// Asks until the run is over.
    pub(crate) async fn work(mut self) {
        let caller = AuthorizedClients::with_token(self.field.channel(self.replica), &self.field.root);
        let recorder = self.field.recorder();
        let mut asking = FuturesUnordered::new();
        while !self.field.is_stopping() {
            let waited =
                !asking.is_empty() && tokio::time::timeout(NEXT_CHECK_AFTER, asking.next()).await.is_err();
            if asking.is_empty() || waited && asking.len() < MAX_CHECKS_IN_FLIGHT {
                asking.push(self.ask(caller.clone(), recorder.clone()));
            }
        }
        while asking.next().await.is_some() {}
    }

    /// One Check.
    fn ask(
        &mut self,
        mut caller: AuthorizedClients,
        recorder: Arc<CheckRecorder>,
    ) -> impl Future<Output = ()> + use<> {
        let asked = self.board.pick(self.squad, &mut self.dice);
        let fresh = self.dice.one_chance_in(4);
        let patience = self.dice.pick(&CHECK_TIMEOUTS);
        let (field, replica) = (self.field.clone(), self.replica);
        async move {
            let mut request = Request::new(asked.request(fresh));
            request.set_timeout(patience);
            field.invoked.fetch_add(1, Ordering::Relaxed);
            let life = field.replicas[replica].life();
            let invoked = field.now();
            let result = caller.authz.check(request).await.map(tonic::Response::into_inner);
            let returned = field.now();
            let life = life.filter(|life| field.replicas[replica].life() == Some(*life));
            let (answer, revision) = parse_answer(&asked, &result);
            recorder.record(ObservedCheck {
                token: asked.id,
                replica: u8::try_from(replica).unwrap(),
                epoch: life.unwrap_or_default(),
                invoked,
                returned,
                answer,
                revision,
                min_revision: if fresh { asked.since } else { 0 },
            });
            if let Err(status) = result {
                field.records().record_failure("Check", &status);
                // Nobody there: asking faster helps nobody.
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        }
    }
}
