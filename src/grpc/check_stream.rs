//! Serves StreamCheck: many Checks on one call, for callers with high traffic. Each Check is decided, ordered and
//! charged like a call of its own.
//!
//! The caller is evaluated again with each message, and once a second in between, so that the stream of a revoked
//! caller ends. The stream ends with the status that a Check would have had; earlier messages are answered first.

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::{Bytes, BytesMut};
use futures_util::{
    future::{BoxFuture, FutureExt as _},
    stream::{Stream, StreamExt as _},
};
use tokio::{
    sync::watch,
    time::{Interval, MissedTickBehavior, interval},
};
use tonic::{Status, Streaming};

use crate::{
    caller::Caller,
    engine::{
        Requester,
        caller_cache::{CachedCaller, CallerCache},
    },
    service_error::ServiceError,
};

use super::{
    check_decoder::CheckRequestView,
    check_evaluator::{CheckEvaluator, CheckProgress},
    check_session::CheckSession,
    response_body::INITIAL_CAPACITY,
    rpc::MAX_CHECK_REQUEST,
    shutdown::wait_until_stopping,
    status::message_too_large,
};

/// How long the idle stream of a revoked caller may stay open.
const REAUTHORIZE_INTERVAL: Duration = Duration::from_secs(1);
/// Messages that are answered in a row before other tasks run.
const MAX_CONSECUTIVE_CHECKS: u32 = 64;

/// The state of one stream.
struct StreamCheckCall {
    evaluator: Arc<CheckEvaluator>,
    caller: Caller,
    session: CheckSession,
    caller_cache: CallerCache,
    requests: Streaming<Bytes>,
    reauthorize_timer: Interval,
    stopping: watch::Receiver<bool>,
    /// The caller, from its last successful cache lookup.
    cached_caller: Option<Arc<CachedCaller>>,
    /// Whether the next message is charged to the caller. The first is not, since the call itself was charged.
    charges_next: bool,
    /// Messages that were answered in a row without waiting.
    consecutive_checks: u32,
}

type StreamCheckResult = Result<BytesMut, Status>;

/// The responses of one stream. A status ends them.
///
/// Most messages are buffered and can be answered at once, without a future for each. Creating and moving those futures
/// took a tenth of the time of an item.
pub(super) struct CheckResponseStream {
    /// `None` if the stream has ended, or while `pending` holds it.
    call: Option<Box<StreamCheckCall>>,
    pending: Option<BoxFuture<'static, (Box<StreamCheckCall>, Option<StreamCheckResult>)>>,
}

/// Answers a stream of requests in order.
pub(super) fn check_responses(
    evaluator: Arc<CheckEvaluator>,
    stopping: watch::Receiver<bool>,
    caller: Caller,
    session: CheckSession,
    requests: Streaming<Bytes>,
) -> CheckResponseStream {
    let mut timer = interval(REAUTHORIZE_INTERVAL);
    timer.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let call = StreamCheckCall {
        evaluator,
        caller,
        session,
        caller_cache: CallerCache::default(),
        requests,
        reauthorize_timer: timer,
        stopping,
        cached_caller: None,
        charges_next: false,
        consecutive_checks: 0,
    };
    CheckResponseStream { call: Some(Box::new(call)), pending: None }
}

impl Stream for CheckResponseStream {
    type Item = StreamCheckResult;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<StreamCheckResult>> {
        if let Some(mut call) = self.call.take() {
            match call.step_without_wait(cx) {
                ImmediateStep::Done(response) => return Poll::Ready(self.finish_step(call, response)),
                ImmediateStep::NeedsWait(message) => {
                    self.pending = Some(Box::pin(async move {
                        let response = call.check(&message).await;
                        (call, Some(response))
                    }));
                }
                ImmediateStep::NoRequest => {
                    self.pending = Some(Box::pin(async move {
                        let response = call.next_response().await;
                        (call, response)
                    }));
                }
            }
        }
        let Some(pending) = &mut self.pending else { return Poll::Ready(None) };
        let (call, response) = ready!(pending.poll_unpin(cx));
        self.pending = None;
        Poll::Ready(self.finish_step(call, response))
    }
}

impl CheckResponseStream {
    fn finish_step(
        &mut self,
        call: Box<StreamCheckCall>,
        response: Option<StreamCheckResult>,
    ) -> Option<StreamCheckResult> {
        self.call = matches!(response, Some(Ok(_))).then_some(call);
        response
    }
}

