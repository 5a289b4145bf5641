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

use crate::store::records::Columns;

use super::{ACQUIRE, Result, within};

/// A way to the server, for one statement at a time; a second one makes a connection of its own.
pub(super) struct Line {
    options: PgConnectOptions,
    idle: Mutex<Option<PgConnection>>,
}

impl Line {
    pub(super) fn to(options: PgConnectOptions) -> Line {
        Line { options, idle: Mutex::default() }
    }

    /// Sends a message and gives its rows. What stands in it must be ours: numbers, hex, names that need no quotes.
    pub(super) async fn ask(&self, sql: String, limit: Duration) -> Result<Vec<PgRow>> {
        let idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner).take();
        let mut connection = match idle {
            Some(connection) => connection,
            None => within(ACQUIRE.min(limit), PgConnection::connect_with(&self.options)).await?,
        };
        let asked = sqlx::raw_sql(AssertSqlSafe(sql)).fetch_all(&mut connection);
        let rows = within(limit, asked).await?;
        *self.idle.lock().unwrap_or_else(PoisonError::into_inner) = Some(connection);
        Ok(rows)
    }

    /// Ends the connection, if there is one.
    pub(super) async fn close(&self) {
        let idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(connection) = idle {
            let _ = within(ACQUIRE, connection.close()).await;
        }
    }
}

/// Sends a message of several statements; gives the rows of each of them.
pub(super) async fn ask(connection: &mut PgConnection, sql: String) -> Result<Vec<Vec<TextRow>>> {
    let mut said = sqlx::raw_sql(AssertSqlSafe(sql)).fetch_many(connection);
    let (mut answers, mut rows) = (Vec::new(), Vec::new());
    while let Some(next) = said.try_next().await? {
        match next {
            Either::Left(_done) => answers.push(std::mem::take(&mut rows)),
            Either::Right(row) => rows.push(TextRow::of(&row, 0..row.len())?),
        }
    }
    Ok(answers)
}

/// Some columns of a row that came as text.
pub(in crate::store) struct TextRow(Vec<Value>);

enum Value {
    Null,
    Text(String),
    Bytes(Vec<u8>),
}

impl TextRow {
    pub(super) fn of(row: &PgRow, columns: Range<usize>) -> Result<TextRow> {
        let value = |at: usize| -> Result<Value> {
            Ok(match row.try_get_unchecked::<Option<String>, _>(at)? {
                None => Value::Null,
                Some(text) if row.column(at).type_info().name() == "BYTEA" => Value::Bytes(bytes(&text)?),
                Some(text) => Value::Text(text),
            })
        };
        columns.map(value).collect::<Result<_>>().map(TextRow)
    }
}

fn wrong(what: &'static str) -> sqlx::Error {
    sqlx::Error::Decode(what.into())
}

fn bytes(text: &str) -> Result<Vec<u8>> {
    let hex = text.strip_prefix("\\x").filter(|hex| hex.len() % 2 == 0);
    let hex = hex.ok_or_else(|| wrong("not bytes in hex; is bytea_output changed?"))?.as_bytes();
    let digit = |digit: u8| char::from(digit).to_digit(16).and_then(|digit| u8::try_from(digit).ok());
    let byte = |pair: &[u8]| Some(digit(pair[0])? << 4 | digit(pair[1])?);
    hex.chunks_exact(2).map(byte).collect::<Option<_>>().ok_or_else(|| wrong("not bytes in hex"))
}

impl Columns for TextRow {
    fn text(&self, at: usize) -> Result<&str> {
        self.text_opt(at)?.ok_or_else(|| wrong("nothing where text should be"))
    }

    fn text_opt(&self, at: usize) -> Result<Option<&str>> {
        match &self.0[at] {
            Value::Null => Ok(None),
            Value::Text(text) => Ok(Some(text)),
            Value::Bytes(_) => Err(wrong("bytes where text should be")),
        }
    }

    fn int(&self, at: usize) -> Result<i64> {
        self.int_opt(at)?.ok_or_else(|| wrong("nothing where a number should be"))
    }

    fn int_opt(&self, at: usize) -> Result<Option<i64>> {
        let parsed = self.text_opt(at)?.map(str::parse).transpose();
        parsed.map_err(|_| wrong("no number where one should be"))
    }

    fn bytes(&self, at: usize) -> Result<&[u8]> {
        self.bytes_opt(at)?.ok_or_else(|| wrong("nothing where bytes should be"))
    }

    fn bytes_opt(&self, at: usize) -> Result<Option<&[u8]>> {
        match &self.0[at] {
            Value::Null => Ok(None),
            Value::Bytes(bytes) => Ok(Some(bytes)),
            Value::Text(_) => Err(wrong("text where bytes should be")),
        }
    }

    fn free_text_opt(&self, at: usize) -> Result<Option<Cow<'_, str>>> {
        let text = self.bytes_opt(at)?.map(str::from_utf8).transpose();
        text.map(|text| text.map(Cow::Borrowed)).map_err(|error| sqlx::Error::Decode(error.into()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_read_from_hex_and_nothing_else() {
        assert_eq!(bytes("\\x00ff1a").unwrap(), [0, 255, 26]);
        assert_eq!(bytes("\\x").unwrap(), [0; 0]);
        for bad in ["", "00", "\\x0", "\\xzz", "\\000"] {
            assert!(bytes(bad).is_err(), "{bad:?}");
        }
    }
}
