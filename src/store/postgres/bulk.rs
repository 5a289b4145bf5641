//! Bulk reads of PostgreSQL by COPY, which costs both sides less than the rows of a query.

use async_trait::async_trait;
use sqlx::Postgres as PgDatabase;

use crate::{
    domain::{key::ApiKey, log::LogEntry, name::KeyId, time::Revision},
    store::{
        BulkReader, RowFault, StoreError,
        parse_cache::KeyParseCache,
        queries::{self, SqlQuery},
        row_decoding::{
            KeyAssembler, RowColumns as _, decode_key_revision, decode_log_entry, unreadable_column,
        },
    },
};

use super::{
    copy_reader::{CopyRow, copy_rows},
    errors::store_error,
    store::PostgresStore,
    timeouts::{CALL_TIMEOUT, with_timeout},
};

/// A bulk reader. Each page is a separate transaction, in any session.
pub(super) struct PgBulkReader<'s> {
    store: &'s PostgresStore,
    parse_cache: KeyParseCache,
}

impl<'s> PgBulkReader<'s> {
    pub(super) fn new(store: &'s PostgresStore) -> Self {
        PgBulkReader { store, parse_cache: KeyParseCache::default() }
    }

    async fn for_each_row(
        &self,
        query: SqlQuery<PgDatabase>,
        take: &mut (dyn FnMut(&CopyRow<'_>) -> Result<(), StoreError> + Send),
    ) -> Result<(), StoreError> {
        let (sql, _) = query.into_parts();
        let (mut session, _) =
            self.store.begin_with(&self.store.begin_statements.dedicated, &[]).await.map_err(store_error)?;
        copy_rows(session.connection(), &sql, take).await?;
        with_timeout(CALL_TIMEOUT, session.finish("COMMIT")).await.map_err(store_error)
    }
}

#[async_trait]
impl BulkReader for PgBulkReader<'_> {
    async fn log_after(&mut self, revision: Revision, limit: u32) -> Result<Vec<LogEntry>, StoreError> {
        let mut entries = Vec::new();
        let mut take = |row: &CopyRow<'_>| {
            entries.push(decode_log_entry(row)?);
            Ok(())
        };
        self.for_each_row(queries::log_after(revision, limit), &mut take).await?;
        Ok(entries)
    }

    async fn keys_at(&mut self, ids: &[KeyId]) -> Result<Vec<ApiKey>, StoreError> {
        let mut keys = Vec::with_capacity(ids.len());
        let mut assembler = KeyAssembler::with_cache(std::mem::take(&mut self.parse_cache));
        let mut take = |row: &CopyRow<'_>| {
            keys.extend(assembler.push_row(row)?.map(|stored| stored.key));
            Ok(())
        };
        self.for_each_row(queries::keys_without_uses(ids), &mut take).await?;
        keys.extend(assembler.finish()?.map(|stored| stored.key));
        self.parse_cache = assembler.into_cache();
        Ok(keys)
    }

    async fn key_revisions(
        &mut self,
        after: Option<KeyId>,
        limit: u32,
    ) -> Result<Vec<(KeyId, Revision)>, StoreError> {
        let mut keys = Vec::new();
        let mut take = |row: &CopyRow<'_>| {
            keys.push(decode_key_revision(row)?);
            Ok(())
        };
        self.for_each_row(queries::key_revisions(after, limit), &mut take).await?;
        Ok(keys)
    }

    async fn find_row_faults(&mut self, limit: u32) -> Result<Vec<RowFault>, StoreError> {
        let mut faults = Vec::new();
        let mut take = |row: &CopyRow<'_>| {
            faults.push(RowFault::secret_without_key(row.bytes(0).map_err(unreadable_column)?));
            Ok(())
        };
        self.for_each_row(queries::secrets_without_key(limit), &mut take).await?;
        Ok(faults)
    }
}
