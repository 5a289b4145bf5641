//! Routes every call to its service. Before a body is read, the router finds the RPC, authorizes the caller, enforces
//! size and time limits, and picks the runtime.
//!
//! Authentication belongs in `auth.rs`. Plain Checks are answered in `check_fast_path.rs`; every other call
//! takes the slow path here.

use std::{collections::HashMap, convert::Infallible, sync::Arc, time::Duration};

use futures_util::future::FutureExt as _;
use http::{Extensions, HeaderName, HeaderValue, Request, Response};
use hyper::body::Incoming;
use tokio::time::Instant;
use tonic::{Status, body::Body};
use tower::{Service, ServiceExt as _, util::BoxCloneSyncService};
use tracing::Instrument as _;

use crate::{
    caller::Caller,
    domain::time::Timestamp,
    engine::Engine,
    pb::{
        account_service_server::AccountServiceServer, audit_service_server::AuditServiceServer,
        envoy::service::auth::v3::authorization_server::AuthorizationServer, envoy_request::request_body_len,
        key_service_server::KeyServiceServer,
    },
    replication::freshness::FreshnessBarrier,
    service_error::ServiceError,
    store::group_commit::track_call_writes,
    trace::{self, CallTracer},
    transport::memory_budget::MemoryBudget,
};

use super::{
    account_service::AccountService,
    audit_service::AuditService,
    auth::{CallAuthenticator, ConnectionContext},
    authz_service::AuthzService,
    call_extensions::ProxyCaller,
    check_fast_path::{CheckFastPath, HeaderFlags},
    concurrency::{ConcurrencyLimits, PermitBody, PermitHolder},
    deadline::{PropagationDeadline, client_timeout, effective_timeout},
    ext_authz::ExtAuthzService,
    gzip::{ACCEPTED_ENCODINGS, GRPC_ACCEPT_ENCODING, take_grpc_encoding},
    health::{HEALTH_SERVICE, HEALTH_WATCH_PATH},
    key_service::KeyService,
    management_session::ManagementSession,
    request_body::{MessageBody, PeekableBody},
    response_body::{self, ResponseBody},
    rpc::{AccessRequirement, ExecutionPlane, IMPORT_METHOD, MAX_BATCH_REQUEST, RpcSpec, StreamingKind},
    rpc_metrics::{self, CallTimer, RpcMetrics},
    send_budget::SendBudget,
    status::{add_missing_reason, deadline_exceeded, internal_error, unknown_rpc},
};

/// Time limit of a public call. `Health/Watch` is exempt: it lasts as long as its connection.
const PUBLIC_CALL_TIMEOUT: Duration = Duration::from_secs(60);

/// Carries the request id, in responses too, so that operators can find a call in the logs.
const REQUEST_ID_HEADER: HeaderName = HeaderName::from_static("x-request-id");
/// Log target of the access log for management calls.
const ACCESS_LOG_TARGET: &str = "keyward::access";
/// The largest request to health and reflection, in bytes.
const MAX_PUBLIC_REQUEST: usize = 16 * 1024;

/// A service that needs no credential: health or reflection.
pub(super) type PublicService = BoxCloneSyncService<Request<Body>, Response<Body>, Infallible>;

/// Routes calls to the services and enforces their limits.
pub struct Router {
    pub(super) rpc_metrics: Arc<RpcMetrics>,
    /// Assigns request ids and decides which calls are traced.
    pub(super) tracing: CallTracer,
    pub(super) engine: Arc<Engine>,
    pub(super) authenticator: CallAuthenticator,
    pub(super) fast_path: CheckFastPath,
    pub(super) authz_service: Arc<AuthzService>,
    pub(super) ext_authz_server: AuthorizationServer<ExtAuthzService>,
    /// The same service without tonic's wrapper, for responses that are made here.
    pub(super) ext_authz_service: Arc<ExtAuthzService>,
    pub(super) key_server: KeyServiceServer<KeyService>,
    pub(super) account_server: AccountServiceServer<AccountService>,
    pub(super) audit_server: AuditServiceServer<AuditService>,
    /// Catches up with the commits of other replicas.
    pub(super) freshness: FreshnessBarrier,
    /// Health and reflection, by service name.
    pub(super) public_services: HashMap<&'static str, PublicService>,
    /// The runtime of management calls.
    pub(super) management_runtime: tokio::runtime::Handle,
    pub(super) concurrency_limits: Arc<ConcurrencyLimits>,
    /// Bounds the memory that requests hold.
    pub(super) memory_budget: Arc<MemoryBudget>,
    /// Bounds the bytes of responses that wait to be sent.
    pub(super) send_budget: Arc<SendBudget>,
}

