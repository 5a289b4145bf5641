//! Statements that read the state of the tables before a run of writes: one for each kind of record that the run
//! touches.
//!
//! All of them are sent in one message. The caller holds the lock on `meta`, so nothing changes before the run is
//! written.

use crate::{
    domain::name::{AccountId, UserId},
    store::{
        pre_state::{self, PreStateResult, RowReader},
        row_format::role_account_column,
        write_plan::{PreState, PreStateQuery, RoleId},
    },
};

use super::{
    sql_literal::{SqlLiteral as _, array_literal, fill_placeholders},
    text_row::TextRow,
};

/// A statement, and the function that reads its rows.
pub(super) type PreStateStatement = (String, RowReader<TextRow>);

/// The statements for a run.
pub(super) fn pre_state_statements(query: &PreStateQuery) -> Vec<PreStateStatement> {
    let statements = [
        lookup_requests(query),
        lookup_keys(query),
        lookup_names(query),
        lookup_digests(query),
        lookup_retired_secrets(query),
        lookup_accounts(query),
        lookup_folded_accounts(query),
        lookup_roles(query),
        lookup_members(query),
        lookup_tallies(query),
        lookup_role_counts(query),
        log_fence(query),
        query.role_to_delete.as_ref().map(lookup_role_uses),
    ];
    statements.into_iter().flatten().collect()
}

/// Builds the state from the rows of each statement.
pub(super) fn read_pre_state(
    statements: &[PreStateStatement],
    answers: &[Vec<TextRow>],
) -> PreStateResult<PreState> {
    if statements.len() != answers.len() {
        return Err(sqlx::Error::Protocol("the server did not answer every statement".to_owned()));
    }
    let mut state = PreState::default();
    for ((_, take), rows) in statements.iter().zip(answers) {
        rows.iter().try_for_each(|row| take(row, &mut state))?;
    }
    Ok(state)
}

fn lookup_requests(query: &PreStateQuery) -> Option<PreStateStatement> {
    if query.requests.is_empty() {
        return None;
    }
    let sql = fill_placeholders(
        "SELECT caller, key, key_id, fingerprint, created_at FROM idempotency \
         JOIN unnest($1::bytea[], $2::text[]) AS asked (caller, key) USING (caller, key)",
        &[
            array_literal(&query.requests, |(caller, _)| caller.as_bytes().to_vec()),
            array_literal(&query.requests, |(_, key)| key.to_string()),
        ],
    );
    Some((sql, pre_state::read_request))
}

fn lookup_keys(query: &PreStateQuery) -> Option<PreStateStatement> {
    if query.keys.is_empty() {
        return None;
    }
    let sql = fill_placeholders(
        "SELECT id, revision FROM keys WHERE id = ANY ($1::bytea[])",
        &[array_literal(&query.keys, |id| id.as_bytes().to_vec())],
    );
    Some((sql, pre_state::read_key))
}

fn lookup_names(query: &PreStateQuery) -> Option<PreStateStatement> {
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
        query.names.iter().filter_map(|(owner, name)| Some((owner.account()?.as_str(), name))).collect();
    let of_users: Vec<_> =
        query.names.iter().filter_map(|(owner, name)| Some((owner.user()?.as_str(), name))).collect();
    let parts = [(OF_ACCOUNTS, of_accounts), (OF_USERS, of_users)];
    let parts: Vec<_> = parts
        .iter()
        .filter(|(_, names)| !names.is_empty())
        .map(|(sql, names)| {
            let owners = array_literal(names, |(owner, _)| (*owner).to_owned());
            fill_placeholders(sql, &[owners, array_literal(names, |(_, name)| name.to_string())])
        })
        .collect();
    (!parts.is_empty()).then(|| (parts.join(" UNION ALL "), pre_state::read_name as RowReader<TextRow>))
}

fn lookup_digests(query: &PreStateQuery) -> Option<PreStateStatement> {
    if query.digests.is_empty() {
        return None;
    }
    let sql = fill_placeholders(
        "SELECT digest, key_id, version, expires_at, sum FROM secrets WHERE digest = ANY ($1::bytea[])",
        &[array_literal(&query.digests, |digest| digest.as_bytes().to_vec())],
    );
    Some((sql, pre_state::read_digest))
}

fn lookup_retired_secrets(query: &PreStateQuery) -> Option<PreStateStatement> {
    if query.retired_secrets.is_empty() {
        return None;
    }
    let sql = fill_placeholders(
        "SELECT digest, version, hint, created_at, expires_at, sum, key_id FROM secrets \
         JOIN unnest($1::bytea[], $2::bigint[]) AS asked (key_id, version) USING (key_id, version)",
        &[
            array_literal(&query.retired_secrets, |(id, _)| id.as_bytes().to_vec()),
            array_literal(&query.retired_secrets, |(_, version)| i64::from(*version)),
        ],
    );
    Some((sql, pre_state::read_retired_secret))
}

