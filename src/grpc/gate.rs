//! The gate: every call passes here before its body is read. It finds the RPC, proves who calls, holds the call
//! to its size and time, and hands it to its service on the right thread.
//!
//! Callers are decided by the same policy as any key. To strangers the gate says one thing only, whatever is
//! wrong with what they showed.

use std::{collections::HashMap, convert::Infallible, net::SocketAddr, sync::Arc, time::Duration};

use futures_util::future::{Either, FutureExt as _};
use http::{HeaderMap, HeaderName, HeaderValue, Request, Response};
use hyper::body::Incoming;
use tokio::time::Instant;
use tonic::{Status, body::Body};
use tower::{Service, ServiceExt as _, util::BoxCloneSyncService};
use tracing::Instrument as _;

use crate::{
    access::{Caller, Permission},
    domain::{
        decision::Reason,
        facts::KeyFacts as _,
        name::{AccountId, NameError, UserId},
    },
    engine::{Authenticated, CannotAnswer, Engine, Holder},
    gateway::Gateway,
    pb::{
        account_service_server::AccountServiceServer, audit_service_server::AuditServiceServer,
        authz_service_server::AuthzServiceServer,
        envoy::service::auth::v3::authorization_server::AuthorizationServer,
        key_service_server::KeyServiceServer,
    },
    refusal::Refusal,
    replication::news::News,
    store::writer::in_call,
    trace::{self, Tracing},
};

use super::{
    accounts::AccountService,
    audit::AuditService,
    authz::AuthzService,
    body::Limited,
    calls::{self, Begun, Calls},
    ext_authz::{Asker, ExtAuthz},
    keys::KeyService,
    rpc::{self, Access, Plane, Rpc},
    status::{deadline_exceeded, internal, lacks_permission, no_such_rpc, with_reason},
};

/// Where a connection came in: what is served there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Door {
    /// Everything.
    All,
    /// What Envoy asks, and health.
    Envoy,
}

impl Door {
    fn serves(self, service: &str) -> bool {
        self == Door::All || [rpc::service(rpc::EXT_AUTHZ), "grpc.health.v1.Health"].contains(&service)
    }
}

/// What a call is called, in answers too: who asks about it can say which it was.
const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// The target of the lines about calls to management.
const ACCESS: &str = "keyward::access";
/// The largest request to health and reflection, in bytes.
const OPEN_BYTES: usize = 16 * 1024;

/// A service that asks for no credential.
pub(super) type Open = BoxCloneSyncService<Request<Body>, Response<Body>, Infallible>;

/// Every service, and the engine that knows the callers.
pub struct Services {
    pub(super) calls: Arc<Calls>,
    /// How calls are named, and which are recorded.
    pub(super) tracing: Tracing,
    pub(super) engine: Arc<Engine>,
    pub(super) gateway: Arc<Gateway>,
    pub(super) authz: AuthzServiceServer<AuthzService>,
    pub(super) ext_authz: AuthorizationServer<ExtAuthz>,
    pub(super) keys: KeyServiceServer<KeyService>,
    pub(super) accounts: AccountServiceServer<AccountService>,
    pub(super) audit: AuditServiceServer<AuditService>,
    /// Hears what other replicas have committed.
    pub(super) news: News,
    /// Health and reflection, by service name.
    pub(super) open: HashMap<&'static str, Open>,
    /// Where management runs.
    pub(super) management: tokio::runtime::Handle,
}

impl std::fmt::Debug for Services {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Services").field("open", &self.open.keys()).finish_non_exhaustive()
    }
}

/// Until when a call may wait for a change to be in force everywhere: shortly before its caller's deadline, so that
/// the caller hears how far it has come. None = the caller has set none.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Patience {
    pub(super) until: Option<Instant>,
}

impl Patience {
    const LEAST: Duration = Duration::from_millis(20);
    const MOST: Duration = Duration::from_millis(100);

    /// Of a call with this deadline: a twentieth of it is left for the answer, 20 to 100 ms.
    fn of(asked: Option<Duration>) -> Patience {
        let until = asked.and_then(|asked| {
            let spared = (asked / 20).clamp(Patience::LEAST, Patience::MOST);
            Instant::now().checked_add(asked.saturating_sub(spared))
        });
        Patience { until }
    }
}

/// What the gate has found out about a call, for its handler.
pub(super) fn shown<T: Clone + Send + Sync + 'static>(
    request: &mut tonic::Request<impl Sized>,
) -> Result<T, Status> {
    // Every row of the table says what its handler takes; a mismatch is a bug.
    request.extensions_mut().remove::<T>().ok_or_else(internal)
}

