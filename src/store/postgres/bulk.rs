//! Bulk reads of PostgreSQL: pages by COPY, which cost both sides less than rows of a query.

use async_trait::async_trait;

use crate::{
    domain::{key::Key, log::LogRow, name::KeyId, time::Revision},
    store::{
        BulkReader, StoreError,
        alike::Alike,
        queries::{self, Sql},
        records::{Gather, key_revision_at, log_at},
    },
};

use super::{
    CALL, Db, Postgres,
    copy::{Row, copy},
    store_error, within,
};

/// A reader of one database. Each page is a transaction of its own, which any session may have.
pub(super) struct PgBulkReader<'s> {
    store: &'s Postgres,
    alike: Alike,
}

impl<'s> PgBulkReader<'s> {
    pub(super) fn new(store: &'s Postgres) -> Self {
        PgBulkReader { store, alike: Alike::default() }
    }

    async fn each(
        &self,
        query: Sql<Db>,
        take: &mut (dyn FnMut(&Row<'_>) -> Result<(), StoreError> + Send),
    ) -> Result<(), StoreError> {
        let (sql, _) = query.into_parts();
        let (mut session, _) = self.store.begin(&self.store.begins.line, &[]).await.map_err(store_error)?;
        copy(session.get(), &sql, take).await?;
        within(CALL, session.end("COMMIT")).await.map_err(store_error)
    }
}

#[async_trait]
impl BulkReader for PgBulkReader<'_> {
    async fn log_after(&mut self, revision: Revision, limit: u32) -> Result<Vec<LogRow>, StoreError> {
        let mut entries = Vec::new();
        let mut take = |row: &Row<'_>| {
            entries.push(log_at(row)?);
            Ok(())
        };
        self.each(queries::log_after(revision, limit), &mut take).await?;
        Ok(entries)
    }

    async fn keys_at(&mut self, ids: &[KeyId]) -> Result<Vec<Key>, StoreError> {
        let mut keys = Vec::with_capacity(ids.len());
        let mut gather = Gather::with_cache(std::mem::take(&mut self.alike));
        let mut take = |row: &Row<'_>| {
            keys.extend(gather.row(row)?.map(|stored| stored.key));
            Ok(())
        };
        self.each(queries::keys_without_uses(ids), &mut take).await?;
        keys.extend(gather.finish()?.map(|stored| stored.key));
        self.alike = gather.into_cache();
        Ok(keys)
    }

    async fn key_revisions(
        &mut self,
        after: Option<KeyId>,
        limit: u32,
    ) -> Result<Vec<(KeyId, Revision)>, StoreError> {
        let mut keys = Vec::new();
        let mut take = |row: &Row<'_>| {
            keys.push(key_revision_at(row)?);
            Ok(())
        };
        self.each(queries::key_revisions(after, limit), &mut take).await?;
        Ok(keys)
    }
}
