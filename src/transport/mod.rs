//! Listeners: where the server is reached, what is served there, how far a peer may go, and TLS. Bytes and connections
//! only: what is said over them is for `grpc` and `http1`, and who may call for the gate.

pub mod budget;
pub mod certificate;
pub mod counts;
pub mod descriptors;
pub mod socket;
pub mod tls;

use std::{fmt, path::PathBuf, time::Duration};

use crate::domain::identity::Identity;

use tls::TlsFiles;

/// Where a listener is reached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
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
impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Address::Tcp(address) => f.write_str(address),
            Address::Unix { path, .. } => write!(f, "unix:{}", path.display()),
        }
    }
}

/// What a listener can serve.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Service {
    /// AuthzService.
    Check,
    /// KeyService, AccountService and AuditService.
    Management,
    /// `envoy.service.auth.v3.Authorization`.
    ExtAuthz,
    /// `grpc.health.v1.Health`.
    Health,
    /// Server reflection.
    Reflection,
}

impl Service {
    /// Every service, with its name in the settings.
    pub const ALL: [(Service, &'static str); 5] = [
        (Service::Check, "check"),
        (Service::Management, "management"),
        (Service::ExtAuthz, "ext_authz"),
        (Service::Health, "health"),
        (Service::Reflection, "reflection"),
    ];

    /// Reads a name.
    #[must_use]
    pub fn parse(name: &str) -> Option<Service> {
        Service::ALL.iter().find(|(_, known)| *known == name).map(|(service, _)| *service)
    }
}

/// A set of services.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Services(u8);

impl Services {
    /// Every one.
    #[must_use]
    pub fn all() -> Services {
        Service::ALL.iter().map(|(service, _)| *service).collect()
    }

    /// What Envoy asks, and health.
    #[must_use]
    pub fn envoy() -> Services {
        [Service::ExtAuthz, Service::Health].into_iter().collect()
    }

    /// Whether one is in it.
    #[must_use]
    pub fn has(self, service: Service) -> bool {
        self.0 & (1 << service as u8) != 0
    }

    /// Without one.
    #[must_use]
    pub fn without(self, service: Service) -> Services {
        Services(self.0 & !(1 << service as u8))
    }

    /// Whether Envoy alone is served: then all clients of an Envoy share its connections.
    #[must_use]
    pub fn envoy_only(self) -> bool {
        self.has(Service::ExtAuthz)
            && self.without(Service::Health) == [Service::ExtAuthz].into_iter().collect()
    }
}

impl FromIterator<Service> for Services {
    fn from_iter<T: IntoIterator<Item = Service>>(services: T) -> Services {
        Services(services.into_iter().fold(0, |set, service| set | 1 << service as u8))
    }
}

/// What callers of a listener must show.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Auth {
    /// A management key.
    Token,
    /// A client certificate of one of the listener's identities. A token counts for nothing.
    Certificate,
    /// A management key; without one, a certificate of one of the identities.
    Either,
    /// A management key, over a connection with a certificate of one of the identities.
    Both,
}

/// How far the peers of a listener may go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Connections at once.
    pub connections: usize,
    /// Calls at once on a connection.
    pub streams: u32,
    /// Calls of a connection that its peer took back before they were looked at (CVE-2023-44487).
    pub pending_resets: usize,
    /// The headers of a call, in bytes, each counted with 32 more (RFC 9113, section 6.5.2).
    pub header_bytes: u32,
    /// How long a peer may take from connecting to its first bytes, a TLS handshake included.
    pub handshake: Duration,
    /// How long a connection without a call is kept.
    pub idle: Duration,
    /// How old a connection may become; each by up to a tenth more or less, so that they do not all end at once.
    pub age: Duration,
}

impl Limits {
    /// The usual limits for what is served.
    #[must_use]
    pub fn of(services: Services) -> Limits {
        // All clients of an Envoy share a few connections, and Envoy takes a call back whenever a client goes away or
        // its patience of 200 ms ends: a short stall must not cost the connection.
        let (streams, pending_resets) = if services.envoy_only() { (1024, 1024) } else { (256, 20) };
        Limits {
            connections: 2048,
            streams,
            pending_resets,
            header_bytes: 16 * 1024,
            handshake: Duration::from_secs(10),
            idle: Duration::from_secs(5 * 60),
            age: Duration::from_secs(60 * 60),
        }
    }
}

/// One listener as it is to be.
#[derive(Clone, Debug)]
pub struct Listener {
    /// What logs and metrics call it.
    pub name: String,
    /// Where it is reached.
    pub address: Address,
    /// What is served there.
    pub services: Services,
    /// What callers must show.
    pub auth: Auth,
    /// Whether proxies may ask without showing anything.
    pub open_to_proxies: bool,
    /// How far peers may go.
    pub limits: Limits,
    /// TLS; None = plaintext.
    pub tls: Option<TlsFiles>,
    /// What is granted to whom by a client certificate.
    pub identities: Vec<Identity>,
}

impl Listener {
    /// A plaintext listener that asks for tokens, and lets proxies ask without.
    #[must_use]
    pub fn plain(name: &str, address: &str, services: Services) -> Listener {
        Listener {
            name: name.to_owned(),
            address: Address::Tcp(address.to_owned()),
            services,
            auth: Auth::Token,
            open_to_proxies: true,
            limits: Limits::of(services),
            tls: None,
            identities: Vec::new(),
        }
    }
}

/// How much may be under way in the process at once. Beyond it calls are refused as UNAVAILABLE, at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Overload {
    /// Calls of a serving thread that wait for their turn.
    pub queued_checks: usize,
    /// Management calls.
    pub management_calls: usize,
    /// Bytes of memory that requests hold while they arrive and are worked on.
    pub request_bytes: usize,
}

impl Default for Overload {
    /// A thread answers 4,096 Checks in about a tenth of a second: who waits longer has mostly given up.
    fn default() -> Overload {
        Overload { queued_checks: 4096, management_calls: 4096, request_bytes: 64 << 20 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_listener_for_envoy_serves_ext_authz_and_nothing_but_health_besides() {
        assert!(Services::envoy().envoy_only());
        assert!([Service::ExtAuthz].into_iter().collect::<Services>().envoy_only());
        assert!(!Services::all().envoy_only());
        assert!(![Service::Health].into_iter().collect::<Services>().envoy_only());
        assert!(![Service::ExtAuthz, Service::Reflection].into_iter().collect::<Services>().envoy_only());
    }
}
