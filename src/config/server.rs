//! The server's settings. A flag beats the environment, which beats the file, which beats the default.

mod flags;
mod overlay;
mod values;

use std::{net::Ipv6Addr, num::NonZeroUsize, path::PathBuf, time::Duration};

use schemars::JsonSchema;
use serde::Deserialize;

use crate::{
    domain::{
        account::EnvironmentSet,
        credential_mask::{mask_message, mask_quoted, mask_value},
        lease::LeaseDuration,
    },
    engine::limiter::LimitSettings,
    gateway::GatewaySettings,
    keys::KeySettings,
    transport::{ListenerSettings, OverloadLimits, ServiceKind, ServiceSet},
};

use super::{
    account_limits,
    client::env_var,
    file::ConfigFile,
    lifecycle::LifecycleSettings,
    limits, listeners, preflight,
    problems::{ConfigProblem, ProblemCollector},
    replicas,
    secret_url::SecretUrl,
    telemetry::{self, TelemetrySettings},
};

pub use flags::{ConfigFileArgs, DatabaseArgs, LogFormat, RootKeyArgs, ServeArgs, TelemetryArgs};

const DEFAULT_LISTEN: &str = "127.0.0.1:50051";
pub(super) const DEFAULT_ADMIN_LISTEN: &str = "127.0.0.1:9090";
const DEFAULT_DATABASE: &str = "sqlite:keyward.db";
/// What the listeners of the flags are called.
pub const MAIN_LISTENER: &str = "main";
/// See [`MAIN_LISTENER`].
pub const ENVOY_LISTENER: &str = "envoy";
const DEFAULT_TOKEN_PREFIX: &str = "kw";
const DEFAULT_RETENTION_DAYS: u32 = 90;

/// Why the settings cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("the configuration file {}{} cannot be read: {source}", mask_value(.path), env_source_suffix(.path))]
    Unreadable {
        /// The file.
        path: String,
        /// The cause.
        source: std::io::Error,
    },
    /// Everything that is wrong with the file, the environment and the flags.
    #[error("{}:\n  {}", error_headline(.path.as_deref()), .problems.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n  "))]
    Invalid {
        /// The file, if there is one.
        path: Option<String>,
        /// Each with its place, in the order of their places.
        problems: Vec<ConfigProblem>,
    },
}

/// Names the variable that names the file, if one does.
fn env_source_suffix(path: &str) -> &'static str {
    if env_var("KEYWARD_CONFIG").as_deref() == Some(path) { " (KEYWARD_CONFIG)" } else { "" }
}

/// The line before the problems of settings.
#[must_use]
pub fn error_headline(path: Option<&str>) -> String {
    match path {
        Some(path) => format!("the settings cannot be used (configuration file: {})", mask_value(path)),
        None => "the settings cannot be used".to_owned(),
    }
}

/// A value that breaks its rule. What looks like a credential in it is masked.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{setting}{} {problem}", .value.as_ref().map(|value| format!(" = {value:?}")).unwrap_or_default())]
pub struct InvalidSetting {
    /// The setting.
    pub setting: &'static str,
    /// Its value, masked; None = it is not shown.
    value: Option<String>,
    /// The rule, which may quote pieces of the value; masked too.
    problem: String,
}

