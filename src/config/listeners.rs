//! The tables `[[listener]]` and `[overload]` of the settings file: where gRPC is served, what, to whom, and how much.

use std::path::PathBuf;

use schemars::JsonSchema;
use serde::Deserialize;

use crate::{
    domain::{
        identity::{Identity, San},
        name::AccountId,
        scope::{Scope, ScopeSet},
    },
    transport::{
        Address, Auth, Limits, Listener, Overload, Service, Services,
        tls::{ClientAuth, MinVersion, TlsFiles},
    },
};

use super::{
    duration,
    server::{ConfigError, ENVOY, MAIN, address, invalid},
};

const MODE: u32 = 0o660;
/// A quarter is a connection's, and a request of 4 MiB must fit into what any caller may fill of that.
const LEAST_REQUEST_BYTES: usize = 32 << 20;

/// A `[[listener]]`: an address with services, limits and callers of its own.
// Unknown keys are refused: a typo must not be a default.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct File {
    /// What logs and metrics call it: 1-64 characters of [a-z0-9_-], its own among the listeners. `main` and `envoy`
    /// are the listeners of `listen` and `envoy_listen`.
    name: String,
    /// Where it listens: `host:port`, or `unix:/path` for a socket file. Beyond this machine it needs
    /// [listener.tls], or `insecure`.
    address: String,
    /// The permissions of a socket file, in octal. Who may write to the file may connect. Default: "0660".
    mode: Option<String>,
    /// What is served: `check` (AuthzService), `management` (KeyService, AccountService, AuditService), `ext_authz`
    /// (what Envoy asks), `health`, `reflection` (only together with `check` or `management`).
    services: Vec<String>,
    /// What callers must show: `token` (a management key), `certificate` (one of the identities), `either` (a token,
    /// or without one a certificate), `both`. Default: `either` where there are identities; else `token`, and what
    /// Envoy asks needs nothing.
    auth: Option<String>,
    /// Connections at once. More are closed as they come. Default: 2048; in the whole process never more than file
    /// descriptors allow.
    max_connections: Option<usize>,
    /// Calls at once on a connection, 1 to 65535. Default: 256; 1024 where Envoy alone is served.
    max_streams: Option<u32>,
    /// How many calls a client may take back before they were looked at, before its connection is closed. Default: 20;
    /// 1024 where Envoy alone is served, which takes calls back whenever its own clients go away.
    pending_resets: Option<usize>,
    /// The most bytes of headers of a call, each header counted with 32 more; 1024 to 65536. Default: 16384.
    max_headers: Option<u32>,
    /// How long a client may take from connecting to its first bytes, the TLS handshake included; 100ms to 1m.
    /// Default: "10s".
    handshake_timeout: Option<String>,
    /// How long a connection without a call is kept, at least; 1s to 1d. Default: "5m".
    max_connection_idle: Option<String>,
    /// How old a connection may become before its client is asked to make a new one, a tenth more or less; 1s to 7d.
    /// Calls in flight end first. Default: "1h".
    max_connection_age: Option<String>,
    /// TLS. Without it the listener speaks plaintext.
    tls: Option<TlsFile>,
    /// What is granted to whom by a client certificate. Without it, certificates grant nothing.
    #[serde(default, rename = "identity")]
    identities: Vec<IdentityFile>,
}

/// A `[listener.tls]`. The files are read again when they change; connections that are open keep what they have.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct TlsFile {
    /// The file with the certificate chain in PEM, the server's own first.
    certificate: PathBuf,
    /// The file with its private key in PEM.
    key: PathBuf,
    /// The file with the authorities in PEM whose client certificates are believed. Without it none is asked for.
    client_ca: Option<PathBuf>,
    /// Whether clients must show a certificate: `required` or `optional`. Default: `required` where there is a
    /// `client_ca`.
    client_auth: Option<String>,
    /// The oldest version of TLS that is spoken: "1.2" or "1.3". Default: "1.2".
    min_version: Option<String>,
}

