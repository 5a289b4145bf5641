//! Authenticates the caller of an RPC and checks that it is authorized for it.
//!
//! Dispatching the call belongs in `router.rs`.
//!
//! Callers are evaluated by the same policy as any key. An unauthenticated client always gets the same status, whatever
//! is wrong with its credential.

use std::{
    net::IpAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use http::{HeaderMap, Request};
use tonic::Status;
use zeroize::Zeroizing;

use crate::{
    caller::{Caller, CallerIdentity, Permission},
    domain::{
        certificate_identity::CertificateIdentity,
        key_attributes::KeyAttributes as _,
        name::{AccountId, NameError, UserId},
        policy_decision::Reason,
        scope::ScopeSet,
        token::TokenDigest,
    },
    engine::{AuthenticatedKey, CheckError, Engine, caller_cache::CallerCache, limiter::Consumption},
    gateway::Gateway,
    service_error::ServiceError,
    trace,
    transport::{
        CallerAuth, ListenerSettings, ServiceKind, ServiceSet, certificate::CertificateInfo,
        memory_budget::ConnectionMemoryBudget,
    },
};

use super::{
    call_extensions::ProxyCaller,
    check_session::{CheckSession, PresentedCredential},
    health::HEALTH_SERVICE,
    long_calls::LongCalls,
    management_session::ManagementSession,
    request_body::MessageBody,
    rpc::{AccessRequirement, ExecutionPlane, RpcSpec},
    status::permission_missing,
};

/// What a listener serves, and which credentials it accepts.
#[derive(Clone, Debug)]
pub(super) struct ListenerPolicy {
    pub(super) services: ServiceSet,
    pub(super) auth: CallerAuth,
    allows_anonymous_proxies: bool,
    identities: Vec<Arc<CertificateIdentity>>,
}

impl ListenerPolicy {
    pub(super) fn from_settings(listener: &ListenerSettings) -> ListenerPolicy {
        ListenerPolicy {
            services: listener.services,
            auth: listener.auth,
            allows_anonymous_proxies: listener.allows_anonymous_proxies,
            identities: listener.identities.iter().cloned().map(Arc::new).collect(),
        }
    }

    /// The identity that a certificate proves on this listener: the first match in the order of the settings.
    pub(super) fn identify_certificate(
        &self,
        certificate: &CertificateInfo,
    ) -> Option<Arc<CertificateIdentity>> {
        self.identities.iter().find(|identity| certificate.names.contains(identity.san())).cloned()
    }

    pub(super) fn has_service(&self, service: &str) -> bool {
        let kind = match service {
            "keyward.v1.AuthzService" => ServiceKind::Check,
            "keyward.v1.KeyService" | "keyward.v1.AccountService" | "keyward.v1.AuditService" => {
                ServiceKind::Management
            }
            "envoy.service.auth.v3.Authorization" => ServiceKind::ExtAuthz,
            HEALTH_SERVICE => ServiceKind::Health,
            "grpc.reflection.v1.ServerReflection" | "grpc.reflection.v1alpha.ServerReflection" => {
                ServiceKind::Reflection
            }
            _ => return false,
        };
        self.services.contains(kind)
    }
}

/// What is known about a connection: its listener, its peer and the callers that it has proven.
#[derive(Debug)]
pub(super) struct ConnectionContext {
    pub(super) policy: Arc<ListenerPolicy>,
    /// The peer's IP address; `None` on a Unix socket.
    pub(super) peer: Option<IpAddr>,
    /// The identity that the client certificate proves.
    pub(super) identity: Option<Arc<CertificateIdentity>>,
    /// Recent callers of this connection.
    pub(super) caller_cache: CallerCache,
    /// Long-running calls of this connection.
    pub(super) long_calls: LongCalls,
    /// Bounds the memory that its requests hold.
    pub(super) memory_budget: Arc<ConnectionMemoryBudget>,
    /// Whether a caller was authenticated on this connection.
    pub(super) has_proven_caller: Arc<AtomicBool>,
}

/// The credential that a call presents.
enum PresentedCredentialRef<'a> {
    Token(String),
    Certificate(&'a Arc<CertificateIdentity>),
}

/// An authenticated caller whose permissions are not checked yet.
struct AuthenticatedCaller {
    identity: CallerIdentity,
    account: AccountId,
    granted_scopes: ScopeSet,
    has_valid_lease: bool,
}

/// Authenticates callers by the engine, and anonymous proxies by the gateway's settings.
#[derive(Clone, Debug)]
pub(super) struct CallAuthenticator {
    pub(super) engine: Arc<Engine>,
    pub(super) gateway: Arc<Gateway>,
}

impl CallAuthenticator {
    /// Authenticates the caller, checks its permission and attaches the result to the request's extensions.
    pub(super) async fn authorize_call(
        &self,
        rpc: &'static RpcSpec,
        request: &mut Request<MessageBody>,
        context: &ConnectionContext,
    ) -> Result<(), Status> {
        if rpc.access == AccessRequirement::Proxy
            && let Some(proxy) = self.anonymous_proxy(&context.policy, request.headers())
        {
            request.extensions_mut().insert(proxy);
            return Ok(());
        }
        let credential = context.extract_credential(request.headers())?;
        if rpc.access == AccessRequirement::TokenPossession {
            let caller = self.authenticate_possession(rpc, bearer_token(request.headers())?, context.peer)?;
            request.extensions_mut().insert(ManagementSession::new(self.engine.clone(), caller));
            return Ok(());
        }
        let named_account = parse_header(request.headers(), "x-keyward-account", AccountId::parse);
        let named_user = parse_header(request.headers(), "x-keyward-acting-user", UserId::parse);
        let AuthenticatedCaller { identity, account, granted_scopes, has_valid_lease } = match credential {
            PresentedCredentialRef::Token(ref token) => {
                self.authenticate_token(rpc, token, &named_account, context.peer).await?
            }
            PresentedCredentialRef::Certificate(identity) => self.authenticate_certificate(identity)?,
        };
        context.mark_proven_caller();
        if !has_valid_lease && rpc.plane == ExecutionPlane::Management {
            return Err(ServiceError::CheckFailed(CheckError::LeaseLost).into());
        }
        let named_account = named_account?;
        let acting_user = named_user?;
        if acting_user.is_some() && !account.is_operator() {
            let message = "only the operator account's callers may act for a person (x-keyward-acting-user)";
            return Err(ServiceError::Forbidden("OPERATOR_ONLY", message.to_owned()).into());
        }
        let (method, peer) = (rpc.method, context.peer);
        // A Check changes nothing, so its id matters only in traces.
        let request_id = trace::with_current(|call| {
            (rpc.plane == ExecutionPlane::Management).then(|| call.request_id().to_string())
        });
        let request_id = request_id.flatten();
        let required_permission = match rpc.access {
            AccessRequirement::RequiresPermission(permission) => Some(permission),
            AccessRequirement::Proxy => Some(Permission::Check),
            AccessRequirement::AnyUsableKey | AccessRequirement::TokenPossession => None,
        };
        let caller = Caller {
            identity,
            account,
            granted_scopes,
            required_permission,
            acting_user,
            logged_user: None,
            method,
            peer,
            request_id,
        };
        trace::with_current(|call| {
            if rpc.plane == ExecutionPlane::Management || call.is_recorded() {
                let (key, account) = (caller.actor().to_string(), caller.account.to_string());
                call.set_caller(trace::CallerLabels { key_id: key, account });
            }
        });
        if let Some(permission) = required_permission.filter(|permission| !caller.has_permission(*permission))
        {
            return Err(permission_missing(permission.as_str()));
        }
        // `ManagementSession` evaluates the caller of a management call again.
        if rpc.plane == ExecutionPlane::Checks {
            let credential = match credential {
                PresentedCredentialRef::Token(token) => {
                    PresentedCredential::Token(Arc::new(Zeroizing::new(token)))
                }
                PresentedCredentialRef::Certificate(identity) => {
                    PresentedCredential::Certificate(identity.clone())
                }
            };
            let session = CheckSession { credential, named_account, peer };
            if rpc.access == AccessRequirement::Proxy {
                let (account, session) = (caller.account.clone(), Some(session.clone()));
                request.extensions_mut().insert(ProxyCaller { account, trusted: true, session });
            }
            request.extensions_mut().insert(session);
        }
        match rpc.plane {
            ExecutionPlane::Checks => drop(request.extensions_mut().insert(caller)),
            ExecutionPlane::Management => {
                request.extensions_mut().insert(ManagementSession::new(self.engine.clone(), caller));
            }
        }
        Ok(())
    }

    /// The proxy that calls without a credential, if the listener and the settings allow it.
    pub(super) fn anonymous_proxy(
        &self,
        policy: &ListenerPolicy,
        headers: &HeaderMap,
    ) -> Option<ProxyCaller> {
        let is_envoy_only = policy.services.is_envoy_only();
        let is_allowed = policy.allows_anonymous_proxies && !self.gateway.settings().require_caller;
        let has_no_token = || !headers.contains_key(http::header::AUTHORIZATION);
        (is_allowed && (is_envoy_only || has_no_token())).then(|| ProxyCaller {
            account: AccountId::operator(),
            trusted: is_envoy_only,
            session: None,
        })
    }

    /// Authenticates a token and charges the call to its limits.
    async fn authenticate_token(
        &self,
        rpc: &'static RpcSpec,
        token: &str,
        named_account: &Result<Option<AccountId>, ServiceError>,
        peer: Option<IpAddr>,
    ) -> Result<AuthenticatedCaller, ServiceError> {
        let requested_account = named_account.as_ref().ok().and_then(Option::as_ref);
        let anywhere = rpc.access == AccessRequirement::AnyUsableKey;
        // A batch is charged for each item, once their number is known.
        let consumption = if rpc.is_batch() { Consumption::ONE.into_dry_run() } else { Consumption::ONE };
        let failure =
            match self.engine.authenticate(token, requested_account, anywhere, peer, consumption).await? {
                Ok(AuthenticatedKey { key_match, digest, account, granted_scopes, has_valid_lease }) => {
                    return Ok(AuthenticatedCaller {
                        identity: CallerIdentity::Key(key_match.key, digest),
                        account,
                        granted_scopes,
                        has_valid_lease,
                    });
                }
                Err(failure) => failure,
            };
        tracing::debug!(reason = failure.reason.as_str(), method = rpc.method, "caller refused");
        Err(match (failure.reason, named_account) {
            // Other errors are shown only to the holder of a valid key.
            (Reason::WrongAccount, Err(ServiceError::Invalid(violations))) => {
                ServiceError::Invalid(violations.clone())
            }
            (Reason::RateLimited | Reason::QuotaExceeded, _) => {
                ServiceError::CallerRateLimited(failure.retry_after)
            }
            _ => ServiceError::Unauthenticated,
        })
    }

    /// Authenticates a certificate. Its caller acts in the configured account, whatever account the call names.
    fn authenticate_certificate(
        &self,
        identity: &Arc<CertificateIdentity>,
    ) -> Result<AuthenticatedCaller, ServiceError> {
        let status = self.engine.account_status(identity.account())?;
        if !status.is_active {
            tracing::debug!(identity = identity.actor_name(), "caller refused: account suspended or unknown");
            return Err(ServiceError::Unauthenticated);
        }
        Ok(AuthenticatedCaller {
            account: identity.account().clone(),
            granted_scopes: identity.scopes().clone(),
            identity: CallerIdentity::Certificate(identity.clone()),
            has_valid_lease: status.has_valid_lease,
        })
    }

    /// Authenticates a token that has not been superseded, whatever the state of its key.
    fn authenticate_possession(
        &self,
        rpc: &'static RpcSpec,
        token: &str,
        peer: Option<IpAddr>,
    ) -> Result<Caller, ServiceError> {
        let digest = TokenDigest::from_token(token);
        let key_match = self.engine.find_possessed_key(&digest)?.ok_or(ServiceError::Unauthenticated)?;
        let account = key_match.key.owner().account().cloned();
        let request_id = trace::with_current(|call| {
            let account = account.as_ref().map(ToString::to_string).unwrap_or_default();
            call.set_caller(trace::CallerLabels { key_id: key_match.key.id().to_string(), account });
            call.request_id().to_string()
        });
        Ok(Caller {
            identity: CallerIdentity::Possession(key_match.key, digest),
            account: account.unwrap_or_else(AccountId::unspecified),
            granted_scopes: ScopeSet::default(),
            required_permission: None,
            acting_user: None,
            logged_user: None,
            method: rpc.method,
            peer,
            request_id,
        })
    }
}

impl ConnectionContext {
    /// Whether a caller was authenticated on this connection.
    pub(super) fn has_proven_caller(&self) -> bool {
        self.has_proven_caller.load(Ordering::Relaxed)
    }

    pub(super) fn mark_proven_caller(&self) {
        if !self.has_proven_caller() {
            self.has_proven_caller.store(true, Ordering::Relaxed);
        }
    }

    /// The credential of a call, if the listener accepts it.
    fn extract_credential(&self, headers: &HeaderMap) -> Result<PresentedCredentialRef<'_>, ServiceError> {
        let identity = || self.identity.as_ref().ok_or(ServiceError::Unauthenticated);
        let token = || bearer_token(headers).map(|token| PresentedCredentialRef::Token(token.to_owned()));
        match self.policy.auth {
            CallerAuth::Token => token(),
            CallerAuth::Certificate => identity().map(PresentedCredentialRef::Certificate),
            CallerAuth::TokenOrCertificate if headers.contains_key(http::header::AUTHORIZATION) => token(),
            CallerAuth::TokenOrCertificate => identity().map(PresentedCredentialRef::Certificate),
            CallerAuth::TokenAndCertificate => identity().and_then(|_| token()),
        }
    }
}

