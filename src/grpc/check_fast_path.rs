//! Answers plain Checks, and the requests of anonymous proxies, without the futures, timers and
//! lookups of the slow path.
//!
//! Whatever is not plain is left untouched for `router.rs`, which alone words refusals of a request.

use std::{net::IpAddr, pin::pin, sync::Arc, task::Poll, time::Duration};

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Request, Response};
use prost::Message as _;
use tokio::time::{Instant, timeout_at};
use tonic::Status;

use crate::{
    engine::{CheckError, Engine, Requester, caller_cache::CachedCaller},
    pb::envoy_request::EnvoyCheckRequest,
    trace::{self, TracedCall},
    transport::{
        CallerAuth, ServiceKind,
        memory_budget::{CallPriority, ConnectionMemoryBudget},
    },
};

use super::{
    auth::{CallAuthenticator, ConnectionContext, bearer_token},
    check_decoder::CheckRequestView,
    check_evaluator::{CheckEvaluator, CheckProgress, DECISION_ID_HEADER},
    check_session::{authenticate_cached, is_token_authorized},
    deadline::effective_timeout,
    ext_authz::ExtAuthzService,
    request_body::{PeekableBody, reserve_waiting_call},
    response_body::{self, ResponseBody},
    rpc::{CHECK_TIMEOUT, MAX_BATCH_REQUEST, MAX_CHECK_REQUEST, RpcSpec},
    rpc_metrics::CallTimer,
    status::deadline_exceeded,
};

/// What the headers of a call contain, found in one pass. Looking up each name costs more, and most
/// calls have only a token.
#[derive(Debug, Default)]
pub(super) struct HeaderFlags {
    /// It has a request id or trace context.
    pub(super) has_trace_headers: bool,
    pub(super) has_deadline: bool,
    /// It has a header that only the slow path handles: an account, an acting user, or an encoding.
    needs_slow_path: bool,
}

impl HeaderFlags {
    pub(super) fn from_headers(headers: &HeaderMap) -> HeaderFlags {
        let mut flags = HeaderFlags::default();
        for name in headers.keys() {
            match name.as_str() {
                "traceparent" | "x-request-id" => flags.has_trace_headers = true,
                "grpc-timeout" => flags.has_deadline = true,
                "x-keyward-account" | "x-keyward-acting-user" | "grpc-encoding" => {
                    flags.needs_slow_path = true
                }
                _ => {}
            }
        }
        flags
    }
}

/// Answers plain calls from memory.
pub(super) struct CheckFastPath {
    pub(super) engine: Arc<Engine>,
    pub(super) evaluator: Arc<CheckEvaluator>,
    pub(super) ext_authz_service: Arc<ExtAuthzService>,
    pub(super) authenticator: CallAuthenticator,
}

impl CheckFastPath {
    /// Answers a plain Check. `None` if it needs the slow path; then the request is intact and nothing was counted.
    pub(super) async fn try_check(
        &self,
        request: &mut Request<PeekableBody>,
        flags: &HeaderFlags,
        context: &ConnectionContext,
        timer: &CallTimer<'_>,
        call: &mut Option<TracedCall>,
    ) -> Option<Response<ResponseBody>> {
        if flags.needs_slow_path {
            return None;
        }
        let cached_caller = self.authenticate_cached(request.headers(), context)?;
        context.mark_proven_caller();
        let deadline = timer.started_at() + check_timeout(flags, request.headers());
        let priority = || match cached_caller.account.is_operator() {
            true => CallPriority::Operator,
            false => CallPriority::Caller,
        };
        let message =
            match read_message_before(deadline, request, MAX_CHECK_REQUEST, &context.memory_budget, priority)
                .await
            {
                Ok(message) => message?,
                Err(status) => return Some(status.into_http().map(ResponseBody::Tonic)),
            };
        let check = CheckRequestView::decode(&message).ok()?;
        self.engine.record_cached_call(&cached_caller);
        let mut out = response_body::new_message_buffer();
        let is_still_authorized =
            || self.is_still_authorized(&cached_caller, request.headers(), context.peer);
        let requester =
            Requester { account: &cached_caller.account, is_still_authorized: &is_still_authorized };
        let result = match trace::sync_scope(call.take()?, || {
            self.evaluator.evaluate_check(requester, &check, &mut out)
        }) {
            Ok(CheckProgress::Done(decision)) => Ok(decision),
            Ok(CheckProgress::PendingLimits(pending)) => {
                complete_before(deadline, pending).await.unwrap_or_else(|| Err(deadline_exceeded()))
            }
            Err(status) => Err(status),
        };
        Some(match result {
            Ok(decision) => {
                let mut response = response_body::ok_response(out);
                let id = decision.and_then(|id| HeaderValue::from_str(&id.to_string()).ok());
                if let Some(id) = id {
                    response.headers_mut().insert(DECISION_ID_HEADER, id);
                }
                response
            }
            Err(status) => status.into_http().map(ResponseBody::Tonic),
        })
    }

