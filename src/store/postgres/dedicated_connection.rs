//! A connection for one purpose, which no other work can hold up. A statement is one message of text, with its
//! transaction around it, so that it costs one round trip and passes pgbouncer; answers come as text. Whoever fails
//! or is given up in the middle leaves no connection behind.

use std::{
    borrow::Cow,
    ops::Range,
    sync::{Mutex, PoisonError},
    time::Duration,
};

use futures_util::TryStreamExt as _;
use sqlx::{
    AssertSqlSafe, Column as _, Connection as _, Either, PgConnection, Row as _, TypeInfo as _,
    postgres::{PgConnectOptions, PgRow},
};

use crate::store::row_decoding::RowColumns;

use super::{ACQUIRE_TIMEOUT, PgResult, with_timeout};

/// A way to the server, for one statement at a time; a second one makes a connection of its own.
pub(super) struct DedicatedConnection {
    options: PgConnectOptions,
    idle: Mutex<Option<PgConnection>>,
}

impl DedicatedConnection {
    pub(super) fn new(options: PgConnectOptions) -> DedicatedConnection {
        DedicatedConnection { options, idle: Mutex::default() }
    }

    /// Sends a message and gives its rows. What stands in it must be ours: numbers, hex, names that need no quotes.
    pub(super) async fn fetch_rows(&self, sql: String, limit: Duration) -> PgResult<Vec<PgRow>> {
        let idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner).take();
        let mut connection = match idle {
            Some(connection) => connection,
            None => {
                with_timeout(ACQUIRE_TIMEOUT.min(limit), PgConnection::connect_with(&self.options)).await?
            }
        };
        let asked = sqlx::raw_sql(AssertSqlSafe(sql)).fetch_all(&mut connection);
        let rows = with_timeout(limit, asked).await?;
        *self.idle.lock().unwrap_or_else(PoisonError::into_inner) = Some(connection);
        Ok(rows)
    }

    /// Ends the connection, if there is one.
    pub(super) async fn close(&self) {
        let idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(connection) = idle {
            let _ = with_timeout(ACQUIRE_TIMEOUT, connection.close()).await;
        }
    }
}

/// Sends a message of several statements; gives the rows of each of them.
pub(super) async fn fetch_statement_rows(
    connection: &mut PgConnection,
    sql: String,
) -> PgResult<Vec<Vec<TextRow>>> {
    let mut said = sqlx::raw_sql(AssertSqlSafe(sql)).fetch_many(connection);
    let (mut answers, mut rows) = (Vec::new(), Vec::new());
    while let Some(next) = said.try_next().await? {
        match next {
            Either::Left(_done) => answers.push(std::mem::take(&mut rows)),
            Either::Right(row) => rows.push(TextRow::from_pg_row(&row, 0..row.len())?),
        }
    }
    Ok(answers)
}

/// Some columns of a row that came as text.
pub(in crate::store) struct TextRow(Vec<TextValue>);

enum TextValue {
    Null,
    Text(String),
    Bytes(Vec<u8>),
}

impl TextRow {
    pub(super) fn from_pg_row(row: &PgRow, columns: Range<usize>) -> PgResult<TextRow> {
        let value = |at: usize| -> PgResult<TextValue> {
            Ok(match row.try_get_unchecked::<Option<String>, _>(at)? {
                None => TextValue::Null,
                Some(text) if row.column(at).type_info().name() == "BYTEA" => {
                    TextValue::Bytes(parse_bytea(&text)?)
                }
                Some(text) => TextValue::Text(text),
            })
        };
        columns.map(value).collect::<PgResult<_>>().map(TextRow)
    }
}

fn decode_error(what: &'static str) -> sqlx::Error {
    sqlx::Error::Decode(what.into())
}

fn parse_bytea(text: &str) -> PgResult<Vec<u8>> {
    let hex = text.strip_prefix("\\x").filter(|hex| hex.len() % 2 == 0);
    let hex = hex.ok_or_else(|| decode_error("not bytes in hex; is bytea_output changed?"))?.as_bytes();
    let digit = |digit: u8| char::from(digit).to_digit(16).and_then(|digit| u8::try_from(digit).ok());
    let byte = |pair: &[u8]| Some(digit(pair[0])? << 4 | digit(pair[1])?);
    hex.chunks_exact(2).map(byte).collect::<Option<_>>().ok_or_else(|| decode_error("not bytes in hex"))
}

impl RowColumns for TextRow {
    fn text(&self, at: usize) -> PgResult<&str> {
        self.text_opt(at)?.ok_or_else(|| decode_error("nothing where text should be"))
    }

    fn text_opt(&self, at: usize) -> PgResult<Option<&str>> {
        match &self.0[at] {
            TextValue::Null => Ok(None),
            TextValue::Text(text) => Ok(Some(text)),
            TextValue::Bytes(_) => Err(decode_error("bytes where text should be")),
        }
    }

    fn int(&self, at: usize) -> PgResult<i64> {
        self.int_opt(at)?.ok_or_else(|| decode_error("nothing where a number should be"))
    }

    fn int_opt(&self, at: usize) -> PgResult<Option<i64>> {
        let parsed = self.text_opt(at)?.map(str::parse).transpose();
        parsed.map_err(|_| decode_error("no number where one should be"))
    }

    fn bytes(&self, at: usize) -> PgResult<&[u8]> {
        self.bytes_opt(at)?.ok_or_else(|| decode_error("nothing where bytes should be"))
    }

    fn bytes_opt(&self, at: usize) -> PgResult<Option<&[u8]>> {
        match &self.0[at] {
            TextValue::Null => Ok(None),
            TextValue::Bytes(bytes) => Ok(Some(bytes)),
            TextValue::Text(_) => Err(decode_error("text where bytes should be")),
        }
    }

    fn arbitrary_text_opt(&self, at: usize) -> PgResult<Option<Cow<'_, str>>> {
        let text = self.bytes_opt(at)?.map(str::from_utf8).transpose();
        text.map(|text| text.map(Cow::Borrowed)).map_err(|error| sqlx::Error::Decode(error.into()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_read_from_hex_and_nothing_else() {
        assert_eq!(parse_bytea("\\x00ff1a").unwrap(), [0, 255, 26]);
        assert_eq!(parse_bytea("\\x").unwrap(), [0; 0]);
        for bad in ["", "00", "\\x0", "\\xzz", "\\000"] {
            assert!(parse_bytea(bad).is_err(), "{bad:?}");
        }
    }
}
