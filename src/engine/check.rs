//! The engine's Check: under the lease, from the token to the outcome.
//!
//! Callers of Keyward itself are authenticated in `authenticate.rs`; the policy is in `domain`.

use std::sync::Arc;

use crate::{
    clock::Clock,
    domain::{
        key::KeyOwner,
        key_attributes::KeyAttributes,
        name::AccountId,
        policy_decision::{PolicyDecision, PolicyRequest, Reason, TokenPurpose},
        scope::{Scope, ScopeSet},
        time::{Revision, Timestamp},
        token::{self, TokenDigest},
    },
    metrics_core::ShardedCounters,
};

use super::{
    check_input::{CheckInput, Requester},
    check_outcome::{CheckOutcome, KeyMatch},
    error::CheckError,
    evaluate::{AccountContext, evaluate_key, unknown_token_reason},
    index::{FoundKey, Index},
    key_limits::{Consumption, KeyLimitState},
    limiter::{LimitSettings, Limiter},
    serving_lease::ServingLease,
    usage::{UsageEvent, UsageRecorder},
};

/// Answers Checks.
pub struct Engine {
    /// The keys and accounts.
    pub index: Arc<Index>,
    /// The uses that are not written yet.
    pub usage: Arc<UsageRecorder>,
    /// Until when anything may be allowed.
    pub lease: Arc<ServingLease>,
    /// Counts the limits.
    pub limiter: Limiter,
    pub(super) clock: Arc<dyn Clock>,
    answered: ShardedCounters,
}

impl std::fmt::Debug for Engine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Engine").field("index", &self.index).finish_non_exhaustive()
    }
}

impl Engine {
    /// An engine over an index that may still be empty.
    #[must_use]
    pub fn new(
        index: Arc<Index>,
        usage: Arc<UsageRecorder>,
        lease: Arc<ServingLease>,
        limits: &LimitSettings,
        clock: Arc<dyn Clock>,
    ) -> Self {
        let limiter = Limiter::new(limits, lease.clone(), usage.clone());
        Engine { index, usage, lease, limiter, clock, answered: ShardedCounters::new(Reason::ALL.len()) }
    }

    /// Whether anything may be allowed now.
    #[must_use]
    pub fn can_allow(&self) -> bool {
        self.lease.is_valid(|| self.clock.boottime())
    }

    /// The present instant.
    #[must_use]
    pub fn now(&self) -> Timestamp {
        self.clock.now()
    }

    /// How many Checks were answered with each reason since the start.
    pub fn outcome_counts(&self) -> impl Iterator<Item = (Reason, u64)> {
        Reason::ALL.into_iter().map(|reason| (reason, self.answered.get(reason as usize)))
    }

    /// The revision here, if it is as new as asked.
    ///
    /// # Errors
    /// When it is not.
    pub fn require_revision(&self, want: Option<Revision>) -> Result<Revision, CheckError> {
        let have = self.index.revision().ok_or(CheckError::Starting)?;
        match want {
            Some(want) if want > have => Err(CheckError::Stale { have, want }),
            _ => Ok(have),
        }
    }

    /// Decides one question for whoever asks. A token of another account is unknown to all but operators.
    ///
    /// # Errors
    /// When the state here is not good enough to answer, or the limits cannot be counted; that is no verdict.
    pub async fn check(
        &self,
        asker: Requester<'_>,
        question: &CheckInput<'_>,
    ) -> Result<CheckOutcome, CheckError> {
        match self.decide_locally(asker, question)? {
            LocalDecision::Complete(answer) => Ok(answer),
            // Apart on the heap, since few wait: a future is as large as all that may go on in it, and is moved about.
            LocalDecision::NeedsLimits(limited) => Box::pin(self.apply_limits(question, limited)).await,
        }
    }

