//! Decides the outcome of a batch from the state of the tables before it.
//!
//! There is no SQL and no waiting here. So a database is asked a few times per batch, not a few times per write.

use std::collections::{BTreeSet, HashMap, HashSet};

use crate::domain::{
    key::{ApiKey, KeyOwner, KeySecret},
    log::{GENESIS_HASH, LogEntry, RecordChange},
    log_format::LogFormat,
    log_payload::{self, ChangeOrigin},
    name::{AccountId, IdempotencyKey, KeyId, KeyName, RoleName, UserId},
    time::{Revision, Timestamp},
    token::TokenDigest,
};

use super::{
    CommittedBatch, IDEMPOTENCY_WINDOW, IdempotentRequest, LogHead, ReadSet, RecordId, WriteOutcome,
    WriteRejection, WriteRequest,
    log_fence::LogFence,
    owner_tally::{OwnerTally, applicable_limits, counted_owner},
    row_format::secret_checksum,
};

/// The log entry of this write after `head`; `change` has its new revision.
fn to_log_entry(
    write: &WriteRequest,
    change: &RecordChange,
    head: LogHead,
) -> Result<LogEntry, serde_json::Error> {
    let origin = ChangeOrigin {
        previous: Some(write.expected_revision.unwrap_or_default()),
        ..write.actor.origin.clone()
    };
    let mut row = LogEntry {
        revision: head.revision.next(),
        at: write.at,
        action: write.action.as_str().to_owned(),
        account: change.account_id().cloned(),
        key_id: change.key_id(),
        user: change.user_id().cloned(),
        actor: write.actor.to_string(),
        actor_account: write.actor.account.clone(),
        acting_user: write.actor.acting_user.clone(),
        method: write.method.to_owned(),
        payload: log_payload::encode_payload(change, &origin)?,
        prev_hash: head.hash,
        hash: GENESIS_HASH,
    };
    row.hash = row.compute_hash();
    Ok(row)
}

type WriteVerdict = Result<(), WriteRejection>;

/// The identity of a role: its account, or none for a global role, and its name.
pub(super) type RoleId = (Option<AccountId>, RoleName);

/// The identity of the record that a write changes.
#[derive(PartialEq, Eq, Hash)]
enum RecordRef<'w> {
    Key(KeyId),
    Account(&'w AccountId),
    Role(Option<&'w AccountId>, &'w RoleName),
    Member(&'w AccountId, &'w UserId),
}

impl<'w> RecordRef<'w> {
    fn from_change(change: &'w RecordChange) -> Self {
        match change {
            RecordChange::Key(key) => RecordRef::Key(key.id),
            RecordChange::Account(account) => RecordRef::Account(&account.id),
            RecordChange::Role(role) | RecordChange::RoleDeleted(role) => {
                RecordRef::Role(role.account.as_ref(), &role.name)
            }
            RecordChange::Member(member) | RecordChange::MemberRemoved(member) => {
                RecordRef::Member(&member.account, &member.user)
            }
        }
    }
}