impl std::fmt::Debug for Router {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Router").field("open", &self.public_services.keys()).finish_non_exhaustive()
    }
}

impl Router {
    /// The time that callers are evaluated at.
    #[must_use]
    pub(super) fn now(&self) -> Timestamp {
        self.engine.now()
    }

    /// Returns a reader of the number of calls that were refused for lack of permits or memory.
    pub(crate) fn shed_counter(&self) -> impl Fn() -> u64 + Send + Sync + 'static {
        let (limits, memory) = (self.concurrency_limits.clone(), self.memory_budget.clone());
        move || limits.refused_calls() + memory.refused_reservations()
    }

    #[must_use]
    pub(crate) fn rpc_metrics(&self) -> &Arc<RpcMetrics> {
        &self.rpc_metrics
    }

    /// Answers one call: a plain Check on the fast path, every other call on the slow path. A call whose deadline
    /// passed while it was queued is refused at once, since nobody reads its response.
    pub(super) async fn serve_call(
        &self,
        request: Request<Incoming>,
        context: &ConnectionContext,
        arrived_at: Instant,
    ) -> Response<ResponseBody> {
        let timer = self.rpc_metrics.start_call(request.uri().path());
        let flags = HeaderFlags::from_headers(request.headers());
        let queue_delay = || timer.started_at().saturating_duration_since(arrived_at);
        if flags.has_deadline
            && client_timeout(request.headers()).is_some_and(|deadline| deadline <= queue_delay())
        {
            return timer.finish_unary(deadline_exceeded().into_http().map(ResponseBody::Tonic));
        }
        let trace_headers = flags.has_trace_headers.then(|| request.headers());
        let call = self.tracing.new_call(trace_headers, context.peer, self.engine.now());
        let (is_plain, mut call) = (!call.should_record(), Some(call));
        let mut request = request.map(PeekableBody::from);
        let response = match timer.rpc_spec() {
            Some(_) if is_plain && timer.is_check() => {
                self.fast_path.try_check(&mut request, &flags, context, &timer, &mut call).await
            }
            Some(rpc) if is_plain && rpc.access == AccessRequirement::Proxy => {
                let response =
                    self.fast_path.try_ext_authz(rpc, &mut request, &flags, context, &timer, &mut call);
                Box::pin(response).await
            }
            _ => None,
        };
        let mut response = match response {
            Some(response) => timer.finish_unary(response),
            // Boxed: a future is as large as its largest branch, and most calls are Checks that need none of this.
            None => {
                Box::pin(self.dispatch_slow(timer, call, request, context)).await.map(ResponseBody::Tonic)
            }
        };
        response.headers_mut().insert(GRPC_ACCEPT_ENCODING, ACCEPTED_ENCODINGS);
        response
    }

    async fn dispatch_slow(
        &self,
        timer: CallTimer<'_>,
        call: Option<trace::TracedCall>,
        request: Request<PeekableBody>,
        context: &ConnectionContext,
    ) -> Response<Body> {
        let response = async {
            match timer.rpc_spec() {
                Some(rpc) => self.dispatch_traced(rpc, &timer, request, context).await,
                None => self.dispatch_public(request, context).await,
            }
        };
        let response = match call {
            Some(call) => trace::scope(call, response).await,
            None => response.await,
        };
        timer.finish(response)
    }

    /// Dispatches a call within its span, if it is traced. Writes the access log for management calls.
    async fn dispatch_traced(
        &self,
        rpc: &'static RpcSpec,
        timer: &CallTimer<'_>,
        mut request: Request<PeekableBody>,
        context: &ConnectionContext,
    ) -> Response<Body> {
        let is_management = rpc.plane == ExecutionPlane::Management;
        let id = trace::with_current(|call| HeaderValue::from(call.request_id())).filter(|_| is_management);
        // Handlers read the id from the header, so a generated one must be in it.
        if let Some(id) = &id {
            request.headers_mut().insert(REQUEST_ID_HEADER, id.clone());
        }
        let response = self.dispatch(rpc, timer, request, context);
        // The trace of a proxied request is known only from the message, so `ext_authz.rs` starts that span.
        let span =
            if rpc.access == AccessRequirement::Proxy { None } else { self.tracing.start_span(rpc.method) };
        let mut response = match &span {
            Some(span) => response.instrument(span.clone()).await,
            None => response.await,
        };
        let code = rpc_metrics::code_from_headers(response.headers()).unwrap_or(tonic::Code::Ok);
        if let Some(span) = &span {
            trace::finish_span(span, code);
        }
        if is_management {
            log_access(rpc, code, timer.elapsed());
        }
        response.headers_mut().extend(id.map(|id| (REQUEST_ID_HEADER, id)));
        response
    }

    async fn dispatch(
        &self,
        rpc: &'static RpcSpec,
        timer: &CallTimer<'_>,
        request: Request<PeekableBody>,
        context: &ConnectionContext,
    ) -> Response<Body> {
        if !context.policy.has_service(rpc.service_name()) {
            return unknown_rpc().into_http();
        }
        let limit = effective_timeout(rpc.timeout, request.headers());
        let propagation_deadline = PropagationDeadline::from_timeout(client_timeout(request.headers()));
        let mut request = match limit_body(request, rpc.max_request_bytes, context) {
            Ok(request) => request,
            Err(status) => return status.into_http(),
        };
        request.extensions_mut().insert(propagation_deadline);
        if let Err(status) = self.authenticator.authorize_call(rpc, &mut request, context).await {
            return status.into_http();
        }
        let long_call = (rpc.streaming == StreamingKind::ServerStream)
            .then(|| context.long_calls.acquire_other())
            .transpose();
        let long_call = match long_call {
            Ok(long_call) => long_call,
            Err(status) => return status.into_http(),
        };
        let holder = permit_holder(rpc, request.extensions(), context);
        request.body_mut().set_priority(holder.priority());
        // Boxed: the future of a call is large, and it is moved several times before it is first polled.
        let call = async move {
            if rpc.streaming != StreamingKind::BidiStream
                && let Err(status) = read_message(rpc, request.body_mut()).await
            {
                return match request.body().oversize().filter(|_| rpc.access == AccessRequirement::Proxy) {
                    Some((length, limit)) => {
                        message_response(&self.ext_authz_service.refuse_too_large(length, limit))
                    }
                    None => status.into_http(),
                };
            }
            match rpc.plane {
                ExecutionPlane::Checks if rpc.access == AccessRequirement::Proxy => {
                    call_service(self.ext_authz_server.clone(), request).await
                }
                ExecutionPlane::Checks => self.authz_service.clone().dispatch(rpc, request).await,
                ExecutionPlane::Management => self.dispatch_management(rpc, request, holder).await,
            }
        };
        let call = call.boxed();
        let response = with_error_details(match limit {
            Some(limit) => {
                let response = tokio::time::timeout_at(timer.started_at() + limit, call).await;
                response.unwrap_or_else(|_| deadline_exceeded().into_http())
            }
            None => call.await,
        });
        match long_call {
            Some(long_call) => long_call.attach(response),
            None => response,
        }
    }

    /// Runs a call on the management runtime. The task continues if the client disconnects, so
    /// that a change is completed.
    async fn dispatch_management(
        &self,
        rpc: &'static RpcSpec,
        mut request: Request<MessageBody>,
        holder: PermitHolder,
    ) -> Response<Body> {
        let is_stream = rpc.streaming == StreamingKind::ServerStream;
        let permit = match self.concurrency_limits.acquire_management(holder, is_stream, self.now()) {
            Ok(permit) => permit,
            Err(status) => return status.into_http(),
        };
        let has_acting_user = request.headers().contains_key("x-keyward-acting-user");
        let session = request.extensions().get::<ManagementSession>().cloned();
        let memory = request.body_mut().take_reservation();
        let call = match rpc.service_name() {
            "keyward.v1.KeyService" => call_service(self.key_server.clone(), request).boxed(),
            "keyward.v1.AccountService" => call_service(self.account_server.clone(), request).boxed(),
            "keyward.v1.AuditService" => call_service(self.audit_server.clone(), request).boxed(),
            _ => return unknown_rpc().into_http(),
        };
        let (freshness, catches_up) = (self.freshness.clone(), rpc.requires_catch_up(has_acting_user));
        let work = async move {
            let started_at = Instant::now();
            let _memory = memory;
            let caught_up = !catches_up || freshness.catch_up().await;
            let (response, writes) = track_call_writes(started_at, call).await;
            let code = rpc_metrics::code_from_headers(response.headers());
            if let Some(refusal) = session.and_then(|session| session.refuse_response(code, writes)) {
                return Status::from(refusal).into_http();
            }
            let must_confirm = match code {
                // A successful read is valid as of the state that it read.
                None | Some(tonic::Code::Ok) => rpc.is_mutating() && !writes.is_linearizable,
                Some(code) => depends_on_freshness(code, catches_up && rpc.is_mutating()),
            };
            if must_confirm && !(caught_up && freshness.confirm_linearizable(started_at).await) {
                return Status::from(ServiceError::Unavailable).into_http();
            }
            response
        };
        let limits = self.concurrency_limits.clone();
        let task = self.management_runtime.spawn(trace::propagate(async move {
            let (response, permit) = limits.run(permit, work).await;
            if is_stream { response.map(|body| Body::new(PermitBody::new(body, permit))) } else { response }
        }));
        task.await.unwrap_or_else(|error| {
            tracing::error!(method = rpc.method, error = &error as &dyn std::error::Error, "handler failed");
            internal_error().into_http()
        })
    }

    /// Answers a call to health or reflection.
    async fn dispatch_public(
        &self,
        request: Request<PeekableBody>,
        context: &ConnectionContext,
    ) -> Response<Body> {
        let path = request.uri().path();
        let name = path.split('/').nth(1).unwrap_or_default();
        let Some(service) =
            self.public_services.get(name).filter(|_| context.policy.has_service(name)).cloned()
        else {
            return unknown_rpc().into_http();
        };
        let long_call = (path == HEALTH_WATCH_PATH).then(|| context.long_calls.acquire_health()).transpose();
        let long_call = match long_call {
            Ok(long_call) => long_call,
            Err(status) => return status.into_http(),
        };
        let is_health = name == HEALTH_SERVICE;
        let mut request = match limit_body(request, MAX_PUBLIC_REQUEST, context) {
            Ok(request) => request,
            Err(status) => return status.into_http(),
        };
        let call = async {
            let body = request.body_mut();
            let permit = if is_health {
                body.read_to_end().await.map(|()| None)
            } else {
                let holder = PermitHolder::from_connection(context.memory_budget.connection_id());
                let permit = || self.concurrency_limits.acquire_reflection(holder, self.now()).map(Some);
                body.read_first_message().await.and_then(|()| permit())
            };
            match permit {
                Ok(permit) => {
                    let response = call_service(service, request.map(Body::new)).await;
                    match (permit, long_call) {
                        (Some(permit), _) => {
                            response.map(|body| Body::new(PermitBody::for_reflection(body, permit)))
                        }
                        (None, Some(long_call)) => long_call.attach(response),
                        (None, None) => response,
                    }
                }
                Err(status) => status.into_http(),
            }
        };
        let response = tokio::time::timeout(PUBLIC_CALL_TIMEOUT, call).await;
        with_error_details(response.unwrap_or_else(|_| deadline_exceeded().into_http()))
    }
}

