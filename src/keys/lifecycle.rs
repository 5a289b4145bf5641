//! Changes of existing keys: update, disable, enable, revoke, rotate.
//!
//! Each edit starts from the recorded key, and retries if the record moves meanwhile.

use std::time::Duration;

use super::{IssuedKey, KeyDetails, KeyField, KeyOperations, KeyPatch, ReplayKey, build_write, into_key};
use crate::{
    caller::{Authorization, Caller, CallerIdentity, MAX_AUTHORIZATION_ATTEMPTS},
    clock::random_bytes,
    domain::{
        account::Environment,
        key::{ApiKey, ApiKeyState, Revocation, RevokeReason},
        key_attributes::KeyAttributes as _,
        log::AuditAction,
        name::{KeyId, TokenPrefix},
        policy_decision::Reason,
        time::Timestamp,
        token::Token,
    },
    replication::propagation::ChangeEffect,
    service_error::ServiceError,
    store::{WriteOutcome, WriteRejection, WriteRequest, group_commit::WriteError},
};

enum EditOutcome {
    Changed,
    /// Some requested values were set already: the call may be a retry, or repeat a restriction of another call.
    PartlyRepeated,
    Unchanged,
}

impl Caller {
    /// Checks that the recorded key still has the token that the caller has proved to possess.
    fn check_possession(&self, key: &ApiKey, now: Timestamp) -> Result<(), ServiceError> {
        let CallerIdentity::Possession(_, digest) = &self.identity else { return Ok(()) };
        let mut secrets = key.secrets.iter().filter(|secret| secret.expires_at.is_none_or(|end| end > now));
        let living = key.revocation.is_some() || secrets.any(|secret| secret.digest == *digest);
        if living { Ok(()) } else { Err(ServiceError::CallerRevoked) }
    }
}

