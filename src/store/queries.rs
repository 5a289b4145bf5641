//! The SQL of reads, written once for both databases.
//!
//! The dialects differ in how a value is passed (bound to a placeholder, or as a literal, see
//! `postgres/sql_literal.rs`) and in a few expressions.

use std::marker::PhantomData;

use sqlx::Database;

use crate::domain::{
    key::ApiKeyState,
    name::{AccountId, IdempotencyKey, KeyId, UserId},
    time::{Revision, Timestamp},
};

use super::{
    KeyFilter, LogFilter, OwnerFilter, UsageHour,
    row_decoding::{
        ACCOUNT_COLUMNS, HEAD_COLUMNS, KEY_COLUMNS, LOG_COLUMNS, MEMBER_COLUMNS, ROLE_COLUMNS, SECRET_COLUMNS,
    },
    row_format::{revision_to_i64, role_account_column},
};

/// A value of one of the three types that both databases use.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum SqlValue {
    Int(i64),
    Text(String),
    Bytes(Vec<u8>),
}

/// How a database takes values, and where it stores the last uses of secrets.
pub(super) trait SqlDialect: Database + Sized {
    /// The last use of the secret `s`, whose row in `uses` is `u`.
    const LAST_USED_EXPRESSION: &'static str;
    /// Rows with the columns `key_id` and `at`: one or more for each secret that was used.
    const USES_SUBQUERY: &'static str;
    /// The name of a row of `select_keys` in Unicode Normalization Form C.
    const NAME_NFC_EXPRESSION: &'static str;

    /// Appends a value to a statement: a placeholder, with the value in `bound`; or a literal.
    fn push_value(statement: &mut String, bound: &mut Vec<SqlValue>, value: SqlValue);
}

impl SqlDialect for sqlx::Sqlite {
    const LAST_USED_EXPRESSION: &'static str = "u.at";
    const USES_SUBQUERY: &'static str = "uses";
    const NAME_NFC_EXPRESSION: &'static str = "coalesce(name_nfc, name)";

    fn push_value(statement: &mut String, bound: &mut Vec<SqlValue>, value: SqlValue) {
        statement.push('?');
        bound.push(value);
    }
}

/// A query under construction.
pub(super) struct SqlQuery<D: SqlDialect> {
    statement: String,
    bound: Vec<SqlValue>,
    dialect: PhantomData<fn() -> D>,
}

impl<D: SqlDialect> SqlQuery<D> {
    fn new(statement: String) -> Self {
        SqlQuery { statement, bound: Vec::new(), dialect: PhantomData }
    }

    fn select(columns: &'static str, from: &'static str) -> Self {
        SqlQuery::new(["SELECT ", columns, from].concat())
    }

    /// Keys joined with their secrets, and these with their latest uses.
    fn select_keys(condition: &'static str) -> Self {
        SqlQuery::new(format!(
            "SELECT {KEY_COLUMNS}, {SECRET_COLUMNS}, {} \
             FROM keys k LEFT JOIN secrets s ON s.key_id = k.id \
             LEFT JOIN uses u ON u.key_id = s.key_id AND u.version = s.version WHERE {condition}",
            D::LAST_USED_EXPRESSION
        ))
    }

    fn push_sql(mut self, sql: &'static str) -> Self {
        self.statement.push_str(sql);
        self
    }

    fn push_bound(mut self, value: SqlValue) -> Self {
        D::push_value(&mut self.statement, &mut self.bound, value);
        self
    }

    fn push_int(self, value: impl Into<i64>) -> Self {
        self.push_bound(SqlValue::Int(value.into()))
    }

    fn push_text(self, value: impl ToString) -> Self {
        self.push_bound(SqlValue::Text(value.to_string()))
    }

    /// A list of values with commas between; one that is empty finds nothing.
    fn push_list<T>(self, values: &[T], bind: impl Fn(Self, &T) -> Self) -> Self {
        let mut query = self;
        for (at, value) in values.iter().enumerate() {
            query = bind(if at == 0 { query } else { query.push_sql(", ") }, value);
        }
        if values.is_empty() { query.push_sql("NULL") } else { query }
    }

