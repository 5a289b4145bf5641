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
    access::Caller,
    decisions::{Decisions, Facts, Kind},
    domain::{
        account::Environments,
        decision::{MAX_COST, MAX_SCOPES, Reason},
        name::{AccountId, CustomerId, EnvironmentName},
        scope::Scope,
        time::Revision,
        token,
    },
    engine::{Answer, Asker, Decided, Engine, Question, known::Memory},
    refusal::{Refusal, Violations},
    trace,
};

use super::{
    answer,
    body::MessageBody,
    codec::Raw,
    convert,
    gate::shown,
    question::Asked,
    reply::ROOM,
    rpc::{self, BATCH_BYTES, CHECK_BYTES, Rpc},
    stream::{self, Answers},
    vigil::Vigil,
};

const MAX_CHECKS: usize = 100;
/// How long a batch's answer may become with grants, in bytes. What the items have besides fits into 1 MiB, and the
/// whole into 3 MiB: most clients take 4 MiB.
const MAX_WITH_GRANTS: usize = 2 << 20;
/// Under which id a decision was written down, where it was.
pub(super) const DECISION_ID: &str = "x-keyward-decision-id";

/// The service over the engine.
#[derive(Debug)]
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
    fn read<'a, 'm: 'a>(
        &'a self,
        asked: &Asked<'m>,
        at: impl Display + Copy,
        violations: &mut Violations,
    ) -> Option<Read<'a>> {
        let field = |name: &'static str| fmt::from_fn(move |f| write!(f, "{at}{name}"));
        let v = violations;
        let Asked { token: presented, scopes, authenticate_only, .. } = asked;
        v.note_if(
            presented.len() > token::MAX_LEN,
            field("token"),
            format_args!("must be at most {} bytes", token::MAX_LEN),
        );
        let environment =
            convert::read_environment(field("environment"), asked.environment, &self.environments, v);
        v.note_if(
            scopes.is_empty() && !authenticate_only,
            field("scopes"),
            "at least one is required; or set authenticate_only",
        );
        let scopes = v.take_each(field("scopes"), scopes, MAX_SCOPES, Scope::parse_required);
        let account = asked.account.and_then(|id| v.take(field("account"), AccountId::parse(id)));
        let customer = asked.customer.and_then(|id| v.take(field("customer"), CustomerId::parse(id)));
        let client_ip = convert::read_ip(field("client_ip"), asked.client_ip, v);
        let cost = asked.cost.unwrap_or(1);
        v.note_if(
            !(1..=MAX_COST).contains(&cost),
            field("cost"),
            format_args!("must be 1 to {MAX_COST}; to consume nothing set dry_run"),
        );
        Some(Read {
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
    pub(super) fn answer<'a, 'm: 'a>(
        &'a self,
        asker: Asker<'_>,
        asked: &Asked<'m>,
        out: &'a mut BytesMut,
    ) -> Result<Answering<'a>, Status> {
        let mut violations = Violations::default();
        let read = self.read(asked, "", &mut violations);
        violations.finish()?;
        let read = read.ok_or_else(|| Refusal::field("environment", "is required"))?;
        match self.engine.decide(asker, &read.question()).map_err(Refusal::from)? {
            Decided::Answered(answer) => Ok(Answering::Written(self.write(&answer, &read, out))),
            Decided::Limited(limited) => {
                let settled = async move {
                    let settled = self.engine.settle(&read.question(), limited).await;
                    Ok(self.write(&settled.map_err(Refusal::from)?, &read, out))
                };
                Ok(Answering::Waits(Box::pin(trace::carried(settled))))
            }
        }
    }

    /// Writes an answer, and the decision down, if it is one of those that are: then it tells under which id.
    fn write(&self, answer: &Answer, read: &Read<'_>, out: &mut BytesMut) -> Option<Uuid> {
        let decision = self.note(answer, read);
        if let Some(span) = trace::recording() {
            answer.record(&span);
        }
        answer::write(answer, out);
        decision
    }

    fn note(&self, answer: &Answer, read: &Read<'_>) -> Option<Uuid> {
        self.decisions.note(answer.reason(), || Facts {
            kind: Kind::Check,
            allowed: answer.reason() == Reason::Ok,
            reason: answer.reason().as_str(),
            answer: Some(answer),
            environment: Some(read.environment),
            needed: &read.scopes,
            customer: read.customer.as_ref(),
            client_ip: read.client_ip,
            http_id: None,
            shadow: false,
        })
    }
}

impl Read<'_> {
    fn question(&self) -> Question<'_> {
        Question {
            token: self.token,
            environment: self.environment,
            scopes: &self.scopes,
            account: self.account.as_ref(),
            customer: self.customer.as_ref(),
            client_ip: self.client_ip,
            cost: self.cost,
            dry_run: self.dry_run,
            min_revision: self.min_revision,
            charge: None,
            bar_management: false,
        }
    }
}

