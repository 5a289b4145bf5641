//! The server's settings. A flag beats the environment, which beats the file, which beats the default.

mod flags;

use std::{
    num::NonZeroUsize,
    path::{Path, PathBuf},
    time::Duration,
};

use schemars::JsonSchema;
use serde::Deserialize;

use crate::{
    domain::{
        account::{Environment, Environments},
        lease::Lease,
        name::{RoleName, TokenPrefix},
    },
    engine::limiter::LimitSettings,
    gateway::GatewaySettings,
    keys::KeySettings,
    transport::{Listener, Overload, Service, Services},
};

use super::{
    account_limits,
    document::{Document, Problem},
    lifecycle::Lifecycle,
    limits, listeners, replicas,
    secret::SecretUrl,
    telemetry::{self, TelemetrySettings},
};

pub use flags::{ConfigArgs, DatabaseArgs, LogFormat, RootKeyArgs, ServeArgs, TelemetryArgs};

const LISTEN: &str = "127.0.0.1:50051";
pub(super) const ADMIN_LISTEN: &str = "127.0.0.1:9090";
const DATABASE: &str = "sqlite:keyward.db";
/// What the listeners of the flags are called.
pub const MAIN: &str = "main";
/// See [`MAIN`].
pub const ENVOY: &str = "envoy";
const PREFIX: &str = "kw";
const RETENTION_DAYS: u32 = 90;

/// Why the settings cannot be used: which, and what would be right.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("the configuration file {path} cannot be read: {source}")]
    Unreadable {
        /// The file.
        path: String,
        /// The cause.
        source: std::io::Error,
    },
    /// The file is not what it should be: everything that is wrong with it.
    #[error("the configuration file {path} is wrong:\n  {}", .problems.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n  "))]
    Wrong {
        /// The file.
        path: String,
        /// Each with its place.
        problems: Vec<Problem>,
    },
    /// A value is out of its rule.
    #[error("{setting} = {value:?} {problem}")]
    Invalid {
        /// The setting.
        setting: &'static str,
        /// Its value.
        value: String,
        /// The rule.
        problem: String,
    },
}

impl ConfigError {
    /// The setting that is wrong, and what is said of it.
    fn in_file(&self) -> Option<(&'static str, String)> {
        match self {
            ConfigError::Invalid { setting, .. } => Some((setting, self.to_string())),
            _ => None,
        }
    }
}

/// The settings of a server.
// Unknown keys are refused: a typo must not be a default. What people read of a key is made from the comment here.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct File {
    /// Where gRPC is served.
    #[schemars(extend("default" = LISTEN, "format" = "address"))]
    listen: Option<String>,
    /// Where `/healthz`, `/readyz` and `/metrics` are served over HTTP.
    #[schemars(extend("default" = ADMIN_LISTEN, "format" = "address"))]
    admin_listen: Option<String>,
    /// Where keys are kept: `sqlite:PATH`, or `postgres://USER@HOST:5432/DATABASE`. A password is better kept in
    /// `database_password_file` or the environment.
    #[schemars(extend("default" = DATABASE, "format" = "URL", "x-secret" = true))]
    database: Option<SecretUrl>,
    /// A file that holds the password of the PostgreSQL role, and nothing else; an end of line is no part of it.
    #[schemars(extend("x-default" = "none: as libpq does it, `PGPASSWORD` or `~/.pgpass`", "format" = "file"))]
    database_password_file: Option<PathBuf>,
    /// A new file (mode 0600) that the root key of a first start is written to.
    #[schemars(extend("x-default" = "none: the terminal, or `keyward-root.key` beside the SQLite file (PostgreSQL: in the working directory) if standard output is no terminal", "format" = "file"))]
    root_key_file: Option<PathBuf>,
    /// How many threads serve connections.
    #[schemars(extend("x-default" = "one per core"))]
    threads: Option<NonZeroUsize>,
    /// What tokens begin with: 1-16 of `[a-z0-9_]`, a letter first.
    #[schemars(extend("default" = PREFIX))]
    token_prefix: Option<String>,
    /// The environments that keys are made for, with their short names in tokens.
    #[schemars(with = "Vec<EnvironmentFile>")]
    #[schemars(extend("default" = Environments::default().iter().collect::<Vec<_>>()))]
    environments: Option<Vec<Environment>>,
    /// The role of keys that are made without scopes and roles.
    #[schemars(extend("x-default" = "none: such keys are refused"))]
    default_role: Option<String>,
    /// How long revoked keys and rotated tokens are told apart from unknown ones.
    #[schemars(extend("default" = RETENTION_DAYS, "x-unit" = "days"))]
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
    gateway: super::gateway::File,
    /// How much one account may hold and do ([limits.md](limits.md#account-limits)).
    #[serde(default)]
    account_limits: account_limits::File,
    /// Where rate limits are counted when several processes serve one database ([limits.md](limits.md)).
    #[serde(default)]
    limits: limits::File,
    /// Where to serve, each with its own services, limits and TLS ([transport.md](transport.md)).
    #[serde(default, rename = "listener")]
    #[schemars(extend("x-default" = "none: those of `listen` and `envoy_listen`"))]
    listeners: Vec<listeners::File>,
    /// Whether listeners with management services answer gRPC reflection.
    #[schemars(extend("default" = true))]
    reflection: Option<bool>,
    /// Whether plaintext may be served beyond this machine: tokens can then be read on the way.
    #[schemars(extend("default" = false))]
    insecure: Option<bool>,
    /// How many calls there may be at once ([transport.md](transport.md)).
    #[serde(default)]
    overload: listeners::OverloadFile,
    /// Traces and what they are told of ([telemetry.md](telemetry.md)).
    #[serde(default)]
    telemetry: telemetry::File,
    /// What becomes of decisions that are written down ([telemetry.md](telemetry.md)).
    decision_log: Option<telemetry::DecisionsFile>,
}

