//! Reads the state of the tables before a run of writes: a lookup for each record that the run touches.
//!
//! The caller has begun a write transaction, so nothing changes before the run is written.

use rusqlite::{CachedStatement, Connection, Row, Rows, params};

use crate::{
    domain::{
        key::KeyOwner,
        name::{AccountId, UserId},
    },
    store::{
        pre_state::{self, PreStateResult},
        row_format::role_account_column,
        write_plan::{PreState, PreStateQuery, RoleId},
    },
};

use super::connection::SqliteResult;

const SELECT_REQUEST: &str =
    "SELECT caller, key, key_id, fingerprint, created_at FROM idempotency WHERE caller = ?1 AND key = ?2";
const SELECT_KEY: &str = "SELECT id, revision FROM keys WHERE id = ?1";
const SELECT_ACCOUNT_KEY_NAME: &str = "SELECT account, NULL, ?2, id, name FROM keys INDEXED BY key_names_of_account \
     WHERE account = ?1 AND name = ?2 AND revoked_at IS NULL \
     UNION ALL SELECT account, NULL, ?2, id, name FROM keys INDEXED BY key_name_nfc_of_account \
     WHERE account = ?1 AND name_nfc = ?2 AND revoked_at IS NULL";
const SELECT_USER_KEY_NAME: &str = "SELECT NULL, user_id, ?2, id, name FROM keys INDEXED BY key_names_of_user \
     WHERE user_id = ?1 AND name = ?2 AND revoked_at IS NULL \
     UNION ALL SELECT NULL, user_id, ?2, id, name FROM keys INDEXED BY key_name_nfc_of_user \
     WHERE user_id = ?1 AND name_nfc = ?2 AND revoked_at IS NULL";
const SELECT_DIGEST: &str = "SELECT digest, key_id, version, expires_at, sum FROM secrets WHERE digest = ?1";
const SELECT_RETIRED_SECRET: &str = "SELECT digest, version, hint, created_at, expires_at, sum, key_id FROM secrets \
     WHERE key_id = ?1 AND version = ?2";
const SELECT_ACCOUNT: &str = "SELECT id, revision FROM accounts WHERE id = ?1";
const SELECT_FOLDED_ACCOUNT: &str =
    "SELECT lower(id), id FROM accounts INDEXED BY accounts_by_folded_id WHERE lower(id) = ?1";
const SELECT_ROLE: &str = "SELECT account, name, revision FROM roles WHERE account = ?1 AND name = ?2";
const SELECT_MEMBER: &str =
    "SELECT account, user_id, revision FROM members WHERE account = ?1 AND user_id = ?2";
const SELECT_TALLY: &str = "SELECT account, user_id, keys, hour, rotations, log_rows FROM tallies \
     WHERE account = ?1 AND user_id = ?2";
const SELECT_ROLE_COUNT: &str = "SELECT account, count(*) FROM roles WHERE account = ?1 GROUP BY account";

/// All lookups, for the test that each uses an index.
#[cfg(test)]
pub(super) const ALL_STATEMENTS: [&str; 12] = [
    SELECT_REQUEST,
    SELECT_KEY,
    SELECT_ACCOUNT_KEY_NAME,
    SELECT_USER_KEY_NAME,
    SELECT_DIGEST,
    SELECT_RETIRED_SECRET,
    SELECT_ACCOUNT,
    SELECT_FOLDED_ACCOUNT,
    SELECT_ROLE,
    SELECT_MEMBER,
    SELECT_TALLY,
    SELECT_ROLE_COUNT,
];

