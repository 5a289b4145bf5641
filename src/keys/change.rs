//! What changes a key that exists: each takes the record as it stands, and is tried again when it moved meanwhile.

use std::time::Duration;

use super::{Field, Issued, Keys, Once, Patch, View, into_key, write};
use crate::{
    access::{ATTEMPTS, Authorization, Caller, Proof},
    clock::random,
    domain::{
        account::Environment,
        decision::Reason,
        facts::KeyFacts as _,
        key::{Key, Revocation, RevokeReason, State},
        log::Action,
        name::{KeyId, TokenPrefix},
        time::Timestamp,
        token::Token,
    },
    refusal::Refusal,
    replication::propagation::Reach,
    store::{Outcome, Rejection, Write, writer::WriteError},
};

/// Whether an edit changed anything.
enum Edit {
    Changed,
    /// Some of what it asks for was so before: it may be a call that is made again, or narrow what another narrowed.
    Repeats,
    AsItWas,
}

impl Caller {
    /// Whether a caller that has proved possession of a token does so by the key's record too.
    fn still_possesses(&self, key: &Key, now: Timestamp) -> Result<(), Refusal> {
        let Proof::Possession(_, digest) = &self.proof else { return Ok(()) };
        let mut secrets = key.secrets.iter().filter(|secret| secret.expires_at.is_none_or(|end| end > now));
        let living = key.revocation.is_some() || secrets.any(|secret| secret.digest == *digest);
        if living { Ok(()) } else { Err(Refusal::CallerRevoked) }
    }
}

