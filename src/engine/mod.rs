//! The engine: answers Checks from memory. Nothing here asks a database, and nothing awaits but `limiter`: a Check of
//! a key without limits is answered the first time that it is polled.
//!
//! `parse → digest → look up → decide → take from the limits → note the use → answer`. An unknown token is judged by its
//! checksum after the look-up, since imported tokens have checksums of other systems. The index is fed with log rows
//! in revision order; uses are written behind. Who may ask, and how answers look on the wire, is `grpc`'s business.

pub mod callers;
pub mod deadline;
pub mod index;
pub mod known;
pub mod lease;
pub mod limiter;
mod reads;
pub mod usage;

use std::{net::IpAddr, sync::Arc, time::Duration};

use crate::{
    clock::Clock,
    domain::{
        account::Role,
        decision::{Failures, Membership, Reason, Request, Subject, Use, Verdict, decide},
        facts::KeyFacts,
        key::Owner,
        name::{AccountId, CustomerId, EnvironmentName},
        scope::{Scope, ScopeSet},
        time::{Revision, Timestamp},
        token::{self, Digest},
    },
    instruments::Counters,
};

pub use callers::{Authenticated, Refused, Vouched};
pub use index::HeldKey;

use index::{Found, Index};
use lease::Lease;
use limiter::{Budget, Charge, LimitSettings, Limiter, Take};
use usage::{Usage, notes::Note};

/// What a Check asks, once it has been read from the wire.
#[derive(Clone, Debug)]
pub struct Question<'a> {
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
    pub charge: Option<Charge>,
    /// Whether a key that may call Keyward itself is refused here. Such keys are for managing.
    pub bar_management: bool,
}

/// Who asks a question.
#[derive(Clone, Copy)]
pub struct Asker<'a> {
    /// In which account: the operator account, or another.
    pub account: &'a AccountId,
    /// Whether it may ask still. It is asked once the deadline has been read.
    pub stands: &'a (dyn Fn() -> Result<bool, CannotAnswer> + Sync),
}

impl<'a> Asker<'a> {
    /// One that nobody can take anything from: the process itself, for a proxy that shows no key.
    #[must_use]
    pub fn always(account: &'a AccountId) -> Asker<'a> {
        Asker { account, stands: &|| Ok(true) }
    }
}

/// The key that a presented token belongs to.
#[derive(Clone, Debug)]
pub struct Holder {
    /// The key.
    pub key: HeldKey,
    /// Which version of its secret was presented.
    pub version: u32,
}

/// Where a key was decided.
#[derive(Clone, Debug)]
pub(crate) enum Acts {
    /// In no account that exists.
    Nowhere,
    /// In its own.
    AtHome,
    /// A user's key, in this one.
    In(AccountId),
}

/// What a key was granted where it was decided. What stands in its record is not counted as held here too.
#[derive(Clone, Debug)]
pub(crate) enum Granted {
    /// What its record says.
    Own,
    /// What comes of its record, of roles, and of a member's place.
    Derived(ScopeSet),
}

impl Granted {
    fn of<'a>(&'a self, key: &'a HeldKey) -> &'a ScopeSet {
        match self {
            Granted::Own => key.scopes(),
            Granted::Derived(grants) => grants,
        }
    }
}

/// What a Check answers.
#[derive(Clone, Debug)]
pub struct Answer {
    /// Everything that failed. Empty = allowed.
    pub failures: Failures,
    /// The needed scopes that are not granted.
    pub missing: Vec<Scope>,
    /// The key, where the token is known to the caller's account.
    pub holder: Option<Holder>,
    pub(crate) place: Acts,
    pub(crate) granted: Granted,
    /// Refused, whatever else it is, since the key may call Keyward itself.
    pub barred: bool,
    pub(crate) limits: Option<Box<limiter::Usage>>,
    /// The answer is from a state at least as new.
    pub revision: Revision,
    /// How old that state can be.
    pub staleness: Duration,
}

impl Answer {
    /// The first reason, or `Ok`.
    #[must_use]
    pub fn reason(&self) -> Reason {
        self.failures.first()
    }

    /// The account that was decided in, if it exists.
    #[must_use]
    pub fn account(&self) -> Option<&AccountId> {
        match &self.place {
            Acts::Nowhere => None,
            Acts::AtHome => self.holder.as_ref()?.key.owner().account(),
            Acts::In(account) => Some(account),
        }
    }

    /// What the key is granted there. Nothing, where no key was found.
    pub fn grants(&self) -> impl Iterator<Item = &Scope> {
        self.holder.iter().flat_map(|holder| self.granted.of(&holder.key))
    }