/// What a stream can do without waiting.
enum ImmediateStep {
    /// The next response. `None` if the client has ended the stream.
    Done(Option<StreamCheckResult>),
    /// This message can only be answered by waiting.
    NeedsWait(Bytes),
    /// No message is buffered, or it is time to yield.
    NoRequest,
}

impl StreamCheckCall {
    fn step_without_wait(&mut self, cx: &mut Context<'_>) -> ImmediateStep {
        self.consecutive_checks += 1;
        if self.consecutive_checks >= MAX_CONSECUTIVE_CHECKS {
            return ImmediateStep::NoRequest;
        }
        match self.requests.poll_next_unpin(cx) {
            Poll::Pending => ImmediateStep::NoRequest,
            Poll::Ready(None) => ImmediateStep::Done(None),
            Poll::Ready(Some(Err(status))) => ImmediateStep::Done(Some(Err(status))),
            Poll::Ready(Some(Ok(message))) => match self.check_without_wait(&message) {
                Some(response) => ImmediateStep::Done(Some(response)),
                None => ImmediateStep::NeedsWait(message),
            },
        }
    }

    /// Answers a message if the caller is cached and no limits must be counted.
    fn check_without_wait(&mut self, message: &[u8]) -> Option<StreamCheckResult> {
        let engine = &self.evaluator.engine;
        let version = engine.index.version();
        if !self
            .cached_caller
            .as_ref()
            .is_some_and(|cached_caller| engine.is_cached_caller_current(cached_caller))
        {
            self.cached_caller = self.session.cached_caller(engine, &self.caller_cache);
        }
        let cached_caller = self.cached_caller.as_ref()?;
        if std::mem::replace(&mut self.charges_next, true) {
            engine.record_cached_call(cached_caller);
        }
        if message.len() > MAX_CHECK_REQUEST {
            return Some(Err(message_too_large(message.len(), MAX_CHECK_REQUEST)));
        }
        let request = match CheckRequestView::decode(message) {
            Ok(request) => request,
            Err(status) => return Some(Err(status)),
        };
        let mut out = BytesMut::with_capacity(INITIAL_CAPACITY);
        let is_still_authorized = || self.session.is_still_authorized_since(engine, version);
        let requester =
            Requester { account: &self.caller.account, is_still_authorized: &is_still_authorized };
        let progress = self.evaluator.evaluate_check(requester, &request, &mut out);
        match progress.map(|progress| matches!(progress, CheckProgress::Done(_))) {
            Ok(true) => Some(Ok(out)),
            // Nothing is consumed yet, but the caller is already charged.
            Ok(false) => {
                self.charges_next = false;
                None
            }
            Err(status) => Some(Err(status)),
        }
    }

    /// Waits for the next response, or the status that ends the stream. `None` if the client has ended the stream.
    async fn next_response(&mut self) -> Option<StreamCheckResult> {
        if self.consecutive_checks >= MAX_CONSECUTIVE_CHECKS {
            // A client that always has a message ready must not starve other tasks or block shutdown.
            self.consecutive_checks = 0;
            tokio::task::yield_now().await;
            if *self.stopping.borrow() {
                return Some(Err(ServiceError::Stopping.into()));
            }
        }
        loop {
            let message = tokio::select! {
                biased;
                message = self.requests.message() => message,
                _ = self.reauthorize_timer.tick() => {
                    if let Err(status) = self.session.reauthorize_and_charge(&self.evaluator.engine, 0, &self.caller_cache).await {
                        return Some(Err(status));
                    }
                    self.consecutive_checks = 0;
                    continue;
                }
                () = wait_until_stopping(&mut self.stopping) => return Some(Err(ServiceError::Stopping.into())),
            };
            return match message {
                Ok(message) => Some(self.check(&message?).await),
                Err(status) => Some(Err(status)),
            };
        }
    }

    async fn check(&mut self, message: &[u8]) -> StreamCheckResult {
        let charge = std::mem::replace(&mut self.charges_next, true);
        let engine = &self.evaluator.engine;
        let version = engine.index.version();
        self.session.reauthorize_and_charge(engine, charge.into(), &self.caller_cache).await?;
        if message.len() > MAX_CHECK_REQUEST {
            return Err(message_too_large(message.len(), MAX_CHECK_REQUEST));
        }
        let mut out = BytesMut::with_capacity(INITIAL_CAPACITY);
        let is_still_authorized = || self.session.is_still_authorized_since(engine, version);
        let requester =
            Requester { account: &self.caller.account, is_still_authorized: &is_still_authorized };
        self.evaluator
            .evaluate_check(requester, &CheckRequestView::decode(message)?, &mut out)?
            .finish()
            .await?;
        Ok(out)
    }
}
