//! The keys of a snapshot. A page is some secrets and then their keys: two walks along an index each, whatever the
//! planner knows of the tables, and short enough for the time limit of a statement. What is held at a time is the
//! secrets of a page.
//!
//! Two sessions that see the same read at once, one from each end, until they meet: most of the time is the server's,
//! which has a process for each.

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

/// How many secrets a page has.
const SECRETS_PER_PAGE: usize = 10_000;

/// The ids whose keys nobody has read or is about to read.
pub(super) struct UnreadKeyRange(Mutex<Option<RangeInclusive<KeyIdNumber>>>);

/// From which end somebody reads.
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

    /// Takes the ids from one end up to this one, which stays; or all of them. None where somebody has taken them.
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

/// Gives the keys of `rest` that were not revoked before `forget_before` to `loader`, until there are none.
pub(super) async fn load_keys(
    connection: &mut PgConnection,
    rest: &UnreadKeyRange,
    from: ScanDirection,
    forget_before: Timestamp,
    loader: &Arc<dyn SnapshotLoader>,
) -> Result<(), StoreError> {
    let (mut part, mut alike, mut limit) = (loader.begin_part(), KeyParseCache::default(), SECRETS_PER_PAGE);
    // Its room is used again: new room is given page by page, by the kernel.
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
        // More secrets of the last key may come.
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
        let mut claims = SecretJoin::new(std::slice::from_ref(&page), forget_before, &mut alike);
        copy_rows(connection, &keys, &mut |row| claims.join_key(row, &mut *part)).await?;
    }
    part.finish();
    Ok(())
}

/// An id as SQL says it: a COPY takes no arguments.
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
