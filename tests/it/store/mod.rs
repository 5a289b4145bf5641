//! The contract of a store, as every backend must keep it. Each promise is written once, against `dyn Store`, in the
//! file of its subject, and stamped for each backend at the end of this one. Here too: what the promises are made
//! with.

mod batches;
mod bulk;
mod collisions;
mod limits;
mod lists;
mod log;
mod one_by_one;
mod people;
mod reads;
mod records;
mod requests;
mod snapshots;
mod usage;

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use keyward::{
    domain::{
        account::{Account, AccountMember, Role},
        key::{ApiKey, KeyOwner, KeySecret, KeySpec, Revocation, RevokeReason},
        log::{Actor, AuditAction, GENESIS_HASH, LogEntry, RecordChange},
        name::{AccountId, DisplayName, EnvironmentName, KeyId, KeyName, RoleName, UserId},
        scope::Scope,
        time::{Revision, Timestamp},
        token::TokenDigest,
    },
    store::{
        KeyFilter, LogHead, OwnerFilter, ReadSet, SecretUse, Store, StoreError, UsageBatch, WriteOutcome,
        WriteRejection, WriteRequest,
    },
};

type SharedStore = Arc<dyn Store>;

/// The present of these tests.
const NOW: i64 = 1_800_000_000;

fn timestamp(seconds: i64) -> Timestamp {
    Timestamp::from_micros((NOW + seconds) * 1_000_000)
}

fn account_id(id: &str) -> AccountId {
    AccountId::parse(id).unwrap()
}

/// A number that no other call of this process gets.
fn next_number() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

fn new_digest() -> TokenDigest {
    TokenDigest::from_token(&format!("token {}", next_number()))
}

fn new_key_id(created: Timestamp) -> KeyId {
    let mut random = [0; 10];
    random[2..].copy_from_slice(&next_number().to_be_bytes());
    KeyId::generate(created, random)
}

fn secret(version: u32, created: Timestamp) -> KeySecret {
    KeySecret {
        version,
        digest: new_digest(),
        hint: format!("kw_live_{version:04}"),
        created_at: created,
        expires_at: None,
    }
}

/// A key of `acme` that no other is like.
fn key() -> ApiKey {
    let created = timestamp(0);
    ApiKey {
        id: new_key_id(created),
        owner: KeyOwner::Account(account_id("acme")),
        environment: EnvironmentName::parse("production").unwrap(),
        spec: KeySpec {
            name: None,
            scopes: [Scope::parse_grant("monitors:read").unwrap()].into_iter().collect(),
            roles: vec![],
            expires_at: None,
            customers: vec![],
            allowed_cidrs: vec![],
            rate_limits: vec![],
            quota: None,
            metadata: BTreeMap::new(),
        },
        created_at: created,
        created_by: "system".to_owned(),
        updated_at: created,
        disabled_at: None,
        revocation: None,
        secrets: vec![secret(1, created)],
        revision: Revision::default(),
    }
}

fn named(name: &str) -> ApiKey {
    let mut key = key();
    key.spec.name = Some(KeyName::parse(name).unwrap());
    key
}

fn revoked(mut key: ApiKey, when: Timestamp) -> ApiKey {
    key.revocation = Some(Revocation {
        at: when,
        reason: RevokeReason::Compromised,
        comment: "on a paste site".to_owned(),
    });
    key
}

fn account(id: &str) -> Account {
    Account {
        id: account_id(id),
        name: DisplayName::parse(&format!("{id} Inc")).unwrap(),
        suspended_at: None,
        longest_life: None,
        created_at: timestamp(0),
        updated_at: timestamp(0),
        revision: Revision::default(),
    }
}

fn write(change: RecordChange, expect: Option<Revision>, action: AuditAction) -> WriteRequest {
    WriteRequest {
        change,
        expected_revision: expect,
        action,
        actor: Actor::SYSTEM,
        method: "test",
        at: timestamp(0),
        idempotency: None,
        read_set: ReadSet::default(),
        limits: None,
    }
}

