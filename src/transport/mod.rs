//! Listeners: where the server is reached, what is served there, how far a peer may go, and TLS. Bytes and connections
//! only: what is said over them is for `grpc` and `http1`, and who may call for the gate.

pub mod certificate;
pub mod fd_limit;
pub mod listener_metrics;
pub mod memory_budget;
pub mod socket;
pub mod tls;

use std::{fmt, path::PathBuf, time::Duration};

use crate::domain::certificate_identity::CertificateIdentity;

use tls::TlsFiles;

/// Where a listener is reached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ListenAddress {
    /// `host:port`.
    Tcp(String),
    /// A socket file, whose permissions say who may connect.
    Unix {
        /// The file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
}

/// As the settings have it: `host:port` or `unix:/path`.
impl fmt::Display for ListenAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ListenAddress::Tcp(address) => f.write_str(address),
            ListenAddress::Unix { path, .. } => write!(f, "unix:{}", path.display()),
        }
    }
}

/// What a listener can serve.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ServiceKind {
    /// AuthzService.
    Check,
    /// KeyService, AccountService and AuditService.
    Management,
    /// `for_envoy.service.auth.v3.Authorization`.
    ExtAuthz,
    /// `grpc.health.v1.Health`.
    Health,
    /// Server reflection.
    Reflection,
}

impl ServiceKind {
    /// Every service, with its name in the settings.
    pub const ALL: [(ServiceKind, &'static str); 5] = [
        (ServiceKind::Check, "check"),
        (ServiceKind::Management, "management"),
        (ServiceKind::ExtAuthz, "ext_authz"),
        (ServiceKind::Health, "health"),
        (ServiceKind::Reflection, "reflection"),
    ];

    /// Reads a name.
    #[must_use]
    pub fn parse(name: &str) -> Option<ServiceKind> {
        ServiceKind::ALL.iter().find(|(_, known)| *known == name).map(|(service, _)| *service)
    }
}

/// A set of services.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ServiceSet(u8);

impl ServiceSet {
    /// Every one.
    #[must_use]
    pub fn all() -> ServiceSet {
        ServiceKind::ALL.iter().map(|(service, _)| *service).collect()
    }

    /// What Envoy asks, and health.
    #[must_use]
    pub fn for_envoy() -> ServiceSet {
        [ServiceKind::ExtAuthz, ServiceKind::Health].into_iter().collect()
    }

    /// Whether one is in it.
    #[must_use]
    pub fn contains(self, service: ServiceKind) -> bool {
        self.0 & (1 << service as u8) != 0
    }

    /// Without one.
    #[must_use]
    pub fn without(self, service: ServiceKind) -> ServiceSet {
        ServiceSet(self.0 & !(1 << service as u8))
    }

    /// Whether Envoy alone is served: then all clients of an Envoy share its connections.
    #[must_use]
    pub fn is_envoy_only(self) -> bool {
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
    /// A management key.
    Token,
    /// A client certificate of one of the listener's identities. A token counts for nothing.
    Certificate,
    /// A management key; without one, a certificate of one of the identities.
    TokenOrCertificate,
    /// A management key, over a connection with a certificate of one of the identities.
    TokenAndCertificate,
}

/// How far the peers of a listener may go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConnectionLimits {
    /// Connections at once.
    pub max_connections: usize,
    /// Calls at once on a connection.
    pub max_streams: u32,
    /// Calls of a connection that its peer took back before they were looked at (CVE-2023-44487).
    pub max_pending_resets: usize,
    /// The headers of a call, in bytes, each counted with 32 more (RFC 9113, section 6.5.2).
    pub max_header_bytes: u32,
    /// How long a peer may take from connecting to its first bytes, a TLS handshake included.
    pub handshake_timeout: Duration,
    /// How long a connection without a call is kept.
    pub max_idle: Duration,
    /// How old a connection may become; each by up to a tenth more or less, so that they do not all end at once.
    pub max_age: Duration,
}

impl ConnectionLimits {
    /// The usual limits for what is served.
    #[must_use]
    pub fn for_services(services: ServiceSet) -> ConnectionLimits {
        // All clients of an Envoy share a few connections, and Envoy takes a call back whenever a client goes away or
        // its patience of 200 ms ends: a short stall must not cost the connection.
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

/// One listener as it is to be.
#[derive(Clone, Debug)]
pub struct ListenerSettings {
    /// What logs and metrics call it.
    pub name: String,
    /// Where it is reached.
    pub address: ListenAddress,
    /// What is served there.
    pub services: ServiceSet,
    /// What callers must show.
    pub auth: CallerAuth,
    /// Whether proxies may ask without showing anything.
    pub allows_anonymous_proxies: bool,
    /// How far peers may go.
    pub limits: ConnectionLimits,
    /// TLS; None = plaintext.
    pub tls: Option<TlsFiles>,
    /// What is granted to whom by a client certificate.
    pub identities: Vec<CertificateIdentity>,
}

impl ListenerSettings {
    /// A plaintext listener that asks for tokens, and lets proxies ask without.
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

/// How much may be under way in the process at once. Beyond it calls are refused as UNAVAILABLE, at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OverloadLimits {
    /// Calls of a serving thread that wait for their turn.
    pub queued_checks: usize,
    /// Management calls.
    pub management_calls: usize,
    /// Bytes of memory that requests hold while they arrive and are worked on.
    pub request_bytes: usize,
}

impl Default for OverloadLimits {
    /// A thread answers 4,096 Checks in about a tenth of a second: who waits longer has mostly given up.
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
