//! The keys of a snapshot. A page is a range of keys and then their secrets: two walks along an index each, whatever
//! the planner knows of the tables, and short enough for the time limit of a statement. While one page is read, the one
//! before is taken: what is held at a time is a few pages.

use sqlx::PgConnection;
use tokio::sync::mpsc;

use crate::{
    domain::{name::KeyId, time::Timestamp, token::Hex},
    store::{
        StoreError,
        alike::Alike,
        records::{GatheredKey, KEY_COLUMNS, Merge, SECRET_COLUMNS, key_at},
    },
};

use super::copy::copy;

/// How many keys a page has.
const PAGE: usize = 10_000;

/// Sends every key that was not revoked before `forget_before`, a page at a time, in the order of ids.
pub(super) async fn keys(
    connection: &mut PgConnection,
    forget_before: Timestamp,
    pages: &mpsc::Sender<Vec<GatheredKey>>,
) -> Result<(), StoreError> {
    let forget_before = forget_before.as_micros();
    let (mut after, mut alike) = (String::new(), Alike::default());
    loop {
        let keys = format!(
            "SELECT {KEY_COLUMNS} FROM keys k WHERE (k.revoked_at IS NULL OR k.revoked_at >= {forget_before}) {after} \
             ORDER BY k.id LIMIT {PAGE}"
        );
        let mut page = Vec::with_capacity(PAGE);
        copy(connection, &keys, &mut |row| {
            page.push(key_at(row, &mut alike)?);
            Ok(())
        })
        .await?;
        let count = page.len();
        let (Some(first), Some(last)) = (page.first(), page.last()) else { return Ok(()) };
        let (first, last) = (id(first.id), id(last.id));
        let secrets = format!(
            "SELECT s.key_id, {SECRET_COLUMNS} FROM secrets s WHERE s.key_id BETWEEN {first} AND {last} \
             ORDER BY s.key_id, s.version"
        );
        let (mut merge, mut done) = (Merge::new(page), Vec::with_capacity(count));
        copy(connection, &secrets, &mut |row| merge.secret(row, &mut |key| done.push(key))).await?;
        merge.finish(&mut |key| done.push(key))?;
        if pages.send(done).await.is_err() || count < PAGE {
            return Ok(());
        }
        after = format!("AND k.id > {last}");
    }
}

/// An id as SQL says it: a COPY takes no arguments.
fn id(id: KeyId) -> String {
    format!("decode('{}', 'hex')", Hex(id.as_bytes()))
}