/// The bearer token of a call. Exactly one `authorization` header must carry it.
pub(super) fn bearer_token(headers: &HeaderMap) -> Result<&str, ServiceError> {
    let mut values = headers.get_all(http::header::AUTHORIZATION).iter();
    let (Some(value), None) = (values.next(), values.next()) else {
        return Err(ServiceError::Unauthenticated);
    };
    let text = value.to_str().map_err(|_| ServiceError::Unauthenticated)?;
    match text.split_once(' ') {
        Some((scheme, token)) if scheme.eq_ignore_ascii_case("bearer") => Ok(token.trim()),
        _ => Err(ServiceError::Unauthenticated),
    }
}

/// Parses a header that may occur at most once.
fn parse_header<T>(
    headers: &HeaderMap,
    header: &'static str,
    parse: fn(&str) -> Result<T, NameError>,
) -> Result<Option<T>, ServiceError> {
    let mut values = headers.get_all(header).iter();
    let Some(value) = values.next() else { return Ok(None) };
    if values.next().is_some() {
        return Err(ServiceError::invalid_field(header, "must be given once"));
    }
    let text = value.to_str().map_err(|_| ServiceError::invalid_field(header, "must be visible ASCII"))?;
    parse(text).map(Some).map_err(|error| ServiceError::invalid_field(header, error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(values: &[&str]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for value in values {
            headers.append(http::header::AUTHORIZATION, value.parse().unwrap());
        }
        headers
    }

    #[test]
    fn a_credential_is_one_bearer_token_in_any_case() {
        for good in ["Bearer abc", "bearer abc", "BEARER  abc"] {
            assert_eq!(bearer_token(&headers(&[good])).unwrap(), "abc");
        }
        for bad in [&[][..], &["abc"], &["Basic abc"], &["Bearer a", "Bearer b"]] {
            assert!(bearer_token(&headers(bad)).is_err(), "{bad:?}");
        }
    }
}
