//! AuthzService: reads a request, asks the engine, has the answer written. It awaits the engine alone. A denial is an answer;
//! a status here means that there is none.

use std::{
    fmt::{self, Display},
    future::ready,
    sync::Arc,
};

use bytes::{Bytes, BytesMut};
use futures_util::future::BoxFuture;
use tokio::sync::watch;
use tonic::{Request, Response, Status, Streaming, body::Body, server::Grpc};
use tower::service_fn;
use uuid::Uuid;

use crate::{
    caller::Caller,
    decision_log::{DecisionInput, DecisionLog, DecisionSource},
    domain::{
        account::EnvironmentSet,
        name::{AccountId, CustomerId, EnvironmentName},
        policy_decision::{MAX_REQUEST_COST, MAX_REQUIRED_SCOPES, Reason},
        scope::Scope,
        time::Revision,
        token,
    },
    engine::{CheckInput, CheckOutcome, Engine, LocalDecision, Requester, caller_cache::CallerCache},
    service_error::{InvalidFields, ServiceError},
    trace,
};

use super::{
    check_decoder::CheckRequestView,
    check_encoder,
    check_session::CheckSession,
    check_stream::{self, CheckResponseStream},
    convert,
    raw_codec::RawCodec,
    request_body::MessageBody,
    response_body::INITIAL_CAPACITY,
    router::take_extension,
    rpc::{self, MAX_BATCH_REQUEST, MAX_CHECK_REQUEST, RpcSpec},
};

const MAX_BATCH_CHECKS: usize = 100;
/// How long a batch's answer may become with grants, in bytes. What the items have besides fits into 1 MiB, and the
/// whole into 3 MiB: most clients take 4 MiB.
const MAX_BATCH_BYTES_WITH_GRANTS: usize = 2 << 20;
/// Under which id a decision was written down, where it was.
pub(super) const DECISION_ID_HEADER: &str = "x-keyward-decision-id";

/// The service over the engine.
#[derive(Debug)]
pub(super) struct AuthzService {
    /// Answers.
    pub engine: Arc<Engine>,
    /// The environments there are.
    pub environments: Arc<EnvironmentSet>,
    /// Writes decisions down.
    pub decisions: DecisionLog,
    /// Turns true when streams are to end.
    pub stopping: watch::Receiver<bool>,
}

/// A request as the engine wants it; it owns what had to be parsed.
struct ValidatedCheck<'a> {
    token: &'a str,
    environment: &'a EnvironmentName,
    scopes: Vec<Scope>,
    account: Option<AccountId>,
    customer: Option<CustomerId>,
    client_ip: Option<std::net::IpAddr>,
    cost: u64,
    dry_run: bool,
    min_revision: Option<Revision>,
}

