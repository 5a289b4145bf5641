//! What was seen in schedules, to show that they are worth something.

macro_rules! tally {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        pub(super) struct Tally { $($(#[$doc])* pub(super) $name: u64,)* }

        impl Tally {
            pub(super) fn add(&mut self, other: &Tally) {
                $(self.$name += other.$name;)*
            }

            /// What never happened, by name.
            pub(super) fn never(&self) -> Vec<&'static str> {
                [$((stringify!($name), self.$name)),*]
                    .into_iter()
                    .filter(|(_, count)| *count == 0)
                    .map(|(name, _)| name)
                    .collect()
            }
        }
    };
}

tally! {
    events,
    /// Revokes that every replica acknowledged.
    fast,
    /// Revokes that waited until the leases had run out.
    slow,
    /// Revokes that found that the database had lost them.
    lost,
    /// Instants at which a Check was tried on a node.
    probes,
    /// Checks with two halves that were allowed.
    allowed,
    snapshots,
    /// Times that a replica gave up its lease.
    stops,
    /// Times that a lease ran out before it was renewed.
    lapses,
    timeouts,
    regressed,
    frozen,
    collected,
    restores,
}
