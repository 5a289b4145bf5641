//! What becomes of a batch, decided from facts: what the tables say of everything that its writes touch. No SQL and
//! no waiting here, so that a database is asked a few times for a batch, and not a few times for each write of it.

use std::collections::{BTreeSet, HashMap, HashSet};

use crate::domain::{
    key::{Key, Owner, Secret},
    log::Change,
    log_format::LogFormat,
    name::{AccountId, IdempotencyKey, KeyId, KeyName, RoleName, UserId},
    time::{Revision, Timestamp},
    token::Digest,
};

use super::{
    Committed, Head, IDEMPOTENCY_WINDOW, Idempotency, Outcome, ReadSet, RecordId, Rejection, Write,
    log_fence::LogFence,
    rows::secret_sum,
    tally::{Tally, counted_for, limits_of},
};

type Verdict = Result<(), Rejection>;

/// A role's place: its account, or none for a global one.
pub(super) type RolePlace = (Option<AccountId>, RoleName);

/// The record that a write is about.
#[derive(PartialEq, Eq, Hash)]
enum Record<'w> {
    Key(KeyId),
    Account(&'w AccountId),
    Role(Option<&'w AccountId>, &'w RoleName),
    Member(&'w AccountId, &'w UserId),
}

impl<'w> Record<'w> {
    fn of(change: &'w Change) -> Self {
        match change {
            Change::Key(key) => Record::Key(key.id),
            Change::Account(account) => Record::Account(&account.id),
            Change::Role(role) | Change::RoleDeleted(role) => Record::Role(role.account.as_ref(), &role.name),
            Change::Member(member) | Change::MemberRemoved(member) => {
                Record::Member(&member.account, &member.user)
            }
        }
    }
}

/// Cuts a batch into runs that can be decided and written in one go each: no record comes twice in a run, so its
/// rows can be written in any one statement; and a role is deleted alone, since who uses it is counted in the
/// tables.
pub(super) fn runs(batch: &[Write]) -> Vec<&[Write]> {
    let mut runs = Vec::new();
    let (mut start, mut seen) = (0, HashSet::new());
    for (at, write) in batch.iter().enumerate() {
        let alone = |write: &Write| matches!(write.change, Change::RoleDeleted(_));
        let record = Record::of(&write.change);
        let cut = at > start && (alone(write) || alone(&batch[at - 1]) || seen.contains(&record));
        if cut {
            runs.push(&batch[start..at]);
            start = at;
            seen.clear();
        }
        seen.insert(record);
    }
    if start < batch.len() {
        runs.push(&batch[start..]);
    }
    runs
}

/// What must be known to decide a run.
#[derive(Debug, Default)]
pub(super) struct Questions {
    pub(super) requests: BTreeSet<(KeyId, IdempotencyKey)>,
    pub(super) keys: BTreeSet<KeyId>,
    /// Names in their normalized form, in which they are unique.
    pub(super) names: BTreeSet<(Owner, KeyName)>,
    pub(super) digests: BTreeSet<Digest>,
    /// Secrets that left their key's record.
    pub(super) left: BTreeSet<(KeyId, u32)>,
    pub(super) accounts: BTreeSet<AccountId>,
    /// Case-folded ids of accounts to be created.
    pub(super) folded_accounts: BTreeSet<String>,
    pub(super) roles: BTreeSet<RolePlace>,
    pub(super) members: BTreeSet<(AccountId, UserId)>,
    /// The role to be deleted, whose uses are to be counted.
    pub(super) uses_of: Option<RolePlace>,
    /// Accounts and users that are held to limits.
    pub(super) tallies: BTreeSet<Owner>,
    /// Accounts that get a role, and are held to limits.
    pub(super) role_counts: BTreeSet<AccountId>,
    /// The format of the log entries, if an older release cannot read them.
    pub(super) log_format: Option<LogFormat>,
}

