//! How many file descriptors the process may have, and so how many connections. A server that runs out can neither
//! accept nor open its database.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// What the database, files and the connections that are being turned away need.
const RESERVED_DESCRIPTORS: u64 = 256;
/// More connections than this are never needed, whatever the system allows.
const MAX_CONNECTIONS: u64 = 1 << 20;

/// The ports of plain HTTP: the admin pages, and what asks as nginx does.
const HTTP1_LISTENERS: u64 = 2;
/// How many connections each of them takes, where the system allows so many.
const MAX_HTTP1_CONNECTIONS: u64 = 1024;

/// How many connections a port of plain HTTP takes: a sixteenth of what the process could have, at most 1,024. Whoever
/// reaches one must not be able to take the descriptors of the rest.
#[must_use]
pub fn max_http1_connections() -> usize {
    usize::try_from(http1_share(getrlimit(Resource::Nofile).maximum.unwrap_or(u64::MAX)))
        .unwrap_or(usize::MAX)
}

fn http1_share(hard_limit: u64) -> u64 {
    (hard_limit / 16).clamp(1, MAX_HTTP1_CONNECTIONS)
}

/// Raises the soft limit as far as `wanted` connections need it and the hard limit allows. Gives how many connections
/// there may be; at least one.
#[must_use]
pub fn raise_for_connections(wanted: usize) -> usize {
    let reserve = RESERVED_DESCRIPTORS + HTTP1_LISTENERS * max_http1_connections() as u64;
    let needed = (wanted as u64).saturating_add(reserve);
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    let mut limit = current.unwrap_or(u64::MAX);
    let reachable = needed.min(maximum.unwrap_or(u64::MAX));
    if limit < reachable {
        match setrlimit(Resource::Nofile, Rlimit { current: Some(reachable), maximum }) {
            Ok(()) => limit = reachable,
            Err(error) => {
                let error = &error as &dyn std::error::Error;
                tracing::warn!(error, "the limit on file descriptors was not raised");
            }
        }
    }
    let room = connections_within(limit, reserve);
    if (room as u64) < wanted as u64 {
        tracing::warn!(
            limit,
            room,
            wanted,
            "fewer connections are taken than configured: raise the limit on file descriptors (ulimit -n)"
        );
    }
    room
}

/// The connections that fit under a limit beside what is reserved; of a low one, half.
fn connections_within(limit: u64, reserve: u64) -> usize {
    let room = limit.saturating_sub(reserve.min(limit / 2)).clamp(1, MAX_CONNECTIONS);
    usize::try_from(room).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn some_descriptors_are_always_left_for_the_rest() {
        assert_eq!(connections_within(1024, 256), 768);
        assert_eq!(connections_within(64, 256), 32);
        assert_eq!(connections_within(0, 256), 1);
        assert_eq!(connections_within(u64::MAX, 256), 1 << 20);
    }

    #[test]
    fn the_ports_of_plain_http_never_take_all_that_is_left() {
        for hard in [64, 1024, 4096, 20_000, 1 << 20] {
            let taken = HTTP1_LISTENERS * http1_share(hard);
            assert!(connections_within(hard, RESERVED_DESCRIPTORS + taken) as u64 + taken < hard, "{hard}");
        }
        assert_eq!(http1_share(u64::MAX), 1024);
    }
}
