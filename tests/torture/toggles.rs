//! Lives in which something is taken away and given back: a key is disabled, loses a scope, its role does, its account
//! is suspended.

use keyward::pb;

use crate::{
    judge::GateId,
    lives::{ACCOUNT, Made, READ, Squad, WRITE, key},
    owner::{Done, GaveUp, Reply, Step, sending},
};

/// A change that can be undone.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Toggle {
    Disable,
    Scopes,
    Role,
    Suspend,
}

/// What a life of this kind is about.
struct Subject {
    toggle: Toggle,
    gate: GateId,
    account: String,
    role: String,
    key: String,
}

impl Squad {
    /// Takes something away and gives it back, a few times.
    pub(crate) async fn toggled(&mut self, toggle: Toggle) -> Result<(), GaveUp> {
        let (subject, made) = self.subject(toggle).await?;
        let revocation = self.gate("the key");
        let id = self.owner.field.history().token(&made.id, made.revision, &[revocation, subject.gate]);
        let asked = self.show(id, &made, None);
        for _ in 0..=self.owner.dice.below(3) {
            self.owner.linger(0, 150).await;
            self.turn(&subject, true).await?;
            self.owner.linger(20, 300).await;
            // What an attempt that got lost may yet give back shows nothing any more.
            if self.turn(&subject, false).await? {
                break;
            }
        }
        self.owner.linger(0, 150).await;
        self.revoke(&made.id, revocation).await?;
        self.bury(asked).await;
        Ok(())
    }

    /// A key of an account that may be asked about.
    async fn subject(&mut self, toggle: Toggle) -> Result<(Subject, Made), GaveUp> {
        let what = match toggle {
            Toggle::Disable => "the key's being enabled",
            Toggle::Scopes => "the key's scopes",
            Toggle::Role => "the role's scopes",
            Toggle::Suspend => "the account",
        };
        let gate = self.gate(what);
        let own = self.name("torture");
        let account = if matches!(toggle, Toggle::Suspend) { own.clone() } else { ACCOUNT.to_owned() };
        let mut subject = Subject { toggle, gate, account, role: own, key: String::new() };
        let request = match toggle {
            Toggle::Role => {
                // An attempt that got lost may give it its scopes again whenever the replica that has it goes on.
                if self.put_role(&subject, &[READ, WRITE], None).await? {
                    return Err(GaveUp);
                }
                key(&subject.account, &[], &[&subject.role])
            }
            Toggle::Suspend => {
                self.make_account(&subject.account).await?;
                key(&subject.account, &[WRITE], &[])
            }
            Toggle::Disable | Toggle::Scopes => key(&subject.account, &[READ, WRITE], &[]),
        };
        let made = self.create(request).await?;
        self.expect(&made.id, None);
        subject.key.clone_from(&made.id);
        Ok((subject, made))
    }

    /// Takes it away, or gives it back; whether an attempt got lost on the way.
    async fn turn(&mut self, subject: &Subject, away: bool) -> Result<bool, GaveUp> {
        let change = Some((subject.gate, away));
        let (id, account) = (&subject.key, &subject.account);
        match (subject.toggle, away) {
            (Toggle::Disable, true) => {
                let step = Step { call: "Disable", action: "key.disabled", subject: id, gate: change };
                let request = pb::DisableKeyRequest { id: id.clone() };
                told(self.owner.until_ok(step, sending!(keys.disable(request))).await)
            }
            (Toggle::Disable, false) => {
                let step = Step { call: "Enable", action: "key.enabled", subject: id, gate: change };
                let request = pb::EnableKeyRequest { id: id.clone() };
                told(self.owner.until_ok(step, sending!(keys.enable(request))).await)
            }
            (Toggle::Scopes, _) => {
                let step = Step { call: "Update", action: "key.updated", subject: id, gate: change };
                let scopes: &[&str] = if away { &[READ] } else { &[READ, WRITE] };
                let update_mask = Some(prost_types::FieldMask { paths: vec!["scopes".to_owned()] });
                let key = Some(pb::Key { id: id.clone(), ..with_scopes(scopes) });
                let request = pb::UpdateKeyRequest { key, update_mask };
                told(self.owner.until_ok(step, sending!(keys.update(request))).await)
            }
            (Toggle::Role, _) => {
                let scopes: &[&str] = if away { &[READ] } else { &[READ, WRITE] };
                self.put_role(subject, scopes, change).await
            }
            (Toggle::Suspend, true) => {
                let step =
                    Step { call: "Suspend", action: "account.suspended", subject: account, gate: change };
                let request = pb::SuspendAccountRequest { id: account.clone() };
                told(self.owner.until_ok(step, sending!(accounts.suspend(request))).await)
            }
            (Toggle::Suspend, false) => {
                let step = Step { call: "Resume", action: "account.resumed", subject: account, gate: change };
                let request = pb::ResumeAccountRequest { id: account.clone() };
                told(self.owner.until_ok(step, sending!(accounts.resume(request))).await)
            }
        }
    }

    async fn put_role(
        &mut self,
        subject: &Subject,
        scopes: &[&str],
        gate: Option<(GateId, bool)>,
    ) -> Result<bool, GaveUp> {
        let step = Step { call: "PutRole", action: "role.put", subject: &subject.account, gate };
        let request = pb::PutRoleRequest {
            account: subject.account.clone(),
            name: subject.role.clone(),
            scopes: with_scopes(scopes).scopes,
        };
        told(self.owner.until_ok(step, sending!(accounts.put_role(request))).await)
    }
}

/// Whether an attempt got lost.
fn told<T: Reply>(result: Result<Done<T>, GaveUp>) -> Result<bool, GaveUp> {
    result.map(|done| done.doubtful)
}

fn with_scopes(scopes: &[&str]) -> pb::Key {
    pb::Key { scopes: scopes.iter().map(|&scope| scope.to_owned()).collect(), ..Default::default() }
}