    /// How its limits stand, where they were asked.
    #[must_use]
    pub fn limits(&self) -> &limiter::Usage {
        self.limits.as_deref().unwrap_or(const { &limiter::Usage::none() })
    }

    /// Records what was decided in the span of the call that asked.
    pub fn record(&self, span: &tracing::Span) {
        span.record("keyward.reason", self.reason().as_str());
        span.record("keyward.revision", self.revision.0);
        if let Some(holder) = &self.holder {
            span.record("keyward.key_id", tracing::field::display(holder.key.id()));
        }
        if let Some(account) = self.account() {
            span.record("keyward.account", account.as_str());
        }
    }

    pub(crate) fn of(reason: Reason, revision: Revision) -> Answer {
        let mut failures = Failures::default();
        failures.note(reason, reason != Reason::Ok);
        Answer {
            failures,
            missing: Vec::new(),
            holder: None,
            place: Acts::Nowhere,
            granted: Granted::Own,
            barred: false,
            limits: None,
            revision,
            staleness: Duration::ZERO,
        }
    }
}

/// Why a Check could not be answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CannotAnswer {
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
    AskerGone,
    /// More was used of the key's quota here than the database has counted yet.
    #[error("the key's quota cannot be counted: the database did not answer; try again")]
    QuotaUnavailable,
}