impl Services {
    /// The calls that came in.
    #[must_use]
    pub fn calls(&self) -> &Arc<Calls> {
        &self.calls
    }

    /// Answers one call that came in by this door.
    pub async fn answer(
        self: Arc<Self>,
        request: Request<Incoming>,
        peer: SocketAddr,
        door: Door,
    ) -> Response<Body> {
        let begun = self.calls.begin(request.uri().path());
        let call = self.tracing.call(request.headers(), Some(peer.ip().to_canonical()), self.engine.now());
        let response = match begun.rpc() {
            Some(rpc) => trace::within(call, self.answer_told(rpc, &begun, request, peer, door)).await,
            None => trace::within(call, self.answer_open(request, door)).await,
        };
        begun.answered(response)
    }

    /// Answers, and tells log and trace of it: the trace where the call is recorded, the log where it may change
    /// something.
    async fn answer_told(
        &self,
        rpc: &'static Rpc,
        begun: &Begun<'_>,
        mut request: Request<Incoming>,
        peer: SocketAddr,
        door: Door,
    ) -> Response<Body> {
        let manages = rpc.plane == Plane::Management;
        let id = trace::current(|call| HeaderValue::from(call.request_id())).filter(|_| manages);
        // Who reads it there finds the id that was made, where the caller's was none.
        request.headers_mut().extend(id.clone().map(|id| (REQUEST_ID, id)));
        let answer = self.answer_rpc(rpc, request, peer, door);
        // What a proxy asks about may be part of a trace that its message alone tells of: its span comes later.
        let span = if rpc.access == Access::Proxy { None } else { self.tracing.span(rpc.method) };
        let mut response = match &span {
            Some(span) => answer.instrument(span.clone()).await,
            None => answer.await,
        };
        let code = calls::code(response.headers()).unwrap_or(tonic::Code::Ok);
        if let Some(span) = &span {
            trace::end(span, code);
        }
        if manages {
            log_access(rpc, code, begun.elapsed());
        }
        response.headers_mut().extend(id.map(|id| (REQUEST_ID, id)));
        response
    }

    async fn answer_rpc(
        &self,
        rpc: &'static Rpc,
        request: Request<Incoming>,
        peer: SocketAddr,
        door: Door,
    ) -> Response<Body> {
        if !door.serves(rpc.service()) {
            return no_such_rpc().into_http();
        }
        let limit = allowed_time(rpc.timeout, request.headers());
        let patience = Patience::of(asked_time(request.headers()));
        let mut request = request.map(|body| Limited::new(body, rpc.max_request));
        request.extensions_mut().insert(patience);
        if let Err(status) = self.admit(rpc, &mut request, peer, door).await {
            return status.into_http();
        }
        let call = match rpc.plane {
            Plane::Checks if rpc.access == Access::Proxy => {
                Either::Left(Either::Left(into_service(self.ext_authz.clone(), request)))
            }
            Plane::Checks => Either::Left(Either::Right(into_service(self.authz.clone(), request))),
            Plane::Management => Either::Right(self.manage(rpc, request)),
        };
        explained(match limit {
            Some(limit) => {
                tokio::time::timeout(limit, call).await.unwrap_or_else(|_| deadline_exceeded().into_http())
            }
            None => call.await,
        })
    }

    /// Runs a call on the management runtime. A caller that goes away does not stop it: a change is made whole.
    async fn manage(&self, rpc: &'static Rpc, request: Request<Limited>) -> Response<Body> {
        let names_person = request.headers().contains_key("x-keyward-acting-user");
        let call = match rpc.service() {
            "keyward.v1.KeyService" => into_service(self.keys.clone(), request).boxed(),
            "keyward.v1.AccountService" => into_service(self.accounts.clone(), request).boxed(),
            "keyward.v1.AuditService" => into_service(self.audit.clone(), request).boxed(),
            _ => return no_such_rpc().into_http(),
        };
        let (news, hears_first) = (self.news.clone(), rpc.hears_first(names_person));
        let task = self.management.spawn(trace::carried(async move {
            let began = Instant::now();
            let heard = !hears_first || news.heard().await;
            let (answer, proven) = in_call(began, call).await;
            let rests = match calls::code(answer.headers()) {
                // It was so before, says what was read.
                None | Some(tonic::Code::Ok) => rpc.changes() && !proven,
                Some(code) => rests_on_knowledge(code, hears_first),
            };
            if rests && !(heard && news.was_newest(began).await) {
                return Status::from(Refusal::Unavailable).into_http();
            }
            answer
        }));
        task.await.unwrap_or_else(|error| {
            tracing::error!(
                method = rpc.method,
                error = &error as &dyn std::error::Error,
                "a handler failed"
            );
            internal().into_http()
        })
    }