/// One Check's answer.
pub(super) enum Answering<'a> {
    /// It is written; the decision is written down under this id, if it is.
    Written(Option<Uuid>),
    /// It hangs on the key's limits.
    Waits(BoxFuture<'a, Result<Option<Uuid>, Status>>),
}

impl Answering<'_> {
    /// Waits until the answer is written.
    ///
    /// # Errors
    /// When the limits cannot be counted.
    pub(super) async fn written(self) -> Result<Option<Uuid>, Status> {
        match self {
            Answering::Written(decision) => Ok(decision),
            Answering::Waits(settled) => settled.await,
        }
    }
}

impl AuthzService {
    /// Answers a call of one of the service's RPCs, whose caller is known.
    pub(super) async fn serve(
        self: Arc<Self>,
        rpc: &'static Rpc,
        request: http::Request<MessageBody>,
    ) -> http::Response<Body> {
        match rpc.kind {
            rpc::Kind::BidiStream => {
                let streams = |request| ready(self.stream_check(request));
                grpc().streaming(service_fn(streams), request).await
            }
            _ if rpc.max_request == CHECK_BYTES => {
                let checks = |request| self.check(request);
                grpc().unary(service_fn(checks), request).await
            }
            _ => {
                let batches = |request| self.batch_check(request);
                grpc().unary(service_fn(batches), request).await
            }
        }
    }

    async fn check(&self, mut request: Request<Bytes>) -> Result<Response<BytesMut>, Status> {
        let (caller, vigil) = (shown::<Caller>(&mut request)?, shown::<Vigil>(&mut request)?);
        let mut out = BytesMut::new();
        let stands = || vigil.stands(&self.engine);
        let asker = Asker { account: &caller.account, stands: &stands };
        let answered = self.answer(asker, &Asked::read(request.get_ref())?, &mut out)?;
        let decision = answered.written().await?;
        let mut response = Response::new(out);
        if let Some(id) = decision.and_then(|id| id.to_string().parse().ok()) {
            response.metadata_mut().insert(DECISION_ID, id);
        }
        Ok(response)
    }

    async fn batch_check(&self, mut request: Request<Bytes>) -> Result<Response<BytesMut>, Status> {
        let (caller, vigil) = (shown::<Caller>(&mut request)?, shown::<Vigil>(&mut request)?);
        let checks = Asked::read_batch(request.get_ref());
        // One that cannot be read, or has too many checks, is a call all the same.
        let items = checks.as_ref().map_or(1, |checks| checks.len().clamp(1, MAX_CHECKS));
        vigil.admits(&self.engine, items as u64, &Memory::default()).await?;
        let checks = checks?;
        let mut violations = Violations::default();
        violations.note_if(
            !(1..=MAX_CHECKS).contains(&checks.len()),
            "checks",
            format_args!("has {} entries; 1 to {MAX_CHECKS} are allowed", checks.len()),
        );
        let each = checks.iter().take(MAX_CHECKS).enumerate();
        let read: Vec<_> = each
            .filter_map(|(at, check)| self.read(check, format_args!("checks[{at}]."), &mut violations))
            .collect();
        violations.finish()?;
        // None is answered, and nothing consumed, unless all can be; limits that cannot be counted show too late.
        self.engine.fresh(read.iter().filter_map(|read| read.min_revision).max()).map_err(Refusal::from)?;
        let then = self.engine.index.state().filter(|_| vigil.stands(&self.engine) == Ok(true));
        let stands = || vigil.still_stands(&self.engine, then);
        let asker = Asker { account: &caller.account, stands: &stands };
        let (mut out, mut denied) = (BytesMut::with_capacity(ROOM * read.len() / 2), 0);
        for read in &read {
            let answer = match self.engine.decide(asker, &read.question()).map_err(Refusal::from)? {
                Decided::Answered(answer) => answer,
                Decided::Limited(limited) => {
                    self.engine.settle(&read.question(), limited).await.map_err(Refusal::from)?
                }
            };
            denied += usize::from(answer.reason() != Reason::Ok);
            self.note(&answer, read);
            answer::write_item(&answer, MAX_WITH_GRANTS, &mut out);
        }
        if let Some(span) = trace::recording() {
            span.record("keyward.checks", read.len()).record("keyward.denied", denied);
        }
        Ok(Response::new(out))
    }

    fn stream_check(
        self: &Arc<Self>,
        mut request: Request<Streaming<Bytes>>,
    ) -> Result<Response<Answers>, Status> {
        let (caller, vigil) = (shown::<Caller>(&mut request)?, shown::<Vigil>(&mut request)?);
        Ok(Response::new(stream::answers(self.clone(), caller, vigil, request.into_inner())))
    }
}

/// gRPC as tonic speaks it, with answers that are written here.
fn grpc() -> Grpc<Raw> {
    Grpc::new(Raw).apply_max_message_size_config(Some(BATCH_BYTES), None)
}
