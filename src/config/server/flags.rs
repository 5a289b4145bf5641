//! The flags of the commands that read the server's settings, with their environment variables.
//!
//! `server.rs` combines them with the file and the defaults; values are validated there. The doc comments are the help texts.

use std::{path::PathBuf, time::Duration};

use clap::Args;

use crate::{
    config::{duration, raw::DEFAULT_ADMIN_LISTEN, secret_url::SecretUrl},
    domain::name::KeyId,
};

/// The flags of `keyward serve` and of commands that inspect its settings.
#[derive(Args, Clone, Debug, Default)]
pub struct ServeArgs {
    /// Address for gRPC [default: 127.0.0.1:50051]
    #[arg(long, env = "KEYWARD_LISTEN", value_name = "ADDR")]
    pub listen: Option<String>,
    /// Address for /healthz, /readyz and /metrics over HTTP [default: 127.0.0.1:9090]
    #[arg(long, env = "KEYWARD_ADMIN_LISTEN", value_name = "ADDR")]
    pub admin_listen: Option<String>,
    /// Address for only Envoy's ext_authz and health, with limits suited to Envoy [default: nowhere]
    #[arg(long, env = "KEYWARD_ENVOY_LISTEN", value_name = "ADDR")]
    pub envoy_listen: Option<String>,
    /// Address for nginx, Traefik and other proxies that ask over HTTP [default: nowhere]
    #[arg(long, env = "KEYWARD_FORWARD_AUTH_LISTEN", value_name = "ADDR")]
    pub forward_auth_listen: Option<String>,
    /// Serve plaintext to other machines too, if something else protects the network
    #[arg(long, env = "KEYWARD_INSECURE", value_name = "BOOL", num_args = 0..=1, default_missing_value = "true")]
    pub insecure: Option<String>,
    /// A TOML file with the requirements of HTTP requests; reloaded when it changes
    #[arg(long, env = "KEYWARD_RULES", value_name = "FILE")]
    pub rules: Option<PathBuf>,
    /// Write the root key of a first start to this new file (mode 0600) [default: the terminal; without one,
    /// keyward-root.key next to the SQLite file, or in the working directory]
    #[arg(long, env = "KEYWARD_ROOT_KEY_FILE", value_name = "PATH")]
    pub root_key_file: Option<PathBuf>,
    /// The name of this replica in reports [default: the machine's name and the port]
    #[arg(long, env = "KEYWARD_REPLICA_NAME", value_name = "NAME")]
    pub replica_name: Option<String>,
    /// How long replicas of a new PostgreSQL database answer without contact to it: strict (5s), default (60s), static
    /// (forever), or a duration [default: default]
    #[arg(long, env = "KEYWARD_LEASE", value_name = "LEASE")]
    pub lease: Option<String>,
    /// The Redis that counts rate limits, with `[limits] backend = "redis"`, such as redis://127.0.0.1:6379
    #[arg(long, env = "KEYWARD_LIMITS_URL", value_name = "URL", hide_env_values = true)]
    pub limits_url: Option<SecretUrl>,
    /// The flags of startup and shutdown.
    #[command(flatten)]
    pub lifecycle: LifecycleArgs,
    /// The number of threads that serve connections; at most 512 [default: one per core]
    #[arg(long, env = "KEYWARD_THREADS", value_name = "N")]
    pub threads: Option<String>,
    /// The format of the log on standard error: text or json [default: text]
    #[arg(long, env = "KEYWARD_LOG_FORMAT", value_name = "FORMAT")]
    pub log_format: Option<String>,
    /// The log level: error, warn, info, debug, or a filter such as info,keyward=debug [default: info]
    #[arg(long, env = "KEYWARD_LOG", value_name = "FILTER")]
    pub log: Option<String>,
    /// The flags of trace export, with the standard variables of OpenTelemetry.
    #[command(flatten)]
    pub telemetry: TelemetryArgs,
    /// The flags of the database and the configuration file.
    #[command(flatten)]
    pub database: DatabaseArgs,
}