/// The settings of a server.
// Unknown keys are refused: a typo must not be a default. What people read of a key is made from the comment here.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(title = "Keyward server settings")]
pub(super) struct RawServerSettings {
    /// Where gRPC is served.
    #[schemars(extend("default" = DEFAULT_LISTEN, "format" = "address"))]
    listen: Option<String>,
    /// Where `/healthz`, `/readyz` and `/metrics` are served over HTTP.
    #[schemars(extend("default" = DEFAULT_ADMIN_LISTEN, "format" = "address"))]
    admin_listen: Option<String>,
    /// Where keys are kept: `sqlite:PATH`, or `postgres://USER@HOST:5432/DEFAULT_DATABASE`. A password is better kept in
    /// `database_password_file` or the environment.
    #[schemars(extend("default" = DEFAULT_DATABASE, "format" = "URL", "x-secret" = true))]
    database: Option<SecretUrl>,
    /// A file that holds the password of the PostgreSQL role, and nothing else; an end of line is no part of it.
    #[schemars(extend("x-default" = "none: as libpq does it, `PGPASSWORD` or `~/.pgpass`", "format" = "file"))]
    database_password_file: Option<PathBuf>,
    /// A new file (mode 0600) that the root key of a first start is written to.
    #[schemars(extend("x-default" = "none: the terminal, or `keyward-root.key` beside the SQLite file (PostgreSQL: in the working directory) if standard output is no terminal", "format" = "file"))]
    root_key_file: Option<PathBuf>,
    /// How many threads serve connections; at most 512.
    #[schemars(extend("x-default" = "one per core"))]
    threads: Option<NonZeroUsize>,
    /// What tokens begin with: 1-16 of `[a-z0-9_]`, a letter first.
    #[schemars(extend("default" = DEFAULT_TOKEN_PREFIX))]
    token_prefix: Option<String>,
    /// The environments that keys are made for, with their short names in tokens.
    #[schemars(extend("default" = EnvironmentSet::default().iter().collect::<Vec<_>>()))]
    environments: Option<Vec<RawEnvironment>>,
    /// The role of keys that are made without scopes and roles.
    #[schemars(extend("x-default" = "none: such keys are refused"))]
    default_role: Option<String>,
    /// How long revoked keys and rotated tokens are told apart from unknown ones.
    #[schemars(extend("default" = DEFAULT_RETENTION_DAYS, "x-unit" = "days"))]
    retention_days: Option<u32>,
    /// Where Envoy's ext_authz and health are served alone, with limits made for Envoy.
    #[schemars(extend("x-default" = "nowhere", "format" = "address"))]
    envoy_listen: Option<String>,
    /// Where nginx, Traefik and others are served that ask over HTTP.
    #[schemars(extend("x-default" = "nowhere", "format" = "address"))]
    forward_auth_listen: Option<String>,
    /// A file that says what HTTP requests need; it is read again when it changes.
    #[schemars(extend("x-default" = "none: routes say what they need", "format" = "file"))]
    rules: Option<PathBuf>,
    /// What this replica is called in reports: 1-255 visible characters.
    #[schemars(extend("x-default" = "the machine's name and the port"))]
    replica_name: Option<String>,
    /// How long replicas of a new PostgreSQL database answer without news from it: `strict` (5s), `default` (60s),
    /// `static` (for ever), or 1s to 1d.
    #[schemars(extend("default" = "default", "format" = "duration"))]
    lease: Option<String>,
    /// How long a server serves on after SIGTERM while health says NOT_SERVING; at most 10m.
    #[schemars(extend("default" = "2s", "format" = "duration"))]
    shutdown_delay: Option<String>,
    /// How long a start waits for a PostgreSQL server that is away; at most 1d.
    #[schemars(extend("default" = "60s", "format" = "duration"))]
    database_wait: Option<String>,
    /// Whether a start migrates an older schema; else it refuses it.
    #[schemars(extend("default" = true, "x-flag" = "no_migrate"))]
    migrate: Option<bool>,
    /// How HTTP requests that proxies ask about are judged ([gateway.md](gateway.md)).
    #[serde(default)]
    gateway: super::gateway::RawGatewaySettings,
    /// How much one account may hold and do ([limits.md](limits.md#account-limits)).
    #[serde(default)]
    account_limits: account_limits::RawAccountLimits,
    /// Where rate limits are counted when several processes serve one database ([limits.md](limits.md)).
    #[serde(default)]
    limits: limits::RawLimitSettings,
    /// Where to serve, each with its own services, limits and TLS ([transport.md](transport.md)).
    #[serde(default, rename = "listener")]
    #[schemars(extend("x-default" = "none: those of `listen` and `envoy_listen`"))]
    listeners: Vec<listeners::RawListener>,
    /// Whether listeners with management services answer gRPC reflection.
    #[schemars(extend("default" = true))]
    reflection: Option<bool>,
    /// Whether plaintext may be served beyond this machine: tokens can then be read on the way.
    #[schemars(extend("default" = false))]
    insecure: Option<bool>,
    /// How many calls there may be at once ([transport.md](transport.md)).
    #[serde(default)]
    overload: listeners::RawOverload,
    /// Traces and what they are told of ([telemetry.md](telemetry.md)).
    #[serde(default)]
    telemetry: telemetry::RawTelemetrySettings,
    /// What becomes of decisions that are written down ([telemetry.md](telemetry.md)).
    decision_log: Option<telemetry::RawDecisionLogSettings>,
}

/// An environment.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct RawEnvironment {
    /// Its name, as requests say it.
    name: String,
    /// Its short name in tokens, of `[a-z0-9]`; may be empty.
    tag: String,
}

