//! Whether a caller of Checks may ask still: it was let in by its headers, and what it asks comes later, once or many
//! times. Who it is was found out by `admission`.

use std::{net::IpAddr, sync::Arc};

use tonic::Status;
use zeroize::Zeroizing;

use crate::{
    access::Permission,
    domain::{decision::Reason, identity::Identity, name::AccountId, scope::ScopeSet},
    engine::{
        Authenticated, CannotAnswer, Engine, Refused,
        index::State,
        known::{Known, Memory},
        limiter::Take,
    },
    refusal::Refusal,
};

use super::status::{batch_never_fits, lacks_permission};

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

    /// Whether the caller still may ask. `charge`: so many calls, which its limits count, all of them or none.
    pub(super) async fn admits(&self, engine: &Engine, charge: u64, memory: &Memory) -> Result<(), Status> {
        if let Some(known) = self.known(engine, memory) {
            if charge > 0 {
                engine.note_call(&known);
            }
            return Ok(());
        }
        match &self.shown {
            Presented::Token(token) if charge > 0 => {
                let (account, take) = (self.account.as_ref(), Take::units(charge));
                let decided = engine.authenticate(token, account, false, self.peer, take).await;
                match decided.map_err(Refusal::from)? {
                    Ok(Authenticated { grants, .. }) => must_hold(Permission::Check, &grants),
                    Err(Refused {
                        reason: Reason::RateLimited | Reason::QuotaExceeded,
                        retry_after,
                        most,
                    }) => Err(match most.filter(|_| charge > 1) {
                        Some(most) => batch_never_fits(charge, most),
                        None => Refusal::CallerLimited(retry_after).into(),
                    }),
                    Err(_) => Err(Refusal::Unauthenticated.into()),
                }
            }
            _ => self.may_still_check(engine),
        }
    }

    /// Checks that the caller may still ask Checks. Nothing is charged.
    fn may_still_check(&self, engine: &Engine) -> Result<(), Status> {
        let grants = match &self.shown {
            Presented::Certificate(identity) => {
                let stands = engine.vouch(identity.account()).map_err(Refusal::from)?.stands;
                stands.then(|| identity.scopes().clone()).ok_or(Refusal::Unauthenticated)?
            }
            Presented::Token(token) => {
                let stands = engine.stands(token, self.account.as_ref(), self.peer).map_err(Refusal::from)?;
                stands.map_err(|_| Refusal::Unauthenticated)?
            }
        };
        must_hold(Permission::Check, &grants)
    }

    /// The caller, where it plainly may ask.
    pub(super) fn known(&self, engine: &Engine, memory: &Memory) -> Option<Arc<Known>> {
        match &self.shown {
            Presented::Token(token) if self.account.is_none() => plainly(engine, token, self.peer, memory),
            _ => None,
        }
    }
}

fn must_hold(permission: Permission, grants: &ScopeSet) -> Result<(), Status> {
    if permission.is_in(grants) { Ok(()) } else { Err(lacks_permission(permission.as_str())) }
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
