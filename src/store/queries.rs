//! The reading queries, written once for both databases. They differ only in how a value is passed: bound to a
//! placeholder, or written out (see `postgres/literal.rs`).

use std::marker::PhantomData;

use sqlx::Database;

use crate::domain::{
    key::State,
    name::{AccountId, IdempotencyKey, KeyId, UserId},
    time::{Revision, Timestamp},
};

use super::{
    Hour, KeyFilter, LogFilter, OwnerFilter,
    records::{
        ACCOUNT_COLUMNS, HEAD_COLUMNS, KEY_COLUMNS, LOG_COLUMNS, MEMBER_COLUMNS, ROLE_COLUMNS, SECRET_COLUMNS,
    },
    rows::{revision_to_i64, role_account},
};

/// A value of one of the three types that both databases keep.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Value {
    Int(i64),
    Text(String),
    Bytes(Vec<u8>),
}

/// How a database takes values, and where it keeps the latest uses of secrets.
pub(super) trait Dialect: Database + Sized {
    /// The latest use of the secret `s`, whose row in `uses` is `u`.
    const LAST_USED: &'static str;
    /// Rows with the columns `key_id` and `at`, one or more of them for each secret that was used.
    const USES: &'static str;
    /// The name of a row of `keys` in Unicode Normalization Form C.
    const NAME_NFC: &'static str;

    /// Appends a value to a statement: a placeholder, and the value to `bound`; or the value itself.
    fn push_value(statement: &mut String, bound: &mut Vec<Value>, value: Value);
}

impl Dialect for sqlx::Sqlite {
    const LAST_USED: &'static str = "u.at";
    const USES: &'static str = "uses";
    const NAME_NFC: &'static str = "coalesce(name_nfc, name)";

    fn push_value(statement: &mut String, bound: &mut Vec<Value>, value: Value) {
        statement.push('?');
        bound.push(value);
    }
}

/// A query in the making.
pub(super) struct Sql<D: Dialect> {
    statement: String,
    bound: Vec<Value>,
    dialect: PhantomData<fn() -> D>,
}

impl<D: Dialect> Sql<D> {
    fn new(statement: String) -> Self {
        Sql { statement, bound: Vec::new(), dialect: PhantomData }
    }

    fn select(columns: &'static str, from: &'static str) -> Self {
        Sql::new(["SELECT ", columns, from].concat())
    }

    /// Keys joined with their secrets, and these with their latest uses.
    fn keys(condition: &'static str) -> Self {
        Sql::new(format!(
            "SELECT {KEY_COLUMNS}, {SECRET_COLUMNS}, {} \
             FROM keys k LEFT JOIN secrets s ON s.key_id = k.id \
             LEFT JOIN uses u ON u.key_id = s.key_id AND u.version = s.version WHERE {condition}",
            D::LAST_USED
        ))
    }

    fn push(mut self, sql: &'static str) -> Self {
        self.statement.push_str(sql);
        self
    }

    fn value(mut self, value: Value) -> Self {
        D::push_value(&mut self.statement, &mut self.bound, value);
        self
    }

    fn int(self, value: impl Into<i64>) -> Self {
        self.value(Value::Int(value.into()))
    }

    fn text(self, value: impl ToString) -> Self {
        self.value(Value::Text(value.to_string()))
    }

    /// A list of values with commas between; one that is empty finds nothing.
    fn each<T>(self, values: &[T], bind: impl Fn(Self, &T) -> Self) -> Self {
        let mut query = self;
        for (at, value) in values.iter().enumerate() {
            query = bind(if at == 0 { query } else { query.push(", ") }, value);
        }
        if values.is_empty() { query.push("NULL") } else { query }
    }

    fn id(self, value: KeyId) -> Self {
        self.value(Value::Bytes(value.as_bytes().to_vec()))
    }

    /// The statement, and the values of its placeholders in their order.
    pub(super) fn into_parts(self) -> (String, Vec<Value>) {
        (self.statement, self.bound)
    }
}

pub(super) fn head<D: Dialect>() -> Sql<D> {
    Sql::select(HEAD_COLUMNS, " FROM meta")
}

pub(super) fn log_after<D: Dialect>(revision: Revision, limit: u32) -> Sql<D> {
    Sql::select(LOG_COLUMNS, " FROM log WHERE revision > ")
        .int(revision_to_i64(revision))
        .push(" ORDER BY revision LIMIT ")
        .int(limit)
}

