//! Looking at a server that others use: nothing is migrated or changed.

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

/// Looks at the server that `url` names.
///
/// # Errors
/// When it cannot be reached, or the URL names none.
pub(in crate::store) async fn inspect(url: &str) -> Result<DatabaseInspection, OpenError> {
    let place = PgTarget::parse(url)?;
    let failed = |error: sqlx::Error| open_error(&place, error);
    let connecting = PgConnection::connect_with(&place.options);
    let mut connection = with_timeout(ACQUIRE_TIMEOUT, connecting).await.map_err(failed)?;
    let facts =
        with_timeout(CALL_TIMEOUT, server_check::read_server_info(&mut connection)).await.map_err(failed)?;
    let schema =
        with_timeout(CALL_TIMEOUT, migrate::newest_applied(&place, &mut connection)).await.map_err(failed)?;
    let _ = with_timeout(CALL_TIMEOUT, connection.close()).await;
    let (shown, known) = (place.display_name.clone(), migrate::newest_known());
    let (standby, durable) =
        (facts.in_recovery, server_check::durable_synchronous_commit(&facts.synchronous_commit));
    let mut seen = DatabaseInspection {
        display_name: shown,
        schema_version: schema,
        newest_schema_version: known,
        kind: DatabaseKind::Postgres(facts),
        log_check: None,
        store: None,
    };
    // A standby refuses the transactions of a server, and may lag: the primary is to be looked at.
    if schema == Some(known) && !standby {
        let store = Arc::new(PostgresStore::new(place, durable));
        seen.log_check = Some(match backend::verify_newest_log(&*store).await {
            Ok(()) => store.log_head().await,
            Err(error) => Err(error),
        });
        seen.store = Some(store);
    }
    Ok(seen)
}