    /// Answers an anonymous proxy. `None` if the call needs the slow path; then the request is intact.
    pub(super) async fn try_ext_authz(
        &self,
        rpc: &RpcSpec,
        request: &mut Request<PeekableBody>,
        flags: &HeaderFlags,
        context: &ConnectionContext,
        timer: &CallTimer<'_>,
        call: &mut Option<TracedCall>,
    ) -> Option<Response<ResponseBody>> {
        if flags.needs_slow_path || !context.policy.services.contains(ServiceKind::ExtAuthz) {
            return None;
        }
        let proxy = self.authenticator.anonymous_proxy(&context.policy, request.headers())?;
        let deadline = timer.started_at() + check_timeout(flags, request.headers());
        let priority = || if proxy.trusted { CallPriority::Caller } else { CallPriority::Anonymous };
        // A request with a large body takes the slow path.
        let max_len = rpc.max_request_bytes.min(MAX_BATCH_REQUEST);
        let message =
            match read_message_before(deadline, request, max_len, &context.memory_budget, priority).await {
                Ok(message) => message?,
                Err(status) => return Some(status.into_http().map(ResponseBody::Tonic)),
            };
        let check = EnvoyCheckRequest::decode(message).ok()?;
        let evaluation = pin!(trace::scope(call.take()?, self.ext_authz_service.handle_check(check, &proxy)));
        let result = complete_before(deadline, evaluation).await.unwrap_or_else(|| Err(deadline_exceeded()));
        Some(match result {
            Ok(response) => {
                let mut out = response_body::new_message_buffer();
                response.encode_raw(&mut out);
                response_body::ok_response(out)
            }
            Err(status) => status.into_http().map(ResponseBody::Tonic),
        })
    }

    /// Whether a caller that was authenticated at the start of the call still is.
    fn is_still_authorized(
        &self,
        cached_caller: &CachedCaller,
        headers: &HeaderMap,
        peer: Option<IpAddr>,
    ) -> Result<bool, CheckError> {
        if self.engine.is_cached_caller_current(cached_caller) {
            return Ok(true);
        }
        bearer_token(headers).map_or(Ok(false), |token| is_token_authorized(&self.engine, token, None, peer))
    }

    /// The caller of a Check, if its token alone is enough and the cache has it.
    fn authenticate_cached(
        &self,
        headers: &HeaderMap,
        context: &ConnectionContext,
    ) -> Option<Arc<CachedCaller>> {
        let accepts_token = matches!(context.policy.auth, CallerAuth::Token | CallerAuth::TokenOrCertificate);
        if !accepts_token || !context.policy.services.contains(ServiceKind::Check) {
            return None;
        }
        authenticate_cached(&self.engine, bearer_token(headers).ok()?, context.peer, &context.caller_cache)
    }
}

/// Time limit of the call.
fn check_timeout(flags: &HeaderFlags, headers: &HeaderMap) -> Duration {
    match flags.has_deadline {
        true => effective_timeout(Some(CHECK_TIMEOUT), headers).unwrap_or(CHECK_TIMEOUT),
        false => CHECK_TIMEOUT,
    }
}

/// Reads the message of a request; `None` if it needs the slow path. A message that has not arrived yet holds a memory
/// reservation meanwhile. Fails if it is late or no memory is left.
async fn read_message_before(
    deadline: Instant,
    request: &mut Request<PeekableBody>,
    max_len: usize,
    budget: &Arc<ConnectionMemoryBudget>,
    priority: impl FnOnce() -> CallPriority,
) -> Result<Option<Bytes>, Status> {
    if let Poll::Ready(message) = futures_util::poll!(pin!(request.body_mut().peek_plain_message(max_len))) {
        return Ok(message);
    }
    let _reservation = reserve_waiting_call(budget, request.headers(), priority())?;
    timeout_at(deadline, request.body_mut().peek_plain_message(max_len))
        .await
        .map_err(|_| deadline_exceeded())
}

/// The result of `work`, if it completes in time. Work that is ready at once needs no timer.
async fn complete_before<T>(deadline: Instant, mut work: impl Future<Output = T> + Unpin) -> Option<T> {
    match futures_util::poll!(&mut work) {
        Poll::Ready(done) => Some(done),
        Poll::Pending => timeout_at(deadline, work).await.ok(),
    }
}
