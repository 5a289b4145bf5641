//! What the tables say of everything that a run of writes touches: a question for each record, and none for what the run
//! does not touch. Whoever asks has the file to write in, so that nothing of it changes before the run is written.

use rusqlite::{CachedStatement, Connection, Row, Rows, params};

use crate::{
    domain::{
        key::Owner,
        name::{AccountId, UserId},
    },
    store::{
        facts::{self, Read},
        plan::{Facts, Questions, RolePlace},
        rows::role_account,
    },
};

use super::connection::Result;

const REQUESTS: &str =
    "SELECT caller, key, key_id, fingerprint, created_at FROM idempotency WHERE caller = ?1 AND key = ?2";
const KEYS: &str = "SELECT id, revision FROM keys WHERE id = ?1";
const NAMES_OF_ACCOUNTS: &str = "SELECT account, NULL, ?2, id, name FROM keys INDEXED BY key_names_of_account \
     WHERE account = ?1 AND name = ?2 AND revoked_at IS NULL \
     UNION ALL SELECT account, NULL, ?2, id, name FROM keys INDEXED BY key_name_nfc_of_account \
     WHERE account = ?1 AND name_nfc = ?2 AND revoked_at IS NULL";
const NAMES_OF_USERS: &str = "SELECT NULL, user_id, ?2, id, name FROM keys INDEXED BY key_names_of_user \
     WHERE user_id = ?1 AND name = ?2 AND revoked_at IS NULL \
     UNION ALL SELECT NULL, user_id, ?2, id, name FROM keys INDEXED BY key_name_nfc_of_user \
     WHERE user_id = ?1 AND name_nfc = ?2 AND revoked_at IS NULL";
const DIGESTS: &str = "SELECT digest, key_id, version, expires_at, sum FROM secrets WHERE digest = ?1";
const LEFT: &str = "SELECT digest, version, hint, created_at, expires_at, sum, key_id FROM secrets \
     WHERE key_id = ?1 AND version = ?2";
const ACCOUNTS: &str = "SELECT id, revision FROM accounts WHERE id = ?1";
const FOLDED_ACCOUNTS: &str =
    "SELECT lower(id), id FROM accounts INDEXED BY accounts_by_folded_id WHERE lower(id) = ?1";
const ROLES: &str = "SELECT account, name, revision FROM roles WHERE account = ?1 AND name = ?2";
const MEMBERS: &str = "SELECT account, user_id, revision FROM members WHERE account = ?1 AND user_id = ?2";
const TALLIES: &str = "SELECT account, user_id, keys, hour, rotations, log_rows FROM tallies \
     WHERE account = ?1 AND user_id = ?2";
const ROLE_COUNTS: &str = "SELECT account, count(*) FROM roles WHERE account = ?1 GROUP BY account";

/// Every statement that asks.
#[cfg(test)]
pub(super) const ALL: [&str; 12] = [
    REQUESTS,
    KEYS,
    NAMES_OF_ACCOUNTS,
    NAMES_OF_USERS,
    DIGESTS,
    LEFT,
    ACCOUNTS,
    FOLDED_ACCOUNTS,
    ROLES,
    MEMBERS,
    TALLIES,
    ROLE_COUNTS,
];