impl Keys {
    /// Changes a key: `edit` gets a copy of the record, and is called again if the record moved meanwhile.
    async fn change(
        &self,
        caller: &Caller,
        id: KeyId,
        action: Action,
        once: Option<Once>,
        mut edit: impl FnMut(&mut Authorization<'_>, &mut Key, Timestamp) -> Result<Edit, Refusal>,
    ) -> Result<Changed, Refusal> {
        for attempt in 0..ATTEMPTS {
            let _turn = self.writer.turn(action, attempt).await;
            let stored = self.visible(caller, id).await?;
            let mut asked = caller.authorize(&self.engine)?;
            self.may_write(&mut asked, &stored.key.owner)?;
            let now = self.clock.now();
            let mut key = stored.key.clone();
            let edit = edit(&mut asked, &mut key, now)?;
            if let Edit::AsItWas = edit {
                // Recorded is not yet in force, while the answer to its commit is awaited.
                self.writer.applied(stored.key.revision).await?;
                let reach =
                    if action == Action::KeyEnabled { Reach::Widens } else { Reach::Narrows { again: true } };
                return Ok(Changed::Now(Box::new(View { reach, ..self.view_stored(stored) })));
            }
            key.updated_at = now;
            let expect = Some(stored.key.revision);
            let reach = reach(&key, &stored.key, &edit);
            let limits = self.limits_of(action, only_takes(&key, &stored.key));
            let write = Write { limits, ..write(asked, key, expect, action, now, once.clone()) };
            match self.writer.write(write).await {
                Ok(Outcome::Applied(change)) => {
                    let view = self.view(into_key(change)?, &stored.last_used);
                    return Ok(Changed::Now(Box::new(View { reach, ..view })));
                }
                Ok(Outcome::Replayed(id)) => return Ok(Changed::Before(id)),
                Err(WriteError::Rejected(Rejection::Conflict)) => {}
                Err(WriteError::Rejected(Rejection::AuthorizationMoved)) => self.writer.caught_up().await?,
                Err(error) => return Err(error.into()),
            }
        }
        Err(Refusal::Contended)
    }

    /// Changes some of a key's terms.
    ///
    /// # Errors
    /// When the key is revoked, would be left without a grant, or the caller could not give its grants.
    pub async fn update(&self, caller: &Caller, id: KeyId, patch: &Patch) -> Result<View, Refusal> {
        self.change(caller, id, Action::KeyUpdated, None, |asked, key, now| {
            not_revoked(key)?;
            self.may_give(asked, &key.owner, &key.environment, &key.terms)?;
            asked.caller.may_change_limits_of(key, patch)?;
            let (before, repeats) = (key.terms.clone(), patch.repeats(&key.terms));
            patch.apply(&mut key.terms);
            if patch.fields.contains(&Field::Roles) {
                self.roles_exist(asked, &key.owner, &key.terms.roles, "key.roles")?;
            }
            if key.terms.scopes.is_empty() && key.terms.roles.is_empty() {
                return Err(Refusal::field(
                    "key.scopes",
                    "a key needs at least one scope or role; revoke or disable it instead",
                ));
            }
            self.may_give(asked, &key.owner, &key.environment, &key.terms)?;
            if patch.fields.contains(&Field::ExpiresAt) {
                self.keeps_longest_life(asked, &key.owner, key.terms.expires_at, now, "key.expires_at")?;
            }
            Ok(match repeats {
                _ if key.terms == before => Edit::AsItWas,
                true => Edit::Repeats,
                false => Edit::Changed,
            })
        })
        .await?
        .now()
    }

    /// Refuses a key until it is enabled.
    ///
    /// # Errors
    /// When the key is revoked.
    pub async fn disable(&self, caller: &Caller, id: KeyId) -> Result<View, Refusal> {
        let disabled = self.change(caller, id, Action::KeyDisabled, None, |_, key, now| {
            not_revoked(key)?;
            Ok(if key.disabled_at.replace(now).is_none() { Edit::Changed } else { Edit::AsItWas })
        });
        match disabled.await {
            Ok(changed) => changed.now(),
            Err(refusal) => Err(self.refused_here(caller, id, refusal, Reason::Disabled)),
        }
    }

    /// Where the store could not be asked, the key is refused by this process all the same: somebody wants it
    /// stopped, and the record in memory says whose it is.
    fn refused_here(&self, caller: &Caller, id: KeyId, refusal: Refusal, stop: Reason) -> Refusal {
        let known = match refusal {
            Refusal::Unavailable => self.engine.index.with_id(id),
            _ => None,
        };
        let Some(known) = known.filter(|key| caller.sees(key.owner())) else { return refusal };
        let authorized = caller.authorize(&self.engine);
        match authorized.and_then(|mut asked| self.may_write(&mut asked, known.owner())) {
            Ok(()) => {}
            // The answer is the same as for an id that does not exist: that one cannot be looked up either.
            Err(Refusal::NotFound(_)) => return refusal,
            // Without a lease no caller can be judged again. One that acts for itself was authorized when its call
            // began, and to stop a key gives nobody a right.
            Err(Refusal::CannotAnswer(_)) if caller.acting_user.is_none() => {}
            Err(lacking) => return lacking,
        }
        self.engine.index.stop(id, stop);
        Refusal::NotRecorded { full: false }
    }

    /// Ends what `disable` began.
    ///
    /// # Errors
    /// When the key is revoked, or the caller could not give its grants.
    pub async fn enable(&self, caller: &Caller, id: KeyId) -> Result<View, Refusal> {
        let enabled = self.change(caller, id, Action::KeyEnabled, None, |asked, key, _| {
            not_revoked(key)?;
            self.may_give(asked, &key.owner, &key.environment, &key.terms)?;
            Ok(if key.disabled_at.take().is_some() { Edit::Changed } else { Edit::AsItWas })
        });
        let enabled = enabled.await?.now()?;
        // A disabling that was not recorded ends with this too.
        self.engine.index.enable(id);
        Ok(enabled)
    }

    /// Refuses a key for ever.
    ///
    /// # Errors
    /// When it does not exist for the caller.
    pub async fn revoke(
        &self,
        caller: &Caller,
        id: KeyId,
        reason: RevokeReason,
        comment: String,
    ) -> Result<View, Refusal> {
        let revoked = self.change(caller, id, Action::KeyRevoked, None, |asked, key, now| {
            asked.caller.still_possesses(key, now)?;
            if key.revocation.is_some() {
                return Ok(Edit::AsItWas);
            }
            key.revocation = Some(Revocation { at: now, reason, comment: comment.clone() });
            Ok(Edit::Changed)
        });
        match revoked.await {
            Ok(changed) => changed.now(),
            Err(refusal) => Err(self.refused_here(caller, id, refusal, Reason::Revoked)),
        }
    }

    /// Gives a key a new token.
    ///
    /// # Errors
    /// When the key is not active, or the caller could not give its grants.
    pub async fn rotate(
        &self,
        caller: &Caller,
        id: KeyId,
        overlap: Duration,
        once: Option<Once>,
    ) -> Result<Issued, Refusal> {
        // Whose key it is comes first: a replay must not tell a stranger's id from none.
        let stored = self.visible(caller, id).await?;
        self.may_write(&mut caller.authorize(&self.engine)?, &stored.key.owner)?;
        if let Some((done, _)) = self.done_before(caller, once.as_ref()).await? {
            return Ok(done);
        }
        let random_bytes = random(&*self.entropy)?;
        let mut token = None;
        let changed = self
            .change(caller, id, Action::KeyRotated, once, |asked, key, now| {
                active(key, now)?;
                self.may_give(asked, &key.owner, &key.environment, &key.terms)?;
                let environment = self.settings.environments.get(key.environment.as_str());
                let environment = environment.ok_or_else(|| environment_gone(key))?;
                let prefix =
                    prefix_kept(key.hint(), environment).unwrap_or_else(|| self.settings.prefix.clone());
                let new = Token::generate(&prefix, &environment.tag, &random_bytes);
                key.rotate(new.digest(), new.hint(), overlap, now);
                token = Some(new);
                Ok(Edit::Changed)
            })
            .await?;
        match changed {
            Changed::Now(view) => Ok(Issued { view: *view, token }),
            Changed::Before(id) => self.replay(caller, id).await.map(|(issued, _)| issued),
        }
    }

    /// Ends a rotation's overlap.
    ///
    /// # Errors
    /// When the key is revoked.
    pub async fn finish_rotation(&self, caller: &Caller, id: KeyId) -> Result<View, Refusal> {
        self.change(caller, id, Action::KeyRotationFinished, None, |_, key, now| {
            not_revoked(key)?;
            if !key.overlapping(now) {
                return Ok(Edit::AsItWas);
            }
            key.finish_rotation(now);
            Ok(Edit::Changed)
        })
        .await?
        .now()
    }

    /// Revokes the key of whoever holds one of its living tokens, whatever else stands against it: proof is
    /// possession, and a retry after success proves it still.
    ///
    /// # Errors
    /// When the change is not recorded.
    pub async fn revoke_self(&self, caller: &Caller) -> Result<View, Refusal> {
        let comment = "revoked by its holder".to_owned();
        self.revoke(caller, caller.id(), RevokeReason::Unspecified, comment).await
    }
}

/// Whether a change of a key gives nothing, and writes nothing that a caller chose freely.
fn only_takes(after: &Key, before: &Key) -> bool {
    let same_texts = after.terms.name == before.terms.name && after.terms.metadata == before.terms.metadata;
    same_texts && after.narrows(before) && !before.narrows(after)
}

/// What a change of a key takes away.
fn reach(after: &Key, before: &Key, edit: &Edit) -> Reach {
    match edit {
        _ if after.narrows(before) => Reach::Narrows { again: false },
        Edit::Repeats => Reach::Narrows { again: true },
        Edit::Changed | Edit::AsItWas => Reach::Widens,
    }
}

/// A change that was made now, or under the same idempotency key before.
enum Changed {
    Now(Box<View>),
    Before(KeyId),
}

impl Changed {
    /// Only a change with an idempotency key can have been made before.
    fn now(self) -> Result<View, Refusal> {
        match self {
            Changed::Now(view) => Ok(*view),
            Changed::Before(_) => Err(Refusal::Contended),
        }
    }
}

/// The prefix of a key's newest token, read from its hint: `{prefix}_{tag}_{4 characters}`. None where the
/// token is not of our making.
fn prefix_kept(hint: &str, environment: &Environment) -> Option<TokenPrefix> {
    let start = hint.get(..hint.len().checked_sub(4)?)?.strip_suffix('_')?;
    let prefix = match environment.tag.as_str() {
        "" => start,
        tag => start.strip_suffix(tag)?.strip_suffix('_')?,
    };
    TokenPrefix::parse(prefix).ok()
}

fn not_revoked(key: &Key) -> Result<(), Refusal> {
    if key.revocation.is_none() {
        return Ok(());
    }
    let message = "the key is revoked, which is for ever; create another one";
    Err(Refusal::Precondition("KEY_REVOKED", message.to_owned()))
}

fn active(key: &Key, now: Timestamp) -> Result<(), Refusal> {
    let todo = match key.state(now) {
        State::Active => return Ok(()),
        State::Revoked => "revoked, which is for ever; create another one",
        State::Disabled => "disabled; enable it first",
        State::Expired => "expired; give it a later expires_at first",
    };
    Err(Refusal::Precondition("KEY_NOT_ACTIVE", format!("the key is {todo}")))
}

fn environment_gone(key: &Key) -> Refusal {
    let message = format!(
        "the key's environment {:?} is no longer configured; configure it again to rotate the key",
        key.environment.as_str()
    );
    Refusal::Precondition("ENVIRONMENT_NOT_CONFIGURED", message)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::account::Environments;

    #[test]
    fn an_update_that_repeats_a_value_waits_as_the_one_before() {
        let before = crate::domain::key::tests::sample();
        let mut terms = before.terms.clone();
        terms.metadata.insert("team".to_owned(), "core".to_owned());
        let patch = |fields: &[Field]| Patch { fields: fields.to_vec(), terms: terms.clone() };
        assert!(!patch(&[Field::Metadata]).repeats(&before.terms));
        assert!(patch(&[Field::Metadata, Field::Scopes]).repeats(&before.terms));
        assert_eq!(reach(&before, &before, &Edit::Repeats), Reach::Narrows { again: true });
        assert_eq!(reach(&before, &before, &Edit::Changed), Reach::Widens);
    }

    #[test]
    fn a_rotation_keeps_the_prefix_of_the_token() {
        let environments = Environments::default();
        let production = environments.get("production").unwrap();
        let prefix = |hint| prefix_kept(hint, production).map(|prefix| prefix.to_string());
        assert_eq!(prefix("izli_sk_live_aB3d").as_deref(), Some("izli_sk"));
        assert_eq!(prefix("kw_live_aB3d").as_deref(), Some("kw"));
        for foreign in ["", "abc", "kw_staging_aB3d", "sk-1234…", "éééé"] {
            assert_eq!(prefix(foreign), None, "{foreign:?}");
        }
    }
}
