//! Lists every setting with its value and its origin, for `keyward config show`: a flag, the environment, a line of the file,
//! or the default.
//!
//! `server.rs` validates the values. Secrets are never shown, only the fact that one is set.

use std::{collections::BTreeMap, fmt};

use clap::{ArgMatches, Args, FromArgMatches, parser::ValueSource};
use toml::Value;

use crate::domain::{credential_mask::mask_value, text::escape_toml};

use super::{
    boolean,
    file::ConfigFile,
    replicas,
    schema::{self, DefaultValue, SettingKey, ValueType},
    secret_url::SecretUrl,
    server::ServerSettings,
};

/// Parsed flags with the text and the source of each: the command line or the environment.
#[derive(Clone, Debug)]
pub(crate) struct WithSources<A> {
    /// The parsed flags.
    pub args: A,
    raw_values: BTreeMap<String, (SecretUrl, ValueSource)>,
}

impl<A: Args> FromArgMatches for WithSources<A> {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let given = |id: &clap::Id| {
            let text = matches.try_get_raw(id.as_str()).ok()??.next()?.to_string_lossy().into_owned();
            Some((id.to_string(), (text.into(), matches.value_source(id.as_str())?)))
        };
        Ok(WithSources {
            args: A::from_arg_matches(matches)?,
            raw_values: matches.ids().filter_map(given).collect(),
        })
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = WithSources::from_arg_matches(matches)?;
        Ok(())
    }
}

impl<A: Args> Args for WithSources<A> {
    fn augment_args(command: clap::Command) -> clap::Command {
        A::augment_args(command)
    }

    fn augment_args_for_update(command: clap::Command) -> clap::Command {
        A::augment_args_for_update(command)
    }
}

/// The origin of a setting's value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum SettingOrigin {
    /// No flag, variable or file sets it.
    Default,
    /// A line of the file.
    File {
        /// The path of the file.
        path: String,
        /// The line, from 1.
        line: usize,
    },
    /// The name of an environment variable.
    Environment(String),
    /// A flag with its dashes.
    Flag(String),
}

impl fmt::Display for SettingOrigin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            SettingOrigin::Default => f.write_str("default"),
            SettingOrigin::File { path, line } => write!(f, "{path}:{line}"),
            SettingOrigin::Environment(name) | SettingOrigin::Flag(name) => f.write_str(name),
        }
    }
}

/// The value of a setting as it may be shown.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum EffectiveValue {
    /// A value without secrets.
    Value(Value),
    /// A value whose password or credential is masked.
    Redacted(String),
    /// The default in words, if it is no fixed value.
    Description(String),
}

/// A setting in force, with its origin.
#[derive(Clone, Debug)]
pub(crate) struct EffectiveSetting {
    /// The setting's key in the file.
    pub key: &'static SettingKey,
    /// The value in force.
    pub value: EffectiveValue,
    /// The source of the value.
    pub origin: SettingOrigin,
}

/// Every setting of a server with these flags and this file, table by table. A list of tables is one setting.
#[must_use]
pub(crate) fn effective_settings<A>(
    sources: &WithSources<A>,
    config_file: Option<&ConfigFile>,
    in_force: &ServerSettings,
) -> Vec<EffectiveSetting> {
    let shown = schema::all_keys().filter(|key| !key.path.contains("[]"));
    let find = |key| {
        from_flag_or_env(key, sources)
            .or_else(|| from_file(key, config_file?))
            .unwrap_or_else(|| from_default(key, config_file, in_force))
    };
    shown.map(find).collect()
}

fn from_flag_or_env<A>(key: &'static SettingKey, sources: &WithSources<A>) -> Option<EffectiveSetting> {
    let argument = key.arg_id.as_ref()?;
    let (text, source) = sources.raw_values.get(argument)?;
    let origin = match source {
        ValueSource::CommandLine => SettingOrigin::Flag(key.flag.clone()?),
        ValueSource::EnvVariable => SettingOrigin::Environment(key.env_var.clone()?),
        _ => return None,
    };
    let value = match key.value_type {
        ValueType::Integer { .. } => text.parse().map(Value::Integer).ok(),
        ValueType::Boolean => match (boolean::parse_boolean(text).ok()?, argument.starts_with("no_")) {
            // The flag negates the key; `--no-…=false` does not override the file.
            (false, true) => return None,
            (value, is_negated) => Some(Value::Boolean(value != is_negated)),
        },
        _ => None,
    };
    let value = value.unwrap_or_else(|| Value::String(text.to_string()));
    Some(EffectiveSetting { key, value: redact_secret(key, value), origin })
}

fn from_file(key: &'static SettingKey, config_file: &ConfigFile) -> Option<EffectiveSetting> {
    let value = redact_secret(key, config_file.value(&key.path)?.clone());
    let path = config_file.path.display().to_string();
    Some(EffectiveSetting {
        key,
        value,
        origin: SettingOrigin::File { path, line: config_file.line_number(&key.path)? },
    })
}