/// Asks everything.
pub(super) fn answers(connection: &Connection, asked: &Questions) -> Result<Facts> {
    let mut asking = Asking { connection, facts: Facts::default() };
    asking.keys(asked)?;
    asking.all(
        ACCOUNTS,
        &asked.accounts,
        |ask, id| ask.query([id.as_str()]),
        |row, facts| facts::account(row, facts),
    )?;
    asking.all(
        FOLDED_ACCOUNTS,
        &asked.folded_accounts,
        |ask, id| ask.query([id.as_str()]),
        |row, facts| facts::folded_account(row, facts),
    )?;
    asking.all(
        ROLES,
        &asked.roles,
        |ask, (account, name)| ask.query([role_account(account.as_ref()), name.as_str()]),
        |row, facts| facts::role(row, facts),
    )?;
    asking.all(
        MEMBERS,
        &asked.members,
        |ask, (account, user)| ask.query([account.as_str(), user.as_str()]),
        |row, facts| facts::member(row, facts),
    )?;
    asking.all(
        TALLIES,
        &asked.tallies,
        |ask, owner| {
            ask.query([
                owner.account().map_or("", AccountId::as_str),
                owner.user().map_or("", UserId::as_str),
            ])
        },
        |row, facts| facts::tally(row, facts),
    )?;
    asking.all(
        ROLE_COUNTS,
        &asked.role_counts,
        |ask, account| ask.query([account.as_str()]),
        |row, facts| facts::role_count(row, facts),
    )?;
    if let Some(role) = &asked.uses_of {
        asking.uses(role)?;
    }
    Ok(asking.facts)
}

struct Asking<'c> {
    connection: &'c Connection,
    facts: Facts,
}

impl Asking<'_> {
    /// Asks one question about each thing that is to be known of it.
    fn all<T>(
        &mut self,
        sql: &'static str,
        asked: impl IntoIterator<Item = T>,
        ask: impl for<'s> Fn(&'s mut CachedStatement<'_>, T) -> rusqlite::Result<Rows<'s>>,
        take: impl Fn(&Row<'_>, &mut Facts) -> Read<()>,
    ) -> Result<()> {
        let mut asked = asked.into_iter().peekable();
        if asked.peek().is_none() {
            return Ok(());
        }
        let mut statement = self.connection.prepare_cached(sql)?;
        for thing in asked {
            let mut rows = ask(&mut statement, thing)?;
            while let Some(row) = rows.next()? {
                take(row, &mut self.facts)?;
            }
        }
        Ok(())
    }

    fn keys(&mut self, asked: &Questions) -> Result<()> {
        self.all(
            REQUESTS,
            &asked.requests,
            |ask, (caller, key)| ask.query(params![caller.as_bytes(), key.as_str()]),
            |row, facts| facts::request(row, facts),
        )?;
        self.all(
            KEYS,
            &asked.keys,
            |ask, id| ask.query([id.as_bytes()]),
            |row, facts| facts::key(row, facts),
        )?;
        for (owner, name) in &asked.names {
            let (sql, owner) = match owner {
                Owner::Account(account) => (NAMES_OF_ACCOUNTS, account.as_str()),
                Owner::User(user) => (NAMES_OF_USERS, user.as_str()),
            };
            let place = [owner, name.as_str()];
            self.all(sql, [place], |ask, place| ask.query(place), |row, facts| facts::name(row, facts))?;
        }
        self.all(
            DIGESTS,
            &asked.digests,
            |ask, digest| ask.query([digest.as_bytes()]),
            |row, facts| facts::digest(row, facts),
        )?;
        self.all(
            LEFT,
            &asked.left,
            |ask, (id, version)| ask.query(params![id.as_bytes(), version]),
            |row, facts| facts::left(row, facts),
        )
    }

    /// Of a global role, accounts with an own role of that name do not count.
    fn uses(&mut self, (account, name): &RolePlace) -> Result<()> {
        let sql = "SELECT \
             (SELECT count(*) FROM keys WHERE revoked_at IS NULL \
              AND instr(' ' || roles || ' ', ' ' || ?1 || ' ') > 0 AND (account = ?2 OR (?2 = '' AND NOT EXISTS \
              (SELECT 1 FROM roles own WHERE own.account = keys.account AND own.name = ?1)))), \
             (SELECT count(*) FROM members WHERE role = ?1 AND (account = ?2 OR (?2 = '' AND NOT EXISTS \
              (SELECT 1 FROM roles own WHERE own.account = members.account AND own.name = ?1))))";
        let place = [name.as_str(), role_account(account.as_ref())];
        self.all(sql, [place], |ask, place| ask.query(place), |row, facts| facts::uses(row, facts))
    }
}
