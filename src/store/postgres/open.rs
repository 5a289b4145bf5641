//! Opens the store on a PostgreSQL server: connects, checks the server, migrates the schema and checks the log's end.

use sqlx::{Connection as _, PgConnection};

use crate::store::{MigrationStep, OpenError, SchemaPolicy, StoreError, backend};

use super::{
    errors::open_error,
    migrate, server_check,
    store::PostgresStore,
    target::PgTarget,
    timeouts::{ACQUIRE_TIMEOUT, CALL_TIMEOUT, with_timeout},
    transaction::build_pool,
};

/// Whether the text of a URL names a server, a database and a schema. Resolves nothing.
pub(in crate::store) fn check_url(url: &str) -> Result<(), OpenError> {
    PgTarget::parse(url).map(drop)
}

impl PostgresStore {
    /// Connects to the server that `url` names, checks it, migrates the schema and checks it.
    ///
    /// # Errors
    /// When it cannot be reached or trusted, is damaged or newer than this program.
    pub(in crate::store) async fn open(url: &str, schema: SchemaPolicy) -> Result<PostgresStore, OpenError> {
        let target = PgTarget::parse(url)?;
        let synchronous_commit = PostgresStore::check_connection(&target).await?;
        let store = PostgresStore::new(target, synchronous_commit);
        migrate::run_migrations(&store.target, &store.pool, schema.into()).await?;
        match backend::verify_newest_log(&store).await {
            Ok(()) => Ok(store),
            Err(StoreError::Damaged(what)) => {
                Err(OpenError::Damaged { path: store.target.display_name, what })
            }
            Err(error) => {
                Err(OpenError::Unreachable { path: store.target.display_name, source: error.into() })
            }
        }
    }

    /// Connects to the server, and sees that it can be trusted. Gives the durability that its transactions need.
    async fn check_connection(target: &PgTarget) -> Result<&'static str, OpenError> {
        // Not from the pool, which would try again until its time is over and forget why it failed.
        let connecting = PgConnection::connect_with(&target.options);
        let connected = with_timeout(ACQUIRE_TIMEOUT, connecting).await;
        let mut connection = connected.map_err(|error| open_error(target, error))?;
        let durable = server_check::check_server(target, &mut connection).await?;
        let _ = with_timeout(CALL_TIMEOUT, connection.close()).await;
        Ok(durable)
    }

    /// Brings the schema up to date, or only says what that would do. Gives the steps.
    ///
    /// # Errors
    /// As [`PostgresStore::open`].
    pub(in crate::store) async fn migrate(url: &str, dry_run: bool) -> Result<Vec<MigrationStep>, OpenError> {
        let target = PgTarget::parse(url)?;
        PostgresStore::check_connection(&target).await?;
        let pool = build_pool(&target);
        let what = if dry_run { migrate::PendingAction::Report } else { migrate::PendingAction::Apply };
        let steps = migrate::run_migrations(&target, &pool, what).await;
        pool.close().await;
        steps
    }

    /// Whether the server can be reached.
    ///
    /// # Errors
    /// When it cannot: [`OpenError::Unreachable`] where that may pass.
    pub(in crate::store) async fn check_reachable(url: &str) -> Result<(), OpenError> {
        let target = PgTarget::parse(url)?;
        let connecting = PgConnection::connect_with(&target.options);
        let connection =
            with_timeout(ACQUIRE_TIMEOUT, connecting).await.map_err(|error| open_error(&target, error))?;
        let _ = with_timeout(CALL_TIMEOUT, connection.close()).await;
        Ok(())
    }
}
