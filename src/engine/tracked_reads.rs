//! Look-ups for an authorization: what is found goes into a read set, so that the transaction can compare it with the
//! tables. Every look-up is of the record as it is stored, whatever is in doubt: a commit settles doubts first.

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
    /// The role that a name stands for in an account: its own before the global one.
    pub fn resolve_role_tracked(
        &self,
        account: Option<&AccountId>,
        name: &RoleName,
        reads: &mut ReadSet,
    ) -> Option<Arc<Role>> {
        let own = account.and_then(|account| self.role_record_tracked(Some(account), name, reads));
        own.or_else(|| self.role_record_tracked(None, name, reads))
    }

    /// The role at exactly this place.
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

    /// An account.
    pub fn account_record_tracked(&self, id: &AccountId, reads: &mut ReadSet) -> Option<Arc<Account>> {
        let account = self.account_record(id);
        let read_state = ReadState::from_revision(account.as_ref().map(|account| account.revision));
        reads.add(RecordId::Account(id.clone()), read_state);
        account
    }

    /// Everything besides its record that decides what a key is granted in an account.
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
    /// Judges a caller again: its key and what it is granted now, or the first thing that stands against it. Nothing is
    /// charged. The records are read before the judgement, which therefore rests on them or on newer ones; newer ones
    /// do not match the read set.
    ///
    /// # Errors
    /// As [`Engine::authenticate`], and when the lease has run out.
    pub fn reauthenticate_tracked(
        &self,
        digest: &TokenDigest,
        account: Option<&AccountId>,
        anywhere: bool,
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
            |has_valid_lease| self.evaluate_caller_digest(digest, account, anywhere, peer, has_valid_lease),
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

    /// Whether the account of a certificate's caller exists and is not suspended.
    ///
    /// # Errors
    /// When the first snapshot is not loaded yet, or the lease has run out.
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

    /// The key of a living token, in whatever state that key is. A superseded token proves nothing, unless its key is
    /// revoked.
    ///
    /// # Errors
    /// As [`Engine::lookup`].
    pub fn find_possessed_key(&self, digest: &TokenDigest) -> Result<Option<KeyMatch>, CheckError> {
        let proves_possession = |key_match: &KeyMatch| {
            key_match.key.is_revoked()
                || !key_match.key.is_secret_superseded(key_match.secret_version, self.clock.now())
        };
        Ok(self.find_key_by_digest(Some(digest))?.filter(proves_possession))
    }
}