    async fn answer_open(&self, request: Request<Incoming>, door: Door) -> Response<Body> {
        let service = request.uri().path().split('/').nth(1).unwrap_or_default();
        match self.open.get(service).filter(|_| door.serves(service)) {
            Some(service) => explained(
                into_service(service.clone(), request.map(|body| Body::new(Limited::new(body, OPEN_BYTES))))
                    .await,
            ),
            None => no_such_rpc().into_http(),
        }
    }

    /// Finds out who calls, and whether that one may.
    async fn admit(
        &self,
        rpc: &'static Rpc,
        request: &mut Request<Limited>,
        peer: SocketAddr,
        door: Door,
    ) -> Result<(), Status> {
        let free = rpc.access == Access::Proxy && !self.gateway.settings().require_caller;
        if free && (door == Door::Envoy || !request.headers().contains_key(http::header::AUTHORIZATION)) {
            let asker = Asker { account: AccountId::operator(), trusted: door == Door::Envoy };
            request.extensions_mut().insert(asker);
            return Ok(());
        }
        let presented = credential(request.headers())?;
        if rpc.access == Access::Possession {
            let holder = self.holder(&presented)?;
            let account = holder.key.owner().account().map(ToString::to_string).unwrap_or_default();
            trace::current(|call| {
                call.set_caller(trace::Caller { key: holder.key.id().to_string(), account });
            });
            request.extensions_mut().insert(holder);
            return Ok(());
        }
        let named_account = named(request.headers(), "x-keyward-account", AccountId::parse);
        let named_user = named(request.headers(), "x-keyward-acting-user", UserId::parse);
        let peer = Some(peer.ip().to_canonical());
        let asked = named_account.as_ref().ok().and_then(Option::as_ref);
        let anywhere = rpc.access == Access::AnyKey;
        let found = self.engine.authenticate(&presented, asked, anywhere, peer).await;
        let found = found.map_err(Refusal::from)?;
        let Authenticated { holder, account, grants, fresh } = match found {
            Ok(authenticated) => authenticated,
            Err(refused) => {
                tracing::debug!(
                    reason = refused.reason.as_str(),
                    method = rpc.method,
                    "a caller was refused"
                );
                // Only who holds a good key hears what else is wrong.
                if refused.reason == Reason::WrongAccount {
                    named_account?;
                }
                return Err(match refused.reason {
                    Reason::RateLimited | Reason::QuotaExceeded => {
                        Refusal::CallerLimited(refused.retry_after)
                    }
                    _ => Refusal::Unauthenticated,
                }
                .into());
            }
        };
        if !fresh && rpc.plane == Plane::Management {
            return Err(Refusal::CannotAnswer(CannotAnswer::LeaseLost).into());
        }
        named_account?;
        let acting_user = named_user?;
        if acting_user.is_some() && !account.is_operator() {
            let message = "only the operator account's callers may act for a person (x-keyward-acting-user)";
            return Err(Refusal::Forbidden("OPERATOR_ONLY", message.to_owned()).into());
        }
        let Holder { key, version } = holder;
        // Of Checks nobody asks, unless they are recorded.
        trace::current(|call| {
            if rpc.plane == Plane::Management || call.is_recorded() {
                call.set_caller(trace::Caller { key: key.id().to_string(), account: account.to_string() });
            }
        });
        let caller =
            Caller { key, version, account, grants, acting_user, named_user: None, method: rpc.method, peer };
        let needed = match rpc.access {
            Access::Needs(permission) => Some(permission),
            Access::Proxy => Some(Permission::Check),
            Access::AnyKey | Access::Possession => None,
        };
        if let Some(permission) = needed.filter(|permission| !caller.may(*permission)) {
            return Err(lacks_permission(permission.as_str()));
        }
        if rpc.access == Access::Proxy {
            request.extensions_mut().insert(Asker { account: caller.account.clone(), trusted: true });
        }
        request.extensions_mut().insert(caller);
        Ok(())
    }