#[derive(Args, Clone, Debug, Default)]
pub struct LifecycleArgs {
    /// How long to keep serving after SIGTERM while health reports NOT_SERVING [default: 2s]
    #[arg(long, env = "KEYWARD_SHUTDOWN_DELAY", value_name = "DURATION")]
    pub shutdown_delay: Option<String>,
    /// How long a start waits for an unreachable PostgreSQL server [default: 60s]
    #[arg(long, env = "KEYWARD_DATABASE_WAIT", value_name = "DURATION")]
    pub database_wait: Option<String>,
    /// Do not start on an older schema; 'keyward migrate' updates it
    #[arg(long, env = "KEYWARD_NO_MIGRATE", value_name = "BOOL", num_args = 0..=1, default_missing_value = "true")]
    pub no_migrate: Option<String>,
    /// Do not start on a database that is older than this revision, such as a restored backup
    #[arg(long, env = "KEYWARD_REQUIRE_REVISION", value_name = "REVISION")]
    pub require_revision: Option<String>,
}

#[derive(Args, Clone, Debug, Default)]
pub struct TelemetryArgs {
    /// The collector that receives traces over OTLP/gRPC, such as http://127.0.0.1:4317 [default: none]
    #[arg(long, env = "KEYWARD_OTLP_ENDPOINT", value_name = "URL", hide_env_values = true)]
    pub otlp_endpoint: Option<String>,
    /// The standard variable of OpenTelemetry; Keyward's own settings override it.
    #[arg(long, env = "OTEL_EXPORTER_OTLP_ENDPOINT", hide = true, hide_env_values = true)]
    pub otel_endpoint: Option<String>,
    /// The standard variable of OpenTelemetry; `telemetry.service_name` overrides it.
    #[arg(long, env = "OTEL_SERVICE_NAME", hide = true)]
    pub otel_service_name: Option<String>,
}

/// The flags of `keyward root-key reset`.
#[derive(Args, Clone, Debug, Default)]
pub struct RootKeyArgs {
    /// Write the new root key to this new file (mode 0600) instead of the terminal; `-` is standard output, even if
    /// that is no terminal
    #[arg(long, env = "KEYWARD_ROOT_KEY_FILE", value_name = "PATH")]
    pub root_key_file: Option<PathBuf>,
    /// Do not ask for confirmation
    #[arg(long, short)]
    pub yes: bool,
    /// Revoke every key that descends from the lost root key by creation or rotation. Without this flag the keys are
    /// listed
    #[arg(long)]
    pub revoke_descendants: bool,
    /// The id of the lost root key, if an earlier reset has replaced it [default: the newest root key]
    #[arg(long, value_name = "KEY_ID", value_parser = KeyId::parse)]
    pub lost: Option<KeyId>,
    /// The flags of the database and the configuration file.
    #[command(flatten)]
    pub database: DatabaseArgs,
}

/// The flags of every command that opens the database.
#[derive(Args, Clone, Debug, Default)]
pub struct DatabaseArgs {
    /// The database of the keys, such as sqlite:keyward.db [default: sqlite:keyward.db]
    #[arg(long, env = "KEYWARD_DATABASE", value_name = "URL", hide_env_values = true)]
    pub database: Option<SecretUrl>,
    /// A file that holds only the password of the PostgreSQL role [default: none]
    #[arg(long, env = "KEYWARD_DATABASE_PASSWORD_FILE", value_name = "FILE")]
    pub database_password_file: Option<PathBuf>,
    /// A TOML file with settings
    #[arg(long, env = "KEYWARD_CONFIG", value_name = "FILE")]
    pub config: Option<PathBuf>,
}

/// The flag of a command that only reads the server's settings.
#[derive(Args, Clone, Debug, Default)]
pub(crate) struct ConfigFileArgs {
    /// The TOML file with the settings of the server
    #[arg(long, env = "KEYWARD_CONFIG", value_name = "FILE")]
    pub config: Option<PathBuf>,
}

#[derive(Args, Clone, Debug)]
pub(crate) struct HealthArgs {
    /// The address of the server's admin pages
    #[arg(long, env = "KEYWARD_ADMIN_LISTEN", value_name = "ADDR", default_value = DEFAULT_ADMIN_LISTEN)]
    pub admin_listen: String,
    /// How long to wait for a response
    #[arg(long, value_name = "DURATION", value_parser = duration::parse_timeout, default_value = "2s")]
    pub timeout: Duration,
}

/// The format of the log.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LogFormat {
    /// Lines for people, with colors on a terminal.
    #[default]
    Text,
    /// One JSON object per line.
    Json,
}
