//! Rows of the simple query protocol, whose values arrive as text.

use std::{borrow::Cow, ops::Range};

use sqlx::{Column as _, Row as _, TypeInfo as _, postgres::PgRow};

use crate::store::row_decoding::RowColumns;

use super::errors::PgResult;

/// A range of columns of a row that arrived as text.
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