    /// The same as far as it goes without a wait.
    ///
    /// # Errors
    /// When the state here is not good enough to answer.
    pub fn decide_locally(
        &self,
        asker: Requester<'_>,
        question: &CheckInput<'_>,
    ) -> Result<LocalDecision, CheckError> {
        let judged = self.evaluate_under_lease(asker, question)?;
        Ok(match judged.needs_limits() {
            true => LocalDecision::NeedsLimits(AwaitingLimits(judged)),
            false => LocalDecision::Complete(self.complete_check(question, judged)),
        })
    }

    /// Answers the same question when the limits have been asked.
    ///
    /// # Errors
    /// When the limits cannot be counted.
    pub async fn apply_limits(
        &self,
        question: &CheckInput<'_>,
        limited: AwaitingLimits,
    ) -> Result<CheckOutcome, CheckError> {
        let AwaitingLimits(mut judged) = limited;
        if let (Some(holder), Some(budget)) = (&judged.outcome.key_match, &judged.limit_state) {
            let take =
                Consumption { cost: question.cost, dedup_id: question.dedup_id, dry_run: question.dry_run };
            let limits = self.limiter.consume(&holder.key, budget, take, judged.now).await?;
            limits.refusal_reasons.iter().for_each(|reason| judged.outcome.failures.insert_if(*reason, true));
            judged.outcome.limits = Some(Box::new(limits));
        }
        Ok(self.complete_check(question, judged))
    }

    /// The answer; its use is noted.
    fn complete_check(&self, question: &CheckInput<'_>, judged: Evaluation) -> CheckOutcome {
        let Evaluation { outcome: mut answer, limit_state: budget, now } = judged;
        if let Some(holder) = answer.key_match.as_ref().filter(|_| !question.dry_run) {
            self.record_usage(
                holder,
                answer.reason(),
                budget.as_ref().filter(|_| answer.limits().consumed_quota),
                now,
            );
        }
        answer.staleness = self.lease.staleness(|| self.clock.boottime());
        self.answered.add(answer.reason() as usize, 1);
        answer
    }

    /// Reads the deadline, then the clock, and judges after.
    fn evaluate_under_lease(
        &self,
        asker: Requester<'_>,
        question: &CheckInput<'_>,
    ) -> Result<Evaluation, CheckError> {
        let Requester { account, is_still_authorized: stands } = asker;
        let judge = |fresh| {
            // Whoever was let in before the deadline was read may have been revoked meanwhile, and the lease renewed after.
            if !stands()? {
                return Err(CheckError::RequesterRevoked);
            }
            // Before the look-up: what is found is at least as new.
            let revision = self.require_revision(question.min_revision)?;
            self.evaluate(account, question, revision, fresh)
        };
        #[cfg(keyward_breakable)]
        if let Some(judged) = self.evaluate_before_lease(judge) {
            return judged;
        }
        self.lease.with_validity(|| self.clock.boottime(), judge)
    }

    /// As it must not be, where a process is told to do so: judges, and reads the deadline after. A stall between, now
    /// and then while there is no lease, makes a window of nanoseconds wide enough to be hit.
    #[cfg(keyward_breakable)]
    #[expect(clippy::disallowed_methods, reason = "whatever else this thread serves is to wait")]
    fn evaluate_before_lease(
        &self,
        judge: impl FnOnce(bool) -> Result<Evaluation, CheckError>,
    ) -> Option<Result<Evaluation, CheckError>> {
        use crate::domain::lease::{AllInvariants, InvariantSet as _, LeaseInvariant};
        use std::sync::atomic::{AtomicU64, Ordering};
        if AllInvariants.enforces(LeaseInvariant::DeadlineBeforeLookUp) {
            return None;
        }
        static STALE: AtomicU64 = AtomicU64::new(0);
        let judged = judge(true);
        if !self.can_allow() && STALE.fetch_add(1, Ordering::Relaxed).is_multiple_of(32) {
            std::thread::sleep(std::time::Duration::from_millis(100));
        }
        let allowed = judged.as_ref().is_ok_and(|judged| judged.outcome.reason() == Reason::Ok);
        Some(if allowed && !self.can_allow() { Err(CheckError::LeaseLost) } else { judged })
    }