/// Answers Checks.
pub struct Engine {
    /// The keys and accounts.
    pub index: Arc<Index>,
    /// The uses that are not written yet.
    pub usage: Arc<Usage>,
    /// Until when anything may be allowed.
    pub lease: Arc<Lease>,
    /// Counts the limits.
    pub limiter: Limiter,
    clock: Arc<dyn Clock>,
    answered: Counters,
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
        usage: Arc<Usage>,
        lease: Arc<Lease>,
        limits: &LimitSettings,
        clock: Arc<dyn Clock>,
    ) -> Self {
        let limiter = Limiter::new(limits, lease.clone(), usage.clone());
        Engine { index, usage, lease, limiter, clock, answered: Counters::new(Reason::ALL.len()) }
    }

    /// Whether anything may be allowed now.
    #[must_use]
    pub fn may_allow(&self) -> bool {
        self.lease.holds(|| self.clock.boottime())
    }

    /// The present instant.
    #[must_use]
    pub fn now(&self) -> Timestamp {
        self.clock.now()
    }

    /// How many Checks were answered with each reason since the start.
    pub fn answered(&self) -> impl Iterator<Item = (Reason, u64)> {
        Reason::ALL.into_iter().map(|reason| (reason, self.answered.get(reason as usize)))
    }

    /// The revision here, if it is as new as asked.
    ///
    /// # Errors
    /// When it is not.
    pub fn fresh(&self, want: Option<Revision>) -> Result<Revision, CannotAnswer> {
        let have = self.index.revision().ok_or(CannotAnswer::Starting)?;
        match want {
            Some(want) if want > have => Err(CannotAnswer::Stale { have, want }),
            _ => Ok(have),
        }
    }

    /// Decides one question for whoever asks. A token of another account is unknown to all but operators.
    ///
    /// # Errors
    /// When the state here is not good enough to answer, or the limits cannot be counted; that is no verdict.
    pub async fn check(&self, asker: Asker<'_>, question: &Question<'_>) -> Result<Answer, CannotAnswer> {
        match self.decide(asker, question)? {
            Decided::Answered(answer) => Ok(answer),
            // Apart on the heap, since few wait: a future is as large as all that may go on in it, and is moved about.
            Decided::Limited(limited) => Box::pin(self.settle(question, limited)).await,
        }
    }

    /// The same as far as it goes without a wait.
    ///
    /// # Errors
    /// When the state here is not good enough to answer.
    pub fn decide(&self, asker: Asker<'_>, question: &Question<'_>) -> Result<Decided, CannotAnswer> {
        let judged = self.judge_under_lease(asker, question)?;
        Ok(match judged.draws() {
            true => Decided::Limited(Limited(judged)),
            false => Decided::Answered(self.answer(question, judged)),
        })
    }

    /// Answers the same question when the limits have been asked.
    ///
    /// # Errors
    /// When the limits cannot be counted.
    pub async fn settle(&self, question: &Question<'_>, limited: Limited) -> Result<Answer, CannotAnswer> {
        let Limited(mut judged) = limited;
        if let (Some(holder), Some(budget)) = (&judged.answer.holder, &judged.budget) {
            let take = Take { cost: question.cost, charge: question.charge, dry_run: question.dry_run };
            let limits = self.limiter.take(&holder.key, budget, take, judged.now).await?;
            limits.refused.iter().for_each(|reason| judged.answer.failures.note(*reason, true));
            judged.answer.limits = Some(Box::new(limits));
        }
        Ok(self.answer(question, judged))
    }

    /// The answer; its use is noted.
    fn answer(&self, question: &Question<'_>, judged: Judged) -> Answer {
        let Judged { mut answer, budget, now } = judged;
        if let Some(holder) = answer.holder.as_ref().filter(|_| !question.dry_run) {
            self.note(holder, answer.reason(), budget.as_ref().filter(|_| answer.limits().drew), now);
        }
        answer.staleness = self.lease.staleness(|| self.clock.boottime());
        self.answered.add(answer.reason() as usize, 1);
        answer
    }

    /// Reads the deadline, then the clock, and judges after.
    fn judge_under_lease(&self, asker: Asker<'_>, question: &Question<'_>) -> Result<Judged, CannotAnswer> {
        let Asker { account, stands } = asker;
        let judge = |fresh| {
            // Whoever was let in before the deadline was read may have been revoked meanwhile, and the lease renewed after.
            if !stands()? {
                return Err(CannotAnswer::AskerGone);
            }
            // Before the look-up: what is found is at least as new.
            let revision = self.fresh(question.min_revision)?;
            self.judge(account, question, revision, fresh)
        };
        #[cfg(keyward_breakable)]
        if let Some(judged) = self.judge_before_lease(judge) {
            return judged;
        }
        self.lease.check(|| self.clock.boottime(), judge)
    }

    /// As it must not be, where a process is told to do so: judges, and reads the deadline after. A stall between, now
    /// and then while there is no lease, makes a window of nanoseconds wide enough to be hit.
    #[cfg(keyward_breakable)]
    #[expect(clippy::disallowed_methods, reason = "whatever else this thread serves is to wait")]
    fn judge_before_lease(
        &self,
        judge: impl FnOnce(bool) -> Result<Judged, CannotAnswer>,
    ) -> Option<Result<Judged, CannotAnswer>> {
        use crate::domain::lease::{Kept, Rule, Rules as _};
        use std::sync::atomic::{AtomicU64, Ordering};
        if Kept.keep(Rule::DeadlineBeforeLookUp) {
            return None;
        }
        static STALE: AtomicU64 = AtomicU64::new(0);
        let judged = judge(true);
        if !self.may_allow() && STALE.fetch_add(1, Ordering::Relaxed).is_multiple_of(32) {
            std::thread::sleep(Duration::from_millis(100));
        }
        let allowed = judged.as_ref().is_ok_and(|judged| judged.answer.reason() == Reason::Ok);
        Some(if allowed && !self.may_allow() { Err(CannotAnswer::LeaseLost) } else { judged })
    }

    /// Finds the key and decides by what is known of it; awaits nothing. The limits are not asked yet.
    fn judge(
        &self,
        asker: &AccountId,
        question: &Question<'_>,
        revision: Revision,
        fresh: bool,
    ) -> Result<Judged, CannotAnswer> {
        let now = self.clock.now();
        let without_key = |reason| Ok(Judged { answer: Answer::of(reason, revision), budget: None, now });
        if !token::can_be_token(question.token) {
            return without_key(Reason::Malformed);
        }
        let visible = |found: &Found| match found.key.owner() {
            _ if asker.is_operator() => true,
            Owner::Account(account) => account == asker,
            Owner::User(user) => self.index.member(asker, user).is_some(),
        };
        let Some(found) = self.index.find(&Digest::of(question.token)).filter(visible) else {
            if !fresh {
                // It may have been made or imported since.
                return Err(CannotAnswer::LeaseLost);
            }
            return without_key(reason_for_unknown(question.token));
        };
        let request = Request {
            purpose: Use::Service { environment: question.environment, customer: question.customer },
            account: question.account,
            client_ip: question.client_ip,
            scopes: question.scopes,
        };
        // An account's caller learns nothing of its users' places in other accounts.
        let place = question.account.filter(|asked| asker.is_operator() || *asked == asker);
        let place = self.place(&found.key, place);
        let Verdict { mut failures, missing } = judge(&found, &place, request, now);
        let granted = place.granted(&found.key);
        let barred = question.bar_management && granted.of(&found.key).iter().any(Scope::is_reserved);
        failures.note(Reason::MissingScope, barred);
        if !fresh && failures.first() == Reason::Ok {
            return Err(CannotAnswer::LeaseLost);
        }
        // What was found together was there together, unless everything was being replaced.
        self.index.revision().ok_or(CannotAnswer::Starting)?;
        let answer = Answer {
            failures,
            missing,
            granted,
            barred,
            place: place.acts(&found.key, request.account),
            holder: Some(Holder { key: found.key, version: found.version }),
            ..Answer::of(Reason::Ok, revision)
        };
        Ok(Judged { answer, budget: found.budget, now })
    }

    /// `drew`: the budget, if the quota was drawn from.
    fn note(&self, holder: &Holder, reason: Reason, drew: Option<&Arc<Budget>>, now: Timestamp) {
        let note = Note { key: holder.key.id(), at: now, version: holder.version, reason };
        self.usage.note(note, drew);
    }

    /// Where a key is decided: a service key in its account, a user key in the account asked for.
    fn place(&self, key: &impl KeyFacts, asked: Option<&AccountId>) -> Place {
        let account = match key.owner() {
            Owner::Account(account) => Some(account),
            Owner::User(_) => asked,
        };
        let role = |name: &_| self.index.role(account, name);
        let member = match (key.owner(), account) {
            (Owner::Account(_), _) => Member::NotAsked,
            (Owner::User(user), Some(account)) => self
                .index
                .member(account, user)
                .map_or(Member::None, |member| Member::Role(role(&member.role))),
            (Owner::User(_), None) => Member::None,
        };
        Place {
            suspended: account.and_then(|account| self.index.suspended(account)),
            // A key's own roles are its owner's: of a user key, global ones, wherever it works.
            roles: key
                .roles()
                .iter()
                .filter_map(|name| self.index.role(key.owner().account(), name))
                .collect(),
            member,
        }
    }

    /// Everything that a key is granted in an account, or, of a service key, in its own.
    #[must_use]
    pub fn grants(&self, key: &impl KeyFacts, account: Option<&AccountId>) -> ScopeSet {
        self.place(key, account).subject(key, 0).grants()
    }
}

