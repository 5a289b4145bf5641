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
    access::Caller,
    engine::{
        Asker,
        known::{Known, Memory},
    },
    refusal::Refusal,
};

use super::{
    authz::{Answering, AuthzService},
    question::Asked,
    reply::ROOM,
    rpc::CHECK_BYTES,
    status::too_large,
    vigil::Vigil,
};

/// How long a revoked caller's stream may stay open when nothing is asked on it.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// After how many messages that were there already others get their turn.
const AT_ONCE: u32 = 64;

/// Waits until the server stops.
async fn stops(stopping: &mut watch::Receiver<bool>) {
    let _ = stopping.wait_for(|stop| *stop).await;
}

/// A stream under way.
struct Call {
    service: Arc<AuthzService>,
    caller: Caller,
    vigil: Vigil,
    memory: Memory,
    questions: Streaming<Bytes>,
    look: Interval,
    stopping: watch::Receiver<bool>,
    /// The caller, when it was last found plainly in order.
    known: Option<Arc<Known>>,
    /// Whether the next message is charged to the caller: the first came with the call, which is.
    charge: bool,
    /// How many messages came one after the other without a wait.
    run: u32,
}

type Answer = Result<BytesMut, Status>;

/// The answers to a stream of questions, as they are sent: a status ends them.
///
/// Most questions are there already and can be answered at once, without a future for each: to make and to move those
/// took a tenth of an item's time.
pub(super) struct Answers {
    /// None = it has ended, or waits.
    call: Option<Box<Call>>,
    waits: Option<BoxFuture<'static, (Box<Call>, Option<Answer>)>>,
}

/// The answers to a stream of questions.
pub(super) fn answers(
    service: Arc<AuthzService>,
    caller: Caller,
    vigil: Vigil,
    questions: Streaming<Bytes>,
) -> Answers {
    let mut look = interval(LOOK_EVERY);
    look.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let (stopping, memory) = (service.stopping.clone(), Memory::default());
    let (known, charge, run) = (None, false, 0);
    let call = Call { service, caller, vigil, memory, questions, look, stopping, known, charge, run };
    Answers { call: Some(Box::new(call)), waits: None }
}

impl Stream for Answers {
    type Item = Answer;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Answer>> {
        if let Some(mut call) = self.call.take() {
            match call.at_once(cx) {
                AtOnce::Told(answer) => return Poll::Ready(self.told(call, answer)),
                AtOnce::Asked(question) => {
                    self.waits = Some(Box::pin(async move {
                        let answer = call.answer(&question).await;
                        (call, Some(answer))
                    }));
                }
                AtOnce::Nothing => {
                    self.waits = Some(Box::pin(async move {
                        let answer = call.next().await;
                        (call, answer)
                    }));
                }
            }
        }
        let Some(waits) = &mut self.waits else { return Poll::Ready(None) };
        let (call, answer) = ready!(waits.poll_unpin(cx));
        self.waits = None;
        Poll::Ready(self.told(call, answer))
    }
}

impl Answers {
    fn told(&mut self, call: Box<Call>, answer: Option<Answer>) -> Option<Answer> {
        self.call = matches!(answer, Some(Ok(_))).then_some(call);
        answer
    }
}

/// What can be done without a wait.
enum AtOnce {
    /// Everything: this is the next answer. None = the caller has asked all that it wanted.
    Told(Option<Answer>),
    /// This question takes a wait.
    Asked(Bytes),
    /// There is no question, or it is others' turn.
    Nothing,
}

impl Call {
    fn at_once(&mut self, cx: &mut Context<'_>) -> AtOnce {
        self.run += 1;
        if self.run >= AT_ONCE {
            return AtOnce::Nothing;
        }
        match self.questions.poll_next_unpin(cx) {
            Poll::Pending => AtOnce::Nothing,
            Poll::Ready(None) => AtOnce::Told(None),
            Poll::Ready(Some(Err(status))) => AtOnce::Told(Some(Err(status))),
            Poll::Ready(Some(Ok(question))) => match self.answer_at_once(&question) {
                Some(answer) => AtOnce::Told(Some(answer)),
                None => AtOnce::Asked(question),
            },
        }
    }

    /// The answer, if the caller is plainly in order and nothing hangs on limits.
    fn answer_at_once(&mut self, question: &[u8]) -> Option<Answer> {
        let engine = &self.service.engine;
        let then = engine.index.state();
        if !self.known.as_ref().is_some_and(|known| engine.is_as_known(known)) {
            self.known = self.vigil.known(engine, &self.memory);
        }
        let known = self.known.as_ref()?;
        if std::mem::replace(&mut self.charge, true) {
            engine.note_call(known);
        }
        if question.len() > CHECK_BYTES {
            return Some(Err(too_large(question.len(), CHECK_BYTES)));
        }
        let asked = match Asked::read(question) {
            Ok(asked) => asked,
            Err(status) => return Some(Err(status)),
        };
        let mut out = BytesMut::with_capacity(ROOM);
        let stands = || self.vigil.still_stands(engine, then);
        let asker = Asker { account: &self.caller.account, stands: &stands };
        let written = self.service.answer(asker, &asked, &mut out);
        match written.map(|answering| matches!(answering, Answering::Written(_))) {
            Ok(true) => Some(Ok(out)),
            // Nothing is consumed yet, but the caller is charged.
            Ok(false) => {
                self.charge = false;
                None
            }
            Err(status) => Some(Err(status)),
        }
    }

    /// The next answer, or with what the stream ends. None = the caller has asked all that it wanted.
    async fn next(&mut self) -> Option<Answer> {
        if self.run >= AT_ONCE {
            // Who always has another question must not keep others waiting, nor the server from stopping.
            self.run = 0;
            tokio::task::yield_now().await;
            if *self.stopping.borrow() {
                return Some(Err(Refusal::Stopping.into()));
            }
        }
        loop {
            let question = tokio::select! {
                biased;
                question = self.questions.message() => question,
                _ = self.look.tick() => {
                    if let Err(status) = self.vigil.admits(&self.service.engine, 0, &self.memory).await {
                        return Some(Err(status));
                    }
                    self.run = 0;
                    continue;
                }
                () = stops(&mut self.stopping) => return Some(Err(Refusal::Stopping.into())),
            };
            return match question {
                Ok(question) => Some(self.answer(&question?).await),
                Err(status) => Some(Err(status)),
            };
        }
    }

    async fn answer(&mut self, question: &[u8]) -> Answer {
        let charge = std::mem::replace(&mut self.charge, true);
        let engine = &self.service.engine;
        let then = engine.index.state();
        self.vigil.admits(engine, charge.into(), &self.memory).await?;
        if question.len() > CHECK_BYTES {
            return Err(too_large(question.len(), CHECK_BYTES));
        }
        let mut out = BytesMut::with_capacity(ROOM);
        let stands = || self.vigil.still_stands(engine, then);
        let asker = Asker { account: &self.caller.account, stands: &stands };
        self.service.answer(asker, &Asked::read(question)?, &mut out)?.written().await?;
        Ok(out)
    }
}