/// The server's settings, all valid.
#[derive(Clone, Debug)]
pub struct ServerSettings {
    /// Where to serve gRPC: `host:port`.
    pub listen: String,
    /// Whether everything is served at `listen`; not where the file has listeners and nobody has said `listen`.
    pub has_main_listener: bool,
    /// The listeners of the file.
    pub listeners: Vec<ListenerSettings>,
    /// Whether the main listener describes its services to whoever asks.
    pub reflection: bool,
    /// Whether plaintext may leave this machine.
    pub insecure: bool,
    /// How much may be under way at once.
    pub overload: OverloadLimits,
    /// Where to serve the admin pages: `host:port`.
    pub admin_listen: String,
    /// Where keys are kept.
    pub database: SecretUrl,
    /// Where the root key of a first start goes, if not to the terminal.
    pub root_key_file: Option<PathBuf>,
    /// Whether it may go to standard output, which is a terminal then.
    pub may_print_root_key: bool,
    /// How many threads serve connections.
    pub threads: usize,
    /// Where to serve Envoy alone: `host:port`.
    pub envoy_listen: Option<String>,
    /// Where to serve proxies that ask over HTTP: `host:port`.
    pub forward_auth_listen: Option<String>,
    /// The file with rules for HTTP requests.
    pub rules_file: Option<PathBuf>,
    /// What this replica is called; None = by its machine and port.
    pub replica_name: Option<String>,
    /// The lease of a new database; None = the usual one.
    pub lease: Option<LeaseDuration>,
    /// How it starts and stops.
    pub lifecycle: LifecycleSettings,
    /// How HTTP requests that proxies ask about are judged.
    pub gateway: GatewaySettings,
    /// How rate limits and quotas are counted.
    pub limits: LimitSettings,
    /// What keys look like.
    pub key_settings: KeySettings,
    /// How long revoked keys and superseded tokens are told apart from unknown ones.
    pub retention: Duration,
    /// What is told of calls and decisions.
    pub telemetry: TelemetrySettings,
    /// What is logged: a filter of `tracing`.
    pub log_filter: String,
    /// How the log is written.
    pub log_format: LogFormat,
}

/// What settings are read for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum LoadPurpose {
    /// To run a server here: files that it needs are looked at, and who reaches its listeners.
    Serve,
    /// To know a server's settings, also where its files are not.
    Inspect,
    /// To work on its database: the files that it alone needs are not read.
    Database,
}

impl ServerSettings {
    /// Reads the settings of a server.
    ///
    /// # Errors
    /// With everything that is wrong with them, and what would be right.
    pub fn load(args: &ServeArgs) -> Result<ServerSettings, ConfigError> {
        ServerSettings::resolve(args, ServerSettings::load_file(args)?.as_ref())
    }

    /// The same with the file at hand.
    ///
    /// # Errors
    /// As for [`ServerSettings::load`].
    pub fn resolve(args: &ServeArgs, document: Option<&ConfigFile>) -> Result<ServerSettings, ConfigError> {
        ServerSettings::resolve_for(args, document, LoadPurpose::Inspect)
    }

    /// Reads the settings of a server that starts here: the certificates, rules and other files that it needs are read
    /// too, and plaintext beyond this machine is refused. Opens no socket and no database.
    ///
    /// # Errors
    /// As for [`ServerSettings::load`].
    pub fn load_for_serving(args: &ServeArgs) -> Result<ServerSettings, ConfigError> {
        ServerSettings::resolve_for_serving(args, ServerSettings::load_file(args)?.as_ref())
    }

    /// The same with the file at hand.
    ///
    /// # Errors
    /// As for [`ServerSettings::load`].
    pub fn resolve_for_serving(
        args: &ServeArgs,
        document: Option<&ConfigFile>,
    ) -> Result<ServerSettings, ConfigError> {
        ServerSettings::resolve_for(args, document, LoadPurpose::Serve)
    }

    /// Reads what a command needs that only opens the database.
    ///
    /// # Errors
    /// As for [`ServerSettings::load`].
    pub fn load_for_database(args: &DatabaseArgs) -> Result<ServerSettings, ConfigError> {
        let args = ServeArgs { database: args.clone(), ..ServeArgs::default() };
        ServerSettings::resolve_for(&args, ServerSettings::load_file(&args)?.as_ref(), LoadPurpose::Database)
    }

    fn load_file(args: &ServeArgs) -> Result<Option<ConfigFile>, ConfigError> {
        args.database.config.as_deref().map(ConfigFile::load).transpose()
    }