impl Questions {
    pub(super) fn of(run: &[Write]) -> Questions {
        let mut asked = Questions { log_format: LogFence::format(run), ..Questions::default() };
        for write in run {
            if let Some(request) = &write.idempotency {
                asked.requests.insert((request.caller, request.key.clone()));
            }
            asked.about(&write.change);
            if let (Change::Account(account), None) = (&write.change, write.expect) {
                asked.folded_accounts.insert(account.id.case_folded());
            }
            write.reads.iter().for_each(|(place, _)| asked.about_read(place));
            if let Some((_, owner)) = limits_of(write) {
                if let (Change::Role(_), None, Some(account)) = (&write.change, write.expect, owner.account())
                {
                    asked.role_counts.insert(account.clone());
                }
                asked.tallies.insert(owner);
            }
        }
        asked
    }

    /// The writes of a batch have many reads in common: each is copied once.
    fn about_read(&mut self, place: &RecordId) {
        match place {
            RecordId::Key(id) => {
                self.keys.insert(*id);
            }
            RecordId::Account(id) => {
                if !self.accounts.contains(id) {
                    self.accounts.insert(id.clone());
                }
            }
            RecordId::Role(account, name) => {
                self.roles.insert((account.clone(), name.clone()));
            }
            RecordId::Member(account, user) => {
                self.members.insert((account.clone(), user.clone()));
            }
        }
    }

    fn about(&mut self, change: &Change) {
        match change {
            Change::Key(key) => self.about_key(key),
            Change::Account(account) => {
                self.accounts.insert(account.id.clone());
            }
            Change::Role(role) => {
                self.roles.insert((role.account.clone(), role.name.clone()));
            }
            Change::RoleDeleted(role) => {
                self.roles.insert((role.account.clone(), role.name.clone()));
                self.uses_of = Some((role.account.clone(), role.name.clone()));
            }
            Change::Member(member) | Change::MemberRemoved(member) => {
                self.members.insert((member.account.clone(), member.user.clone()));
                self.role_of(Some(&member.account), &member.role);
            }
        }
    }

    fn about_key(&mut self, key: &Key) {
        self.keys.insert(key.id);
        self.digests.extend(key.secrets.iter().map(|secret| secret.digest));
        self.left.extend(left_version(key).map(|version| (key.id, version)));
        if key.revocation.is_none() {
            self.names.extend(key.terms.name.as_ref().map(|name| (key.owner.clone(), name.normalized())));
            for role in &key.terms.roles {
                self.role_of(key.owner.account(), role);
            }
        }
    }

    fn role_of(&mut self, account: Option<&AccountId>, role: &RoleName) {
        self.roles.insert((account.cloned(), role.clone()));
        self.roles.insert((None, role.clone()));
    }
}

/// The version that left the record when its newest secret was made.
fn left_version(key: &Key) -> Option<u32> {
    match key.secrets.as_slice() {
        [_, .., oldest] if oldest.version > 1 => Some(oldest.version - 1),
        _ => None,
    }
}

/// What is known of an idempotency key.
#[derive(Debug)]
pub(super) struct Request {
    pub(super) key_id: KeyId,
    pub(super) fingerprint: [u8; 32],
    pub(super) created_at: Timestamp,
}

/// A secret that the tables hold: whose it is, and when its row says that it ends, with that row's checksum. None = it was
/// written in this run.
#[derive(Debug)]
pub(super) struct Held {
    pub(super) key_id: KeyId,
    pub(super) version: u32,
    pub(super) row: Option<(Option<Timestamp>, i64)>,
}

impl Held {
    fn is(&self, key_id: KeyId, version: u32) -> bool {
        (self.key_id, self.version) == (key_id, version)
    }
}

/// An unrevoked key that has a name, and the spelling in its row.
#[derive(Debug)]
pub(super) struct NameHolder {
    pub(super) key_id: KeyId,
    pub(super) stored: KeyName,
}

