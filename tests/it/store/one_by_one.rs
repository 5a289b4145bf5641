//! A batch comes to what its writes come to one by one: the same outcomes, the same tables, the same chain. What is
//! committed one by one is in an SQLite file, whatever the store is that takes the batches.

use std::time::Duration;

use keyward::{
    domain::{
        account::AccountLimits,
        name::{IdempotencyKey, KeyId},
    },
    store::{IDEMPOTENCY_WINDOW, IdempotentRequest, ReadState, RecordId, StoredKey},
};
use proptest::{prelude::*, strategy::ValueTree as _, test_runner::TestRunner};

use super::*;

/// A write is made of eight numbers that mean nothing by themselves.
type WriteChoices = [u8; 8];

/// So low that each of them is reached now and then.
const LIMITS: AccountLimits =
    AccountLimits { keys: 40, roles: 1, rotations_per_hour: 8, log_rows_per_hour: 90 };

/// What the writes before have come to, one by one: what the next ones are about.
struct SequentialModel {
    alone: SharedStore,
    keys: Vec<ApiKey>,
    callers: [KeyId; 2],
    /// In seconds; it never goes back.
    now: i64,
}

impl SequentialModel {
    async fn commit(
        &mut self,
        choices: WriteChoices,
    ) -> (WriteRequest, Result<WriteOutcome, WriteRejection>) {
        // Now and then so much later that no idempotency key counts any more.
        self.now += if choices[2] > 252 { 90_000 } else { 1 };
        let write = self.write(choices).await;
        let outcome = try_commit(&self.alone, write.clone()).await;
        if let Ok(WriteOutcome::Applied(RecordChange::Key(key))) = &outcome {
            self.keys.retain(|known| known.id != key.id);
            self.keys.push(ApiKey::clone(key));
        }
        (write, outcome)
    }

    async fn write(
        &self,
        [kind, which, _, read, place, seen, request, fingerprint]: WriteChoices,
    ) -> WriteRequest {
        let choices = [kind, which, request, fingerprint];
        let write = match kind % 16 {
            0..8 => self.create(choices),
            8..12 => self.update(choices),
            12 => self.account(choices).await,
            13 | 14 => self.role(choices).await,
            _ => self.member(choices).await,
        };
        let idempotency = (request % 3 == 0).then(|| IdempotentRequest {
            caller: self.callers[usize::from(which % 2)],
            key: IdempotencyKey::parse(["a", "b", "c", "d"][usize::from(fingerprint / 2 % 4)]).unwrap(),
            fingerprint: [fingerprint % 2; 32],
        });
        let reads = if read % 4 == 0 { self.read(place, seen).await } else { ReadSet::default() };
        let limits = (which % 2 == 0).then_some(LIMITS);
        WriteRequest { at: timestamp(self.now), idempotency, read_set: reads, limits, ..write }
    }

    /// A read set of one record, as it is now or as it was never.
    async fn read(&self, place: u8, seen: u8) -> ReadSet {
        let key = self.known(seen).map(|key| (RecordId::Key(key.id), Some(key.revision)));
        let account = account_id(["acme", "globex"][usize::from(seen % 2)]);
        let name = RoleName::parse(["agent", "admin"][usize::from(seen / 2 % 2)]).unwrap();
        let user = UserId::parse(["u1", "u2"][usize::from(seen % 2)]).unwrap();
        let roles = self.alone.list_roles(Some(&account)).await.unwrap();
        let revision = |of: Option<&AccountId>| {
            let role = roles.iter().find(|role| role.account.as_ref() == of && role.name == name);
            role.map(|role| role.revision)
        };
        let (place, found) = match (place % 5, key) {
            (0, Some(key)) => key,
            (0 | 1, _) => {
                let found = self.alone.get_account(&account).await.unwrap().map(|account| account.revision);
                (RecordId::Account(account), found)
            }
            (2, _) => (RecordId::Role(None, name.clone()), revision(None)),
            (3, _) => (RecordId::Role(Some(account.clone()), name.clone()), revision(Some(&account))),
            _ => {
                let found = self.alone.list_memberships(&user).await.unwrap();
                let found = found.into_iter().find(|member| member.account == account);
                (RecordId::Member(account, user), found.map(|member| member.revision))
            }
        };
        let found = if seen.is_multiple_of(8) { Some(Revision(2)) } else { found };
        let mut reads = ReadSet::default();
        reads.add(place, ReadState::from_revision(found));
        reads
    }

