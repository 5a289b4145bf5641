//! The invariants that the guarantee of the lease protocol depends on. Each looks as if it could be left out.
//!
//! The simulator disables one invariant at a time to prove that it would detect the violation. The server uses
//! [`AllInvariants`], which is resolved at compile time and cannot disable any.
//!
//! One build that serves nothing is the exception: with `--cfg keyward_breakable` (`make torture-mutants`), a process
//! can disable one invariant at start. It proves that the torture of real processes detects the violation.

/// An invariant, and the failure that it prevents.
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
    /// A lease counts from before its renewal was sent. Otherwise the lease ends too late by the time of the response.
    LeaseCountsFromSending,
    /// A renewal's changes are in the map before its lease is. Without: the new lease covers the old map.
    MapBeforeDeadline,
    /// A Check reads the deadline before it looks the key up. Without: it holds an old record against a new
    /// lease.
    DeadlineBeforeLookUp,
    /// A replica registers before it takes its snapshot, and allows after it has renewed. Without: a revoker
    /// that lists the replicas between the two does not see it.
    RegisterBeforeSnapshot,
    /// A change is in the map before it is acknowledged. Otherwise a revoker returns too early.
    ApplyBeforeAck,
    /// A row is removed after having been watched by one clock. Without: a step of a wall clock removes the
    /// living.
    DeadAreWatched,
    /// A replica's row has a committed `applied` before a renewal may grant a lease. Otherwise a revoker that lists the
    /// replicas during the first renewal's commit does not wait for the replica.
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

/// Selects the invariants that the state machines enforce.
pub trait InvariantSet {
    /// Whether this invariant is enforced.
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

/// Disables an invariant for the rest of the process. Only the first call has an effect.
#[cfg(keyward_breakable)]
pub fn disable_invariant(rule: LeaseInvariant) {
    // The process calls this once.
    let _ = DISABLED_INVARIANT.set(rule);
}
