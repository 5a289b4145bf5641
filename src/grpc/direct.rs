//! The short way of a Check: what is plainly in order is answered here, without a future, a timer or a table that it
//! does not need. Whatever is not goes the long way by `gate` from its beginning, which alone words refusals.

use std::{pin::pin, sync::Arc, task::Poll, time::Duration};

use http::{HeaderMap, HeaderValue, Request, Response};
use prost::Message as _;
use tokio::time::timeout;

use crate::{
    access::Permission,
    engine::known::Known,
    pb,
    trace::{self, Call},
    transport::{Auth, Service as Served},
};

use super::{
    admission::{Visitor, credential},
    authz::{Answering, DECISION_ID},
    body::Arriving,
    gate::{Services, allowed_time},
    reply::{self, Reply},
    rpc::{CHECK_BYTES, CHECK_TIMEOUT},
    status::deadline_exceeded,
};

/// What a call's headers say, found in one pass: to look for each by its name costs more than that, and most calls say
/// nothing but their token.
#[derive(Debug, Default)]
pub(super) struct Said {
    /// It says what it is called, or of which trace it is a part.
    pub(super) names_itself: bool,
    /// It has a deadline.
    hurries: bool,
    /// It acts in an account that it names, or for somebody.
    acts: bool,
}

impl Said {
    pub(super) fn by(headers: &HeaderMap) -> Said {
        let mut said = Said::default();
        for name in headers.keys() {
            match name.as_str() {
                "traceparent" | "x-request-id" => said.names_itself = true,
                "grpc-timeout" => said.hurries = true,
                "x-keyward-account" | "x-keyward-acting-user" => said.acts = true,
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
        call: &mut Option<Call>,
    ) -> Option<Response<Reply>> {
        if said.acts {
            return None;
        }
        let known = self.recognise(request.headers(), visitor)?;
        let limit = match said.hurries {
            true => allowed_time(Some(CHECK_TIMEOUT), request.headers()).unwrap_or(CHECK_TIMEOUT),
            false => CHECK_TIMEOUT,
        };
        let arrived = pin!(request.body_mut().plain_message(CHECK_BYTES));
        let Some(message) = in_time(limit, arrived).await else {
            return Some(deadline_exceeded().into_http().map(Reply::Any));
        };
        let question = pb::CheckRequest::decode(message?).ok()?;
        self.engine.note_call(&known);
        let mut out = reply::begin();
        let (call, asker) = (call.take()?, &known.account);
        let answered = match trace::within_now(call, || self.checks.answer(asker, &question, &mut out)) {
            Ok(Answering::Written(decision)) => Ok(decision),
            Ok(Answering::Waits(settled)) => {
                in_time(limit, settled).await.unwrap_or_else(|| Err(deadline_exceeded()))
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

    /// The caller of a Check, where it shows a token that is plainly enough.
    fn recognise(&self, headers: &HeaderMap, visitor: &Visitor) -> Option<Arc<Known>> {
        let by_token = matches!(visitor.door.auth, Auth::Token | Auth::Either);
        if !by_token || !visitor.door.services.has(Served::Check) {
            return None;
        }
        let known = self.engine.recognise(credential(headers).ok()?, visitor.peer, &visitor.memory)?;
        Permission::Check.is_in(&known.grants).then_some(known)
    }
}

/// The outcome, if it comes in time. What is there at once needs no timer.
async fn in_time<T>(limit: Duration, mut work: impl Future<Output = T> + Unpin) -> Option<T> {
    match futures_util::poll!(&mut work) {
        Poll::Ready(done) => Some(done),
        Poll::Pending => timeout(limit, work).await.ok(),
    }
}
