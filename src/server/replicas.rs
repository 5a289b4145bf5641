//! What a server is to its database: the one owner of a file, or a replica among others; and what an operator with
//! the database at hand can do about the others.

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
        lease::{LeaseDuration as Term, ReplicaId, ReplicaRow},
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

/// What the parts of a server need to know of other replicas.
#[derive(Clone, Debug)]
pub struct ReplicationRuntime {
    /// The way into the index.
    pub(crate) log_applier: Arc<LogApplier>,
    /// The lease that Checks are answered under.
    pub(crate) lease: Arc<ServingLease>,
    /// Waits until a change is in force everywhere.
    pub(crate) propagation: PropagationWaiter,
    /// Hears what others have committed.
    pub(crate) freshness: FreshnessBarrier,
    /// What is to be seen of this replica.
    pub(crate) replica_status: Arc<ReplicaStatus>,
}

impl ReplicationRuntime {
    /// Of a server on this store; nothing is loaded yet. Readings run on the current runtime.
    #[must_use]
    pub fn new(store: &Arc<dyn Store>, index: Arc<Index>, clock: Arc<dyn Clock>) -> ReplicationRuntime {
        let follow = Arc::new(LogApplier::new(index));
        let sight = Arc::new(ReplicaStatus::default());
        let Some(fleet) = store.clone().replica_registry() else {
            let propagation = PropagationWaiter::for_single_process(clock);
            let lease = Arc::new(ServingLease::for_sole_owner());
            return ReplicationRuntime {
                log_applier: follow,
                lease,
                propagation,
                freshness: FreshnessBarrier::for_single_process(),
                replica_status: sight,
            };
        };
        let news = FreshnessBarrier::for_replicas(fleet.clone(), follow.clone(), sight.clone());
        let propagation = PropagationWaiter::for_replicas(fleet, follow.clone(), sight.clone(), clock);
        ReplicationRuntime {
            log_applier: follow,
            lease: Arc::new(ServingLease::expired()),
            propagation,
            freshness: news,
            replica_status: sight,
        }
    }

    /// Starts the replica, where there are others.
    ///
    /// # Errors
    /// When the database does not say what its lease is.
    pub(super) async fn start_replica(
        &self,
        store: &Arc<dyn Store>,
        settings: &ServerSettings,
        port: u16,
        clock: Arc<dyn Clock>,
        entropy: Arc<dyn EntropySource>,
    ) -> Result<Option<RunningReplica>, StoreError> {
        let Some(fleet) = store.clone().replica_registry() else {
            if settings.lease.is_some() {
                tracing::warn!("an SQLite file has one owner and needs no lease: the setting is not used");
            }
            return Ok(None);
        };
        let terms = fleet.lease_config().await?;
        let lease = terms.lease;
        if let Some(asked) = settings.lease.filter(|asked| *asked != lease) {
            tracing::warn!(
                asked = format_lease(asked),
                database = format_lease(lease),
                "the database has another lease, which holds; change it with 'keyward replicas lease'"
            );
        }
        let name = settings.replica_name.clone().unwrap_or_else(|| default_replica_name(port));
        tracing::info!(replica = name, lease = format_lease(lease), "joining");
        let parts = replica_task::ReplicaDependencies {
            store: store.clone(),
            registry: fleet,
            log_applier: self.log_applier.clone(),
            lease: self.lease.clone(),
            status: self.replica_status.clone(),
            clock,
            entropy,
            name,
            retention: settings.retention,
        };
        Ok(Some(replica_task::start_replica(parts, terms)))
    }
}

/// Gives a database that holds nothing yet the lease that the settings name.
pub(super) async fn set_initial_lease(
    store: &Arc<dyn Store>,
    settings: &ServerSettings,
) -> Result<(), StoreError> {
    match (store.clone().replica_registry(), settings.lease) {
        (Some(fleet), Some(lease)) => fleet.initialize_lease(lease).await.map(drop),
        _ => Ok(()),
    }
}

/// Waits until a replica has given up for good; never, where there is none.
pub(super) async fn wait_for_replica_failure(failed: Option<watch::Receiver<bool>>) {
    if let Some(mut failed) = failed
        && failed.wait_for(|failed| *failed).await.is_ok()
    {
        return;
    }
    // The sender goes with the replica, at the stop.
    std::future::pending().await
}

/// A replica's row, for people.
#[derive(Clone, Debug)]
pub(crate) struct ReplicaInfo {
    /// What it is called.
    pub(crate) name: String,
    /// Its row; another one after each start.
    pub(crate) id: Uuid,
    /// The newest change that it has acknowledged; None = it is starting and holds no lease.
    pub(crate) acknowledged_revision: Option<Revision>,
    /// When it renewed last, by the database's clock.
    pub(crate) last_seen: Timestamp,
    /// How long ago that was, by the same clock.
    pub(crate) since_last_renewal: Duration,
}

