//! Who may call Keyward itself: a token's holder is decided as any other key, for another purpose. What a caller then
//! may do is `access`'s business.

use std::{net::IpAddr, time::Duration};

use crate::domain::{
    decision::{Failures, Reason, Request, Use},
    facts::KeyFacts as _,
    name::AccountId,
    scope::ScopeSet,
    time::Timestamp,
    token::{self, Digest},
};

use super::{
    CannotAnswer, Engine, Holder,
    index::Found,
    judge,
    limiter::{self, Take},
    reason_for_unknown,
};

/// A key that may call Keyward.
#[derive(Clone, Debug)]
pub struct Authenticated {
    /// The key.
    pub holder: Holder,
    /// The digest of its token.
    pub digest: Digest,
    /// The account that it acts in.
    pub account: AccountId,
    /// What it is granted there.
    pub grants: ScopeSet,
    /// The lease holds. Without one it may ask what is dead, and nothing else: it may be revoked by now.
    pub fresh: bool,
}

/// Whether callers may act in an account.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Vouched {
    /// The account exists and is not suspended.
    pub stands: bool,
    /// The lease holds.
    pub fresh: bool,
}

/// Why a key may not call Keyward.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refused {
    /// The first reason.
    pub reason: Reason,
    /// When a limit of it has room again.
    pub retry_after: Option<Duration>,
    /// The most that one of its limits ever lets through at once, if that is less than what was to be taken.
    pub most: Option<u64>,
}

impl From<Reason> for Refused {
    fn from(reason: Reason) -> Refused {
        Refused { reason, retry_after: None, most: None }
    }
}

/// A caller that is decided but for its limits.
pub(super) struct CallerJudged {
    pub(super) found: Found,
    pub(super) digest: Digest,
    pub(super) failures: Failures,
    pub(super) account: Option<AccountId>,
    pub(super) grants: ScopeSet,
    pub(super) fresh: bool,
    pub(super) now: Timestamp,
}

impl Engine {
    /// Decides whether a token may be used to call Keyward itself; of a user key, in `account`, or, where it
    /// only asks about itself (`anywhere`), in none. `take` is what the call takes of the key's own limits; a dry run
    /// is no use of the key.
    ///
    /// # Errors
    /// When the first snapshot is not loaded yet, the token is not known to a replica without a lease, or the key's
    /// limits cannot be counted.
    pub async fn authenticate(
        &self,
        presented: &str,
        account: Option<&AccountId>,
        anywhere: bool,
        peer: Option<IpAddr>,
        take: Take,
    ) -> Result<Result<Authenticated, Refused>, CannotAnswer> {
        let judged = self.lease.check(
            || self.clock.boottime(),
            |fresh| self.judge_caller(presented, account, anywhere, peer, fresh),
        )?;
        let CallerJudged { found, digest, mut failures, account, grants, fresh, now } = match judged {
            Ok(judged) => judged,
            Err(reason) => return Ok(Err(reason.into())),
        };
        let mut limits = limiter::Usage::default();
        if fresh
            && failures.first() == Reason::Ok
            && let Some(budget) = &found.budget
        {
            limits = self.limiter.take(&found.key, budget, take, now).await?;
            limits.refused.iter().for_each(|reason| failures.note(*reason, true));
        }
        let reason = failures.first();
        let Found { key, version, budget, .. } = found;
        let holder = Holder { key, version };
        if !take.dry_run || reason != Reason::Ok {
            self.note(&holder, reason, budget.as_ref().filter(|_| limits.drew), now);
        }
        if reason != Reason::Ok {
            let most = limits.never_fits(take.cost);
            return Ok(Err(Refused { reason, retry_after: limits.retry_after(), most }));
        }
        let Some(account) = account else { return Ok(Err(Reason::WrongAccount.into())) };
        Ok(Ok(Authenticated { holder, digest, account, grants, fresh }))
    }

