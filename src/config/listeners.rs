//! Validates the tables `[[listener]]` and `[overload]`: the addresses of gRPC, their services, callers and limits.
//!
//! `listener_preflight.rs` checks the files and host names that a listener needs.

use std::{net::Ipv6Addr, path::PathBuf};

use crate::{
    domain::{
        certificate_identity::{CertificateIdentity, CertificateName},
        name::AccountId,
        scope::{Scope, ScopeSet},
    },
    transport::{
        CallerAuth, ConnectionLimits, ListenAddress, ListenerSettings, OverloadLimits, ServiceKind,
        ServiceSet,
        tls::{ClientAuth, MinTlsVersion, TlsFiles},
    },
};

use super::{
    duration,
    error::{InvalidSetting, invalid_redacted_setting, invalid_setting},
    listener_preflight,
    problems::ProblemCollector,
    raw::{RawIdentity, RawListener, RawOverload, RawTlsFiles},
};

/// The name of the listener of `listen`.
pub(crate) const MAIN_LISTENER: &str = "main";
/// The name of the listener of `envoy_listen`.
pub(crate) const ENVOY_LISTENER: &str = "envoy";
const DEFAULT_SOCKET_MODE: u32 = 0o660;
/// A connection may use a quarter of the memory, and a request of 4 MiB must fit into one caller's part of that.
const MIN_REQUEST_BYTES: usize = 32 << 20;

impl RawOverload {
    pub(super) fn validate(self, problems: &mut ProblemCollector<'_>) -> OverloadLimits {
        let default = OverloadLimits::default();
        let mut read = |setting, value: Option<usize>, default, (min, max): (usize, usize)| match value {
            Some(value) if !(min..=max).contains(&value) => {
                problems.add(invalid_setting(setting, &value.to_string(), format!("must be {min} to {max}")));
                default
            }
            value => value.unwrap_or(default),
        };
        let calls = (1, 1 << 20);
        let bytes = (MIN_REQUEST_BYTES, 1 << 40);
        OverloadLimits {
            queued_checks: read("overload.queued_checks", self.queued_checks, default.queued_checks, calls),
            management_calls: read(
                "overload.management_calls",
                self.management_calls,
                default.management_calls,
                calls,
            ),
            request_bytes: read("overload.request_bytes", self.request_bytes, default.request_bytes, bytes),
        }
    }
}

/// Validates every listener of the file. `insecure` = plaintext may be served beyond this machine; `with_files` =
/// certificates are read and host names resolved.
pub(super) fn validate_listeners(
    raw: Vec<RawListener>,
    insecure: bool,
    with_files: bool,
    problems: &mut ProblemCollector<'_>,
) -> Vec<ListenerSettings> {
    let mut listeners: Vec<ListenerSettings> = Vec::with_capacity(raw.len());
    let count = raw.len();
    for (at, listener) in raw.into_iter().enumerate() {
        problems.with_list_entry("listener", at, |problems| {
            let used_names = listeners
                .iter()
                .map(|listener| listener.name.as_str())
                .chain([MAIN_LISTENER, ENVOY_LISTENER]);
            if used_names.into_iter().any(|name| name == listener.name) {
                problems.add(invalid_setting("listener.name", &listener.name, "is another listener's name"));
            }
            let Some(listener) = listener.validate(problems) else { return };
            if with_files {
                listener_preflight::check_listener(&listener, insecure, problems);
            }
            listeners.push(listener);
        });
    }
    if listeners.len() < count {
        problems.mark_invalid("listener");
    }
    listeners
}

