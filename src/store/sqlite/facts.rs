//! What the tables say of everything that a run of writes touches: a question for each kind of record, and none for
//! what the run does not touch. Whoever asks has the file to write in, so that nothing of it changes before the run
//! is written.

use sqlx::{SqliteConnection, sqlite::SqliteRow};

use crate::{
    domain::{key::Owner, name::KeyName},
    store::{
        facts::{self, Take},
        plan::{Facts, Questions, RolePlace},
        rows::role_account,
    },
};

use super::values::{Query, Result, Statement};

/// The tables are met by what is asked, never the other way round, whatever the planner thinks of their lengths: that
/// is what `CROSS JOIN` says in SQLite.
const REQUESTS: Statement = Statement {
    head: "WITH asked (caller, key) AS (",
    row: "(?, ?)",
    tail: ") SELECT i.caller, i.key, i.key_id, i.fingerprint, i.created_at FROM asked \
           CROSS JOIN idempotency i ON i.caller = asked.caller AND i.key = asked.key",
};
const KEYS: Statement = Statement {
    head: "WITH asked (id) AS (",
    row: "(?)",
    tail: ") SELECT k.id, k.revision FROM asked CROSS JOIN keys k ON k.id = asked.id",
};
const NAMES_OF_ACCOUNTS: Statement = Statement {
    head: "WITH asked (account, name) AS (",
    row: "(?, ?)",
    tail: ") SELECT k.account, NULL, k.name, k.id FROM asked CROSS JOIN keys k INDEXED BY key_names_of_account \
           ON k.account = asked.account AND k.name = asked.name WHERE k.revoked_at IS NULL",
};
const NAMES_OF_USERS: Statement = Statement {
    head: "WITH asked (user_id, name) AS (",
    row: "(?, ?)",
    tail: ") SELECT NULL, k.user_id, k.name, k.id FROM asked CROSS JOIN keys k INDEXED BY key_names_of_user \
           ON k.user_id = asked.user_id AND k.name = asked.name WHERE k.revoked_at IS NULL",
};
const DIGESTS: Statement = Statement {
    head: "WITH asked (digest) AS (",
    row: "(?)",
    tail: ") SELECT s.digest, s.key_id, s.version, s.expires_at, s.sum FROM asked \
           CROSS JOIN secrets s ON s.digest = asked.digest",
};
const LEFT: Statement = Statement {
    head: "WITH asked (key_id, version) AS (",
    row: "(?, ?)",
    tail: ") SELECT s.digest, s.version, s.hint, s.created_at, s.expires_at, s.sum, s.key_id FROM asked \
           CROSS JOIN secrets s ON s.key_id = asked.key_id AND s.version = asked.version",
};
const ACCOUNTS: Statement = Statement {
    head: "WITH asked (id) AS (",
    row: "(?)",
    tail: ") SELECT a.id, a.revision FROM asked CROSS JOIN accounts a ON a.id = asked.id",
};
const ROLES: Statement = Statement {
    head: "WITH asked (account, name) AS (",
    row: "(?, ?)",
    tail: ") SELECT r.account, r.name, r.revision FROM asked \
           CROSS JOIN roles r ON r.account = asked.account AND r.name = asked.name",
};
const MEMBERS: Statement = Statement {
    head: "WITH asked (account, user_id) AS (",
    row: "(?, ?)",
    tail: ") SELECT m.account, m.user_id, m.revision FROM asked \
           CROSS JOIN members m ON m.account = asked.account AND m.user_id = asked.user_id",
};

/// Every statement that asks.
#[cfg(test)]
pub(super) const ALL: [Statement; 9] =
    [REQUESTS, KEYS, NAMES_OF_ACCOUNTS, NAMES_OF_USERS, DIGESTS, LEFT, ACCOUNTS, ROLES, MEMBERS];

