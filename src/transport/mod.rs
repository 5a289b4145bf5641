//! Describes listeners: addresses, services, limits and TLS.
//!
//! Transport handles bytes and connections only. `grpc` and `http1` implement the protocols, and `grpc::auth` decides
//! which caller may call.

pub mod certificate;
pub(crate) mod fd_limit;
pub mod listener_metrics;
pub mod memory_budget;
pub mod socket;
pub mod tls;

use std::{fmt, path::PathBuf, time::Duration};

use crate::domain::certificate_identity::CertificateIdentity;

use tls::TlsFiles;

/// The address of a listener.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ListenAddress {
    /// A TCP address, as `host:port`.
    Tcp(String),
    /// A Unix socket; the file's permissions decide which processes may connect.
    Unix {
        /// The path of the socket file.
        path: PathBuf,
        /// The permission bits of the file.
        mode: u32,
    },
}

/// The form of the settings: `host:port` or `unix:/path`.
impl fmt::Display for ListenAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ListenAddress::Tcp(address) => f.write_str(address),
            ListenAddress::Unix { path, .. } => write!(f, "unix:{}", path.display()),
        }
    }
}

/// A service that a listener can offer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ServiceKind {
    /// `keyward.v1.AuthzService`, for Checks.
    Check,
    /// The management services: KeyService, AccountService and AuditService.
    Management,
    /// Envoy's `envoy.service.auth.v3.Authorization` for ext_authz.
    ExtAuthz,
    /// The health service, `grpc.health.v1.Health`.
    Health,
    /// The server reflection of gRPC.
    Reflection,
}

impl ServiceKind {
    /// Every service, with its name in the settings.
    pub(crate) const ALL: [(ServiceKind, &'static str); 5] = [
        (ServiceKind::Check, "check"),
        (ServiceKind::Management, "management"),
        (ServiceKind::ExtAuthz, "ext_authz"),
        (ServiceKind::Health, "health"),
        (ServiceKind::Reflection, "reflection"),
    ];

    #[must_use]
    pub(crate) fn parse(name: &str) -> Option<ServiceKind> {
        ServiceKind::ALL.iter().find(|(_, known)| *known == name).map(|(service, _)| *service)
    }
}

/// A set of [`ServiceKind`]s, as a bit mask.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ServiceSet(u8);

impl ServiceSet {
    #[must_use]
    pub(crate) fn all() -> ServiceSet {
        ServiceKind::ALL.iter().map(|(service, _)| *service).collect()
    }

    /// What Envoy asks, and health.
    #[must_use]
    pub fn for_envoy() -> ServiceSet {
        [ServiceKind::ExtAuthz, ServiceKind::Health].into_iter().collect()
    }

    /// Whether one is in it.
    #[must_use]
    pub(crate) fn contains(self, service: ServiceKind) -> bool {
        self.0 & (1 << service as u8) != 0
    }

    #[must_use]
    pub(crate) fn without(self, service: ServiceKind) -> ServiceSet {
        ServiceSet(self.0 & !(1 << service as u8))
    }

    /// Whether Envoy alone is served: then all clients of an Envoy share its connections.
    #[must_use]
    pub(crate) fn is_envoy_only(self) -> bool {
        self.contains(ServiceKind::ExtAuthz)
            && self.without(ServiceKind::Health) == [ServiceKind::ExtAuthz].into_iter().collect()
    }
}

impl FromIterator<ServiceKind> for ServiceSet {
    fn from_iter<T: IntoIterator<Item = ServiceKind>>(services: T) -> ServiceSet {
        ServiceSet(services.into_iter().fold(0, |set, service| set | 1 << service as u8))
    }
}

/// What callers of a listener must show.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CallerAuth {
    /// Callers present a management key.
    Token,
    /// A client certificate of one of the listener's identities. A token counts for nothing.
    Certificate,
    /// A management key; without one, a certificate of one of the identities.
    TokenOrCertificate,
    /// A management key, over a connection with a certificate of one of the identities.
    TokenAndCertificate,
}