    /// Finds a caller's key and decides by what is known of it; awaits nothing.
    pub(super) fn judge_caller(
        &self,
        presented: &str,
        account: Option<&AccountId>,
        anywhere: bool,
        peer: Option<IpAddr>,
        fresh: bool,
    ) -> Result<Result<CallerJudged, Reason>, CannotAnswer> {
        self.index.revision().ok_or(CannotAnswer::Starting)?;
        if !token::can_be_token(presented) {
            return Ok(Err(Reason::Malformed));
        }
        let judged = self.judge_digest(&Digest::of(presented), account, anywhere, peer, fresh)?;
        Ok(judged.map_err(|reason| match reason {
            Reason::Unknown => reason_for_unknown(presented),
            reason => reason,
        }))
    }

    /// The same of a token that is known by its digest.
    pub(super) fn judge_digest(
        &self,
        digest: &Digest,
        account: Option<&AccountId>,
        anywhere: bool,
        peer: Option<IpAddr>,
        fresh: bool,
    ) -> Result<Result<CallerJudged, Reason>, CannotAnswer> {
        let Some(found) = self.index.find(digest) else {
            return if fresh { Ok(Err(Reason::Unknown)) } else { Err(CannotAnswer::LeaseLost) };
        };
        let now = self.clock.now();
        // A service key acts in its own account, whatever the call names.
        let account = account.filter(|_| found.key.owner().user().is_some());
        let request = Request { purpose: Use::Management, account, client_ip: peer, scopes: &[] };
        let place = self.place(&found.key, account);
        let mut failures = judge(&found, &place, request, now).failures;
        let nowhere = anywhere && account.is_none() && found.key.owner().user().is_some();
        if nowhere {
            failures = failures.without(Reason::WrongAccount);
        }
        let grants = place.subject(&found.key, found.version).grants();
        let account = match place.suspended {
            Some(_) => found.key.owner().account().or(account).cloned(),
            None => nowhere.then(AccountId::nowhere),
        };
        Ok(Ok(CallerJudged { found, digest: *digest, failures, account, grants, fresh, now }))
    }

    /// Whether a caller that was authenticated still may call: what it is granted now, or the first thing that stands
    /// against it. Nothing is counted.
    ///
    /// # Errors
    /// As [`Engine::authenticate`]; and when the lease has run out.
    pub fn stands(
        &self,
        presented: &str,
        account: Option<&AccountId>,
        peer: Option<IpAddr>,
    ) -> Result<Result<ScopeSet, Reason>, CannotAnswer> {
        let judged = self.lease.check(
            || self.clock.boottime(),
            |fresh| self.judge_caller(presented, account, false, peer, fresh),
        )?;
        Ok(judged.and_then(|judged| match judged.failures.first() {
            Reason::Ok => Ok(judged.grants),
            reason => Err(reason),
        }))
    }

    /// Whether a caller that the configuration knows may act in an account: it must exist, and not be suspended. The
    /// answer holds as far as the lease does: see [`Authenticated::fresh`].
    ///
    /// # Errors
    /// When the first snapshot is not loaded yet.
    pub fn vouch(&self, account: &AccountId) -> Result<Vouched, CannotAnswer> {
        self.index.revision().ok_or(CannotAnswer::Starting)?;
        Ok(self.lease.check(
            || self.clock.boottime(),
            |fresh| {
                let stands = self.index.suspended(account) == Some(false);
                Vouched { stands, fresh }
            },
        ))
    }

    /// The key that a token belongs to, in whatever state.
    ///
    /// # Errors
    /// When the first snapshot is not loaded yet, or the lease has run out: the token may have been replaced since.
    pub fn lookup(&self, presented: &str) -> Result<Option<Holder>, CannotAnswer> {
        let digest = token::can_be_token(presented).then(|| Digest::of(presented));
        self.holder_of(digest.as_ref())
    }

    pub(super) fn holder_of(&self, digest: Option<&Digest>) -> Result<Option<Holder>, CannotAnswer> {
        self.index.revision().ok_or(CannotAnswer::Starting)?;
        let find = || self.index.find(digest?);
        let find = |fresh| if fresh { Ok(find()) } else { Err(CannotAnswer::LeaseLost) };
        let found = self.lease.check(|| self.clock.boottime(), find)?;
        Ok(found.map(|found| Holder { key: found.key, version: found.version }))
    }
}
