//! Finds the keys that descend from a key: the keys that it created, the keys that these created, and so on.
//!
//! A rotation counts like a creation, because the caller of a rotation receives a token of the key. A key that was
//! only rotated passes on what it did from then on; what it created before is not suspect.

use std::{
    collections::{HashMap, HashSet},
    time::Duration,
};

use super::{name::KeyId, time::Timestamp};

/// How far the clocks of two servers may differ: times of different servers are compared.
const MAX_CLOCK_SKEW: Duration = Duration::from_secs(60);

/// What a key did to another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LineageLinkKind {
    /// The caller created or imported the key.
    Created,
    /// Gave it a new secret.
    Rotated,
}

/// A key that received a secret from another key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LineageLink {
    /// The key that received the secret.
    pub child: KeyId,
    /// The key whose token made the call.
    pub parent: KeyId,
    /// What the caller did to the descendant.
    pub kind: LineageLinkKind,
    /// When the caller did it.
    pub at: Timestamp,
}

/// The descendants of some keys, each with the link that makes it one: a creation if there is one, otherwise the
/// earliest rotation. The keys themselves are not among them.
#[must_use]
pub fn find_descendants(of: &[KeyId], links: &[LineageLink]) -> HashMap<KeyId, LineageLink> {
    let mut by = HashMap::<KeyId, Vec<&LineageLink>>::new();
    for link in links {
        by.entry(link.parent).or_default().push(link);
    }
    let start: HashSet<_> = of.iter().copied().collect();
    let mut found = HashMap::<KeyId, LineageLink>::new();
    let mut open: Vec<_> = start.iter().map(|key| (*key, Timestamp::MIN)).collect();
    while let Some((key, since)) = open.pop() {
        for link in by.get(&key).into_iter().flatten().filter(|link| link.at >= since) {
            let is_earlier = |known: &LineageLink| suspect_since(link) < suspect_since(known);
            if !start.contains(&link.child) && found.get(&link.child).is_none_or(is_earlier) {
                found.insert(link.child, **link);
                open.push((link.child, suspect_since(link)));
            }
        }
    }
    found
}

/// From when on what the child does is suspect.
#[must_use]
pub fn suspect_since(link: &LineageLink) -> Timestamp {
    match link.kind {
        LineageLinkKind::Created => Timestamp::MIN,
        LineageLinkKind::Rotated => link.at.saturating_sub(MAX_CLOCK_SKEW),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    const MINUTE: i64 = 60_000_000;

    fn key(number: u8) -> KeyId {
        KeyId::from_custom_bytes([number; 16])
    }

    fn link(by: u8, child: u8, kind: LineageLinkKind, minute: i64) -> LineageLink {
        LineageLink { child: key(child), parent: key(by), kind, at: Timestamp::from_micros(minute * MINUTE) }
    }

    #[track_caller]
    fn descend(of: u8, links: &[LineageLink], expected: &[u8]) {
        let found: BTreeSet<_> = find_descendants(&[key(of)], links).into_keys().collect();
        assert_eq!(found, expected.iter().copied().map(key).collect());
    }

    #[test]
    fn every_generation_descends_and_nobody_elses_children_do() {
        use LineageLinkKind::Created;
        let links =
            [link(1, 2, Created, 1), link(2, 3, Created, 2), link(3, 4, Created, 3), link(9, 5, Created, 4)];
        descend(1, &links, &[2, 3, 4]);
        descend(3, &links, &[4]);
        descend(4, &links, &[]);
    }

    #[test]
    fn a_rotated_key_descends_with_what_it_made_from_then_on() {
        use LineageLinkKind::{Created, Rotated};
        let links = [
            link(9, 2, Created, 1),
            link(2, 3, Created, 2),
            link(1, 2, Rotated, 10),
            link(2, 4, Created, 20),
            link(2, 5, Rotated, 3),
        ];
        descend(1, &links, &[2, 4]);
    }

    #[test]
    fn clocks_that_differ_hide_no_descendant() {
        use LineageLinkKind::{Created, Rotated};
        // The child was created on a server whose clock is behind.
        descend(1, &[link(1, 2, Created, 10), link(2, 3, Created, 7)], &[2, 3]);
        let seconds =
            |link: LineageLink| LineageLink { at: link.at.saturating_sub(Duration::from_secs(59)), ..link };
        descend(1, &[link(1, 2, Rotated, 10), seconds(link(2, 3, Created, 10))], &[2, 3]);
    }

    #[test]
    fn a_creation_found_after_a_rotation_makes_all_that_the_key_did_suspect() {
        use LineageLinkKind::{Created, Rotated};
        // 1 rotates 3 late, and 2, which 1 created, created 3 early.
        let links =
            [link(1, 3, Rotated, 50), link(1, 2, Created, 1), link(2, 3, Created, 2), link(3, 4, Created, 3)];
        descend(1, &links, &[2, 3, 4]);
    }

    #[test]
    fn a_circle_of_rotations_ends() {
        use LineageLinkKind::Rotated;
        let links =
            [link(1, 2, Rotated, 1), link(2, 3, Rotated, 2), link(3, 2, Rotated, 3), link(3, 1, Rotated, 4)];
        descend(1, &links, &[2, 3]);
    }
}