    /// The key of a living token, in whatever state it is. A superseded token proves nothing any more.
    fn holder(&self, presented: &str) -> Result<Holder, Refusal> {
        let holder = self.engine.lookup(presented)?.ok_or(Refusal::Unauthenticated)?;
        if holder.key.superseded(holder.version, self.engine.now()) && !holder.key.is_revoked() {
            return Err(Refusal::Unauthenticated);
        }
        Ok(holder)
    }
}

/// A line for each call to management: at `info` where it may change something and its caller is known, else at
/// `debug`, since strangers choose how many of those there are.
fn log_access(rpc: &'static Rpc, code: tonic::Code, took: Duration) {
    trace::current(|call| {
        let (method, code) = (rpc.method, calls::code_name(code));
        let peer = call.peer().map(tracing::field::display);
        let caller = call.caller();
        let known = caller.is_some();
        let (caller, account) = caller.map(|caller| (caller.key, caller.account)).unzip();
        let took = took.as_secs_f64();
        if known && rpc.changes() {
            tracing::info!(target: ACCESS, method, code, caller, account, peer, took, "a call was answered");
        } else {
            tracing::debug!(target: ACCESS, method, code, caller, account, peer, took, "a call was answered");
        }
    });
}

/// Whether a refusal rests on what this process, or the database that it reached, knew. Then it is no verdict unless that
/// was the newest state. `changes`: what is wrong with the request of a change may be so only by old knowledge.
fn rests_on_knowledge(code: tonic::Code, changes: bool) -> bool {
    use tonic::Code::{AlreadyExists, FailedPrecondition, InvalidArgument, NotFound, PermissionDenied};
    match code {
        NotFound | AlreadyExists | FailedPrecondition => true,
        InvalidArgument | PermissionDenied => changes,
        _ => false,
    }
}

/// The answer, with its reason: what tonic refuses by itself, such as a body that is no message, has none.
fn explained(response: Response<Body>) -> Response<Body> {
    match Status::from_header_map(response.headers()) {
        Some(status) if status.code() != tonic::Code::Ok && status.details().is_empty() => {
            with_reason(&status).into_http()
        }
        _ => response,
    }
}

async fn into_service<B, S>(service: S, request: Request<B>) -> Response<Body>
where
    S: Service<Request<B>, Response = Response<Body>, Error = Infallible>,
{
    match service.oneshot(request).await {
        Ok(response) => response,
        Err(never) => match never {},
    }
}

/// The bearer token of a call: exactly one, in one header.
fn credential(headers: &HeaderMap) -> Result<String, Refusal> {
    let mut values = headers.get_all(http::header::AUTHORIZATION).iter();
    let (Some(value), None) = (values.next(), values.next()) else {
        return Err(Refusal::Unauthenticated);
    };
    let text = value.to_str().map_err(|_| Refusal::Unauthenticated)?;
    match text.split_once(' ') {
        Some((scheme, token)) if scheme.eq_ignore_ascii_case("bearer") => Ok(token.trim().to_owned()),
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

/// How long a call may take: the shorter of the method's time and the caller's own deadline.
fn allowed_time(method: Option<Duration>, headers: &HeaderMap) -> Option<Duration> {
    match (method, asked_time(headers)) {
        (Some(method), Some(asked)) => Some(method.min(asked)),
        (method, asked) => method.or(asked),
    }
}

/// The caller's own deadline.
fn asked_time(headers: &HeaderMap) -> Option<Duration> {
    headers.get("grpc-timeout").and_then(|value| value.to_str().ok()).and_then(read_timeout)
}

/// gRPC's `grpc-timeout`: up to eight digits and a unit.
fn read_timeout(text: &str) -> Option<Duration> {
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    if !(1..=8).contains(&digits.len()) || !digits.bytes().all(|digit| digit.is_ascii_digit()) {
        return None;
    }
    let number: u64 = digits.parse().ok()?;
    Some(match unit {
        "H" => Duration::from_secs(number * 3600),
        "M" => Duration::from_secs(number * 60),
        "S" => Duration::from_secs(number),
        "m" => Duration::from_millis(number),
        "u" => Duration::from_micros(number),
        "n" => Duration::from_nanos(number),
        _ => return None,
    })
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

    #[test]
    fn a_deadline_is_read_as_grpc_writes_it() {
        assert_eq!(read_timeout("250m"), Some(Duration::from_millis(250)));
        assert_eq!(read_timeout("5S"), Some(Duration::from_secs(5)));
        for bad in ["", "S", "5", "5x", "-5S", "123456789S", "é"] {
            assert_eq!(read_timeout(bad), None, "{bad:?}");
        }
    }
}
