//! Counts connections of listeners, for the metrics. Counting is per connection, never per call.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use super::tls::ListenerTls;

/// Why a connection was not served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ConnectionRefusal {
    /// The connection limit was reached.
    LimitReached,
    /// The TLS handshake failed: no TLS, an old version, or an untrusted certificate.
    TlsHandshake,
    /// The first bytes did not arrive in time.
    HandshakeTimeout,
    /// The peer speaks another protocol.
    Protocol,
    /// Accepting failed, mostly for lack of a file descriptor. The connection waits, and each further attempt counts.
    AcceptFailed,
}

impl ConnectionRefusal {
    pub(crate) const ALL: [ConnectionRefusal; 5] = [
        ConnectionRefusal::LimitReached,
        ConnectionRefusal::TlsHandshake,
        ConnectionRefusal::HandshakeTimeout,
        ConnectionRefusal::Protocol,
        ConnectionRefusal::AcceptFailed,
    ];

    #[must_use]
    pub(crate) const fn as_str(self) -> &'static str {
        match self {
            ConnectionRefusal::LimitReached => "full",
            ConnectionRefusal::TlsHandshake => "tls",
            ConnectionRefusal::HandshakeTimeout => "timeout",
            ConnectionRefusal::Protocol => "protocol",
            ConnectionRefusal::AcceptFailed => "failed",
        }
    }
}

/// The counters of one listener.
#[derive(Debug, Default)]
pub struct ListenerCounters {
    open_connections: AtomicU64,
    refused_connections: [AtomicU64; ConnectionRefusal::ALL.len()],
}

impl ListenerCounters {
    /// Counts a connection for as long as the guard lives.
    #[must_use]
    pub(crate) fn track_connection(self: &Arc<Self>) -> OpenConnectionGuard {
        self.open_connections.fetch_add(1, Ordering::Relaxed);
        OpenConnectionGuard(self.clone())
    }

    /// Counts a connection that was not served.
    pub(crate) fn count_refusal(&self, why: ConnectionRefusal) {
        self.refused_connections[why as usize].fetch_add(1, Ordering::Relaxed);
    }
}

/// Guard that counts an open connection until it is dropped.
#[derive(Debug)]
pub(crate) struct OpenConnectionGuard(Arc<ListenerCounters>);

impl Drop for OpenConnectionGuard {
    fn drop(&mut self) {
        self.0.open_connections.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A snapshot of one listener's metrics.
#[derive(Debug)]
pub(crate) struct ListenerSnapshot {
    pub(crate) listener: String,
    /// Connections that are open at present.
    pub(crate) connections: u64,
    /// Connections that were not served, by reason.
    pub(crate) refused: [(&'static str, u64); ConnectionRefusal::ALL.len()],
    /// When its certificate expires, in seconds since 1970; None = no TLS.
    pub(crate) certificate_expiry: Option<i64>,
}

/// The counters of every listener, and of calls that were shed.
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
    pub(crate) fn add_listener(
        &mut self,
        name: &str,
        counts: Arc<ListenerCounters>,
        tls: Option<Arc<ListenerTls>>,
    ) {
        self.listeners.push((name.to_owned(), counts, tls));
    }

    /// Registers a source of the number of calls that were shed.
    pub(crate) fn add_shed_counter(&mut self, shed: impl Fn() -> u64 + Send + Sync + 'static) {
        self.shed_counters.push(Box::new(shed));
    }

    /// Calls that were shed since the start because the server was overloaded.
    #[must_use]
    pub(crate) fn shed_calls(&self) -> u64 {
        self.shed_counters.iter().map(|shed| shed()).sum()
    }

    /// A snapshot of each listener's metrics.
    pub(crate) fn snapshots(&self) -> impl Iterator<Item = ListenerSnapshot> {
        self.listeners.iter().map(|(name, counts, tls)| ListenerSnapshot {
            listener: name.clone(),
            connections: counts.open_connections.load(Ordering::Relaxed),
            refused: ConnectionRefusal::ALL
                .map(|why| (why.as_str(), counts.refused_connections[why as usize].load(Ordering::Relaxed))),
            certificate_expiry: tls.as_ref().map(|tls| tls.certificate_expiry()),
        })
    }
}