impl AuthzService {
    /// Reads one request; `at` stands before each field's name in violations.
    fn validate<'a, 'm: 'a>(
        &'a self,
        asked: &CheckRequestView<'m>,
        at: impl Display + Copy,
        violations: &mut InvalidFields,
    ) -> Option<ValidatedCheck<'a>> {
        let field = |name: &'static str| fmt::from_fn(move |f| write!(f, "{at}{name}"));
        let v = violations;
        let CheckRequestView { token: presented, scopes, authenticate_only, .. } = asked;
        v.add_if(
            presented.len() > token::MAX_TOKEN_LEN,
            field("token"),
            format_args!("must be at most {} bytes", token::MAX_TOKEN_LEN),
        );
        let environment =
            convert::read_environment(field("environment"), asked.environment, &self.environments, v);
        v.add_if(
            scopes.is_empty() && !authenticate_only,
            field("scopes"),
            "at least one is required; or set authenticate_only",
        );
        let scopes = v.parse_list(field("scopes"), scopes, MAX_REQUIRED_SCOPES, Scope::parse_required);
        let account = asked.account.and_then(|id| v.ok_or_add(field("account"), AccountId::parse(id)));
        let customer = asked.customer.and_then(|id| v.ok_or_add(field("customer"), CustomerId::parse(id)));
        let client_ip = convert::read_client_ip(field("client_ip"), asked.client_ip, v);
        let cost = asked.cost.unwrap_or(1);
        v.add_if(
            !(1..=MAX_REQUEST_COST).contains(&cost),
            field("cost"),
            format_args!("must be 1 to {MAX_REQUEST_COST}; to consume nothing set dry_run"),
        );
        Some(ValidatedCheck {
            token: presented,
            environment: &environment?.name,
            scopes,
            account,
            customer,
            client_ip,
            cost,
            dry_run: asked.dry_run,
            min_revision: convert::read_revision(asked.min_revision),
        })
    }

    /// Answers one Check by writing the answer to `out`, as far as it goes without a wait.
    ///
    /// # Errors
    /// When the request is wrong, or cannot be answered here and now.
    pub(super) fn evaluate_check<'a, 'm: 'a>(
        &'a self,
        asker: Requester<'_>,
        asked: &CheckRequestView<'m>,
        out: &'a mut BytesMut,
    ) -> Result<CheckProgress<'a>, Status> {
        let mut violations = InvalidFields::default();
        let read = self.validate(asked, "", &mut violations);
        violations.into_result()?;
        let read = read.ok_or_else(|| ServiceError::invalid_field("environment", "is required"))?;
        match self.engine.decide_locally(asker, &read.check_input()).map_err(ServiceError::from)? {
            LocalDecision::Complete(answer) => {
                Ok(CheckProgress::Done(self.write_outcome(&answer, &read, out)))
            }
            LocalDecision::NeedsLimits(limited) => {
                let settled = async move {
                    let settled = self.engine.apply_limits(&read.check_input(), limited).await;
                    Ok(self.write_outcome(&settled.map_err(ServiceError::from)?, &read, out))
                };
                Ok(CheckProgress::PendingLimits(Box::pin(trace::propagate(settled))))
            }
        }
    }

    /// Writes an answer, and the decision down, if it is one of those that are: then it tells under which id.
    fn write_outcome(
        &self,
        answer: &CheckOutcome,
        read: &ValidatedCheck<'_>,
        out: &mut BytesMut,
    ) -> Option<Uuid> {
        let decision = self.log_decision(answer, read);
        if let Some(span) = trace::recorded_span() {
            answer.record_in_span(&span);
        }
        check_encoder::write_response(answer, out);
        decision
    }

    fn log_decision(&self, answer: &CheckOutcome, read: &ValidatedCheck<'_>) -> Option<Uuid> {
        self.decisions.record_check(answer.reason(), || DecisionInput {
            source: DecisionSource::Check,
            allowed: answer.reason() == Reason::Ok,
            reason: answer.reason().as_str(),
            check_outcome: Some(answer),
            environment: Some(read.environment),
            required_scopes: &read.scopes,
            customer: read.customer.as_ref(),
            client_ip: read.client_ip,
            proxy_request_id: None,
            is_shadow: false,
        })
    }
}

impl ValidatedCheck<'_> {
    fn check_input(&self) -> CheckInput<'_> {
        CheckInput {
            token: self.token,
            environment: self.environment,
            scopes: &self.scopes,
            account: self.account.as_ref(),
            customer: self.customer.as_ref(),
            client_ip: self.client_ip,
            cost: self.cost,
            dry_run: self.dry_run,
            min_revision: self.min_revision,
            dedup_id: None,
            refuse_management_keys: false,
        }
    }
}

/// One Check's answer.
pub(super) enum CheckProgress<'a> {
    /// It is written; the decision is written down under this id, if it is.
    Done(Option<Uuid>),
    /// It hangs on the key's limits.
    PendingLimits(BoxFuture<'a, Result<Option<Uuid>, Status>>),
}

impl CheckProgress<'_> {
    /// Waits until the answer is written.
    ///
    /// # Errors
    /// When the limits cannot be counted.
    pub(super) async fn finish(self) -> Result<Option<Uuid>, Status> {
        match self {
            CheckProgress::Done(decision) => Ok(decision),
            CheckProgress::PendingLimits(settled) => settled.await,
        }
    }
}