/// The answers to [`Questions`]. What is not in a map is not in the tables.
#[derive(Debug, Default)]
pub(super) struct Facts {
    pub(super) requests: HashMap<(KeyId, IdempotencyKey), Request>,
    pub(super) keys: HashMap<KeyId, Revision>,
    /// Which unrevoked keys have a name, by its normalized form. Releases that did not normalize names may have left
    /// several.
    pub(super) names: HashMap<(Owner, KeyName), Vec<NameHolder>>,
    pub(super) digests: HashMap<Digest, Held>,
    pub(super) left: HashMap<KeyId, Secret>,
    pub(super) accounts: HashMap<AccountId, Revision>,
    /// Accounts by their case-folded ids, as far as [`Questions::folded_accounts`] asks.
    pub(super) folded_accounts: HashMap<String, AccountId>,
    pub(super) roles: HashMap<RolePlace, Revision>,
    pub(super) members: HashMap<(AccountId, UserId), Revision>,
    /// How many unrevoked keys and members use the role to be deleted.
    pub(super) uses: (u64, u64),
    pub(super) tallies: HashMap<Owner, Tally>,
    /// How many roles of its own an account has.
    pub(super) role_counts: HashMap<AccountId, u64>,
    pub(super) fence: LogFence,
}

/// What a run comes to: its outcomes and log rows, and what goes with them.
#[derive(Debug)]
pub(super) struct Plan<'w> {
    pub(super) committed: Committed,
    /// Where the log ends after it.
    pub(super) head: Head,
    /// Secrets of the records whose rows do not say the same already; and those that left their record alive, and end now.
    pub(super) secrets: Vec<(KeyId, Secret)>,
    /// Idempotency keys to be kept, with what was made under them.
    pub(super) requests: Vec<(&'w Idempotency, KeyId, Timestamp)>,
    /// The newest format of the log, if the run raises it.
    pub(super) log_format: Option<LogFormat>,
}

/// Decides a run after `head`, each write in the light of those before it.
pub(super) fn decide<'w>(
    run: &'w [Write],
    mut facts: Facts,
    head: Head,
) -> Result<Plan<'w>, serde_json::Error> {
    let mut plan = Plan {
        committed: Committed::default(),
        head,
        secrets: Vec::new(),
        requests: Vec::new(),
        log_format: None,
    };
    for write in run {
        let outcome = match facts.done_before(write) {
            Some(outcome) => outcome,
            None => {
                let verdict = facts
                    .as_read(&write.reads)
                    .and_then(|()| facts.verdict(&write.change, write.expect))
                    .and_then(|()| facts.fits(write))
                    .and_then(|()| facts.fence.check(write));
                match verdict {
                    Ok(()) => Ok(Outcome::Applied(plan.record(write, &mut facts)?)),
                    Err(rejection) => Err(rejection),
                }
            }
        };
        plan.committed.outcomes.push(outcome);
    }
    Ok(plan)
}

impl<'w> Plan<'w> {
    /// Records an accepted write.
    fn record(&mut self, write: &'w Write, facts: &mut Facts) -> Result<Change, serde_json::Error> {
        let change = write.change.clone().at_revision(self.head.revision.next());
        let row = write.log_row(&change, self.head)?;
        self.head = Head { revision: row.revision, hash: row.hash };
        if let Change::Key(key) = &change {
            let changed = key.secrets.iter().filter(|secret| !facts.says(key.id, secret));
            self.secrets.extend(changed.map(|secret| (key.id, secret.clone())));
            self.secrets.extend(write.expect.and_then(|_| facts.ended(key)));
        }
        if let (Some(request), Some(key_id)) = (&write.idempotency, change.key_id()) {
            let known = Request { key_id, fingerprint: request.fingerprint, created_at: write.at };
            facts.requests.insert((request.caller, request.key.clone()), known);
            self.requests.push((request, key_id, write.at));
        }
        self.log_format = facts.fence.raise(write).or(self.log_format);
        facts.learn(&change);
        if let Some(owner) = counted_for(&change) {
            facts.tallies.entry(owner).or_default().count(write);
        }
        self.committed.rows.push((row, change.clone()));
        Ok(change)
    }
}

fn as_expected(found: Option<&Revision>, expect: Option<Revision>) -> Verdict {
    if found.copied() == expect { Ok(()) } else { Err(Rejection::Conflict) }
}