/// A `[[listener.identity]]`: whoever shows a certificate with this name, signed by `client_ca`, is a caller with these
/// scopes. Exactly one of `uri`, `dns` and `email` is given. Taking the table away takes the access away at the next
/// start.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct IdentityFile {
    /// A URI among the certificate's alternative names, such as "spiffe://example.org/envoy". Without it, `dns` or
    /// `email` is given.
    uri: Option<String>,
    /// A DNS name among them, such as "envoy.internal". Patterns match nothing. Without it, `uri` or `email` is given.
    dns: Option<String>,
    /// An e-mail address among them. Without it, `uri` or `dns` is given.
    email: Option<String>,
    /// The account that the caller acts in; `keyward` acts on every account.
    account: String,
    /// What it is granted, as a management key's scopes: ["keyward:check"]. It gives keys no scope that it lacks.
    scopes: Vec<String>,
}

/// The table `[overload]`: how much may be under way at once. Beyond it calls are answered UNAVAILABLE, OVERLOADED, at
/// once.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct OverloadFile {
    /// Calls of one serving thread that wait for their turn. Default: 4096, about a tenth of a second of work.
    queued_checks: Option<usize>,
    /// Management calls that are worked on in the whole process; a caller or a connection may have a quarter of them,
    /// an account half; a caller of the operator account half. Four times as many may wait for replicas. Default: 4096.
    management_calls: Option<usize>,
    /// Bytes of memory that requests hold while they arrive and are worked on, over all listeners; a connection may
    /// have a quarter of them. 33554432 or more, so that every request fits. Default: 67108864, which is 64 MiB.
    request_bytes: Option<usize>,
}

impl OverloadFile {
    pub(super) fn read(self) -> Result<Overload, ConfigError> {
        let default = Overload::default();
        let request_bytes = match self.request_bytes {
            Some(bytes) if !(LEAST_REQUEST_BYTES..=1 << 40).contains(&bytes) => {
                let problem = format!("must be {LEAST_REQUEST_BYTES} to {}", 1_u64 << 40);
                return Err(invalid("overload.request_bytes", &bytes.to_string(), &problem));
            }
            bytes => bytes.unwrap_or(default.request_bytes),
        };
        let read = |setting, value: Option<usize>, default| match value {
            Some(value) if !(1..=1 << 20).contains(&value) => {
                Err(invalid(setting, &value.to_string(), "must be 1 to 1048576"))
            }
            value => Ok(value.unwrap_or(default)),
        };
        Ok(Overload {
            queued_checks: read("overload.queued_checks", self.queued_checks, default.queued_checks)?,
            management_calls: read(
                "overload.management_calls",
                self.management_calls,
                default.management_calls,
            )?,
            request_bytes,
        })
    }
}

/// Every listener of the file, all valid.
pub(super) fn read(files: Vec<File>) -> Result<Vec<Listener>, ConfigError> {
    let mut listeners: Vec<Listener> = Vec::with_capacity(files.len());
    for file in files {
        let listener = file.read()?;
        let known = listeners.iter().map(|listener| listener.name.as_str()).chain([MAIN, ENVOY]);
        if known.into_iter().any(|name| name == listener.name) {
            return Err(invalid("listener.name", &listener.name, "is another listener's name"));
        }
        listeners.push(listener);
    }
    Ok(listeners)
}

