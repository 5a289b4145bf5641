//! Reads pages of rows with rusqlite on blocking threads.
//!
//! sqlx sends each row between threads and copies each column, which takes several times as long as reading it. Here a
//! page is copied once. Keys and the log, which are read in large numbers, are decoded in place.

use std::{
    borrow::Cow,
    path::{Path, PathBuf},
    str,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use rusqlite::{
    Connection, Statement, ToSql, params_from_iter,
    types::{ToSqlOutput, ValueRef},
};
use tokio::{sync::Semaphore, time::timeout};

use crate::{
    domain::{log::LogEntry, name::KeyId},
    store::{
        StoreError, StoredKey,
        queries::{self, SqlQuery, SqlValue},
        row_decoding::{KeyAssembler, RowColumns, decode_log_entry},
    },
};

use super::connection::{SqliteResult, connect_reader, run_blocking, unavailable_failure};

/// The maximum number of pages read at once.
const MAX_READERS: u32 = 4;
/// The page cache of a connection in KiB. With a million keys, the inner pages of their secrets take 2 MB, SQLite's
/// default, and would be read again for every key.
const CACHE_KIB: i32 = 8192;
/// How long a read waits for a connection.
const ACQUIRE_TIMEOUT: Duration = Duration::from_secs(5);

/// A pool of read connections, each opened when it is first needed.
pub(super) struct PageReaders {
    path: PathBuf,
    idle_connections: Arc<Mutex<Vec<Connection>>>,
    permits: Arc<Semaphore>,
}

impl PageReaders {
    pub(super) fn new(path: PathBuf) -> PageReaders {
        PageReaders {
            path,
            idle_connections: Arc::default(),
            permits: Arc::new(Semaphore::new(MAX_READERS as usize)),
        }
    }

    /// The rows of a query, as of one committed state.
    pub(super) async fn fetch_rows(&self, query: SqlQuery<sqlx::Sqlite>) -> Result<Vec<PageRow>, StoreError> {
        let (statement, bound) = query.into_parts();
        self.run_on_connection(move |connection| {
            read_rows(&mut *connection.prepare_cached(&statement)?, &bound)
        })
        .await
    }

    /// A page of the log, decoded in place.
    pub(super) async fn fetch_log(&self, query: SqlQuery<sqlx::Sqlite>) -> Result<Vec<LogEntry>, StoreError> {
        let (statement, bound) = query.into_parts();
        self.run_on_connection(move |connection| {
            let mut statement = connection.prepare_cached(&statement)?;
            let mut rows = statement.query(params_from_iter(&bound))?;
            let mut entries = Vec::new();
            while let Some(row) = rows.next()? {
                entries.push(decode_log_entry(row)?);
            }
            Ok(entries)
        })
        .await
    }

    /// The keys with these ids, in their order. Each is looked up separately: one statement for all would sort the rows
    /// again, which takes as long as reading them.
    pub(super) async fn fetch_keys(&self, ids: &[KeyId]) -> Result<Vec<StoredKey>, StoreError> {
        let ids = ids.to_vec();
        // The same statement for every key.
        let (one, _) = queries::key::<sqlx::Sqlite>(KeyId::from_bytes([0; 16])).into_parts();
        self.run_on_connection(move |connection| {
            let (mut keys, mut assembler) = (Vec::with_capacity(ids.len()), KeyAssembler::default());
            // All keys as of one committed state.
            let transaction = connection.unchecked_transaction()?;
            let mut statement = transaction.prepare_cached(&one)?;
            for id in ids {
                let mut rows = statement.query([id.as_bytes().as_slice()])?;
                while let Some(row) = rows.next()? {
                    keys.extend(assembler.push_row(row)?);
                }
            }
            keys.extend(assembler.finish()?);
            Ok(keys)
        })
        .await
    }

    /// Runs `work` on one of the connections.
    pub(super) async fn run_on_connection<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Connection) -> SqliteResult<T> + Send + 'static,
    ) -> Result<T, StoreError> {
        let permit = timeout(ACQUIRE_TIMEOUT, self.permits.clone().acquire_owned()).await;
        let permit = permit.map_err(|late| StoreError::Unavailable(late.into()))?;
        let permit = permit.map_err(|closed| StoreError::Unavailable(closed.into()))?;
        let (path, idle) = (self.path.clone(), self.idle_connections.clone());
        run_blocking(move || {
            let _permit = permit;
            let opened = lock_idle(&idle).pop();
            let connection = match opened {
                Some(connection) => connection,
                None => open_connection(&path)?,
            };
            // After an error, the state of the connection is unknown: it is dropped, and the next read opens another.
            let read = work(&connection)?;
            lock_idle(&idle).push(connection);
            Ok(read)
        })
        .await
    }

    /// Waits for started reads, and closes the connections.
    pub(super) async fn close(&self) {
        let _all = self.permits.acquire_many(MAX_READERS).await;
        self.permits.close();
        lock_idle(&self.idle_connections).clear();
    }
}