    fn known(&self, which: u8) -> Option<&ApiKey> {
        self.keys.get(usize::from(which).checked_rem(self.keys.len())?)
    }

    fn terms(&self, key: &mut ApiKey, [kind, which, name, role]: [u8; 4]) {
        // The last four are one name.
        let names = ["a", "b", "c", "d", "é", "e\u{301}", "é", "e\u{301}"];
        key.spec.name = names.get(usize::from(name % 16)).map(|name| KeyName::from_stored(name).unwrap());
        let role = ["agent", "admin"].get(usize::from(role % 8)).map(|role| RoleName::parse(role).unwrap());
        key.spec.roles = role.into_iter().collect();
        if kind % 3 == 0 {
            key.spec.expires_at = Some(timestamp(i64::from(which)));
        }
    }

    /// A new key; one in eight has the id, and one in eight the digest, of another.
    fn create(&self, choices: [u8; 4]) -> WriteRequest {
        let [_, which, like, owner] = choices;
        let mut key = key();
        self.terms(&mut key, choices);
        key.owner = match owner % 3 {
            0 => KeyOwner::User(UserId::parse("u1").unwrap()),
            1 => KeyOwner::Account(account_id("globex")),
            _ => key.owner,
        };
        if let Some(known) = self.known(which) {
            match like % 8 {
                0 => key.id = known.id,
                1 => key.secrets[0].digest = known.secrets[0].digest,
                _ => {}
            }
        }
        create(&key)
    }

    /// A change of a key that there is, from its revision or from another.
    fn update(&self, choices: [u8; 4]) -> WriteRequest {
        let [_, which, what, how] = choices;
        let Some(known) = self.known(which) else { return self.create(choices) };
        let mut after = known.clone();
        let mut action = AuditAction::KeyUpdated;
        match what % 6 {
            0 => {
                after = revoked(after, timestamp(5));
                let first = known.revocation.is_none();
                action = if first { AuditAction::KeyRevoked } else { action };
            }
            1 | 2 => {
                action = AuditAction::KeyRotated;
                after.rotate(new_digest(), "h".to_owned(), Duration::from_secs(how.into()), timestamp(1));
            }
            3 if how % 2 == 0 => {
                let other = self.keys[0].secrets[0].digest;
                after.rotate(other, String::new(), Duration::from_secs(9), timestamp(2));
            }
            _ => self.terms(&mut after, choices),
        }
        if how % 7 == 0 {
            after.revision = Revision(1);
        }
        WriteRequest { action, ..update(&after) }
    }

    async fn account(&self, [_, which, stale, _]: [u8; 4]) -> WriteRequest {
        let id = ["acme", "globex", "initech", "Initech"][usize::from(which % 4)];
        let before = self.alone.get_account(&account_id(id)).await.unwrap();
        let expect = before.as_ref().filter(|_| stale % 4 > 0).map(|before| before.revision);
        let after = Account { suspended_at: Some(timestamp(stale.into())), ..before.unwrap_or(account(id)) };
        write(RecordChange::Account(Arc::new(after)), expect, AuditAction::AccountUpdated)
    }

    async fn role(&self, [_, which, what, stale]: [u8; 4]) -> WriteRequest {
        let account = [None, Some("acme"), Some("globex")][usize::from(which % 3)];
        let name = ["agent", "admin"][usize::from(what % 2)];
        let made = self.alone.list_roles(account.map(account_id).as_ref()).await.unwrap();
        let made =
            made.into_iter().find(|made| *made == Role { revision: made.revision, ..role(account, name) });
        let after = made.unwrap_or(role(account, name));
        let after = if stale % 5 == 0 { Role { revision: Revision(2), ..after } } else { after };
        if what % 3 == 0 { delete_role(&after) } else { put_role(&after) }
    }