pub(super) fn log<D: Dialect>(filter: &LogFilter, cursor: Option<Revision>, limit: u32) -> Sql<D> {
    let after = cursor.filter(|_| filter.oldest_first).unwrap_or_default().max(filter.after);
    let before = cursor.filter(|_| !filter.oldest_first).map_or(i64::MAX, revision_to_i64);
    let mut query = Sql::select(LOG_COLUMNS, " FROM log WHERE revision > ")
        .int(revision_to_i64(after))
        .push(" AND revision < ")
        .int(before);
    if let Some(account) = &filter.account {
        query = query.push(" AND account = ").text(account);
    }
    if let Some(key_id) = filter.key_id {
        query = query.push(" AND key_id = ").id(key_id);
    }
    if let Some(actor) = &filter.actor {
        query = query.push(" AND actor = ").text(actor);
    }
    if let Some(from) = filter.from {
        query = query.push(" AND at >= ").int(from.as_micros());
    }
    if let Some(to) = filter.to {
        query = query.push(" AND at < ").int(to.as_micros());
    }
    if let Some(user) = &filter.acting_user {
        query = query.push(" AND acting_user = ").text(user);
    }
    if let Some(action) = &filter.action {
        query = query.push(" AND action = ").text(action);
    }
    let order =
        if filter.oldest_first { " ORDER BY revision LIMIT " } else { " ORDER BY revision DESC LIMIT " };
    query.push(order).int(limit)
}

pub(super) fn log_at<D: Dialect>(revisions: &[Revision]) -> Sql<D> {
    let query = Sql::select(LOG_COLUMNS, " FROM log WHERE revision IN (");
    query.each(revisions, |query, revision| query.int(revision_to_i64(*revision))).push(")")
}

pub(super) fn keys_at<D: Dialect>(ids: &[KeyId]) -> Sql<D> {
    let query = Sql::keys("k.id IN (");
    query.each(ids, |query, id| query.id(*id)).push(") ORDER BY k.id, s.version DESC")
}

/// The same in the same columns, without the latest uses, for PostgreSQL. Its planner keeps a subquery with OFFSET as it is:
/// a join might read all secrets for each page.
pub(super) fn keys_without_uses(ids: &[KeyId]) -> Sql<sqlx::Postgres> {
    let query = Sql::new(format!(
        "SELECT {KEY_COLUMNS}, {SECRET_COLUMNS}, NULL FROM keys k \
         LEFT JOIN LATERAL (SELECT * FROM secrets WHERE key_id = k.id OFFSET 0) s ON true WHERE k.id IN ("
    ));
    query.each(ids, |query, id| query.id(*id)).push(") ORDER BY k.id, s.version DESC")
}

pub(super) fn checkpoint<D: Dialect>() -> Sql<D> {
    Sql::select("revision, hash, entries, made_at", " FROM checkpoints ORDER BY revision DESC LIMIT 1")
}

pub(super) fn hash_of<D: Dialect>(revision: Revision) -> Sql<D> {
    Sql::select("revision, hash", " FROM log WHERE revision = ").int(revision_to_i64(revision))
}

pub(super) fn account<D: Dialect>(id: &AccountId) -> Sql<D> {
    Sql::select(ACCOUNT_COLUMNS, " FROM accounts WHERE id = ").text(id)
}

pub(super) fn accounts<D: Dialect>(after: Option<&AccountId>, limit: u32) -> Sql<D> {
    Sql::select(ACCOUNT_COLUMNS, " FROM accounts WHERE id > ")
        .text(after.map_or("", AccountId::as_str))
        .push(" ORDER BY id LIMIT ")
        .int(limit)
}

pub(super) fn all_accounts<D: Dialect>() -> Sql<D> {
    Sql::select(ACCOUNT_COLUMNS, " FROM accounts")
}

pub(super) fn roles<D: Dialect>(account: Option<&AccountId>) -> Sql<D> {
    Sql::select(ROLE_COLUMNS, " FROM roles WHERE account IN ('', ")
        .text(role_account(account))
        .push(") ORDER BY name, account")
}

pub(super) fn all_roles<D: Dialect>() -> Sql<D> {
    Sql::select(ROLE_COLUMNS, " FROM roles")
}

pub(super) fn members<D: Dialect>(account: &AccountId, after: Option<&UserId>, limit: u32) -> Sql<D> {
    Sql::select(MEMBER_COLUMNS, " FROM members WHERE account = ")
        .text(account)
        .push(" AND user_id > ")
        .text(after.map_or("", UserId::as_str))
        .push(" ORDER BY user_id LIMIT ")
        .int(limit)
}

pub(super) fn memberships<D: Dialect>(user: &UserId) -> Sql<D> {
    Sql::select(MEMBER_COLUMNS, " FROM members WHERE user_id = ").text(user).push(" ORDER BY account")
}

pub(super) fn all_members<D: Dialect>() -> Sql<D> {
    Sql::select(MEMBER_COLUMNS, " FROM members")
}

