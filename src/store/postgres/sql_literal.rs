//! Writes values as SQL literals of PostgreSQL, independent of its settings.
//!
//! With literals, several statements fit into one message and one round trip. Every value in such a statement must be
//! written by this module.

use std::borrow::Cow;

use crate::store::queries::{SqlDialect, SqlValue};

impl SqlDialect for sqlx::Postgres {
    // Replicas of the previous version write the column.
    const LAST_USED_EXPRESSION: &'static str = "greatest(s.last_used_at, u.at)";
    const USES_SUBQUERY: &'static str = "(SELECT key_id, at FROM uses UNION ALL SELECT key_id, last_used_at FROM secrets) AS uses (key_id, at)";
    const NAME_NFC_EXPRESSION: &'static str = "normalize(name, NFC)";

    fn push_value(statement: &mut String, _: &mut Vec<SqlValue>, value: SqlValue) {
        statement.push_str(&match value {
            SqlValue::Int(value) => value.to_sql_literal(),
            SqlValue::Text(value) => value.to_sql_literal(),
            SqlValue::Bytes(value) => value.to_sql_literal(),
        });
    }
}

/// A value of one of the three types that are stored.
pub(super) trait SqlLiteral {
    fn to_sql_literal(&self) -> String;
}

impl SqlLiteral for i64 {
    fn to_sql_literal(&self) -> String {
        format!("'{self}'::bigint")
    }
}

impl SqlLiteral for str {
    /// An escape string: it reads the same with and without `standard_conforming_strings`.
    fn to_sql_literal(&self) -> String {
        let mut literal = String::with_capacity(self.len() + 10);
        literal.push_str("E'");
        for character in self.chars() {
            if matches!(character, '\'' | '\\') {
                literal.push('\\');
            }
            literal.push(character);
        }
        literal.push_str("'::text");
        literal
    }
}

impl SqlLiteral for String {
    fn to_sql_literal(&self) -> String {
        self.as_str().to_sql_literal()
    }
}

impl SqlLiteral for Cow<'_, str> {
    fn to_sql_literal(&self) -> String {
        self.as_ref().to_sql_literal()
    }
}

impl SqlLiteral for [u8] {
    fn to_sql_literal(&self) -> String {
        const DIGITS: &[u8; 16] = b"0123456789abcdef";
        let mut literal = String::with_capacity(2 * self.len() + 16);
        literal.push_str("E'\\\\x");
        for byte in self {
            literal.push(char::from(DIGITS[usize::from(byte >> 4)]));
            literal.push(char::from(DIGITS[usize::from(byte & 15)]));
        }
        literal.push_str("'::bytea");
        literal
    }
}

impl SqlLiteral for Vec<u8> {
    fn to_sql_literal(&self) -> String {
        self.as_slice().to_sql_literal()
    }
}

impl<T: SqlLiteral> SqlLiteral for Option<T> {
    fn to_sql_literal(&self) -> String {
        self.as_ref().map_or_else(|| "NULL".to_owned(), SqlLiteral::to_sql_literal)
    }
}

/// A column of some rows as an array. The statement must cast it, since it may be empty.
pub(super) fn array_literal<I: IntoIterator, T: SqlLiteral>(rows: I, of: impl Fn(I::Item) -> T) -> String {
    let values: Vec<_> = rows.into_iter().map(|row| of(row).to_sql_literal()).collect();
    format!("ARRAY[{}]", values.join(","))
}

/// Rows for the VALUES of an INSERT, which the server plans faster than `unnest`.
pub(super) fn values_list<I: IntoIterator, const N: usize>(
    rows: I,
    of: impl Fn(I::Item) -> [String; N],
) -> String {
    let rows: Vec<_> = rows.into_iter().map(|row| format!("({})", of(row).join(", "))).collect();
    rows.join(", ")
}

/// Replaces `$1`, `$2` and so on by values. Placeholders inside values are not replaced.
pub(super) fn fill_placeholders(sql: &str, values: &[String]) -> String {
    let mut pieces = sql.split('$');
    let mut filled = pieces.next().unwrap_or_default().to_owned();
    for piece in pieces {
        let digits = piece.len() - piece.trim_start_matches(|digit: char| digit.is_ascii_digit()).len();
        let (place, rest) = piece.split_at(digits);
        let value = place.parse::<usize>().ok().and_then(|place| values.get(place.checked_sub(1)?));
        // A placeholder without a value is a programming error; the server rejects the statement.
        filled.push_str(value.map_or("$", String::as_str));
        filled.push_str(rest);
    }
    filled
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_read_the_same_whatever_the_settings_are() {
        assert_eq!(5i64.to_sql_literal(), "'5'::bigint");
        assert_eq!(i64::MIN.to_sql_literal(), "'-9223372036854775808'::bigint");
        assert_eq!("it's \\ $1".to_sql_literal(), "E'it\\'s \\\\ $1'::text");
        assert_eq!([0u8, 0xfa].as_slice().to_sql_literal(), "E'\\\\x00fa'::bytea");
        assert_eq!(None::<i64>.to_sql_literal(), "NULL");
    }

    #[test]
    fn values_take_their_places_and_are_not_looked_at() {
        let values: Vec<String> = (1..=12).map(|at| format!("<{at}$1>")).collect();
        assert_eq!(fill_placeholders("a $1, $12::text[] $2", &values), "a <1$1>, <12$1>::text[] <2$1>");
        assert_eq!(fill_placeholders("none", &[]), "none");
        assert_eq!(array_literal([1i64, 2], |value| value), "ARRAY['1'::bigint,'2'::bigint]");
        assert_eq!(array_literal(Vec::<i64>::new(), |value| value), "ARRAY[]");
        let two = |value: i64| [value.to_sql_literal(), "NULL".to_owned()];
        assert_eq!(values_list([1i64, 2], two), "('1'::bigint, NULL), ('2'::bigint, NULL)");
    }
}