/// Asks everything.
pub(super) async fn answers(connection: &mut SqliteConnection, asked: &Questions) -> Result<Facts> {
    let mut asking = Asking { connection, facts: Facts::default() };
    asking.keys(asked).await?;
    let text = |query: Query, text: &str| query.bind(text.to_owned());
    asking.all(&ACCOUNTS, &asked.accounts, |query, id| text(query, id.as_str()), facts::account).await?;
    let place = |query, (account, name): &&RolePlace| {
        text(text(query, role_account(account.as_ref())), name.as_str())
    };
    asking.all(&ROLES, &asked.roles, place, facts::role).await?;
    asking
        .all(
            &MEMBERS,
            &asked.members,
            |query, (account, user)| text(text(query, account.as_str()), user.as_str()),
            facts::member,
        )
        .await?;
    if let Some(role) = &asked.uses_of {
        asking.uses(role).await?;
    }
    Ok(asking.facts)
}

struct Asking<'c> {
    connection: &'c mut SqliteConnection,
    facts: Facts,
}

impl Asking<'_> {
    /// Asks one question about everything that is to be known of it.
    async fn all<T>(
        &mut self,
        statement: &Statement,
        asked: impl IntoIterator<Item = T>,
        bind: impl Fn(Query, &T) -> Query,
        take: Take<SqliteRow>,
    ) -> Result<()> {
        let asked: Vec<T> = asked.into_iter().collect();
        let found = statement.read(self.connection, &asked, bind).await?;
        found.iter().try_for_each(|row| take(row, &mut self.facts))
    }

    async fn keys(&mut self, asked: &Questions) -> Result<()> {
        let blob = |query: Query, bytes: &[u8]| query.bind(bytes.to_vec());
        self.all(
            &REQUESTS,
            &asked.requests,
            |query, (caller, key)| blob(query, caller.as_bytes()).bind(key.to_string()),
            facts::request,
        )
        .await?;
        self.all(&KEYS, &asked.keys, |query, id| blob(query, id.as_bytes()), facts::key).await?;
        let (of_accounts, of_users): (Vec<_>, Vec<_>) =
            asked.names.iter().partition(|(owner, _)| matches!(owner, Owner::Account(_)));
        let name = |query: Query, (owner, name): &&(Owner, KeyName)| {
            let owner = match owner {
                Owner::Account(account) => account.to_string(),
                Owner::User(user) => user.to_string(),
            };
            query.bind(owner).bind(name.to_string())
        };
        self.all(&NAMES_OF_ACCOUNTS, of_accounts, name, facts::name).await?;
        self.all(&NAMES_OF_USERS, of_users, name, facts::name).await?;
        self.all(&DIGESTS, &asked.digests, |query, digest| blob(query, digest.as_bytes()), facts::digest)
            .await?;
        self.all(
            &LEFT,
            &asked.left,
            |query, (id, version)| blob(query, id.as_bytes()).bind(i64::from(*version)),
            facts::left,
        )
        .await
    }

    /// Of a global role, accounts with an own role of that name do not count.
    async fn uses(&mut self, (account, name): &RolePlace) -> Result<()> {
        let sql = "SELECT \
             (SELECT count(*) FROM keys WHERE revoked_at IS NULL \
              AND instr(' ' || roles || ' ', ' ' || ?1 || ' ') > 0 AND (account = ?2 OR (?2 = '' AND NOT EXISTS \
              (SELECT 1 FROM roles own WHERE own.account = keys.account AND own.name = ?1)))), \
             (SELECT count(*) FROM members WHERE role = ?1 AND (account = ?2 OR (?2 = '' AND NOT EXISTS \
              (SELECT 1 FROM roles own WHERE own.account = members.account AND own.name = ?1))))";
        let query = sqlx::query(sql).bind(name.to_string()).bind(role_account(account.as_ref()).to_owned());
        facts::uses(&query.fetch_one(&mut *self.connection).await?, &mut self.facts)
    }
}
