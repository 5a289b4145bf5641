//! How many file descriptors the process may have, and so how many connections. A server that runs out can neither
//! accept nor open its database.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// What the database, files and the connections that are being turned away need.
const RESERVE: u64 = 256;
/// More connections than this are never needed, whatever the system allows.
const MOST: u64 = 1 << 20;

/// Raises the soft limit as far as `wanted` connections need it and the hard limit allows. Gives how many connections
/// there may be; at least one.
#[must_use]
pub fn room_for(wanted: usize) -> usize {
    let needed = (wanted as u64).saturating_add(RESERVE);
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
    let room = within(limit);
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

/// The connections that fit under a limit; of a low one, half.
fn within(limit: u64) -> usize {
    let room = limit.saturating_sub(RESERVE.min(limit / 2)).clamp(1, MOST);
    usize::try_from(room).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn some_descriptors_are_always_left_for_the_rest() {
        assert_eq!(within(1024), 768);
        assert_eq!(within(64), 32);
        assert_eq!(within(0), 1);
        assert_eq!(within(u64::MAX), 1 << 20);
    }
}
