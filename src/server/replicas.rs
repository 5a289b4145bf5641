//! What a server is to its database: the one owner of a file, or a replica among others.

use std::sync::Arc;

use tokio::sync::watch;

use crate::{
    clock::{Clock, Entropy},
    config::{
        replicas::{default_name, lease_text},
        server::Settings,
    },
    engine::{index::Index, lease::Lease},
    replication::{
        feed::{self, Running, Sight},
        follow::Follow,
        news::News,
        propagation::Propagation,
    },
    store::{Store, StoreError, fleet::Fleet},
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
        let news = News::over(fleet.clone(), follow.clone());
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
        let Some(fleet) = store.clone().fleet() else { return Ok(None) };
        let lease = fleet.terms().await?.lease;
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
        Ok(Some(feed::start(parts, lease)))
    }
}

/// Gives a database that holds nothing yet the lease that the settings name.
pub(super) async fn first_lease(store: &Arc<dyn Store>, settings: &Settings) -> Result<(), StoreError> {
    match (store.clone().fleet(), settings.lease) {
        (Some(fleet), Some(lease)) => set_first(&*fleet, lease).await,
        _ => Ok(()),
    }
}

async fn set_first(fleet: &dyn Fleet, lease: crate::domain::lease::Lease) -> Result<(), StoreError> {
    fleet.set_first_lease(lease).await.map(drop)
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