fn create(key: &ApiKey) -> WriteRequest {
    write(RecordChange::Key(Arc::new(key.clone())), None, AuditAction::KeyCreated)
}

/// Replaces the record that stands at `key`'s revision.
fn update(key: &ApiKey) -> WriteRequest {
    write(RecordChange::Key(Arc::new(key.clone())), Some(key.revision), AuditAction::KeyUpdated)
}

fn create_account(account: &Account) -> WriteRequest {
    write(RecordChange::Account(Arc::new(account.clone())), None, AuditAction::AccountCreated)
}

async fn try_commit(store: &SharedStore, write: WriteRequest) -> Result<WriteOutcome, WriteRejection> {
    let committed = store.commit(&[write]).await.unwrap();
    let [outcome] = <[_; 1]>::try_from(committed.outcomes).unwrap();
    outcome
}

/// Commits a key's write: the key as it is recorded.
async fn commit_key(store: &SharedStore, write: WriteRequest) -> ApiKey {
    match try_commit(store, write).await.unwrap() {
        WriteOutcome::Applied(RecordChange::Key(key)) => Arc::unwrap_or_clone(key),
        other => panic!("{other:?}"),
    }
}

async fn commit_account(store: &SharedStore, account: &Account, expect: Option<Revision>) -> Account {
    let write = write(RecordChange::Account(Arc::new(account.clone())), expect, AuditAction::AccountUpdated);
    match try_commit(store, write).await.unwrap() {
        WriteOutcome::Applied(RecordChange::Account(account)) => Arc::unwrap_or_clone(account),
        other => panic!("{other:?}"),
    }
}

/// The accounts that keys of these tests belong to.
async fn with_accounts(store: &SharedStore) {
    for id in ["acme", "globex"] {
        commit_account(store, &account(id), None).await;
    }
}

/// The roles that generated records have.
async fn with_roles(store: &SharedStore) {
    for name in ["agent", "read-only", "admin"] {
        commit_role(store, put_role(&role(None, name))).await;
    }
}

async fn read_key(store: &SharedStore, id: KeyId) -> Option<ApiKey> {
    store.get_key(id).await.unwrap().map(|stored| stored.key)
}

async fn write_used_secrets(store: &SharedStore, used: &[SecretUse]) -> Result<(), StoreError> {
    store.record_usage(&UsageBatch { secret_uses: used.to_vec(), ..UsageBatch::default() }).await.map(drop)
}

fn unfiltered_keys(owner: OwnerFilter) -> KeyFilter {
    KeyFilter {
        owner,
        environment: None,
        states: vec![],
        name_prefix: String::new(),
        unused_since: None,
        expires_before: None,
        created_before: None,
        now: timestamp(0),
    }
}

async fn whole_log(store: &SharedStore) -> Vec<LogEntry> {
    store.list_log_after(Revision(0), u32::MAX).await.unwrap()
}

/// Sees that the log is one chain that ends at the head, and returns it.
async fn whole_chain(store: &SharedStore) -> Vec<LogEntry> {
    let rows = whole_log(store).await;
    let mut last = LogHead { revision: Revision(0), hash: GENESIS_HASH };
    for row in &rows {
        assert!(row.follows(last.revision, &last.hash), "{row:?} does not follow {last:?}");
        last = LogHead { revision: row.revision, hash: row.hash };
    }
    assert_eq!(store.log_head().await.unwrap(), last);
    rows
}

fn role(account: Option<&str>, name: &str) -> Role {
    Role {
        account: account.map(account_id),
        name: RoleName::parse(name).unwrap(),
        scopes: [Scope::parse_grant("monitors:*").unwrap()].into_iter().collect(),
        revision: Revision::default(),
    }
}

fn member(account: &str, user: &str, role: &str) -> AccountMember {
    AccountMember {
        account: account_id(account),
        user: UserId::parse(user).unwrap(),
        role: RoleName::parse(role).unwrap(),
        revision: Revision::default(),
    }
}

