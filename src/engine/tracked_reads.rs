//! Look-ups for an authorization, which add what they find to a read set.
//!
//! The transaction then compares the read set with the tables. Every look-up reads the record as it is stored,
//! regardless of uncertain changes: a commit resolves these first.

use std::{net::IpAddr, sync::Arc};

use crate::{
    domain::{
        account::{Account, AccountMember, Role},
        certificate_identity::CertificateIdentity,
        key_attributes::KeyAttributes,
        name::{AccountId, RoleName, UserId},
        policy_decision::Reason,
        scope::ScopeSet,
        token::TokenDigest,
    },
    store::{ReadSet, ReadState, RecordId},
};

use super::{
    check::Engine,
    check_outcome::KeyMatch,
    error::CheckError,
    index::{Index, KeyRef},
};

impl Index {
    /// Resolves a role's name in an account: the account's own role before the global one.
    pub fn resolve_role_tracked(
        &self,
        account: Option<&AccountId>,
        name: &RoleName,
        reads: &mut ReadSet,
    ) -> Option<Arc<Role>> {
        let own = account.and_then(|account| self.role_record_tracked(Some(account), name, reads));
        own.or_else(|| self.role_record_tracked(None, name, reads))
    }

    /// The role with exactly this account and name.
    pub fn role_record_tracked(
        &self,
        account: Option<&AccountId>,
        name: &RoleName,
        reads: &mut ReadSet,
    ) -> Option<Arc<Role>> {
        let role = self.role_record(account, name);
        let read_state = ReadState::from_revision(role.as_ref().map(|role| role.revision));
        reads.add(RecordId::Role(account.cloned(), name.clone()), read_state);
        role
    }

    /// A user's membership in an account.
    pub fn member_record_tracked(
        &self,
        account: &AccountId,
        user: &UserId,
        reads: &mut ReadSet,
    ) -> Option<Arc<AccountMember>> {
        let member = self.member_record(account, user);
        let read_state = ReadState::from_revision(member.as_ref().map(|member| member.revision));
        reads.add(RecordId::Member(account.clone(), user.clone()), read_state);
        member
    }

    /// The record of an account.
    pub fn account_record_tracked(&self, id: &AccountId, reads: &mut ReadSet) -> Option<Arc<Account>> {
        let account = self.account_record(id);
        let read_state = ReadState::from_revision(account.as_ref().map(|account| account.revision));
        reads.add(RecordId::Account(id.clone()), read_state);
        account
    }

    /// Adds everything besides its record that determines what a key is granted in an account.
    fn track_grant_sources(
        &self,
        key: &impl KeyAttributes,
        requested: Option<&AccountId>,
        reads: &mut ReadSet,
    ) {
        let owner = key.owner().account();
        for name in key.roles() {
            self.resolve_role_tracked(owner, name, reads);
        }
        let Some(account) = owner.or(requested) else { return };
        self.account_record_tracked(account, reads);
        let member = key.owner().user().and_then(|user| self.member_record_tracked(account, user, reads));
        if let Some(member) = member {
            self.resolve_role_tracked(Some(account), &member.role, reads);
        }
    }
}

impl Engine {
    /// Authenticates a caller again: returns its key and scopes, or the primary reason why it
    /// may not call. Consumes nothing.
    ///
    /// The read set is filled before the evaluation, which therefore rests on these records or on newer ones. Newer
    /// ones do not match the read set.
    ///
    /// # Errors
    /// As [`Engine::authenticate`]; also if the lease has expired.
    pub fn reauthenticate_tracked(
        &self,
        digest: &TokenDigest,
        account: Option<&AccountId>,
        account_optional: bool,
        peer: Option<IpAddr>,
        reads: &mut ReadSet,
    ) -> Result<Result<(KeyRef, ScopeSet), Reason>, CheckError> {
        let revision = self.index.revision().ok_or(CheckError::Starting)?;
        if let Some(found) = self.index.find_by_digest(digest) {
            reads.add(RecordId::Key(found.key.id()), ReadState::UnchangedSince(revision));
            self.index.track_grant_sources(&found.key, account, reads);
        }
        let evaluation = self.lease.with_validity(
            || self.clock.boottime(),
            |has_valid_lease| {
                self.evaluate_caller_digest(digest, account, account_optional, peer, has_valid_lease)
            },
        )?;
        let evaluation = match evaluation {
            Ok(evaluation) if evaluation.failures.primary_reason() == Reason::Ok => evaluation,
            Ok(evaluation) => return Ok(Err(evaluation.failures.primary_reason())),
            Err(reason) => return Ok(Err(reason)),
        };
        if !evaluation.has_valid_lease {
            return Err(CheckError::LeaseLost);
        }
        let (key, secret_version) = (evaluation.found_key.key, evaluation.found_key.secret_version);
        let superseded_at =
            key.secret_expiries().find(|(of, _)| *of == secret_version).and_then(|(_, end)| end);
        [key.expires_at(), superseded_at].into_iter().flatten().for_each(|end| reads.limit_until(end));
        Ok(Ok((key, evaluation.granted_scopes)))
    }

    /// Returns whether the account of a caller with a certificate exists and is not suspended.
    ///
    /// # Errors
    /// The first snapshot is not loaded, or the lease has expired.
    pub fn is_certificate_account_active_tracked(
        &self,
        identity: &CertificateIdentity,
        reads: &mut ReadSet,
    ) -> Result<bool, CheckError> {
        self.index.account_record_tracked(identity.account(), reads);
        let status = self.account_status(identity.account())?;
        if status.is_active && !status.has_valid_lease {
            Err(CheckError::LeaseLost)
        } else {
            Ok(status.is_active)
        }
    }

    /// The key of a token whose possession counts as proof, in any state of the key. A superseded token proves nothing
    /// unless its key is revoked.
    ///
    /// # Errors
    /// As [`Engine::find_key_by_token`].
    pub fn find_possessed_key(&self, digest: &TokenDigest) -> Result<Option<KeyMatch>, CheckError> {
        let proves_possession = |key_match: &KeyMatch| {
            key_match.key.is_revoked()
                || !key_match.key.is_secret_superseded(key_match.secret_version, self.clock.now())
        };
        Ok(self.find_key_by_digest(Some(digest))?.filter(proves_possession))
    }
}
