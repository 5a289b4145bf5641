//! What listeners count, for the metrics. Everything is counted once a connection, never once a call.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use super::tls::ListenerTls;

/// Why a connection was not served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ConnectionRefusal {
    /// There were as many already as there may be.
    LimitReached,
    /// TLS was not agreed on: no TLS, an old version, no certificate that is trusted here.
    TlsHandshake,
    /// It did not say in time what it wants.
    HandshakeTimeout,
    /// It speaks something else.
    Protocol,
    /// It could not be accepted, mostly for want of a file descriptor; it waits, and each further try counts.
    AcceptFailed,
}

impl ConnectionRefusal {
    /// Every reason.
    pub const ALL: [ConnectionRefusal; 5] = [
        ConnectionRefusal::LimitReached,
        ConnectionRefusal::TlsHandshake,
        ConnectionRefusal::HandshakeTimeout,
        ConnectionRefusal::Protocol,
        ConnectionRefusal::AcceptFailed,
    ];

    /// Its name in metrics.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            ConnectionRefusal::LimitReached => "full",
            ConnectionRefusal::TlsHandshake => "tls",
            ConnectionRefusal::HandshakeTimeout => "timeout",
            ConnectionRefusal::Protocol => "protocol",
            ConnectionRefusal::AcceptFailed => "failed",
        }
    }
}

/// The counts of one listener.
#[derive(Debug, Default)]
pub struct ListenerCounters {
    open_connections: AtomicU64,
    refused_connections: [AtomicU64; ConnectionRefusal::ALL.len()],
}

impl ListenerCounters {
    /// Counts a connection for as long as the guard lives.
    #[must_use]
    pub fn track_connection(self: &Arc<Self>) -> OpenConnectionGuard {
        self.open_connections.fetch_add(1, Ordering::Relaxed);
        OpenConnectionGuard(self.clone())
    }

    /// Counts a connection that was not served.
    pub fn count_refusal(&self, why: ConnectionRefusal) {
        self.refused_connections[why as usize].fetch_add(1, Ordering::Relaxed);
    }
}

/// A connection that is counted.
#[derive(Debug)]
pub struct OpenConnectionGuard(Arc<ListenerCounters>);

impl Drop for OpenConnectionGuard {
    fn drop(&mut self) {
        self.0.open_connections.fetch_sub(1, Ordering::Relaxed);
    }
}

/// What one listener has to tell.
#[derive(Debug)]
pub struct ListenerSnapshot {
    /// The listener's name.
    pub listener: String,
    /// Connections that are open now.
    pub connections: u64,
    /// Connections that were not served, by reason.
    pub refused: [(&'static str, u64); ConnectionRefusal::ALL.len()],
    /// Until when its certificate is valid, in seconds since 1970; None = no TLS.
    pub certificate_expiry: Option<i64>,
}

/// The counts of every listener, and of the calls that were turned away.
#[derive(Default)]
pub struct ListenerMetrics {
    listeners: Vec<(String, Arc<ListenerCounters>, Option<Arc<ListenerTls>>)>,
    shed_counters: Vec<Box<dyn Fn() -> u64 + Send + Sync>>,
}

impl std::fmt::Debug for ListenerMetrics {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ListenerMetrics").field("listeners", &self.listeners).finish_non_exhaustive()
    }
}

impl ListenerMetrics {
    /// Takes in a listener.
    pub fn add_listener(&mut self, name: &str, counts: Arc<ListenerCounters>, tls: Option<Arc<ListenerTls>>) {
        self.listeners.push((name.to_owned(), counts, tls));
    }

    /// Takes in somebody who turns calls away, and tells how many.
    pub fn add_shed_counter(&mut self, shed: impl Fn() -> u64 + Send + Sync + 'static) {
        self.shed_counters.push(Box::new(shed));
    }

    /// Calls that were turned away since the start: more was under way than the server takes.
    #[must_use]
    pub fn shed_calls(&self) -> u64 {
        self.shed_counters.iter().map(|shed| shed()).sum()
    }

    /// What each listener has to tell now.
    pub fn snapshots(&self) -> impl Iterator<Item = ListenerSnapshot> {
        self.listeners.iter().map(|(name, counts, tls)| ListenerSnapshot {
            listener: name.clone(),
            connections: counts.open_connections.load(Ordering::Relaxed),
            refused: ConnectionRefusal::ALL
                .map(|why| (why.as_str(), counts.refused_connections[why as usize].load(Ordering::Relaxed))),
            certificate_expiry: tls.as_ref().map(|tls| tls.certificate_expiry()),
        })
    }
}