fn lookup_accounts(query: &PreStateQuery) -> Option<PreStateStatement> {
    if query.accounts.is_empty() {
        return None;
    }
    let sql = fill_placeholders(
        "SELECT id, revision FROM accounts WHERE id = ANY ($1::text[])",
        &[array_literal(&query.accounts, ToString::to_string)],
    );
    Some((sql, pre_state::read_account))
}

fn lookup_folded_accounts(query: &PreStateQuery) -> Option<PreStateStatement> {
    if query.folded_accounts.is_empty() {
        return None;
    }
    let sql = fill_placeholders(
        "SELECT lower(id), id FROM accounts WHERE lower(id) = ANY ($1::text[])",
        &[array_literal(&query.folded_accounts, ToString::to_string)],
    );
    Some((sql, pre_state::read_folded_account))
}

fn lookup_roles(query: &PreStateQuery) -> Option<PreStateStatement> {
    if query.roles.is_empty() {
        return None;
    }
    let sql = fill_placeholders(
        "SELECT account, name, revision FROM roles \
         JOIN unnest($1::text[], $2::text[]) AS asked (account, name) USING (account, name)",
        &[
            array_literal(&query.roles, |(account, _)| role_account_column(account.as_ref()).to_owned()),
            array_literal(&query.roles, |(_, name)| name.to_string()),
        ],
    );
    Some((sql, pre_state::read_role))
}

fn lookup_members(query: &PreStateQuery) -> Option<PreStateStatement> {
    if query.members.is_empty() {
        return None;
    }
    let sql = fill_placeholders(
        "SELECT account, user_id, revision FROM members \
         JOIN unnest($1::text[], $2::text[]) AS asked (account, user_id) USING (account, user_id)",
        &[
            array_literal(&query.members, |(account, _)| account.to_string()),
            array_literal(&query.members, |(_, user)| user.to_string()),
        ],
    );
    Some((sql, pre_state::read_member))
}

fn lookup_tallies(query: &PreStateQuery) -> Option<PreStateStatement> {
    if query.tallies.is_empty() {
        return None;
    }
    let sql = fill_placeholders(
        "SELECT account, user_id, keys, hour, rotations, log_rows FROM tallies \
         JOIN unnest($1::text[], $2::text[]) AS asked (account, user_id) USING (account, user_id)",
        &[
            array_literal(&query.tallies, |owner| owner.account().map_or("", AccountId::as_str).to_owned()),
            array_literal(&query.tallies, |owner| owner.user().map_or("", UserId::as_str).to_owned()),
        ],
    );
    Some((sql, pre_state::read_tally))
}

fn lookup_role_counts(query: &PreStateQuery) -> Option<PreStateStatement> {
    if query.role_counts.is_empty() {
        return None;
    }
    let sql = fill_placeholders(
        "SELECT account, count(*) FROM roles WHERE account = ANY ($1::text[]) GROUP BY account",
        &[array_literal(&query.role_counts, ToString::to_string)],
    );
    Some((sql, pre_state::read_role_count))
}

/// The replicas that cannot read the run's entries; no statement for entries that every release reads.
fn log_fence(query: &PreStateQuery) -> Option<PreStateStatement> {
    let format = query.log_format?;
    let sql = fill_placeholders(
        "SELECT newest_log_format, name, log_format FROM log_state \
         LEFT JOIN replicas ON log_format < $1 ORDER BY name, id",
        &[i64::from(format.0).to_sql_literal()],
    );
    Some((sql, pre_state::log_fence))
}

/// The numbers of keys and members with a role. For a global role, accounts with their own role of that name do not
/// count.
fn lookup_role_uses((account, name): &RoleId) -> PreStateStatement {
    let sql = fill_placeholders(
        "SELECT \
         (SELECT count(*) FROM keys WHERE revoked_at IS NULL \
          AND strpos(' ' || roles || ' ', ' ' || $1 || ' ') > 0 AND (account = $2 OR ($2 = '' AND NOT EXISTS \
          (SELECT 1 FROM roles own WHERE own.account = keys.account AND own.name = $1)))), \
         (SELECT count(*) FROM members WHERE role = $1 AND (account = $2 OR ($2 = '' AND NOT EXISTS \
          (SELECT 1 FROM roles own WHERE own.account = members.account AND own.name = $1))))",
        &[name.as_str().to_sql_literal(), role_account_column(account.as_ref()).to_sql_literal()],
    );
    (sql, pre_state::read_role_uses)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::log_format::LogFormat;

    #[test]
    fn the_replicas_are_asked_about_only_by_a_run_that_an_older_release_cannot_read() {
        let statements =
            |log_format| pre_state_statements(&PreStateQuery { log_format, ..PreStateQuery::default() });
        assert!(statements(None).is_empty());
        let [(sql, _)] = <[PreStateStatement; 1]>::try_from(statements(Some(LogFormat::NEWEST))).unwrap();
        assert!(sql.contains("log_format < '1'::bigint"), "{sql}");
    }
}
