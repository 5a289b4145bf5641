//! Every setting with where it comes from: a flag, the environment, a line of the file, or the default. What they mean
//! and whether they are right is `server.rs`'s business; a secret leaves here only as the fact that it is set.

use std::{collections::BTreeMap, fmt};

use clap::{ArgMatches, Args, FromArgMatches, parser::ValueSource};
use toml::Value;

use super::{
    document::Document,
    keys::{self, Absent, Key},
    secret::SecretUrl,
};

/// Flags, and what was said of each: the text, and whether the environment said it.
#[derive(Clone, Debug)]
pub struct Told<A> {
    /// The flags as their command takes them.
    pub args: A,
    said: BTreeMap<String, (SecretUrl, ValueSource)>,
}

impl<A: Args> FromArgMatches for Told<A> {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let said = |id: &clap::Id| {
            let text = matches.try_get_raw(id.as_str()).ok()??.next()?.to_string_lossy().into_owned();
            Some((id.to_string(), (text.into(), matches.value_source(id.as_str())?)))
        };
        Ok(Told { args: A::from_arg_matches(matches)?, said: matches.ids().filter_map(said).collect() })
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Told::from_arg_matches(matches)?;
        Ok(())
    }
}

impl<A: Args> Args for Told<A> {
    fn augment_args(command: clap::Command) -> clap::Command {
        A::augment_args(command)
    }

    fn augment_args_for_update(command: clap::Command) -> clap::Command {
        A::augment_args_for_update(command)
    }
}

/// Where a setting comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    /// Nobody has set it.
    Default,
    /// A line of the file.
    File {
        /// The file.
        path: String,
        /// The line, from 1.
        line: usize,
    },
    /// An environment variable.
    Environment(String),
    /// A flag.
    Flag(String),
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Origin::Default => f.write_str("default"),
            Origin::File { path, line } => write!(f, "{path}:{line}"),
            Origin::Environment(name) | Origin::Flag(name) => f.write_str(name),
        }
    }
}

/// What a setting is.
#[derive(Clone, Debug, PartialEq)]
pub enum Effective {
    /// This value.
    Value(Value),
    /// A URL with a password, shown without it.
    Hidden(String),
    /// No fixed value: what happens, in words.
    Words(String),
}

/// A setting that is in force.
#[derive(Clone, Debug)]
pub struct Setting {
    /// The key.
    pub key: &'static Key,
    /// Its value.
    pub value: Effective,
    /// Where that comes from.
    pub origin: Origin,
}

/// Every setting of a server with these flags and this file, tables after each other. The keys of a list of tables are
/// shown by the list.
#[must_use]
pub fn settings<A>(told: &Told<A>, document: Option<&Document>) -> Vec<Setting> {
    let shown = keys::all().filter(|key| !key.path.contains("[]"));
    shown
        .map(|key| said(key, told).or_else(|| written(key, document?)).unwrap_or_else(|| left(key)))
        .collect()
}

/// By a flag or the environment.
fn said<A>(key: &'static Key, told: &Told<A>) -> Option<Setting> {
    let (text, source) = told.said.get(key.argument.as_ref()?)?;
    let origin = match source {
        ValueSource::CommandLine => Origin::Flag(key.flag.clone()?),
        ValueSource::EnvVariable => Origin::Environment(key.variable.clone()?),
        _ => return None,
    };
    let plain = || text.parse().map(Value::Integer).ok().or_else(|| text.parse().map(Value::Boolean).ok());
    let value = if key.plain { plain() } else { None };
    let value = value.unwrap_or_else(|| Value::String(text.to_string()));
    Some(Setting { key, value: hidden(key, value), origin })
}

/// In the file.
fn written(key: &'static Key, document: &Document) -> Option<Setting> {
    let value = hidden(key, document.value(&key.path)?.clone());
    let path = document.path.display().to_string();
    Some(Setting { key, value, origin: Origin::File { path, line: document.line(&key.path)? } })
}

