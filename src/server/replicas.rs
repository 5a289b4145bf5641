//! Sets up replication for a server, and lets an operator inspect and repair the replicas of a database.
//!
//! A server is either the only owner of its database file, or one of several replicas. The protocol of a replica is in
//! `replication`.

use std::{sync::Arc, time::Duration};

use anyhow::{Context as _, bail};
use tokio::sync::watch;
use uuid::Uuid;

use crate::{
    clock::{Clock, EntropySource},
    config::{
        replicas::{default_replica_name, format_lease},
        server::ServerSettings,
    },
    domain::{
        lease::{LeaseDuration, ReplicaId, ReplicaRow},
        time::{Revision, Timestamp},
    },
    engine::{index::Index, serving_lease::ServingLease},
    replication::{
        freshness::FreshnessBarrier,
        log_applier::LogApplier,
        propagation::PropagationWaiter,
        replica_task::{self, ReplicaStatus, RunningReplica},
    },
    store::{self, Store, StoreError, replica_registry::ReplicaRegistry},
};

/// The parts of replication that the other parts of a server use.
#[derive(Clone, Debug)]
pub struct ReplicationRuntime {
    /// Applies log entries to the index.
    pub(crate) log_applier: Arc<LogApplier>,
    /// The lease under which Checks are answered.
    pub(crate) lease: Arc<ServingLease>,
    /// Waits until a change is in force on every replica.
    pub(crate) propagation: PropagationWaiter,
    /// Catches up with commits of other replicas.
    pub(crate) freshness: FreshnessBarrier,
    /// The state of this replica, for metrics and health.
    pub(crate) replica_status: Arc<ReplicaStatus>,
}

impl ReplicationRuntime {
    /// Creates the runtime of a server on this store, and loads nothing. Its readers run on the current runtime.
    #[must_use]
    pub fn new(store: &Arc<dyn Store>, index: Arc<Index>, clock: Arc<dyn Clock>) -> ReplicationRuntime {
        let log_applier = Arc::new(LogApplier::new(index));
        let replica_status = Arc::new(ReplicaStatus::default());
        let Some(registry) = store.clone().replica_registry() else {
            let propagation = PropagationWaiter::for_single_process(clock);
            let lease = Arc::new(ServingLease::for_sole_owner());
            return ReplicationRuntime {
                log_applier,
                lease,
                propagation,
                freshness: FreshnessBarrier::for_single_process(),
                replica_status,
            };
        };
        let freshness =
            FreshnessBarrier::for_replicas(registry.clone(), log_applier.clone(), replica_status.clone());
        let propagation =
            PropagationWaiter::for_replicas(registry, log_applier.clone(), replica_status.clone(), clock);
        ReplicationRuntime {
            log_applier,
            lease: Arc::new(ServingLease::expired()),
            propagation,
            freshness,
            replica_status,
        }
    }

    /// Starts the replica if the database supports several.
    ///
    /// Fails if the database cannot return its lease settings.
    pub(super) async fn start_replica(
        &self,
        store: &Arc<dyn Store>,
        settings: &ServerSettings,
        port: u16,
        clock: Arc<dyn Clock>,
        entropy: Arc<dyn EntropySource>,
    ) -> Result<Option<RunningReplica>, StoreError> {
        let Some(registry) = store.clone().replica_registry() else {
            if settings.lease.is_some() {
                tracing::warn!(
                    "the setting lease is ignored: an SQLite file has one owner and needs no lease"
                );
            }
            return Ok(None);
        };
        let config = registry.lease_config().await?;
        let lease = config.lease;
        if let Some(configured) = settings.lease.filter(|configured| *configured != lease) {
            tracing::warn!(
                asked = format_lease(configured),
                database = format_lease(lease),
                "the database has a different lease, which applies; change it with 'keyward replicas lease'"
            );
        }
        let name = settings.replica_name.clone().unwrap_or_else(|| default_replica_name(port));
        tracing::info!(replica = name, lease = format_lease(lease), "joining the replicas");
        let parts = replica_task::ReplicaDependencies {
            store: store.clone(),
            registry,
            log_applier: self.log_applier.clone(),
            lease: self.lease.clone(),
            status: self.replica_status.clone(),
            clock,
            entropy,
            name,
            retention: settings.retention,
        };
        Ok(Some(replica_task::start_replica(parts, config)))
    }
}

/// Sets the lease of an empty database to the configured one.
pub(super) async fn set_initial_lease(
    store: &Arc<dyn Store>,
    settings: &ServerSettings,
) -> Result<(), StoreError> {
    match (store.clone().replica_registry(), settings.lease) {
        (Some(registry), Some(lease)) => registry.initialize_lease(lease).await.map(drop),
        _ => Ok(()),
    }
}

/// Waits until the replica fails for good; forever without a replica.
pub(super) async fn wait_for_replica_failure(failed: Option<watch::Receiver<bool>>) {
    if let Some(mut failed) = failed
        && failed.wait_for(|failed| *failed).await.is_ok()
    {
        return;
    }
    // The replica was stopped.
    std::future::pending().await
}

/// A replica's row, for display.
#[derive(Clone, Debug)]
pub(crate) struct ReplicaInfo {
    pub(crate) name: String,
    /// Id of the row; new after each start.
    pub(crate) id: Uuid,
    /// The newest change that the replica has acknowledged; `None` while it starts without a lease.
    pub(crate) acknowledged_revision: Option<Revision>,
    /// Its last renewal, by the database's clock.
    pub(crate) last_seen: Timestamp,
    /// Time since that renewal, by the same clock.
    pub(crate) since_last_renewal: Duration,
}

