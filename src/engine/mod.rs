//! The engine: answers Checks from memory. Nothing here awaits, and nothing here asks a database.
//!
//! `parse → digest → look up → decide → note the use → answer`. The index is fed with log rows in revision
//! order; uses are written behind. Who may ask, and how answers look on the wire, is `grpc`'s business.

pub mod index;
pub mod usage;

use std::{
    net::IpAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use crate::{
    clock::Clock,
    domain::{
        decision::{Failures, Reason, Request, Subject, Use, Verdict, decide},
        key::Key,
        name::{AccountId, CustomerId, EnvironmentName},
        scope::Scope,
        time::{Revision, Timestamp},
        token::{self, Digest, Shape},
    },
};

use index::{Found, Index};
use usage::Usage;

/// What a Check asks, once it has been read from the wire.
#[derive(Clone, Debug)]
pub struct Question<'a> {
    /// The presented string.
    pub token: &'a str,
    /// Where the call is made.
    pub environment: &'a EnvironmentName,
    /// The scopes that are all needed. Empty = only whether the token is valid here.
    pub scopes: &'a [Scope],
    /// The account that is acted on.
    pub account: Option<&'a AccountId>,
    /// Whom the call is about.
    pub customer: Option<&'a CustomerId>,
    /// The end client's address.
    pub client_ip: Option<IpAddr>,
    /// Decide, and leave no trace.
    pub dry_run: bool,
    /// Answer only from a state at least as new.
    pub min_revision: Option<Revision>,
}

/// The key that a presented token belongs to.
#[derive(Clone, Debug)]
pub struct Holder {
    /// The key.
    pub key: Arc<Key>,
    /// Which version of its secret was presented.
    pub version: u32,
}

/// What a Check answers.
#[derive(Clone, Debug)]
pub struct Answer {
    /// Everything that failed. Empty = allowed.
    pub failures: Failures,
    /// The needed scopes that are not granted.
    pub missing: Vec<Scope>,
    /// The key, where the token is known to the caller's account.
    pub holder: Option<Holder>,
    /// The answer is from a state at least as new.
    pub revision: Revision,
}

impl Answer {
    /// The first reason, or `Ok`.
    #[must_use]
    pub fn reason(&self) -> Reason {
        self.failures.first()
    }

    fn of(reason: Reason, revision: Revision) -> Answer {
        let mut failures = Failures::default();
        failures.note(reason, true);
        Answer {
            failures,
            missing: Vec::new(),
            holder: None,
            revision,
        }
    }
}

/// Why a Check could not be answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CannotAnswer {
    /// The first snapshot is not loaded yet.
    #[error("the server is starting and has not loaded its keys yet")]
    Starting,
    /// The state is older than asked for.
    #[error("the state here is revision {have}, older than the {want} asked for")]
    Stale {
        /// The revision here.
        have: Revision,
        /// The revision asked for.
        want: Revision,
    },
}

/// Answers Checks.
pub struct Engine {
    /// The keys and accounts.
    pub index: Arc<Index>,
    /// The uses that are not written yet.
    pub usage: Arc<Usage>,
    clock: Arc<dyn Clock>,
    answered: [AtomicU64; 16],
}

impl std::fmt::Debug for Engine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Engine")
            .field("index", &self.index)
            .finish_non_exhaustive()
    }
}

impl Engine {
    /// An engine over an index that may still be empty.
    #[must_use]
    pub fn new(index: Arc<Index>, usage: Arc<Usage>, clock: Arc<dyn Clock>) -> Self {
        Engine {
            index,
            usage,
            clock,
            answered: Default::default(),
        }
    }

    /// The present instant.
    #[must_use]
    pub fn now(&self) -> Timestamp {
        self.clock.now()
    }

    /// How many Checks were answered with each reason since the start.
    pub fn answered(&self) -> impl Iterator<Item = (Reason, u64)> {
        Reason::ALL
            .into_iter()
            .map(|reason| (reason, self.answered[reason as usize].load(Ordering::Relaxed)))
    }

