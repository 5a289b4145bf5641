//! StreamCheck: many Checks on one long call, for callers with very much traffic. Each is decided as a Check of its own,
//! answered in the order in which they came, and charged to the caller as a call of its own.
//!
//! The caller is decided anew with each message, and once a second while there is none: a stream ends when its caller is
//! revoked. It ends with a status where a Check would have had one: the messages before it are answered.

use std::{pin::pin, sync::Arc, task::Poll, time::Duration};

use bytes::{Bytes, BytesMut};
use futures_util::{
    poll,
    stream::{BoxStream, StreamExt as _, unfold},
};
use tokio::{
    sync::watch,
    time::{Interval, MissedTickBehavior, interval},
};
use tonic::{Status, Streaming};

use crate::{
    access::Caller,
    engine::{Asker, known::Memory},
    refusal::Refusal,
};

use super::{
    authz::AuthzService, question::Asked, reply::ROOM, rpc::CHECK_BYTES, status::too_large, vigil::Vigil,
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
    /// How many messages there were.
    number: u64,
    /// How many came one after the other without a wait.
    run: u32,
    ended: bool,
}

/// Answers as they are sent.
pub(super) type Answers = BoxStream<'static, Result<BytesMut, Status>>;

/// The answers to a stream of questions.
pub(super) fn answers(
    service: Arc<AuthzService>,
    caller: Caller,
    vigil: Vigil,
    questions: Streaming<Bytes>,
) -> Answers {
    let mut look = interval(LOOK_EVERY);
    look.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let stopping = service.stopping.clone();
    let memory = Memory::default();
    let call =
        Call { service, caller, vigil, memory, questions, look, stopping, number: 0, run: 0, ended: false };
    unfold(call, |mut call| async move {
        if call.ended {
            return None;
        }
        let answer = call.next().await?;
        call.ended = answer.is_err();
        Some((answer, call))
    })
    .boxed()
}

impl Call {
    /// The next answer, or with what the stream ends. None = the caller has asked all that it wanted.
    async fn next(&mut self) -> Option<Result<BytesMut, Status>> {
        self.run += 1;
        if self.run >= AT_ONCE {
            // Who always has another question must not keep others waiting, nor the server from stopping.
            self.run = 0;
            tokio::task::yield_now().await;
            if *self.stopping.borrow() {
                return Some(Err(Refusal::Stopping.into()));
            }
        }
        // Most messages are there already: no clock is asked, and nobody is told whom to wake.
        let there = poll!(pin!(self.questions.message()));
        if let Poll::Ready(question) = there {
            return self.answer_to(question).await;
        }
        loop {
            let question = tokio::select! {
                biased;
                question = self.questions.message() => question,
                _ = self.look.tick() => {
                    if let Err(status) = self.vigil.admits(&self.service.engine, false, &self.memory).await {
                        return Some(Err(status));
                    }
                    self.run = 0;
                    continue;
                }
                () = stops(&mut self.stopping) => return Some(Err(Refusal::Stopping.into())),
            };
            return self.answer_to(question).await;
        }
    }

    async fn answer_to(
        &mut self,
        question: Result<Option<Bytes>, Status>,
    ) -> Option<Result<BytesMut, Status>> {
        match question {
            Ok(question) => Some(self.answer(&question?).await),
            Err(status) => Some(Err(status)),
        }
    }

    async fn answer(&mut self, question: &[u8]) -> Result<BytesMut, Status> {
        // The first came with the call, which is charged already.
        let charge = self.number > 0;
        self.number += 1;
        let engine = &self.service.engine;
        let then = engine.index.state();
        self.vigil.admits(engine, charge, &self.memory).await?;
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