/// Wraps the body so that it enforces its limits and yields uncompressed messages. Fails if `grpc-encoding` is unknown.
fn limit_body(
    request: Request<PeekableBody>,
    max_message: usize,
    context: &ConnectionContext,
) -> Result<Request<MessageBody>, Status> {
    let (mut parts, body) = request.into_parts();
    let is_gzip_allowed = take_grpc_encoding(&mut parts.headers)?;
    let budget = context.memory_budget.clone();
    let body = MessageBody::new(body, &parts.headers, max_message, is_gzip_allowed, budget);
    Ok(Request::from_parts(parts, body))
}

async fn read_message(rpc: &RpcSpec, body: &mut MessageBody) -> Result<(), Status> {
    body.read_to_end().await?;
    if rpc.access == AccessRequirement::Proxy {
        body.check_length_excluding(request_body_len, MAX_BATCH_REQUEST)?;
    }
    body.reserve_for_decoding(rpc.method == IMPORT_METHOD)
}

/// The limits that an authorized call counts against.
fn permit_holder(rpc: &RpcSpec, extensions: &Extensions, context: &ConnectionContext) -> PermitHolder {
    let connection = context.memory_budget.connection_id();
    let caller = extensions
        .get::<Caller>()
        .or_else(|| Some(extensions.get::<ManagementSession>()?.authenticated_caller()));
    match (caller, extensions.get::<ProxyCaller>()) {
        (Some(caller), _) => PermitHolder::from_caller(caller, rpc, connection),
        (None, proxy) => PermitHolder::from_proxy(proxy.is_some_and(|proxy| proxy.trusted), connection),
    }
}

