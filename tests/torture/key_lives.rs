//! The lives of keys: each is made, asked about while something narrows what it may do, and buried.

use std::sync::Arc;

use keyward::pb;

use crate::{
    change_driver::{AbandonedChange, ChangeDriver, ChangeStep, ConfirmedChange, sending},
    checkers::CheckTargets,
    judge::{AcknowledgedChange, GateId, TokenId},
    reversible_changes::ReversibleChange,
    shared_state::{CheckTarget, RunRecords},
};

/// The account of most keys.
pub(crate) const ACCOUNT: &str = "acme";
/// A role with every scope that is asked for; nobody changes it.
pub(crate) const EVERYTHING: &str = "everything";
pub(crate) const READ: &str = "monitors:read";
pub(crate) const WRITE: &str = "monitors:write";
pub(crate) const PRODUCTION: &str = "production";

/// An owner and those who ask about what it owns.
pub(crate) struct KeyOwnerWorker {
    pub(crate) owner: ChangeDriver,
    pub(crate) board: Arc<CheckTargets>,
    pub(crate) number: usize,
    pub(crate) lives: u64,
}

/// A key that was made.
pub(crate) struct CreatedKey {
    pub(crate) id: String,
    pub(crate) token: String,
    pub(crate) revision: u64,
}

impl KeyOwnerWorker {
    /// Lives until the run is over.
    pub(crate) async fn run_lives(mut self) {
        while !self.owner.field.is_stopping() {
            self.lives += 1;
            // A life that was given up leaves a key behind that nobody asks about any more.
            let _ = match self.owner.dice.below(100) {
                0..45 => self.live_until_revoked().await,
                45..60 => self.live_until_rotated().await,
                60..70 => self.live_with_reversible_change(ReversibleChange::Disable).await,
                70..76 => self.live_with_reversible_change(ReversibleChange::Scopes).await,
                76..83 => self.live_with_reversible_change(ReversibleChange::Role).await,
                83..92 => self.live_until_member_removed().await,
                _ => self.live_with_reversible_change(ReversibleChange::Suspend).await,
            };
            self.board.hot[self.number].store(None);
        }
    }

    /// A name that no other life has.
    pub(crate) fn name(&self, what: &str) -> String {
        format!("{what}-{}-{}", self.number, self.lives)
    }

    /// Checks ask about it from now on.
    pub(crate) fn publish_target(
        &self,
        id: TokenId,
        made: &CreatedKey,
        account: Option<&str>,
    ) -> Arc<CheckTarget> {
        let asked = Arc::new(CheckTarget {
            id,
            key: made.id.clone(),
            token: made.token.clone(),
            environment: PRODUCTION,
            scope: WRITE,
            account: account.map(str::to_owned),
            since: made.revision,
        });
        self.board.hot[self.number].store(Some(asked.clone()));
        asked
    }

    pub(crate) fn gate(&self, what: &'static str) -> GateId {
        self.owner.field.history().new_gate(what)
    }

    fn books(&self, note: impl FnOnce(&mut RunRecords)) {
        note(&mut self.owner.field.records());
    }

    /// How this key must be found at the end, if it is one of those that are looked for.
    pub(crate) fn expect(&self, key: &str, state: Option<pb::KeyState>) {
        self.books(|books| {
            books.keys.entry(key.to_owned()).and_modify(|expected| *expected = state);
        });
    }

    /// Makes a key of an account; what may go wrong with its creation is of no interest afterwards.
    pub(crate) async fn create(
        &mut self,
        request: pb::CreateKeyRequest,
    ) -> Result<CreatedKey, AbandonedChange> {
        let step = ChangeStep { call: "Create", action: "key.created", subject: "", gate: None };
        let send = sending!(keys.create(request));
        let ConfirmedChange { reply, .. } = self.owner.retry_until_ok(step, send).await?;
        let pb::CreateKeyResponse { key, token, revision, .. } = reply;
        let id = key.expect("a key").id;
        self.books(|books| {
            let acknowledged = AcknowledgedChange { revision, action: "key.created", subject: id.clone() };
            books.acknowledged.push(acknowledged);
        });
        if request.user.is_empty() && request.account == ACCOUNT {
            self.books(|books| {
                books.keys.insert(id.clone(), Some(pb::KeyState::Active));
            });
        }
        Ok(CreatedKey { id, token, revision })
    }

    /// Revokes a key, as many times as it takes.
    pub(crate) async fn revoke(&mut self, id: &str, gate: GateId) -> Result<(), AbandonedChange> {
        let step =
            ChangeStep { call: "Revoke", action: "key.revoked", subject: id, gate: Some((gate, true)) };
        let request = pb::RevokeKeyRequest { id: id.to_owned(), ..Default::default() };
        self.expect(id, None);
        let send = sending!(keys.revoke(request));
        self.owner.retry_until_ok::<pb::RevokeKeyResponse, _>(step, send).await?;
        self.expect(id, Some(pb::KeyState::Revoked));
        Ok(())
    }