impl KeyOperations {
    /// Changes a key. `edit` gets a copy of the record, and is called again if the record moved meanwhile.
    async fn apply_edit(
        &self,
        caller: &Caller,
        id: KeyId,
        action: AuditAction,
        once: Option<ReplayKey>,
        mut edit: impl FnMut(&mut Authorization<'_>, &mut ApiKey, Timestamp) -> Result<EditOutcome, ServiceError>,
    ) -> Result<ChangeResult, ServiceError> {
        for attempt in 0..MAX_AUTHORIZATION_ATTEMPTS {
            let _turn = self.commit_handle.lock_for_change(action, attempt).await;
            let stored = self.find_visible(caller, id).await?;
            let mut authorization = caller.authorize(&self.engine)?;
            self.check_write(&mut authorization, &stored.key.owner)?;
            let now = self.clock.now();
            let mut key = stored.key.clone();
            let edit = edit(&mut authorization, &mut key, now)?;
            if let EditOutcome::Unchanged = edit {
                // A recorded change is not in force until its commit is confirmed.
                self.commit_handle.wait_applied(stored.key.revision).await?;
                let effect = if action == AuditAction::KeyEnabled {
                    ChangeEffect::Grants
                } else {
                    ChangeEffect::Restricts { is_repeat: true }
                };
                return Ok(ChangeResult::Applied(Box::new(KeyDetails {
                    effect,
                    ..self.stored_key_details(stored)
                })));
            }
            key.updated_at = now;
            let expect = Some(stored.key.revision);
            let effect = edit_effect(&key, &stored.key, &edit);
            let limits = self.limits_for_action(action, only_restricts(&key, &stored.key));
            let write =
                WriteRequest { limits, ..build_write(authorization, key, expect, action, now, once.clone()) };
            match self.commit_handle.write(write).await {
                Ok(WriteOutcome::Applied(change)) => {
                    let view = self.key_details(into_key(change)?, &stored.last_used);
                    return Ok(ChangeResult::Applied(Box::new(KeyDetails { effect, ..view })));
                }
                Ok(WriteOutcome::Replayed(id)) => return Ok(ChangeResult::Replayed(id)),
                Err(WriteError::Rejected(WriteRejection::Conflict)) => {}
                Err(WriteError::Rejected(WriteRejection::AuthorizationChanged)) => {
                    self.commit_handle.wait_caught_up().await?
                }
                Err(error) => return Err(error.into()),
            }
        }
        Err(ServiceError::Contended)
    }

    /// Changes fields of a key's specification.
    ///
    /// Fails if the key is revoked, would be left without a grant, or the caller could not grant its scopes.
    pub(crate) async fn update(
        &self,
        caller: &Caller,
        id: KeyId,
        patch: &KeyPatch,
    ) -> Result<KeyDetails, ServiceError> {
        self.apply_edit(caller, id, AuditAction::KeyUpdated, None, |authorization, key, now| {
            ensure_not_revoked(key)?;
            self.check_grant(authorization, &key.owner, &key.environment, &key.spec)?;
            authorization.caller.check_own_limits_change(key, patch)?;
            let (before, repeats) = (key.spec.clone(), patch.has_unchanged_value(&key.spec));
            patch.apply(&mut key.spec);
            if patch.fields.contains(&KeyField::Roles) {
                self.check_roles_exist(authorization, &key.owner, &key.spec.roles, "key.roles")?;
            }
            if key.spec.scopes.is_empty() && key.spec.roles.is_empty() {
                return Err(ServiceError::invalid_field(
                    "key.scopes",
                    "a key needs at least one scope or role; revoke or disable it instead",
                ));
            }
            self.check_grant(authorization, &key.owner, &key.environment, &key.spec)?;
            if patch.fields.contains(&KeyField::ExpiresAt) {
                self.check_max_lifetime(
                    authorization,
                    &key.owner,
                    key.spec.expires_at,
                    now,
                    "key.expires_at",
                )?;
            }
            Ok(match repeats {
                _ if key.spec == before => EditOutcome::Unchanged,
                true => EditOutcome::PartlyRepeated,
                false => EditOutcome::Changed,
            })
        })
        .await?
        .into_applied()
    }

    /// Denies a key until it is enabled.
    pub(crate) async fn disable(&self, caller: &Caller, id: KeyId) -> Result<KeyDetails, ServiceError> {
        let disabled = self.apply_edit(caller, id, AuditAction::KeyDisabled, None, |_, key, now| {
            ensure_not_revoked(key)?;
            Ok(if key.disabled_at.replace(now).is_none() {
                EditOutcome::Changed
            } else {
                EditOutcome::Unchanged
            })
        });
        match disabled.await {
            Ok(changed) => changed.into_applied(),
            Err(error) => Err(self.deny_locally(caller, id, error, Reason::Disabled)),
        }
    }

    /// Denies a key in this process alone if the store is unavailable: the caller wants it stopped, and the record in
    /// memory names its owner.
    fn deny_locally(&self, caller: &Caller, id: KeyId, error: ServiceError, stop: Reason) -> ServiceError {
        let key = match error {
            ServiceError::Unavailable => self.engine.index.find_by_id(id),
            _ => None,
        };
        let Some(key) = key.filter(|key| caller.can_see_owner(key.owner())) else { return error };
        let authorized = caller.authorize(&self.engine);
        match authorized.and_then(|mut authorization| self.check_write(&mut authorization, key.owner())) {
            Ok(()) => {}
            // The response is the same as for an id that does not exist, which cannot be looked up either.
            Err(ServiceError::NotFound(_)) => return error,
            // Without a lease no caller can be evaluated again. One without an acting user was authorized when its call
            // began, and stopping a key grants nothing.
            Err(ServiceError::CheckFailed(_)) if caller.acting_user.is_none() => {}
            Err(denied) => return denied,
        }
        self.engine.index.deny_locally(id, stop);
        ServiceError::NotRecorded { is_database_full: false }
    }

    /// Allows a disabled key again.
    ///
    /// Fails if the key is revoked, or the caller could not grant its scopes.
    pub(crate) async fn enable(&self, caller: &Caller, id: KeyId) -> Result<KeyDetails, ServiceError> {
        let enabled = self.apply_edit(caller, id, AuditAction::KeyEnabled, None, |authorization, key, _| {
            ensure_not_revoked(key)?;
            self.check_grant(authorization, &key.owner, &key.environment, &key.spec)?;
            Ok(if key.disabled_at.take().is_some() { EditOutcome::Changed } else { EditOutcome::Unchanged })
        });
        let enabled = enabled.await?.into_applied()?;
        // This also ends a local denial that was not recorded.
        self.engine.index.clear_local_disable(id);
        Ok(enabled)
    }

    /// Denies a key permanently.
    ///
    /// Fails if the key does not exist for the caller.
    pub(crate) async fn revoke(
        &self,
        caller: &Caller,
        id: KeyId,
        reason: RevokeReason,
        comment: String,
    ) -> Result<KeyDetails, ServiceError> {
        let revoked =
            self.apply_edit(caller, id, AuditAction::KeyRevoked, None, |authorization, key, now| {
                authorization.caller.check_possession(key, now)?;
                if key.revocation.is_some() {
                    return Ok(EditOutcome::Unchanged);
                }
                key.revocation = Some(Revocation { at: now, reason, comment: comment.clone() });
                Ok(EditOutcome::Changed)
            });
        match revoked.await {
            Ok(changed) => changed.into_applied(),
            Err(error) => Err(self.deny_locally(caller, id, error, Reason::Revoked)),
        }
    }

    /// Gives a key a new token; the old one works for `overlap`.
    ///
    /// Fails if the key is not active, or the caller could not grant its scopes.
    pub(crate) async fn rotate(
        &self,
        caller: &Caller,
        id: KeyId,
        overlap: Duration,
        once: Option<ReplayKey>,
    ) -> Result<IssuedKey, ServiceError> {
        // Check the owner first: a replay must not distinguish a stranger's id from one that does not exist.
        let stored = self.find_visible(caller, id).await?;
        self.check_write(&mut caller.authorize(&self.engine)?, &stored.key.owner)?;
        if let Some((done, _)) = self.find_replay(caller, once.as_ref()).await? {
            return Ok(done);
        }
        let random_bytes = random_bytes(&*self.entropy)?;
        let mut token = None;
        let changed = self
            .apply_edit(caller, id, AuditAction::KeyRotated, once, |authorization, key, now| {
                ensure_active(key, now)?;
                self.check_grant(authorization, &key.owner, &key.environment, &key.spec)?;
                let environment = self.settings.environments.get(key.environment.as_str());
                let environment = environment.ok_or_else(|| missing_environment_error(key))?;
                let prefix = prefix_from_hint(key.newest_hint(), environment)
                    .unwrap_or_else(|| self.settings.prefix.clone());
                let new = Token::generate(&prefix, &environment.tag, &random_bytes);
                key.rotate(new.digest(), new.hint(), overlap, now);
                token = Some(new);
                Ok(EditOutcome::Changed)
            })
            .await?;
        match changed {
            ChangeResult::Applied(view) => Ok(IssuedKey { details: *view, token }),
            ChangeResult::Replayed(id) => self.replay(caller, id).await.map(|(issued, _)| issued),
        }
    }

    /// Ends the overlap of a rotation, and with it the old token.
    pub(crate) async fn finish_rotation(
        &self,
        caller: &Caller,
        id: KeyId,
    ) -> Result<KeyDetails, ServiceError> {
        self.apply_edit(caller, id, AuditAction::KeyRotationFinished, None, |_, key, now| {
            ensure_not_revoked(key)?;
            if !key.has_overlapping_secret(now) {
                return Ok(EditOutcome::Unchanged);
            }
            key.finish_rotation(now);
            Ok(EditOutcome::Changed)
        })
        .await?
        .into_applied()
    }

    /// Revokes the key of a presented token, whatever the state of the key. Possession is the proof, and a retry after
    /// success still proves it.
    pub(crate) async fn revoke_self(&self, caller: &Caller) -> Result<KeyDetails, ServiceError> {
        let comment = "revoked by its holder".to_owned();
        self.revoke(caller, caller.id(), RevokeReason::Unspecified, comment).await
    }
}

/// Whether a change grants nothing, and writes no text that the caller chooses.
fn only_restricts(after: &ApiKey, before: &ApiKey) -> bool {
    let same_texts = after.spec.name == before.spec.name && after.spec.metadata == before.spec.metadata;
    same_texts && after.restricts(before) && !before.restricts(after)
}

/// The effect of an edit on Checks.
fn edit_effect(after: &ApiKey, before: &ApiKey, edit: &EditOutcome) -> ChangeEffect {
    match edit {
        _ if after.restricts(before) => ChangeEffect::Restricts { is_repeat: false },
        EditOutcome::PartlyRepeated => ChangeEffect::Restricts { is_repeat: true },
        EditOutcome::Changed | EditOutcome::Unchanged => ChangeEffect::Grants,
    }
}

/// A change that was applied now, or before under the same idempotency key.
enum ChangeResult {
    Applied(Box<KeyDetails>),
    Replayed(KeyId),
}

impl ChangeResult {
    /// Only a change with an idempotency key can be a replay.
    fn into_applied(self) -> Result<KeyDetails, ServiceError> {
        match self {
            ChangeResult::Applied(view) => Ok(*view),
            ChangeResult::Replayed(_) => Err(ServiceError::Contended),
        }
    }
}

/// Reads the prefix of a key's newest token from its hint, `{prefix}_{tag}_{4 characters}`. `None` if Keyward did not
/// issue the token.
fn prefix_from_hint(hint: &str, environment: &Environment) -> Option<TokenPrefix> {
    let start = hint.get(..hint.len().checked_sub(4)?)?.strip_suffix('_')?;
    let prefix = match environment.tag.as_str() {
        "" => start,
        tag => start.strip_suffix(tag)?.strip_suffix('_')?,
    };
    TokenPrefix::parse(prefix).ok()
}

fn ensure_not_revoked(key: &ApiKey) -> Result<(), ServiceError> {
    if key.revocation.is_none() {
        return Ok(());
    }
    let message = "the key is revoked permanently; create another one";
    Err(ServiceError::FailedPrecondition("KEY_REVOKED", message.to_owned()))
}

fn ensure_active(key: &ApiKey, now: Timestamp) -> Result<(), ServiceError> {
    let todo = match key.state(now) {
        ApiKeyState::Active => return Ok(()),
        ApiKeyState::Revoked => "revoked permanently; create another one",
        ApiKeyState::Disabled => "disabled; enable it first",
        ApiKeyState::Expired => "expired; give it a later expires_at first",
    };
    Err(ServiceError::FailedPrecondition("KEY_NOT_ACTIVE", format!("the key is {todo}")))
}

fn missing_environment_error(key: &ApiKey) -> ServiceError {
    let message = format!(
        "the key's environment {:?} is no longer configured; configure it again to rotate the key",
        key.environment.as_str()
    );
    ServiceError::FailedPrecondition("ENVIRONMENT_NOT_CONFIGURED", message)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::account::EnvironmentSet;

    #[test]
    fn an_update_that_repeats_a_value_waits_as_the_one_before() {
        let before = crate::domain::key::tests::sample_key();
        let mut spec = before.spec.clone();
        spec.metadata.insert("team".to_owned(), "core".to_owned());
        let patch = |fields: &[KeyField]| KeyPatch { fields: fields.to_vec(), new_spec: spec.clone() };
        assert!(!patch(&[KeyField::Metadata]).has_unchanged_value(&before.spec));
        assert!(patch(&[KeyField::Metadata, KeyField::Scopes]).has_unchanged_value(&before.spec));
        assert_eq!(
            edit_effect(&before, &before, &EditOutcome::PartlyRepeated),
            ChangeEffect::Restricts { is_repeat: true }
        );
        assert_eq!(edit_effect(&before, &before, &EditOutcome::Changed), ChangeEffect::Grants);
    }

    #[test]
    fn a_rotation_keeps_the_prefix_of_the_token() {
        let environments = EnvironmentSet::default();
        let production = environments.get("production").unwrap();
        let prefix = |hint| prefix_from_hint(hint, production).map(|prefix| prefix.to_string());
        assert_eq!(prefix("izli_sk_live_aB3d").as_deref(), Some("izli_sk"));
        assert_eq!(prefix("kw_live_aB3d").as_deref(), Some("kw"));
        for foreign in ["", "abc", "kw_staging_aB3d", "sk-1234…", "éééé"] {
            assert_eq!(prefix(foreign), None, "{foreign:?}");
        }
    }
}