/// Logs a management call: at `info` if it may change something and its caller is known, else at `debug`.
/// Unauthenticated clients control how many of the others there are.
fn log_access(rpc: &'static RpcSpec, code: tonic::Code, took: Duration) {
    trace::with_current(|call| {
        let (method, code) = (rpc.method, rpc_metrics::code_name(code));
        let peer = call.peer().map(tracing::field::display);
        let caller = call.caller();
        let is_known_caller = caller.is_some();
        let (caller, account) = caller.map(|caller| (caller.key_id, caller.account)).unzip();
        let took = took.as_secs_f64();
        if is_known_caller && rpc.is_mutating() {
            tracing::info!(target: ACCESS_LOG_TARGET, method, code, caller, account, peer, took, "call completed");
        } else {
            tracing::debug!(target: ACCESS_LOG_TARGET, method, code, caller, account, peer, took, "call completed");
        }
    });
}

/// Whether a refusal is only valid if the state that it is based on was the newest. `is_mutating`: the request may look
/// invalid only because this replica is behind.
fn depends_on_freshness(code: tonic::Code, is_mutating: bool) -> bool {
    use tonic::Code::{AlreadyExists, FailedPrecondition, InvalidArgument, NotFound, PermissionDenied};
    match code {
        NotFound | AlreadyExists | FailedPrecondition => true,
        InvalidArgument | PermissionDenied => is_mutating,
        _ => false,
    }
}

/// Adds a reason to statuses that tonic makes itself, for example for a malformed message.
fn with_error_details(response: Response<Body>) -> Response<Body> {
    match Status::from_header_map(response.headers()) {
        Some(status) if status.code() != tonic::Code::Ok && status.details().is_empty() => {
            add_missing_reason(&status).into_http()
        }
        _ => response,
    }
}

/// A successful response to a unary call.
fn message_response(message: &impl prost::Message) -> Response<Body> {
    let mut out = response_body::new_message_buffer();
    // Encoding fails only for lack of space, and this buffer grows.
    let _ = message.encode(&mut out);
    response_body::ok_response(out).map(Body::new)
}

async fn call_service<B, S>(service: S, request: Request<B>) -> Response<Body>
where
    S: Service<Request<B>, Response = Response<Body>, Error = Infallible>,
{
    match service.oneshot(request).await {
        Ok(response) => response,
        Err(never) => match never {},
    }
}