impl AuthzService {
    /// Answers a call of one of the service's RPCs, whose caller is known.
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
        let (caller, vigil) =
            (take_extension::<Caller>(&mut request)?, take_extension::<CheckSession>(&mut request)?);
        let mut out = BytesMut::new();
        let stands = || vigil.is_still_authorized(&self.engine);
        let asker = Requester { account: &caller.account, is_still_authorized: &stands };
        let answered = self.evaluate_check(asker, &CheckRequestView::decode(request.get_ref())?, &mut out)?;
        let decision = answered.finish().await?;
        let mut response = Response::new(out);
        if let Some(id) = decision.and_then(|id| id.to_string().parse().ok()) {
            response.metadata_mut().insert(DECISION_ID_HEADER, id);
        }
        Ok(response)
    }

    async fn batch_check(&self, mut request: Request<Bytes>) -> Result<Response<BytesMut>, Status> {
        let (caller, vigil) =
            (take_extension::<Caller>(&mut request)?, take_extension::<CheckSession>(&mut request)?);
        let checks = CheckRequestView::decode_batch(request.get_ref());
        // One that cannot be read, or has too many checks, is a call all the same.
        let items = checks.as_ref().map_or(1, |checks| checks.len().clamp(1, MAX_BATCH_CHECKS));
        vigil.reauthorize_and_charge(&self.engine, items as u64, &CallerCache::default()).await?;
        let checks = checks?;
        let mut violations = InvalidFields::default();
        violations.add_if(
            !(1..=MAX_BATCH_CHECKS).contains(&checks.len()),
            "checks",
            format_args!("has {} entries; 1 to {MAX_BATCH_CHECKS} are allowed", checks.len()),
        );
        let each = checks.iter().take(MAX_BATCH_CHECKS).enumerate();
        let read: Vec<_> = each
            .filter_map(|(at, check)| self.validate(check, format_args!("checks[{at}]."), &mut violations))
            .collect();
        violations.into_result()?;
        // None is answered, and nothing consumed, unless all can be; limits that cannot be counted show too late.
        self.engine
            .require_revision(read.iter().filter_map(|read| read.min_revision).max())
            .map_err(ServiceError::from)?;
        let then =
            self.engine.index.version().filter(|_| vigil.is_still_authorized(&self.engine) == Ok(true));
        let stands = || vigil.is_still_authorized_since(&self.engine, then);
        let asker = Requester { account: &caller.account, is_still_authorized: &stands };
        let (mut out, mut denied) = (BytesMut::with_capacity(INITIAL_CAPACITY * read.len() / 2), 0);
        for read in &read {
            let answer =
                match self.engine.decide_locally(asker, &read.check_input()).map_err(ServiceError::from)? {
                    LocalDecision::Complete(answer) => answer,
                    LocalDecision::NeedsLimits(limited) => self
                        .engine
                        .apply_limits(&read.check_input(), limited)
                        .await
                        .map_err(ServiceError::from)?,
                };
            denied += usize::from(answer.reason() != Reason::Ok);
            self.log_decision(&answer, read);
            check_encoder::write_batch_item(&answer, MAX_BATCH_BYTES_WITH_GRANTS, &mut out);
        }
        if let Some(span) = trace::recorded_span() {
            span.record("keyward.checks", read.len()).record("keyward.denied", denied);
        }
        Ok(Response::new(out))
    }

    fn stream_check(
        self: &Arc<Self>,
        mut request: Request<Streaming<Bytes>>,
    ) -> Result<Response<CheckResponseStream>, Status> {
        let (caller, vigil) =
            (take_extension::<Caller>(&mut request)?, take_extension::<CheckSession>(&mut request)?);
        Ok(Response::new(check_stream::check_responses(self.clone(), caller, vigil, request.into_inner())))
    }
}

/// gRPC as tonic speaks it, with answers that are written here.
fn raw_grpc() -> Grpc<RawCodec> {
    Grpc::new(RawCodec).apply_max_message_size_config(Some(MAX_BATCH_REQUEST), None)
}
