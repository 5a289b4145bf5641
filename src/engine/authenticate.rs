//! Who may call Keyward itself: a token's holder is decided as any other key, for another purpose. What a caller then
//! may do is `access`'s business.

use std::{net::IpAddr, time::Duration};

use crate::domain::{
    key_attributes::KeyAttributes as _,
    name::AccountId,
    policy_decision::{PolicyRequest, Reason, ReasonSet, TokenPurpose},
    scope::ScopeSet,
    time::Timestamp,
    token::{self, TokenDigest},
};

use super::{
    check::Engine,
    check_outcome::KeyMatch,
    error::CheckError,
    evaluate::{AccountContext, evaluate_key, unknown_token_reason},
    index::FoundKey,
    key_limits::Consumption,
    limit_outcome::LimitOutcome,
};

/// A key that may call Keyward.
#[derive(Clone, Debug)]
pub struct AuthenticatedKey {
    /// The key.
    pub key_match: KeyMatch,
    /// The digest of its token.
    pub digest: TokenDigest,
    /// The account that it acts in.
    pub account: AccountId,
    /// What it is granted there.
    pub granted_scopes: ScopeSet,
    /// The lease holds. Without one it may ask what is dead, and nothing else: it may be revoked by now.
    pub has_valid_lease: bool,
}

/// Whether callers may act in an account.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AccountStatus {
    /// The account exists and is not suspended.
    pub is_active: bool,
    /// The lease holds.
    pub has_valid_lease: bool,
}

/// Why a key may not call Keyward.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AuthenticationFailure {
    /// The first reason.
    pub reason: Reason,
    /// When a limit of it has room again.
    pub retry_after: Option<Duration>,
    /// The most that one of its limits ever lets through at once, if that is less than what was to be taken.
    pub max_cost: Option<u64>,
}

impl From<Reason> for AuthenticationFailure {
    fn from(reason: Reason) -> AuthenticationFailure {
        AuthenticationFailure { reason, retry_after: None, max_cost: None }
    }
}

/// A caller that is decided but for its limits.
pub(super) struct CallerEvaluation {
    pub(super) found_key: FoundKey,
    pub(super) digest: TokenDigest,
    pub(super) failures: ReasonSet,
    pub(super) account: Option<AccountId>,
    pub(super) granted_scopes: ScopeSet,
    pub(super) has_valid_lease: bool,
    pub(super) now: Timestamp,
}

