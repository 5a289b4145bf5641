//! gRPC: the wire's side of everything. Services read messages and write answers; the gate decides who gets in;
//! `serve` owns the connections. No rule of the product stands here, and only `status` builds a status.

mod account_service;
mod audit_service;
pub mod auth;
mod authz_service;
mod check_decoder;
mod check_encoder;
mod check_fast_path;
mod check_session;
mod check_stream;
mod concurrency;
mod connection;
mod connection_io;
mod convert;
mod early_shed;
mod ext_authz;
mod gzip;
mod hpack;
mod key_requests;
mod key_service;
mod load_shed;
mod long_calls;
mod management_session;
mod page_token;
mod propagation_stream;
mod raw_codec;
mod reflection;
mod request_body;
mod response_body;
mod response_sender;
pub mod router;
pub mod rpc;
pub mod rpc_metrics;
mod send_budget;
pub mod serve;
mod status;
mod status_details;

use std::sync::Arc;

use tokio::sync::watch;
use tonic_health::{
    pb::health_server::HealthServer,
    server::{HealthReporter, HealthService},
};
use tower::util::BoxCloneSyncService;

use crate::{
    accounts::AccountOperations,
    decision_log::DecisionLog,
    domain::account::EnvironmentSet,
    engine::Engine,
    gateway::Gateway,
    keys::KeyOperations,
    membership::MembershipOperations,
    pb::{
        account_service_server::AccountServiceServer, audit_service_server::AuditServiceServer,
        envoy::service::auth::v3::authorization_server::AuthorizationServer,
        key_service_server::KeyServiceServer,
    },
    replication::{freshness::FreshnessBarrier, propagation::PropagationWaiter},
    store::Store,
    trace::CallTracer,
    transport::{OverloadLimits, memory_budget::MemoryBudget},
};

use router::{PublicService, Router};

/// What the services are made of.
#[derive(Clone)]
pub struct ServiceParts {
    /// Answers Checks.
    pub engine: Arc<Engine>,
    /// The use cases of keys.
    pub keys: Arc<KeyOperations>,
    /// The use cases of accounts.
    pub accounts: Arc<AccountOperations>,
    /// The use cases of roles and members.
    pub membership: Arc<MembershipOperations>,
    /// Judges the requests that proxies ask about.
    pub gateway: Arc<Gateway>,
    /// What the audit log is read from.
    pub store: Arc<dyn Store>,
    /// Waits until a change is in force everywhere.
    pub propagation: PropagationWaiter,
    /// Hears what other replicas have committed.
    pub freshness: FreshnessBarrier,
    /// The environments there are.
    pub environments: Arc<EnvironmentSet>,
    /// Writes decisions down.
    pub decisions: DecisionLog,
    /// How calls are named, and which are recorded.
    pub tracing: CallTracer,
    /// What requests may hold.
    pub memory_budget: Arc<MemoryBudget>,
}

impl std::fmt::Debug for ServiceParts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ServiceParts")
    }
}

/// The names under which health is told: the server's own, and one for each service.
pub const HEALTH_SERVICE_NAMES: [&str; 6] = [
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
    for name in HEALTH_SERVICE_NAMES {
        reporter.set_service_status(name, status).await;
    }
}

/// Builds every service; management runs on the current runtime, within `overload`.
///
/// # Errors
/// When the built-in descriptors cannot be read: a fault of the build.
pub fn build_router(
    parts: ServiceParts,
    reporter: HealthReporter,
    overload: OverloadLimits,
    stopping: watch::Receiver<bool>,
) -> anyhow::Result<Router> {
    let ServiceParts {
        engine,
        keys,
        accounts,
        membership: people,
        gateway,
        store,
        propagation,
        freshness: news,
        environments,
        decisions,
        tracing,
        memory_budget: memory,
    } = parts;
    let health = HealthServer::new(HealthService::from_health_reporter(reporter));
    let descriptors = reflection::DescriptorIndex::from_built_in()?;
    let open: [(&'static str, PublicService); 3] = [
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
    let checks = authz_service::AuthzService { engine: engine.clone(), environments, decisions, stopping };

    let proxies = Arc::new(ext_authz::ExtAuthzService { gateway: gateway.clone(), tracing });
    let outgoing = Arc::new(send_budget::SendBudget::default());
    let lists = || outgoing.list_permits().clone();
    let audit = audit_service::AuditService::new(store, engine.clone(), lists());
    let accounts = account_service::AccountService {
        accounts,
        membership: people,
        propagation: propagation.clone(),
        list_permits: lists(),
    };
    let keys = key_service::KeyService { keys, engine: engine.clone(), propagation, list_permits: lists() };
    Ok(Router {
        rpc_metrics: Arc::default(),
        engine,
        tracing,
        ext_authz_server: AuthorizationServer::from_arc(proxies.clone())
            .max_decoding_message_size(rpc::max_request_of_service(rpc::service_name(rpc::EXT_AUTHZ_METHOD))),
        ext_authz_service: proxies,
        gateway,
        // The gate holds each RPC to its own limit; here the largest must pass.
        authz_service: Arc::new(checks),
        key_server: KeyServiceServer::new(keys),
        account_server: AccountServiceServer::new(accounts),
        audit_server: AuditServiceServer::new(audit),
        freshness: news,
        public_services: open.into(),
        management_runtime: tokio::runtime::Handle::current(),
        concurrency_limits: Arc::new(concurrency::ConcurrencyLimits::new(overload)),
        memory_budget: memory,
        send_budget: outgoing,
    })
}