    /// Asked about for a while, it is buried.
    pub(crate) async fn retire(&mut self, asked: Arc<CheckTarget>) {
        self.owner.sleep_random_ms(20, 500).await;
        self.board.retire(asked);
    }

    async fn live_until_revoked(&mut self) -> Result<(), AbandonedChange> {
        let made = self.create(key(ACCOUNT, &[WRITE], &[])).await?;
        let revocation = self.gate("the key");
        let id = self.owner.field.history().new_token(&made.id, made.revision, &[revocation]);
        let asked = self.publish_target(id, &made, None);
        self.owner.sleep_random_ms(0, 200).await;
        self.revoke(&made.id, revocation).await?;
        self.retire(asked).await;
        Ok(())
    }

    async fn live_until_rotated(&mut self) -> Result<(), AbandonedChange> {
        let mut made = self.create(key(ACCOUNT, &[WRITE], &[])).await?;
        let revocation = self.gate("the key");
        let mut doubtful = false;
        for _ in 0..=self.owner.dice.below(3) {
            let secret = self.gate("the secret");
            if doubtful {
                self.owner.field.history().mark_doubtful(secret);
            }
            let id = self.owner.field.history().new_token(&made.id, made.revision, &[revocation, secret]);
            let asked = self.publish_target(id, &made, None);
            self.owner.sleep_random_ms(0, 200).await;
            let done = self.rotate(&made.id, secret).await?;
            doubtful |= done.doubtful;
            self.retire(asked).await;
            made = CreatedKey { token: done.reply.token, revision: done.reply.revision, ..made };
        }
        self.revoke(&made.id, revocation).await
    }

    async fn rotate(
        &mut self,
        id: &str,
        gate: GateId,
    ) -> Result<ConfirmedChange<pb::RotateKeyResponse>, AbandonedChange> {
        let step =
            ChangeStep { call: "Rotate", action: "key.rotated", subject: id, gate: Some((gate, true)) };
        let request = pb::RotateKeyRequest { id: id.to_owned(), ..Default::default() };
        let send = sending!(keys.rotate(request));
        self.owner.retry_until_ok(step, send).await
    }

    /// A user's key, whose user leaves the account.
    async fn live_until_member_removed(&mut self) -> Result<(), AbandonedChange> {
        let user = self.name("user");
        let put = pb::PutMemberRequest {
            account: ACCOUNT.to_owned(),
            user: user.clone(),
            role: EVERYTHING.to_owned(),
        };
        let step = ChangeStep { call: "PutMember", action: "member.put", subject: ACCOUNT, gate: None };
        let send = sending!(accounts.put_member(put));
        // An attempt that got lost may make the member again whenever the replica that has it goes on.
        if self.owner.retry_until_ok::<pb::PutMemberResponse, _>(step, send).await?.doubtful {
            return Err(AbandonedChange);
        }
        let request =
            pb::CreateKeyRequest { account: String::new(), user: user.clone(), ..key("", &["all"], &[]) };
        let made = self.create(request).await?;
        let membership = self.gate("the membership");
        let id = self.owner.field.history().new_token(&made.id, made.revision, &[membership]);
        let asked = self.publish_target(id, &made, Some(ACCOUNT));
        self.owner.sleep_random_ms(0, 200).await;
        let remove = pb::RemoveMemberRequest { account: ACCOUNT.to_owned(), user: user.clone() };
        // The revision in the answer is that of the user's last key's revocation, which follows from the removal.
        let step = ChangeStep {
            call: "RemoveMember",
            action: "key.revoked",
            subject: &user,
            gate: Some((membership, true)),
        };
        let send = sending!(accounts.remove_member(remove));
        self.owner.retry_until_ok::<pb::RemoveMemberResponse, _>(step, send).await?;
        self.retire(asked).await;
        Ok(())
    }

    pub(crate) async fn make_account(&mut self, id: &str) -> Result<(), AbandonedChange> {
        let step = ChangeStep { call: "Create account", action: "account.created", subject: id, gate: None };
        let request = pb::CreateAccountRequest { id: id.to_owned(), ..Default::default() };
        let send = sending!(accounts.create(request));
        self.owner.retry_until_ok::<pb::CreateAccountResponse, _>(step, send).await.map(|_| ())
    }
}

/// A key in production.
pub(crate) fn key(account: &str, scopes: &[&str], roles: &[&str]) -> pb::CreateKeyRequest {
    let texts = |list: &[&str]| list.iter().map(|&text| text.to_owned()).collect();
    pb::CreateKeyRequest {
        account: account.to_owned(),
        environment: PRODUCTION.to_owned(),
        scopes: texts(scopes),
        roles: texts(roles),
        ..Default::default()
    }
}