/// An environment as the file has it; `domain` knows nothing of schemas.
#[derive(JsonSchema)]
#[expect(dead_code, reason = "only its description is used")]
struct EnvironmentFile {
    /// Its name, as requests say it.
    name: String,
    /// Its short name in tokens, of `[a-z0-9]`; may be empty.
    tag: String,
}

/// What of the file is read together with flags.
struct Rest {
    limits: limits::File,
    telemetry: telemetry::File,
    decision_log: Option<telemetry::DecisionsFile>,
}

/// The server's settings, all valid.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Where to serve gRPC: `host:port`.
    pub listen: String,
    /// Whether everything is served at `listen`; not where the file has listeners and nobody has said `listen`.
    pub main_listener: bool,
    /// The listeners of the file.
    pub listeners: Vec<Listener>,
    /// Whether the main listener describes its services to whoever asks.
    pub reflection: bool,
    /// Whether plaintext may leave this machine.
    pub insecure: bool,
    /// How much may be under way at once.
    pub overload: Overload,
    /// Where to serve the admin pages: `host:port`.
    pub admin_listen: String,
    /// Where keys are kept.
    pub database: SecretUrl,
    /// Where the root key of a first start goes, if not to the terminal.
    pub root_key_file: Option<PathBuf>,
    /// Whether it may go to standard output, which is a terminal then.
    pub shows_root_key: bool,
    /// How many threads serve connections.
    pub threads: usize,
    /// Where to serve Envoy alone: `host:port`.
    pub envoy_listen: Option<String>,
    /// Where to serve proxies that ask over HTTP: `host:port`.
    pub forward_auth_listen: Option<String>,
    /// The file with rules for HTTP requests.
    pub rules: Option<PathBuf>,
    /// What this replica is called; None = by its machine and port.
    pub replica_name: Option<String>,
    /// The lease of a new database; None = the usual one.
    pub lease: Option<Lease>,
    /// How it starts and stops.
    pub lifecycle: Lifecycle,
    /// How HTTP requests that proxies ask about are judged.
    pub gateway: GatewaySettings,
    /// How rate limits and quotas are counted.
    pub limits: LimitSettings,
    /// What keys look like.
    pub keys: KeySettings,
    /// How long revoked keys and superseded tokens are told apart from unknown ones.
    pub retention: Duration,
    /// What is told of calls and decisions.
    pub telemetry: TelemetrySettings,
}

