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
        let seen = ReadState::from_revision(role.as_ref().map(|role| role.revision));
        reads.add(RecordId::Role(account.cloned(), name.clone()), seen);
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
        let seen = ReadState::from_revision(member.as_ref().map(|member| member.revision));
        reads.add(RecordId::Member(account.clone(), user.clone()), seen);
        member
    }

    /// An account.
    pub fn account_record_tracked(&self, id: &AccountId, reads: &mut ReadSet) -> Option<Arc<Account>> {
        let account = self.account_record(id);
        let seen = ReadState::from_revision(account.as_ref().map(|account| account.revision));
        reads.add(RecordId::Account(id.clone()), seen);
        account
    }

    /// Everything besides its record that decides what a key is granted in an account.
    fn track_grant_sources(&self, key: &impl KeyAttributes, asked: Option<&AccountId>, reads: &mut ReadSet) {
        let owner = key.owner().account();
        for name in key.roles() {
            self.resolve_role_tracked(owner, name, reads);
        }
        let Some(account) = owner.or(asked) else { return };
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
        let judged = self.lease.with_validity(
            || self.clock.boottime(),
            |fresh| self.evaluate_caller_digest(digest, account, anywhere, peer, fresh),
        )?;
        let judged = match judged {
            Ok(judged) if judged.failures.primary_reason() == Reason::Ok => judged,
            Ok(judged) => return Ok(Err(judged.failures.primary_reason())),
            Err(reason) => return Ok(Err(reason)),
        };
        if !judged.has_valid_lease {
            return Err(CheckError::LeaseLost);
        }
        let (key, version) = (judged.found_key.key, judged.found_key.secret_version);
        let superseded = key.secret_expiries().find(|(of, _)| *of == version).and_then(|(_, end)| end);
        [key.expires_at(), superseded].into_iter().flatten().for_each(|end| reads.limit_until(end));
        Ok(Ok((key, judged.granted_scopes)))
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
        let vouched = self.account_status(identity.account())?;
        if vouched.is_active && !vouched.has_valid_lease {
            Err(CheckError::LeaseLost)
        } else {
            Ok(vouched.is_active)
        }
    }

    /// The key of a living token, in whatever state that key is. A superseded token proves nothing, unless its key is
    /// revoked.
    ///
    /// # Errors
    /// As [`Engine::lookup`].
    pub fn find_possessed_key(&self, digest: &TokenDigest) -> Result<Option<KeyMatch>, CheckError> {
        let living = |holder: &KeyMatch| {
            holder.key.is_revoked()
                || !holder.key.is_secret_superseded(holder.secret_version, self.clock.now())
        };
        Ok(self.find_key_by_digest(Some(digest))?.filter(living))
    }
}