impl Facts {
    /// What is known of a write's idempotency key.
    fn done_before(&self, write: &Write) -> Option<Result<Outcome, Rejection>> {
        let asked = write.idempotency.as_ref()?;
        let known = self.requests.get(&(asked.caller, asked.key.clone()))?;
        if known.created_at < write.at.minus(IDEMPOTENCY_WINDOW) {
            return None;
        }
        Some(if known.fingerprint == asked.fingerprint {
            Ok(Outcome::Replayed(known.key_id))
        } else {
            Err(Rejection::IdempotencyReused)
        })
    }

    /// Whether every record that the authorization has read is as it was.
    fn as_read(&self, reads: &ReadSet) -> Verdict {
        let moved = reads.iter().any(|(place, seen)| {
            let now = match place {
                RecordId::Key(id) => self.keys.get(id),
                RecordId::Account(id) => self.accounts.get(id),
                RecordId::Role(account, name) => self.roles.get(&(account.clone(), name.clone())),
                RecordId::Member(account, user) => self.members.get(&(account.clone(), user.clone())),
            };
            !seen.matches(now.copied())
        });
        if moved { Err(Rejection::AuthorizationMoved) } else { Ok(()) }
    }

    fn verdict(&self, change: &Change, expect: Option<Revision>) -> Verdict {
        match change {
            Change::Key(key) => self.key_verdict(key, expect),
            Change::Account(account) => {
                as_expected(self.accounts.get(&account.id), expect)?;
                let folded = self.folded_accounts.get(&account.id.case_folded());
                match folded.filter(|known| expect.is_none() && **known != account.id) {
                    Some(known) => Err(Rejection::AccountIdCase(known.clone())),
                    None => Ok(()),
                }
            }
            Change::Role(role) => {
                as_expected(self.roles.get(&(role.account.clone(), role.name.clone())), expect)
            }
            Change::RoleDeleted(role) => {
                as_expected(self.roles.get(&(role.account.clone(), role.name.clone())), expect)?;
                match self.uses {
                    (0, 0) => Ok(()),
                    (keys, members) => Err(Rejection::RoleInUse { keys, members }),
                }
            }
            Change::Member(member) => {
                let place = (member.account.clone(), member.user.clone());
                as_expected(self.members.get(&place), expect)?;
                self.role_exists(Some(&member.account), &member.role)
            }
            Change::MemberRemoved(member) => {
                as_expected(self.members.get(&(member.account.clone(), member.user.clone())), expect)
            }
        }
    }

    /// Whether the account's limits leave room for a write.
    fn fits(&self, write: &Write) -> Verdict {
        let Some((limits, owner)) = limits_of(write) else { return Ok(()) };
        let roles = owner.account().and_then(|account| self.role_counts.get(account));
        let tally = self.tallies.get(&owner).copied().unwrap_or_default();
        tally.fits(write, &limits, roles.copied().unwrap_or(0)).map_err(Rejection::AccountLimit)
    }

    fn key_verdict(&self, key: &Key, expect: Option<Revision>) -> Verdict {
        if key.revocation.is_none() {
            for role in &key.terms.roles {
                self.role_exists(key.owner.account(), role)?;
            }
        }
        as_expected(self.keys.get(&key.id), expect)?;
        let taken = |secret: &Secret| {
            self.digests.get(&secret.digest).is_some_and(|held| !held.is(key.id, secret.version))
        };
        let newest_taken = key.secrets.first().is_some_and(taken);
        // A new key that exists under another id, with the same name, is a duplicate digest.
        if self.name_taken(key) && !(expect.is_none() && newest_taken) {
            return Err(Rejection::NameTaken);
        }
        if key.secrets.iter().any(taken) { Err(Rejection::DigestTaken) } else { Ok(()) }
    }

    /// Whether an account has a role: its own, or a global one.
    fn role_exists(&self, account: Option<&AccountId>, role: &RoleName) -> Verdict {
        let exists = |account: Option<&AccountId>| self.roles.contains_key(&(account.cloned(), role.clone()));
        if exists(account) || exists(None) { Ok(()) } else { Err(Rejection::NoSuchRole) }
    }

    fn name_taken(&self, key: &Key) -> bool {
        let Some(name) = key.terms.name.as_ref().filter(|_| key.revocation.is_none()) else { return false };
        let Some(holders) = self.names.get(&(key.owner.clone(), name.normalized())) else { return false };
        // A key that keeps its name may be changed even if another key has the name too.
        let keeps = holders.iter().any(|holder| holder.key_id == key.id && holder.stored == *name);
        !keeps && holders.iter().any(|holder| holder.key_id != key.id)
    }