    fn push_key_id(self, value: KeyId) -> Self {
        self.push_bound(SqlValue::Bytes(value.as_bytes().to_vec()))
    }

    /// The statement, and the values of its placeholders in order.
    pub(super) fn into_parts(self) -> (String, Vec<SqlValue>) {
        (self.statement, self.bound)
    }
}

pub(super) fn head<D: SqlDialect>() -> SqlQuery<D> {
    SqlQuery::select(HEAD_COLUMNS, " FROM meta")
}

pub(super) fn log_after<D: SqlDialect>(revision: Revision, limit: u32) -> SqlQuery<D> {
    SqlQuery::select(LOG_COLUMNS, " FROM log WHERE revision > ")
        .push_int(revision_to_i64(revision))
        .push_sql(" ORDER BY revision LIMIT ")
        .push_int(limit)
}

pub(super) fn log<D: SqlDialect>(filter: &LogFilter, cursor: Option<Revision>, limit: u32) -> SqlQuery<D> {
    let after = cursor.filter(|_| filter.oldest_first).unwrap_or_default().max(filter.after);
    let before = cursor.filter(|_| !filter.oldest_first).map_or(i64::MAX, revision_to_i64);
    let mut query = SqlQuery::select(LOG_COLUMNS, " FROM log WHERE revision > ")
        .push_int(revision_to_i64(after))
        .push_sql(" AND revision < ")
        .push_int(before);
    if let Some(account) = &filter.account {
        query = query.push_sql(" AND account = ").push_text(account);
    }
    if let Some(key_id) = filter.key_id {
        query = query.push_sql(" AND key_id = ").push_key_id(key_id);
    }
    if let Some(actor) = &filter.actor {
        query = query.push_sql(" AND actor = ").push_text(actor);
    }
    if let Some(from) = filter.from {
        query = query.push_sql(" AND at >= ").push_int(from.as_micros());
    }
    if let Some(to) = filter.to {
        query = query.push_sql(" AND at < ").push_int(to.as_micros());
    }
    if let Some(user) = &filter.acting_user {
        query = query.push_sql(" AND acting_user = ").push_text(user);
    }
    if let Some(action) = &filter.action {
        query = query.push_sql(" AND action = ").push_text(action);
    }
    let order =
        if filter.oldest_first { " ORDER BY revision LIMIT " } else { " ORDER BY revision DESC LIMIT " };
    query.push_sql(order).push_int(limit)
}

pub(super) fn log_entries<D: SqlDialect>(revisions: &[Revision]) -> SqlQuery<D> {
    let query = SqlQuery::select(LOG_COLUMNS, " FROM log WHERE revision IN (");
    query.push_list(revisions, |query, revision| query.push_int(revision_to_i64(*revision))).push_sql(")")
}

pub(super) fn keys_by_id<D: SqlDialect>(ids: &[KeyId]) -> SqlQuery<D> {
    let query = SqlQuery::select_keys("k.id IN (");
    query.push_list(ids, |query, id| query.push_key_id(*id)).push_sql(") ORDER BY k.id, s.version DESC")
}

/// The same in the same columns, without the latest uses, for PostgreSQL. Its planner keeps a subquery with OFFSET as it is:
/// a join might read all secrets for each page.
pub(super) fn keys_without_uses(ids: &[KeyId]) -> SqlQuery<sqlx::Postgres> {
    let query = SqlQuery::new(format!(
        "SELECT {KEY_COLUMNS}, {SECRET_COLUMNS}, NULL FROM keys k \
         LEFT JOIN LATERAL (SELECT * FROM secrets WHERE key_id = k.id OFFSET 0) s ON true WHERE k.id IN ("
    ));
    query.push_list(ids, |query, id| query.push_key_id(*id)).push_sql(") ORDER BY k.id, s.version DESC")
}

pub(super) fn checkpoint<D: SqlDialect>() -> SqlQuery<D> {
    SqlQuery::select("revision, hash, entries, made_at", " FROM checkpoints ORDER BY revision DESC LIMIT 1")
}

pub(super) fn log_hash<D: SqlDialect>(revision: Revision) -> SqlQuery<D> {
    SqlQuery::select("revision, hash", " FROM log WHERE revision = ").push_int(revision_to_i64(revision))
}