/// The value of a key that is not set anywhere.
fn from_default(
    key: &'static SettingKey,
    config_file: Option<&ConfigFile>,
    in_force: &ServerSettings,
) -> EffectiveSetting {
    // Without its table the decision log is off, and its defaults do not apply.
    let is_off = key.path.starts_with("decision_log.")
        && config_file.is_none_or(|config_file| config_file.value("decision_log").is_none());
    let computed = computed_default(key, in_force).map(EffectiveValue::Value);
    let value = computed.unwrap_or_else(|| match &key.default {
        DefaultValue::Value(value) => match Value::try_from(value) {
            Ok(value) if is_off => {
                EffectiveValue::Description(format!("off without the table; in it {value}"))
            }
            Ok(value) => EffectiveValue::Value(value),
            Err(_) => EffectiveValue::Description(value.to_string()),
        },
        DefaultValue::Description(words) => EffectiveValue::Description(words.clone()),
        DefaultValue::Required => EffectiveValue::Description("must be set".to_owned()),
    });
    EffectiveSetting { key, value, origin: SettingOrigin::Default }
}

/// A default that depends on this machine or on other settings.
fn computed_default(key: &SettingKey, in_force: &ServerSettings) -> Option<Value> {
    let text = |text: &str| Some(Value::String(text.to_owned()));
    let collector = in_force.telemetry.otlp.as_ref();
    match key.path.as_str() {
        "threads" => i64::try_from(in_force.threads).ok().map(Value::Integer),
        "replica_name" => {
            let port = in_force.listen.rsplit_once(':')?.1.parse().ok().filter(|port| *port != 0)?;
            text(&replicas::default_replica_name(port))
        }
        "telemetry.otlp_endpoint" => text(&collector?.endpoint),
        "telemetry.service_name" => text(&collector?.service_name),
        _ => None,
    }
}

/// Masks secrets. A secret setting without a password is shown; any other setting may hold a credential by mistake.
fn redact_secret(key: &SettingKey, value: Value) -> EffectiveValue {
    let url = value.as_str().filter(|_| key.is_secret).map(SecretUrl::from);
    match url {
        Some(url) if url.has_password() => EffectiveValue::Redacted(url.redacted()),
        Some(_) => EffectiveValue::Value(value),
        None => {
            let masked = without_credentials(&value);
            if masked == value {
                EffectiveValue::Value(value)
            } else {
                EffectiveValue::Redacted(in_one_line(&masked))
            }
        }
    }
}

/// Masks every text of a value.
fn without_credentials(value: &Value) -> Value {
    match value {
        Value::String(text) => Value::String(mask_value(text).into_owned()),
        Value::Array(entries) => Value::Array(entries.iter().map(without_credentials).collect()),
        Value::Table(table) => {
            let entries = table.iter().map(|(name, value)| (name.clone(), without_credentials(value)));
            Value::Table(entries.collect())
        }
        other => other.clone(),
    }
}

/// Formats a value as TOML, in one line of printable characters.
#[must_use]
pub(crate) fn in_one_line(value: &Value) -> String {
    match value {
        Value::String(text) => escape_toml(text),
        Value::Array(entries) => {
            format!("[{}]", entries.iter().map(in_one_line).collect::<Vec<_>>().join(", "))
        }
        Value::Table(table) => {
            let entries = table.iter().map(|(name, value)| format!("{name} = {}", in_one_line(value)));
            format!("{{ {} }}", entries.collect::<Vec<_>>().join(", "))
        }
        other => other.to_string(),
    }
}