/// Splits a batch into runs, each of which can be decided and written at once. No record occurs twice in a run, so one
/// statement can write the rows of a table. A role is deleted in its own run, since its uses are counted in the tables.
pub(super) fn split_into_runs(batch: &[WriteRequest]) -> Vec<&[WriteRequest]> {
    let mut runs = Vec::new();
    let (mut start, mut seen) = (0, HashSet::new());
    for (at, write) in batch.iter().enumerate() {
        let alone = |write: &WriteRequest| matches!(write.change, RecordChange::RoleDeleted(_));
        let record = RecordRef::from_change(&write.change);
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

/// What must be read from the tables to decide a run.
#[derive(Debug, Default)]
pub(super) struct PreStateQuery {
    pub(super) requests: BTreeSet<(KeyId, IdempotencyKey)>,
    pub(super) keys: BTreeSet<KeyId>,
    /// Names in their normalized form, which must be unique.
    pub(super) names: BTreeSet<(KeyOwner, KeyName)>,
    pub(super) digests: BTreeSet<TokenDigest>,
    /// Versions of secrets that leave the record of their key.
    pub(super) retired_secrets: BTreeSet<(KeyId, u32)>,
    pub(super) accounts: BTreeSet<AccountId>,
    /// Case-folded ids of the accounts to create.
    pub(super) folded_accounts: BTreeSet<String>,
    pub(super) roles: BTreeSet<RoleId>,
    pub(super) members: BTreeSet<(AccountId, UserId)>,
    /// The role to delete, whose uses must be counted.
    pub(super) role_to_delete: Option<RoleId>,
    /// Accounts and users whose limits apply.
    pub(super) tallies: BTreeSet<KeyOwner>,
    /// Accounts that get a new role and whose limits apply.
    pub(super) role_counts: BTreeSet<AccountId>,
    /// The format of the log entries, if an older release cannot read them.
    pub(super) log_format: Option<LogFormat>,
}

impl PreStateQuery {
    pub(super) fn from_writes(run: &[WriteRequest]) -> PreStateQuery {
        let mut query = PreStateQuery { log_format: LogFence::format(run), ..PreStateQuery::default() };
        for write in run {
            if let Some(request) = &write.idempotency {
                query.requests.insert((request.caller, request.key.clone()));
            }
            query.add_change(&write.change);
            if let (RecordChange::Account(account), None) = (&write.change, write.expected_revision) {
                query.folded_accounts.insert(account.id.to_case_folded());
            }
            write.read_set.iter().for_each(|(record, _)| query.add_read(record));
            if let Some((_, owner)) = applicable_limits(write) {
                if let (RecordChange::Role(_), None, Some(account)) =
                    (&write.change, write.expected_revision, owner.account())
                {
                    query.role_counts.insert(account.clone());
                }
                query.tallies.insert(owner);
            }
        }
        query
    }

    /// The writes of a batch share many reads, so each is copied only once.
    fn add_read(&mut self, record: &RecordId) {
        match record {
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

    fn add_change(&mut self, change: &RecordChange) {
        match change {
            RecordChange::Key(key) => self.add_key(key),
            RecordChange::Account(account) => {
                self.accounts.insert(account.id.clone());
            }
            RecordChange::Role(role) => {
                self.roles.insert((role.account.clone(), role.name.clone()));
            }
            RecordChange::RoleDeleted(role) => {
                self.roles.insert((role.account.clone(), role.name.clone()));
                self.role_to_delete = Some((role.account.clone(), role.name.clone()));
            }
            RecordChange::Member(member) | RecordChange::MemberRemoved(member) => {
                self.members.insert((member.account.clone(), member.user.clone()));
                self.add_role(Some(&member.account), &member.role);
            }
        }
    }

    fn add_key(&mut self, key: &ApiKey) {
        self.keys.insert(key.id);
        self.digests.extend(key.secrets.iter().map(|secret| secret.digest));
        self.retired_secrets.extend(retired_version(key).map(|version| (key.id, version)));
        if key.revocation.is_none() {
            self.names.extend(key.spec.name.as_ref().map(|name| (key.owner.clone(), name.normalized())));
            for role in &key.spec.roles {
                self.add_role(key.owner.account(), role);
            }
        }
    }

    fn add_role(&mut self, account: Option<&AccountId>, role: &RoleName) {
        self.roles.insert((account.cloned(), role.clone()));
        self.roles.insert((None, role.clone()));
    }
}

/// The version that left the record when its newest secret was made.
fn retired_version(key: &ApiKey) -> Option<u32> {
    match key.secrets.as_slice() {
        [_, .., oldest] if oldest.version > 1 => Some(oldest.version - 1),
        _ => None,
    }
}

/// The request that was recorded under an idempotency key.
#[derive(Debug)]
pub(super) struct RecordedRequest {
    pub(super) key_id: KeyId,
    pub(super) fingerprint: [u8; 32],
    pub(super) created_at: Timestamp,
}

/// A secret in the tables: its key, its version, and its row's expiry and checksum. `None` if the secret was written in
/// this run.
#[derive(Debug)]
pub(super) struct StoredSecret {
    pub(super) key_id: KeyId,
    pub(super) version: u32,
    pub(super) stored_row: Option<(Option<Timestamp>, i64)>,
}

impl StoredSecret {
    fn belongs_to(&self, key_id: KeyId, version: u32) -> bool {
        (self.key_id, self.version) == (key_id, version)
    }
}

/// An unrevoked key that has a name, and the form of the name in its row.
#[derive(Debug)]
pub(super) struct NameHolder {
    pub(super) key_id: KeyId,
    pub(super) stored_name: KeyName,
}

/// The state of the tables, as far as [`PreStateQuery`] requests it. What is missing in a map is not in the tables.
#[derive(Debug, Default)]
pub(super) struct PreState {
    pub(super) requests: HashMap<(KeyId, IdempotencyKey), RecordedRequest>,
    pub(super) keys: HashMap<KeyId, Revision>,
    /// The unrevoked keys that have a name, by its normalized form. Older releases did not normalize names, so there
    /// may be several.
    pub(super) names: HashMap<(KeyOwner, KeyName), Vec<NameHolder>>,
    pub(super) digests: HashMap<TokenDigest, StoredSecret>,
    pub(super) retired_secrets: HashMap<KeyId, KeySecret>,
    pub(super) accounts: HashMap<AccountId, Revision>,
    /// Accounts by their case-folded ids.
    pub(super) folded_accounts: HashMap<String, AccountId>,
    pub(super) roles: HashMap<RoleId, Revision>,
    pub(super) members: HashMap<(AccountId, UserId), Revision>,
    /// The numbers of unrevoked keys and of members that have the role to delete.
    pub(super) role_uses: (u64, u64),
    pub(super) tallies: HashMap<KeyOwner, OwnerTally>,
    /// The number of roles that belong to an account.
    pub(super) role_counts: HashMap<AccountId, u64>,
    pub(super) fence: LogFence,
}

/// The outcomes and log entries of a run, and the other rows to write.
#[derive(Debug)]
pub(super) struct WritePlan<'w> {
    pub(super) committed: CommittedBatch,
    /// The end of the log after the run.
    pub(super) head: LogHead,
    /// Secrets whose rows must change: those in the records, and those that leave their record now and thereby expire.
    pub(super) secrets: Vec<(KeyId, KeySecret)>,
    /// Idempotency keys to store, with the key that was created.
    pub(super) requests: Vec<(&'w IdempotentRequest, KeyId, Timestamp)>,
    /// The newest format in the log, if the run raises it.
    pub(super) log_format: Option<LogFormat>,
}

/// Decides a run after `head`. Each write sees the effects of those before it.
pub(super) fn plan_run<'w>(
    run: &'w [WriteRequest],
    mut state: PreState,
    head: LogHead,
) -> Result<WritePlan<'w>, serde_json::Error> {
    let mut plan = WritePlan {
        committed: CommittedBatch::default(),
        head,
        secrets: Vec::new(),
        requests: Vec::new(),
        log_format: None,
    };
    for write in run {
        let outcome = match state.find_previous_outcome(write) {
            Some(outcome) => outcome,
            None => {
                let verdict = state
                    .check_reads(&write.read_set)
                    .and_then(|()| state.check_change(&write.change, write.expected_revision))
                    .and_then(|()| state.check_limits(write))
                    .and_then(|()| state.fence.check(write));
                match verdict {
                    Ok(()) => Ok(WriteOutcome::Applied(plan.record_write(write, &mut state)?)),
                    Err(rejection) => Err(rejection),
                }
            }
        };
        plan.committed.outcomes.push(outcome);
    }
    Ok(plan)
}

impl<'w> WritePlan<'w> {
    /// Adds an accepted write to the plan, and applies it to the state.
    fn record_write(
        &mut self,
        write: &'w WriteRequest,
        state: &mut PreState,
    ) -> Result<RecordChange, serde_json::Error> {
        let change = write.change.clone().with_revision(self.head.revision.next());
        let row = to_log_entry(write, &change, self.head)?;
        self.head = LogHead { revision: row.revision, hash: row.hash };
        if let RecordChange::Key(key) = &change {
            let changed = key.secrets.iter().filter(|secret| !state.has_same_row(key.id, secret));
            self.secrets.extend(changed.map(|secret| (key.id, secret.clone())));
            self.secrets.extend(write.expected_revision.and_then(|_| state.end_retired_secret(key)));
        }
        if let (Some(request), Some(key_id)) = (&write.idempotency, change.key_id()) {
            let known = RecordedRequest { key_id, fingerprint: request.fingerprint, created_at: write.at };
            state.requests.insert((request.caller, request.key.clone()), known);
            self.requests.push((request, key_id, write.at));
        }
        self.log_format = state.fence.raise(write).or(self.log_format);
        state.apply_change(&change);
        if let Some(owner) = counted_owner(&change) {
            state.tallies.entry(owner).or_default().add_write(write);
        }
        self.committed.entries.push((row, change.clone()));
        Ok(change)
    }
}

fn check_revision(found: Option<&Revision>, expect: Option<Revision>) -> WriteVerdict {
    if found.copied() == expect { Ok(()) } else { Err(WriteRejection::Conflict) }
}

impl PreState {
    /// The outcome that was recorded under the write's idempotency key.
    fn find_previous_outcome(&self, write: &WriteRequest) -> Option<Result<WriteOutcome, WriteRejection>> {
        let request = write.idempotency.as_ref()?;
        let known = self.requests.get(&(request.caller, request.key.clone()))?;
        if known.created_at < write.at.saturating_sub(IDEMPOTENCY_WINDOW) {
            return None;
        }
        Some(if known.fingerprint == request.fingerprint {
            Ok(WriteOutcome::Replayed(known.key_id))
        } else {
            Err(WriteRejection::IdempotencyReused)
        })
    }

    /// Checks that every record in the read set is unchanged.
    fn check_reads(&self, reads: &ReadSet) -> WriteVerdict {
        let moved = reads.iter().any(|(record, read)| {
            let revision = match record {
                RecordId::Key(id) => self.keys.get(id),
                RecordId::Account(id) => self.accounts.get(id),
                RecordId::Role(account, name) => self.roles.get(&(account.clone(), name.clone())),
                RecordId::Member(account, user) => self.members.get(&(account.clone(), user.clone())),
            };
            !read.still_matches(revision.copied())
        });
        if moved { Err(WriteRejection::AuthorizationChanged) } else { Ok(()) }
    }

    fn check_change(&self, change: &RecordChange, expect: Option<Revision>) -> WriteVerdict {
        match change {
            RecordChange::Key(key) => self.check_key(key, expect),
            RecordChange::Account(account) => {
                check_revision(self.accounts.get(&account.id), expect)?;
                let folded = self.folded_accounts.get(&account.id.to_case_folded());
                match folded.filter(|known| expect.is_none() && **known != account.id) {
                    Some(known) => Err(WriteRejection::AccountIdDiffersInCase(known.clone())),
                    None => Ok(()),
                }
            }
            RecordChange::Role(role) => {
                check_revision(self.roles.get(&(role.account.clone(), role.name.clone())), expect)
            }
            RecordChange::RoleDeleted(role) => {
                check_revision(self.roles.get(&(role.account.clone(), role.name.clone())), expect)?;
                match self.role_uses {
                    (0, 0) => Ok(()),
                    (keys, members) => Err(WriteRejection::RoleInUse { keys, members }),
                }
            }
            RecordChange::Member(member) => {
                let record = (member.account.clone(), member.user.clone());
                check_revision(self.members.get(&record), expect)?;
                self.check_role_exists(Some(&member.account), &member.role)
            }
            RecordChange::MemberRemoved(member) => {
                check_revision(self.members.get(&(member.account.clone(), member.user.clone())), expect)
            }
        }
    }

    /// Checks the write against the limits of its account or user.
    fn check_limits(&self, write: &WriteRequest) -> WriteVerdict {
        let Some((limits, owner)) = applicable_limits(write) else { return Ok(()) };
        let roles = owner.account().and_then(|account| self.role_counts.get(account));
        let tally = self.tallies.get(&owner).copied().unwrap_or_default();
        tally
            .check_limits(write, &limits, roles.copied().unwrap_or(0))
            .map_err(WriteRejection::AccountLimitReached)
    }

    fn check_key(&self, key: &ApiKey, expect: Option<Revision>) -> WriteVerdict {
        if key.revocation.is_none() {
            for role in &key.spec.roles {
                self.check_role_exists(key.owner.account(), role)?;
            }
        }
        check_revision(self.keys.get(&key.id), expect)?;
        let taken = |secret: &KeySecret| {
            self.digests.get(&secret.digest).is_some_and(|held| !held.belongs_to(key.id, secret.version))
        };
        let newest_taken = key.secrets.first().is_some_and(taken);
        // If a new key exists under another id with the same name, the error is the duplicate digest.
        if self.is_name_taken(key) && !(expect.is_none() && newest_taken) {
            return Err(WriteRejection::NameTaken);
        }
        if key.secrets.iter().any(taken) { Err(WriteRejection::DigestTaken) } else { Ok(()) }
    }

    /// Checks that an account has a role: its own, or a global one.
    fn check_role_exists(&self, account: Option<&AccountId>, role: &RoleName) -> WriteVerdict {
        let exists = |account: Option<&AccountId>| self.roles.contains_key(&(account.cloned(), role.clone()));
        if exists(account) || exists(None) { Ok(()) } else { Err(WriteRejection::RoleNotFound) }
    }

    fn is_name_taken(&self, key: &ApiKey) -> bool {
        let Some(name) = key.spec.name.as_ref().filter(|_| key.revocation.is_none()) else { return false };
        let Some(holders) = self.names.get(&(key.owner.clone(), name.normalized())) else { return false };
        // A key that keeps its name may change even if another key has the same name.
        let keeps = holders.iter().any(|holder| holder.key_id == key.id && holder.stored_name == *name);
        !keeps && holders.iter().any(|holder| holder.key_id != key.id)
    }

    /// Whether the secret's row is up to date. Only the expiry of a secret can change.
    fn has_same_row(&self, id: KeyId, secret: &KeySecret) -> bool {
        self.digests.get(&secret.digest).is_some_and(|held| {
            let row = Some((secret.expires_at, secret_checksum(id.as_bytes(), secret)));
            held.belongs_to(id, secret.version) && held.stored_row == row
        })
    }

    /// The secret that left the record when the newest was created, expired at that time if it was still valid.
    fn end_retired_secret(&self, key: &ApiKey) -> Option<(KeyId, KeySecret)> {
        let left = self.retired_secrets.get(&key.id)?;
        let end = key.secrets.first()?.created_at;
        let alive =
            retired_version(key) == Some(left.version) && left.expires_at.is_none_or(|last| last > end);
        alive.then(|| (key.id, KeySecret { expires_at: Some(end), ..left.clone() }))
    }

    /// Updates the state after a recorded change.
    fn apply_change(&mut self, change: &RecordChange) {
        match change {
            RecordChange::Key(key) => self.apply_key(key),
            RecordChange::Account(account) => {
                self.accounts.insert(account.id.clone(), account.revision);
                self.folded_accounts.insert(account.id.to_case_folded(), account.id.clone());
            }
            RecordChange::Role(role) => {
                let record = (role.account.clone(), role.name.clone());
                let new = self.roles.insert(record, role.revision).is_none();
                if let Some(account) = role.account.clone().filter(|_| new) {
                    *self.role_counts.entry(account).or_default() += 1;
                }
            }
            RecordChange::RoleDeleted(role) => {
                self.roles.remove(&(role.account.clone(), role.name.clone()));
            }
            RecordChange::Member(member) => {
                self.members.insert((member.account.clone(), member.user.clone()), member.revision);
            }
            RecordChange::MemberRemoved(member) => {
                self.members.remove(&(member.account.clone(), member.user.clone()));
            }
        }
    }

    fn apply_key(&mut self, key: &ApiKey) {
        if self.keys.insert(key.id, key.revision).is_some() {
            self.names.values_mut().for_each(|holders| holders.retain(|holder| holder.key_id != key.id));
        }
        self.digests.extend(key.secrets.iter().map(|secret| {
            let held = StoredSecret { key_id: key.id, version: secret.version, stored_row: None };
            (secret.digest, held)
        }));
        if let Some(name) = key.spec.name.as_ref().filter(|_| key.revocation.is_none()) {
            let holder = NameHolder { key_id: key.id, stored_name: name.clone() };
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

    /// The state of two keys to which an earlier release gave one name in two forms.
    fn collided() -> (KeyOwner, PreState) {
        let owner = KeyOwner::Account(AccountId::parse("acme").unwrap());
        let holders = [(1, "\u{e9}"), (2, "e\u{301}")]
            .map(|(number, form)| NameHolder { key_id: key_id(number), stored_name: name(form) });
        let mut state = PreState::default();
        state.names.insert((owner.clone(), name("\u{e9}")), holders.into());
        (owner, state)
    }

    #[test]
    fn a_key_keeps_a_name_that_another_has_in_another_form_and_gets_it_no_second_time() {
        let (owner, state) = collided();
        let taken = |number, form: &str| {
            let mut key = crate::domain::key::tests::sample_key();
            (key.id, key.owner) = (key_id(number), owner.clone());
            key.spec.name = Some(name(form));
            state.is_name_taken(&key)
        };
        assert!(!taken(1, "\u{e9}") && !taken(2, "e\u{301}"), "a key is rotated under the name that it has");
        assert!(taken(1, "e\u{301}") && taken(2, "\u{e9}"), "its new name would be the other's");
        assert!(taken(3, "\u{e9}") && taken(3, "e\u{301}"));
        assert!(!taken(3, "e"));
    }
}
