//! StreamCheck: many Checks on one long call, for callers with very much traffic. Each is decided as a Check of its own,
//! answered in the order in which they came, and charged to the caller as a call of its own.
//!
//! The caller is decided anew with each message, and once a second while there is none: a stream ends when its caller is
//! revoked. It ends with a status where a Check would have had one: the messages before it are answered.

use std::{net::IpAddr, sync::Arc, time::Duration};

use bytes::BytesMut;
use futures_util::stream::{BoxStream, StreamExt as _, unfold};
use prost::Message as _;
use tokio::{
    sync::watch,
    time::{Interval, MissedTickBehavior, interval},
};
use tonic::{Status, Streaming};
use zeroize::Zeroizing;

use crate::{
    access::{Caller, Permission},
    domain::{decision::Reason, identity::Identity, name::AccountId, scope::ScopeSet},
    engine::{
        Asker, Authenticated, CannotAnswer, Engine,
        index::State,
        known::{Known, Memory},
    },
    pb,
    refusal::Refusal,
};

use super::{
    authz::AuthzService,
    reply::ROOM,
    rpc::CHECK_BYTES,
    status::{lacks_permission, too_large},
};

/// How long a revoked caller's stream may stay open when nothing is asked on it.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// After how many messages that were there already others get their turn.
const AT_ONCE: u32 = 64;

/// What proves a caller.
#[derive(Clone)]
pub(super) enum Presented {
    Token(Arc<Zeroizing<String>>),
    Certificate(Arc<Identity>),
}

/// What a caller has shown when it called, so that it can be decided again.
#[derive(Clone)]
pub(super) struct Vigil {
    pub(super) shown: Presented,
    /// The account that it named.
    pub(super) account: Option<AccountId>,
    pub(super) peer: Option<IpAddr>,
}

impl std::fmt::Debug for Vigil {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Vigil").field("account", &self.account).finish_non_exhaustive()
    }
}

impl Vigil {
    /// Whether the caller may ask still. Nothing is counted.
    pub(super) fn stands(&self, engine: &Engine) -> Result<bool, CannotAnswer> {
        match &self.shown {
            Presented::Certificate(identity) => Ok(engine.vouch(identity.account())?.stands),
            Presented::Token(token) => {
                let stands = engine.stands(token, self.account.as_ref(), self.peer)?;
                Ok(stands.is_ok_and(|grants| Permission::Check.is_in(&grants)))
            }
        }
    }

    /// The same of one that stood when the index was in this state.
    pub(super) fn still_stands(&self, engine: &Engine, then: Option<State>) -> Result<bool, CannotAnswer> {
        if then.is_some() && engine.index.state() == then { Ok(true) } else { self.stands(engine) }
    }

    /// Whether the caller still may ask. `charge`: this is a call, which its limits count.
    async fn admits(&self, engine: &Engine, charge: bool, memory: &Memory) -> Result<(), Status> {
        if self.is_known(engine, charge, memory) {
            return Ok(());
        }
        let grants = match &self.shown {
            Presented::Certificate(identity) => stands(identity, engine)?,
            Presented::Token(token) if charge => {
                let account = self.account.as_ref();
                match engine.authenticate(token, account, false, self.peer).await.map_err(Refusal::from)? {
                    Ok(Authenticated { grants, .. }) => grants,
                    Err(refused) => return Err(refusal(refused.reason, refused.retry_after)),
                }
            }
            Presented::Token(token) => {
                let stands = engine.stands(token, self.account.as_ref(), self.peer).map_err(Refusal::from)?;
                stands.map_err(|reason| refusal(reason, None))?
            }
        };
        match Permission::Check.is_in(&grants) {
            true => Ok(()),
            false => Err(lacks_permission(Permission::Check.as_str())),
        }
    }
}

impl Vigil {
    /// Whether the caller plainly may ask, as it did before.
    fn is_known(&self, engine: &Engine, charge: bool, memory: &Memory) -> bool {
        let Presented::Token(token) = &self.shown else { return false };
        if self.account.is_some() {
            return false;
        }
        let known = engine.recognise(token, self.peer, memory);
        let may = |known: &Arc<Known>| Permission::Check.is_in(&known.grants);
        let Some(known) = known.filter(may) else { return false };
        if charge {
            engine.note_call(&known);
        }
        true
    }
}

fn stands(identity: &Identity, engine: &Engine) -> Result<ScopeSet, Status> {
    match engine.vouch(identity.account()).map_err(Refusal::from)?.stands {
        true => Ok(identity.scopes().clone()),
        false => Err(Refusal::Unauthenticated.into()),
    }
}

fn refusal(reason: Reason, retry_after: Option<Duration>) -> Status {
    match reason {
        Reason::RateLimited | Reason::QuotaExceeded => Refusal::CallerLimited(retry_after).into(),
        _ => Refusal::Unauthenticated.into(),
    }
}

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
    questions: Streaming<pb::CheckRequest>,
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
    questions: Streaming<pb::CheckRequest>,
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
            return match question {
                Ok(question) => Some(self.answer(&question?).await),
                Err(status) => Some(Err(status)),
            };
        }
    }

    async fn answer(&mut self, question: &pb::CheckRequest) -> Result<BytesMut, Status> {
        // The first came with the call, which is charged already.
        let charge = self.number > 0;
        self.number += 1;
        let engine = &self.service.engine;
        let then = engine.index.state();
        self.vigil.admits(engine, charge, &self.memory).await?;
        let length = question.encoded_len();
        if length > CHECK_BYTES {
            return Err(too_large(length, CHECK_BYTES));
        }
        let mut out = BytesMut::with_capacity(ROOM);
        let stands = || self.vigil.still_stands(engine, then);
        let asker = Asker { account: &self.caller.account, stands: &stands };
        self.service.answer(asker, question, &mut out)?.written().await?;
        Ok(out)
    }
}
