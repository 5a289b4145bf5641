//! The connections of a replica, one for each purpose, and the notifications that arrive on one of them.
//!
//! A slow listing of keys must not delay a renewal, so nothing here is shared with the pool.

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

/// How long a listener may hear nothing before another takes its place: its connection may be dead.
pub(super) const LISTENER_TIMEOUT: Duration = Duration::from_secs(30);

/// How long nobody tries again to listen where a pooler stood in between.
pub(super) const POOLER_RETRY_INTERVAL: Duration = Duration::from_secs(60);

/// The lines of a replica.
pub(super) struct ReplicaConnections {
    /// A server, as [`SERVER_START_TIME`] tells, and its identity.
    pub(super) server_identity: Mutex<Option<(i64, String)>>,
    pub(super) renewals: DedicatedConnection,
    pub(super) changes: DedicatedConnection,
    pub(super) registry: DedicatedConnection,
    pub(super) notifications: DedicatedConnection,
    pub(super) listener: tokio::sync::Mutex<Option<PgListener>>,
    /// What this process commits, or has committed last: it is told of that too.
    own_commit: Mutex<Option<Revision>>,
}

impl ReplicaConnections {
    pub(super) fn new(place: &PgTarget) -> ReplicaConnections {
        let line = || DedicatedConnection::new(place.options.clone());
        ReplicaConnections {
            server_identity: Mutex::default(),
            renewals: line(),
            changes: line(),
            registry: line(),
            notifications: line(),
            listener: tokio::sync::Mutex::default(),
            own_commit: Mutex::default(),
        }
    }

    /// This process holds the lock on the head, and commits up to here; or it has found that it may not have.
    pub(super) fn set_own_commit(&self, upto: Option<Revision>) {
        *self.own_commit.lock().unwrap_or_else(PoisonError::into_inner) = upto;
    }

    /// What a notification says, unless it cannot be read and says nothing then.
    pub(super) fn parse_notification(
        &self,
        place: &PgTarget,
        channel: &str,
        payload: &str,
    ) -> Option<ReplicaNotification> {
        if channel != place.commit_channel() {
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

/// What a replica tells that has acknowledged changes.
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
        let place = PgTarget::parse("postgres://u@db/keys").unwrap();
        let lines = ReplicaConnections::new(&place);
        let hint = |payload| lines.parse_notification(&place, place.commit_channel(), payload);
        assert_eq!(hint("7"), Some(ReplicaNotification::Committed(Some(Revision(7)))));
        lines.set_own_commit(Some(Revision(7)));
        assert_eq!(hint("7"), Some(ReplicaNotification::OwnCommit));
        assert_eq!(hint("8"), Some(ReplicaNotification::Committed(Some(Revision(8)))));
        assert_eq!(hint("?"), Some(ReplicaNotification::Committed(None)));
        lines.set_own_commit(None);
        assert_eq!(hint("7"), Some(ReplicaNotification::Committed(Some(Revision(7)))));
        assert_eq!(lines.parse_notification(&place, &place.ack_channel(), "?"), None);
    }
}