    /// Decides one question for a caller of `asker`, the operator account or another. A token of another
    /// account is unknown to all but operators.
    ///
    /// # Errors
    /// When the state here is not good enough to answer; that is no verdict.
    pub fn check(&self, asker: &AccountId, question: &Question<'_>) -> Result<Answer, CannotAnswer> {
        // Before the look-up: what is found is at least as new.
        let revision = self.index.revision().ok_or(CannotAnswer::Starting)?;
        if let Some(want) = question.min_revision.filter(|want| *want > revision) {
            return Err(CannotAnswer::Stale { have: revision, want });
        }
        let now = self.clock.now();
        let answer = self.answer(asker, question, revision, now);
        self.answered[answer.reason() as usize].fetch_add(1, Ordering::Relaxed);
        Ok(answer)
    }

    fn answer(
        &self,
        asker: &AccountId,
        question: &Question<'_>,
        revision: Revision,
        now: Timestamp,
    ) -> Answer {
        if token::shape(question.token) != Shape::Plausible {
            return Answer::of(Reason::Malformed, revision);
        }
        let visible = |found: &Found| asker.is_operator() || found.key.owner.account() == Some(asker);
        let Some(found) = self.index.find(&Digest::of(question.token)).filter(visible) else {
            return Answer::of(Reason::Unknown, revision);
        };
        let request = Request {
            purpose: Use::Service {
                environment: question.environment,
                customer: question.customer,
            },
            account: question.account,
            client_ip: question.client_ip,
            scopes: question.scopes,
        };
        let verdict = judge(&found, request, now);
        if verdict.failures.first() == Reason::Ok && !question.dry_run {
            self.usage.note(found.key.id, found.version, now);
        }
        let holder = Some(Holder {
            key: found.key,
            version: found.version,
        });
        Answer {
            failures: verdict.failures,
            missing: verdict.missing,
            holder,
            revision,
        }
    }

    /// Decides whether a token may be used to call Keyward itself.
    ///
    /// # Errors
    /// When the first snapshot is not loaded yet.
    pub fn authenticate(
        &self,
        presented: &str,
        peer: Option<IpAddr>,
    ) -> Result<Result<Holder, Reason>, CannotAnswer> {
        self.index.revision().ok_or(CannotAnswer::Starting)?;
        if token::shape(presented) != Shape::Plausible {
            return Ok(Err(Reason::Malformed));
        }
        let Some(found) = self.index.find(&Digest::of(presented)) else {
            return Ok(Err(Reason::Unknown));
        };
        let now = self.clock.now();
        let request = Request {
            purpose: Use::Management,
            account: None,
            client_ip: peer,
            scopes: &[],
        };
        match judge(&found, request, now).failures.first() {
            Reason::Ok => {
                self.usage.note(found.key.id, found.version, now);
                Ok(Ok(Holder {
                    key: found.key,
                    version: found.version,
                }))
            }
            reason => Ok(Err(reason)),
        }
    }

    /// The key that a token belongs to, in whatever state.
    ///
    /// # Errors
    /// When the first snapshot is not loaded yet.
    pub fn lookup(&self, presented: &str) -> Result<Option<Holder>, CannotAnswer> {
        self.index.revision().ok_or(CannotAnswer::Starting)?;
        if token::shape(presented) != Shape::Plausible {
            return Ok(None);
        }
        let found = self.index.find(&Digest::of(presented));
        Ok(found.map(|found| Holder {
            key: found.key,
            version: found.version,
        }))
    }
}

/// Decides by the record, and by the record that may be in its place: what either refuses is refused.
fn judge(found: &Found, request: Request<'_>, now: Timestamp) -> Verdict {
    let decide_by = |key| {
        let subject = Subject {
            key,
            version: found.version,
            account: found.account.as_deref(),
        };
        decide(subject, request, now)
    };
    let verdict = decide_by(&found.key);
    match &found.doubt {
        Some(doubt) if verdict.failures.first() == Reason::Ok => decide_by(doubt),
        _ => verdict,
    }
}
