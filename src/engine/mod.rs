//! The engine: answers Checks from memory. Nothing here asks a database, and nothing awaits but `limiter`: a Check of
//! a key without limits is answered the first time that it is polled.
//!
//! `parse → digest → look up → decide_locally → consume from the limits → note the use → answer`. An unknown token is judged by its
//! checksum after the look-up, since imported tokens have checksums of other systems. The index is fed with log rows
//! in revision order; uses are written behind. Who may ask, and how answers look on the wire, is `grpc`'s business.

pub mod authenticate;
pub mod caller_cache;
pub mod index;
pub mod lease_deadline;
pub mod limiter;
pub mod serving_lease;
mod tracked_reads;
pub mod usage;

use std::{net::IpAddr, sync::Arc, time::Duration};

use crate::{
    clock::Clock,
    domain::{
        account::Role,
        key::KeyOwner,
        key_attributes::KeyAttributes,
        name::{AccountId, CustomerId, EnvironmentName},
        policy_decision::{
            CheckSubject, MembershipStatus, PolicyDecision, PolicyRequest, Reason, ReasonSet, TokenPurpose,
            decide,
        },
        scope::{Scope, ScopeSet},
        time::{Revision, Timestamp},
        token::{self, TokenDigest},
    },
    metrics_core::ShardedCounters,
};

pub use authenticate::{AccountStatus, AuthenticatedKey, AuthenticationFailure};
pub use index::KeyRef;

use index::{FoundKey, Index};
use limiter::{Consumption, KeyLimitState, LimitSettings, Limiter, RequestDedupId};
use serving_lease::ServingLease;
use usage::{UsageRecorder, buffer::UsageEvent};

/// What a Check asks, once it has been read from the wire.
#[derive(Clone, Debug)]
pub struct CheckInput<'a> {
    /// The presented string.
    pub token: &'a str,
    /// Where the call is made.
    pub environment: &'a EnvironmentName,
    /// The scopes that are all needed. Empty = only whether the token is valid here.
    pub scopes: &'a [Scope],
    /// The account that is acted on.
    pub account: Option<&'a AccountId>,
    /// Whom the call is about.
    pub customer: Option<&'a CustomerId>,
    /// The end client's address.
    pub client_ip: Option<IpAddr>,
    /// Units to take of limits and quota.
    pub cost: u64,
    /// Decide, and leave no trace.
    pub dry_run: bool,
    /// Answer only from a state at least as new.
    pub min_revision: Option<Revision>,
    /// What the asker calls this request: asked again under the same number, it takes of the limits once.
    pub dedup_id: Option<RequestDedupId>,
    /// Whether a key that may call Keyward itself is refused here. Such keys are for managing.
    pub refuse_management_keys: bool,
}

/// Who asks a question.
#[derive(Clone, Copy)]
pub struct Requester<'a> {
    /// In which account: the operator account, or another.
    pub account: &'a AccountId,
    /// Whether it may ask still. It is asked once the deadline has been read.
    pub is_still_authorized: &'a (dyn Fn() -> Result<bool, CheckError> + Sync),
}

