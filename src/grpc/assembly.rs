//! Builds the services and the router over them from the parts of the process.

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

use super::{
    account_service, audit_service,
    auth::CallAuthenticator,
    authz_service,
    check_evaluator::CheckEvaluator,
    check_fast_path::CheckFastPath,
    concurrency,
    descriptor_index::DescriptorIndex,
    ext_authz, key_service, reflection,
    router::{PublicService, Router},
    rpc, send_budget,
};

/// Everything that the services are built from.
#[derive(Clone)]
pub struct ServiceParts {
    pub(crate) engine: Arc<Engine>,
    pub(crate) keys: Arc<KeyOperations>,
    pub(crate) accounts: Arc<AccountOperations>,
    /// Use cases of roles and members.
    pub(crate) membership: Arc<MembershipOperations>,
    /// Authorizes the HTTP requests that proxies ask about.
    pub(crate) gateway: Arc<Gateway>,
    /// Source of the audit log.
    pub(crate) store: Arc<dyn Store>,
    /// Waits until a change is in force on every replica.
    pub(crate) propagation: PropagationWaiter,
    /// Catches up with the commits of other replicas.
    pub(crate) freshness: FreshnessBarrier,
    /// The environments that the configuration defines.
    pub(crate) environments: Arc<EnvironmentSet>,
    /// Records decisions in the decision log.
    pub(crate) decisions: DecisionLog,
    /// Assigns request ids and decides which calls are traced.
    pub(crate) tracing: CallTracer,
    /// Bounds the memory that requests hold.
    pub(crate) memory_budget: Arc<MemoryBudget>,
}

impl std::fmt::Debug for ServiceParts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ServiceParts")
    }
}

/// Builds the router over all services. Management calls run on the current runtime, within `overload`.
///
/// # Errors
/// Fails if the built-in descriptors cannot be decoded, which is a build error.
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
        membership,
        gateway,
        store,
        propagation,
        freshness,
        environments,
        decisions,
        tracing,
        memory_budget,
    } = parts;
    let health = HealthServer::new(HealthService::from_health_reporter(reporter));
    let descriptors = DescriptorIndex::from_built_in()?;
    let public_services: [(&'static str, PublicService); 3] = [
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
    let evaluator = Arc::new(CheckEvaluator { engine: engine.clone(), environments, decisions });
    let authenticator = CallAuthenticator { engine: engine.clone(), gateway: gateway.clone() };
    let ext_authz_service = Arc::new(ext_authz::ExtAuthzService { gateway, tracing });
    let send_budget = Arc::new(send_budget::SendBudget::default());
    let list_permits = || send_budget.list_permits().clone();
    let audit = audit_service::AuditService::new(store, engine.clone(), list_permits());
    let accounts = account_service::AccountService {
        accounts,
        membership,
        propagation: propagation.clone(),
        list_permits: list_permits(),
    };
    let keys =
        key_service::KeyService { keys, engine: engine.clone(), propagation, list_permits: list_permits() };
    Ok(Router {
        rpc_metrics: Arc::default(),
        tracing,
        ext_authz_server: AuthorizationServer::from_arc(ext_authz_service.clone())
            .max_decoding_message_size(rpc::max_request_of_service(rpc::service_name(rpc::EXT_AUTHZ_METHOD))),
        fast_path: CheckFastPath {
            engine: engine.clone(),
            evaluator: evaluator.clone(),
            ext_authz_service: ext_authz_service.clone(),
            authenticator: authenticator.clone(),
        },
        authenticator,
        ext_authz_service,
        // The router enforces the limit of each RPC; this one only has to admit the largest.
        authz_service: Arc::new(authz_service::AuthzService { evaluator, stopping }),
        key_server: KeyServiceServer::new(keys),
        account_server: AccountServiceServer::new(accounts),
        audit_server: AuditServiceServer::new(audit),
        engine,
        freshness,
        public_services: public_services.into(),
        management_runtime: tokio::runtime::Handle::current(),
        concurrency_limits: Arc::new(concurrency::ConcurrencyLimits::new(overload)),
        memory_budget,
        send_budget,
    })
}