impl File {
    fn read(self) -> Result<Listener, ConfigError> {
        let slug = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"_-".contains(&byte);
        if !(1..=64).contains(&self.name.len()) || !self.name.bytes().all(slug) {
            return Err(invalid("listener.name", &self.name, "must be 1-64 characters of [a-z0-9_-]"));
        }
        let services = read_services(&self.services)?;
        let limits = self.limits(services)?;
        let address = self.address()?;
        let tls = self.tls.map(TlsFile::read).transpose()?;
        if tls.is_some() && matches!(address, Address::Unix { .. }) {
            let problem = "is a socket file, which no network reads: leave [listener.tls] out";
            return Err(invalid("listener.address", &address.to_string(), problem));
        }
        let identities: Result<Vec<_>, _> = self.identities.into_iter().map(IdentityFile::read).collect();
        let identities = identities?;
        if !identities.is_empty() && tls.as_ref().is_none_or(|tls| tls.clients.is_none()) {
            let problem = "has identities, which need [listener.tls] with client_ca";
            return Err(invalid("listener.identity", &self.name, problem));
        }
        let auth = self.auth.as_deref().map(|auth| read_auth(auth, !identities.is_empty())).transpose()?;
        let open_to_proxies = auth.is_none() && identities.is_empty();
        let usual = if identities.is_empty() { Auth::Token } else { Auth::Either };
        let auth = auth.unwrap_or(usual);
        Ok(Listener { name: self.name, address, services, auth, open_to_proxies, limits, tls, identities })
    }

    fn address(&self) -> Result<Address, ConfigError> {
        let Some(path) = self.address.strip_prefix("unix:") else {
            if let Some(mode) = &self.mode {
                return Err(invalid("listener.mode", mode, "is for socket files: address = \"unix:/path\""));
            }
            address("listener.address", &self.address)?;
            return Ok(Address::Tcp(self.address.clone()));
        };
        let path = PathBuf::from(path);
        if !path.is_absolute() {
            return Err(invalid("listener.address", &self.address, "must be unix:/path, from the root on"));
        }
        let mode = self.mode.as_ref().map(|mode| {
            let read = u32::from_str_radix(mode, 8).ok().filter(|mode| *mode <= 0o777);
            read.ok_or_else(|| {
                invalid("listener.mode", mode, "must be permissions in octal, such as \"0660\"")
            })
        });
        Ok(Address::Unix { path, mode: mode.transpose()?.unwrap_or(MODE) })
    }

    fn limits(&self, services: Services) -> Result<Limits, ConfigError> {
        let usual = Limits::of(services);
        let time = |setting, text: &Option<String>, usual, least, most| {
            let Some(text) = text else { return Ok(usual) };
            let bounds = (read_time(least), read_time(most));
            let read = duration::parse(text).ok().filter(|time| (bounds.0..=bounds.1).contains(time));
            read.ok_or_else(|| invalid(setting, text, format!("must be {least} to {most}")))
        };
        let limits = Limits {
            connections: self.max_connections.unwrap_or(usual.connections),
            streams: self.max_streams.unwrap_or(usual.streams),
            pending_resets: self.pending_resets.unwrap_or(usual.pending_resets),
            header_bytes: self.max_headers.unwrap_or(usual.header_bytes),
            handshake: time(
                "listener.handshake_timeout",
                &self.handshake_timeout,
                usual.handshake,
                "100ms",
                "1m",
            )?,
            idle: time("listener.max_connection_idle", &self.max_connection_idle, usual.idle, "1s", "1d")?,
            age: time("listener.max_connection_age", &self.max_connection_age, usual.age, "1s", "7d")?,
        };
        for (setting, value, least, most) in [
            ("listener.max_connections", limits.connections, 1, 1 << 20),
            ("listener.max_streams", limits.streams as usize, 1, 65_535),
            ("listener.pending_resets", limits.pending_resets, 1, 65_535),
            ("listener.max_headers", limits.header_bytes as usize, 1024, 65_536),
        ] {
            if !(least..=most).contains(&value) {
                return Err(invalid(setting, &value.to_string(), format!("must be {least} to {most}")));
            }
        }
        Ok(limits)
    }
}

/// A bound of ours.
fn read_time(text: &str) -> std::time::Duration {
    duration::parse(text).unwrap_or_default()
}