impl Engine {
    /// Decides whether a token may be used to call Keyward itself; of a user key, in `account`, or, where it
    /// only asks about itself (`anywhere`), in none. `consume` is what the call takes of the key's own limits; a dry run
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
        consumption: Consumption,
    ) -> Result<Result<AuthenticatedKey, AuthenticationFailure>, CheckError> {
        let evaluation = self.lease.with_validity(
            || self.clock.boottime(),
            |has_valid_lease| self.evaluate_caller(presented, account, anywhere, peer, has_valid_lease),
        )?;
        let CallerEvaluation {
            found_key: found,
            digest,
            mut failures,
            account,
            granted_scopes,
            has_valid_lease,
            now,
        } = match evaluation {
            Ok(evaluation) => evaluation,
            Err(reason) => return Ok(Err(reason.into())),
        };
        let mut limits = LimitOutcome::default();
        if has_valid_lease
            && failures.primary_reason() == Reason::Ok
            && let Some(limit_state) = &found.limit_state
        {
            limits = self.limiter.consume(&found.key, limit_state, consumption, now).await?;
            limits.refusal_reasons.iter().for_each(|reason| failures.insert_if(*reason, true));
        }
        let reason = failures.primary_reason();
        let FoundKey { key, secret_version, limit_state, .. } = found;
        let key_match = KeyMatch { key, secret_version };
        if !consumption.dry_run || reason != Reason::Ok {
            self.record_usage(
                &key_match,
                reason,
                limit_state.as_ref().filter(|_| limits.consumed_quota),
                now,
            );
        }
        if reason != Reason::Ok {
            let max_cost = limits.smallest_exceeded_limit(consumption.cost);
            return Ok(Err(AuthenticationFailure { reason, retry_after: limits.retry_after(), max_cost }));
        }
        let Some(account) = account else { return Ok(Err(Reason::WrongAccount.into())) };
        Ok(Ok(AuthenticatedKey { key_match, digest, account, granted_scopes, has_valid_lease }))
    }

    /// Finds a caller's key and decides by what is known of it; awaits nothing.
    pub(super) fn evaluate_caller(
        &self,
        presented: &str,
        account: Option<&AccountId>,
        anywhere: bool,
        peer: Option<IpAddr>,
        has_valid_lease: bool,
    ) -> Result<Result<CallerEvaluation, Reason>, CheckError> {
        self.index.revision().ok_or(CheckError::Starting)?;
        if !token::can_be_token(presented) {
            return Ok(Err(Reason::Malformed));
        }
        let evaluation = self.evaluate_caller_digest(
            &TokenDigest::from_token(presented),
            account,
            anywhere,
            peer,
            has_valid_lease,
        )?;
        Ok(evaluation.map_err(|reason| match reason {
            Reason::Unknown => unknown_token_reason(presented),
            reason => reason,
        }))
    }

    /// The same of a token that is known by its digest.
    pub(super) fn evaluate_caller_digest(
        &self,
        digest: &TokenDigest,
        account: Option<&AccountId>,
        anywhere: bool,
        peer: Option<IpAddr>,
        has_valid_lease: bool,
    ) -> Result<Result<CallerEvaluation, Reason>, CheckError> {
        let Some(found) = self.index.find_by_digest(digest) else {
            return if has_valid_lease { Ok(Err(Reason::Unknown)) } else { Err(CheckError::LeaseLost) };
        };
        let now = self.clock.now();
        // A service key acts in its own account, whatever the call names.
        let account = account.filter(|_| found.key.owner().user().is_some());
        let request =
            PolicyRequest { purpose: TokenPurpose::Management, account, client_ip: peer, scopes: &[] };
        let context = AccountContext::new(&self.index, &found.key, account);
        let mut failures = evaluate_key(&found, &context, request, now).failed_reasons;
        let is_without_account = anywhere && account.is_none() && found.key.owner().user().is_some();
        if is_without_account {
            failures = failures.without(Reason::WrongAccount);
        }
        let granted_scopes = context.subject(&found.key, found.secret_version).effective_scopes();
        let account = match context.suspended {
            Some(_) => found.key.owner().account().or(account).cloned(),
            None => is_without_account.then(AccountId::unspecified),
        };
        Ok(Ok(CallerEvaluation {
            found_key: found,
            digest: *digest,
            failures,
            account,
            granted_scopes,
            has_valid_lease,
            now,
        }))
    }

    /// Whether a caller that was authenticated still may call: what it is granted now, or the first thing that stands
    /// against it. Nothing is counted.
    ///
    /// # Errors
    /// As [`Engine::authenticate`]; and when the lease has run out.
    pub fn reauthenticate(
        &self,
        presented: &str,
        account: Option<&AccountId>,
        peer: Option<IpAddr>,
    ) -> Result<Result<ScopeSet, Reason>, CheckError> {
        let evaluation = self.lease.with_validity(
            || self.clock.boottime(),
            |has_valid_lease| self.evaluate_caller(presented, account, false, peer, has_valid_lease),
        )?;
        Ok(evaluation.and_then(|evaluation| match evaluation.failures.primary_reason() {
            Reason::Ok => Ok(evaluation.granted_scopes),
            reason => Err(reason),
        }))
    }

    /// Whether a caller that the configuration knows may act in an account: it must exist, and not be suspended. The
    /// answer holds as far as the lease does: see [`AuthenticatedKey::fresh`].
    ///
    /// # Errors
    /// When the first snapshot is not loaded yet.
    pub fn account_status(&self, account: &AccountId) -> Result<AccountStatus, CheckError> {
        self.index.revision().ok_or(CheckError::Starting)?;
        Ok(self.lease.with_validity(
            || self.clock.boottime(),
            |has_valid_lease| {
                let is_active = self.index.account_suspension(account) == Some(false);
                AccountStatus { is_active, has_valid_lease }
            },
        ))
    }

    /// The key that a token belongs to, in whatever state.
    ///
    /// # Errors
    /// When the first snapshot is not loaded yet, or the lease has run out: the token may have been replaced since.
    pub fn find_key_by_token(&self, presented: &str) -> Result<Option<KeyMatch>, CheckError> {
        let digest = token::can_be_token(presented).then(|| TokenDigest::from_token(presented));
        self.find_key_by_digest(digest.as_ref())
    }

    pub(super) fn find_key_by_digest(
        &self,
        digest: Option<&TokenDigest>,
    ) -> Result<Option<KeyMatch>, CheckError> {
        self.index.revision().ok_or(CheckError::Starting)?;
        let find = || self.index.find_by_digest(digest?);
        let find = |has_valid_lease| if has_valid_lease { Ok(find()) } else { Err(CheckError::LeaseLost) };
        let found = self.lease.with_validity(|| self.clock.boottime(), find)?;
        Ok(found.map(|found| KeyMatch { key: found.key, secret_version: found.secret_version }))
    }
}
