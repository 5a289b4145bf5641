//! What a server is to its database: the one owner of a file, or a replica among others; and what an operator with
//! the database at hand can do about the others.

use std::{sync::Arc, time::Duration};

use anyhow::{Context as _, bail};
use tokio::sync::watch;
use uuid::Uuid;

use crate::{
    clock::{Clock, Entropy},
    config::{
        replicas::{default_name, lease_text},
        server::Settings,
    },
    domain::{
        lease::{Lease as Term, ReplicaId, Row},
        time::{Revision, Timestamp},
    },
    engine::{index::Index, lease::Lease},
    replication::{
        feed::{self, Running, Sight},
        follow::Follow,
        news::News,
        propagation::Propagation,
    },
    store::{self, Store, StoreError, fleet::Fleet},
};

/// What the parts of a server need to know of other replicas.
#[derive(Clone, Debug)]
pub struct Place {
    /// The way into the index.
    pub follow: Arc<Follow>,
    /// The lease that Checks are answered under.
    pub lease: Arc<Lease>,
    /// Waits until a change is in force everywhere.
    pub propagation: Propagation,
    /// Hears what others have committed.
    pub news: News,
    /// What is to be seen of this replica.
    pub sight: Arc<Sight>,
}

impl Place {
    /// Of a server on this store; nothing is loaded yet. Readings run on the current runtime.
    #[must_use]
    pub fn on(store: &Arc<dyn Store>, index: Arc<Index>, clock: Arc<dyn Clock>) -> Place {
        let follow = Arc::new(Follow::new(index));
        let sight = Arc::new(Sight::default());
        let Some(fleet) = store.clone().fleet() else {
            let propagation = Propagation::alone(clock);
            let lease = Arc::new(Lease::sole());
            return Place { follow, lease, propagation, news: News::none(), sight };
        };
        let news = News::over(fleet.clone(), follow.clone(), sight.clone());
        let propagation = Propagation::over(fleet, follow.clone(), sight.clone(), clock);
        Place { follow, lease: Arc::new(Lease::none()), propagation, news, sight }
    }

    /// Starts the replica, where there are others.
    ///
    /// # Errors
    /// When the database does not say what its lease is.
    pub(super) async fn start(
        &self,
        store: &Arc<dyn Store>,
        settings: &Settings,
        port: u16,
        clock: Arc<dyn Clock>,
        entropy: Arc<dyn Entropy>,
    ) -> Result<Option<Running>, StoreError> {
        let Some(fleet) = store.clone().fleet() else {
            if settings.lease.is_some() {
                tracing::warn!("an SQLite file has one owner and needs no lease: the setting is not used");
            }
            return Ok(None);
        };
        let terms = fleet.terms().await?;
        let lease = terms.lease;
        if let Some(asked) = settings.lease.filter(|asked| *asked != lease) {
            tracing::warn!(
                asked = lease_text(asked),
                database = lease_text(lease),
                "the database has another lease, which holds; change it with 'keyward replicas lease'"
            );
        }
        let name = settings.replica_name.clone().unwrap_or_else(|| default_name(port));
        tracing::info!(replica = name, lease = lease_text(lease), "joining");
        let parts = feed::Parts {
            store: store.clone(),
            fleet,
            follow: self.follow.clone(),
            lease: self.lease.clone(),
            sight: self.sight.clone(),
            clock,
            entropy,
            name,
            retention: settings.retention,
        };
        Ok(Some(feed::start(parts, terms)))
    }
}

/// Gives a database that holds nothing yet the lease that the settings name.
pub(super) async fn first_lease(store: &Arc<dyn Store>, settings: &Settings) -> Result<(), StoreError> {
    match (store.clone().fleet(), settings.lease) {
        (Some(fleet), Some(lease)) => fleet.set_first_lease(lease).await.map(drop),
        _ => Ok(()),
    }
}

/// Waits until a replica has given up for good; never, where there is none.
pub(super) async fn gave_up(failed: Option<watch::Receiver<bool>>) {
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
pub struct Listed {
    /// What it is called.
    pub name: String,
    /// Its row; another one after each start.
    pub id: Uuid,
    /// The newest change that it has acknowledged; None = it is starting and holds no lease.
    pub applied: Option<Revision>,
    /// When it renewed last, by the database's clock.
    pub last_seen: Timestamp,
    /// How long ago that was, by the same clock.
    pub silent_for: Duration,
}

/// What the database says of all replicas.
#[derive(Clone, Debug)]
pub struct Fleetwide {
    /// Its replicas, by name.
    pub replicas: Vec<Listed>,
    /// The newest change.
    pub head: Revision,
    /// The lease that renewals grant, and the longest that anybody may hold.
    pub leases: (Term, Term),
    /// Nobody holds a lease from before the database lost or may have lost rows: the list is all there are.
    pub is_whole: bool,
    /// Whether a commit waits for a synchronous standby.
    pub sync_replicated: bool,
}

/// The replicas of a database, for an operator who has it at hand: it works when no server answers.
pub struct Operators {
    store: Arc<dyn Store>,
    fleet: Arc<dyn Fleet>,
}

impl std::fmt::Debug for Operators {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Operators")
    }
}

