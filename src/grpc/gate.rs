//! The gate: every call passes here before its body is read. It finds the RPC, has its caller proved, holds the call
//! to its size and time, and hands it to its service on the right thread.
//!
//! Who the caller is and whether that one may call is `admission`'s business; a Check that is plainly in order is
//! answered in `direct`.

use std::{collections::HashMap, convert::Infallible, sync::Arc, time::Duration};

use futures_util::future::FutureExt as _;
use http::{Extensions, HeaderMap, HeaderName, HeaderValue, Request, Response};
use hyper::body::Incoming;
use tokio::time::Instant;
use tonic::{Status, body::Body};
use tower::{Service, ServiceExt as _, util::BoxCloneSyncService};
use tracing::Instrument as _;

use crate::{
    access::Caller,
    domain::time::Timestamp,
    engine::Engine,
    gateway::Gateway,
    pb::{
        account_service_server::AccountServiceServer, audit_service_server::AuditServiceServer,
        envoy::service::auth::v3::authorization_server::AuthorizationServer, envoy_request::body_len,
        key_service_server::KeyServiceServer,
    },
    refusal::Refusal,
    replication::news::News,
    store::writer::in_call,
    trace::{self, Tracing},
    transport::budget::MemoryBudget,
};

use super::{
    accounts::AccountService,
    admission::Visitor,
    audit::AuditService,
    authz::AuthzService,
    body::{Arriving, MessageBody},
    calls::{self, Begun, Calls},
    direct::Said,
    ext_authz::{ExtAuthz, Proxy},
    inflate::{ACCEPTED, GRPC_ACCEPT_ENCODING, take_encoding},
    keys::KeyService,
    outgoing::SendBudget,
    permits::{ConcurrencyLimits, Occupant, PermitBody},
    reply::{self, Reply},
    rpc::{Access, BATCH_BYTES, IMPORT, Kind, Plane, Rpc},
    session::CallerSession,
    status::{deadline_exceeded, internal, no_such_rpc, with_reason},
    vigil::Vigil,
};

pub(super) const HEALTH: &str = "grpc.health.v1.Health";
const HEALTH_WATCH: &str = "/grpc.health.v1.Health/Watch";
/// How long a call without a credential may take; one that watches health is for as long as its connection.
const OPEN_PATIENCE: Duration = Duration::from_secs(60);

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
    /// Answers Checks.
    pub(super) checks: Arc<AuthzService>,
    pub(super) ext_authz: AuthorizationServer<ExtAuthz>,
    /// The same without tonic around it.
    pub(super) proxies: Arc<ExtAuthz>,
    pub(super) keys: KeyServiceServer<KeyService>,
    pub(super) accounts: AccountServiceServer<AccountService>,
    pub(super) audit: AuditServiceServer<AuditService>,
    /// Hears what other replicas have committed.
    pub(super) news: News,
    /// Health and reflection, by service name.
    pub(super) open: HashMap<&'static str, Open>,
    /// Where management runs.
    pub(super) management: tokio::runtime::Handle,
    /// How much of it there may be at once.
    pub(super) limits: Arc<ConcurrencyLimits>,
    /// What requests may hold.
    pub(super) memory: Arc<MemoryBudget>,
    /// What waits to be sent.
    pub(super) outgoing: Arc<SendBudget>,
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

/// What the gate hands to the handler of a call, by the call's extensions.
pub(super) trait FromExtensions: Sized {
    fn from_extensions(extensions: &mut tonic::Extensions) -> Result<Option<Self>, Status>;
}

macro_rules! taken_from_extensions {
    ($($found:ty),*) => {
        $(
            impl FromExtensions for $found {
                fn from_extensions(extensions: &mut tonic::Extensions) -> Result<Option<Self>, Status> {
                    Ok(extensions.remove())
                }
            }
        )*
    };
}

taken_from_extensions!(Patience, Vigil, Proxy, CallerSession);

/// The caller of a management call is judged again: handlers run when the whole request has arrived.
impl FromExtensions for Caller {
    fn from_extensions(extensions: &mut tonic::Extensions) -> Result<Option<Self>, Status> {
        match extensions.get::<CallerSession>() {
            Some(session) => Ok(Some(session.reauthorize()?)),
            None => Ok(extensions.remove()),
        }
    }
}