pub(super) fn account<D: SqlDialect>(id: &AccountId) -> SqlQuery<D> {
    SqlQuery::select(ACCOUNT_COLUMNS, " FROM accounts WHERE id = ").push_text(id)
}

pub(super) fn accounts<D: SqlDialect>(after: Option<&AccountId>, limit: u32) -> SqlQuery<D> {
    SqlQuery::select(ACCOUNT_COLUMNS, " FROM accounts WHERE id > ")
        .push_text(after.map_or("", AccountId::as_str))
        .push_sql(" ORDER BY id LIMIT ")
        .push_int(limit)
}

pub(super) fn all_accounts<D: SqlDialect>() -> SqlQuery<D> {
    SqlQuery::select(ACCOUNT_COLUMNS, " FROM accounts")
}

pub(super) fn roles<D: SqlDialect>(account: Option<&AccountId>) -> SqlQuery<D> {
    SqlQuery::select(ROLE_COLUMNS, " FROM roles WHERE account IN ('', ")
        .push_text(role_account_column(account))
        .push_sql(") ORDER BY name, account")
}

pub(super) fn all_roles<D: SqlDialect>() -> SqlQuery<D> {
    SqlQuery::select(ROLE_COLUMNS, " FROM roles")
}

pub(super) fn members<D: SqlDialect>(account: &AccountId, after: Option<&UserId>, limit: u32) -> SqlQuery<D> {
    SqlQuery::select(MEMBER_COLUMNS, " FROM members WHERE account = ")
        .push_text(account)
        .push_sql(" AND user_id > ")
        .push_text(after.map_or("", UserId::as_str))
        .push_sql(" ORDER BY user_id LIMIT ")
        .push_int(limit)
}

pub(super) fn memberships<D: SqlDialect>(user: &UserId) -> SqlQuery<D> {
    SqlQuery::select(MEMBER_COLUMNS, " FROM members WHERE user_id = ")
        .push_text(user)
        .push_sql(" ORDER BY account")
}

pub(super) fn all_members<D: SqlDialect>() -> SqlQuery<D> {
    SqlQuery::select(MEMBER_COLUMNS, " FROM members")
}

/// The quota usage of unrevoked keys.
pub(super) fn all_quota_usage<D: SqlDialect>() -> SqlQuery<D> {
    SqlQuery::select(
        "q.key_id, q.period, q.used",
        " FROM quotas q JOIN keys k ON k.id = q.key_id WHERE k.revoked_at IS NULL",
    )
}

pub(super) fn usage<D: SqlDialect>(key: KeyId, from: UsageHour, to: UsageHour) -> SqlQuery<D> {
    SqlQuery::select("hour, reason, count", " FROM usage WHERE key_id = ")
        .push_key_id(key)
        .push_sql(" AND hour >= ")
        .push_int(from.0)
        .push_sql(" AND hour < ")
        .push_int(to.0)
        .push_sql(" ORDER BY hour, reason")
}

pub(super) fn idempotent_request<D: SqlDialect>(
    caller: KeyId,
    key: &IdempotencyKey,
    since: Timestamp,
) -> SqlQuery<D> {
    SqlQuery::select("key_id, fingerprint", " FROM idempotency WHERE caller = ")
        .push_key_id(caller)
        .push_sql(" AND key = ")
        .push_text(key)
        .push_sql(" AND created_at >= ")
        .push_int(since.as_micros())
}

pub(super) fn key<D: SqlDialect>(id: KeyId) -> SqlQuery<D> {
    SqlQuery::select_keys("k.id = ").push_key_id(id).push_sql(" ORDER BY s.version DESC")
}

pub(super) fn keys<D: SqlDialect>(filter: &KeyFilter, before: Option<KeyId>, limit: u32) -> SqlQuery<D> {
    let query = push_key_page(SqlQuery::select_keys("k.id IN ("), filter, before, limit);
    query.push_sql(") ORDER BY k.id DESC, s.version DESC")
}