    /// Whether the secret's row says the same: all else in it never changes.
    fn says(&self, id: KeyId, secret: &Secret) -> bool {
        self.digests.get(&secret.digest).is_some_and(|held| {
            let row = Some((secret.expires_at, secret_sum(id.as_bytes(), secret)));
            held.is(id, secret.version) && held.row == row
        })
    }

    /// The secret that left the record when the newest was made, ended then if it was alive still.
    fn ended(&self, key: &Key) -> Option<(KeyId, Secret)> {
        let left = self.left.get(&key.id)?;
        let end = key.secrets.first()?.created_at;
        let alive = left_version(key) == Some(left.version) && left.expires_at.is_none_or(|last| last > end);
        alive.then(|| (key.id, Secret { expires_at: Some(end), ..left.clone() }))
    }

    /// What a recorded change makes of the facts.
    fn learn(&mut self, change: &Change) {
        match change {
            Change::Key(key) => self.learn_key(key),
            Change::Account(account) => {
                self.accounts.insert(account.id.clone(), account.revision);
                self.folded_accounts.insert(account.id.case_folded(), account.id.clone());
            }
            Change::Role(role) => {
                let place = (role.account.clone(), role.name.clone());
                let new = self.roles.insert(place, role.revision).is_none();
                if let Some(account) = role.account.clone().filter(|_| new) {
                    *self.role_counts.entry(account).or_default() += 1;
                }
            }
            Change::RoleDeleted(role) => {
                self.roles.remove(&(role.account.clone(), role.name.clone()));
            }
            Change::Member(member) => {
                self.members.insert((member.account.clone(), member.user.clone()), member.revision);
            }
            Change::MemberRemoved(member) => {
                self.members.remove(&(member.account.clone(), member.user.clone()));
            }
        }
    }

    fn learn_key(&mut self, key: &Key) {
        if self.keys.insert(key.id, key.revision).is_some() {
            self.names.values_mut().for_each(|holders| holders.retain(|holder| holder.key_id != key.id));
        }
        self.digests.extend(key.secrets.iter().map(|secret| {
            let held = Held { key_id: key.id, version: secret.version, row: None };
            (secret.digest, held)
        }));
        if let Some(name) = key.terms.name.as_ref().filter(|_| key.revocation.is_none()) {
            let holder = NameHolder { key_id: key.id, stored: name.clone() };
            self.names.entry((key.owner.clone(), name.normalized())).or_default().push(holder);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key_id(number: u8) -> KeyId {
        KeyId::from_bytes([number; 16])
    }

    fn name(text: &str) -> KeyName {
        KeyName::from_stored(text).unwrap()
    }

    /// What the tables say of two keys that an earlier release let have one name in two forms.
    fn collided() -> (Owner, Facts) {
        let owner = Owner::Account(AccountId::parse("acme").unwrap());
        let holders = [(1, "\u{e9}"), (2, "e\u{301}")]
            .map(|(number, form)| NameHolder { key_id: key_id(number), stored: name(form) });
        let mut facts = Facts::default();
        facts.names.insert((owner.clone(), name("\u{e9}")), holders.into());
        (owner, facts)
    }

    #[test]
    fn a_key_keeps_a_name_that_another_has_in_another_form_and_gets_it_no_second_time() {
        let (owner, facts) = collided();
        let taken = |number, form: &str| {
            let mut key = crate::domain::key::tests::sample();
            (key.id, key.owner) = (key_id(number), owner.clone());
            key.terms.name = Some(name(form));
            facts.name_taken(&key)
        };
        assert!(!taken(1, "\u{e9}") && !taken(2, "e\u{301}"), "a key is rotated under the name that it has");
        assert!(taken(1, "e\u{301}") && taken(2, "\u{e9}"), "its new name would be the other's");
        assert!(taken(3, "\u{e9}") && taken(3, "e\u{301}"));
        assert!(!taken(3, "e"));
    }
}