/// Nowhere.
fn left(key: &'static Key) -> Setting {
    let value = match &key.default {
        Absent::Value(value) => match Value::try_from(value) {
            Ok(value) => Effective::Value(value),
            Err(_) => Effective::Words(value.to_string()),
        },
        Absent::Words(words) => Effective::Words(words.clone()),
        Absent::Refused => Effective::Words("must be set".to_owned()),
    };
    Setting { key, value, origin: Origin::Default }
}

/// A secret is not passed on; a URL without one is none.
fn hidden(key: &Key, value: Value) -> Effective {
    let url = value.as_str().filter(|_| key.secret).map(SecretUrl::from);
    match url {
        Some(url) if url.has_password() => Effective::Hidden(url.shown()),
        _ => Effective::Value(value),
    }
}

/// What is accepted and not advised: secrets that whoever reads the file has too.
#[must_use]
pub fn advice(document: &Document) -> Vec<String> {
    let holds = |key: &&Key| {
        let url = document.value(&key.path).and_then(Value::as_str).map(SecretUrl::from);
        key.secret && url.is_some_and(|url| url.has_password())
    };
    let told = |key: &'static Key| {
        let instead = match (key.path.as_str(), &key.variable) {
            ("database", Some(variable)) => {
                format!("database_password_file names a file for it, or {variable} holds it")
            }
            (_, Some(variable)) => format!("let {variable} hold it"),
            (_, None) => "keep it elsewhere".to_owned(),
        };
        let line = document.line(&key.path).unwrap_or(1);
        format!("line {line}: {} holds a password, which whoever reads the file learns: {instead}", key.path)
    };
    keys::all().filter(holds).map(told).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::server::ServeArgs;

    /// The settings of these flags over this file: `key`, its value and its origin.
    fn shown(flags: &[&str], text: &str) -> BTreeMap<String, (Effective, String)> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("k.toml");
        std::fs::write(&path, text).unwrap();
        let document = Document::read(&path).unwrap();
        let command = ServeArgs::augment_args(clap::Command::new("serve"));
        let matches = command.try_get_matches_from([&["serve"], flags].concat()).unwrap();
        let told = Told::<ServeArgs>::from_arg_matches(&matches).unwrap();
        let shown = settings(&told, Some(&document)).into_iter();
        let origin = |origin: Origin| origin.to_string().replace(&folder.path().display().to_string(), "");
        shown.map(|setting| (setting.key.path.clone(), (setting.value, origin(setting.origin)))).collect()
    }

    #[test]
    fn a_setting_tells_where_it_comes_from() {
        let shown =
            shown(&["--listen", "a:1", "--threads", "3"], "listen = 'b:2'\n[gateway]\nmode = 'shadow'");
        let text = |text: &str| Effective::Value(Value::String(text.to_owned()));
        assert_eq!(shown["listen"], (text("a:1"), "--listen".to_owned()));
        assert_eq!(shown["threads"], (Effective::Value(Value::Integer(3)), "--threads".to_owned()));
        assert_eq!(shown["gateway.mode"], (text("shadow"), "/k.toml:3".to_owned()));
        assert_eq!(shown["admin_listen"], (text("127.0.0.1:9090"), "default".to_owned()));
        assert!(matches!(&shown["replica_name"], (Effective::Words(_), origin) if origin == "default"));
    }

    #[test]
    fn a_secret_is_not_passed_on() {
        let flags = ["--limits-url", "redis://:sesame@h", "--database", "postgres://u:sesame@h/k"];
        let all = shown(&flags, "[limits]\nbackend = 'redis'");
        assert_eq!(all["limits.url"].0, Effective::Hidden("redis://:***@h".to_owned()));
        assert!(!format!("{all:?}").contains("sesame"));
    }

    #[test]
    fn a_password_in_the_file_is_advised_against() {
        let text = "database = 'postgres://u:sesame@h/k'\n[limits]\nurl = 'redis://h'".to_owned();
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("k.toml");
        std::fs::write(&path, text).unwrap();
        let advice = advice(&Document::read(&path).unwrap());
        assert!(advice.len() == 1 && advice[0].contains("database_password_file"), "{advice:?}");
        assert!(!advice[0].contains("sesame"));
    }
}
