//! StreamCheck: many Checks on one long call, for callers with very much traffic. Each is decided as a Check of its own,
//! answered in the order in which they came, and charged to the caller as a call of its own.
//!
//! The caller is decided anew with each message, and once a second while there is none: a stream ends when its caller is
//! revoked. It ends with a status where a Check would have had one: the messages before it are answered.

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

/// How long a revoked caller's stream may stay open when nothing is asked on it.
const REAUTHORIZE_INTERVAL: Duration = Duration::from_secs(1);
/// After how many messages that were there already others get their turn.
const MAX_CONSECUTIVE_CHECKS: u32 = 64;

/// A stream under way.
struct StreamCheckCall {
    evaluator: Arc<CheckEvaluator>,
    caller: Caller,
    session: CheckSession,
    caller_cache: CallerCache,
    requests: Streaming<Bytes>,
    reauthorize_timer: Interval,
    stopping: watch::Receiver<bool>,
    /// The caller, when it was last found plainly in order.
    cached_caller: Option<Arc<CachedCaller>>,
    /// Whether the next message is charged to the caller: the first came with the call, which is.
    charges_next: bool,
    /// How many messages came one after the other without a wait.
    consecutive_checks: u32,
}

type StreamCheckResult = Result<BytesMut, Status>;

/// The answers to a stream of questions, as they are sent: a status ends them.
///
/// Most questions are there already and can be answered at once, without a future for each: to make and to move those
/// took a tenth of an item's time.
pub(super) struct CheckResponseStream {
    /// None = it has ended, or waits.
    call: Option<Box<StreamCheckCall>>,
    pending: Option<BoxFuture<'static, (Box<StreamCheckCall>, Option<StreamCheckResult>)>>,
}

/// The answers to a stream of questions.
pub(super) fn check_responses(
    evaluator: Arc<CheckEvaluator>,
    stopping: watch::Receiver<bool>,
    caller: Caller,
    session: CheckSession,
    requests: Streaming<Bytes>,
) -> CheckResponseStream {
    let mut look = interval(REAUTHORIZE_INTERVAL);
    look.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let call = StreamCheckCall {
        evaluator,
        caller,
        session,
        caller_cache: CallerCache::default(),
        requests,
        reauthorize_timer: look,
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
                ImmediateStep::Done(answer) => return Poll::Ready(self.finish_step(call, answer)),
                ImmediateStep::NeedsWait(message) => {
                    self.pending = Some(Box::pin(async move {
                        let answer = call.check(&message).await;
                        (call, Some(answer))
                    }));
                }
                ImmediateStep::NoRequest => {
                    self.pending = Some(Box::pin(async move {
                        let answer = call.next_response().await;
                        (call, answer)
                    }));
                }
            }
        }
        let Some(pending) = &mut self.pending else { return Poll::Ready(None) };
        let (call, answer) = ready!(pending.poll_unpin(cx));
        self.pending = None;
        Poll::Ready(self.finish_step(call, answer))
    }
}

impl CheckResponseStream {
    fn finish_step(
        &mut self,
        call: Box<StreamCheckCall>,
        answer: Option<StreamCheckResult>,
    ) -> Option<StreamCheckResult> {
        self.call = matches!(answer, Some(Ok(_))).then_some(call);
        answer
    }
}

/// What can be done without a wait.
enum ImmediateStep {
    /// Everything: this is the next answer. None = the caller has asked all that it wanted.
    Done(Option<StreamCheckResult>),
    /// This question takes a wait.
    NeedsWait(Bytes),
    /// There is no question, or it is others' turn.
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
                Some(answer) => ImmediateStep::Done(Some(answer)),
                None => ImmediateStep::NeedsWait(message),
            },
        }
    }

    /// The answer, if the caller is plainly in order and nothing hangs on limits.
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
            // Nothing is consumed yet, but the caller is charged.
            Ok(false) => {
                self.charges_next = false;
                None
            }
            Err(status) => Some(Err(status)),
        }
    }

    /// The next answer, or with what the stream ends. None = the caller has asked all that it wanted.
    async fn next_response(&mut self) -> Option<StreamCheckResult> {
        if self.consecutive_checks >= MAX_CONSECUTIVE_CHECKS {
            // Who always has another question must not keep others waiting, nor the server from stopping.
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
