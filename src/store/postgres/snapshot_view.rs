//! The view of the whole database that a snapshot is read from: one transaction, or two that see the same.

use std::sync::Arc;

use async_trait::async_trait;
use futures_util::TryStreamExt as _;
use sqlx::{AssertSqlSafe, Postgres as PgDatabase};
use tokio::task::JoinSet;

use crate::{
    domain::time::Timestamp,
    store::{
        SnapshotLoader, StoreError,
        backend::{RowVisitor, SnapshotView},
        queries::SqlQuery,
    },
};

use super::{
    errors::store_error,
    snapshot::{self, ScanDirection, UnreadKeyRange},
    timeouts::{CALL_TIMEOUT, NEXT_ROW_TIMEOUT, with_timeout},
    transaction::PgTransaction,
};

/// A view of one or two transactions that see the same revision.
pub(super) struct PgSnapshotView {
    /// `None` while the keys are read, and after that has failed.
    pub(super) session: Option<PgTransaction>,
    /// Another transaction with the same snapshot, until the keys have been read.
    pub(super) second_session: Option<PgTransaction>,
}

impl PgSnapshotView {
    fn session(&mut self) -> Result<&mut PgTransaction, StoreError> {
        self.session.as_mut().ok_or_else(|| store_error(sqlx::Error::WorkerCrashed))
    }
}

#[async_trait]
impl SnapshotView for PgSnapshotView {
    type ViewDatabase = PgDatabase;

    async fn for_each_row(
        &mut self,
        query: SqlQuery<PgDatabase>,
        take: RowVisitor<'_, PgDatabase>,
    ) -> Result<(), StoreError> {
        let (sql, _) = query.into_parts();
        let query = sqlx::query(AssertSqlSafe(sql)).persistent(false);
        let mut rows = query.fetch(self.session()?.connection());
        while let Some(row) = with_timeout(NEXT_ROW_TIMEOUT, rows.try_next()).await.map_err(store_error)? {
            take(&row)?;
        }
        Ok(())
    }

    /// Reads in separate tasks, which end when this future is dropped; their connections are closed then.
    async fn load_keys(
        &mut self,
        forget_before: Timestamp,
        loader: &Arc<dyn SnapshotLoader>,
    ) -> Result<(), StoreError> {
        self.session()?;
        let (mut tasks, rest) = (JoinSet::new(), Arc::new(UnreadKeyRange::full()));
        let sessions = [
            (self.session.take(), ScanDirection::Ascending),
            (self.second_session.take(), ScanDirection::Descending),
        ];
        for (mut session, from) in sessions.into_iter().filter_map(|(session, from)| Some((session?, from))) {
            let (rest, loader) = (rest.clone(), loader.clone());
            tasks.spawn(async move {
                snapshot::load_keys(session.connection(), &rest, from, forget_before, &loader).await?;
                Ok::<_, StoreError>((session, from))
            });
        }
        while let Some(read) = tasks.join_next().await {
            let (session, from) = read.map_err(|error| StoreError::Unavailable(error.into()))??;
            match from {
                ScanDirection::Ascending => self.session = Some(session),
                // The second session has nothing to commit.
                ScanDirection::Descending => drop(with_timeout(CALL_TIMEOUT, session.finish("COMMIT")).await),
            }
        }
        Ok(())
    }
}
