//! What listeners count, for the metrics. Everything is counted once a connection, never once a call.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use super::tls::Tls;

/// Why a connection was not served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refused {
    /// There were as many already as there may be.
    Full,
    /// TLS was not agreed on: no TLS, an old version, no certificate that is trusted here.
    Tls,
    /// It did not say in time what it wants.
    Timeout,
    /// It speaks something else.
    Protocol,
    /// It could not be accepted, mostly for want of a file descriptor; it waits, and each further try counts.
    Failed,
}

impl Refused {
    /// Every reason.
    pub const ALL: [Refused; 5] =
        [Refused::Full, Refused::Tls, Refused::Timeout, Refused::Protocol, Refused::Failed];

    /// Its name in metrics.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Refused::Full => "full",
            Refused::Tls => "tls",
            Refused::Timeout => "timeout",
            Refused::Protocol => "protocol",
            Refused::Failed => "failed",
        }
    }
}

/// The counts of one listener.
#[derive(Debug, Default)]
pub struct Counts {
    connections: AtomicU64,
    refused: [AtomicU64; Refused::ALL.len()],
}

impl Counts {
    /// Counts a connection for as long as the guard lives.
    #[must_use]
    pub fn connected(self: &Arc<Self>) -> Connected {
        self.connections.fetch_add(1, Ordering::Relaxed);
        Connected(self.clone())
    }

    /// Counts a connection that was not served.
    pub fn refuse(&self, why: Refused) {
        self.refused[why as usize].fetch_add(1, Ordering::Relaxed);
    }
}

/// A connection that is counted.
#[derive(Debug)]
pub struct Connected(Arc<Counts>);

impl Drop for Connected {
    fn drop(&mut self) {
        self.0.connections.fetch_sub(1, Ordering::Relaxed);
    }
}

/// What one listener has to tell.
#[derive(Debug)]
pub struct Told {
    /// The listener's name.
    pub listener: String,
    /// Connections that are open now.
    pub connections: u64,
    /// Connections that were not served, by reason.
    pub refused: [(&'static str, u64); Refused::ALL.len()],
    /// Until when its certificate is valid, in seconds since 1970; None = no TLS.
    pub certificate_expiry: Option<i64>,
}

/// The counts of every listener, and of the calls that were turned away.
#[derive(Default)]
pub struct Report {
    listeners: Vec<(String, Arc<Counts>, Option<Arc<Tls>>)>,
    shed: Vec<Box<dyn Fn() -> u64 + Send + Sync>>,
}

impl std::fmt::Debug for Report {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Report").field("listeners", &self.listeners).finish_non_exhaustive()
    }
}

impl Report {
    /// Takes in a listener.
    pub fn add(&mut self, name: &str, counts: Arc<Counts>, tls: Option<Arc<Tls>>) {
        self.listeners.push((name.to_owned(), counts, tls));
    }

    /// Takes in somebody who turns calls away, and tells how many.
    pub fn add_shed(&mut self, shed: impl Fn() -> u64 + Send + Sync + 'static) {
        self.shed.push(Box::new(shed));
    }

    /// Calls that were turned away since the start: more was under way than the server takes.
    #[must_use]
    pub fn shed(&self) -> u64 {
        self.shed.iter().map(|shed| shed()).sum()
    }

    /// What each listener has to tell now.
    pub fn tell(&self) -> impl Iterator<Item = Told> {
        self.listeners.iter().map(|(name, counts, tls)| Told {
            listener: name.clone(),
            connections: counts.connections.load(Ordering::Relaxed),
            refused: Refused::ALL
                .map(|why| (why.as_str(), counts.refused[why as usize].load(Ordering::Relaxed))),
            certificate_expiry: tls.as_ref().map(|tls| tls.expires()),
        })
    }
}
