//! Validates single settings of the server: keys, the database URL, threads and the log.

use std::{num::NonZeroUsize, path::Path};

use tracing_subscriber::EnvFilter;

use super::flags::{LogFormat, ServeArgs};
use crate::{
    config::{
        error::{InvalidSetting, invalid_redacted_setting, invalid_setting},
        problems::ProblemCollector,
        raw::{DEFAULT_TOKEN_PREFIX, RawAccountLimits, RawEnvironment},
        secret_url::SecretUrl,
    },
    domain::{
        account::{Environment, EnvironmentSet},
        connection_url::SECRET_MASK,
        name::{EnvironmentName, RoleName, TokenPrefix, TokenTag},
    },
    keys::KeySettings,
    store::{self, OpenError},
};

/// More threads would only take memory and file descriptors from connections.
const MAX_THREADS: usize = 512;

pub(super) fn validate_threads(given: Option<NonZeroUsize>, problems: &mut ProblemCollector<'_>) -> usize {
    if let Some(threads) = given.filter(|threads| threads.get() > MAX_THREADS) {
        let problem = format!("must be 1 to {MAX_THREADS}; leave it out for one per core");
        problems.add(invalid_setting("threads", &threads.to_string(), problem));
    }
    let threads = given.or_else(|| std::thread::available_parallelism().ok());
    threads.map_or(1, NonZeroUsize::get).min(MAX_THREADS)
}

/// Validates the settings of new keys. None = there is no valid token prefix to continue with.
pub(super) fn validate_key_settings(
    prefix: Option<String>,
    environments: Option<Vec<RawEnvironment>>,
    default_role: Option<String>,
    account_limits: RawAccountLimits,
    problems: &mut ProblemCollector<'_>,
) -> Option<KeySettings> {
    let text = prefix.as_deref().unwrap_or(DEFAULT_TOKEN_PREFIX);
    let prefix = TokenPrefix::parse(text).map_err(|error| invalid_setting("token_prefix", text, error));
    let prefix = problems.ok_or_add(prefix).or_else(|| TokenPrefix::parse(DEFAULT_TOKEN_PREFIX).ok())?;
    let environments = environments.and_then(|list| validate_environments(list, problems));
    let default_role = default_role.and_then(|role| {
        let read = RoleName::parse(&role).map_err(|error| invalid_setting("default_role", &role, error));
        problems.ok_or_add(read)
    });
    Some(KeySettings {
        environments: environments.unwrap_or_default(),
        prefix,
        default_role,
        account_limits: account_limits.into_account_limits(),
    })
}

fn validate_environments(
    list: Vec<RawEnvironment>,
    problems: &mut ProblemCollector<'_>,
) -> Option<EnvironmentSet> {
    let count = list.len();
    let mut read = Vec::with_capacity(count);
    for (at, RawEnvironment { name, tag }) in list.into_iter().enumerate() {
        problems.with_list_entry("environments", at, |problems| {
            let parsed = EnvironmentName::parse(&name)
                .map_err(|rule| invalid_setting("environments.name", &name, rule));
            let parsed_tag =
                TokenTag::parse(&tag).map_err(|rule| invalid_setting("environments.tag", &tag, rule));
            let (name, tag) = (problems.ok_or_add(parsed), problems.ok_or_add(parsed_tag));
            read.extend(name.zip(tag).map(|(name, tag)| Environment { name, tag }));
        });
    }
    // Names of environments are not checked against an incomplete list.
    if read.len() < count {
        problems.mark_invalid("environments");
        return None;
    }
    problems.ok_or_add(
        EnvironmentSet::new(read)
            .map_err(|error| invalid_redacted_setting("environments", format!("are wrong: {error}"))),
    )
}

/// Validates the database URL and adds the password from `database_password_file`.
pub(super) fn resolve_database_url(
    database: SecretUrl,
    file: Option<&Path>,
    problems: &mut ProblemCollector<'_>,
) -> SecretUrl {
    if let Err(error) = store::check_url(&database) {
        let (shown, problem) = match &error {
            OpenError::Url { shown, problem } => (shown.as_str(), problem.clone()),
            other => ("", other.to_string()),
        };
        let shown = if shown.is_empty() { String::new() } else { format!("= {shown}") };
        problems.add(invalid_redacted_setting("database", format!("{shown}{problem}")));
        return database;
    }
    let Some(file) = file else { return database };
    problems.ok_or_add(add_password_from_file(&database, file)).unwrap_or(database)
}

fn add_password_from_file(database: &SecretUrl, file: &Path) -> Result<SecretUrl, InvalidSetting> {
    // A password given in place of its file must not be shown; only a value that looks like a path is.
    let shown = file.display().to_string();
    let shown = if shown.contains('/') || file.exists() { &shown } else { SECRET_MASK };
    let wrong = |problem: String| Err(invalid_setting("database_password_file", shown, problem));
    if !database.starts_with("postgres") {
        return wrong("has no effect: database is no postgres:// URL".to_owned());
    }
    if database.has_password() {
        return wrong("is one password too many: remove the other one from the URL in database".to_owned());
    }
    match std::fs::read_to_string(file) {
        Err(error) => {
            wrong(format!("cannot be read: {error}; it must be the path of a file, not the password"))
        }
        Ok(text) => match text.trim_end_matches(['\r', '\n']) {
            "" => wrong("is empty; it must hold the password alone".to_owned()),
            password => Ok(database.with_password(password)),
        },
    }
}

/// Validates `--log` and `--log-format`.
pub(super) fn validate_log_settings(
    args: &ServeArgs,
    problems: &mut ProblemCollector<'_>,
) -> (String, LogFormat) {
    let filter = args.log.as_deref().unwrap_or("info");
    if EnvFilter::try_new(filter).is_err() {
        let problem = "is not a log filter: use off, error, warn, info, debug or trace, or a filter such as \
                       info,keyward=debug";
        problems.add_flag("--log", "KEYWARD_LOG", filter, problem);
    }
    let format = match args.log_format.as_deref() {
        None | Some("text") => LogFormat::Text,
        Some("json") => LogFormat::Json,
        Some(other) => {
            problems.add_flag("--log-format", "KEYWARD_LOG_FORMAT", other, "must be text or json");
            LogFormat::Text
        }
    };
    (filter.to_owned(), format)
}