    fn resolve_for(
        args: &ServeArgs,
        document: Option<&ConfigFile>,
        purpose: LoadPurpose,
    ) -> Result<ServerSettings, ConfigError> {
        let mut file =
            document.map_or_else(|| Ok(RawServerSettings::default()), ConfigFile::deserialize_settings)?;
        if purpose == LoadPurpose::Database {
            file.telemetry.ignore_server_files();
        }
        ProblemCollector::collect(document, |problems| {
            if purpose == LoadPurpose::Database {
                // The environment of the servers may have it, and not that of this command.
                problems.mark_invalid("limits.url");
            }
            file.overlay(args, problems);
            let settings = ServerSettings::validate(args, file, purpose == LoadPurpose::Serve, problems)?;
            if purpose == LoadPurpose::Serve {
                preflight::check_settings(&settings, problems);
            }
            Some(settings)
        })
    }

    /// Every gRPC listener: the main one, Envoy's, and those of the file.
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

    /// Each address is one, and none is given twice.
    fn check_addresses(&self, problems: &mut ProblemCollector<'_>) {
        let all = [
            ("listen", Some(&self.listen).filter(|_| self.has_main_listener)),
            ("admin_listen", Some(&self.admin_listen)),
            ("envoy_listen", self.envoy_listen.as_ref()),
            ("forward_auth_listen", self.forward_auth_listen.as_ref()),
        ];
        let mut taken: Vec<(&str, String)> = Vec::new();
        let mut take = |setting: &'static str, value: &str, problems: &mut ProblemCollector<'_>| {
            let twice = taken.iter().find(|(_, known)| known == value && !value.ends_with(":0"));
            match twice {
                Some(("listener.address", _)) => {
                    problems.add(invalid_setting(setting, value, "is given twice"))
                }
                Some((other, _)) => {
                    problems.add(invalid_setting(setting, value, format!("must differ from {other}")))
                }
                None => taken.push((setting, value.to_owned())),
            }
        };
        for (setting, value) in all.into_iter().filter_map(|(setting, value)| Some((setting, value?))) {
            if problems.ok_or_add(check_address_format(setting, value)).is_some() {
                take(setting, value, problems);
            }
        }
        for (at, listener) in self.listeners.iter().enumerate() {
            let address = listener.address.to_string();
            // Of an entry that is left out, no number is known.
            if problems.is_valid("listener") {
                problems
                    .with_list_entry("listener", at, |problems| take("listener.address", &address, problems));
            }
        }
    }

    /// What a listener for proxies that ask over HTTP cannot do.
    fn check_forward_auth(&self, problems: &mut ProblemCollector<'_>) {
        let Some(address) = &self.forward_auth_listen else { return };
        if self.gateway.credential_query.is_some() {
            let problem = "cannot be served with gateway.credential_query: over HTTP a proxy is not told to take it away";
            problems.add(invalid_setting("forward_auth_listen", address, problem));
        }
        if self.gateway.require_caller {
            let problem =
                "cannot be served with gateway.require_caller: over HTTP a proxy shows no key of its own";
            problems.add(invalid_setting("forward_auth_listen", address, problem));
        }
    }

    /// Judges what the file and the flags give together.
    fn validate(
        args: &ServeArgs,
        file: RawServerSettings,
        for_serving: bool,
        problems: &mut ProblemCollector<'_>,
    ) -> Option<ServerSettings> {
        let insecure = file.insecure.unwrap_or(false);
        let listeners =
            listeners::validate_listeners(file.listeners, insecure || !for_serving, for_serving, problems);
        let keys = values::validate_key_settings(
            file.token_prefix,
            file.environments,
            file.default_role,
            file.account_limits,
            problems,
        )?;
        let password = file.database_password_file.as_deref();
        let database = file.database.unwrap_or_else(|| DEFAULT_DATABASE.into());
        let (log, log_format) = values::validate_log_settings(args, problems);
        let settings = ServerSettings {
            has_main_listener: file.listen.is_some() || listeners.is_empty() && problems.is_valid("listener"),
            listeners,
            reflection: file.reflection.unwrap_or(true),
            insecure,
            overload: file.overload.validate(problems),
            listen: file.listen.unwrap_or_else(|| DEFAULT_LISTEN.to_owned()),
            admin_listen: file.admin_listen.unwrap_or_else(|| DEFAULT_ADMIN_LISTEN.to_owned()),
            database: values::resolve_database_url(database, password, problems),
            root_key_file: file.root_key_file,
            may_print_root_key: true,
            threads: values::validate_threads(file.threads, problems),
            envoy_listen: file.envoy_listen,
            forward_auth_listen: file.forward_auth_listen,
            rules_file: file.rules,
            replica_name: file
                .replica_name
                .and_then(|name| problems.ok_or_add(replicas::validate_replica_name(&name))),
            lease: file.lease.and_then(|lease| problems.ok_or_add(replicas::validate_lease(&lease))),
            lifecycle: LifecycleSettings::validate(
                file.shutdown_delay.as_deref(),
                file.database_wait.as_deref(),
                file.migrate,
                args.lifecycle.require_revision.as_deref(),
                problems,
            ),
            gateway: file.gateway.validate(&keys.environments, problems),
            limits: file.limits.validate(problems),
            key_settings: keys,
            retention: Duration::from_secs(
                u64::from(file.retention_days.unwrap_or(DEFAULT_RETENTION_DAYS)) * 24 * 60 * 60,
            ),
            telemetry: file.telemetry.validate(file.decision_log, &args.telemetry, problems),
            log_filter: log,
            log_format,
        };
        settings.check_addresses(problems);
        settings.check_forward_auth(problems);
        Some(settings)
    }
}

