//! Inspects a server that others use, read-only.

use std::sync::Arc;

use sqlx::{Connection as _, PgConnection};

use crate::store::{
    OpenError, Store, backend,
    inspection::{DatabaseInspection, DatabaseKind},
};

use super::{
    errors::open_error,
    migrate, server_check,
    store::PostgresStore,
    target::PgTarget,
    timeouts::{ACQUIRE_TIMEOUT, CALL_TIMEOUT, with_timeout},
};

/// Inspects the server that `url` names.
///
/// # Errors
/// If the server cannot be reached, or the URL names none.
pub(in crate::store) async fn inspect(url: &str) -> Result<DatabaseInspection, OpenError> {
    let target = PgTarget::parse(url)?;
    let failed = |error: sqlx::Error| open_error(&target, error);
    let connecting = PgConnection::connect_with(&target.options);
    let mut connection = with_timeout(ACQUIRE_TIMEOUT, connecting).await.map_err(failed)?;
    let info =
        with_timeout(CALL_TIMEOUT, server_check::read_server_info(&mut connection)).await.map_err(failed)?;
    let schema = with_timeout(CALL_TIMEOUT, migrate::newest_applied(&target, &mut connection))
        .await
        .map_err(failed)?;
    let _ = with_timeout(CALL_TIMEOUT, connection.close()).await;
    let newest_schema_version = migrate::newest_known();
    let (in_recovery, synchronous_commit) =
        (info.in_recovery, server_check::durable_synchronous_commit(&info.synchronous_commit));
    let mut inspection = DatabaseInspection {
        display_name: target.display_name.clone(),
        schema_version: schema,
        newest_schema_version,
        kind: DatabaseKind::Postgres(info),
        log_check: None,
        store: None,
    };
    // A standby rejects read-write transactions and may lag; only a primary is inspected further.
    if schema == Some(newest_schema_version) && !in_recovery {
        let store = Arc::new(PostgresStore::new(target, synchronous_commit));
        inspection.log_check = Some(match backend::verify_newest_log(&*store).await {
            Ok(()) => store.log_head().await,
            Err(error) => Err(error),
        });
        inspection.store = Some(store);
    }
    Ok(inspection)
}
