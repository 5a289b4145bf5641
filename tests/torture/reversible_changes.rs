//! Lives in which something is taken away and given back: a key is disabled, loses a scope, its role does, its account
//! is suspended.

use keyward::pb;

use crate::{
    change_driver::{AbandonedChange, ChangeReply, ChangeStep, ConfirmedChange, sending},
    judge::GateId,
    key_lives::{ACCOUNT, CreatedKey, KeyOwnerWorker, READ, WRITE, key},
};

/// A change that can be undone.
#[derive(Clone, Copy, Debug)]
pub(crate) enum ReversibleChange {
    Disable,
    Scopes,
    Role,
    Suspend,
}

/// What a life of this kind is about.
struct ReversibleSubject {
    toggle: ReversibleChange,
    gate: GateId,
    account: String,
    role: String,
    key: String,
}

impl KeyOwnerWorker {
    /// Takes something away and gives it back, a few times.
    pub(crate) async fn live_with_reversible_change(
        &mut self,
        toggle: ReversibleChange,
    ) -> Result<(), AbandonedChange> {
        let (subject, made) = self.subject(toggle).await?;
        let revocation = self.gate("the key");
        let id = self.owner.field.history().new_token(&made.id, made.revision, &[revocation, subject.gate]);
        let asked = self.publish_target(id, &made, None);
        for _ in 0..=self.owner.dice.below(3) {
            self.owner.sleep_random_ms(0, 150).await;
            self.apply_or_revert(&subject, true).await?;
            self.owner.sleep_random_ms(20, 300).await;
            // What an attempt that got lost may yet give back shows nothing any more.
            if self.apply_or_revert(&subject, false).await? {
                break;
            }
        }
        self.owner.sleep_random_ms(0, 150).await;
        self.revoke(&made.id, revocation).await?;
        self.retire(asked).await;
        Ok(())
    }

    /// A key of an account that may be asked about.
    async fn subject(
        &mut self,
        toggle: ReversibleChange,
    ) -> Result<(ReversibleSubject, CreatedKey), AbandonedChange> {
        let what = match toggle {
            ReversibleChange::Disable => "the key's being enabled",
            ReversibleChange::Scopes => "the key's scopes",
            ReversibleChange::Role => "the role's scopes",
            ReversibleChange::Suspend => "the account",
        };
        let gate = self.gate(what);
        let own = self.name("torture");
        let account =
            if matches!(toggle, ReversibleChange::Suspend) { own.clone() } else { ACCOUNT.to_owned() };
        let mut subject = ReversibleSubject { toggle, gate, account, role: own, key: String::new() };
        let request = match toggle {
            ReversibleChange::Role => {
                // An attempt that got lost may give it its scopes again whenever the replica that has it goes on.
                if self.put_role(&subject, &[READ, WRITE], None).await? {
                    return Err(AbandonedChange);
                }
                key(&subject.account, &[], &[&subject.role])
            }
            ReversibleChange::Suspend => {
                self.make_account(&subject.account).await?;
                key(&subject.account, &[WRITE], &[])
            }
            ReversibleChange::Disable | ReversibleChange::Scopes => {
                key(&subject.account, &[READ, WRITE], &[])
            }
        };
        let made = self.create(request).await?;
        self.expect(&made.id, None);
        subject.key.clone_from(&made.id);
        Ok((subject, made))
    }

    /// Takes it away, or gives it back; whether an attempt got lost on the way.
    async fn apply_or_revert(
        &mut self,
        subject: &ReversibleSubject,
        away: bool,
    ) -> Result<bool, AbandonedChange> {
        let change = Some((subject.gate, away));
        let (id, account) = (&subject.key, &subject.account);
        match (subject.toggle, away) {
            (ReversibleChange::Disable, true) => {
                let step = ChangeStep { call: "Disable", action: "key.disabled", subject: id, gate: change };
                let request = pb::DisableKeyRequest { id: id.clone() };
                is_doubtful(self.owner.retry_until_ok(step, sending!(keys.disable(request))).await)
            }
            (ReversibleChange::Disable, false) => {
                let step = ChangeStep { call: "Enable", action: "key.enabled", subject: id, gate: change };
                let request = pb::EnableKeyRequest { id: id.clone() };
                is_doubtful(self.owner.retry_until_ok(step, sending!(keys.enable(request))).await)
            }
            (ReversibleChange::Scopes, _) => {
                let step = ChangeStep { call: "Update", action: "key.updated", subject: id, gate: change };
                let scopes: &[&str] = if away { &[READ] } else { &[READ, WRITE] };
                let update_mask = Some(prost_types::FieldMask { paths: vec!["scopes".to_owned()] });
                let key = Some(pb::Key { id: id.clone(), ..with_scopes(scopes) });
                let request = pb::UpdateKeyRequest { key, update_mask };
                is_doubtful(self.owner.retry_until_ok(step, sending!(keys.update(request))).await)
            }
            (ReversibleChange::Role, _) => {
                let scopes: &[&str] = if away { &[READ] } else { &[READ, WRITE] };
                self.put_role(subject, scopes, change).await
            }
            (ReversibleChange::Suspend, true) => {
                let step = ChangeStep {
                    call: "Suspend",
                    action: "account.suspended",
                    subject: account,
                    gate: change,
                };
                let request = pb::SuspendAccountRequest { id: account.clone() };
                is_doubtful(self.owner.retry_until_ok(step, sending!(accounts.suspend(request))).await)
            }
            (ReversibleChange::Suspend, false) => {
                let step =
                    ChangeStep { call: "Resume", action: "account.resumed", subject: account, gate: change };
                let request = pb::ResumeAccountRequest { id: account.clone() };
                is_doubtful(self.owner.retry_until_ok(step, sending!(accounts.resume(request))).await)
            }
        }
    }

    async fn put_role(
        &mut self,
        subject: &ReversibleSubject,
        scopes: &[&str],
        gate: Option<(GateId, bool)>,
    ) -> Result<bool, AbandonedChange> {
        let step = ChangeStep { call: "PutRole", action: "role.put", subject: &subject.account, gate };
        let request = pb::PutRoleRequest {
            account: subject.account.clone(),
            name: subject.role.clone(),
            scopes: with_scopes(scopes).scopes,
        };
        is_doubtful(self.owner.retry_until_ok(step, sending!(accounts.put_role(request))).await)
    }
}

/// Whether an attempt got lost.
fn is_doubtful<T: ChangeReply>(
    result: Result<ConfirmedChange<T>, AbandonedChange>,
) -> Result<bool, AbandonedChange> {
    result.map(|done| done.doubtful)
}

fn with_scopes(scopes: &[&str]) -> pb::Key {
    pb::Key { scopes: scopes.iter().map(|&scope| scope.to_owned()).collect(), ..Default::default() }
}