/// Warnings about passwords in the file, which every reader of the file learns.
#[must_use]
pub(crate) fn password_warnings(config_file: &ConfigFile) -> Vec<String> {
    let holds = |key: &&SettingKey| {
        let url = config_file.value(&key.path).and_then(Value::as_str).map(SecretUrl::from);
        key.is_secret && url.is_some_and(|url| url.has_password())
    };
    let warning = |key: &'static SettingKey| {
        let instead = match (key.path.as_str(), &key.env_var) {
            ("database", Some(variable)) => {
                format!("database_password_file names a file for it, or {variable} holds it")
            }
            (_, Some(variable)) => format!("let {variable} hold it"),
            (_, None) => "keep it elsewhere".to_owned(),
        };
        let line = config_file.line_number(&key.path).unwrap_or(1);
        format!(
            "line {line}: {} holds a password, which every reader of the file learns: {instead}",
            key.path
        )
    };
    schema::all_keys().filter(holds).map(warning).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::server::ServeArgs;

    /// The settings of these flags over this file: `key`, its value and its origin.
    fn effective_values(flags: &[&str], text: &str) -> BTreeMap<String, (EffectiveValue, String)> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("k.toml");
        std::fs::write(&path, text).unwrap();
        let config_file = ConfigFile::load(&path).unwrap();
        let command = ServeArgs::augment_args(clap::Command::new("serve"));
        let matches = command.try_get_matches_from([&["serve"], flags].concat()).unwrap();
        let sources = WithSources::<ServeArgs>::from_arg_matches(&matches).unwrap();
        let in_force = ServerSettings::resolve(&sources.args, Some(&config_file)).unwrap();
        let shown = effective_settings(&sources, Some(&config_file), &in_force).into_iter();
        let origin =
            |origin: SettingOrigin| origin.to_string().replace(&folder.path().display().to_string(), "");
        shown.map(|setting| (setting.key.path.clone(), (setting.value, origin(setting.origin)))).collect()
    }

    #[test]
    fn a_setting_tells_where_it_comes_from() {
        let shown = effective_values(
            &["--listen", "127.0.0.1:1", "--threads", "3"],
            "listen = 'b:2'\n[gateway]\nmode = 'shadow'",
        );
        let text = |text: &str| EffectiveValue::Value(Value::String(text.to_owned()));
        assert_eq!(shown["listen"], (text("127.0.0.1:1"), "--listen".to_owned()));
        assert_eq!(shown["threads"], (EffectiveValue::Value(Value::Integer(3)), "--threads".to_owned()));
        assert_eq!(shown["gateway.mode"], (text("shadow"), "/k.toml:3".to_owned()));
        assert_eq!(shown["admin_listen"], (text("127.0.0.1:9090"), "default".to_owned()));
        assert_eq!(
            shown["overload.queued_checks"],
            (EffectiveValue::Value(Value::Integer(4096)), "default".to_owned())
        );
        assert!(matches!(&shown["rules"], (EffectiveValue::Description(_), origin) if origin == "default"));
    }

    #[test]
    fn a_truth_value_is_shown_as_the_file_has_it_whatever_the_flag_says() {
        let shown = effective_values(&["--insecure", "yes", "--no-migrate"], "");
        assert_eq!(shown["insecure"], (EffectiveValue::Value(Value::Boolean(true)), "--insecure".to_owned()));
        assert_eq!(
            shown["migrate"],
            (EffectiveValue::Value(Value::Boolean(false)), "--no-migrate".to_owned())
        );
    }

    #[test]
    fn the_decision_log_is_not_turned_on_by_what_is_shown() {
        let denials = |text: &str| effective_values(&[], text)["decision_log.denials"].0.clone();
        assert!(matches!(denials(""), EffectiveValue::Description(_)));
        assert_eq!(denials("[decision_log]"), EffectiveValue::Value(Value::Float(1.0)));
    }

    #[test]
    fn a_secret_is_not_passed_on() {
        let flags = ["--limits-url", "redis://:sesame@h", "--database", "postgres://u:sesame@h/k"];
        let all = effective_values(&flags, "[limits]\nbackend = 'redis'");
        assert_eq!(all["limits.url"].0, EffectiveValue::Redacted("redis://:***@h".to_owned()));
        assert!(!format!("{all:?}").contains("sesame"));
    }

    #[test]
    fn a_password_in_the_file_is_advised_against() {
        let text = "database = 'postgres://u:sesame@h/k'\n[limits]\nurl = 'redis://h'".to_owned();
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("k.toml");
        std::fs::write(&path, text).unwrap();
        let advice = password_warnings(&ConfigFile::load(&path).unwrap());
        assert!(advice.len() == 1 && advice[0].contains("database_password_file"), "{advice:?}");
        assert!(!advice[0].contains("sesame"));
    }

    use proptest::prelude::*;

    proptest! {
        /// Neither an error about a URL nor what is shown of it holds a piece of the password, whether it is right or wrong.
        #[test]
        fn nothing_of_a_password_is_reported_or_shown(password in "[A-Z#/?@:%&+ .;-]{4,16}", at in 0_usize..6) {
            let encoded = percent_encoding::utf8_percent_encode(&password, percent_encoding::NON_ALPHANUMERIC);
            let database = [
                format!("postgres://u:{password}@h/k"),
                format!("postgres://u:{encoded}@h/k"),
                format!("postgres://u@h/k?password={password}"),
                format!("postgres://u@h/k?sslPassword={encoded}"),
                format!("postgres:u:{password}@h"),
                password.clone(),
            ][at].clone();
            let redis = format!("redis://:{password}@h");
            let flags = [format!("--database={database}"), format!("--limits-url={redis}"), "--lease=0s".to_owned()];
            let command = ServeArgs::augment_args(clap::Command::new("serve"));
            let matches = command.no_binary_name(true).try_get_matches_from(flags).unwrap();
            let sources = WithSources::<ServeArgs>::from_arg_matches(&matches).unwrap();
            let mut output = ServerSettings::resolve(&sources.args, None).unwrap_err().to_string();
            if let Ok(in_force) = ServerSettings::resolve(&ServeArgs::default(), None) {
                output += &format!("{:?} {in_force:?}", effective_settings(&sources, None, &in_force));
            }
            let letters: Vec<char> = password.chars().collect();
            for part in letters.windows(4).map(|part| part.iter().collect::<String>()) {
                // Four signs in a row may be ours.
                let is_word = part.chars().filter(char::is_ascii_uppercase).count() > 1;
                prop_assert!(!is_word || !output.contains(&part), "{}: {}", part, output);
            }
        }
    }
}