/// What is spent of the quotas of keys that are not revoked.
pub(super) fn all_spent<D: Dialect>() -> Sql<D> {
    Sql::select(
        "q.key_id, q.period, q.used",
        " FROM quotas q JOIN keys k ON k.id = q.key_id WHERE k.revoked_at IS NULL",
    )
}

pub(super) fn usage<D: Dialect>(key: KeyId, from: Hour, to: Hour) -> Sql<D> {
    Sql::select("hour, reason, count", " FROM usage WHERE key_id = ")
        .id(key)
        .push(" AND hour >= ")
        .int(from.0)
        .push(" AND hour < ")
        .int(to.0)
        .push(" ORDER BY hour, reason")
}

pub(super) fn idempotent<D: Dialect>(caller: KeyId, key: &IdempotencyKey, since: Timestamp) -> Sql<D> {
    Sql::select("key_id, fingerprint", " FROM idempotency WHERE caller = ")
        .id(caller)
        .push(" AND key = ")
        .text(key)
        .push(" AND created_at >= ")
        .int(since.as_micros())
}

pub(super) fn key<D: Dialect>(id: KeyId) -> Sql<D> {
    Sql::keys("k.id = ").id(id).push(" ORDER BY s.version DESC")
}

pub(super) fn keys<D: Dialect>(filter: &KeyFilter, before: Option<KeyId>, limit: u32) -> Sql<D> {
    let query = page(Sql::keys("k.id IN ("), filter, before, limit);
    query.push(") ORDER BY k.id DESC, s.version DESC")
}

/// Ids and revisions of keys in the order of their ids.
pub(super) fn key_revisions<D: Dialect>(after: Option<KeyId>, limit: u32) -> Sql<D> {
    let query = Sql::select("id, revision", " FROM keys");
    let query = match after {
        Some(after) => query.push(" WHERE id > ").id(after),
        None => query,
    };
    query.push(" ORDER BY id LIMIT ").int(limit)
}

/// The ids of a page, as a subquery: the page is cut before secrets multiply its rows.
fn page<D: Dialect>(query: Sql<D>, filter: &KeyFilter, before: Option<KeyId>, limit: u32) -> Sql<D> {
    let mut query = match &filter.owner {
        OwnerFilter::Account(account) => query.push("SELECT id FROM keys WHERE account = ").text(account),
        OwnerFilter::User(user) => query.push("SELECT id FROM keys WHERE user_id = ").text(user),
        OwnerFilter::AllButOperators => {
            query.push("SELECT id FROM keys WHERE account IS DISTINCT FROM ").text(AccountId::operator())
        }
    };
    if let Some(before) = before {
        query = query.push(" AND id < ").id(before);
    }
    if let Some(environment) = &filter.environment {
        query = query.push(" AND environment = ").text(environment);
    }
    if !filter.name_prefix.is_empty() {
        // Not LIKE: it folds case, and its wildcards would have to be escaped.
        query = query.push(" AND substr(").push(D::NAME_NFC).push(", 1, length(").text(&filter.name_prefix);
        query = query.push(")) = ").text(&filter.name_prefix);
    }
    if let Some(end) = filter.expires_before {
        query = query.push(" AND expires_at < ").int(end.as_micros());
    }
    if let Some(end) = filter.created_before {
        query = query.push(" AND created_at < ").int(end.as_micros());
    }
    if let Some(since) = filter.unused_since {
        query = query
            .push(" AND created_at < ")
            .int(since.as_micros())
            .push(" AND NOT EXISTS (SELECT 1 FROM ")
            .push(D::USES)
            .push(" WHERE uses.key_id = keys.id AND uses.at >= ")
            .int(since.as_micros())
            .push(")");
    }
    for (at, state) in filter.states.iter().enumerate() {
        query = query.push(if at == 0 { " AND (" } else { " OR " });
        query = in_state(query, *state, filter.now.as_micros());
    }
    if !filter.states.is_empty() {
        query = query.push(")");
    }
    query.push(" ORDER BY id DESC LIMIT ").int(limit)
}

/// The condition of a state at `now`, in the order in which states are told.
fn in_state<D: Dialect>(query: Sql<D>, state: State, now: i64) -> Sql<D> {
    match state {
        State::Revoked => query.push("(revoked_at IS NOT NULL)"),
        State::Disabled => query.push("(revoked_at IS NULL AND disabled_at IS NOT NULL)"),
        State::Expired => {
            query.push("(revoked_at IS NULL AND disabled_at IS NULL AND expires_at <= ").int(now).push(")")
        }
        State::Active => query
            .push("(revoked_at IS NULL AND disabled_at IS NULL AND (expires_at IS NULL OR expires_at > ")
            .int(now)
            .push("))"),
    }
}