    /// Finds the key and decides by what is known of it; awaits nothing. The limits are not asked yet.
    fn evaluate(
        &self,
        asker: &AccountId,
        question: &CheckInput<'_>,
        revision: Revision,
        fresh: bool,
    ) -> Result<Evaluation, CheckError> {
        let now = self.clock.now();
        let without_key = |reason| {
            Ok(Evaluation { outcome: CheckOutcome::from_reason(reason, revision), limit_state: None, now })
        };
        if !token::can_be_token(question.token) {
            return without_key(Reason::Malformed);
        }
        let visible = |found: &FoundKey| match found.key.owner() {
            _ if asker.is_operator() => true,
            KeyOwner::Account(account) => account == asker,
            KeyOwner::User(user) => self.index.member(asker, user).is_some(),
        };
        let Some(found) = self.index.find_by_digest(&TokenDigest::from_token(question.token)).filter(visible)
        else {
            if !fresh {
                // It may have been made or imported since.
                return Err(CheckError::LeaseLost);
            }
            return without_key(unknown_token_reason(question.token));
        };
        let request = PolicyRequest {
            purpose: TokenPurpose::Service { environment: question.environment, customer: question.customer },
            account: question.account,
            client_ip: question.client_ip,
            scopes: question.scopes,
        };
        // An account's caller learns nothing of its users' places in other accounts.
        let place = question.account.filter(|asked| asker.is_operator() || *asked == asker);
        let place = AccountContext::new(&self.index, &found.key, place);
        let PolicyDecision { failed_reasons: mut failures, missing_scopes: missing } =
            evaluate_key(&found, &place, request, now);
        let granted = place.granted_scopes(&found.key);
        let barred =
            question.refuse_management_keys && granted.scopes(&found.key).iter().any(Scope::is_reserved);
        failures.insert_if(Reason::MissingScope, barred);
        if !fresh && failures.primary_reason() == Reason::Ok {
            return Err(CheckError::LeaseLost);
        }
        // What was found together was there together, unless everything was being replaced.
        self.index.revision().ok_or(CheckError::Starting)?;
        let answer = CheckOutcome {
            failures,
            missing_scopes: missing,
            granted_scopes: granted,
            is_refused_management_key: barred,
            acting_account: place.acting_account(&found.key, request.account),
            key_match: Some(KeyMatch { key: found.key, secret_version: found.secret_version }),
            ..CheckOutcome::from_reason(Reason::Ok, revision)
        };
        Ok(Evaluation { outcome: answer, limit_state: found.limit_state, now })
    }

    /// `drew`: the budget, if the quota was drawn from.
    pub(super) fn record_usage(
        &self,
        holder: &KeyMatch,
        reason: Reason,
        drew: Option<&Arc<KeyLimitState>>,
        now: Timestamp,
    ) {
        let note =
            UsageEvent { key_id: holder.key.id(), at: now, secret_version: holder.secret_version, reason };
        self.usage.record(note, drew);
    }

    /// Everything that a key is granted in an account, or, of a service key, in its own.
    #[must_use]
    pub fn effective_scopes(&self, key: &impl KeyAttributes, account: Option<&AccountId>) -> ScopeSet {
        AccountContext::new(&self.index, key, account).subject(key, 0).effective_scopes()
    }
}

/// A question, as far as it is decided without a wait.
#[derive(Debug)]
pub enum LocalDecision {
    /// It is answered.
    Complete(CheckOutcome),
    /// It is allowed, unless the key's limits say no.
    NeedsLimits(AwaitingLimits),
}

/// A question that is decided but for the limits of its key.
#[derive(Debug)]
pub struct AwaitingLimits(Evaluation);

/// A question that is decided but for the limits.
#[derive(Debug)]
struct Evaluation {
    outcome: CheckOutcome,
    /// What is used of the key's limits, where the asker may know of it and it has any.
    limit_state: Option<Arc<KeyLimitState>>,
    now: Timestamp,
}

impl Evaluation {
    /// Whether it hangs on limits now.
    fn needs_limits(&self) -> bool {
        self.outcome.reason() == Reason::Ok && self.limit_state.is_some()
    }
}
