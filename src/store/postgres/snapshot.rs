//! The keys of a snapshot. A page is a range of keys and then their secrets: two walks along an index each, whatever
//! the planner knows of the tables, and short enough for the time limit of a statement. What is held at a time is
//! one page of keys without their secrets.

use sqlx::PgConnection;

use crate::{
    domain::{time::Timestamp, token::Hex},
    store::{
        StoreError,
        backend::TakeKey,
        records::{KEY_COLUMNS, Merge, SECRET_COLUMNS, key_row_at},
    },
};

use super::copy::copy;

/// How many keys a page has.
const PAGE: usize = 10_000;

/// Gives every key that was not revoked before `forget_before` to `take`, in the order of ids.
pub(super) async fn keys(
    connection: &mut PgConnection,
    forget_before: Timestamp,
    take: TakeKey<'_>,
) -> Result<(), StoreError> {
    let forget_before = forget_before.as_micros();
    let mut after = String::new();
    loop {
        let keys = format!(
            "SELECT {KEY_COLUMNS} FROM keys k WHERE (k.revoked_at IS NULL OR k.revoked_at >= {forget_before}) {after} \
             ORDER BY k.id LIMIT {PAGE}"
        );
        let mut page = Vec::with_capacity(PAGE);
        copy(connection, &keys, &mut |row| {
            page.push(key_row_at(row)?);
            Ok(())
        })
        .await?;
        let count = page.len();
        let (Some((first, _)), Some((last, _))) = (page.first(), page.last()) else { return Ok(()) };
        let (first, last) = (id(first.id), id(last.id));
        let secrets = format!(
            "SELECT s.key_id, {SECRET_COLUMNS} FROM secrets s WHERE s.key_id BETWEEN {first} AND {last} \
             ORDER BY s.key_id, s.version"
        );
        let mut merge = Merge::new(page);
        copy(connection, &secrets, &mut |row| merge.secret(row, take)).await?;
        merge.finish(take)?;
        if count < PAGE {
            return Ok(());
        }
        after = format!("AND k.id > {last}");
    }
}

/// An id as SQL says it: a COPY takes no arguments.
fn id(id: [u8; 16]) -> String {
    format!("decode('{}', 'hex')", Hex(&id))
}