fn open_connection(path: &Path) -> SqliteResult<Connection> {
    let connection = connect_reader(path)?;
    connection.pragma_update(None, "cache_size", -CACHE_KIB)?;
    Ok(connection)
}

fn lock_idle(idle: &Mutex<Vec<Connection>>) -> std::sync::MutexGuard<'_, Vec<Connection>> {
    idle.lock().unwrap_or_else(PoisonError::into_inner)
}

impl ToSql for SqlValue {
    fn to_sql(&self) -> rusqlite::Result<ToSqlOutput<'_>> {
        Ok(ToSqlOutput::Borrowed(match self {
            SqlValue::Int(number) => ValueRef::Integer(*number),
            SqlValue::Text(text) => ValueRef::Text(text.as_bytes()),
            SqlValue::Bytes(bytes) => ValueRef::Blob(bytes),
        }))
    }
}

fn read_rows(statement: &mut Statement<'_>, bound: &[SqlValue]) -> SqliteResult<Vec<PageRow>> {
    let width = statement.column_count();
    let mut page = RowPage { width, ..RowPage::default() };
    let mut rows = statement.query(params_from_iter(bound))?;
    let mut count = 0;
    while let Some(row) = rows.next()? {
        for column in 0..width {
            page.push(row.get_ref(column)?)?;
        }
        count += 1;
    }
    let page = Arc::new(page);
    Ok((0..count).map(|row| PageRow { page: page.clone(), row }).collect())
}

/// The rows of a page, one after the other.
#[derive(Default)]
struct RowPage {
    columns: Vec<PageColumn>,
    /// The number of columns of each row.
    width: usize,
    /// The texts and blobs of all columns, concatenated.
    bytes: Vec<u8>,
}

#[derive(Clone, Copy)]
enum PageColumn {
    Null,
    Int(i64),
    /// The range in the bytes of the page.
    Text(usize, usize),
    Blob(usize, usize),
}

impl RowPage {
    fn push(&mut self, value: ValueRef<'_>) -> SqliteResult<()> {
        let start = self.bytes.len();
        let mut keep = |bytes: &[u8]| {
            self.bytes.extend_from_slice(bytes);
            self.bytes.len()
        };
        let column = match value {
            ValueRef::Null => PageColumn::Null,
            ValueRef::Integer(number) => PageColumn::Int(number),
            ValueRef::Text(text) => PageColumn::Text(start, keep(text)),
            ValueRef::Blob(blob) => PageColumn::Blob(start, keep(blob)),
            // No table has a column of this type.
            ValueRef::Real(_) => return Err(unavailable_failure("a column is a floating-point number")),
        };
        self.columns.push(column);
        Ok(())
    }
}

/// One row, which shares the page with the others.
pub(in crate::store) struct PageRow {
    page: Arc<RowPage>,
    row: usize,
}

type PageResult<T> = Result<T, sqlx::Error>;