impl RawListener {
    /// Validates a listener. None = its services or its address are invalid.
    fn validate(self, problems: &mut ProblemCollector<'_>) -> Option<ListenerSettings> {
        problems.ok_or_add(validate_listener_name(&self.name));
        let services = problems.ok_or_add(parse_services(&self.services));
        let limits = self.validate_limits(services.unwrap_or_default(), problems);
        let address = problems.ok_or_add(self.parse_address());
        if let (Some(_), Some(address @ ListenAddress::Unix { .. })) = (&self.tls, &address) {
            let problem = "is a socket file, which needs no TLS: leave [listener.tls] out";
            problems.add(invalid_setting("listener.address", &address.to_string(), problem));
        }
        let has_client_ca = self.tls.as_ref().is_some_and(|tls| tls.client_ca.is_some());
        let tls = self.tls.map(|tls| tls.validate(problems));
        let mut identities = Vec::with_capacity(self.identities.len());
        let has_identities = !self.identities.is_empty();
        for (at, identity) in self.identities.into_iter().enumerate() {
            problems.with_list_entry("listener.identity", at, |problems| {
                identities.extend(identity.validate(problems))
            });
        }
        let tls_is_sound =
            ["listener.tls", "listener.tls.client_ca"].iter().all(|key| problems.is_valid(key));
        if has_identities && !has_client_ca && tls_is_sound {
            let problem = "has identities, which need [listener.tls] with client_ca";
            problems.add(invalid_setting("listener.identity", &self.name, problem));
        }
        let auth =
            self.auth.as_deref().and_then(|auth| problems.ok_or_add(parse_auth_mode(auth, has_identities)));
        let open_to_proxies = self.auth.is_none() && !has_identities;
        let default = if has_identities { CallerAuth::TokenOrCertificate } else { CallerAuth::Token };
        let auth = auth.unwrap_or(default);
        let (services, address) = (services?, address?);
        Some(ListenerSettings {
            name: self.name,
            address,
            services,
            auth,
            allows_anonymous_proxies: open_to_proxies,
            limits,
            tls,
            identities,
        })
    }

    fn parse_address(&self) -> Result<ListenAddress, InvalidSetting> {
        let Some(path) = self.address.strip_prefix("unix:") else {
            if let Some(mode) = &self.mode {
                return Err(invalid_setting(
                    "listener.mode",
                    mode,
                    "is for socket files: address = \"unix:/path\"",
                ));
            }
            check_address_format("listener.address", &self.address)?;
            return Ok(ListenAddress::Tcp(self.address.clone()));
        };
        let path = PathBuf::from(path);
        if !path.is_absolute() {
            return Err(invalid_setting(
                "listener.address",
                &self.address,
                "must be unix:/path with an absolute path",
            ));
        }
        let mode = self.mode.as_ref().map(|mode| {
            let read = u32::from_str_radix(mode, 8).ok().filter(|mode| *mode <= 0o777);
            read.ok_or_else(|| {
                invalid_setting("listener.mode", mode, "must be permissions in octal, such as \"0660\"")
            })
        });
        Ok(ListenAddress::Unix { path, mode: mode.transpose()?.unwrap_or(DEFAULT_SOCKET_MODE) })
    }

    fn validate_limits(&self, services: ServiceSet, problems: &mut ProblemCollector<'_>) -> ConnectionLimits {
        let defaults = ConnectionLimits::for_services(services);
        let mut time = |setting, text: &Option<String>, default, min, max| {
            let Some(text) = text else { return default };
            let bounds = (parse_bound(min), parse_bound(max));
            let read =
                duration::parse_duration(text).ok().filter(|time| (bounds.0..=bounds.1).contains(time));
            let read = read.ok_or_else(|| invalid_setting(setting, text, format!("must be {min} to {max}")));
            problems.ok_or_add(read).unwrap_or(default)
        };
        let limits = ConnectionLimits {
            max_connections: self.max_connections.unwrap_or(defaults.max_connections),
            max_streams: self.max_streams.unwrap_or(defaults.max_streams),
            max_pending_resets: self.pending_resets.unwrap_or(defaults.max_pending_resets),
            max_header_bytes: self.max_headers.unwrap_or(defaults.max_header_bytes),
            handshake_timeout: time(
                "listener.handshake_timeout",
                &self.handshake_timeout,
                defaults.handshake_timeout,
                "100ms",
                "1m",
            ),
            max_idle: time(
                "listener.max_connection_idle",
                &self.max_connection_idle,
                defaults.max_idle,
                "1s",
                "1d",
            ),
            max_age: time(
                "listener.max_connection_age",
                &self.max_connection_age,
                defaults.max_age,
                "1s",
                "7d",
            ),
        };
        for (setting, value, min, max) in [
            ("listener.max_connections", limits.max_connections, 1, 1 << 20),
            ("listener.max_streams", limits.max_streams as usize, 1, 65_535),
            ("listener.pending_resets", limits.max_pending_resets, 1, 65_535),
            ("listener.max_headers", limits.max_header_bytes as usize, 1024, 65_536),
        ] {
            if !(min..=max).contains(&value) {
                problems.add(invalid_setting(setting, &value.to_string(), format!("must be {min} to {max}")));
            }
        }
        limits
    }
}

