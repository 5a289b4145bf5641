//! AuthzService: reads a request, asks the engine, writes the answer. It awaits the engine alone. A denial is an answer;
//! a status here means that there is none.

use std::sync::Arc;

use futures_util::stream::BoxStream;
use tokio::sync::watch;
use tonic::{Request, Response, Status};
use uuid::Uuid;

use crate::{
    access::Caller,
    decisions::{Decisions, Facts, Kind},
    domain::{
        account::Environments,
        decision::{MAX_COST, MAX_SCOPES, Reason},
        facts::KeyFacts as _,
        limit::Standing,
        name::{AccountId, CustomerId, EnvironmentName},
        scope::Scope,
        token,
    },
    engine::{Answer, Engine, Question},
    pb,
    refusal::{Refusal, Violations},
    trace,
};

use super::{
    convert,
    gate::shown,
    stream::{self, Vigil},
};

const MAX_CHECKS: usize = 100;
/// Under which id a decision was written down, where it was.
const DECISION_ID: &str = "x-keyward-decision-id";

/// The service over the engine.
#[derive(Clone, Debug)]
pub(super) struct AuthzService {
    /// Answers.
    pub engine: Arc<Engine>,
    /// The environments there are.
    pub environments: Arc<Environments>,
    /// Writes decisions down.
    pub decisions: Decisions,
    /// Turns true when streams are to end.
    pub stopping: watch::Receiver<bool>,
}

/// A request as the engine wants it; it owns what had to be parsed.
struct Read<'a> {
    environment: &'a EnvironmentName,
    scopes: Vec<Scope>,
    account: Option<AccountId>,
    customer: Option<CustomerId>,
    client_ip: Option<std::net::IpAddr>,
    cost: u64,
}

impl AuthzService {
    /// Reads one request; `at` stands before each field's name in violations.
    fn read<'a>(
        &'a self,
        request: &pb::CheckRequest,
        at: &str,
        violations: &mut Violations,
    ) -> Option<Read<'a>> {
        let field = |name: &str| format!("{at}{name}");
        let v = violations;
        let pb::CheckRequest {
            token: presented,
            environment,
            scopes,
            authenticate_only,
            account,
            customer,
            client_ip,
            cost,
            dry_run: _,
            min_revision: _,
        } = request;
        v.note_if(
            presented.len() > token::MAX_LEN,
            &field("token"),
            format!("must be at most {} bytes", token::MAX_LEN),
        );
        let environment =
            convert::read_environment(&field("environment"), environment, &self.environments, v);
        v.note_if(
            scopes.is_empty() && !authenticate_only,
            &field("scopes"),
            "at least one is required; or set authenticate_only",
        );
        let scopes = v.take_each(&field("scopes"), scopes, MAX_SCOPES, Scope::parse_required);
        let account = account.as_deref().and_then(|id| v.take(&field("account"), AccountId::parse(id)));
        let customer = customer.as_deref().and_then(|id| v.take(&field("customer"), CustomerId::parse(id)));
        let client_ip = convert::read_ip(&field("client_ip"), client_ip.as_deref(), v);
        let cost = cost.unwrap_or(1);
        v.note_if(
            !(1..=MAX_COST).contains(&cost),
            &field("cost"),
            format!("must be 1 to {MAX_COST}; to consume nothing set dry_run"),
        );
        Some(Read { environment: &environment?.name, scopes, account, customer, client_ip, cost })
    }

    async fn decide(
        &self,
        caller: &Caller,
        request: &pb::CheckRequest,
        read: &Read<'_>,
    ) -> Result<(Answer, Option<Uuid>), Refusal> {
        let question = Question {
            token: &request.token,
            environment: read.environment,
            scopes: &read.scopes,
            account: read.account.as_ref(),
            customer: read.customer.as_ref(),
            client_ip: read.client_ip,
            cost: read.cost,
            dry_run: request.dry_run,
            min_revision: convert::read_revision(request.min_revision),
            charge: None,
            bar_management: false,
        };
        let answer = self.engine.check(&caller.account, &question).await?;
        let decision = self.decisions.note(answer.reason(), || Facts {
            kind: Kind::Check,
            allowed: answer.reason() == Reason::Ok,
            reason: answer.reason().as_str(),
            answer: Some(&answer),
            environment: Some(read.environment),
            needed: &read.scopes,
            customer: read.customer.as_ref(),
            client_ip: read.client_ip,
            http_id: None,
            shadow: false,
        });
        Ok((answer, decision))
    }
}

impl AuthzService {
    /// Answers one Check, and tells under which id the decision was written down.
    pub(super) async fn answer_one(
        &self,
        caller: &Caller,
        request: &pb::CheckRequest,
    ) -> Result<(pb::CheckResponse, Option<Uuid>), Status> {
        let mut violations = Violations::default();
        let read = self.read(request, "", &mut violations);
        violations.finish()?;
        let read = read.ok_or_else(|| Refusal::field("environment", "is required"))?;
        let (decided, decision) = self.decide(caller, request, &read).await?;
        if let Some(span) = trace::recording() {
            decided.record(&span);
        }
        Ok((answer(decided), decision))
    }
}

