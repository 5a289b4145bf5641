//! Validates a Check, has the engine decide it and writes the response. Unary, batch and stream calls share it.
//!
//! Transport and authentication belong in `authz_service.rs`, `check_stream.rs` and `check_fast_path.rs`. A denial is a
//! response; a status means that no decision was made.

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

/// Response header with the id of the logged decision, if it was logged.
pub(super) const DECISION_ID_HEADER: &str = "x-keyward-decision-id";

/// Evaluates Checks against the engine.
#[derive(Debug)]
pub(super) struct CheckEvaluator {
    pub(super) engine: Arc<Engine>,
    pub(super) environments: Arc<EnvironmentSet>,
    pub(super) decisions: DecisionLog,
}

/// A validated request with its parsed fields.
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
    /// Validates one request. `field_prefix` precedes each field's name in violations.
    pub(super) fn validate<'a, 'm: 'a>(
        &'a self,
        request: &CheckRequestView<'m>,
        field_prefix: impl Display + Copy,
        violations: &mut InvalidFields,
    ) -> Option<ValidatedCheck<'a>> {
        let field = |name: &'static str| fmt::from_fn(move |f| write!(f, "{field_prefix}{name}"));
        let CheckRequestView { token, scopes, authenticate_only, .. } = request;
        violations.add_if(
            token.len() > token::MAX_TOKEN_LEN,
            field("token"),
            format_args!("must be at most {} bytes", token::MAX_TOKEN_LEN),
        );
        let environment = convert::read_environment(
            field("environment"),
            request.environment,
            &self.environments,
            violations,
        );
        violations.add_if(
            scopes.is_empty() && !authenticate_only,
            field("scopes"),
            "at least one is required; or set authenticate_only",
        );
        let scopes =
            violations.parse_list(field("scopes"), scopes, MAX_REQUIRED_SCOPES, Scope::parse_required);
        let account =
            request.account.and_then(|id| violations.ok_or_add(field("account"), AccountId::parse(id)));
        let customer =
            request.customer.and_then(|id| violations.ok_or_add(field("customer"), CustomerId::parse(id)));
        let client_ip = convert::read_client_ip(field("client_ip"), request.client_ip, violations);
        let cost = request.cost.unwrap_or(1);
        violations.add_if(
            !(1..=MAX_REQUEST_COST).contains(&cost),
            field("cost"),
            format_args!("must be 1 to {MAX_REQUEST_COST}; to consume nothing set dry_run"),
        );
        Some(ValidatedCheck {
            token,
            environment: &environment?.name,
            scopes,
            account,
            customer,
            client_ip,
            cost,
            dry_run: request.dry_run,
            min_revision: convert::read_revision(request.min_revision),
        })
    }

    /// Decides one Check and writes the response to `out`. Fails if the request is invalid or no
    /// decision can be made here.
    pub(super) fn evaluate_check<'a, 'm: 'a>(
        &'a self,
        requester: Requester<'_>,
        request: &CheckRequestView<'m>,
        out: &'a mut BytesMut,
    ) -> Result<CheckProgress<'a>, Status> {
        let mut violations = InvalidFields::default();
        let check = self.validate(request, "", &mut violations);
        violations.into_result()?;
        let check = check.ok_or_else(|| ServiceError::invalid_field("environment", "is required"))?;
        match self.engine.decide_locally(requester, &check.check_input()).map_err(ServiceError::from)? {
            LocalDecision::Complete(outcome) => {
                Ok(CheckProgress::Done(self.write_outcome(&outcome, &check, out)))
            }
            LocalDecision::NeedsLimits(pending) => {
                let limited = async move {
                    let limited = self.engine.apply_limits(&check.check_input(), pending).await;
                    Ok(self.write_outcome(&limited.map_err(ServiceError::from)?, &check, out))
                };
                Ok(CheckProgress::PendingLimits(Box::pin(trace::propagate(limited))))
            }
        }
    }

    /// Writes the response and logs the decision. Returns the id if it was logged.
    fn write_outcome(
        &self,
        outcome: &CheckOutcome,
        check: &ValidatedCheck<'_>,
        out: &mut BytesMut,
    ) -> Option<Uuid> {
        let decision = self.log_decision(outcome, check);
        if let Some(span) = trace::recorded_span() {
            outcome.record_in_span(&span);
        }
        check_encoder::write_response(outcome, out);
        decision
    }

    pub(super) fn log_decision(&self, outcome: &CheckOutcome, check: &ValidatedCheck<'_>) -> Option<Uuid> {
        self.decisions.record_check(outcome.reason(), || DecisionInput {
            source: DecisionSource::Check,
            allowed: outcome.reason() == Reason::Ok,
            reason: outcome.reason().as_str(),
            check_outcome: Some(outcome),
            environment: Some(check.environment),
            required_scopes: &check.scopes,
            customer: check.customer.as_ref(),
            client_ip: check.client_ip,
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

/// How far one Check has come.
pub(super) enum CheckProgress<'a> {
    /// The response is written. Contains the id of the decision, if it was logged.
    Done(Option<Uuid>),
    /// The key's limits must be counted first.
    PendingLimits(BoxFuture<'a, Result<Option<Uuid>, Status>>),
}

impl CheckProgress<'_> {
    /// Waits until the response is written. Fails if the limits cannot be counted.
    pub(super) async fn finish(self) -> Result<Option<Uuid>, Status> {
        match self {
            CheckProgress::Done(decision) => Ok(decision),
            CheckProgress::PendingLimits(limited) => limited.await,
        }
    }
}