fn read_services(names: &[String]) -> Result<Services, ConfigError> {
    let known = || Service::ALL.map(|(_, name)| name).join(", ");
    if names.is_empty() {
        return Err(invalid("listener.services", "[]", format!("must name at least one of {}", known())));
    }
    let read: Result<Services, _> = names
        .iter()
        .map(|name| {
            let problem = || format!("is none of {}", known());
            Service::parse(name).ok_or_else(|| invalid("listener.services", name, problem()))
        })
        .collect();
    let services = read?;
    if services.has(Service::Reflection)
        && !services.has(Service::Check)
        && !services.has(Service::Management)
    {
        let problem = "is only for listeners that serve check or management";
        return Err(invalid("listener.services", "reflection", problem));
    }
    Ok(services)
}

fn read_auth(text: &str, has_identities: bool) -> Result<Auth, ConfigError> {
    let auth = match text {
        "token" => Auth::Token,
        "certificate" => Auth::Certificate,
        "either" => Auth::Either,
        "both" => Auth::Both,
        _ => return Err(invalid("listener.auth", text, "must be token, certificate, either or both")),
    };
    if auth != Auth::Token && !has_identities {
        let problem = "lets nobody in by a certificate without a [[listener.identity]]";
        return Err(invalid("listener.auth", text, problem));
    }
    Ok(auth)
}

impl TlsFile {
    fn read(self) -> Result<TlsFiles, ConfigError> {
        let client_auth = match self.client_auth.as_deref() {
            None | Some("required") => ClientAuth::Required,
            Some("optional") => ClientAuth::Optional,
            Some(other) => {
                return Err(invalid("listener.tls.client_auth", other, "must be required or optional"));
            }
        };
        if let (Some(text), None) = (&self.client_auth, &self.client_ca) {
            let problem = "needs client_ca: the authorities whose certificates are believed";
            return Err(invalid("listener.tls.client_auth", text, problem));
        }
        let min_version = match self.min_version.as_deref() {
            None | Some("1.2") => MinVersion::V12,
            Some("1.3") => MinVersion::V13,
            Some(other) => {
                return Err(invalid("listener.tls.min_version", other, "must be \"1.2\" or \"1.3\""));
            }
        };
        Ok(TlsFiles {
            certificate: self.certificate,
            key: self.key,
            clients: self.client_ca.map(|path| (path, client_auth)),
            min_version,
        })
    }
}