/// The replicas of a database and their leases.
#[derive(Clone, Debug)]
pub(crate) struct ClusterStatus {
    /// The replicas, ordered by name.
    pub(crate) replicas: Vec<ReplicaInfo>,
    /// Revision of the newest change.
    pub(crate) head: Revision,
    /// The lease that renewals grant, and the longest lease that a replica may still hold.
    pub(crate) leases: (LeaseDuration, LeaseDuration),
    /// No replica can hold a lease whose row the database has lost: the list is complete.
    pub(crate) is_complete: bool,
    /// Whether a commit waits for a synchronous standby.
    pub(crate) sync_replicated: bool,
}

/// Access to the replicas of a database without a running server.
pub(crate) struct ReplicaAdmin {
    store: Arc<dyn Store>,
    registry: Arc<dyn ReplicaRegistry>,
}

impl std::fmt::Debug for ReplicaAdmin {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ReplicaAdmin")
    }
}

impl ReplicaAdmin {
    ///
    /// Fails if the database does not open, or has no replicas.
    pub(crate) async fn open(settings: &ServerSettings) -> anyhow::Result<ReplicaAdmin> {
        if settings.database.starts_with("sqlite:") {
            bail!("an SQLite file has one owner and no replicas; name a postgres:// URL with --database");
        }
        let store = store::open(&settings.database).await?;
        let registry = store.clone().replica_registry().context("the database has no replicas")?;
        Ok(ReplicaAdmin { store, registry })
    }

    /// Closes the database.
    pub(crate) async fn close(self) {
        self.store.close().await;
    }

    /// Returns the replicas and their leases.
    pub(crate) async fn cluster_status(&self) -> anyhow::Result<ClusterStatus> {
        let config = self.registry.lease_config().await?;
        let snapshot = self.registry.list_replicas(&[]).await?;
        let db_now = snapshot.listing.database_time;
        let listed = |row: &ReplicaRow| ReplicaInfo {
            name: snapshot.names.get(&row.id).cloned().unwrap_or_default(),
            id: row.id.0,
            acknowledged_revision: row.applied,
            last_seen: row.last_seen,
            since_last_renewal: db_now.saturating_duration_since(row.last_seen),
        };
        let mut replicas: Vec<_> = snapshot.listing.rows.iter().map(listed).collect();
        replicas.sort_by(|one, other| (&one.name, one.id).cmp(&(&other.name, other.id)));
        Ok(ClusterStatus {
            replicas,
            head: snapshot.head,
            leases: (config.lease, config.longest_lease),
            is_complete: snapshot.listing.is_complete(),
            sync_replicated: snapshot.sync_replicated,
        })
    }

    /// Removes the row of a replica that an operator has seen to be gone, by name or id. Returns the row.
    ///
    /// Fails if there is no such replica, the name is ambiguous, or the database fails.
    pub(crate) async fn attest_dead(&self, named: &str) -> anyhow::Result<ReplicaInfo> {
        let replicas = self.cluster_status().await?.replicas;
        let mut found = replicas.into_iter().filter(|row| row.name == named || row.id.to_string() == named);
        let Some(replica) = found.next() else {
            bail!("there is no replica {named:?}; 'keyward replicas list' shows the existing ones");
        };
        if found.next().is_some() {
            bail!("several replicas are called {named:?}; use the id that 'keyward replicas list' shows");
        }
        if !self.registry.deregister(ReplicaId(replica.id), None).await? {
            bail!("the replica has deregistered meanwhile");
        }
        Ok(replica)
    }

    /// Accepts that the database has lost changes. Returns the new epoch.
    pub(crate) async fn accept_regression(&self) -> anyhow::Result<u64> {
        Ok(self.registry.accept_regression().await?)
    }

    /// Changes the lease, and returns when no replica holds a longer one.
    ///
    /// Fails if the database fails, or another lease was set meanwhile.
    pub(crate) async fn set_lease(&self, lease: LeaseDuration) -> anyhow::Result<()> {
        let before = self.registry.lease_config().await?.longest_lease;
        self.registry.set_lease(lease).await?;
        // Read the rows after the change: later replicas get the new lease.
        let rows = self.registry.list_replicas(&[]).await?.listing.rows;
        let shorter = before.length().is_none_or(|before| lease.length().is_some_and(|new| new < before));
        if shorter && before != lease {
            match before.expiry_wait() {
                Some(wait) => tokio::time::sleep(wait).await,
                None => self.wait_until_renewed(&rows).await?,
            }
        }
        if !self.registry.finish_lease_change(lease).await? {
            bail!("another lease was set meanwhile; check 'keyward replicas list', and set it again");
        }
        Ok(())
    }

    /// Waits until each of these rows has renewed or is gone.
    async fn wait_until_renewed(&self, rows: &[ReplicaRow]) -> anyhow::Result<()> {
        const POLL_INTERVAL: Duration = Duration::from_millis(500);
        loop {
            let now = self.registry.list_replicas(&[]).await?.listing.rows;
            let same = |row: &&ReplicaRow| {
                now.iter().any(|new| new.id == row.id && new.renew_seq <= row.renew_seq + 1)
            };
            if !rows.iter().any(|row| same(&row)) {
                return Ok(());
            }
            tokio::time::sleep(POLL_INTERVAL).await;
        }
    }
}
