//! Loads and validates the settings of a server: flags override the environment, which overrides the file, which
//! overrides the defaults.
//!
//! `raw.rs` has the form of the file, `flags.rs` the flags; the modules of the tables validate their values.

pub(super) mod flags;
mod overlay;
pub(super) mod settings;
mod values;

use std::time::Duration;

use super::{
    error::invalid_setting,
    file::ConfigFile,
    lifecycle::LifecycleSettings,
    listeners::{self, check_address_format},
    preflight,
    problems::ProblemCollector,
    raw::{
        DEFAULT_ADMIN_LISTEN, DEFAULT_DATABASE, DEFAULT_LISTEN, DEFAULT_RETENTION_DAYS, RawServerSettings,
    },
    replicas,
};

pub use super::error::ConfigError;
pub(crate) use super::{
    error::error_headline,
    listeners::{ENVOY_LISTENER, MAIN_LISTENER},
};
pub(crate) use flags::{ConfigFileArgs, HealthArgs};
pub use flags::{DatabaseArgs, LogFormat, RootKeyArgs, ServeArgs};
pub use settings::ServerSettings;

/// What settings are loaded for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum LoadPurpose {
    /// Running a server on this machine: its files and addresses are checked too.
    Serve,
    /// Inspecting the settings of a server, also on a machine without its files.
    Inspect,
    /// Working on the database: files that only the server needs are not read.
    Database,
}

impl ServerSettings {
    /// Loads the settings of a server without its files.
    ///
    /// # Errors
    /// All problems of the settings, or the error of reading the file.
    pub fn load(args: &ServeArgs) -> Result<ServerSettings, ConfigError> {
        ServerSettings::resolve(args, ServerSettings::load_file(args)?.as_ref())
    }

    /// Like [`ServerSettings::load`], with a file that is already read.
    ///
    /// # Errors
    /// All problems of the settings.
    pub(crate) fn resolve(
        args: &ServeArgs,
        config_file: Option<&ConfigFile>,
    ) -> Result<ServerSettings, ConfigError> {
        ServerSettings::resolve_for(args, config_file, LoadPurpose::Inspect)
    }

    /// Loads the settings of a server that starts on this machine: also checks its certificates, rules and other files, and
    /// rejects plaintext beyond this machine. Opens no socket and no database.
    ///
    /// # Errors
    /// As for [`ServerSettings::load`].
    pub fn load_for_serving(args: &ServeArgs) -> Result<ServerSettings, ConfigError> {
        ServerSettings::resolve_for_serving(args, ServerSettings::load_file(args)?.as_ref())
    }

    /// Like [`ServerSettings::load_for_serving`], with a file that is already read.
    ///
    /// # Errors
    /// All problems of the settings.
    pub(crate) fn resolve_for_serving(
        args: &ServeArgs,
        config_file: Option<&ConfigFile>,
    ) -> Result<ServerSettings, ConfigError> {
        ServerSettings::resolve_for(args, config_file, LoadPurpose::Serve)
    }

    /// Loads the settings for a command that only opens the database.
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
        config_file: Option<&ConfigFile>,
        purpose: LoadPurpose,
    ) -> Result<ServerSettings, ConfigError> {
        let mut file =
            config_file.map_or_else(|| Ok(RawServerSettings::default()), ConfigFile::deserialize_settings)?;
        if purpose == LoadPurpose::Database {
            file.telemetry.ignore_server_files();
        }
        ProblemCollector::collect(config_file, |problems| {
            if purpose == LoadPurpose::Database {
                // The URL may be set only in the environment of the servers.
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

    /// Checks the form of every address, and that no address is given twice.
    fn check_addresses(&self, problems: &mut ProblemCollector<'_>) {
        let all = [
            ("listen", Some(&self.listen).filter(|_| self.has_main_listener)),
            ("admin_listen", Some(&self.admin_listen)),
            ("envoy_listen", self.envoy_listen.as_ref()),
            ("forward_auth_listen", self.forward_auth_listen.as_ref()),
        ];
        let mut taken: Vec<(&str, String)> = Vec::new();
        let mut take = |setting: &'static str, value: &str, problems: &mut ProblemCollector<'_>| {
            let twice = taken.iter().find(|(_, taken)| taken == value && !value.ends_with(":0"));
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
            // After an invalid entry was dropped, positions no longer match the file.
            if problems.is_valid("listener") {
                problems
                    .with_list_entry("listener", at, |problems| take("listener.address", &address, problems));
            }
        }
    }

    /// Rejects gateway settings that `forward_auth_listen` cannot serve.
    fn check_forward_auth(&self, problems: &mut ProblemCollector<'_>) {
        let Some(address) = &self.forward_auth_listen else { return };
        if self.gateway.credential_query.is_some() {
            let problem = "cannot be served with gateway.credential_query: over HTTP a proxy cannot be asked to remove it";
            problems.add(invalid_setting("forward_auth_listen", address, problem));
        }
        if self.gateway.require_caller {
            let problem = "cannot be served with gateway.require_caller: over HTTP a proxy presents no key";
            problems.add(invalid_setting("forward_auth_listen", address, problem));
        }
    }

    /// Validates the file and the flags together.
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
        let (log_filter, log_format) = values::validate_log_settings(args, problems);
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
            log_filter,
            log_format,
        };
        settings.check_addresses(problems);
        settings.check_forward_auth(problems);
        Some(settings)
    }
}

impl ConfigFileArgs {
    /// Loads the settings for a command that works on the database.
    ///
    /// # Errors
    /// As for [`ServerSettings::load`].
    pub(crate) fn load(&self) -> Result<ServerSettings, ConfigError> {
        ServerSettings::load_for_database(&DatabaseArgs {
            config: self.config.clone(),
            ..DatabaseArgs::default()
        })
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
