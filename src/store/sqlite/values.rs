//! Rows by the dozen: one statement for up to 64 of them. A statement costs some 20 µs to be sent to SQLite's thread
//! and back, whatever it does there; and of one with many rows SQLite writes the pages of an index once.
//!
//! So that few statements are ever prepared, each takes a power of two of rows.

use sqlx::{AssertSqlSafe, SqliteConnection, sqlite::SqliteRow};

pub(super) type Query = sqlx::query::Query<'static, sqlx::Sqlite, sqlx::sqlite::SqliteArguments>;
pub(super) type Result<T> = std::result::Result<T, sqlx::Error>;

/// How many rows a statement takes at the most.
const MOST: usize = 64;

/// A statement around `VALUES`.
#[derive(Clone, Copy)]
pub(super) struct Statement {
    /// What stands before the word.
    pub(super) head: &'static str,
    /// One row, with its brackets.
    pub(super) row: &'static str,
    /// What stands after the last row.
    pub(super) tail: &'static str,
}

impl Statement {
    /// The text for so many rows.
    pub(super) fn of(&self, rows: usize) -> String {
        let Statement { head, row, tail } = self;
        let mut sql = String::with_capacity(head.len() + tail.len() + (row.len() + 2) * rows + 10);
        sql.push_str(head);
        for at in 0..rows {
            sql.push_str(if at == 0 { " VALUES " } else { ", " });
            sql.push_str(row);
        }
        sql.push(' ');
        sql.push_str(tail);
        sql
    }

    /// Each statement that the rows need, with its values.
    fn queries<T>(&self, rows: &[T], bind: impl Fn(Query, &T) -> Query) -> impl Iterator<Item = Query> {
        pieces(rows).map(move |piece| {
            let query = sqlx::query(AssertSqlSafe(self.of(piece.len())));
            piece.iter().fold(query, &bind)
        })
    }

    /// Runs it for all rows, in their order. How many rows of the table it changed.
    pub(super) async fn write<T>(
        &self,
        connection: &mut SqliteConnection,
        rows: &[T],
        bind: impl Fn(Query, &T) -> Query,
    ) -> Result<u64> {
        let mut changed = 0;
        for query in self.queries(rows, bind) {
            changed += query.execute(&mut *connection).await?.rows_affected();
        }
        Ok(changed)
    }

    /// Runs it for all rows. What it finds, in no order.
    pub(super) async fn read<T>(
        &self,
        connection: &mut SqliteConnection,
        rows: &[T],
        bind: impl Fn(Query, &T) -> Query,
    ) -> Result<Vec<SqliteRow>> {
        let mut found = Vec::new();
        for query in self.queries(rows, bind) {
            found.extend(query.fetch_all(&mut *connection).await?);
        }
        Ok(found)
    }
}

/// Cuts rows into pieces of a power of two each, the largest first.
fn pieces<T>(mut rows: &[T]) -> impl Iterator<Item = &[T]> {
    std::iter::from_fn(move || {
        let length = MOST.min(1 << rows.len().checked_ilog2()?);
        let (piece, rest) = rows.split_at(length);
        rows = rest;
        Some(piece)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_cut_into_few_lengths_and_none_is_lost() {
        for count in 0..300 {
            let rows: Vec<_> = (0..count).collect();
            let cut: Vec<_> = pieces(&rows).collect();
            assert_eq!(cut.concat(), rows);
            assert!(cut.iter().all(|piece| piece.len().is_power_of_two() && piece.len() <= MOST));
            assert!(cut.len() <= count / MOST + 6, "{count} rows in {} pieces", cut.len());
        }
    }
}
