//! Who comes in, and by which door: what a call shows of its caller, whom that proves, and whether that one may make
//! this call. The calls themselves are `gate`'s business.
//!
//! Callers are decided by the same policy as any key. To strangers one thing only is said, whatever is wrong with what
//! they showed.

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
    access::{Caller, Permission, Proof},
    domain::{
        decision::Reason,
        facts::KeyFacts as _,
        identity::Identity,
        name::{AccountId, NameError, UserId},
        scope::ScopeSet,
        token::Digest,
    },
    engine::{Authenticated, CannotAnswer, known::Memory, limiter::Take},
    refusal::Refusal,
    trace,
    transport::{
        Auth, Listener, Service as Served, Services as ServedSet, budget::ConnectionBudget,
        certificate::Certificate,
    },
};

use super::{
    body::MessageBody,
    ext_authz::Proxy,
    gate::{HEALTH, Services},
    rpc::{Access, Plane, Rpc},
    session::CallerSession,
    status::lacks_permission,
    vigil::{Presented, Vigil},
    watches::LongCalls,
};

/// Where a connection came in: what is served there, and what callers must show.
#[derive(Clone, Debug)]
pub struct Door {
    pub(super) services: ServedSet,
    pub(super) auth: Auth,
    open_to_proxies: bool,
    identities: Vec<Arc<Identity>>,
}

impl Door {
    /// The door of a listener.
    #[must_use]
    pub fn of(listener: &Listener) -> Door {
        Door {
            services: listener.services,
            auth: listener.auth,
            open_to_proxies: listener.open_to_proxies,
            identities: listener.identities.iter().cloned().map(Arc::new).collect(),
        }
    }

    /// The identity that a certificate proves here; the first in the order of the settings.
    #[must_use]
    pub fn identify(&self, certificate: &Certificate) -> Option<Arc<Identity>> {
        self.identities.iter().find(|identity| certificate.names.contains(identity.san())).cloned()
    }

    pub(super) fn serves(&self, service: &str) -> bool {
        let served = match service {
            "keyward.v1.AuthzService" => Served::Check,
            "keyward.v1.KeyService" | "keyward.v1.AccountService" | "keyward.v1.AuditService" => {
                Served::Management
            }
            "envoy.service.auth.v3.Authorization" => Served::ExtAuthz,
            HEALTH => Served::Health,
            "grpc.reflection.v1.ServerReflection" | "grpc.reflection.v1alpha.ServerReflection" => {
                Served::Reflection
            }
            _ => return false,
        };
        self.services.has(served)
    }
}

/// Who has connected.
#[derive(Debug)]
pub struct Visitor {
    /// By which door.
    pub door: Arc<Door>,
    /// From where; a Unix socket's peer is nowhere.
    pub peer: Option<IpAddr>,
    /// Whom the connection's certificate proves.
    pub identity: Option<Arc<Identity>>,
    /// Whose calls came last.
    pub memory: Memory,
    /// The calls that last.
    pub watches: LongCalls,
    /// What its requests may hold.
    pub memory_budget: Arc<ConnectionBudget>,
    /// Whether a caller has proved itself over this connection.
    pub proven: Arc<AtomicBool>,
}

/// What a call shows of its caller.
enum Shown<'a> {
    Token(String),
    Certificate(&'a Arc<Identity>),
}

/// A caller that is known, before it is asked what it may.
struct Known {
    proof: Proof,
    account: AccountId,
    grants: ScopeSet,
    fresh: bool,
}

