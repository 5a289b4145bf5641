//! The names of the health service, and how the server reports whether it serves.

use tonic_health::server::HealthReporter;

pub(super) const HEALTH_SERVICE: &str = "grpc.health.v1.Health";
pub(super) const HEALTH_WATCH_PATH: &str = "/grpc.health.v1.Health/Watch";

/// The names that the health service reports: the server as a whole (empty), then each service.
pub const HEALTH_SERVICE_NAMES: [&str; 6] = [
    "",
    "keyward.v1.AuthzService",
    "keyward.v1.KeyService",
    "keyward.v1.AccountService",
    "keyward.v1.AuditService",
    "envoy.service.auth.v3.Authorization",
];

/// Sets every name of the health service to serving or not serving.
pub(crate) async fn report_health(reporter: &HealthReporter, serving: bool) {
    let status =
        if serving { tonic_health::ServingStatus::Serving } else { tonic_health::ServingStatus::NotServing };
    for name in HEALTH_SERVICE_NAMES {
        reporter.set_service_status(name, status).await;
    }
}
