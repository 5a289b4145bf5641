//! The short way of a Check, and of what a proxy asks without a credential: what is plainly in order is answered here,
//! without a future, a timer or a table that it does not need. Whatever is not goes the long way by `gate` from its
//! beginning, which alone words refusals.

use std::{net::IpAddr, pin::pin, sync::Arc, task::Poll, time::Duration};

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Request, Response};
use prost::Message as _;
use tokio::time::{Instant, timeout_at};
use tonic::Status;

use crate::{
    engine::{Asker, CannotAnswer, known::Known},
    pb::envoy_request::CheckRequest,
    trace::{self, Call},
    transport::{
        Auth, Service as Served,
        budget::{ConnectionBudget, Priority},
    },
};

use super::{
    admission::{Visitor, credential},
    authz::{Answering, DECISION_ID},
    body::{Arriving, reserve_waiting},
    calls::Begun,
    gate::{Services, allowed_time},
    question::Asked,
    reply::{self, Reply},
    rpc::{BATCH_BYTES, CHECK_BYTES, CHECK_TIMEOUT, Rpc},
    status::deadline_exceeded,
    vigil::{may_check, plainly},
};

/// What a call's headers say, found in one pass: to look for each by its name costs more than that, and most calls say
/// nothing but their token.
#[derive(Debug, Default)]
pub(super) struct Said {
    /// It says what it is called, or of which trace it is a part.
    pub(super) names_itself: bool,
    /// It has a deadline.
    pub(super) hurries: bool,
    /// It says what few say, and goes the long way: that it acts in an account that it names, or for somebody, or that
    /// its message is encoded.
    more: bool,
}

impl Said {
    pub(super) fn by(headers: &HeaderMap) -> Said {
        let mut said = Said::default();
        for name in headers.keys() {
            match name.as_str() {
                "traceparent" | "x-request-id" => said.names_itself = true,
                "grpc-timeout" => said.hurries = true,
                "x-keyward-account" | "x-keyward-acting-user" | "grpc-encoding" => said.more = true,
                _ => {}
            }
        }
        said
    }
}

impl Services {
    /// The answer to a Check that is plainly in order. None = the long way is to be taken; of the request nothing is
    /// lost, and nothing was counted.
    pub(super) async fn answer_directly(
        &self,
        request: &mut Request<Arriving>,
        said: &Said,
        visitor: &Visitor,
        begun: &Begun<'_>,
        call: &mut Option<Call>,
    ) -> Option<Response<Reply>> {
        if said.more {
            return None;
        }
        let known = self.recognise(request.headers(), visitor)?;
        visitor.set_proven();
        let end = begun.at() + limit(said, request.headers());
        let priority = || match known.account.is_operator() {
            true => Priority::Operator,
            false => Priority::Caller,
        };
        let message = match message_in_time(end, request, CHECK_BYTES, &visitor.memory_budget, priority).await
        {
            Ok(message) => message?,
            Err(status) => return Some(status.into_http().map(Reply::Any)),
        };
        let asked = Asked::read(&message).ok()?;
        self.engine.note_call(&known);
        let mut out = reply::begin();
        let stands = || self.still_stands(&known, request.headers(), visitor.peer);
        let asker = Asker { account: &known.account, stands: &stands };
        let answered = match trace::within_now(call.take()?, || self.checks.answer(asker, &asked, &mut out)) {
            Ok(Answering::Written(decision)) => Ok(decision),
            Ok(Answering::Waits(settled)) => {
                in_time(end, settled).await.unwrap_or_else(|| Err(deadline_exceeded()))
            }
            Err(status) => Err(status),
        };
        Some(match answered {
            Ok(decision) => {
                let mut response = reply::ok(out);
                let id = decision.and_then(|id| HeaderValue::from_str(&id.to_string()).ok());
                if let Some(id) = id {
                    response.headers_mut().insert(DECISION_ID, id);
                }
                response
            }
            Err(status) => status.into_http().map(Reply::Any),
        })
    }

    /// The answer to what a proxy asks, where it needs no credential. None = as above.
    pub(super) async fn answer_proxy(
        &self,
        rpc: &Rpc,
        request: &mut Request<Arriving>,
        said: &Said,
        visitor: &Visitor,
        begun: &Begun<'_>,
        call: &mut Option<Call>,
    ) -> Option<Response<Reply>> {
        if said.more || !visitor.door.services.has(Served::ExtAuthz) {
            return None;
        }
        let proxy = self.free(&visitor.door, request.headers())?;
        let end = begun.at() + limit(said, request.headers());
        let priority = || if proxy.trusted { Priority::Caller } else { Priority::Anonymous };
        // One with a large body goes the long way.
        let most = rpc.max_request.min(BATCH_BYTES);
        let message = match message_in_time(end, request, most, &visitor.memory_budget, priority).await {
            Ok(message) => message?,
            Err(status) => return Some(status.into_http().map(Reply::Any)),
        };
        let asked = CheckRequest::decode(message).ok()?;
        let answering = pin!(trace::within(call.take()?, self.proxies.answer(asked, &proxy)));
        let answered = in_time(end, answering).await.unwrap_or_else(|| Err(deadline_exceeded()));
        Some(match answered {
            Ok(answer) => {
                let mut out = reply::begin();
                answer.encode_raw(&mut out);
                reply::ok(out)
            }
            Err(status) => status.into_http().map(Reply::Any),
        })
    }

    /// Whether a caller that was let in would be again.
    fn still_stands(
        &self,
        known: &Known,
        headers: &HeaderMap,
        peer: Option<IpAddr>,
    ) -> Result<bool, CannotAnswer> {
        if self.engine.is_as_known(known) {
            return Ok(true);
        }
        credential(headers).map_or(Ok(false), |token| may_check(&self.engine, token, None, peer))
    }

    /// The caller of a Check, where it shows a token that is plainly enough.
    fn recognise(&self, headers: &HeaderMap, visitor: &Visitor) -> Option<Arc<Known>> {
        let by_token = matches!(visitor.door.auth, Auth::Token | Auth::Either);
        if !by_token || !visitor.door.services.has(Served::Check) {
            return None;
        }
        plainly(&self.engine, credential(headers).ok()?, visitor.peer, &visitor.memory)
    }
}

/// How long the call may take.
fn limit(said: &Said, headers: &HeaderMap) -> Duration {
    match said.hurries {
        true => allowed_time(Some(CHECK_TIMEOUT), headers).unwrap_or(CHECK_TIMEOUT),
        false => CHECK_TIMEOUT,
    }
}

/// The message of a request; None where it goes the long way. One that must be waited for takes memory meanwhile.
///
/// # Errors
/// When it does not come in time, or there is no memory.
async fn message_in_time(
    end: Instant,
    request: &mut Request<Arriving>,
    most: usize,
    budget: &Arc<ConnectionBudget>,
    priority: impl FnOnce() -> Priority,
) -> Result<Option<Bytes>, Status> {
    if let Poll::Ready(message) = futures_util::poll!(pin!(request.body_mut().plain_message(most))) {
        return Ok(message);
    }
    let _reservation = reserve_waiting(budget, request.headers(), priority())?;
    timeout_at(end, request.body_mut().plain_message(most)).await.map_err(|_| deadline_exceeded())
}

/// The outcome, if it comes in time. What is there at once needs no timer.
async fn in_time<T>(end: Instant, mut work: impl Future<Output = T> + Unpin) -> Option<T> {
    match futures_util::poll!(&mut work) {
        Poll::Ready(done) => Some(done),
        Poll::Pending => timeout_at(end, work).await.ok(),
    }
}
