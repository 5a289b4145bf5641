//! Reads the keys of a snapshot in pages: some secrets, then their keys.
//!
//! Both are index scans, whatever the planner's statistics are, and short enough for the statement timeout. Only the
//! secrets of one page are in memory.
//!
//! Two sessions with the same snapshot read from both ends until they meet. Most of the time is spent in the server,
//! which has one process per session.

use std::{
    ops::RangeInclusive,
    sync::{Arc, Mutex, PoisonError},
};

use sqlx::PgConnection;

use crate::{
    domain::{time::Timestamp, token::HexBytes},
    store::{
        SnapshotLoader, StoreError,
        parse_cache::KeyParseCache,
        row_decoding::KEY_COLUMNS,
        secret_join::{KeyIdNumber, SECRET_ROW_COLUMNS, SecretBuffer, SecretJoin},
    },
};

use super::copy_reader::copy_rows;

/// The number of secrets in a page.
const SECRETS_PER_PAGE: usize = 10_000;

/// The ids whose keys no session has read or claimed.
pub(super) struct UnreadKeyRange(Mutex<Option<RangeInclusive<KeyIdNumber>>>);

/// The end from which a session reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ScanDirection {
    Ascending,
    Descending,
}

impl UnreadKeyRange {
    pub(super) fn full() -> UnreadKeyRange {
        UnreadKeyRange(Mutex::new(Some(0..=KeyIdNumber::MAX)))
    }

    fn current(&self) -> Option<RangeInclusive<KeyIdNumber>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Claims the ids from one end up to `upto`, which stays; without `upto`, all. `None` if another session has
    /// claimed them.
    fn claim(&self, from: ScanDirection, upto: Option<KeyIdNumber>) -> Option<RangeInclusive<KeyIdNumber>> {
        let mut rest = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (first, last) = rest.take()?.into_inner();
        let Some(id) = upto.filter(|id| (first..=last).contains(id)) else { return Some(first..=last) };
        *rest = Some(if from == ScanDirection::Ascending { id..=last } else { first..=id });
        match from {
            ScanDirection::Ascending => id.checked_sub(1).filter(|end| *end >= first).map(|end| first..=end),
            ScanDirection::Descending => {
                id.checked_add(1).filter(|start| *start <= last).map(|start| start..=last)
            }
        }
    }
}

/// Passes the keys of `rest` that were not revoked before `forget_before` to `loader`.
pub(super) async fn load_keys(
    connection: &mut PgConnection,
    rest: &UnreadKeyRange,
    from: ScanDirection,
    forget_before: Timestamp,
    loader: &Arc<dyn SnapshotLoader>,
) -> Result<(), StoreError> {
    let (mut part, mut parse_cache, mut limit) =
        (loader.begin_part(), KeyParseCache::default(), SECRETS_PER_PAGE);
    // The buffer is reused: the kernel would provide new memory page by page.
    let mut page = SecretBuffer::default();
    while let Some(ids) = rest.current() {
        let order = if from == ScanDirection::Ascending { "" } else { "DESC" };
        let secrets = format!(
            "SELECT {SECRET_ROW_COLUMNS} FROM secrets WHERE key_id BETWEEN {} AND {} ORDER BY key_id {order}, version {order} \
             LIMIT {limit}",
            key_id_literal(*ids.start()),
            key_id_literal(*ids.end())
        );
        page.clear();
        copy_rows(connection, &secrets, &mut |row| page.push_row(row)).await?;
        page.sort();
        // The last key may have more secrets.
        let last = if from == ScanDirection::Ascending { page.last_id() } else { page.first_id() };
        let Some(ids) = rest.claim(from, last.filter(|_| page.len() == limit)) else {
            limit *= 2;
            continue;
        };
        let keys = format!(
            "SELECT {KEY_COLUMNS} FROM keys k WHERE (revoked_at IS NULL OR revoked_at >= {}) \
             AND id BETWEEN {} AND {} ORDER BY id",
            forget_before.as_micros(),
            key_id_literal(*ids.start()),
            key_id_literal(*ids.end())
        );
        let mut join = SecretJoin::new(std::slice::from_ref(&page), forget_before, &mut parse_cache);
        copy_rows(connection, &keys, &mut |row| join.join_key(row, &mut *part)).await?;
    }
    part.finish();
    Ok(())
}

/// An id as an SQL expression: COPY accepts no arguments.
fn key_id_literal(id: KeyIdNumber) -> String {
    format!("decode('{}', 'hex')", HexBytes(&id.to_be_bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whoever_reads_from_either_end_takes_each_id_once() {
        let rest = UnreadKeyRange::full();
        assert_eq!(rest.claim(ScanDirection::Ascending, Some(10)), Some(0..=9));
        assert_eq!(rest.claim(ScanDirection::Descending, Some(100)), Some(101..=KeyIdNumber::MAX));
        assert_eq!(
            rest.claim(ScanDirection::Ascending, Some(10)),
            None,
            "one key has more secrets than a page"
        );
        assert_eq!(rest.claim(ScanDirection::Descending, Some(100)), None);
        assert_eq!(rest.claim(ScanDirection::Ascending, Some(90)), Some(10..=89));
        // The other one has come further meanwhile.
        assert_eq!(rest.claim(ScanDirection::Descending, Some(60)), Some(90..=100));
        assert_eq!(rest.claim(ScanDirection::Ascending, None), None);
        let rest = UnreadKeyRange::full();
        assert_eq!(rest.claim(ScanDirection::Descending, None), Some(0..=KeyIdNumber::MAX));
        assert_eq!(rest.current(), None);
    }
}