impl Settings {
    /// Reads the settings of a server.
    ///
    /// # Errors
    /// When the file or a value is wrong; the error says which and what would be right, and of a file everything.
    pub fn load(args: &ServeArgs) -> Result<Settings, ConfigError> {
        let document = args.database.config.as_deref().map(Document::read).transpose()?;
        Settings::of(args, document.as_ref())
    }

    /// The same with the file at hand.
    ///
    /// # Errors
    /// As for [`Settings::load`].
    pub fn of(args: &ServeArgs, document: Option<&Document>) -> Result<Settings, ConfigError> {
        let Some(document) = document else { return Settings::assemble(args, File::default()) };
        every_problem(document, |file| Settings::assemble(args, file))
    }

    fn assemble(args: &ServeArgs, file: File) -> Result<Settings, ConfigError> {
        let (mut settings, rest) = Settings::read(&args.database, file)?;
        settings.limits = rest.limits.read(args.limits_url.as_ref())?;
        settings.telemetry = rest.telemetry.read(rest.decision_log, &args.telemetry)?;
        let replace = |slot: &mut String, flag: &Option<String>| {
            if let Some(flag) = flag {
                slot.clone_from(flag);
            }
        };
        replace(&mut settings.listen, &args.listen);
        settings.main_listener |= args.listen.is_some();
        settings.insecure = args.insecure.unwrap_or(settings.insecure);
        replace(&mut settings.admin_listen, &args.admin_listen);
        let replace_some = |slot: &mut Option<String>, flag: &Option<String>| {
            if flag.is_some() {
                slot.clone_from(flag);
            }
        };
        replace_some(&mut settings.envoy_listen, &args.envoy_listen);
        replace_some(&mut settings.forward_auth_listen, &args.forward_auth_listen);
        if args.root_key_file.is_some() {
            settings.root_key_file.clone_from(&args.root_key_file);
        }
        if args.rules.is_some() {
            settings.rules.clone_from(&args.rules);
        }
        if let Some(name) = &args.replica_name {
            settings.replica_name = Some(replicas::read_name(name)?);
        }
        if let Some(lease) = &args.lease {
            settings.lease = Some(replicas::read_lease(lease)?);
        }
        if let Some(threads) = args.threads {
            settings.threads = threads.get();
        }
        settings.lifecycle.flags(&args.lifecycle)?;
        settings.addresses()?;
        if settings.gateway.credential_query.is_some()
            && let Some(address) = &settings.forward_auth_listen
        {
            let problem = "cannot be served with gateway.credential_query: over HTTP a proxy is not told to take it away";
            return Err(invalid("forward_auth_listen", address, problem));
        }
        if settings.gateway.require_caller
            && let Some(address) = &settings.forward_auth_listen
        {
            let problem =
                "cannot be served with gateway.require_caller: over HTTP a proxy shows no key of its own";
            return Err(invalid("forward_auth_listen", address, problem));
        }
        Ok(settings)
    }

    /// Every gRPC listener: the main one, Envoy's, and those of the file.
    #[must_use]
    pub fn grpc_listeners(&self) -> Vec<Listener> {
        let all =
            if self.reflection { Services::all() } else { Services::all().without(Service::Reflection) };
        let main = self.main_listener.then(|| Listener::plain(MAIN, &self.listen, all));
        let envoy = self.envoy_listen.as_ref();
        let envoy = envoy.map(|address| Listener::plain(ENVOY, address, Services::envoy()));
        main.into_iter().chain(envoy).chain(self.listeners.iter().cloned()).collect()
    }

