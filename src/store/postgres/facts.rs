//! What the tables say of everything that a run of writes touches: a question for each kind of record, and none for
//! what the run does not touch, all of them in one message. The caller holds the lock on `meta`, so that nothing of it changes before the run
//! is written.

use crate::{
    domain::name::{AccountId, UserId},
    store::{
        facts::{self, Read, Take},
        plan::{Facts, Questions, RolePlace},
        rows::role_account,
    },
};

use super::{
    line::TextRow,
    literal::{Literal as _, column, fill},
};

/// A statement, and what its rows tell.
pub(super) type Question = (String, Take<TextRow>);

/// What is to be asked for a run, all of it in one message.
pub(super) fn questions(asked: &Questions) -> Vec<Question> {
    let questions = [
        requests(asked),
        keys(asked),
        names(asked),
        digests(asked),
        left(asked),
        accounts(asked),
        folded_accounts(asked),
        roles(asked),
        members(asked),
        tallies(asked),
        role_counts(asked),
        log_fence(asked),
        asked.uses_of.as_ref().map(uses),
    ];
    questions.into_iter().flatten().collect()
}

/// The facts, from the rows of each question.
pub(super) fn read(questions: &[Question], answers: &[Vec<TextRow>]) -> Read<Facts> {
    if questions.len() != answers.len() {
        return Err(sqlx::Error::Protocol("the server has not answered each statement".to_owned()));
    }
    let mut facts = Facts::default();
    for ((_, take), rows) in questions.iter().zip(answers) {
        rows.iter().try_for_each(|row| take(row, &mut facts))?;
    }
    Ok(facts)
}

fn requests(asked: &Questions) -> Option<Question> {
    if asked.requests.is_empty() {
        return None;
    }
    let sql = fill(
        "SELECT caller, key, key_id, fingerprint, created_at FROM idempotency \
         JOIN unnest($1::bytea[], $2::text[]) AS asked (caller, key) USING (caller, key)",
        &[
            column(&asked.requests, |(caller, _)| caller.as_bytes().to_vec()),
            column(&asked.requests, |(_, key)| key.to_string()),
        ],
    );
    Some((sql, facts::request))
}

fn keys(asked: &Questions) -> Option<Question> {
    if asked.keys.is_empty() {
        return None;
    }
    let sql = fill(
        "SELECT id, revision FROM keys WHERE id = ANY ($1::bytea[])",
        &[column(&asked.keys, |id| id.as_bytes().to_vec())],
    );
    Some((sql, facts::key))
}

fn names(asked: &Questions) -> Option<Question> {
    // The second part finds names that are not in their normalized form, by an index of them alone.
    const OF_ACCOUNTS: &str = "SELECT account, NULL, asked.name, id, keys.name FROM keys \
         JOIN unnest($1::text[], $2::text[]) AS asked (owner, name) \
         ON account = asked.owner AND keys.name = asked.name WHERE revoked_at IS NULL \
         UNION ALL SELECT account, NULL, asked.name, id, keys.name FROM keys \
         JOIN unnest($1::text[], $2::text[]) AS asked (owner, name) \
         ON account = asked.owner AND normalize(keys.name, NFC) = asked.name \
         WHERE keys.name IS NOT NFC NORMALIZED AND revoked_at IS NULL";
    const OF_USERS: &str = "SELECT NULL, user_id, asked.name, id, keys.name FROM keys \
         JOIN unnest($1::text[], $2::text[]) AS asked (owner, name) \
         ON user_id = asked.owner AND keys.name = asked.name WHERE revoked_at IS NULL \
         UNION ALL SELECT NULL, user_id, asked.name, id, keys.name FROM keys \
         JOIN unnest($1::text[], $2::text[]) AS asked (owner, name) \
         ON user_id = asked.owner AND normalize(keys.name, NFC) = asked.name \
         WHERE keys.name IS NOT NFC NORMALIZED AND revoked_at IS NULL";
    let of_accounts: Vec<_> =
        asked.names.iter().filter_map(|(owner, name)| Some((owner.account()?.as_str(), name))).collect();
    let of_users: Vec<_> =
        asked.names.iter().filter_map(|(owner, name)| Some((owner.user()?.as_str(), name))).collect();
    let parts = [(OF_ACCOUNTS, of_accounts), (OF_USERS, of_users)];
    let parts: Vec<_> = parts
        .iter()
        .filter(|(_, names)| !names.is_empty())
        .map(|(sql, names)| {
            let owners = column(names, |(owner, _)| (*owner).to_owned());
            fill(sql, &[owners, column(names, |(_, name)| name.to_string())])
        })
        .collect();
    (!parts.is_empty()).then(|| (parts.join(" UNION ALL "), facts::name as Take<TextRow>))
}

fn digests(asked: &Questions) -> Option<Question> {
    if asked.digests.is_empty() {
        return None;
    }
    let sql = fill(
        "SELECT digest, key_id, version, expires_at, sum FROM secrets WHERE digest = ANY ($1::bytea[])",
        &[column(&asked.digests, |digest| digest.as_bytes().to_vec())],
    );
    Some((sql, facts::digest))
}