/// A question, as far as it is decided without a wait.
#[derive(Debug)]
pub enum Decided {
    /// It is answered.
    Answered(Answer),
    /// It is allowed, unless the key's limits say no.
    Limited(Limited),
}

/// A question that is decided but for the limits of its key.
#[derive(Debug)]
pub struct Limited(Judged);

/// A question that is decided but for the limits.
#[derive(Debug)]
struct Judged {
    answer: Answer,
    /// What is used of the key's limits, where the asker may know of it and it has any.
    budget: Option<Arc<Budget>>,
    now: Timestamp,
}

impl Judged {
    /// Whether it hangs on limits now.
    fn draws(&self) -> bool {
        self.answer.reason() == Reason::Ok && self.budget.is_some()
    }
}

/// What a decision needs besides the key.
struct Place {
    /// Whether the account is. None = there is no such account.
    suspended: Option<bool>,
    roles: Vec<Arc<Role>>,
    member: Member,
}

/// [`Membership`], owned.
enum Member {
    NotAsked,
    None,
    Role(Option<Arc<Role>>),
}

impl Place {
    fn subject<'a, K>(&'a self, key: &'a K, version: u32) -> Subject<'a, K> {
        let membership = match &self.member {
            Member::NotAsked => Membership::NotAsked,
            Member::None => Membership::None,
            Member::Role(role) => Membership::Role(role.as_deref()),
        };
        let suspended = self.suspended == Some(true);
        Subject { key, version, suspended, roles: &self.roles, membership }
    }

    /// Where the key acts; `asked`: the account that was asked about.
    fn acts(&self, key: &impl KeyFacts, asked: Option<&AccountId>) -> Acts {
        match (self.suspended, key.owner(), asked) {
            (None, ..) | (_, Owner::User(_), None) => Acts::Nowhere,
            (Some(_), Owner::Account(_), _) => Acts::AtHome,
            (Some(_), Owner::User(_), Some(asked)) => Acts::In(asked.clone()),
        }
    }

    fn granted(&self, key: &impl KeyFacts) -> Granted {
        let subject = self.subject(key, 0);
        if subject.grants_are_its_own() { Granted::Own } else { Granted::Derived(subject.grants()) }
    }
}

/// Why a token that nobody has is denied.
fn reason_for_unknown(presented: &str) -> Reason {
    if token::has_wrong_checksum(presented) { Reason::Malformed } else { Reason::Unknown }
}

/// Decides by the record, and by the record that may be in its place: what either refuses is refused.
fn judge(found: &Found, place: &Place, request: Request<'_>, now: Timestamp) -> Verdict {
    let mut verdict = decide(place.subject(&found.key, found.version), request, now);
    if let Some(doubt) = &found.doubt
        && verdict.failures.first() == Reason::Ok
    {
        verdict = decide(place.subject(&**doubt, found.version), request, now);
    }
    if let Some(stop) = found.stopped {
        verdict.failures.note(stop, true);
    }
    verdict
}