    /// Each address is one, and none is given twice.
    fn addresses(&self) -> Result<(), ConfigError> {
        let all = [
            ("listen", Some(&self.listen).filter(|_| self.main_listener)),
            ("admin_listen", Some(&self.admin_listen)),
            ("envoy_listen", self.envoy_listen.as_ref()),
            ("forward_auth_listen", self.forward_auth_listen.as_ref()),
        ];
        let mut taken: Vec<(&str, &str)> = Vec::new();
        for (setting, value) in all.into_iter().filter_map(|(setting, value)| Some((setting, value?))) {
            address(setting, value)?;
            let twice = taken.iter().find(|(_, known)| known == value && !value.ends_with(":0"));
            if let Some((other, _)) = twice {
                return Err(invalid(setting, value, format!("must differ from {other}")));
            }
            taken.push((setting, value));
        }
        let listeners: Vec<_> = self.listeners.iter().map(|listener| listener.address.to_string()).collect();
        for (at, address) in listeners.iter().enumerate() {
            let among = |value: &&str| *value == address && !value.ends_with(":0");
            let twice =
                taken.iter().map(|(_, value)| *value).chain(listeners[..at].iter().map(String::as_str));
            if twice.into_iter().any(|value| among(&value)) {
                return Err(invalid("listener.address", address, "is given twice"));
            }
        }
        Ok(())
    }

    /// Reads what a command needs that only opens the database.
    ///
    /// # Errors
    /// As for [`Settings::load`].
    pub fn load_database(args: &DatabaseArgs) -> Result<Settings, ConfigError> {
        let read = |file| Settings::read(args, file).map(|(settings, _)| settings);
        match args.config.as_deref().map(Document::read).transpose()? {
            Some(document) => every_problem(&document, read),
            None => read(File::default()),
        }
    }

    /// The settings without what takes a flag too.
    fn read(args: &DatabaseArgs, file: File) -> Result<(Settings, Rest), ConfigError> {
        let prefix = file.token_prefix.as_deref().unwrap_or(PREFIX);
        let prefix = TokenPrefix::parse(prefix).map_err(|error| invalid("token_prefix", prefix, error))?;
        let environments = match file.environments {
            Some(list) => Environments::new(list).map_err(|error| invalid("environments", "", error))?,
            None => Environments::default(),
        };
        let default_role = file
            .default_role
            .as_deref()
            .map(|role| RoleName::parse(role).map_err(|error| invalid("default_role", role, error)));
        let default_role = default_role.transpose()?;
        let retention = file.retention_days.unwrap_or(RETENTION_DAYS);
        let gateway = file.gateway.read(&environments)?;
        let listeners = listeners::read(file.listeners)?;
        let database = args.database.clone().or(file.database).unwrap_or_else(|| DATABASE.into());
        let password = args.database_password_file.as_ref().or(file.database_password_file.as_ref());
        let database =
            password.map_or_else(|| Ok(database.clone()), |file| with_password(&database, file))?;
        let settings = Settings {
            main_listener: file.listen.is_some() || listeners.is_empty(),
            listeners,
            reflection: file.reflection.unwrap_or(true),
            insecure: file.insecure.unwrap_or(false),
            overload: file.overload.read()?,
            listen: file.listen.unwrap_or_else(|| LISTEN.to_owned()),
            admin_listen: file.admin_listen.unwrap_or_else(|| ADMIN_LISTEN.to_owned()),
            database,
            root_key_file: file.root_key_file,
            shows_root_key: true,
            threads: file
                .threads
                .or_else(|| std::thread::available_parallelism().ok())
                .map_or(1, NonZeroUsize::get),
            envoy_listen: file.envoy_listen,
            forward_auth_listen: file.forward_auth_listen,
            rules: file.rules,
            replica_name: file.replica_name.as_deref().map(replicas::read_name).transpose()?,
            lease: file.lease.as_deref().map(replicas::read_lease).transpose()?,
            lifecycle: Lifecycle::from_file(
                file.shutdown_delay.as_deref(),
                file.database_wait.as_deref(),
                file.migrate,
            )?,
            gateway,
            limits: LimitSettings::default(),
            keys: KeySettings {
                environments,
                prefix,
                default_role,
                account_limits: file.account_limits.read(),
            },
            retention: Duration::from_secs(u64::from(retention) * 24 * 60 * 60),
            telemetry: TelemetrySettings::default(),
        };
        let (limits, telemetry, decision_log) = (file.limits, file.telemetry, file.decision_log);
        Ok((settings, Rest { limits, telemetry, decision_log }))
    }
}

pub(super) fn invalid(setting: &'static str, value: &str, problem: impl ToString) -> ConfigError {
    ConfigError::Invalid { setting, value: value.to_owned(), problem: problem.to_string() }
}

