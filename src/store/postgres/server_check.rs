//! Whether a server can be trusted with keys: an acknowledged change must be on its disk, and what it says must be
//! the newest.

use sqlx::PgConnection;

use crate::store::{OpenError, inspect::PostgresServerInfo, row_decoding::RowColumns as _};

use super::{
    errors::open_error,
    target::PgTarget,
    timeouts::{CALL_TIMEOUT, with_timeout},
    transaction::unnamed_query,
};

/// The oldest server that Keyward is for: PostgreSQL 13.
const MIN_SERVER_VERSION: i64 = 130_000;

/// Checks the server. Gives the `synchronous_commit` that transactions are to have.
pub(super) async fn check_server(
    place: &PgTarget,
    connection: &mut PgConnection,
) -> Result<&'static str, OpenError> {
    let said = with_timeout(CALL_TIMEOUT, read_server_info(connection))
        .await
        .map_err(|error| open_error(place, error))?;
    if let Some((what, fix)) = said.unsuitable_reason {
        return Err(OpenError::Unsuitable { database: place.display_name.clone(), what, fix });
    }
    if said.synchronous_standbys.is_empty() {
        tracing::warn!(
            database = place.display_name,
            "the server has no synchronous standbys (synchronous_standby_names is empty): should its disk be \
             lost, so are the newest changes, revocations included"
        );
    }
    Ok(durable_synchronous_commit(&said.synchronous_commit))
}

/// What a server says of itself.
pub(super) async fn read_server_info(
    connection: &mut PgConnection,
) -> Result<PostgresServerInfo, sqlx::Error> {
    // In a transaction, so that both steps of the statement meet the same session.
    sqlx::raw_sql("BEGIN").execute(&mut *connection).await?;
    let row = unnamed_query(
        "SELECT current_setting('server_version_num')::bigint, pg_is_in_recovery()::int::bigint, \
         current_setting('fsync'), current_setting('synchronous_commit'), \
         current_setting('synchronous_standby_names'), current_setting('server_encoding'), \
         current_setting('full_page_writes')",
    )
    .fetch_one(&mut *connection)
    .await?;
    sqlx::raw_sql("COMMIT").execute(connection).await?;
    let said = PostgresServerInfo {
        version_number: row.int(0)?,
        in_recovery: row.int(1)? != 0,
        fsync: row.text(2)?.to_owned(),
        synchronous_commit: row.text(3)?.to_owned(),
        synchronous_standbys: row.text(4)?.to_owned(),
        encoding: row.text(5)?.to_owned(),
        full_page_writes: row.text(6)?.to_owned(),
        unsuitable_reason: None,
    };
    Ok(PostgresServerInfo { unsuitable_reason: find_objection(&said), ..said })
}

/// What is wrong with the server, and what to do.
fn find_objection(said: &PostgresServerInfo) -> Option<(String, &'static str)> {
    if said.version_number < MIN_SERVER_VERSION {
        let major = said.version_number / 10_000;
        return Some((format!("it is PostgreSQL {major}"), "Use PostgreSQL 13 or newer"));
    }
    if said.in_recovery {
        let what = "it is in recovery: a standby, which may lag behind its primary".to_owned();
        return Some((what, "Name the primary in --database"));
    }
    if said.fsync != "on" {
        let what =
            format!("its fsync is {}: a power cut would take acknowledged changes with it", said.fsync);
        return Some((what, "Set fsync = on in postgresql.conf and restart the server"));
    }
    if said.encoding != "UTF8" {
        let what = format!("its encoding is {}", said.encoding);
        return Some((what, "Make one with CREATE DATABASE … ENCODING 'UTF8' TEMPLATE template0"));
    }
    None
}

/// At least `on`: whatever is less acknowledges what is not on disk everywhere that it should be.
pub(super) fn durable_synchronous_commit(default: &str) -> &'static str {
    if default == "remote_apply" { "remote_apply" } else { "on" }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn good() -> PostgresServerInfo {
        PostgresServerInfo {
            version_number: 150_018,
            in_recovery: false,
            fsync: "on".to_owned(),
            synchronous_commit: "on".to_owned(),
            synchronous_standbys: String::new(),
            encoding: "UTF8".to_owned(),
            full_page_writes: "on".to_owned(),
            unsuitable_reason: None,
        }
    }

    #[test]
    fn a_server_that_can_lose_or_lag_is_refused() {
        assert!(find_objection(&good()).is_none());
        for bad in [
            PostgresServerInfo { version_number: 120_009, ..good() },
            PostgresServerInfo { in_recovery: true, ..good() },
            PostgresServerInfo { fsync: "off".to_owned(), ..good() },
            PostgresServerInfo { encoding: "SQL_ASCII".to_owned(), ..good() },
        ] {
            assert!(find_objection(&bad).is_some());
        }
    }

    #[test]
    fn commits_wait_for_the_disk_whatever_the_default() {
        for (default, used) in [
            ("off", "on"),
            ("local", "on"),
            ("remote_write", "on"),
            ("on", "on"),
            ("remote_apply", "remote_apply"),
        ] {
            assert_eq!(durable_synchronous_commit(default), used, "{default}");
        }
    }
}