impl Operators {
    /// Of the settings' database.
    ///
    /// # Errors
    /// When it does not open, or one process owns it.
    pub async fn open(settings: &Settings) -> anyhow::Result<Operators> {
        if settings.database.starts_with("sqlite:") {
            bail!("an SQLite file has one owner and no replicas; name a postgres:// URL with --database");
        }
        let store = store::open(&settings.database).await?;
        let fleet = store.clone().fleet().context("the database has no replicas")?;
        Ok(Operators { store, fleet })
    }

    /// Lets go of the database.
    pub async fn close(self) {
        self.store.close().await;
    }

    /// The replicas and what holds for them.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn list(&self) -> anyhow::Result<Fleetwide> {
        let terms = self.fleet.terms().await?;
        let roster = self.fleet.roster(&[]).await?;
        let db_now = roster.listing.db_now;
        let listed = |row: &Row| Listed {
            name: roster.names.get(&row.id).cloned().unwrap_or_default(),
            id: row.id.0,
            applied: row.applied,
            last_seen: row.last_seen,
            silent_for: db_now.since(row.last_seen),
        };
        let mut replicas: Vec<_> = roster.listing.rows.iter().map(listed).collect();
        replicas.sort_by(|one, other| (&one.name, one.id).cmp(&(&other.name, other.id)));
        Ok(Fleetwide {
            replicas,
            head: roster.head,
            leases: (terms.lease, terms.longest),
            is_whole: roster.listing.is_whole(),
            sync_replicated: roster.sync_replicated,
        })
    }

    /// Takes away the row of a replica that somebody has seen to be gone, named by name or id. Gives it.
    ///
    /// # Errors
    /// When there is none, or several are called so, or the database fails.
    pub async fn attest_dead(&self, named: &str) -> anyhow::Result<Listed> {
        let replicas = self.list().await?.replicas;
        let mut found = replicas.into_iter().filter(|row| row.name == named || row.id.to_string() == named);
        let Some(replica) = found.next() else {
            bail!("there is no replica {named:?}; 'keyward replicas list' shows those there are");
        };
        if found.next().is_some() {
            bail!(
                "several replicas are called {named:?}; name the one by its id, as 'keyward replicas list' shows it"
            );
        }
        if !self.fleet.remove(ReplicaId(replica.id), None).await? {
            bail!("the replica has left by itself meanwhile");
        }
        Ok(replica)
    }

    /// Accepts that the database has lost changes. Gives the new epoch.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn accept_regression(&self) -> anyhow::Result<u64> {
        Ok(self.fleet.accept_regression().await?)
    }

    /// Changes the lease, and returns when nobody holds a longer one any more.
    ///
    /// # Errors
    /// When the database fails, or another lease was set meanwhile.
    pub async fn set_lease(&self, lease: Term) -> anyhow::Result<()> {
        let before = self.fleet.terms().await?.longest;
        self.fleet.set_lease(lease).await?;
        // Read after: whoever comes later is granted the new one.
        let rows = self.fleet.roster(&[]).await?.listing.rows;
        let shorter = before.length().is_none_or(|before| lease.length().is_some_and(|new| new < before));
        if shorter && before != lease {
            match before.outlived_after() {
                Some(wait) => tokio::time::sleep(wait).await,
                None => self.until_renewed(&rows).await?,
            }
        }
        if !self.fleet.settle_lease(lease).await? {
            bail!("another lease was set meanwhile; look at 'keyward replicas list', and set it again");
        }
        Ok(())
    }

    /// Waits until each of these rows has renewed, or is gone.
    async fn until_renewed(&self, rows: &[Row]) -> anyhow::Result<()> {
        const LOOK_EVERY: Duration = Duration::from_millis(500);
        loop {
            let now = self.fleet.roster(&[]).await?.listing.rows;
            let same =
                |row: &&Row| now.iter().any(|new| new.id == row.id && new.renew_seq <= row.renew_seq + 1);
            if !rows.iter().any(|row| same(&row)) {
                return Ok(());
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }
}