/// A new role, or one in the place of what stands at its revision; so too for members.
fn put_role(role: &Role) -> WriteRequest {
    write(RecordChange::Role(Arc::new(role.clone())), expected_revision(role.revision), AuditAction::RolePut)
}

fn delete_role(role: &Role) -> WriteRequest {
    write(
        RecordChange::RoleDeleted(Arc::new(role.clone())),
        expected_revision(role.revision),
        AuditAction::RoleDeleted,
    )
}

fn put_member(member: &AccountMember) -> WriteRequest {
    write(
        RecordChange::Member(Arc::new(member.clone())),
        expected_revision(member.revision),
        AuditAction::MemberPut,
    )
}

fn remove_member(member: &AccountMember) -> WriteRequest {
    write(
        RecordChange::MemberRemoved(Arc::new(member.clone())),
        expected_revision(member.revision),
        AuditAction::MemberRemoved,
    )
}

fn expected_revision(revision: Revision) -> Option<Revision> {
    (revision != Revision::default()).then_some(revision)
}

/// Commits a role's write: the role as it is recorded.
async fn commit_role(store: &SharedStore, write: WriteRequest) -> Role {
    match try_commit(store, write).await.unwrap() {
        WriteOutcome::Applied(RecordChange::Role(role) | RecordChange::RoleDeleted(role)) => {
            Arc::unwrap_or_clone(role)
        }
        other => panic!("{other:?}"),
    }
}

/// Commits a member's write: the member as it is recorded.
async fn commit_member(store: &SharedStore, write: WriteRequest) -> AccountMember {
    match try_commit(store, write).await.unwrap() {
        WriteOutcome::Applied(RecordChange::Member(member) | RecordChange::MemberRemoved(member)) => {
            Arc::unwrap_or_clone(member)
        }
        other => panic!("{other:?}"),
    }
}

/// One test for each promise, on a store that `$open` makes together with what it lives in.
macro_rules! conformance {
    ($backend:ident, $open:expr; $($subject:ident { $($promise:ident,)* })*) => {
        mod $backend {
            $(
                mod $subject {
                    $(
                        #[tokio::test(flavor = "multi_thread")]
                        async fn $promise() {
                            let (store, _kept) = $open.await;
                            crate::store::$subject::$promise(store).await;
                        }
                    )*
                }
            )*
        }
    };
}

