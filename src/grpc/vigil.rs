//! Whether a caller of Checks may ask still: it was let in by its headers, and what it asks comes later, once or many
//! times. Who it is was found out by `admission`.

use std::{net::IpAddr, sync::Arc};

use tonic::Status;
use zeroize::Zeroizing;

use crate::{
    access::Permission,
    domain::{decision::Reason, identity::Identity, name::AccountId},
    engine::{
        Authenticated, CannotAnswer, Engine,
        index::State,
        known::{Known, Memory},
    },
    refusal::Refusal,
};

use super::status::lacks_permission;

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
            Presented::Token(token) => may_check(engine, token, self.account.as_ref(), self.peer),
        }
    }

    /// The same of one that stood when the index was in this state.
    pub(super) fn still_stands(&self, engine: &Engine, then: Option<State>) -> Result<bool, CannotAnswer> {
        if then.is_some() && engine.index.state() == then { Ok(true) } else { self.stands(engine) }
    }

    /// Whether the caller still may ask. `charge`: this is a call, which its limits count.
    pub(super) async fn admits(&self, engine: &Engine, charge: bool, memory: &Memory) -> Result<(), Status> {
        if let Some(known) = self.known(engine, memory) {
            if charge {
                engine.note_call(&known);
            }
            return Ok(());
        }
        let grants = match &self.shown {
            Presented::Certificate(identity) => {
                let stands = engine.vouch(identity.account()).map_err(Refusal::from)?.stands;
                stands.then(|| identity.scopes().clone()).ok_or(Refusal::Unauthenticated)?
            }
            Presented::Token(token) if charge => {
                let account = self.account.as_ref();
                match engine.authenticate(token, account, false, self.peer).await.map_err(Refusal::from)? {
                    Ok(Authenticated { grants, .. }) => grants,
                    Err(refused) => match refused.reason {
                        Reason::RateLimited | Reason::QuotaExceeded => {
                            return Err(Refusal::CallerLimited(refused.retry_after).into());
                        }
                        _ => return Err(Refusal::Unauthenticated.into()),
                    },
                }
            }
            Presented::Token(token) => {
                let stands = engine.stands(token, self.account.as_ref(), self.peer).map_err(Refusal::from)?;
                stands.map_err(|_| Refusal::Unauthenticated)?
            }
        };
        match Permission::Check.is_in(&grants) {
            true => Ok(()),
            false => Err(lacks_permission(Permission::Check.as_str())),
        }
    }

    /// The caller, where it plainly may ask.
    pub(super) fn known(&self, engine: &Engine, memory: &Memory) -> Option<Arc<Known>> {
        match &self.shown {
            Presented::Token(token) if self.account.is_none() => plainly(engine, token, self.peer, memory),
            _ => None,
        }
    }
}

/// The caller with this token, where it plainly may ask Checks: see [`Engine::recognise`].
pub(super) fn plainly(
    engine: &Engine,
    token: &str,
    peer: Option<IpAddr>,
    memory: &Memory,
) -> Option<Arc<Known>> {
    engine.recognise(token, peer, memory).filter(|known| Permission::Check.is_in(&known.grants))
}

/// Whether the caller with this token may ask Checks.
pub(super) fn may_check(
    engine: &Engine,
    token: &str,
    account: Option<&AccountId>,
    peer: Option<IpAddr>,
) -> Result<bool, CannotAnswer> {
    let stands = engine.stands(token, account, peer)?;
    Ok(stands.is_ok_and(|grants| Permission::Check.is_in(&grants)))
}
