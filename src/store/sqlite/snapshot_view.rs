//! The view of the whole database that a snapshot is read from: two transactions that see the same revision.

use std::sync::Arc;

use async_trait::async_trait;
use futures_util::TryStreamExt as _;
use sqlx::{AssertSqlSafe, SqliteConnection};

use crate::{
    domain::time::Timestamp,
    store::{
        SnapshotLoader, StoreError,
        backend::{RowVisitor, SnapshotView},
        queries::SqlQuery,
    },
};

use super::{errors::store_error, snapshot::SnapshotReader};

/// A view of two transactions that see the same revision.
pub(super) struct SqliteView<'c> {
    pub(super) connection: &'c mut SqliteConnection,
    /// Reads the keys; `None` after that.
    pub(super) reader: Option<SnapshotReader>,
}

#[async_trait]
impl SnapshotView for SqliteView<'_> {
    type ViewDatabase = sqlx::Sqlite;

    async fn for_each_row(
        &mut self,
        query: SqlQuery<sqlx::Sqlite>,
        take: RowVisitor<'_, sqlx::Sqlite>,
    ) -> Result<(), StoreError> {
        // A snapshot reads whole tables, so there is no value to bind.
        let (statement, _) = query.into_parts();
        let mut rows = sqlx::query(AssertSqlSafe(statement)).fetch(&mut *self.connection);
        while let Some(row) = rows.try_next().await.map_err(store_error)? {
            take(&row)?;
        }
        Ok(())
    }

    async fn load_keys(
        &mut self,
        forget_before: Timestamp,
        loader: &Arc<dyn SnapshotLoader>,
    ) -> Result<(), StoreError> {
        match self.reader.take() {
            Some(reader) => reader.load_keys(forget_before, loader).await,
            None => Ok(()),
        }
    }
}
