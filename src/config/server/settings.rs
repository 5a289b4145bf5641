//! The validated settings of a server, as every other module reads them. `server.rs` loads them.

use std::{path::PathBuf, time::Duration};

use super::flags::LogFormat;
use crate::{
    config::{
        lifecycle::LifecycleSettings,
        listeners::{ENVOY_LISTENER, MAIN_LISTENER},
        secret_url::SecretUrl,
        telemetry::TelemetrySettings,
    },
    domain::lease::LeaseDuration,
    engine::limiter::LimitSettings,
    gateway::GatewaySettings,
    keys::KeySettings,
    transport::{ListenerSettings, OverloadLimits, ServiceKind, ServiceSet},
};

/// The validated settings of a server.
#[derive(Clone, Debug)]
pub struct ServerSettings {
    /// The address of the main listener: `host:port`.
    pub listen: String,
    /// Whether every service is served at `listen`: true unless the file has listeners and `listen` is not set.
    pub has_main_listener: bool,
    /// The `[[listener]]` tables of the file.
    pub listeners: Vec<ListenerSettings>,
    /// Whether the main listener answers gRPC reflection.
    pub reflection: bool,
    /// Whether plaintext may be served beyond this machine.
    pub insecure: bool,
    /// Limits on concurrent calls and on memory for requests.
    pub overload: OverloadLimits,
    /// The address of the admin pages: `host:port`.
    pub admin_listen: String,
    /// The database, with the password of `database_password_file`.
    pub database: SecretUrl,
    /// A new file for the root key of a first start; None = the terminal.
    pub root_key_file: Option<PathBuf>,
    /// Whether the root key may be printed to standard output, if that is a terminal.
    pub may_print_root_key: bool,
    /// The number of threads that serve connections.
    pub threads: usize,
    /// The address of the listener for Envoy, if any: `host:port`.
    pub envoy_listen: Option<String>,
    /// The address for proxies that ask over HTTP, if any: `host:port`.
    pub forward_auth_listen: Option<String>,
    /// The file with rules for HTTP requests; it is reloaded when it changes.
    pub rules_file: Option<PathBuf>,
    /// The name of this replica; None = made from the machine and the port.
    pub replica_name: Option<String>,
    /// The lease of a new database; None = the default lease.
    pub lease: Option<LeaseDuration>,
    /// Delays, migration and checks of startup and shutdown.
    pub lifecycle: LifecycleSettings,
    /// How HTTP requests are checked for proxies.
    pub gateway: GatewaySettings,
    /// Where rate limits and quotas are counted.
    pub limits: LimitSettings,
    /// Prefix, environments, default role and account limits of new keys.
    pub key_settings: KeySettings,
    /// How long revoked keys and rotated tokens are distinguished from unknown ones.
    pub retention: Duration,
    /// Traces and the decision log.
    pub telemetry: TelemetrySettings,
    /// A filter of `tracing`, such as `info,keyward=debug`.
    pub log_filter: String,
    /// The format of the log on standard error.
    pub log_format: LogFormat,
}

impl ServerSettings {
    /// All gRPC listeners: the main one, Envoy's, and those of the file.
    #[must_use]
    pub fn grpc_listeners(&self) -> Vec<ListenerSettings> {
        let all = if self.reflection {
            ServiceSet::all()
        } else {
            ServiceSet::all().without(ServiceKind::Reflection)
        };
        let main =
            self.has_main_listener.then(|| ListenerSettings::new_plaintext(MAIN_LISTENER, &self.listen, all));
        let envoy = self.envoy_listen.as_ref();
        let envoy = envoy
            .map(|address| ListenerSettings::new_plaintext(ENVOY_LISTENER, address, ServiceSet::for_envoy()));
        main.into_iter().chain(envoy).chain(self.listeners.iter().cloned()).collect()
    }
}
