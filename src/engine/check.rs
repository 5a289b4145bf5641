//! Answers Checks: evaluates a token under the lease, consumes from the key's limits and records the use.
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

/// Answers Checks from memory, and authenticates callers of Keyward.
pub struct Engine {
    /// All keys, accounts, roles and members.
    pub index: Arc<Index>,
    /// Records the uses of keys until they are written.
    pub usage: Arc<UsageRecorder>,
    /// The lease that permits this process to allow.
    pub lease: Arc<ServingLease>,
    /// Counts rate limits and quotas.
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
    /// Creates an engine over an index, which may be loaded later.
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

    /// Returns whether the lease is valid now.
    #[must_use]
    pub fn can_allow(&self) -> bool {
        self.lease.is_valid(|| self.clock.boottime())
    }

    /// The wall clock's current time.
    #[must_use]
    pub fn now(&self) -> Timestamp {
        self.clock.now()
    }

    /// The number of Checks since the start, by reason.
    pub fn outcome_counts(&self) -> impl Iterator<Item = (Reason, u64)> {
        Reason::ALL.into_iter().map(|reason| (reason, self.answered.get(reason as usize)))
    }

    /// Returns the applied revision if it is new enough.
    ///
    /// # Errors
    /// It is older than `want`, or the first snapshot is not loaded.
    pub fn require_revision(&self, want: Option<Revision>) -> Result<Revision, CheckError> {
        let have = self.index.revision().ok_or(CheckError::Starting)?;
        match want {
            Some(want) if want > have => Err(CheckError::Stale { have, want }),
            _ => Ok(have),
        }
    }

    /// Answers a Check. Tokens of other accounts are unknown to every requester except operators.
    ///
    /// # Errors
    /// The state is too old to answer, or the limits cannot be counted. An error is never a denial.
    pub async fn check(
        &self,
        requester: Requester<'_>,
        input: &CheckInput<'_>,
    ) -> Result<CheckOutcome, CheckError> {
        match self.decide_locally(requester, input)? {
            LocalDecision::Complete(outcome) => Ok(outcome),
            // Boxed, since few Checks need it: otherwise every future would be as large as this one.
            LocalDecision::NeedsLimits(awaiting) => Box::pin(self.apply_limits(input, awaiting)).await,
        }
    }

    /// Answers as much of a Check as is possible without waiting.
    ///
    /// # Errors
    /// The state is too old to answer.
    pub fn decide_locally(
        &self,
        requester: Requester<'_>,
        input: &CheckInput<'_>,
    ) -> Result<LocalDecision, CheckError> {
        let evaluation = self.evaluate_under_lease(requester, input)?;
        Ok(match evaluation.needs_limits() {
            true => LocalDecision::NeedsLimits(AwaitingLimits(evaluation)),
            false => LocalDecision::Complete(self.complete_check(input, evaluation)),
        })
    }

    /// Completes a Check: consumes from the limits of its key.
    ///
    /// # Errors
    /// The limits cannot be counted.
    pub async fn apply_limits(
        &self,
        input: &CheckInput<'_>,
        awaiting: AwaitingLimits,
    ) -> Result<CheckOutcome, CheckError> {
        let AwaitingLimits(mut evaluation) = awaiting;
        if let (Some(key_match), Some(limit_state)) = (&evaluation.outcome.key_match, &evaluation.limit_state)
        {
            let consumption =
                Consumption { cost: input.cost, dedup_id: input.dedup_id, dry_run: input.dry_run };
            let limits =
                self.limiter.consume(&key_match.key, limit_state, consumption, evaluation.now).await?;
            limits
                .refusal_reasons
                .iter()
                .for_each(|reason| evaluation.outcome.failures.insert_if(*reason, true));
            evaluation.outcome.limits = Some(Box::new(limits));
        }
        Ok(self.complete_check(input, evaluation))
    }

    /// Completes the outcome, counts it and records the use of the key.
    fn complete_check(&self, input: &CheckInput<'_>, evaluation: Evaluation) -> CheckOutcome {
        let Evaluation { mut outcome, limit_state, now } = evaluation;
        if let Some(key_match) = outcome.key_match.as_ref().filter(|_| !input.dry_run) {
            self.record_usage(
                key_match,
                outcome.reason(),
                limit_state.as_ref().filter(|_| outcome.limits().consumed_quota),
                now,
            );
        }
        outcome.staleness = self.lease.staleness(|| self.clock.boottime());
        self.answered.add(outcome.reason() as usize, 1);
        outcome
    }

    /// Evaluates a Check in the order that the lease demands: deadline, clock, look-up.
    fn evaluate_under_lease(
        &self,
        requester: Requester<'_>,
        input: &CheckInput<'_>,
    ) -> Result<Evaluation, CheckError> {
        let Requester { account, is_still_authorized } = requester;
        let evaluate = |has_valid_lease| {
            // The requester may have been revoked, and the lease renewed, before the deadline was read.
            if !is_still_authorized()? {
                return Err(CheckError::RequesterRevoked);
            }
            // Read before the look-up: whatever is found is at least as new.
            let revision = self.require_revision(input.min_revision)?;
            self.evaluate(account, input, revision, has_valid_lease)
        };
        #[cfg(keyward_breakable)]
        if let Some(evaluation) = self.evaluate_before_lease(evaluate) {
            return evaluation;
        }
        self.lease.with_validity(|| self.clock.boottime(), evaluate)
    }