impl PageRow {
    fn column(&self, at: usize) -> PageResult<PageColumn> {
        let row = self.page.columns.get(self.row * self.page.width..).unwrap_or_default();
        let column = row.get(at).filter(|_| at < self.page.width).copied();
        column.ok_or(sqlx::Error::ColumnIndexOutOfBounds { index: at, len: self.page.width })
    }
}

fn column_type_error(at: usize, wanted: &str) -> sqlx::Error {
    sqlx::Error::Decode(format!("column {at} is not {wanted}").into())
}

impl RowColumns for PageRow {
    fn text(&self, at: usize) -> PageResult<&str> {
        self.text_opt(at)?.ok_or_else(|| column_type_error(at, "a text"))
    }

    fn text_opt(&self, at: usize) -> PageResult<Option<&str>> {
        match self.column(at)? {
            PageColumn::Null => Ok(None),
            PageColumn::Text(start, end) => {
                let text = str::from_utf8(&self.page.bytes[start..end]);
                text.map(Some).map_err(|error| sqlx::Error::Decode(error.into()))
            }
            _ => Err(column_type_error(at, "a text")),
        }
    }

    fn int(&self, at: usize) -> PageResult<i64> {
        self.int_opt(at)?.ok_or_else(|| column_type_error(at, "a number"))
    }

    fn int_opt(&self, at: usize) -> PageResult<Option<i64>> {
        match self.column(at)? {
            PageColumn::Null => Ok(None),
            PageColumn::Int(number) => Ok(Some(number)),
            _ => Err(column_type_error(at, "a number")),
        }
    }

    fn bytes(&self, at: usize) -> PageResult<&[u8]> {
        self.bytes_opt(at)?.ok_or_else(|| column_type_error(at, "a blob"))
    }

    fn bytes_opt(&self, at: usize) -> PageResult<Option<&[u8]>> {
        match self.column(at)? {
            PageColumn::Null => Ok(None),
            PageColumn::Blob(start, end) => Ok(Some(&self.page.bytes[start..end])),
            _ => Err(column_type_error(at, "a blob")),
        }
    }

    fn arbitrary_text_opt(&self, at: usize) -> PageResult<Option<Cow<'_, str>>> {
        Ok(self.text_opt(at)?.map(Cow::Borrowed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_has_the_columns_that_it_was_read_with() {
        let connection = Connection::open_in_memory().unwrap();
        let sql = "SELECT ?, ?, ?, NULL UNION ALL SELECT 7, 'b', x'', 'it''s'";
        let bound = [SqlValue::Int(-1), SqlValue::Text("\u{e9}\0".to_owned()), SqlValue::Bytes(vec![0, 255])];
        let rows = read_rows(&mut connection.prepare(sql).unwrap(), &bound).unwrap();
        let [first, second] = &*rows else { panic!("{}", rows.len()) };
        assert_eq!((first.int(0).unwrap(), first.text(1).unwrap()), (-1, "\u{e9}\0"));
        assert_eq!((first.bytes(2).unwrap(), first.text_opt(3).unwrap()), (&[0, 255][..], None));
        assert_eq!((second.int_opt(0).unwrap(), second.text_opt(3).unwrap()), (Some(7), Some("it's")));
        assert_eq!(second.bytes_opt(2).unwrap(), Some(&[][..]));
        for wrong in [
            second.int(1).map(drop),
            second.text(0).map(drop),
            second.bytes(3).map(drop),
            second.int(4).map(drop),
        ] {
            assert!(wrong.is_err());
        }
        assert!(first.text(3).is_err(), "NULL where a text must be");
    }

    #[tokio::test]
    async fn a_closed_reader_reads_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.db");
        Connection::open(&path).unwrap().execute_batch("CREATE TABLE meta (head, head_hash)").unwrap();
        let readers = PageReaders::new(path);
        assert_eq!(readers.fetch_rows(crate::store::queries::head()).await.unwrap().len(), 0);
        readers.close().await;
        assert!(readers.fetch_rows(crate::store::queries::head()).await.is_err());
    }
}
