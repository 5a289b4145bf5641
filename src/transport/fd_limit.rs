//! Raises the limit on file descriptors and derives the limit on connections from it. A server that runs out of
//! descriptors can neither accept connections nor open its database.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Descriptors reserved for the database, files and connections that are being refused.
const RESERVED_DESCRIPTORS: u64 = 256;
/// Upper bound of the connection limit, whatever the operating system allows.
const MAX_CONNECTIONS: u64 = 1 << 20;

/// The number of HTTP/1.1 ports: the admin pages and the gateway's HTTP endpoint.
const HTTP1_LISTENERS: u64 = 2;
/// Connections of each HTTP/1.1 port, if the operating system allows as many.
const MAX_HTTP1_CONNECTIONS: u64 = 1024;

/// The connection limit of an HTTP/1.1 port: 1/16 of what the process could have, at most 1,024. A flood on one port
/// must not exhaust the descriptors of the others.
#[must_use]
pub(crate) fn max_http1_connections() -> usize {
    usize::try_from(http1_share(getrlimit(Resource::Nofile).maximum.unwrap_or(u64::MAX)))
        .unwrap_or(usize::MAX)
}

fn http1_share(hard_limit: u64) -> u64 {
    (hard_limit / 16).clamp(1, MAX_HTTP1_CONNECTIONS)
}

/// Raises the soft limit for `wanted` connections, up to the hard limit. Returns the resulting number of connections,
/// at least one.
#[must_use]
pub(crate) fn raise_for_connections(wanted: usize) -> usize {
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
                tracing::warn!(error, "limit on file descriptors not raised");
            }
        }
    }
    let room = connections_within(limit, reserve);
    if (room as u64) < wanted as u64 {
        tracing::warn!(
            limit,
            room,
            wanted,
            "connection limit lowered: too few file descriptors; raise ulimit -n"
        );
    }
    room
}

/// The connections that fit under a limit after the reserve; half of a low limit.
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