/// What the database says of all replicas.
#[derive(Clone, Debug)]
pub(crate) struct ClusterStatus {
    /// Its replicas, by name.
    pub(crate) replicas: Vec<ReplicaInfo>,
    /// The newest change.
    pub(crate) head: Revision,
    /// The lease that renewals grant, and the longest that anybody may hold.
    pub(crate) leases: (Term, Term),
    /// Nobody holds a lease from before the database lost or may have lost rows: the list is all there are.
    pub(crate) is_complete: bool,
    /// Whether a commit waits for a synchronous standby.
    pub(crate) sync_replicated: bool,
}

/// The replicas of a database, for an operator who has it at hand: it works when no server answers.
pub(crate) struct ReplicaAdmin {
    store: Arc<dyn Store>,
    fleet: Arc<dyn ReplicaRegistry>,
}

impl std::fmt::Debug for ReplicaAdmin {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ReplicaAdmin")
    }
}

impl ReplicaAdmin {
    /// Of the settings' database.
    ///
    /// # Errors
    /// When it does not open, or one process owns it.
    pub(crate) async fn open(settings: &ServerSettings) -> anyhow::Result<ReplicaAdmin> {
        if settings.database.starts_with("sqlite:") {
            bail!("an SQLite file has one owner and no replicas; name a postgres:// URL with --database");
        }
        let store = store::open(&settings.database).await?;
        let fleet = store.clone().replica_registry().context("the database has no replicas")?;
        Ok(ReplicaAdmin { store, fleet })
    }

    /// Lets go of the database.
    pub(crate) async fn close(self) {
        self.store.close().await;
    }

    /// The replicas and what holds for them.
    ///
    /// # Errors
    /// When the database fails.
    pub(crate) async fn cluster_status(&self) -> anyhow::Result<ClusterStatus> {
        let terms = self.fleet.lease_config().await?;
        let roster = self.fleet.list_replicas(&[]).await?;
        let db_now = roster.listing.database_time;
        let listed = |row: &ReplicaRow| ReplicaInfo {
            name: roster.names.get(&row.id).cloned().unwrap_or_default(),
            id: row.id.0,
            acknowledged_revision: row.applied,
            last_seen: row.last_seen,
            since_last_renewal: db_now.saturating_duration_since(row.last_seen),
        };
        let mut replicas: Vec<_> = roster.listing.rows.iter().map(listed).collect();
        replicas.sort_by(|one, other| (&one.name, one.id).cmp(&(&other.name, other.id)));
        Ok(ClusterStatus {
            replicas,
            head: roster.head,
            leases: (terms.lease, terms.longest_lease),
            is_complete: roster.listing.is_complete(),
            sync_replicated: roster.sync_replicated,
        })
    }

    /// Takes away the row of a replica that somebody has seen to be gone, named by name or id. Gives it.
    ///
    /// # Errors
    /// When there is none, or several are called so, or the database fails.
    pub(crate) async fn attest_dead(&self, named: &str) -> anyhow::Result<ReplicaInfo> {
        let replicas = self.cluster_status().await?.replicas;
        let mut found = replicas.into_iter().filter(|row| row.name == named || row.id.to_string() == named);
        let Some(replica) = found.next() else {
            bail!("there is no replica {named:?}; 'keyward replicas list' shows those there are");
        };
        if found.next().is_some() {
            bail!(
                "several replicas are called {named:?}; name the one by its id, as 'keyward replicas list' shows it"
            );
        }
        if !self.fleet.deregister(ReplicaId(replica.id), None).await? {
            bail!("the replica has left by itself meanwhile");
        }
        Ok(replica)
    }

    /// Accepts that the database has lost changes. Gives the new epoch.
    ///
    /// # Errors
    /// When the database fails.
    pub(crate) async fn accept_regression(&self) -> anyhow::Result<u64> {
        Ok(self.fleet.accept_regression().await?)
    }

    /// Changes the lease, and returns when nobody holds a longer one any more.
    ///
    /// # Errors
    /// When the database fails, or another lease was set meanwhile.
    pub(crate) async fn set_lease(&self, lease: Term) -> anyhow::Result<()> {
        let before = self.fleet.lease_config().await?.longest_lease;
        self.fleet.set_lease(lease).await?;
        // Read after: whoever comes later is granted the new one.
        let rows = self.fleet.list_replicas(&[]).await?.listing.rows;
        let shorter = before.length().is_none_or(|before| lease.length().is_some_and(|new| new < before));
        if shorter && before != lease {
            match before.expiry_wait() {
                Some(wait) => tokio::time::sleep(wait).await,
                None => self.wait_until_renewed(&rows).await?,
            }
        }
        if !self.fleet.finish_lease_change(lease).await? {
            bail!("another lease was set meanwhile; look at 'keyward replicas list', and set it again");
        }
        Ok(())
    }

    /// Waits until each of these rows has renewed, or is gone.
    async fn wait_until_renewed(&self, rows: &[ReplicaRow]) -> anyhow::Result<()> {
        const LOOK_EVERY: Duration = Duration::from_millis(500);
        loop {
            let now = self.fleet.list_replicas(&[]).await?.listing.rows;
            let same = |row: &&ReplicaRow| {
                now.iter().any(|new| new.id == row.id && new.renew_seq <= row.renew_seq + 1)
            };
            if !rows.iter().any(|row| same(&row)) {
                return Ok(());
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }
}
