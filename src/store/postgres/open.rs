//! Opens the store on a PostgreSQL server: connects, checks the server, migrates the schema and verifies the log's end.

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

/// Checks that a URL names a server, a database and a schema. Resolves nothing.
pub(in crate::store) fn check_url(url: &str) -> Result<(), OpenError> {
    PgTarget::parse(url).map(drop)
}

impl PostgresStore {
    /// Connects to the server that `url` names, checks it, migrates the schema and verifies the newest part of the log.
    ///
    /// # Errors
    /// If the server cannot be reached or trusted, or the database is damaged or newer than this program.
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

    /// Connects and checks that the server can be trusted. Returns the durability that transactions need.
    async fn check_connection(target: &PgTarget) -> Result<&'static str, OpenError> {
        // Not from the pool, which would retry until its timeout and lose the cause.
        let connecting = PgConnection::connect_with(&target.options);
        let connected = with_timeout(ACQUIRE_TIMEOUT, connecting).await;
        let mut connection = connected.map_err(|error| open_error(target, error))?;
        let durable = server_check::check_server(target, &mut connection).await?;
        let _ = with_timeout(CALL_TIMEOUT, connection.close()).await;
        Ok(durable)
    }

    /// Migrates the schema; with `dry_run`, only finds the missing steps. Returns these steps.
    ///
    /// # Errors
    /// Like [`PostgresStore::open`], for a server or a schema.
    pub(in crate::store) async fn migrate(url: &str, dry_run: bool) -> Result<Vec<MigrationStep>, OpenError> {
        let target = PgTarget::parse(url)?;
        PostgresStore::check_connection(&target).await?;
        let pool = build_pool(&target);
        let what = if dry_run { migrate::PendingAction::Report } else { migrate::PendingAction::Apply };
        let steps = migrate::run_migrations(&target, &pool, what).await;
        pool.close().await;
        steps
    }

    /// Checks that the server can be reached.
    ///
    /// # Errors
    /// [`OpenError::Unreachable`] if the problem may pass; other errors otherwise.
    pub(in crate::store) async fn check_reachable(url: &str) -> Result<(), OpenError> {
        let target = PgTarget::parse(url)?;
        let connecting = PgConnection::connect_with(&target.options);
        let connection =
            with_timeout(ACQUIRE_TIMEOUT, connecting).await.map_err(|error| open_error(&target, error))?;
        let _ = with_timeout(CALL_TIMEOUT, connection.close()).await;
        Ok(())
    }
}