fn message(answer: &Answer) -> String {
    let reason = answer.reason();
    match reason {
        Reason::MissingScope => {
            let missing = convert::texts(&answer.missing).join(", ");
            format!("{}: missing {missing}", reason.message())
        }
        _ => reason.message().to_owned(),
    }
}

fn limit_state((name, limit, standing): &(String, u64, Standing)) -> pb::RateLimitState {
    pb::RateLimitState {
        name: name.clone(),
        limit: *limit,
        remaining: standing.remaining,
        reset_after: standing.reset_after.map(convert::duration),
    }
}

fn answer(answer: Answer) -> pb::CheckResponse {
    let reason = answer.reason();
    let mut response = pb::CheckResponse {
        allowed: reason == Reason::Ok,
        reason: convert::reason(reason),
        message: message(&answer),
        failures: answer.failures.iter().map(convert::reason).collect(),
        missing_scopes: convert::texts(&answer.missing),
        revision: answer.revision.0,
        staleness: Some(convert::duration(answer.staleness)),
        // No answer may be kept.
        max_age: Some(prost_types::Duration::default()),
        ..pb::CheckResponse::default()
    };
    response.limits_inexact = answer.limits.inexact;
    response.retry_after = answer.limits.retry_after().map(convert::duration);
    response.rate_limits = answer.limits.standings.iter().map(limit_state).collect();
    if let Some(holder) = answer.holder {
        let key = &holder.key;
        response.key_id = key.id().to_string();
        response.key_name = key.name().unwrap_or_default().to_owned();
        response.account = answer.account.map(String::from).unwrap_or_default();
        response.user = key.owner().user().map(ToString::to_string).unwrap_or_default();
        response.environment = key.environment().to_string();
        response.scopes = convert::texts(&answer.grants);
        response.secret_version = holder.version;
        response.metadata = key.metadata().clone();
        response.expires_at = key.expires_at().map(convert::timestamp);
    }
    response
}

#[tonic::async_trait]
impl pb::authz_service_server::AuthzService for AuthzService {
    async fn check(
        &self,
        mut request: Request<pb::CheckRequest>,
    ) -> Result<Response<pb::CheckResponse>, Status> {
        let caller = shown::<Caller>(&mut request)?;
        let (response, decision) = self.answer_one(&caller, request.get_ref()).await?;
        let mut response = Response::new(response);
        if let Some(id) = decision.and_then(|id| id.to_string().parse().ok()) {
            response.metadata_mut().insert(DECISION_ID, id);
        }
        Ok(response)
    }

    async fn batch_check(
        &self,
        mut request: Request<pb::BatchCheckRequest>,
    ) -> Result<Response<pb::BatchCheckResponse>, Status> {
        let caller = shown::<Caller>(&mut request)?;
        let checks = &request.get_ref().checks;
        let mut violations = Violations::default();
        violations.note_if(
            !(1..=MAX_CHECKS).contains(&checks.len()),
            "checks",
            format!("has {} entries; 1 to {MAX_CHECKS} are allowed", checks.len()),
        );
        let each = checks.iter().take(MAX_CHECKS).enumerate();
        let read: Vec<_> = each
            .filter_map(|(at, check)| self.read(check, &format!("checks[{at}]."), &mut violations))
            .collect();
        violations.finish()?;
        // None is answered, and nothing consumed, unless all can be; limits that cannot be counted show too late.
        let newest = checks.iter().filter_map(|check| check.min_revision).max();
        self.engine.fresh(convert::read_revision(newest)).map_err(Refusal::from)?;
        let mut results = Vec::with_capacity(checks.len());
        for (check, read) in checks.iter().zip(&read) {
            results.push(answer(self.decide(&caller, check, read).await?.0));
        }
        if let Some(span) = trace::recording() {
            let denied = results.iter().filter(|result| !result.allowed).count();
            span.record("keyward.checks", results.len()).record("keyward.denied", denied);
        }
        Ok(Response::new(pb::BatchCheckResponse { results }))
    }

    type StreamCheckStream = BoxStream<'static, Result<pb::CheckResponse, Status>>;

    async fn stream_check(
        &self,
        mut request: Request<tonic::Streaming<pb::CheckRequest>>,
    ) -> Result<Response<Self::StreamCheckStream>, Status> {
        let (caller, vigil) = (shown::<Caller>(&mut request)?, shown::<Vigil>(&mut request)?);
        Ok(Response::new(stream::answers(self.clone(), caller, vigil, request.into_inner())))
    }
}
