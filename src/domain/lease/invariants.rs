//! The rules that the guarantee rests on. Each looks as if it could be left out.
//!
//! Leaving one out is how the simulator proves that it would notice: it runs the same state machines with one
//! rule less. The server runs them with [`AllInvariants`], which has no way to break a rule: there the question is
//! answered when the code is compiled. But for one build, which nobody serves from: with `--cfg keyward_breakable`
//! (`make torture-mutants`) a process may be told at its start to leave out one rule, so that the torture of real
//! processes proves too that it would notice.

/// A rule. What follows its name is what goes wrong without it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LeaseInvariant {
    /// A revoker waits for the replicas. Without: they go on allowing until they happen to renew.
    RevokeWaits,
    /// A retried Revoke waits for the revision again. Without: it overtakes the first.
    RetryWaits,
    /// A revoker waits longer than a lease, by as much as clocks may differ. Without: a slow clock holds its
    /// lease longer than a fast one waits.
    DriftIsCovered,
    /// While rows may have been lost, their absence proves nothing. Without: a replica whose row is gone is not
    /// waited for.
    LostRowsAreWaitedOut,
    /// A lease ends. Without: a replica that is cut off allows for ever.
    LeaseEnds,
    /// A lease counts from before its renewal was sent. Without: it ends later by what the answer took.
    LeaseCountsFromSending,
    /// A renewal's changes are in the map before its lease is. Without: the new lease covers the old map.
    MapBeforeDeadline,
    /// A Check reads the deadline before it looks the key up. Without: it holds an old record against a new
    /// lease.
    DeadlineBeforeLookUp,
    /// A replica registers before it takes its snapshot, and allows after it has renewed. Without: a revoker
    /// that lists the replicas between the two does not see it.
    RegisterBeforeSnapshot,
    /// A change is in the map before it is acknowledged. Without: a revoker is told too early.
    ApplyBeforeAck,
    /// A row is removed after having been watched by one clock. Without: a step of a wall clock removes the
    /// living.
    DeadAreWatched,
    /// A replica's row says what is applied, committed, before a renewal may grant a lease. Without: a revoker that
    /// lists the replicas while the first renewal is being committed does not wait for it.
    ListedBeforeLease,
    /// Histories are compared by hash. Without: after a restore, other changes pass for known ones.
    HistoryIsCompared,
    /// A lease is granted only with every change there is. Without: it covers a map that lacks some.
    LeaseNeedsHead,
    /// A new incarnation of the database counts as settled only after a wait. Without: lost rows are not waited
    /// out either.
    SettlingTakesTime,
}

impl LeaseInvariant {
    /// All of them: the eleven of the protocol's design, and four that building it has added.
    pub const ALL: [LeaseInvariant; 15] = [
        LeaseInvariant::RevokeWaits,
        LeaseInvariant::RetryWaits,
        LeaseInvariant::DriftIsCovered,
        LeaseInvariant::LostRowsAreWaitedOut,
        LeaseInvariant::LeaseEnds,
        LeaseInvariant::LeaseCountsFromSending,
        LeaseInvariant::MapBeforeDeadline,
        LeaseInvariant::DeadlineBeforeLookUp,
        LeaseInvariant::RegisterBeforeSnapshot,
        LeaseInvariant::ApplyBeforeAck,
        LeaseInvariant::DeadAreWatched,
        LeaseInvariant::ListedBeforeLease,
        LeaseInvariant::HistoryIsCompared,
        LeaseInvariant::LeaseNeedsHead,
        LeaseInvariant::SettlingTakesTime,
    ];
}

/// Says which rules are kept.
pub trait InvariantSet {
    /// Whether this one is.
    fn enforces(&self, rule: LeaseInvariant) -> bool;
}

/// Keeps them all. The only one outside the tests.
#[derive(Clone, Copy, Debug, Default)]
pub struct AllInvariants;

impl InvariantSet for AllInvariants {
    #[cfg(not(keyward_breakable))]
    #[inline]
    fn enforces(&self, _: LeaseInvariant) -> bool {
        true
    }

    #[cfg(keyward_breakable)]
    fn enforces(&self, rule: LeaseInvariant) -> bool {
        DISABLED_INVARIANT.get() != Some(&rule)
    }
}

#[cfg(keyward_breakable)]
static DISABLED_INVARIANT: std::sync::OnceLock<LeaseInvariant> = std::sync::OnceLock::new();

/// Leaves a rule out from now on, for as long as the process runs. The first one told counts.
#[cfg(keyward_breakable)]
pub fn disable_invariant(rule: LeaseInvariant) {
    // Nobody tells it twice.
    let _ = DISABLED_INVARIANT.set(rule);
}
