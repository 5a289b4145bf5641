//! gRPC: the wire's side of everything. Services read messages and write answers; the gate decides who gets in;
//! `serve` owns the connections. No rule of the product stands here, and only `status` builds a status.

mod accounts;
pub mod admission;
mod answer;
mod audit;
mod authz;
mod body;
pub mod calls;
mod codec;
mod connection;
mod convert;
mod details;
mod direct;
mod early_shed;
mod ext_authz;
pub mod gate;
mod hpack;
mod inflate;
mod io;
mod keys;
mod keys_read;
mod load;
mod outgoing;
mod page;
mod permits;
mod propagation;
mod question;
mod reflection;
mod reply;
pub mod rpc;
mod sending;
pub mod serve;
mod session;
mod status;
mod stream;
mod vigil;
mod watches;

use std::sync::Arc;

use tokio::sync::watch;
use tonic_health::{
    pb::health_server::HealthServer,
    server::{HealthReporter, HealthService},
};
use tower::util::BoxCloneSyncService;

use crate::{
    accounts::Accounts,
    decisions::Decisions,
    domain::account::Environments,
    engine::Engine,
    gateway::Gateway,
    keys::Keys,
    pb::{
        account_service_server::AccountServiceServer, audit_service_server::AuditServiceServer,
        envoy::service::auth::v3::authorization_server::AuthorizationServer,
        key_service_server::KeyServiceServer,
    },
    people::People,
    replication::{news::News, propagation::Propagation},
    store::Store,
    trace::Tracing,
    transport::{Overload, budget::MemoryBudget},
};

use gate::{Open, Services};

/// What the services are made of.
#[derive(Clone)]
pub struct Parts {
    /// Answers Checks.
    pub engine: Arc<Engine>,
    /// The use cases of keys.
    pub keys: Arc<Keys>,
    /// The use cases of accounts.
    pub accounts: Arc<Accounts>,
    /// The use cases of roles and members.
    pub people: Arc<People>,
    /// Judges the requests that proxies ask about.
    pub gateway: Arc<Gateway>,
    /// What the audit log is read from.
    pub store: Arc<dyn Store>,
    /// Waits until a change is in force everywhere.
    pub propagation: Propagation,
    /// Hears what other replicas have committed.
    pub news: News,
    /// The environments there are.
    pub environments: Arc<Environments>,
    /// Writes decisions down.
    pub decisions: Decisions,
    /// How calls are named, and which are recorded.
    pub tracing: Tracing,
    /// What requests may hold.
    pub memory: Arc<MemoryBudget>,
}

impl std::fmt::Debug for Parts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Parts")
    }
}

/// The names under which health is told: the server's own, and one for each service.
pub const HEALTH_NAMES: [&str; 6] = [
    "",
    "keyward.v1.AuthzService",
    "keyward.v1.KeyService",
    "keyward.v1.AccountService",
    "keyward.v1.AuditService",
    "envoy.service.auth.v3.Authorization",
];

/// Tells whether the server answers.
pub async fn report_health(reporter: &HealthReporter, serving: bool) {
    let status =
        if serving { tonic_health::ServingStatus::Serving } else { tonic_health::ServingStatus::NotServing };
    for name in HEALTH_NAMES {
        reporter.set_service_status(name, status).await;
    }
}

/// Builds every service; management runs on the current runtime, within `overload`.
///
/// # Errors
/// When the built-in descriptors cannot be read: a fault of the build.
pub fn services(
    parts: Parts,
    reporter: HealthReporter,
    overload: Overload,
    stopping: watch::Receiver<bool>,
) -> anyhow::Result<Services> {
    let Parts {
        engine,
        keys,
        accounts,
        people,
        gateway,
        store,
        propagation,
        news,
        environments,
        decisions,
        tracing,
        memory,
    } = parts;
    let health = HealthServer::new(HealthService::from_health_reporter(reporter));
    let descriptors = reflection::Descriptors::built_in()?;
    let open: [(&'static str, Open); 3] = [
        ("grpc.health.v1.Health", BoxCloneSyncService::new(health)),
        (
            "grpc.reflection.v1.ServerReflection",
            BoxCloneSyncService::new(reflection::v1::server(descriptors.clone())),
        ),
        (
            "grpc.reflection.v1alpha.ServerReflection",
            BoxCloneSyncService::new(reflection::v1alpha::server(descriptors)),
        ),
    ];
    let checks = authz::AuthzService { engine: engine.clone(), environments, decisions, stopping };

    let proxies = Arc::new(ext_authz::ExtAuthz { gateway: gateway.clone(), tracing });
    let outgoing = Arc::new(outgoing::SendBudget::default());
    let lists = || outgoing.lists().clone();
    let audit = audit::AuditService::over(store, engine.clone(), lists());
    let accounts =
        accounts::AccountService { accounts, people, propagation: propagation.clone(), lists: lists() };
    let keys = keys::KeyService { keys, engine: engine.clone(), propagation, lists: lists() };
    Ok(Services {
        calls: Arc::default(),
        engine,
        tracing,
        ext_authz: AuthorizationServer::from_arc(proxies.clone())
            .max_decoding_message_size(rpc::largest(rpc::service(rpc::EXT_AUTHZ))),
        proxies,
        gateway,
        // The gate holds each RPC to its own limit; here the largest must pass.
        checks: Arc::new(checks),
        keys: KeyServiceServer::new(keys),
        accounts: AccountServiceServer::new(accounts),
        audit: AuditServiceServer::new(audit),
        news,
        open: open.into(),
        management: tokio::runtime::Handle::current(),
        limits: Arc::new(permits::ConcurrencyLimits::new(overload)),
        memory,
        outgoing,
    })
}