/// Runs all lookups of a query.
pub(super) fn read_pre_state(connection: &Connection, query: &PreStateQuery) -> SqliteResult<PreState> {
    let mut reader = PreStateReader { connection, pre_state: PreState::default() };
    reader.lookup_keys(query)?;
    reader.lookup_all(
        SELECT_ACCOUNT,
        &query.accounts,
        |statement, id| statement.query([id.as_str()]),
        |row, state| pre_state::read_account(row, state),
    )?;
    reader.lookup_all(
        SELECT_FOLDED_ACCOUNT,
        &query.folded_accounts,
        |statement, id| statement.query([id.as_str()]),
        |row, state| pre_state::read_folded_account(row, state),
    )?;
    reader.lookup_all(
        SELECT_ROLE,
        &query.roles,
        |statement, (account, name)| statement.query([role_account_column(account.as_ref()), name.as_str()]),
        |row, state| pre_state::read_role(row, state),
    )?;
    reader.lookup_all(
        SELECT_MEMBER,
        &query.members,
        |statement, (account, user)| statement.query([account.as_str(), user.as_str()]),
        |row, state| pre_state::read_member(row, state),
    )?;
    reader.lookup_all(
        SELECT_TALLY,
        &query.tallies,
        |statement, owner| {
            statement.query([
                owner.account().map_or("", AccountId::as_str),
                owner.user().map_or("", UserId::as_str),
            ])
        },
        |row, state| pre_state::read_tally(row, state),
    )?;
    reader.lookup_all(
        SELECT_ROLE_COUNT,
        &query.role_counts,
        |statement, account| statement.query([account.as_str()]),
        |row, state| pre_state::read_role_count(row, state),
    )?;
    if let Some(role) = &query.role_to_delete {
        reader.lookup_role_uses(role)?;
    }
    Ok(reader.pre_state)
}

struct PreStateReader<'c> {
    connection: &'c Connection,
    pre_state: PreState,
}

impl PreStateReader<'_> {
    /// Runs one lookup for each of `items`.
    fn lookup_all<T>(
        &mut self,
        sql: &'static str,
        items: impl IntoIterator<Item = T>,
        bind: impl for<'s> Fn(&'s mut CachedStatement<'_>, T) -> rusqlite::Result<Rows<'s>>,
        take: impl Fn(&Row<'_>, &mut PreState) -> PreStateResult<()>,
    ) -> SqliteResult<()> {
        let mut items = items.into_iter().peekable();
        if items.peek().is_none() {
            return Ok(());
        }
        let mut statement = self.connection.prepare_cached(sql)?;
        for item in items {
            let mut rows = bind(&mut statement, item)?;
            while let Some(row) = rows.next()? {
                take(row, &mut self.pre_state)?;
            }
        }
        Ok(())
    }

    fn lookup_keys(&mut self, query: &PreStateQuery) -> SqliteResult<()> {
        self.lookup_all(
            SELECT_REQUEST,
            &query.requests,
            |statement, (caller, key)| statement.query(params![caller.as_bytes(), key.as_str()]),
            |row, state| pre_state::read_request(row, state),
        )?;
        self.lookup_all(
            SELECT_KEY,
            &query.keys,
            |statement, id| statement.query([id.as_bytes()]),
            |row, state| pre_state::read_key(row, state),
        )?;
        for (owner, name) in &query.names {
            let (sql, owner) = match owner {
                KeyOwner::Account(account) => (SELECT_ACCOUNT_KEY_NAME, account.as_str()),
                KeyOwner::User(user) => (SELECT_USER_KEY_NAME, user.as_str()),
            };
            let arguments = [owner, name.as_str()];
            self.lookup_all(
                sql,
                [arguments],
                |statement, arguments| statement.query(arguments),
                |row, state| pre_state::read_name(row, state),
            )?;
        }
        self.lookup_all(
            SELECT_DIGEST,
            &query.digests,
            |statement, digest| statement.query([digest.as_bytes()]),
            |row, state| pre_state::read_digest(row, state),
        )?;
        self.lookup_all(
            SELECT_RETIRED_SECRET,
            &query.retired_secrets,
            |statement, (id, version)| statement.query(params![id.as_bytes(), version]),
            |row, state| pre_state::read_retired_secret(row, state),
        )
    }

    /// Counts the uses of a role. For a global role, accounts with their own role of that name do not count.
    fn lookup_role_uses(&mut self, (account, name): &RoleId) -> SqliteResult<()> {
        let sql = "SELECT \
             (SELECT count(*) FROM keys WHERE revoked_at IS NULL \
              AND instr(' ' || roles || ' ', ' ' || ?1 || ' ') > 0 AND (account = ?2 OR (?2 = '' AND NOT EXISTS \
              (SELECT 1 FROM roles own WHERE own.account = keys.account AND own.name = ?1)))), \
             (SELECT count(*) FROM members WHERE role = ?1 AND (account = ?2 OR (?2 = '' AND NOT EXISTS \
              (SELECT 1 FROM roles own WHERE own.account = members.account AND own.name = ?1))))";
        let arguments = [name.as_str(), role_account_column(account.as_ref())];
        self.lookup_all(
            sql,
            [arguments],
            |statement, arguments| statement.query(arguments),
            |row, state| pre_state::read_role_uses(row, state),
        )
    }
}