/// What the gate has found out about a call, for its handler.
pub(super) fn shown<T: FromExtensions>(request: &mut tonic::Request<impl Sized>) -> Result<T, Status> {
    // Every row of the table says what its handler takes; a mismatch is a bug.
    T::from_extensions(request.extensions_mut())?.ok_or_else(internal)
}

impl Services {
    /// The time by which callers are judged.
    #[must_use]
    pub fn now(&self) -> Timestamp {
        self.engine.now()
    }

    /// Tells how many calls found no room, whenever it is asked.
    pub fn shed(&self) -> impl Fn() -> u64 + Send + Sync + 'static {
        let (limits, memory) = (self.limits.clone(), self.memory.clone());
        move || limits.refused() + memory.refused()
    }

    /// The calls that came in.
    #[must_use]
    pub fn calls(&self) -> &Arc<Calls> {
        &self.calls
    }

    /// Answers one call of a visitor: a Check that is plainly in order at once, every other call the long way. A call
    /// whose deadline has passed while it waited has nobody who reads its answer.
    pub(super) async fn answer(
        &self,
        request: Request<Incoming>,
        visitor: &Visitor,
        arrived: Instant,
    ) -> Response<Reply> {
        let begun = self.calls.begin(request.uri().path());
        let said = Said::by(request.headers());
        let waited = || begun.at().saturating_duration_since(arrived);
        if said.hurries && asked_time(request.headers()).is_some_and(|deadline| deadline <= waited()) {
            return begun.replied(deadline_exceeded().into_http().map(Reply::Any));
        }
        let names = said.names_itself.then(|| request.headers());
        let call = self.tracing.call(names, visitor.peer, self.engine.now());
        let (plain, mut call) = (!call.is_chosen(), Some(call));
        let mut request = request.map(Arriving::from);
        let response = match begun.rpc() {
            Some(_) if plain && begun.is_check() => {
                self.answer_directly(&mut request, &said, visitor, &begun, &mut call).await
            }
            Some(rpc) if plain && rpc.access == Access::Proxy => {
                let answer = self.answer_proxy(rpc, &mut request, &said, visitor, &begun, &mut call);
                Box::pin(answer).await
            }
            _ => None,
        };
        let mut response = match response {
            Some(response) => begun.replied(response),
            // Apart on the heap: a future is as large as all that may go on in it, and most calls were Checks.
            None => Box::pin(self.answer_at_length(begun, call, request, visitor)).await.map(Reply::Any),
        };
        response.headers_mut().insert(GRPC_ACCEPT_ENCODING, ACCEPTED);
        response
    }

    async fn answer_at_length(
        &self,
        begun: Begun<'_>,
        call: Option<trace::Call>,
        request: Request<Arriving>,
        visitor: &Visitor,
    ) -> Response<Body> {
        let answer = async {
            match begun.rpc() {
                Some(rpc) => self.answer_told(rpc, &begun, request, visitor).await,
                None => self.answer_open(request, visitor).await,
            }
        };
        let response = match call {
            Some(call) => trace::within(call, answer).await,
            None => answer.await,
        };
        begun.answered(response)
    }

    /// Answers, and tells log and trace of it: the trace where the call is recorded, the log where it may change
    /// something.
    async fn answer_told(
        &self,
        rpc: &'static Rpc,
        begun: &Begun<'_>,
        mut request: Request<Arriving>,
        visitor: &Visitor,
    ) -> Response<Body> {
        let manages = rpc.plane == Plane::Management;
        let id = trace::current(|call| HeaderValue::from(call.request_id())).filter(|_| manages);
        // Who reads it there finds the id that was made, where the caller's was none.
        if let Some(id) = &id {
            request.headers_mut().insert(REQUEST_ID, id.clone());
        }
        let answer = self.answer_rpc(rpc, begun, request, visitor);
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
        begun: &Begun<'_>,
        request: Request<Arriving>,
        visitor: &Visitor,
    ) -> Response<Body> {
        if !visitor.door.serves(rpc.service()) {
            return no_such_rpc().into_http();
        }
        let limit = allowed_time(rpc.timeout, request.headers());
        let patience = Patience::of(asked_time(request.headers()));
        let mut request = match limited(request, rpc.max_request, visitor) {
            Ok(request) => request,
            Err(status) => return status.into_http(),
        };
        request.extensions_mut().insert(patience);
        if let Err(status) = self.admit(rpc, &mut request, visitor).await {
            return status.into_http();
        }
        let watch = (rpc.kind == Kind::ServerStream).then(|| visitor.watches.other()).transpose();
        let watch = match watch {
            Ok(watch) => watch,
            Err(status) => return status.into_http(),
        };
        let occupant = occupant(rpc, request.extensions(), visitor);
        request.body_mut().set_priority(occupant.priority());
        // Apart on the heap: what a call does is large, and is moved a few times before it begins.
        let call = async move {
            if rpc.kind != Kind::BidiStream
                && let Err(status) = read_message(rpc, request.body_mut()).await
            {
                return match request.body().oversize().filter(|_| rpc.access == Access::Proxy) {
                    Some((length, limit)) => message(&self.proxies.refuse_too_large(length, limit)),
                    None => status.into_http(),
                };
            }
            match rpc.plane {
                Plane::Checks if rpc.access == Access::Proxy => {
                    into_service(self.ext_authz.clone(), request).await
                }
                Plane::Checks => self.checks.clone().serve(rpc, request).await,
                Plane::Management => self.manage(rpc, request, occupant).await,
            }
        };
        let call = call.boxed();
        let answer = explained(match limit {
            Some(limit) => {
                let answer = tokio::time::timeout_at(begun.at() + limit, call).await;
                answer.unwrap_or_else(|_| deadline_exceeded().into_http())
            }
            None => call.await,
        });
        match watch {
            Some(watch) => watch.hold(answer),
            None => answer,
        }
    }

    /// Runs a call on the management runtime. A caller that goes away does not stop it: a change is made whole.
    async fn manage(
        &self,
        rpc: &'static Rpc,
        mut request: Request<MessageBody>,
        occupant: Occupant,
    ) -> Response<Body> {
        let streams = rpc.kind == Kind::ServerStream;
        let permit = match self.limits.management(occupant, streams, self.now()) {
            Ok(permit) => permit,
            Err(status) => return status.into_http(),
        };
        let names_person = request.headers().contains_key("x-keyward-acting-user");
        let session = request.extensions().get::<CallerSession>().cloned();
        let memory = request.body_mut().take_reservation();
        let call = match rpc.service() {
            "keyward.v1.KeyService" => into_service(self.keys.clone(), request).boxed(),
            "keyward.v1.AccountService" => into_service(self.accounts.clone(), request).boxed(),
            "keyward.v1.AuditService" => into_service(self.audit.clone(), request).boxed(),
            _ => return no_such_rpc().into_http(),
        };
        let (news, hears_first) = (self.news.clone(), rpc.hears_first(names_person));
        let work = async move {
            let began = Instant::now();
            let _memory = memory;
            let heard = !hears_first || news.heard().await;
            let (answer, recorded) = in_call(began, call).await;
            let code = calls::code(answer.headers());
            if let Some(refusal) = session.and_then(|session| session.withhold(code, recorded)) {
                return Status::from(refusal).into_http();
            }
            let rests = match code {
                // It was so before, says what was read.
                None | Some(tonic::Code::Ok) => rpc.changes() && !recorded.proven,
                Some(code) => rests_on_knowledge(code, hears_first && rpc.changes()),
            };
            if rests && !(heard && news.was_newest(began).await) {
                return Status::from(Refusal::Unavailable).into_http();
            }
            answer
        };
        let limits = self.limits.clone();
        let task = self.management.spawn(trace::carried(async move {
            let (answer, permit) = limits.run(permit, work).await;
            if streams { answer.map(|body| Body::new(PermitBody::new(body, permit))) } else { answer }
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

    /// Answers a call that needs no credential.
    async fn answer_open(&self, request: Request<Arriving>, visitor: &Visitor) -> Response<Body> {
        let path = request.uri().path();
        let name = path.split('/').nth(1).unwrap_or_default();
        let Some(service) = self.open.get(name).filter(|_| visitor.door.serves(name)).cloned() else {
            return no_such_rpc().into_http();
        };
        let watch = (path == HEALTH_WATCH).then(|| visitor.watches.health()).transpose();
        let watch = match watch {
            Ok(watch) => watch,
            Err(status) => return status.into_http(),
        };
        let health = name == HEALTH;
        let mut request = match limited(request, OPEN_BYTES, visitor) {
            Ok(request) => request,
            Err(status) => return status.into_http(),
        };
        let call = async {
            let body = request.body_mut();
            let permit = if health {
                body.read_to_end().await.map(|()| None)
            } else {
                let occupant = Occupant::anonymous(visitor.memory_budget.number());
                let permit = || self.limits.reflection(occupant, self.now()).map(Some);
                body.read_first().await.and_then(|()| permit())
            };
            match permit {
                Ok(permit) => {
                    let answer = into_service(service, request.map(Body::new)).await;
                    match (permit, watch) {
                        (Some(permit), _) => {
                            answer.map(|body| Body::new(PermitBody::reflection(body, permit)))
                        }
                        (None, Some(watch)) => watch.hold(answer),
                        (None, None) => answer,
                    }
                }
                Err(status) => status.into_http(),
            }
        };
        let answer = tokio::time::timeout(OPEN_PATIENCE, call).await;
        explained(answer.unwrap_or_else(|_| deadline_exceeded().into_http()))
    }
}

/// The request with a body that is held to its limits, and gives messages as they were before they were compressed.
///
/// # Errors
/// When its messages are encoded in an unknown way.
fn limited(
    request: Request<Arriving>,
    max_message: usize,
    visitor: &Visitor,
) -> Result<Request<MessageBody>, Status> {
    let (mut parts, body) = request.into_parts();
    let inflates = take_encoding(&mut parts.headers)?;
    let budget = visitor.memory_budget.clone();
    let body = MessageBody::new(body, &parts.headers, max_message, inflates, budget);
    Ok(Request::from_parts(parts, body))
}

/// Reads the message of a unary request.
async fn read_message(rpc: &Rpc, body: &mut MessageBody) -> Result<(), Status> {
    body.read_to_end().await?;
    if rpc.access == Access::Proxy {
        body.check_length_without(body_len, BATCH_BYTES)?;
    }
    body.reserve_decoded(rpc.method == IMPORT)
}

/// Which limits an admitted call counts on.
fn occupant(rpc: &Rpc, admitted: &Extensions, visitor: &Visitor) -> Occupant {
    let connection = visitor.memory_budget.number();
    let caller = admitted.get::<Caller>().or_else(|| Some(admitted.get::<CallerSession>()?.caller()));
    match (caller, admitted.get::<Proxy>()) {
        (Some(caller), _) => Occupant::caller(caller, rpc, connection),
        (None, proxy) => Occupant::proxy(proxy.is_some_and(|proxy| proxy.trusted), connection),
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

/// The answer to a unary call that ended well.
fn message(message: &impl prost::Message) -> Response<Body> {
    let mut out = reply::begin();
    // It only fails without room, and a buffer grows.
    let _ = message.encode(&mut out);
    reply::ok(out).map(Body::new)
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

/// How long a call may take: the shorter of the method's time and the caller's own deadline.
pub(super) fn allowed_time(method: Option<Duration>, headers: &HeaderMap) -> Option<Duration> {
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

    #[test]
    fn a_deadline_is_read_as_grpc_writes_it() {
        assert_eq!(read_timeout("250m"), Some(Duration::from_millis(250)));
        assert_eq!(read_timeout("5S"), Some(Duration::from_secs(5)));
        for bad in ["", "S", "5", "5x", "-5S", "123456789S", "é"] {
            assert_eq!(read_timeout(bad), None, "{bad:?}");
        }
    }
}