/// Limits on the peers of a listener.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConnectionLimits {
    /// Maximum number of open connections.
    pub max_connections: usize,
    /// Maximum number of concurrent calls on a connection.
    pub max_streams: u32,
    /// Maximum number of calls that a connection's peer may cancel before they are handled (CVE-2023-44487).
    pub max_pending_resets: usize,
    /// Maximum size of a call's headers in bytes, plus 32 for each header (RFC 9113, section 6.5.2).
    pub max_header_bytes: u32,
    /// Time limit from connecting to the first bytes, TLS handshake included.
    pub handshake_timeout: Duration,
    /// Idle time after which a connection is closed.
    pub max_idle: Duration,
    /// Maximum age of a connection, varied by up to a tenth so that connections do not end together.
    pub max_age: Duration,
}

impl ConnectionLimits {
    /// The default limits for a set of services.
    #[must_use]
    pub(crate) fn for_services(services: ServiceSet) -> ConnectionLimits {
        // All clients of an Envoy share a few connections. Envoy cancels a call when its client leaves or its timeout
        // of 200 ms ends, so a short stall must not cost the connection.
        let (streams, pending_resets) = if services.is_envoy_only() { (1024, 1024) } else { (256, 20) };
        ConnectionLimits {
            max_connections: 2048,
            max_streams: streams,
            max_pending_resets: pending_resets,
            max_header_bytes: 16 * 1024,
            handshake_timeout: Duration::from_secs(10),
            max_idle: Duration::from_secs(5 * 60),
            max_age: Duration::from_secs(60 * 60),
        }
    }
}

/// The settings of one listener.
#[derive(Clone, Debug)]
pub struct ListenerSettings {
    /// The listener's name in logs and metrics.
    pub name: String,
    /// The address to listen on.
    pub address: ListenAddress,
    /// The services that the listener offers.
    pub services: ServiceSet,
    /// How callers authenticate on this listener.
    pub auth: CallerAuth,
    /// Whether proxies may call without a credential.
    pub allows_anonymous_proxies: bool,
    /// Limits on connections and calls.
    pub limits: ConnectionLimits,
    /// TLS; None = plaintext.
    pub tls: Option<TlsFiles>,
    /// The identities that client certificates prove, with their grants.
    pub identities: Vec<CertificateIdentity>,
}

impl ListenerSettings {
    /// A plaintext listener that requires tokens, except from proxies.
    #[must_use]
    pub fn new_plaintext(name: &str, address: &str, services: ServiceSet) -> ListenerSettings {
        ListenerSettings {
            name: name.to_owned(),
            address: ListenAddress::Tcp(address.to_owned()),
            services,
            auth: CallerAuth::Token,
            allows_anonymous_proxies: true,
            limits: ConnectionLimits::for_services(services),
            tls: None,
            identities: Vec::new(),
        }
    }
}

/// Limits on concurrent work in the process. Calls beyond them fail at once with UNAVAILABLE.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OverloadLimits {
    /// Maximum number of calls queued at a worker thread.
    pub queued_checks: usize,
    /// Maximum number of concurrent management calls.
    pub management_calls: usize,
    /// Maximum memory in bytes that requests hold while they arrive and run.
    pub request_bytes: usize,
}

impl Default for OverloadLimits {
    /// A thread answers 4,096 Checks in about 0.1 s; callers that wait longer have mostly given up.
    fn default() -> OverloadLimits {
        OverloadLimits { queued_checks: 4096, management_calls: 4096, request_bytes: 64 << 20 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_listener_for_envoy_serves_ext_authz_and_nothing_but_health_besides() {
        assert!(ServiceSet::for_envoy().is_envoy_only());
        assert!([ServiceKind::ExtAuthz].into_iter().collect::<ServiceSet>().is_envoy_only());
        assert!(!ServiceSet::all().is_envoy_only());
        assert!(![ServiceKind::Health].into_iter().collect::<ServiceSet>().is_envoy_only());
        assert!(
            ![ServiceKind::ExtAuthz, ServiceKind::Reflection]
                .into_iter()
                .collect::<ServiceSet>()
                .is_envoy_only()
        );
    }
}