impl Services {
    /// Finds out who calls, and whether that one may.
    pub(super) async fn admit(
        &self,
        rpc: &'static Rpc,
        request: &mut Request<MessageBody>,
        visitor: &Visitor,
    ) -> Result<(), Status> {
        if rpc.access == Access::Proxy
            && let Some(proxy) = self.free(&visitor.door, request.headers())
        {
            request.extensions_mut().insert(proxy);
            return Ok(());
        }
        let shown = visitor.shows(request.headers())?;
        if rpc.access == Access::Possession {
            let caller = self.possessor(rpc, credential(request.headers())?, visitor.peer)?;
            request.extensions_mut().insert(CallerSession::new(self.engine.clone(), caller));
            return Ok(());
        }
        let named_account = named(request.headers(), "x-keyward-account", AccountId::parse);
        let named_user = named(request.headers(), "x-keyward-acting-user", UserId::parse);
        let Known { proof, account, grants, fresh } = match shown {
            Shown::Token(ref token) => self.known_by_key(rpc, token, &named_account, visitor.peer).await?,
            Shown::Certificate(identity) => self.known_by_certificate(identity)?,
        };
        visitor.set_proven();
        if !fresh && rpc.plane == Plane::Management {
            return Err(Refusal::CannotAnswer(CannotAnswer::LeaseLost).into());
        }
        let named_account = named_account?;
        let acting_user = named_user?;
        if acting_user.is_some() && !account.is_operator() {
            let message = "only the operator account's callers may act for a person (x-keyward-acting-user)";
            return Err(Refusal::Forbidden("OPERATOR_ONLY", message.to_owned()).into());
        }
        let (method, peer) = (rpc.method, visitor.peer);
        // Of Checks nobody asks, unless they are recorded; and they change nothing.
        let request_id =
            trace::current(|call| (rpc.plane == Plane::Management).then(|| call.request_id().to_string()));
        let request_id = request_id.flatten();
        let needs = match rpc.access {
            Access::Needs(permission) => Some(permission),
            Access::Proxy => Some(Permission::Check),
            Access::AnyKey | Access::Possession => None,
        };
        let caller =
            Caller { proof, account, grants, needs, acting_user, named_user: None, method, peer, request_id };
        trace::current(|call| {
            if rpc.plane == Plane::Management || call.is_recorded() {
                let (key, account) = (caller.actor().to_string(), caller.account.to_string());
                call.set_caller(trace::Caller { key, account });
            }
        });
        if let Some(permission) = needs.filter(|permission| !caller.may(*permission)) {
            return Err(lacks_permission(permission.as_str()));
        }
        // The caller of a management call is judged again by its `CallerSession`.
        if rpc.plane == Plane::Checks {
            let shown = match shown {
                Shown::Token(token) => Presented::Token(Arc::new(Zeroizing::new(token))),
                Shown::Certificate(identity) => Presented::Certificate(identity.clone()),
            };
            let vigil = Vigil { shown, account: named_account, peer };
            if rpc.access == Access::Proxy {
                let (account, vigil) = (caller.account.clone(), Some(vigil.clone()));
                request.extensions_mut().insert(Proxy { account, trusted: true, vigil });
            }
            request.extensions_mut().insert(vigil);
        }
        match rpc.plane {
            Plane::Checks => drop(request.extensions_mut().insert(caller)),
            Plane::Management => {
                request.extensions_mut().insert(CallerSession::new(self.engine.clone(), caller));
            }
        }
        Ok(())
    }

    /// The proxy that asks here without a credential, where it may.
    pub(super) fn free(&self, door: &Door, headers: &HeaderMap) -> Option<Proxy> {
        let envoy = door.services.envoy_only();
        let free = door.open_to_proxies && !self.gateway.settings().require_caller;
        let shows_none = || !headers.contains_key(http::header::AUTHORIZATION);
        (free && (envoy || shows_none())).then(|| Proxy {
            account: AccountId::operator(),
            trusted: envoy,
            vigil: None,
        })
    }

    /// The caller with this token, decided as any other key.
    async fn known_by_key(
        &self,
        rpc: &'static Rpc,
        presented: &str,
        named_account: &Result<Option<AccountId>, Refusal>,
        peer: Option<IpAddr>,
    ) -> Result<Known, Refusal> {
        let asked = named_account.as_ref().ok().and_then(Option::as_ref);
        let anywhere = rpc.access == Access::AnyKey;
        // A batch is charged for each of its items, once they are known.
        let take = if rpc.is_batch() { Take::ONE.dry() } else { Take::ONE };
        let refused = match self.engine.authenticate(presented, asked, anywhere, peer, take).await? {
            Ok(Authenticated { holder, digest, account, grants, fresh }) => {
                return Ok(Known { proof: Proof::Key(holder.key, digest), account, grants, fresh });
            }
            Err(refused) => refused,
        };
        tracing::debug!(reason = refused.reason.as_str(), method = rpc.method, "a caller was refused");
        Err(match (refused.reason, named_account) {
            // Only who holds a good key hears what else is wrong.
            (Reason::WrongAccount, Err(Refusal::Invalid(violations))) => Refusal::Invalid(violations.clone()),
            (Reason::RateLimited | Reason::QuotaExceeded, _) => Refusal::CallerLimited(refused.retry_after),
            _ => Refusal::Unauthenticated,
        })
    }

