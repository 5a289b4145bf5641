//! The connections of a replica, one for each purpose, and the notifications that arrive on one of them.
//!
//! They are separate from the pool, so that a slow listing of keys cannot delay a renewal.

use std::{
    sync::{Mutex, PoisonError},
    time::Duration,
};

use sqlx::postgres::PgListener;
use uuid::Uuid;

use crate::{
    domain::{lease::ReplicaId, time::Revision},
    store::{replica_registry::ReplicaNotification, row_format::revision_from_i64},
};

use super::{dedicated_connection::DedicatedConnection, target::PgTarget};

/// How long a listener may be silent before it is replaced: its connection may be dead.
pub(super) const LISTENER_TIMEOUT: Duration = Duration::from_secs(30);

/// How long to wait before listening again after a pooler was found.
pub(super) const POOLER_RETRY_INTERVAL: Duration = Duration::from_secs(60);

/// The connections of a replica, and what was learned on them.
pub(super) struct ReplicaConnections {
    /// A server by its [`SERVER_START_TIME`](super::server_identity::SERVER_START_TIME), and its system identifier.
    pub(super) server_identity: Mutex<Option<(i64, String)>>,
    pub(super) renewals: DedicatedConnection,
    pub(super) changes: DedicatedConnection,
    pub(super) registry: DedicatedConnection,
    pub(super) notifications: DedicatedConnection,
    pub(super) listener: tokio::sync::Mutex<Option<PgListener>>,
    /// The revision that this process is committing or has committed last. It receives a notification of that, too.
    own_commit: Mutex<Option<Revision>>,
}

impl ReplicaConnections {
    pub(super) fn new(target: &PgTarget) -> ReplicaConnections {
        let connection = || DedicatedConnection::new(target.options.clone());
        ReplicaConnections {
            server_identity: Mutex::default(),
            renewals: connection(),
            changes: connection(),
            registry: connection(),
            notifications: connection(),
            listener: tokio::sync::Mutex::default(),
            own_commit: Mutex::default(),
        }
    }

    /// Records that this process holds the lock on the head and commits this revision; `None`: the commit may have
    /// failed.
    pub(super) fn set_own_commit(&self, revision: Option<Revision>) {
        *self.own_commit.lock().unwrap_or_else(PoisonError::into_inner) = revision;
    }

    /// Parses a notification; `None` if it is unreadable.
    pub(super) fn parse_notification(
        &self,
        target: &PgTarget,
        channel: &str,
        payload: &str,
    ) -> Option<ReplicaNotification> {
        if channel != target.commit_channel() {
            return parse_acknowledgment(payload);
        }
        let upto = payload.parse().ok().map(revision_from_i64);
        let own = *self.own_commit.lock().unwrap_or_else(PoisonError::into_inner);
        Some(if upto.is_some() && upto == own {
            ReplicaNotification::OwnCommit
        } else {
            ReplicaNotification::Committed(upto)
        })
    }

    pub(super) async fn close(&self) {
        self.listener.lock().await.take();
        tokio::join!(
            self.renewals.close(),
            self.changes.close(),
            self.registry.close(),
            self.notifications.close()
        );
    }
}

/// The payload of a notification that a replica has acknowledged changes.
pub(super) fn encode_acknowledgment(id: ReplicaId, upto: Revision) -> String {
    format!("{} {}", id.0.simple(), upto.0)
}

fn parse_acknowledgment(payload: &str) -> Option<ReplicaNotification> {
    let (id, upto) = payload.split_once(' ')?;
    let replica = ReplicaId(Uuid::try_parse(id).ok()?);
    Some(ReplicaNotification::Acknowledged { replica, up_to: Revision(upto.parse().ok()?) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_told_of_an_acknowledgment_reads_back_and_nothing_else_does() {
        let (replica, upto) = (ReplicaId(Uuid::from_u128(7)), Revision(12));
        assert_eq!(
            parse_acknowledgment(&encode_acknowledgment(replica, upto)),
            Some(ReplicaNotification::Acknowledged { replica, up_to: upto })
        );
        for bad in ["", "12", "x 12", "00000000000000000000000000000007 -1"] {
            assert_eq!(parse_acknowledgment(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn what_this_process_commits_is_no_news_to_it() {
        let target = PgTarget::parse("postgres://u@db/keys").unwrap();
        let connections = ReplicaConnections::new(&target);
        let hint = |payload| connections.parse_notification(&target, target.commit_channel(), payload);
        assert_eq!(hint("7"), Some(ReplicaNotification::Committed(Some(Revision(7)))));
        connections.set_own_commit(Some(Revision(7)));
        assert_eq!(hint("7"), Some(ReplicaNotification::OwnCommit));
        assert_eq!(hint("8"), Some(ReplicaNotification::Committed(Some(Revision(8)))));
        assert_eq!(hint("?"), Some(ReplicaNotification::Committed(None)));
        connections.set_own_commit(None);
        assert_eq!(hint("7"), Some(ReplicaNotification::Committed(Some(Revision(7)))));
        assert_eq!(connections.parse_notification(&target, &target.ack_channel(), "?"), None);
    }
}