impl IdentityFile {
    fn read(self) -> Result<Identity, ConfigError> {
        let san = match (&self.uri, &self.dns, &self.email) {
            (Some(uri), None, None) => {
                San::uri(uri).map_err(|rule| invalid("listener.identity.uri", uri, rule))
            }
            (None, Some(dns), None) => {
                San::dns(dns).map_err(|rule| invalid("listener.identity.dns", dns, rule))
            }
            (None, None, Some(email)) => {
                San::email(email).map_err(|rule| invalid("listener.identity.email", email, rule))
            }
            _ => Err(invalid(
                "listener.identity",
                &self.account,
                "must have exactly one of uri, dns and email",
            )),
        }?;
        let account = AccountId::parse(&self.account)
            .map_err(|rule| invalid("listener.identity.account", &self.account, rule))?;
        if self.scopes.is_empty() {
            return Err(invalid("listener.identity.scopes", "[]", "must grant at least one scope"));
        }
        let scopes: Result<ScopeSet, _> = self
            .scopes
            .iter()
            .map(|scope| {
                Scope::parse_grant(scope).map_err(|rule| invalid("listener.identity.scopes", scope, rule))
            })
            .collect();
        Ok(Identity::new(san, account, scopes?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Deserialize)]
    struct Whole {
        listener: Vec<File>,
    }

    fn parse(text: &str) -> Result<Vec<Listener>, ConfigError> {
        read(toml::from_str::<Whole>(text).unwrap().listener)
    }

    const ENVOY_MTLS: &str = "[[listener]]\nname = 'edge'\naddress = '0.0.0.0:50052'\nservices = ['ext_authz', 'health']\n\
        [listener.tls]\ncertificate = 'c.pem'\nkey = 'k.pem'\nclient_ca = 'ca.pem'\n\
        [[listener.identity]]\nuri = 'spiffe://example.org/envoy'\naccount = 'keyward'\nscopes = ['keyward:check']";

    #[test]
    fn a_listener_is_what_its_table_says_and_usual_otherwise() {
        let [edge] = &parse(ENVOY_MTLS).unwrap()[..] else { panic!() };
        assert_eq!(edge.services, Services::envoy());
        assert_eq!((edge.auth, edge.open_to_proxies), (Auth::Either, false));
        assert_eq!(edge.limits, Limits::of(Services::envoy()));
        let tls = edge.tls.as_ref().unwrap();
        assert_eq!(tls.clients, Some((PathBuf::from("ca.pem"), ClientAuth::Required)));
        assert_eq!(tls.min_version, MinVersion::V12);
        assert_eq!(edge.identities[0].name(), "cert:spiffe://example.org/envoy");

        let side = "[[listener]]\nname = 'side'\naddress = 'unix:/run/k.sock'\nservices = ['check', 'health']\nmax_streams = 9";
        let [side] = &parse(side).unwrap()[..] else { panic!() };
        assert_eq!(side.address, Address::Unix { path: "/run/k.sock".into(), mode: 0o660 });
        assert_eq!((side.auth, side.limits.streams), (Auth::Token, 9));
    }

    #[test]
    fn a_wrong_table_says_which_setting_and_what_would_be_right() {
        let table = |lines: &str| {
            let usual = [("name", "'a'"), ("address", "'127.0.0.1:1'"), ("services", "['check']")];
            let given = |name: &str| lines.lines().any(|line| line.starts_with(&format!("{name} =")));
            let usual = usual
                .iter()
                .filter(|(name, _)| !given(name))
                .map(|(name, value)| format!("{name} = {value}"));
            let usual: Vec<_> = usual.collect();
            format!("[[listener]]\n{}\n{lines}", usual.join("\n"))
        };
        for (lines, said) in [
            ("name = 'A'", "listener.name"),
            ("name = 'main'", "another listener's"),
            ("address = 'here'", "host:port"),
            ("address = 'unix:here'", "unix:/path"),
            ("mode = '0600'", "socket files"),
            ("address = 'unix:/s'\nmode = '9'", "octal"),
            ("services = []", "at least one of check"),
            ("services = ['everything']", "is none of check"),
            ("services = ['ext_authz', 'reflection']", "check or management"),
            ("auth = 'password'", "token, certificate"),
            ("auth = 'certificate'", "[[listener.identity]]"),
            ("max_streams = 0", "1 to 65535"),
            ("max_headers = 10", "1024 to 65536"),
            ("max_connection_age = '1ms'", "1s to 7d"),
            ("[listener.tls]\ncertificate = 'c'\nkey = 'k'\nclient_auth = 'required'", "client_ca"),
            ("[listener.tls]\ncertificate = 'c'\nkey = 'k'\nmin_version = '1.1'", "\"1.2\" or \"1.3\""),
            ("address = 'unix:/s'\n[listener.tls]\ncertificate = 'c'\nkey = 'k'", "leave [listener.tls] out"),
            ("[[listener.identity]]\ndns = 'a'\naccount = 'acme'\nscopes = ['x:y']", "client_ca"),
            ("[[listener.identity]]\ndns = '*.a'\naccount = 'acme'\nscopes = ['x:y']", "without *"),
            ("[[listener.identity]]\naccount = 'acme'\nscopes = ['x:y']", "exactly one of"),
            ("[[listener.identity]]\ndns = 'a'\naccount = 'acme'\nscopes = []", "at least one scope"),
        ] {
            let error = parse(&table(lines)).unwrap_err().to_string();
            assert!(error.contains(said), "{lines}: {error}");
        }
    }
}