    /// The caller with a certificate of this identity. It acts in the account that the configuration says, whatever the
    /// call names.
    fn known_by_certificate(&self, identity: &Arc<Identity>) -> Result<Known, Refusal> {
        let vouched = self.engine.vouch(identity.account())?;
        if !vouched.stands {
            tracing::debug!(
                identity = identity.name(),
                "a caller was refused: its account is suspended or unknown"
            );
            return Err(Refusal::Unauthenticated);
        }
        Ok(Known {
            account: identity.account().clone(),
            grants: identity.scopes().clone(),
            proof: Proof::Certificate(identity.clone()),
            fresh: vouched.fresh,
        })
    }

    /// The caller that shows a living token, in whatever state the key is.
    fn possessor(&self, rpc: &'static Rpc, presented: &str, peer: Option<IpAddr>) -> Result<Caller, Refusal> {
        let digest = Digest::of(presented);
        let holder = self.engine.possessor(&digest)?.ok_or(Refusal::Unauthenticated)?;
        let account = holder.key.owner().account().cloned();
        let request_id = trace::current(|call| {
            let account = account.as_ref().map(ToString::to_string).unwrap_or_default();
            call.set_caller(trace::Caller { key: holder.key.id().to_string(), account });
            call.request_id().to_string()
        });
        Ok(Caller {
            proof: Proof::Possession(holder.key, digest),
            account: account.unwrap_or_else(AccountId::nowhere),
            grants: ScopeSet::default(),
            needs: None,
            acting_user: None,
            named_user: None,
            method: rpc.method,
            peer,
            request_id,
        })
    }
}

impl Visitor {
    /// Whether a caller has proved itself over this connection.
    pub(super) fn is_proven(&self) -> bool {
        self.proven.load(Ordering::Relaxed)
    }

    /// Remembers that a caller has proved itself.
    pub(super) fn set_proven(&self) {
        if !self.is_proven() {
            self.proven.store(true, Ordering::Relaxed);
        }
    }

    /// What a call shows of its caller, where that is enough by this door.
    fn shows(&self, headers: &HeaderMap) -> Result<Shown<'_>, Refusal> {
        let identity = || self.identity.as_ref().ok_or(Refusal::Unauthenticated);
        let token = || credential(headers).map(|token| Shown::Token(token.to_owned()));
        match self.door.auth {
            Auth::Token => token(),
            Auth::Certificate => identity().map(Shown::Certificate),
            Auth::Either if headers.contains_key(http::header::AUTHORIZATION) => token(),
            Auth::Either => identity().map(Shown::Certificate),
            Auth::Both => identity().and_then(|_| token()),
        }
    }
}

/// The bearer token of a call: exactly one, in one header.
pub(super) fn credential(headers: &HeaderMap) -> Result<&str, Refusal> {
    let mut values = headers.get_all(http::header::AUTHORIZATION).iter();
    let (Some(value), None) = (values.next(), values.next()) else {
        return Err(Refusal::Unauthenticated);
    };
    let text = value.to_str().map_err(|_| Refusal::Unauthenticated)?;
    match text.split_once(' ') {
        Some((scheme, token)) if scheme.eq_ignore_ascii_case("bearer") => Ok(token.trim()),
        _ => Err(Refusal::Unauthenticated),
    }
}

/// A name that a header gives; at most once.
fn named<T>(
    headers: &HeaderMap,
    header: &'static str,
    parse: fn(&str) -> Result<T, NameError>,
) -> Result<Option<T>, Refusal> {
    let mut values = headers.get_all(header).iter();
    let Some(value) = values.next() else { return Ok(None) };
    if values.next().is_some() {
        return Err(Refusal::field(header, "must be given once"));
    }
    let text = value.to_str().map_err(|_| Refusal::field(header, "must be visible ASCII"))?;
    parse(text).map(Some).map_err(|error| Refusal::field(header, error.to_string()))
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
            assert_eq!(credential(&headers(&[good])).unwrap(), "abc");
        }
        for bad in [&[][..], &["abc"], &["Basic abc"], &["Bearer a", "Bearer b"]] {
            assert!(credential(&headers(bad)).is_err(), "{bad:?}");
        }
    }
}