impl<'a> Requester<'a> {
    /// One that nobody can take anything from: the process itself, for a proxy that shows no key.
    #[must_use]
    pub fn always_authorized(account: &'a AccountId) -> Requester<'a> {
        Requester { account, is_still_authorized: &|| Ok(true) }
    }
}

/// The key that a presented token belongs to.
#[derive(Clone, Debug)]
pub struct KeyMatch {
    /// The key.
    pub key: KeyRef,
    /// Which version of its secret was presented.
    pub secret_version: u32,
}

/// Where a key was decided.
#[derive(Clone, Debug)]
pub(crate) enum ActingAccount {
    /// In no account that exists.
    Missing,
    /// In its own.
    KeyOwner,
    /// A user's key, in this one.
    Requested(AccountId),
}

/// What a key was granted where it was decided. What stands in its record is not counted as held here too.
#[derive(Clone, Debug)]
pub(crate) enum GrantedScopes {
    /// What its record says.
    FromRecord,
    /// What comes of its record, of roles, and of a member's place.
    Derived(ScopeSet),
}

impl GrantedScopes {
    fn scopes<'a>(&'a self, key: &'a KeyRef) -> &'a ScopeSet {
        match self {
            GrantedScopes::FromRecord => key.scopes(),
            GrantedScopes::Derived(grants) => grants,
        }
    }
}

/// What a Check answers.
#[derive(Clone, Debug)]
pub struct CheckOutcome {
    /// Everything that failed. Empty = allowed.
    pub failures: ReasonSet,
    /// The needed scopes that are not granted.
    pub missing_scopes: Vec<Scope>,
    /// The key, where the token is known to the caller's account.
    pub key_match: Option<KeyMatch>,
    pub(crate) acting_account: ActingAccount,
    pub(crate) granted_scopes: GrantedScopes,
    /// Refused, whatever else it is, since the key may call Keyward itself.
    pub is_refused_management_key: bool,
    pub(crate) limits: Option<Box<limiter::LimitOutcome>>,
    /// The answer is from a state at least as new.
    pub revision: Revision,
    /// How old that state can be.
    pub staleness: Duration,
}

impl CheckOutcome {
    /// The first reason, or `Ok`.
    #[must_use]
    pub fn reason(&self) -> Reason {
        self.failures.primary_reason()
    }

    /// The account that was decided in, if it exists.
    #[must_use]
    pub fn acting_account_id(&self) -> Option<&AccountId> {
        match &self.acting_account {
            ActingAccount::Missing => None,
            ActingAccount::KeyOwner => self.key_match.as_ref()?.key.owner().account(),
            ActingAccount::Requested(account) => Some(account),
        }
    }

    /// What the key is granted there. Nothing, where no key was found.
    pub fn granted_scopes(&self) -> impl Iterator<Item = &Scope> {
        self.key_match.iter().flat_map(|holder| self.granted_scopes.scopes(&holder.key))
    }

    /// How its limits stand, where they were asked.
    #[must_use]
    pub fn limits(&self) -> &limiter::LimitOutcome {
        self.limits.as_deref().unwrap_or(const { &limiter::LimitOutcome::empty() })
    }

    /// Records what was decided in the span of the call that asked.
    pub fn record_in_span(&self, span: &tracing::Span) {
        span.record("keyward.reason", self.reason().as_str());
        span.record("keyward.revision", self.revision.0);
        if let Some(holder) = &self.key_match {
            span.record("keyward.key_id", tracing::field::display(holder.key.id()));
        }
        if let Some(account) = self.acting_account_id() {
            span.record("keyward.account", account.as_str());
        }
    }

