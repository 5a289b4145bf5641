//! Look-ups for an authorization: what is found goes into a read set, so that the transaction can compare it with the
//! tables. Every look-up is of the record as it is stored, whatever is in doubt: a commit settles doubts first.

use std::{net::IpAddr, sync::Arc};

use crate::{
    domain::{
        account::{Account, Member, Role},
        decision::Reason,
        facts::KeyFacts,
        identity::Identity,
        name::{AccountId, RoleName, UserId},
        scope::ScopeSet,
        token::Digest,
    },
    store::{ReadSet, ReadState, RecordId},
};

use super::{CannotAnswer, Engine, HeldKey, Holder, index::Index};

impl Index {
    /// The role that a name stands for in an account: its own before the global one.
    pub fn read_role(
        &self,
        account: Option<&AccountId>,
        name: &RoleName,
        reads: &mut ReadSet,
    ) -> Option<Arc<Role>> {
        let own = account.and_then(|account| self.read_role_at(Some(account), name, reads));
        own.or_else(|| self.read_role_at(None, name, reads))
    }

    /// The role at exactly this place.
    pub fn read_role_at(
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
    pub fn read_member(
        &self,
        account: &AccountId,
        user: &UserId,
        reads: &mut ReadSet,
    ) -> Option<Arc<Member>> {
        let member = self.member_record(account, user);
        let seen = ReadState::from_revision(member.as_ref().map(|member| member.revision));
        reads.add(RecordId::Member(account.clone(), user.clone()), seen);
        member
    }

    /// An account.
    pub fn read_account(&self, id: &AccountId, reads: &mut ReadSet) -> Option<Arc<Account>> {
        let account = self.account_record(id);
        let seen = ReadState::from_revision(account.as_ref().map(|account| account.revision));
        reads.add(RecordId::Account(id.clone()), seen);
        account
    }

    /// Everything besides its record that decides what a key is granted in an account.
    fn read_subject(&self, key: &impl KeyFacts, asked: Option<&AccountId>, reads: &mut ReadSet) {
        let owner = key.owner().account();
        for name in key.roles() {
            self.read_role(owner, name, reads);
        }
        let Some(account) = owner.or(asked) else { return };
        self.read_account(account, reads);
        let member = key.owner().user().and_then(|user| self.read_member(account, user, reads));
        if let Some(member) = member {
            self.read_role(Some(account), &member.role, reads);
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
    pub fn rejudge(
        &self,
        digest: &Digest,
        account: Option<&AccountId>,
        anywhere: bool,
        peer: Option<IpAddr>,
        reads: &mut ReadSet,
    ) -> Result<Result<(HeldKey, ScopeSet), Reason>, CannotAnswer> {
        let revision = self.index.revision().ok_or(CannotAnswer::Starting)?;
        if let Some(found) = self.index.find(digest) {
            reads.add(RecordId::Key(found.key.id()), ReadState::UnchangedSince(revision));
            self.index.read_subject(&found.key, account, reads);
        }
        let judged = self.lease.check(
            || self.clock.boottime(),
            |fresh| self.judge_digest(digest, account, anywhere, peer, fresh),
        )?;
        let judged = match judged {
            Ok(judged) if judged.failures.first() == Reason::Ok => judged,
            Ok(judged) => return Ok(Err(judged.failures.first())),
            Err(reason) => return Ok(Err(reason)),
        };
        if !judged.fresh {
            return Err(CannotAnswer::LeaseLost);
        }
        let (key, version) = (judged.found.key, judged.found.version);
        let superseded = key.secret_ends().find(|(of, _)| *of == version).and_then(|(_, end)| end);
        [key.expires_at(), superseded].into_iter().flatten().for_each(|end| reads.limit(end));
        Ok(Ok((key, judged.grants)))
    }

    /// Whether the account of a certificate's caller exists and is not suspended.
    ///
    /// # Errors
    /// When the first snapshot is not loaded yet, or the lease has run out.
    pub fn rejudge_certificate(
        &self,
        identity: &Identity,
        reads: &mut ReadSet,
    ) -> Result<bool, CannotAnswer> {
        self.index.read_account(identity.account(), reads);
        let vouched = self.vouch(identity.account())?;
        if vouched.stands && !vouched.fresh { Err(CannotAnswer::LeaseLost) } else { Ok(vouched.stands) }
    }

    /// The key of a living token, in whatever state that key is. A superseded token proves nothing, unless its key is
    /// revoked.
    ///
    /// # Errors
    /// As [`Engine::lookup`].
    pub fn possessor(&self, digest: &Digest) -> Result<Option<Holder>, CannotAnswer> {
        let living = |holder: &Holder| {
            holder.key.is_revoked() || !holder.key.superseded(holder.version, self.clock.now())
        };
        Ok(self.holder_of(Some(digest))?.filter(living))
    }
}