pub(super) fn invalid_setting(setting: &'static str, value: &str, problem: impl ToString) -> InvalidSetting {
    let problem = mask_quoted(&problem.to_string(), value);
    InvalidSetting { setting, value: Some(mask_value(value).into_owned()), problem }
}

/// The same about a value that is not repeated.
pub(super) fn invalid_redacted_setting(setting: &'static str, problem: impl ToString) -> InvalidSetting {
    InvalidSetting { setting, value: None, problem: mask_message(&problem.to_string()).into_owned() }
}

/// `host:port`; whether the host exists shows when it is bound.
pub(super) fn check_address_format(setting: &'static str, value: &str) -> Result<(), InvalidSetting> {
    let is_host = |host: &str| match host.strip_prefix('[').and_then(|host| host.strip_suffix(']')) {
        // An IPv6 address may name its zone: fe80::1%eth0.
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
    use super::*;

    fn settings_from_toml(text: &str) -> Result<ServerSettings, ConfigError> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("keyward.toml");
        std::fs::write(&path, text).unwrap();
        let database = DatabaseArgs { config: Some(path), ..DatabaseArgs::default() };
        ServerSettings::load(&ServeArgs {
            listen: Some("127.0.0.1:1".into()),
            database,
            ..ServeArgs::default()
        })
    }

    #[test]
    fn a_flag_beats_the_file_and_the_file_the_default() {
        let settings = settings_from_toml("listen = '127.0.0.1:2'\nadmin_listen = '127.0.0.1:3'").unwrap();
        assert_eq!(settings.listen, "127.0.0.1:1");
        assert_eq!(settings.admin_listen, "127.0.0.1:3");
        assert_eq!(&*settings.database, "sqlite:keyward.db");
    }

    #[test]
    fn wrong_settings_say_which_and_what_would_be_right() {
        for (text, said) in [
            ("lisen = 'x'", "lisen"),
            ("admin_listen = 'nowhere'", "host:port"),
            ("token_prefix = 'K'", "token_prefix"),
            ("environments = []", "at least one"),
            ("environments = [{ name = 'prod', tag = 'LIVE' }]", "[a-z0-9]"),
            ("retention_days = -1", "from 0 to 4294967295"),
            ("lease = '0s'", "strict (5s)"),
            ("replica_name = ''", "replica_name"),
            ("[account_limits]\nkeys = 0", "1 or more"),
        ] {
            let error = settings_from_toml(text).unwrap_err().to_string();
            assert!(error.contains(said), "{text}: {error}");
        }
    }

    #[test]
    fn a_line_that_may_hold_a_password_is_not_shown() {
        for text in ["[limits]\nulr = 'redis://:sesame@h'", "[limits]\nurl = 'redis://:sesame@h"] {
            let error = settings_from_toml(text).unwrap_err().to_string();
            assert!(error.contains("line 2") && !error.contains("sesame"), "{error}");
        }
    }

    #[test]
    fn a_key_that_is_there_is_judged_beside_a_misspelt_one() {
        let error = settings_from_toml("lease = '0s'\nleas = '5s'").unwrap_err().to_string();
        assert!(error.contains("line 1, column 1: lease = \"0s\"") && error.contains("`leas`"), "{error}");
        // One that is misspelt is not missed by others.
        let error =
            settings_from_toml("[limits]\nbakend = 'redis'\nurl = 'redis://h'").unwrap_err().to_string();
        assert!(error.contains("`limits.bakend`") && !error.contains("has no effect"), "{error}");
    }

    #[test]
    fn environments_and_their_tags_come_from_the_file() {
        let settings =
            settings_from_toml("environments = [{ name = 'prod', tag = '' }]\ntoken_prefix = 'izli_agent'")
                .unwrap();
        assert_eq!(settings.key_settings.environments.names(), "prod");
        assert_eq!(settings.key_settings.prefix.as_str(), "izli_agent");
    }
}
