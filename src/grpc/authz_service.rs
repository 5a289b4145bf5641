//! Implements AuthzService: Check, BatchCheck and StreamCheck.
//!
//! Validation and decisions belong in `check_evaluator.rs`. A denial is a response, not a status.

use std::{future::ready, sync::Arc};

use bytes::{Bytes, BytesMut};
use tokio::sync::watch;
use tonic::{Request, Response, Status, Streaming, body::Body, server::Grpc};
use tower::service_fn;

use crate::{
    caller::Caller,
    domain::policy_decision::Reason,
    engine::{LocalDecision, Requester, caller_cache::CallerCache},
    service_error::{InvalidFields, ServiceError},
    trace,
};

use super::{
    call_extensions::take_extension,
    check_decoder::CheckRequestView,
    check_encoder,
    check_evaluator::{CheckEvaluator, DECISION_ID_HEADER},
    check_session::CheckSession,
    check_stream::{self, CheckResponseStream},
    raw_codec::RawCodec,
    request_body::MessageBody,
    response_body::INITIAL_CAPACITY,
    rpc::{self, MAX_BATCH_REQUEST, MAX_CHECK_REQUEST, RpcSpec},
};

const MAX_BATCH_CHECKS: usize = 100;
/// Bytes of a batch response up to which items carry grants. The rest of the items fits into 1 MiB, and the whole into
/// 3 MiB: most clients accept 4 MiB.
const MAX_BATCH_BYTES_WITH_GRANTS: usize = 2 << 20;
#[derive(Debug)]
pub(super) struct AuthzService {
    pub(super) evaluator: Arc<CheckEvaluator>,
    /// Turns true when streams must end.
    pub(super) stopping: watch::Receiver<bool>,
}

impl AuthzService {
    /// Dispatches an authorized call to its RPC.
    pub(super) async fn dispatch(
        self: Arc<Self>,
        rpc: &'static RpcSpec,
        request: http::Request<MessageBody>,
    ) -> http::Response<Body> {
        match rpc.streaming {
            rpc::StreamingKind::BidiStream => {
                let streams = |request| ready(self.stream_check(request));
                raw_grpc().streaming(service_fn(streams), request).await
            }
            _ if rpc.max_request_bytes == MAX_CHECK_REQUEST => {
                let checks = |request| self.check(request);
                raw_grpc().unary(service_fn(checks), request).await
            }
            _ => {
                let batches = |request| self.batch_check(request);
                raw_grpc().unary(service_fn(batches), request).await
            }
        }
    }

    async fn check(&self, mut request: Request<Bytes>) -> Result<Response<BytesMut>, Status> {
        let (caller, session) =
            (take_extension::<Caller>(&mut request)?, take_extension::<CheckSession>(&mut request)?);
        let mut out = BytesMut::new();
        let is_still_authorized = || session.is_still_authorized(&self.evaluator.engine);
        let requester = Requester { account: &caller.account, is_still_authorized: &is_still_authorized };
        let progress = self.evaluator.evaluate_check(
            requester,
            &CheckRequestView::decode(request.get_ref())?,
            &mut out,
        )?;
        let decision = progress.finish().await?;
        let mut response = Response::new(out);
        if let Some(id) = decision.and_then(|id| id.to_string().parse().ok()) {
            response.metadata_mut().insert(DECISION_ID_HEADER, id);
        }
        Ok(response)
    }

    async fn batch_check(&self, mut request: Request<Bytes>) -> Result<Response<BytesMut>, Status> {
        let (caller, session) =
            (take_extension::<Caller>(&mut request)?, take_extension::<CheckSession>(&mut request)?);
        let evaluator = &*self.evaluator;
        let engine = &*evaluator.engine;
        let checks = CheckRequestView::decode_batch(request.get_ref());
        // A batch that is unreadable or has too many checks is still charged as a call.
        let items = checks.as_ref().map_or(1, |checks| checks.len().clamp(1, MAX_BATCH_CHECKS));
        session.reauthorize_and_charge(engine, items as u64, &CallerCache::default()).await?;
        let checks = checks?;
        let mut violations = InvalidFields::default();
        violations.add_if(
            !(1..=MAX_BATCH_CHECKS).contains(&checks.len()),
            "checks",
            format_args!("has {} entries; 1 to {MAX_BATCH_CHECKS} are allowed", checks.len()),
        );
        let numbered = checks.iter().take(MAX_BATCH_CHECKS).enumerate();
        let validated: Vec<_> = numbered
            .filter_map(|(at, check)| {
                evaluator.validate(check, format_args!("checks[{at}]."), &mut violations)
            })
            .collect();
        violations.into_result()?;
        // All or nothing: an item that cannot be decided fails the batch before anything is consumed. Only limits that
        // turn out to be unavailable fail it later.
        engine
            .require_revision(validated.iter().filter_map(|check| check.min_revision).max())
            .map_err(ServiceError::from)?;
        let version = engine.index.version().filter(|_| session.is_still_authorized(engine) == Ok(true));
        let is_still_authorized = || session.is_still_authorized_since(engine, version);
        let requester = Requester { account: &caller.account, is_still_authorized: &is_still_authorized };
        let (mut out, mut denied) = (BytesMut::with_capacity(INITIAL_CAPACITY * validated.len() / 2), 0);
        for check in &validated {
            let decided = engine.decide_locally(requester, &check.check_input());
            let outcome = match decided.map_err(ServiceError::from)? {
                LocalDecision::Complete(outcome) => outcome,
                LocalDecision::NeedsLimits(pending) => {
                    let limited = engine.apply_limits(&check.check_input(), pending).await;
                    limited.map_err(ServiceError::from)?
                }
            };
            denied += usize::from(outcome.reason() != Reason::Ok);
            evaluator.log_decision(&outcome, check);
            check_encoder::write_batch_item(&outcome, MAX_BATCH_BYTES_WITH_GRANTS, &mut out);
        }
        if let Some(span) = trace::recorded_span() {
            span.record("keyward.checks", validated.len()).record("keyward.denied", denied);
        }
        Ok(Response::new(out))
    }

    fn stream_check(
        self: &Arc<Self>,
        mut request: Request<Streaming<Bytes>>,
    ) -> Result<Response<CheckResponseStream>, Status> {
        let (caller, session) =
            (take_extension::<Caller>(&mut request)?, take_extension::<CheckSession>(&mut request)?);
        Ok(Response::new(check_stream::check_responses(
            self.evaluator.clone(),
            self.stopping.clone(),
            caller,
            session,
            request.into_inner(),
        )))
    }
}

/// tonic's gRPC server for messages that are encoded by hand.
fn raw_grpc() -> Grpc<RawCodec> {
    Grpc::new(RawCodec).apply_max_message_size_config(Some(MAX_BATCH_REQUEST), None)
}