    /// Breaks an invariant on purpose, for fault injection: evaluates first and reads the deadline afterwards.
    ///
    /// A stall between both, in some Checks without a lease, widens a window of nanoseconds until tests can hit it.
    #[cfg(keyward_breakable)]
    #[expect(clippy::disallowed_methods, reason = "the whole thread must stall")]
    fn evaluate_before_lease(
        &self,
        evaluate: impl FnOnce(bool) -> Result<Evaluation, CheckError>,
    ) -> Option<Result<Evaluation, CheckError>> {
        use crate::domain::lease::{AllInvariants, InvariantSet as _, LeaseInvariant};
        use std::sync::atomic::{AtomicU64, Ordering};
        if AllInvariants.enforces(LeaseInvariant::DeadlineBeforeLookUp) {
            return None;
        }
        static STALE: AtomicU64 = AtomicU64::new(0);
        let evaluation = evaluate(true);
        if !self.can_allow() && STALE.fetch_add(1, Ordering::Relaxed).is_multiple_of(32) {
            std::thread::sleep(std::time::Duration::from_millis(100));
        }
        let allowed = evaluation.as_ref().is_ok_and(|evaluation| evaluation.outcome.reason() == Reason::Ok);
        Some(if allowed && !self.can_allow() { Err(CheckError::LeaseLost) } else { evaluation })
    }

    /// Finds the key and evaluates it without waiting; the limits are not consumed.
    fn evaluate(
        &self,
        requester: &AccountId,
        input: &CheckInput<'_>,
        revision: Revision,
        has_valid_lease: bool,
    ) -> Result<Evaluation, CheckError> {
        let now = self.clock.now();
        let without_key = |reason| {
            Ok(Evaluation { outcome: CheckOutcome::from_reason(reason, revision), limit_state: None, now })
        };
        if !token::can_be_token(input.token) {
            return without_key(Reason::Malformed);
        }
        let visible = |found: &FoundKey| match found.key.owner() {
            _ if requester.is_operator() => true,
            KeyOwner::Account(account) => account == requester,
            KeyOwner::User(user) => self.index.member(requester, user).is_some(),
        };
        let Some(found) = self.index.find_by_digest(&TokenDigest::from_token(input.token)).filter(visible)
        else {
            if !has_valid_lease {
                // The key may have been created or imported since.
                return Err(CheckError::LeaseLost);
            }
            return without_key(unknown_token_reason(input.token));
        };
        let request = PolicyRequest {
            purpose: TokenPurpose::Service { environment: input.environment, customer: input.customer },
            account: input.account,
            client_ip: input.client_ip,
            scopes: input.scopes,
        };
        // An account's caller must not learn of its users' memberships in other accounts.
        let context = input.account.filter(|requested| requester.is_operator() || *requested == requester);
        let context = AccountContext::new(&self.index, &found.key, context);
        let PolicyDecision { failed_reasons: mut failures, missing_scopes } =
            evaluate_key(&found, &context, request, now);
        let granted_scopes = context.granted_scopes(&found.key);
        let is_refused_management_key =
            input.refuse_management_keys && granted_scopes.scopes(&found.key).iter().any(Scope::is_reserved);
        failures.insert_if(Reason::MissingScope, is_refused_management_key);
        if !has_valid_lease && failures.primary_reason() == Reason::Ok {
            return Err(CheckError::LeaseLost);
        }
        // The records belong together unless the index was cleared during the evaluation.
        self.index.revision().ok_or(CheckError::Starting)?;
        let outcome = CheckOutcome {
            failures,
            missing_scopes,
            granted_scopes,
            is_refused_management_key,
            acting_account: context.acting_account(&found.key, request.account),
            key_match: Some(KeyMatch { key: found.key, secret_version: found.secret_version }),
            ..CheckOutcome::from_reason(Reason::Ok, revision)
        };
        Ok(Evaluation { outcome, limit_state: found.limit_state, now })
    }

    /// Records the use of a key. `touched_quota` is set if units of its quota were consumed.
    pub(super) fn record_usage(
        &self,
        key_match: &KeyMatch,
        reason: Reason,
        touched_quota: Option<&Arc<KeyLimitState>>,
        now: Timestamp,
    ) {
        let event = UsageEvent {
            key_id: key_match.key.id(),
            at: now,
            secret_version: key_match.secret_version,
            reason,
        };
        self.usage.record(event, touched_quota);
    }

    /// Returns all scopes that a key is granted in an account; for a service key, always in its own account.
    #[must_use]
    pub fn effective_scopes(&self, key: &impl KeyAttributes, account: Option<&AccountId>) -> ScopeSet {
        AccountContext::new(&self.index, key, account).subject(key, 0).effective_scopes()
    }
}

/// The part of a Check that is decided without waiting.
#[derive(Debug)]
pub enum LocalDecision {
    /// The Check is answered completely.
    Complete(CheckOutcome),
    /// The Check is allowed unless the key's limits refuse it.
    NeedsLimits(AwaitingLimits),
}

/// A Check whose limits are not consumed yet.
#[derive(Debug)]
pub struct AwaitingLimits(Evaluation);

/// An evaluated key and outcome, before the limits.
#[derive(Debug)]
struct Evaluation {
    outcome: CheckOutcome,
    /// The limits of the key, if it has any and the requester may know the key.
    limit_state: Option<Arc<KeyLimitState>>,
    now: Timestamp,
}

impl Evaluation {
    /// Returns whether the outcome still depends on the limits.
    fn needs_limits(&self) -> bool {
        self.outcome.reason() == Reason::Ok && self.limit_state.is_some()
    }
}