    pub(crate) fn from_reason(reason: Reason, revision: Revision) -> CheckOutcome {
        let mut failures = ReasonSet::default();
        failures.insert_if(reason, reason != Reason::Ok);
        CheckOutcome {
            failures,
            missing_scopes: Vec::new(),
            key_match: None,
            acting_account: ActingAccount::Missing,
            granted_scopes: GrantedScopes::FromRecord,
            is_refused_management_key: false,
            limits: None,
            revision,
            staleness: Duration::ZERO,
        }
    }
}

/// Why a Check could not be answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CheckError {
    /// The first snapshot is not loaded yet.
    #[error("the server is starting and has not loaded its keys yet")]
    Starting,
    /// The lease has run out: it would be allowed by what is known here, which others may have changed.
    #[error(
        "this server has had no news from its database for longer than its lease, so what it would allow may have \
         been revoked; what it knows to be dead it still denies"
    )]
    LeaseLost,
    /// The state is older than asked for.
    #[error("the state here is revision {have}, older than the {want} asked for")]
    Stale {
        /// The revision here.
        have: Revision,
        /// The revision asked for.
        want: Revision,
    },
    /// The key's rate limits are counted in Redis, which did not answer.
    #[error("the key's rate limits cannot be counted: Redis did not answer; try again")]
    LimitsUnavailable,
    /// Whoever asks may not any more.
    #[error("whoever asks may not call any more")]
    RequesterRevoked,
    /// More was used of the key's quota here than the database has counted yet.
    #[error("the key's quota cannot be counted: the database did not answer; try again")]
    QuotaUnavailable,
}

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
    clock: Arc<dyn Clock>,
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
            std::thread::sleep(Duration::from_millis(100));
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
        let place = self.account_context(&found.key, place);
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
    fn record_usage(
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

    /// Where a key is decided: a service key in its account, a user key in the account asked for.
    fn account_context(&self, key: &impl KeyAttributes, asked: Option<&AccountId>) -> AccountContext {
        let account = match key.owner() {
            KeyOwner::Account(account) => Some(account),
            KeyOwner::User(_) => asked,
        };
        let role = |name: &_| self.index.resolve_role(account, name);
        let member = match (key.owner(), account) {
            (KeyOwner::Account(_), _) => OwnedMembership::NotAsked,
            (KeyOwner::User(user), Some(account)) => self
                .index
                .member(account, user)
                .map_or(OwnedMembership::None, |member| OwnedMembership::Role(role(&member.role))),
            (KeyOwner::User(_), None) => OwnedMembership::None,
        };
        AccountContext {
            suspended: account.and_then(|account| self.index.account_suspension(account)),
            // A key's own roles are its owner's: of a user key, global ones, wherever it works.
            roles: key
                .roles()
                .iter()
                .filter_map(|name| self.index.resolve_role(key.owner().account(), name))
                .collect(),
            membership: member,
        }
    }

    /// Everything that a key is granted in an account, or, of a service key, in its own.
    #[must_use]
    pub fn effective_scopes(&self, key: &impl KeyAttributes, account: Option<&AccountId>) -> ScopeSet {
        self.account_context(key, account).subject(key, 0).effective_scopes()
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

/// What a decision needs besides the key.
struct AccountContext {
    /// Whether the account is. None = there is no such account.
    suspended: Option<bool>,
    roles: Vec<Arc<Role>>,
    membership: OwnedMembership,
}

/// [`MembershipStatus`], owned.
enum OwnedMembership {
    NotAsked,
    None,
    Role(Option<Arc<Role>>),
}

impl AccountContext {
    fn subject<'a, K>(&'a self, key: &'a K, version: u32) -> CheckSubject<'a, K> {
        let membership = match &self.membership {
            OwnedMembership::NotAsked => MembershipStatus::NotApplicable,
            OwnedMembership::None => MembershipStatus::NotMember,
            OwnedMembership::Role(role) => MembershipStatus::MemberRole(role.as_deref()),
        };
        let suspended = self.suspended == Some(true);
        CheckSubject {
            key,
            secret_version: version,
            account_suspended: suspended,
            roles: &self.roles,
            membership,
        }
    }

    /// Where the key acts; `asked`: the account that was asked about.
    fn acting_account(&self, key: &impl KeyAttributes, asked: Option<&AccountId>) -> ActingAccount {
        match (self.suspended, key.owner(), asked) {
            (None, ..) | (_, KeyOwner::User(_), None) => ActingAccount::Missing,
            (Some(_), KeyOwner::Account(_), _) => ActingAccount::KeyOwner,
            (Some(_), KeyOwner::User(_), Some(asked)) => ActingAccount::Requested(asked.clone()),
        }
    }

    fn granted_scopes(&self, key: &impl KeyAttributes) -> GrantedScopes {
        let subject = self.subject(key, 0);
        if subject.has_only_direct_grants() {
            GrantedScopes::FromRecord
        } else {
            GrantedScopes::Derived(subject.effective_scopes())
        }
    }
}

/// Why a token that nobody has is denied.
fn unknown_token_reason(presented: &str) -> Reason {
    if token::has_wrong_checksum(presented) { Reason::Malformed } else { Reason::Unknown }
}

/// Decides by the record, and by the record that may be in its place: what either refuses is refused.
fn evaluate_key(
    found: &FoundKey,
    place: &AccountContext,
    request: PolicyRequest<'_>,
    now: Timestamp,
) -> PolicyDecision {
    let mut verdict = decide(place.subject(&found.key, found.secret_version), request, now);
    if let Some(doubt) = &found.uncertain_record
        && verdict.failed_reasons.primary_reason() == Reason::Ok
    {
        verdict = decide(place.subject(&**doubt, found.secret_version), request, now);
    }
    if let Some(stop) = found.local_denial {
        verdict.failed_reasons.insert_if(stop, true);
    }
    verdict
}