/// `host:port`; whether the host exists shows when it is bound.
pub(super) fn address(setting: &'static str, value: &str) -> Result<(), ConfigError> {
    let well_formed =
        value.rsplit_once(':').is_some_and(|(host, port)| !host.is_empty() && port.parse::<u16>().is_ok());
    if well_formed {
        Ok(())
    } else {
        Err(invalid(setting, value, "must be host:port, such as 127.0.0.1:50051"))
    }
}

/// The database's URL with the password from a file.
fn with_password(database: &SecretUrl, file: &Path) -> Result<SecretUrl, ConfigError> {
    let wrong =
        |problem: String| Err(invalid("database_password_file", &file.display().to_string(), problem));
    if !database.starts_with("postgres") {
        return wrong("has no effect: database is no postgres:// URL".to_owned());
    }
    if database.has_password() {
        return wrong("is one password too many: take the other one out of the URL in database".to_owned());
    }
    match std::fs::read_to_string(file) {
        Err(error) => wrong(format!("cannot be read: {error}")),
        Ok(text) => match text.trim_end_matches(['\r', '\n']) {
            "" => wrong("is empty; it must hold the password alone".to_owned()),
            password => Ok(database.with_password(password)),
        },
    }
}

/// Reads a file's settings. If a value is wrong, all that are: a key that is wrong is left out, and the rest read again.
/// Of a table only the first is told, since its other keys may be right or wrong by it.
fn every_problem<T>(
    document: &Document,
    read: impl Fn(File) -> Result<T, ConfigError>,
) -> Result<T, ConfigError> {
    let first = match read(document.file()?) {
        Err(error) => error,
        good => return good,
    };
    let (mut problems, mut left_out) = (Vec::new(), Vec::new());
    let mut said = Some(first.in_file());
    while let Some(Some((setting, text))) = said {
        let top = setting.split('.').next().unwrap_or_default().to_owned();
        if document.line(setting).is_none() || left_out.contains(&top) {
            break;
        }
        left_out.push(top);
        let next = read(document.file_without(&left_out)?).err().map(|error| error.in_file());
        // What is still wrong without the key came from elsewhere: a flag, the environment.
        if next.as_ref().is_some_and(|next| next.as_ref().is_some_and(|(_, again)| *again == text)) {
            break;
        }
        problems.push(document.problem_of(setting, text));
        said = next;
    }
    if problems.is_empty() {
        return Err(first);
    }
    problems.sort_by_key(|problem| (problem.line, problem.column));
    Err(document.wrong(problems))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn from_file(text: &str) -> Result<Settings, ConfigError> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("keyward.toml");
        std::fs::write(&path, text).unwrap();
        let database = DatabaseArgs { config: Some(path), ..DatabaseArgs::default() };
        Settings::load(&ServeArgs { listen: Some("127.0.0.1:1".into()), database, ..ServeArgs::default() })
    }

    #[test]
    fn a_flag_beats_the_file_and_the_file_the_default() {
        let settings = from_file("listen = '127.0.0.1:2'\nadmin_listen = '127.0.0.1:3'").unwrap();
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
            ("retention_days = -1", "retention_days"),
            ("lease = '0s'", "strict (5s)"),
            ("replica_name = ''", "replica_name"),
            ("[account_limits]\nkeys = 0", "nonzero"),
        ] {
            let error = from_file(text).unwrap_err().to_string();
            assert!(error.contains(said), "{text}: {error}");
        }
    }

    #[test]
    fn a_line_that_may_hold_a_password_is_not_shown() {
        for text in ["[limits]\nulr = 'redis://:sesame@h'", "[limits]\nurl = 'redis://:sesame@h"] {
            let error = from_file(text).unwrap_err().to_string();
            assert!(error.contains("line 2") && !error.contains("sesame"), "{error}");
        }
    }

    #[test]
    fn environments_and_their_tags_come_from_the_file() {
        let settings =
            from_file("environments = [{ name = 'prod', tag = '' }]\ntoken_prefix = 'izli_agent'").unwrap();
        assert_eq!(settings.keys.environments.names(), "prod");
        assert_eq!(settings.keys.prefix.as_str(), "izli_agent");
    }
}
