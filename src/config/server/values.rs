//! Values of the file and the flags that other modules know how to parse: what keys look like, where they are kept, what
//! is logged.

use std::{num::NonZeroUsize, path::Path};

use tracing_subscriber::EnvFilter;

use super::{EnvironmentFile, Invalid, LogFormat, PREFIX, ServeArgs, invalid, unshown};
use crate::{
    config::{account_limits, problems::Problems, secret::SecretUrl},
    domain::{
        account::{Environment, Environments},
        connection_url::MASK,
        name::{EnvironmentName, RoleName, TokenPrefix, TokenTag},
    },
    keys::KeySettings,
    store::{self, OpenError},
};

/// More threads than this only take memory and file descriptors from connections.
const MAX_THREADS: usize = 512;

/// How many threads serve connections.
pub(super) fn read_threads(given: Option<NonZeroUsize>, problems: &mut Problems<'_>) -> usize {
    if let Some(threads) = given.filter(|threads| threads.get() > MAX_THREADS) {
        let problem = format!("must be 1 to {MAX_THREADS}; leave it out for one per core");
        problems.add(invalid("threads", &threads.to_string(), problem));
    }
    let threads = given.or_else(|| std::thread::available_parallelism().ok());
    threads.map_or(1, NonZeroUsize::get).min(MAX_THREADS)
}

/// What keys look like.
pub(super) fn read_keys(
    prefix: Option<String>,
    environments: Option<Vec<EnvironmentFile>>,
    default_role: Option<String>,
    account_limits: account_limits::File,
    problems: &mut Problems<'_>,
) -> Option<KeySettings> {
    let text = prefix.as_deref().unwrap_or(PREFIX);
    let prefix = TokenPrefix::parse(text).map_err(|error| invalid("token_prefix", text, error));
    let prefix = problems.take(prefix).or_else(|| TokenPrefix::parse(PREFIX).ok())?;
    let environments = environments.and_then(|list| read_environments(list, problems));
    let default_role = default_role.and_then(|role| {
        let read = RoleName::parse(&role).map_err(|error| invalid("default_role", &role, error));
        problems.take(read)
    });
    Some(KeySettings {
        environments: environments.unwrap_or_default(),
        prefix,
        default_role,
        account_limits: account_limits.read(),
    })
}

fn read_environments(list: Vec<EnvironmentFile>, problems: &mut Problems<'_>) -> Option<Environments> {
    let count = list.len();
    let mut read = Vec::with_capacity(count);
    for (at, EnvironmentFile { name, tag }) in list.into_iter().enumerate() {
        problems.in_entry("environments", at, |problems| {
            let parsed =
                EnvironmentName::parse(&name).map_err(|rule| invalid("environments.name", &name, rule));
            let parsed_tag = TokenTag::parse(&tag).map_err(|rule| invalid("environments.tag", &tag, rule));
            let (name, tag) = (problems.take(parsed), problems.take(parsed_tag));
            read.extend(name.zip(tag).map(|(name, tag)| Environment { name, tag }));
        });
    }
    // What names an environment is not judged by a list that lacks some.
    if read.len() < count {
        problems.distrust("environments");
        return None;
    }
    problems
        .take(Environments::new(read).map_err(|error| unshown("environments", format!("are wrong: {error}"))))
}

/// The database's URL, with the password from its file.
pub(super) fn read_database(
    database: SecretUrl,
    file: Option<&Path>,
    problems: &mut Problems<'_>,
) -> SecretUrl {
    if let Err(error) = store::check_url(&database) {
        let (shown, problem) = match &error {
            OpenError::Url { shown, problem } => (shown.as_str(), problem.clone()),
            other => ("", other.to_string()),
        };
        let shown = if shown.is_empty() { String::new() } else { format!("= {shown}") };
        problems.add(unshown("database", format!("{shown}{problem}")));
        return database;
    }
    let Some(file) = file else { return database };
    problems.take(with_password(&database, file)).unwrap_or(database)
}

fn with_password(database: &SecretUrl, file: &Path) -> Result<SecretUrl, Invalid> {
    // A password in place of the file that holds it is like any word; the path of a file has more than a name.
    let shown = file.display().to_string();
    let shown = if shown.contains('/') || file.exists() { &shown } else { MASK };
    let wrong = |problem: String| Err(invalid("database_password_file", shown, problem));
    if !database.starts_with("postgres") {
        return wrong("has no effect: database is no postgres:// URL".to_owned());
    }
    if database.has_password() {
        return wrong("is one password too many: take the other one out of the URL in database".to_owned());
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

/// What is logged, and how.
pub(super) fn read_log(args: &ServeArgs, problems: &mut Problems<'_>) -> (String, LogFormat) {
    let filter = args.log.as_deref().unwrap_or("info");
    if EnvFilter::try_new(filter).is_err() {
        let problem = "is no log filter: write off, error, warn, info, debug or trace, or a filter such as \
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
