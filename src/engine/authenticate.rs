//! Authenticates callers of Keyward itself: evaluates the key of a token for management instead of for a service.
//!
//! What an authenticated caller may do is decided in `caller`; the connection's memory of
//! its caller is in `caller_cache.rs`.

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

/// A key that may call Keyward, with everything that its authorization needs.
#[derive(Clone, Debug)]
pub struct AuthenticatedKey {
    /// The key and the version of the presented secret.
    pub key_match: KeyMatch,
    /// The digest of the presented token.
    pub digest: TokenDigest,
    /// The account that the call acts in.
    pub account: AccountId,
    /// The scopes that the key is granted in that account.
    pub granted_scopes: ScopeSet,
    /// Whether the lease is valid. Without it the key may have been revoked: the caller may only
    /// ask which keys are dead.
    pub has_valid_lease: bool,
}

/// Whether callers may act in an account.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AccountStatus {
    /// The account exists and is not suspended.
    pub is_active: bool,
    /// Whether the lease was valid at the look-up.
    pub has_valid_lease: bool,
}

/// Why a key may not call Keyward.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AuthenticationFailure {
    /// The primary reason of the refusal.
    pub reason: Reason,
    /// How long until the key's limits admit the call; `None` if no limit refused it.
    pub retry_after: Option<Duration>,
    /// The smallest limit of the key, if the requested units exceed it: the call can never succeed.
    pub max_cost: Option<u64>,
}

impl From<Reason> for AuthenticationFailure {
    fn from(reason: Reason) -> AuthenticationFailure {
        AuthenticationFailure { reason, retry_after: None, max_cost: None }
    }
}

/// A caller that is evaluated except for its limits.
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
    /// Authenticates a token for a call to Keyward itself, and consumes from the key's own limits. A dry run does not
    /// count as a use of the key.
    ///
    /// A user key acts in `account`. If the call only concerns the caller itself (`account_optional`), a
    /// user key needs no account.
    ///
    /// # Errors
    /// The first snapshot is not loaded, this replica has no lease and does not know the token, or the
    /// key's limits cannot be counted.
    pub async fn authenticate(
        &self,
        presented: &str,
        account: Option<&AccountId>,
        account_optional: bool,
        peer: Option<IpAddr>,
        consumption: Consumption,
    ) -> Result<Result<AuthenticatedKey, AuthenticationFailure>, CheckError> {
        let evaluation = self.lease.with_validity(
            || self.clock.boottime(),
            |has_valid_lease| {
                self.evaluate_caller(presented, account, account_optional, peer, has_valid_lease)
            },
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

    /// Evaluates a caller's key without waiting; the key's limits are not consumed.
    pub(super) fn evaluate_caller(
        &self,
        presented: &str,
        account: Option<&AccountId>,
        account_optional: bool,
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
            account_optional,
            peer,
            has_valid_lease,
        )?;
        Ok(evaluation.map_err(|reason| match reason {
            Reason::Unknown => unknown_token_reason(presented),
            reason => reason,
        }))
    }

    /// Like [`Engine::evaluate_caller`], for a token of which only the digest is known.
    pub(super) fn evaluate_caller_digest(
        &self,
        digest: &TokenDigest,
        account: Option<&AccountId>,
        account_optional: bool,
        peer: Option<IpAddr>,
        has_valid_lease: bool,
    ) -> Result<Result<CallerEvaluation, Reason>, CheckError> {
        let Some(found) = self.index.find_by_digest(digest) else {
            return if has_valid_lease { Ok(Err(Reason::Unknown)) } else { Err(CheckError::LeaseLost) };
        };
        let now = self.clock.now();
        // A service key acts in its own account, even if the call names another one.
        let account = account.filter(|_| found.key.owner().user().is_some());
        let request =
            PolicyRequest { purpose: TokenPurpose::Management, account, client_ip: peer, scopes: &[] };
        let context = AccountContext::new(&self.index, &found.key, account);
        let mut failures = evaluate_key(&found, &context, request, now).failed_reasons;
        let is_without_account = account_optional && account.is_none() && found.key.owner().user().is_some();
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

    /// Returns the scopes of a caller that was authenticated before, or the primary reason why it may not
    /// call any more. Consumes nothing.
    ///
    /// # Errors
    /// As [`Engine::authenticate`]; also if the lease has expired.
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

    /// Returns whether a caller from the configuration may act in an account. If [`AccountStatus::has_valid_lease`] is
    /// false, the answer may be outdated.
    ///
    /// # Errors
    /// The first snapshot is not loaded.
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

    /// Finds the key of a token, in any state.
    ///
    /// # Errors
    /// The first snapshot is not loaded, or the lease has expired and the token may have been replaced since.
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