fn validate_listener_name(name: &str) -> Result<(), InvalidSetting> {
    let slug = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"_-".contains(&byte);
    if (1..=64).contains(&name.len()) && name.bytes().all(slug) {
        Ok(())
    } else {
        Err(invalid_setting("listener.name", name, "must be 1-64 characters of [a-z0-9_-]"))
    }
}

/// Parses a bound from this file, which is always valid.
fn parse_bound(text: &str) -> std::time::Duration {
    duration::parse_duration(text).unwrap_or_default()
}

fn parse_services(names: &[String]) -> Result<ServiceSet, InvalidSetting> {
    let known = || ServiceKind::ALL.map(|(_, name)| name).join(", ");
    if names.is_empty() {
        return Err(invalid_redacted_setting(
            "listener.services",
            format!("must name at least one of {}", known()),
        ));
    }
    let read: Result<ServiceSet, _> = names
        .iter()
        .map(|name| {
            let problem = || format!("must be one of {}", known());
            ServiceKind::parse(name).ok_or_else(|| invalid_setting("listener.services", name, problem()))
        })
        .collect();
    let services = read?;
    if services.contains(ServiceKind::Reflection)
        && !services.contains(ServiceKind::Check)
        && !services.contains(ServiceKind::Management)
    {
        let problem = "is only for listeners that serve check or management";
        return Err(invalid_setting("listener.services", "reflection", problem));
    }
    Ok(services)
}

fn parse_auth_mode(text: &str, has_identities: bool) -> Result<CallerAuth, InvalidSetting> {
    let auth = match text {
        "token" => CallerAuth::Token,
        "certificate" => CallerAuth::Certificate,
        "either" => CallerAuth::TokenOrCertificate,
        "both" => CallerAuth::TokenAndCertificate,
        _ => {
            return Err(invalid_setting("listener.auth", text, "must be token, certificate, either or both"));
        }
    };
    if auth != CallerAuth::Token && !has_identities {
        let problem = "needs a [[listener.identity]]: without one, no certificate is accepted";
        return Err(invalid_setting("listener.auth", text, problem));
    }
    Ok(auth)
}

impl RawTlsFiles {
    fn validate(self, problems: &mut ProblemCollector<'_>) -> TlsFiles {
        let client_auth = match self.client_auth.as_deref() {
            None | Some("required") => ClientAuth::Required,
            Some("optional") => ClientAuth::Optional,
            Some(other) => {
                problems.add(invalid_setting(
                    "listener.tls.client_auth",
                    other,
                    "must be required or optional",
                ));
                ClientAuth::Required
            }
        };
        if let (Some(text), None) = (&self.client_auth, &self.client_ca)
            && problems.is_valid("listener.tls.client_ca")
        {
            let problem = "needs client_ca: the authorities whose certificates are trusted";
            problems.add(invalid_setting("listener.tls.client_auth", text, problem));
        }
        let min_version = match self.min_version.as_deref() {
            None | Some("1.2") => MinTlsVersion::V12,
            Some("1.3") => MinTlsVersion::V13,
            Some(other) => {
                problems.add(invalid_setting(
                    "listener.tls.min_version",
                    other,
                    "must be \"1.2\" or \"1.3\"",
                ));
                MinTlsVersion::V12
            }
        };
        TlsFiles {
            certificate: self.certificate,
            key: self.key,
            client_ca: self.client_ca.map(|path| (path, client_auth)),
            min_version,
        }
    }
}

