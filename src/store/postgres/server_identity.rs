//! Which servers have answered. Behind a pooler, or while names change, the next transaction may reach another server
//! than the last: a primary that was replaced, which answers reads and commits nothing. So a commit says that what was
//! read before it was the newest only of reads on the same server.

use std::sync::{Mutex, PoisonError};

use tokio::time::Instant;

/// What a server answers with when it is asked which it is: when it was started, in microseconds. No two servers of one
/// database, and no two lives of one, have been started in the same one.
pub(super) const SERVER_START_TIME: &str =
    "(extract(epoch FROM pg_postmaster_start_time()) * 1000000)::bigint";

/// No server that is known.
pub(super) const UNKNOWN_SERVER: &str = "NULL, NULL";

/// How many servers are remembered; those that were heard last.
const MAX_SEEN_SERVERS: usize = 16;

/// Which servers have answered, and when they did last.
#[derive(Debug, Default)]
pub(super) struct SeenServers(Mutex<Vec<(i64, Instant)>>);

impl SeenServers {
    /// This server has answered at `now`.
    pub(super) fn record(&self, server: i64, now: Instant) {
        let mut seen = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        seen.retain(|(known, _)| *known != server);
        seen.push((server, now));
        if seen.len() > MAX_SEEN_SERVERS {
            seen.remove(0);
        }
    }

    /// Whether no two servers have answered since then.
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
        let begun = Instant::now();
        let at = |seconds| begun + Duration::from_secs(seconds);
        let sources = SeenServers::default();
        assert!(sources.is_single_since(begun));
        sources.record(1, at(1));
        sources.record(1, at(2));
        assert!(sources.is_single_since(begun));
        sources.record(2, at(3));
        assert!(!sources.is_single_since(at(2)));
        assert!(sources.is_single_since(at(3)), "the first has not answered since");
        sources.record(1, at(4));
        assert!(!sources.is_single_since(at(3)));
    }

    #[test]
    fn many_servers_leave_the_last_remembered() {
        let begun = Instant::now();
        let sources = SeenServers::default();
        for server in 0..100 {
            sources.record(server, begun + Duration::from_secs(server.unsigned_abs()));
        }
        assert!(sources.is_single_since(begun + Duration::from_secs(99)));
        assert!(!sources.is_single_since(begun + Duration::from_secs(98)));
    }
}