fn left(asked: &Questions) -> Option<Question> {
    if asked.left.is_empty() {
        return None;
    }
    let sql = fill(
        "SELECT digest, version, hint, created_at, expires_at, sum, key_id FROM secrets \
         JOIN unnest($1::bytea[], $2::bigint[]) AS asked (key_id, version) USING (key_id, version)",
        &[
            column(&asked.left, |(id, _)| id.as_bytes().to_vec()),
            column(&asked.left, |(_, version)| i64::from(*version)),
        ],
    );
    Some((sql, facts::left))
}

fn accounts(asked: &Questions) -> Option<Question> {
    if asked.accounts.is_empty() {
        return None;
    }
    let sql = fill(
        "SELECT id, revision FROM accounts WHERE id = ANY ($1::text[])",
        &[column(&asked.accounts, ToString::to_string)],
    );
    Some((sql, facts::account))
}

fn folded_accounts(asked: &Questions) -> Option<Question> {
    if asked.folded_accounts.is_empty() {
        return None;
    }
    let sql = fill(
        "SELECT lower(id), id FROM accounts WHERE lower(id) = ANY ($1::text[])",
        &[column(&asked.folded_accounts, ToString::to_string)],
    );
    Some((sql, facts::folded_account))
}

fn roles(asked: &Questions) -> Option<Question> {
    if asked.roles.is_empty() {
        return None;
    }
    let sql = fill(
        "SELECT account, name, revision FROM roles \
         JOIN unnest($1::text[], $2::text[]) AS asked (account, name) USING (account, name)",
        &[
            column(&asked.roles, |(account, _)| role_account(account.as_ref()).to_owned()),
            column(&asked.roles, |(_, name)| name.to_string()),
        ],
    );
    Some((sql, facts::role))
}

fn members(asked: &Questions) -> Option<Question> {
    if asked.members.is_empty() {
        return None;
    }
    let sql = fill(
        "SELECT account, user_id, revision FROM members \
         JOIN unnest($1::text[], $2::text[]) AS asked (account, user_id) USING (account, user_id)",
        &[
            column(&asked.members, |(account, _)| account.to_string()),
            column(&asked.members, |(_, user)| user.to_string()),
        ],
    );
    Some((sql, facts::member))
}

fn tallies(asked: &Questions) -> Option<Question> {
    if asked.tallies.is_empty() {
        return None;
    }
    let sql = fill(
        "SELECT account, user_id, keys, hour, rotations, log_rows FROM tallies \
         JOIN unnest($1::text[], $2::text[]) AS asked (account, user_id) USING (account, user_id)",
        &[
            column(&asked.tallies, |owner| owner.account().map_or("", AccountId::as_str).to_owned()),
            column(&asked.tallies, |owner| owner.user().map_or("", UserId::as_str).to_owned()),
        ],
    );
    Some((sql, facts::tally))
}

fn role_counts(asked: &Questions) -> Option<Question> {
    if asked.role_counts.is_empty() {
        return None;
    }
    let sql = fill(
        "SELECT account, count(*) FROM roles WHERE account = ANY ($1::text[]) GROUP BY account",
        &[column(&asked.role_counts, ToString::to_string)],
    );
    Some((sql, facts::role_count))
}

/// The replicas that cannot read the run's entries. Nothing is asked of entries that every release reads.
fn log_fence(asked: &Questions) -> Option<Question> {
    let format = asked.log_format?;
    let sql = fill(
        "SELECT newest_log_format, name, log_format FROM log_state \
         LEFT JOIN replicas ON log_format < $1 ORDER BY name, id",
        &[i64::from(format.0).literal()],
    );
    Some((sql, facts::log_fence))
}

/// How many keys and members use a role. Of a global one, accounts with an own role of that name do not count.
fn uses((account, name): &RolePlace) -> Question {
    let sql = fill(
        "SELECT \
         (SELECT count(*) FROM keys WHERE revoked_at IS NULL \
          AND strpos(' ' || roles || ' ', ' ' || $1 || ' ') > 0 AND (account = $2 OR ($2 = '' AND NOT EXISTS \
          (SELECT 1 FROM roles own WHERE own.account = keys.account AND own.name = $1)))), \
         (SELECT count(*) FROM members WHERE role = $1 AND (account = $2 OR ($2 = '' AND NOT EXISTS \
          (SELECT 1 FROM roles own WHERE own.account = members.account AND own.name = $1))))",
        &[name.as_str().literal(), role_account(account.as_ref()).literal()],
    );
    (sql, facts::uses)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::log_format::LogFormat;

    #[test]
    fn the_replicas_are_asked_about_only_by_a_run_that_an_older_release_cannot_read() {
        let asked = |log_format| questions(&Questions { log_format, ..Questions::default() });
        assert!(asked(None).is_empty());
        let [(sql, _)] = <[Question; 1]>::try_from(asked(Some(LogFormat::NEWEST))).unwrap();
        assert!(sql.contains("log_format < '1'::bigint"), "{sql}");
    }
}
