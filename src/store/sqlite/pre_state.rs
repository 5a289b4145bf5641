//! What the tables say of everything that a run of writes touches: a question for each record, and none for what the run
//! does not touch. Whoever asks has the file to write in, so that nothing of it changes before the run is written.

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

/// Every statement that asks.
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

/// Asks everything.
pub(super) fn read_pre_state(connection: &Connection, asked: &PreStateQuery) -> SqliteResult<PreState> {
    let mut asking = PreStateReader { connection, pre_state: PreState::default() };
    asking.lookup_keys(asked)?;
    asking.lookup_all(
        SELECT_ACCOUNT,
        &asked.accounts,
        |ask, id| ask.query([id.as_str()]),
        |row, facts| pre_state::read_account(row, facts),
    )?;
    asking.lookup_all(
        SELECT_FOLDED_ACCOUNT,
        &asked.folded_accounts,
        |ask, id| ask.query([id.as_str()]),
        |row, facts| pre_state::read_folded_account(row, facts),
    )?;
    asking.lookup_all(
        SELECT_ROLE,
        &asked.roles,
        |ask, (account, name)| ask.query([role_account_column(account.as_ref()), name.as_str()]),
        |row, facts| pre_state::read_role(row, facts),
    )?;
    asking.lookup_all(
        SELECT_MEMBER,
        &asked.members,
        |ask, (account, user)| ask.query([account.as_str(), user.as_str()]),
        |row, facts| pre_state::read_member(row, facts),
    )?;
    asking.lookup_all(
        SELECT_TALLY,
        &asked.tallies,
        |ask, owner| {
            ask.query([
                owner.account().map_or("", AccountId::as_str),
                owner.user().map_or("", UserId::as_str),
            ])
        },
        |row, facts| pre_state::read_tally(row, facts),
    )?;
    asking.lookup_all(
        SELECT_ROLE_COUNT,
        &asked.role_counts,
        |ask, account| ask.query([account.as_str()]),
        |row, facts| pre_state::read_role_count(row, facts),
    )?;
    if let Some(role) = &asked.role_to_delete {
        asking.lookup_role_uses(role)?;
    }
    Ok(asking.pre_state)
}

struct PreStateReader<'c> {
    connection: &'c Connection,
    pre_state: PreState,
}

impl PreStateReader<'_> {
    /// Asks one question about each thing that is to be known of it.
    fn lookup_all<T>(
        &mut self,
        sql: &'static str,
        asked: impl IntoIterator<Item = T>,
        ask: impl for<'s> Fn(&'s mut CachedStatement<'_>, T) -> rusqlite::Result<Rows<'s>>,
        take: impl Fn(&Row<'_>, &mut PreState) -> PreStateResult<()>,
    ) -> SqliteResult<()> {
        let mut asked = asked.into_iter().peekable();
        if asked.peek().is_none() {
            return Ok(());
        }
        let mut statement = self.connection.prepare_cached(sql)?;
        for thing in asked {
            let mut rows = ask(&mut statement, thing)?;
            while let Some(row) = rows.next()? {
                take(row, &mut self.pre_state)?;
            }
        }
        Ok(())
    }

    fn lookup_keys(&mut self, asked: &PreStateQuery) -> SqliteResult<()> {
        self.lookup_all(
            SELECT_REQUEST,
            &asked.requests,
            |ask, (caller, key)| ask.query(params![caller.as_bytes(), key.as_str()]),
            |row, facts| pre_state::read_request(row, facts),
        )?;
        self.lookup_all(
            SELECT_KEY,
            &asked.keys,
            |ask, id| ask.query([id.as_bytes()]),
            |row, facts| pre_state::read_key(row, facts),
        )?;
        for (owner, name) in &asked.names {
            let (sql, owner) = match owner {
                KeyOwner::Account(account) => (SELECT_ACCOUNT_KEY_NAME, account.as_str()),
                KeyOwner::User(user) => (SELECT_USER_KEY_NAME, user.as_str()),
            };
            let place = [owner, name.as_str()];
            self.lookup_all(
                sql,
                [place],
                |ask, place| ask.query(place),
                |row, facts| pre_state::read_name(row, facts),
            )?;
        }
        self.lookup_all(
            SELECT_DIGEST,
            &asked.digests,
            |ask, digest| ask.query([digest.as_bytes()]),
            |row, facts| pre_state::read_digest(row, facts),
        )?;
        self.lookup_all(
            SELECT_RETIRED_SECRET,
            &asked.retired_secrets,
            |ask, (id, version)| ask.query(params![id.as_bytes(), version]),
            |row, facts| pre_state::read_retired_secret(row, facts),
        )
    }

    /// Of a global role, accounts with an own role of that name do not count.
    fn lookup_role_uses(&mut self, (account, name): &RoleId) -> SqliteResult<()> {
        let sql = "SELECT \
             (SELECT count(*) FROM keys WHERE revoked_at IS NULL \
              AND instr(' ' || roles || ' ', ' ' || ?1 || ' ') > 0 AND (account = ?2 OR (?2 = '' AND NOT EXISTS \
              (SELECT 1 FROM roles own WHERE own.account = keys.account AND own.name = ?1)))), \
             (SELECT count(*) FROM members WHERE role = ?1 AND (account = ?2 OR (?2 = '' AND NOT EXISTS \
              (SELECT 1 FROM roles own WHERE own.account = members.account AND own.name = ?1))))";
        let place = [name.as_str(), role_account_column(account.as_ref())];
        self.lookup_all(
            sql,
            [place],
            |ask, place| ask.query(place),
            |row, facts| pre_state::read_role_uses(row, facts),
        )
    }
}
