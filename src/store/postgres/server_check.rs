//! Checks whether a server can be trusted with keys: acknowledged changes must be on its disk, and its data must be
//! current.

use sqlx::PgConnection;

use crate::store::{OpenError, inspection::PostgresServerInfo, row_decoding::RowColumns as _};

use super::{
    errors::open_error,
    target::PgTarget,
    timeouts::{CALL_TIMEOUT, with_timeout},
    transaction::unnamed_query,
};

/// The oldest supported server: PostgreSQL 13.
const MIN_SERVER_VERSION: i64 = 130_000;

/// Checks the server. Returns the `synchronous_commit` that transactions must use.
pub(super) async fn check_server(
    target: &PgTarget,
    connection: &mut PgConnection,
) -> Result<&'static str, OpenError> {
    let info = with_timeout(CALL_TIMEOUT, read_server_info(connection))
        .await
        .map_err(|error| open_error(target, error))?;
    if let Some((what, fix)) = info.unsuitable_reason {
        return Err(OpenError::Unsuitable { database: target.display_name.clone(), what, fix });
    }
    if info.synchronous_standbys.is_empty() {
        tracing::warn!(
            database = target.display_name,
            "the server has no synchronous standbys (synchronous_standby_names is empty): if its disk is \
             lost, the newest changes are too, revocations included"
        );
    }
    Ok(durable_synchronous_commit(&info.synchronous_commit))
}

/// Reads the settings of a server.
pub(super) async fn read_server_info(
    connection: &mut PgConnection,
) -> Result<PostgresServerInfo, sqlx::Error> {
    // In a transaction, so that both steps of the statement run in the same session.
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
    let info = PostgresServerInfo {
        version_number: row.int(0)?,
        in_recovery: row.int(1)? != 0,
        fsync: row.text(2)?.to_owned(),
        synchronous_commit: row.text(3)?.to_owned(),
        synchronous_standbys: row.text(4)?.to_owned(),
        encoding: row.text(5)?.to_owned(),
        full_page_writes: row.text(6)?.to_owned(),
        unsuitable_reason: None,
    };
    Ok(PostgresServerInfo { unsuitable_reason: find_objection(&info), ..info })
}

/// What is wrong with the server, and what to do about it.
fn find_objection(info: &PostgresServerInfo) -> Option<(String, &'static str)> {
    if info.version_number < MIN_SERVER_VERSION {
        let major = info.version_number / 10_000;
        return Some((format!("it is PostgreSQL {major}"), "Use PostgreSQL 13 or newer"));
    }
    if info.in_recovery {
        let what = "it is in recovery: a standby, which may lag behind its primary".to_owned();
        return Some((what, "Name the primary in --database"));
    }
    if info.fsync != "on" {
        let what =
            format!("its fsync is {}: a power cut would take acknowledged changes with it", info.fsync);
        return Some((what, "Set fsync = on in postgresql.conf and restart the server"));
    }
    if info.encoding != "UTF8" {
        let what = format!("its encoding is {}", info.encoding);
        return Some((what, "Create one with CREATE DATABASE … ENCODING 'UTF8' TEMPLATE template0"));
    }
    None
}

/// At least `on`: a weaker setting would acknowledge changes that are not on all disks that must have them.
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