    async fn member(&self, [_, which, what, stale]: [u8; 4]) -> WriteRequest {
        let user = ["u1", "u2"][usize::from(which % 2)];
        let role = ["agent", "admin"][usize::from(what % 2)];
        let made = self.alone.list_memberships(&UserId::parse(user).unwrap()).await.unwrap();
        let made = made.into_iter().find(|made| made.account == account_id("acme"));
        let revision = made.map(|made| made.revision).filter(|_| stale % 5 > 0).unwrap_or_default();
        let after = AccountMember { revision, ..member("acme", user, role) };
        if what % 3 == 0 && revision.0 > 0 { remove_member(&after) } else { put_member(&after) }
    }
}

/// Every record that the writes were about.
async fn tables(store: &SharedStore, world: &SequentialModel) -> impl PartialEq + std::fmt::Debug {
    let mut keys = Vec::new();
    for key in &world.keys {
        let StoredKey { key, last_used } = store.get_key(key.id).await.unwrap().unwrap();
        keys.push((key, last_used));
    }
    let (mut roles, mut requests) = (Vec::new(), Vec::new());
    for account in ["acme", "globex"] {
        roles.extend(store.list_roles(Some(&account_id(account))).await.unwrap());
    }
    let since = timestamp(world.now).saturating_sub(IDEMPOTENCY_WINDOW);
    for caller in world.callers {
        for name in ["a", "b", "c", "d"] {
            let name = IdempotencyKey::parse(name).unwrap();
            requests.push(store.find_idempotent_request(caller, &name, since).await.unwrap());
        }
    }
    let members = store.list_members(&account_id("acme"), None, 10).await.unwrap();
    (keys, roles, requests, members, store.list_accounts(None, 10).await.unwrap())
}

pub(super) async fn a_batch_comes_to_what_its_writes_come_to_one_by_one(store: SharedStore) {
    let (alone, _folder) = open_sqlite().await;
    let mut world = SequentialModel {
        alone,
        keys: Vec::new(),
        callers: [new_key_id(timestamp(0)), new_key_id(timestamp(0))],
        now: 0,
    };
    for store in [&store, &world.alone] {
        with_accounts(store).await;
    }
    let mut runner = TestRunner::deterministic();
    let batches = prop::collection::vec(any::<WriteChoices>(), 1..150);
    let (mut applied, mut rejections) = (0, BTreeMap::<String, u32>::new());
    for _ in 0..12 {
        let batch = batches.new_tree(&mut runner).unwrap().current();
        let (mut writes, mut expected) = (Vec::new(), Vec::new());
        for choices in batch {
            let (write, outcome) = world.commit(choices).await;
            match &outcome {
                Ok(WriteOutcome::Applied(_)) => applied += 1,
                Ok(WriteOutcome::Replayed(_)) => *rejections.entry("Replayed".to_owned()).or_default() += 1,
                Err(rejection) => {
                    let name = format!("{rejection:?}");
                    *rejections.entry(name.split(' ').next().unwrap().to_owned()).or_default() += 1;
                }
            }
            writes.push(write);
            expected.push(format!("{outcome:?}"));
        }
        let committed = store.commit(&writes).await.unwrap();
        for (at, (outcome, expected)) in committed.outcomes.iter().zip(expected).enumerate() {
            assert_eq!(format!("{outcome:?}"), expected, "{at}: {:?}", writes[at]);
        }
        assert_eq!(whole_chain(&store).await, whole_chain(&world.alone).await);
        assert_eq!(tables(&store, &world).await, tables(&world.alone, &world).await);
    }
    // It has met everything that there is to meet.
    assert!(applied > 300, "{applied} were applied");
    assert_eq!(rejections.len(), 10, "{rejections:?}");
}
