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
    domain::{time::Timestamp, token::Hex},
    store::{
        Loader, StoreError,
        alike::Alike,
        records::KEY_COLUMNS,
        unclaimed::{COLUMNS, Claims, Id, Unclaimed},
    },
};

use super::copy::copy;

/// How many secrets a page has.
const PAGE: usize = 10_000;

/// The ids whose keys nobody has read or is about to read.
pub(super) struct Rest(Mutex<Option<RangeInclusive<Id>>>);

/// From which end somebody reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum From {
    First,
    Last,
}

impl Rest {
    pub(super) fn all() -> Rest {
        Rest(Mutex::new(Some(0..=Id::MAX)))
    }

    fn now(&self) -> Option<RangeInclusive<Id>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Takes the ids from one end up to this one, which stays; or all of them. None where somebody has taken them.
    fn claim(&self, from: From, upto: Option<Id>) -> Option<RangeInclusive<Id>> {
        let mut rest = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (first, last) = rest.take()?.into_inner();
        let Some(id) = upto.filter(|id| (first..=last).contains(id)) else { return Some(first..=last) };
        *rest = Some(if from == From::First { id..=last } else { first..=id });
        match from {
            From::First => id.checked_sub(1).filter(|end| *end >= first).map(|end| first..=end),
            From::Last => id.checked_add(1).filter(|start| *start <= last).map(|start| start..=last),
        }
    }
}

/// Gives the keys of `rest` that were not revoked before `forget_before` to `loader`, until there are none.
pub(super) async fn keys(
    connection: &mut PgConnection,
    rest: &Rest,
    from: From,
    forget_before: Timestamp,
    loader: &Arc<dyn Loader>,
) -> Result<(), StoreError> {
    let (mut part, mut alike, mut limit) = (loader.part(), Alike::default(), PAGE);
    // Its room is used again: new room is given page by page, by the kernel.
    let mut page = Unclaimed::default();
    while let Some(ids) = rest.now() {
        let order = if from == From::First { "" } else { "DESC" };
        let secrets = format!(
            "SELECT {COLUMNS} FROM secrets WHERE key_id BETWEEN {} AND {} ORDER BY key_id {order}, version {order} \
             LIMIT {limit}",
            literal(*ids.start()),
            literal(*ids.end())
        );
        page.clear();
        copy(connection, &secrets, &mut |row| page.add(row)).await?;
        page.sort();
        // More secrets of the last key may come.
        let last = if from == From::First { page.last() } else { page.first() };
        let Some(ids) = rest.claim(from, last.filter(|_| page.len() == limit)) else {
            limit *= 2;
            continue;
        };
        let keys = format!(
            "SELECT {KEY_COLUMNS} FROM keys k WHERE (revoked_at IS NULL OR revoked_at >= {}) \
             AND id BETWEEN {} AND {} ORDER BY id",
            forget_before.as_micros(),
            literal(*ids.start()),
            literal(*ids.end())
        );
        let mut claims = Claims::of(std::slice::from_ref(&page), forget_before, &mut alike);
        copy(connection, &keys, &mut |row| claims.key(row, &mut *part)).await?;
    }
    part.end();
    Ok(())
}

/// An id as SQL says it: a COPY takes no arguments.
fn literal(id: Id) -> String {
    format!("decode('{}', 'hex')", Hex(&id.to_be_bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whoever_reads_from_either_end_takes_each_id_once() {
        let rest = Rest::all();
        assert_eq!(rest.claim(From::First, Some(10)), Some(0..=9));
        assert_eq!(rest.claim(From::Last, Some(100)), Some(101..=Id::MAX));
        assert_eq!(rest.claim(From::First, Some(10)), None, "one key has more secrets than a page");
        assert_eq!(rest.claim(From::Last, Some(100)), None);
        assert_eq!(rest.claim(From::First, Some(90)), Some(10..=89));
        // The other one has come further meanwhile.
        assert_eq!(rest.claim(From::Last, Some(60)), Some(90..=100));
        assert_eq!(rest.claim(From::First, None), None);
        let rest = Rest::all();
        assert_eq!(rest.claim(From::Last, None), Some(0..=Id::MAX));
        assert_eq!(rest.now(), None);
    }
}
