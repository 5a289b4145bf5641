//! Remembers which servers have answered.
//!
//! Behind a pooler, or while DNS changes, the next transaction may reach another server than the last, such as a
//! replaced primary: it answers reads but cannot commit. So a commit proves only that reads from the same server were
//! current.

use std::sync::{Mutex, PoisonError};

use tokio::time::Instant;

/// The SQL expression that identifies a server: its start time in microseconds. No two servers of one database, and no
/// two runs of one, have started at the same one.
pub(super) const SERVER_START_TIME: &str =
    "(extract(epoch FROM pg_postmaster_start_time()) * 1000000)::bigint";

/// The arguments for an unknown server.
pub(super) const UNKNOWN_SERVER: &str = "NULL, NULL";

/// How many servers are remembered; the most recent ones.
const MAX_SEEN_SERVERS: usize = 16;

/// The servers that have answered, with the time of their last answer.
#[derive(Debug, Default)]
pub(super) struct SeenServers(Mutex<Vec<(i64, Instant)>>);

impl SeenServers {
    /// Records an answer of this server at `now`.
    pub(super) fn record(&self, server: i64, now: Instant) {
        let mut seen = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        seen.retain(|(known, _)| *known != server);
        seen.push((server, now));
        if seen.len() > MAX_SEEN_SERVERS {
            seen.remove(0);
        }
    }

    /// Whether at most one server has answered since then.
    pub(super) fn is_single_since(&self, since: Instant) -> bool {
        let seen = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        seen.iter().filter(|(_, at)| *at >= since).count() <= 1
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn two_servers_show_for_as_long_as_both_have_answered_since() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let servers = SeenServers::default();
        assert!(servers.is_single_since(start));
        servers.record(1, at(1));
        servers.record(1, at(2));
        assert!(servers.is_single_since(start));
        servers.record(2, at(3));
        assert!(!servers.is_single_since(at(2)));
        assert!(servers.is_single_since(at(3)), "the first has not answered since");
        servers.record(1, at(4));
        assert!(!servers.is_single_since(at(3)));
    }

    #[test]
    fn many_servers_leave_the_last_remembered() {
        let start = Instant::now();
        let servers = SeenServers::default();
        for server in 0..100 {
            servers.record(server, start + Duration::from_secs(server.unsigned_abs()));
        }
        assert!(servers.is_single_since(start + Duration::from_secs(99)));
        assert!(!servers.is_single_since(start + Duration::from_secs(98)));
    }
}