impl RawIdentity {
    fn validate(self, problems: &mut ProblemCollector<'_>) -> Option<CertificateIdentity> {
        let san = match (&self.uri, &self.dns, &self.email) {
            (Some(uri), None, None) => CertificateName::parse_uri(uri)
                .map_err(|rule| invalid_setting("listener.identity.uri", uri, rule)),
            (None, Some(dns), None) => CertificateName::parse_dns(dns)
                .map_err(|rule| invalid_setting("listener.identity.dns", dns, rule)),
            (None, None, Some(email)) => CertificateName::parse_email(email)
                .map_err(|rule| invalid_setting("listener.identity.email", email, rule)),
            _ => Err(invalid_setting(
                "listener.identity",
                &self.account,
                "must have exactly one of uri, dns and email",
            )),
        };
        let names = ["listener.identity.uri", "listener.identity.dns", "listener.identity.email"];
        // A name of the wrong type still counts as present.
        let san =
            if names.iter().all(|name| problems.is_valid(name)) { problems.ok_or_add(san) } else { san.ok() };
        let account = AccountId::parse(&self.account)
            .map_err(|rule| invalid_setting("listener.identity.account", &self.account, rule));
        let account = problems.ok_or_add(account);
        if self.scopes.is_empty() {
            problems
                .add(invalid_redacted_setting("listener.identity.scopes", "must grant at least one scope"));
        }
        let scope = |scope: &String| {
            Scope::parse_grant(scope).map_err(|rule| invalid_setting("listener.identity.scopes", scope, rule))
        };
        let scopes: Result<ScopeSet, _> = self.scopes.iter().map(scope).collect();
        let scopes = problems.ok_or_add(scopes);
        Some(CertificateIdentity::new(san?, account?, scopes?))
    }
}

/// Checks the form `host:port`; the host is resolved only when the address is bound.
pub(super) fn check_address_format(setting: &'static str, value: &str) -> Result<(), InvalidSetting> {
    let is_host = |host: &str| match host.strip_prefix('[').and_then(|host| host.strip_suffix(']')) {
        // An IPv6 address may carry a zone: fe80::1%eth0.
        Some(address) => address.split('%').next().is_some_and(|ip| ip.parse::<Ipv6Addr>().is_ok()),
        None => {
            !host.is_empty()
                && host.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-._".contains(&byte))
        }
    };
    let well_formed =
        value.rsplit_once(':').is_some_and(|(host, port)| is_host(host) && port.parse::<u16>().is_ok());
    if well_formed {
        Ok(())
    } else {
        Err(invalid_setting(setting, value, "must be host:port, such as 127.0.0.1:50051"))
    }
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;

    use super::*;
    use crate::config::error::ConfigError;

    #[derive(Deserialize)]
    struct ListenersDocument {
        listener: Vec<RawListener>,
    }

    fn parse(text: &str) -> Result<Vec<ListenerSettings>, ConfigError> {
        let listeners = toml::from_str::<ListenersDocument>(text).unwrap().listener;
        ProblemCollector::collect(None, |problems| {
            Some(validate_listeners(listeners, false, false, problems))
        })
    }

    const ENVOY_MTLS: &str = "[[listener]]\nname = 'edge'\naddress = '0.0.0.0:50052'\nservices = ['ext_authz', 'health']\n\
        [listener.tls]\ncertificate = 'c.pem'\nkey = 'k.pem'\nclient_ca = 'ca.pem'\n\
        [[listener.identity]]\nuri = 'spiffe://example.org/envoy'\naccount = 'keyward'\nscopes = ['keyward:check']";

    #[test]
    fn a_listener_is_what_its_table_says_and_usual_otherwise() {
        let [edge] = &parse(ENVOY_MTLS).unwrap()[..] else { panic!() };
        assert_eq!(edge.services, ServiceSet::for_envoy());
        assert_eq!((edge.auth, edge.allows_anonymous_proxies), (CallerAuth::TokenOrCertificate, false));
        assert_eq!(edge.limits, ConnectionLimits::for_services(ServiceSet::for_envoy()));
        let tls = edge.tls.as_ref().unwrap();
        assert_eq!(tls.client_ca, Some((PathBuf::from("ca.pem"), ClientAuth::Required)));
        assert_eq!(tls.min_version, MinTlsVersion::V12);
        assert_eq!(edge.identities[0].actor_name(), "cert:spiffe://example.org/envoy");

        let side = "[[listener]]\nname = 'side'\naddress = 'unix:/run/k.sock'\nservices = ['check', 'health']\nmax_streams = 9";
        let [side] = &parse(side).unwrap()[..] else { panic!() };
        assert_eq!(side.address, ListenAddress::Unix { path: "/run/k.sock".into(), mode: 0o660 });
        assert_eq!((side.auth, side.limits.max_streams), (CallerAuth::Token, 9));
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
            ("services = ['everything']", "must be one of check"),
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