/// Ids and revisions of keys, in ascending order of their ids.
pub(super) fn key_revisions<D: SqlDialect>(after: Option<KeyId>, limit: u32) -> SqlQuery<D> {
    let query = SqlQuery::select("id, revision", " FROM keys");
    let query = match after {
        Some(after) => query.push_sql(" WHERE id > ").push_key_id(after),
        None => query,
    };
    query.push_sql(" ORDER BY id LIMIT ").push_int(limit)
}

/// The key ids of secrets that belong to no key.
pub(super) fn secrets_without_key<D: SqlDialect>(limit: u32) -> SqlQuery<D> {
    let from = " FROM secrets s WHERE NOT EXISTS (SELECT 1 FROM keys k WHERE k.id = s.key_id) \
                GROUP BY s.key_id ORDER BY s.key_id LIMIT ";
    SqlQuery::select("s.key_id", from).push_int(limit)
}

/// The ids of a page, as a subquery: the limit applies before the join with secrets multiplies the rows.
fn push_key_page<D: SqlDialect>(
    query: SqlQuery<D>,
    filter: &KeyFilter,
    before: Option<KeyId>,
    limit: u32,
) -> SqlQuery<D> {
    let mut query = match &filter.owner {
        OwnerFilter::Account(account) => {
            query.push_sql("SELECT id FROM keys WHERE account = ").push_text(account)
        }
        OwnerFilter::User(user) => query.push_sql("SELECT id FROM keys WHERE user_id = ").push_text(user),
        OwnerFilter::ExceptOperator => query
            .push_sql("SELECT id FROM keys WHERE account IS DISTINCT FROM ")
            .push_text(AccountId::operator()),
    };
    if let Some(before) = before {
        query = query.push_sql(" AND id < ").push_key_id(before);
    }
    if let Some(environment) = &filter.environment {
        query = query.push_sql(" AND environment = ").push_text(environment);
    }
    if !filter.name_prefix.is_empty() {
        // Not LIKE: it folds case, and its wildcards would have to be escaped.
        query = query
            .push_sql(" AND substr(")
            .push_sql(D::NAME_NFC_EXPRESSION)
            .push_sql(", 1, length(")
            .push_text(&filter.name_prefix);
        query = query.push_sql(")) = ").push_text(&filter.name_prefix);
    }
    if let Some(end) = filter.expires_before {
        query = query.push_sql(" AND expires_at < ").push_int(end.as_micros());
    }
    if let Some(end) = filter.created_before {
        query = query.push_sql(" AND created_at < ").push_int(end.as_micros());
    }
    if let Some(since) = filter.unused_since {
        query = query
            .push_sql(" AND created_at < ")
            .push_int(since.as_micros())
            .push_sql(" AND NOT EXISTS (SELECT 1 FROM ")
            .push_sql(D::USES_SUBQUERY)
            .push_sql(" WHERE uses.key_id = keys.id AND uses.at >= ")
            .push_int(since.as_micros())
            .push_sql(")");
    }
    for (at, state) in filter.states.iter().enumerate() {
        query = query.push_sql(if at == 0 { " AND (" } else { " OR " });
        query = push_state_condition(query, *state, filter.now.as_micros());
    }
    if !filter.states.is_empty() {
        query = query.push_sql(")");
    }
    query.push_sql(" ORDER BY id DESC LIMIT ").push_int(limit)
}

/// The condition of a state at `now`, by the same precedence as [`ApiKeyState`].
fn push_state_condition<D: SqlDialect>(query: SqlQuery<D>, state: ApiKeyState, now: i64) -> SqlQuery<D> {
    match state {
        ApiKeyState::Revoked => query.push_sql("(revoked_at IS NOT NULL)"),
        ApiKeyState::Disabled => query.push_sql("(revoked_at IS NULL AND disabled_at IS NOT NULL)"),
        ApiKeyState::Expired => query
            .push_sql("(revoked_at IS NULL AND disabled_at IS NULL AND expires_at <= ")
            .push_int(now)
            .push_sql(")"),
        ApiKeyState::Active => query
            .push_sql("(revoked_at IS NULL AND disabled_at IS NULL AND (expires_at IS NULL OR expires_at > ")
            .push_int(now)
            .push_sql("))"),
    }
}
