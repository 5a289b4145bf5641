//! Looking at a server that others use: nothing is migrated or changed.

use std::sync::{Arc, Mutex};

use sqlx::{Connection as _, PgConnection};

use crate::store::{
    OpenError, Store, backend,
    look::{Kind, Seen},
};

use super::{
    ACQUIRE, Begins, CALL, Lines, Place, Postgres, Sources, doctor, migrate, open_error, pool, within,
};

/// Looks at the server that `url` names.
///
/// # Errors
/// When it cannot be reached, or the URL names none.
pub(in crate::store) async fn look(url: &str) -> Result<Seen, OpenError> {
    let place = Place::parse(url)?;
    let failed = |error: sqlx::Error| open_error(&place, error);
    let connecting = PgConnection::connect_with(&place.options);
    let mut connection = within(ACQUIRE, connecting).await.map_err(failed)?;
    let facts = within(CALL, doctor::ask(&mut connection)).await.map_err(failed)?;
    let schema = within(CALL, migrate::newest(&place, &mut connection)).await.map_err(failed)?;
    let _ = within(CALL, connection.close()).await;
    let (shown, known) = (place.shown.clone(), migrate::known_newest());
    let (standby, durable) = (facts.in_recovery, doctor::durable(&facts.synchronous_commit));
    let mut seen = Seen { shown, schema, known, kind: Kind::Postgres(facts), log: None, store: None };
    // A standby refuses the transactions of a server, and may lag: the primary is to be looked at.
    if schema == Some(known) && !standby {
        let (pool, fleet) = (pool(&place), Lines::to(&place));
        let begins = Begins::new(&place.schema, durable);
        let (known, sources) = (Mutex::default(), Sources::default());
        let store = Arc::new(Postgres { place, pool, begins, fleet, known, sources });
        seen.log = Some(match backend::check_log(&*store).await {
            Ok(()) => store.head().await,
            Err(error) => Err(error),
        });
        seen.store = Some(store);
    }
    Ok(seen)
}
