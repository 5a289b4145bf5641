//! Validates a Check's request, has the engine decide it and writes the response. Unary, batch and stream calls share it.

use std::{
    fmt::{self, Display},
    sync::Arc,
};

use bytes::BytesMut;
use futures_util::future::BoxFuture;
use tonic::Status;
use uuid::Uuid;

use crate::{
    decision_log::{DecisionInput, DecisionLog, DecisionSource},
    domain::{
        account::EnvironmentSet,
        name::{AccountId, CustomerId, EnvironmentName},
        policy_decision::{MAX_REQUEST_COST, MAX_REQUIRED_SCOPES, Reason},
        scope::Scope,
        time::Revision,
        token,
    },
    engine::{CheckInput, CheckOutcome, Engine, LocalDecision, Requester},
    service_error::{InvalidFields, ServiceError},
    trace,
};

use super::{check_decoder::CheckRequestView, check_encoder, convert};

/// Under which id a decision was written down, where it was.
pub(super) const DECISION_ID_HEADER: &str = "x-keyward-decision-id";

/// Evaluates Checks against the engine.
#[derive(Debug)]
pub(super) struct CheckEvaluator {
    pub(super) engine: Arc<Engine>,
    pub(super) environments: Arc<EnvironmentSet>,
    pub(super) decisions: DecisionLog,
}

/// A request as the engine wants it; it owns what had to be parsed.
pub(super) struct ValidatedCheck<'a> {
    token: &'a str,
    environment: &'a EnvironmentName,
    scopes: Vec<Scope>,
    account: Option<AccountId>,
    customer: Option<CustomerId>,
    client_ip: Option<std::net::IpAddr>,
    cost: u64,
    dry_run: bool,
    pub(super) min_revision: Option<Revision>,
}

impl CheckEvaluator {
    /// Reads one request; `at` stands before each field's name in violations.
    pub(super) fn validate<'a, 'm: 'a>(
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

    pub(super) fn log_decision(&self, answer: &CheckOutcome, read: &ValidatedCheck<'_>) -> Option<Uuid> {
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
    pub(super) fn check_input(&self) -> CheckInput<'_> {
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