macro_rules! every_promise {
    ($backend:ident, $open:expr) => {
        conformance! { $backend, $open;
            records {
                a_new_store_is_empty,
                every_field_of_a_key_reads_back,
                every_field_of_an_account_reads_back,
                what_people_wrote_reads_back_whatever_it_is,
                a_closed_store_fails_and_says_so,
            }
            people {
                every_field_of_a_role_reads_back,
                every_field_of_a_member_reads_back,
                a_role_or_member_changed_from_another_revision_is_a_conflict,
                the_roles_of_an_account_come_with_the_global_ones_by_name,
                a_key_has_roles_that_stand_for_its_owner,
                a_member_has_a_role_that_stands_for_the_account,
                a_role_in_use_is_not_deleted,
                a_global_role_is_not_used_where_an_account_has_its_own,
                a_deleted_role_can_be_made_again,
                members_come_in_pages_in_the_order_of_their_users,
                the_memberships_of_a_user_are_those_of_no_other,
            }
            collisions {
                a_change_from_another_revision_than_the_records_is_a_conflict,
                a_name_is_its_keys_until_that_is_revoked,
                a_name_is_free_in_another_account_and_for_a_user,
                a_name_is_one_in_every_unicode_form,
                ids_of_accounts_that_differ_in_case_alone_are_taken,
                keys_without_a_name_do_not_collide,
                a_digest_is_unique_for_ever,
                a_secret_of_the_keys_own_past_is_taken_too,
                of_two_first_starts_one_is_made,
            }
            reads {
                a_change_is_rejected_after_any_record_has_moved_that_it_was_authorized_by,
                a_change_sees_the_records_that_those_before_it_in_its_batch_have_moved,
                a_request_that_was_done_is_replayed_whatever_has_moved_since,
                an_authorization_that_has_run_out_in_the_queue_commits_nothing,
            }
            requests {
                the_same_request_is_done_once,
                an_idempotency_key_counts_for_24_hours,
                the_same_request_twice_in_a_batch_is_done_once,
            }
            batches {
                a_rejected_write_leaves_its_batch_alone,
                a_batch_of_rejections_records_nothing,
                a_write_sees_those_before_it_in_its_batch,
                a_record_changed_often_in_a_batch_is_as_the_last_change_says,
                names_go_from_key_to_key_within_a_batch,
                revisions_count_in_commit_order_under_overlapping_writers,
                of_changes_from_one_revision_one_is_made,
            }
            one_by_one {
                a_batch_comes_to_what_its_writes_come_to_one_by_one,
            }
            log {
                the_log_says_who_did_what_and_holds_the_record,
                the_log_is_read_in_pages,
                every_filter_of_the_log_finds_what_a_look_at_each_row_finds,
            }
            snapshots {
                a_snapshot_holds_everything_that_was_written,
                a_snapshot_holds_roles_members_and_what_is_spent,
                a_snapshot_holds_nothing_of_what_a_revoked_key_granted,
                a_snapshot_leaves_out_what_is_dead_for_too_long,
                a_snapshot_of_many_keys_has_each_of_them_once,
                reads_see_whole_commits_while_others_write,
            }
            limits {
                an_account_has_no_more_keys_than_its_limit_whoever_makes_them_at_once,
                a_user_has_the_limits_of_an_account,
                an_account_has_no_more_roles_of_its_own_than_its_limit,
                rotations_and_log_rows_are_counted_by_the_hour,
                the_operator_account_is_held_to_no_limit,
            }
            bulk {
                a_bulk_reader_finds_each_key_as_a_look_at_it_does,
                a_bulk_reader_finds_keys_that_were_made_and_changed_after_it,
                a_bulk_reader_reads_the_log_and_the_revisions_of_keys_in_pages,
                a_bulk_reader_that_was_given_up_in_the_middle_goes_on,
            }
            lists {
                every_filter_finds_what_a_look_at_each_key_finds,
                pages_of_keys_join_to_the_whole_whatever_comes_between,
                a_page_counts_keys_and_not_their_secrets,
                accounts_come_in_pages_in_the_order_of_their_ids,
            }
            usage {
                the_latest_use_of_a_secret_is_kept_and_unknown_ones_are_skipped,
                a_use_outlives_a_change_of_its_key,
                counts_of_an_hour_add_up,
                a_flush_that_somebody_waits_for_hastens_a_gentle_one_and_each_check_counts_once,
                counts_come_in_the_order_of_hours_within_their_range,
                old_counts_are_dropped_and_newer_ones_stay,
                units_of_a_period_add_up_whoever_writes_them,
                what_all_have_spent_is_told_to_who_writes,
                a_later_period_starts_afresh_and_one_that_is_over_changes_nothing,
                a_quota_of_another_kind_of_period_starts_afresh,
                uses_are_noted_while_keys_change,
            }
        }
    };
}

async fn open_sqlite() -> (SharedStore, tempfile::TempDir) {
    let folder = tempfile::tempdir().unwrap();
    let url = format!("sqlite:{}", folder.path().join("keyward.db").display());
    (keyward::store::open(&url).await.unwrap(), folder)
}

every_promise!(sqlite, crate::store::open_sqlite());

async fn open_postgres() -> (SharedStore, crate::postgres::PostgresDatabase) {
    let database = crate::postgres::PostgresDatabase::new();
    (keyward::store::open(&database.url()).await.unwrap(), database)
}

every_promise!(postgres, crate::store::open_postgres());

/// The same, where each transaction may meet another session.
async fn open_pgbouncer() -> (SharedStore, crate::postgres::PostgresDatabase) {
    let database = crate::postgres::PostgresDatabase::new();
    (keyward::store::open(&database.pgbouncer_url()).await.unwrap(), database)
}

every_promise!(pgbouncer, crate::store::open_pgbouncer());
