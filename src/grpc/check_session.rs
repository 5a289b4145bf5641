//! Evaluates the caller of Checks again while its call runs. A request can arrive long after the headers that
//! authenticated it, and a stream carries many.
//!
//! The first authentication belongs in `auth.rs`. Callers of management calls are in `management_session.rs`.

use std::{net::IpAddr, sync::Arc};

use tonic::Status;
use zeroize::Zeroizing;

use crate::{
    caller::Permission,
    domain::{
        certificate_identity::CertificateIdentity, name::AccountId, policy_decision::Reason, scope::ScopeSet,
    },
    engine::{
        AuthenticatedKey, AuthenticationFailure, CheckError, Engine,
        caller_cache::{CachedCaller, CallerCache},
        index::IndexVersion,
        limiter::Consumption,
    },
    service_error::ServiceError,
};

use super::status::{batch_exceeds_limit, permission_missing};

/// The credential that a caller presented.
#[derive(Clone)]
pub(super) enum PresentedCredential {
    Token(Arc<Zeroizing<String>>),
    Certificate(Arc<CertificateIdentity>),
}

/// The credential and context of a call, kept so that its caller can be evaluated again.
#[derive(Clone)]
pub(super) struct CheckSession {
    pub(super) credential: PresentedCredential,
    pub(super) named_account: Option<AccountId>,
    pub(super) peer: Option<IpAddr>,
}

impl std::fmt::Debug for CheckSession {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CheckSession").field("account", &self.named_account).finish_non_exhaustive()
    }
}

impl CheckSession {
    /// Whether the caller is still authorized. Charges nothing.
    pub(super) fn is_still_authorized(&self, engine: &Engine) -> Result<bool, CheckError> {
        match &self.credential {
            PresentedCredential::Certificate(identity) => {
                Ok(engine.account_status(identity.account())?.is_active)
            }
            PresentedCredential::Token(token) => {
                is_token_authorized(engine, token, self.named_account.as_ref(), self.peer)
            }
        }
    }

    /// Like `is_still_authorized`, for a caller that was authorized at index version `version`.
    pub(super) fn is_still_authorized_since(
        &self,
        engine: &Engine,
        version: Option<IndexVersion>,
    ) -> Result<bool, CheckError> {
        if version.is_some() && engine.index.version() == version {
            Ok(true)
        } else {
            self.is_still_authorized(engine)
        }
    }

    /// Checks that the caller is still authorized, and charges `charge` calls to its limits: all of them or none.
    pub(super) async fn reauthorize_and_charge(
        &self,
        engine: &Engine,
        charged_calls: u64,
        cache: &CallerCache,
    ) -> Result<(), Status> {
        if let Some(cached_caller) = self.cached_caller(engine, cache) {
            if charged_calls > 0 {
                engine.record_cached_call(&cached_caller);
            }
            return Ok(());
        }
        match &self.credential {
            PresentedCredential::Token(token) if charged_calls > 0 => {
                let (account, consumption) =
                    (self.named_account.as_ref(), Consumption::with_cost(charged_calls));
                let result = engine.authenticate(token, account, false, self.peer, consumption).await;
                match result.map_err(ServiceError::from)? {
                    Ok(AuthenticatedKey { granted_scopes, .. }) => {
                        require_permission(Permission::Check, &granted_scopes)
                    }
                    Err(AuthenticationFailure {
                        reason: Reason::RateLimited | Reason::QuotaExceeded,
                        retry_after,
                        max_cost,
                    }) => Err(match max_cost.filter(|_| charged_calls > 1) {
                        Some(max_cost) => batch_exceeds_limit(charged_calls, max_cost),
                        None => ServiceError::CallerRateLimited(retry_after).into(),
                    }),
                    Err(_) => Err(ServiceError::Unauthenticated.into()),
                }
            }
            _ => self.reauthorize(engine),
        }
    }

    /// Checks that the caller is still authorized for Checks. Charges nothing.
    fn reauthorize(&self, engine: &Engine) -> Result<(), Status> {
        let granted_scopes = match &self.credential {
            PresentedCredential::Certificate(identity) => {
                let authenticated =
                    engine.account_status(identity.account()).map_err(ServiceError::from)?.is_active;
                authenticated.then(|| identity.scopes().clone()).ok_or(ServiceError::Unauthenticated)?
            }
            PresentedCredential::Token(token) => {
                let authenticated = engine
                    .reauthenticate(token, self.named_account.as_ref(), self.peer)
                    .map_err(ServiceError::from)?;
                authenticated.map_err(|_| ServiceError::Unauthenticated)?
            }
        };
        require_permission(Permission::Check, &granted_scopes)
    }

    /// The cached caller, if the cache alone shows that it is authorized.
    pub(super) fn cached_caller(&self, engine: &Engine, cache: &CallerCache) -> Option<Arc<CachedCaller>> {
        match &self.credential {
            PresentedCredential::Token(token) if self.named_account.is_none() => {
                authenticate_cached(engine, token, self.peer, cache)
            }
            _ => None,
        }
    }
}

fn require_permission(permission: Permission, granted_scopes: &ScopeSet) -> Result<(), Status> {
    if permission.is_granted_by(granted_scopes) {
        Ok(())
    } else {
        Err(permission_missing(permission.as_str()))
    }
}

/// The caller with this token, if the cache alone shows that it may call Check. See [`Engine::authenticate_cached`].
pub(super) fn authenticate_cached(
    engine: &Engine,
    token: &str,
    peer: Option<IpAddr>,
    cache: &CallerCache,
) -> Option<Arc<CachedCaller>> {
    engine
        .authenticate_cached(token, peer, cache)
        .filter(|cached_caller| Permission::Check.is_granted_by(&cached_caller.granted_scopes))
}

/// Whether the caller with this token may call Check.
pub(super) fn is_token_authorized(
    engine: &Engine,
    token: &str,
    account: Option<&AccountId>,
    peer: Option<IpAddr>,
) -> Result<bool, CheckError> {
    let authenticated = engine.reauthenticate(token, account, peer)?;
    Ok(authenticated.is_ok_and(|granted_scopes| Permission::Check.is_granted_by(&granted_scopes)))
}
