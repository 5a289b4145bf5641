//! Tests that no setting repeats a credential that was pasted into it by mistake: all settings, several kinds of credentials,
//! and every way to set a value.

use std::path::Path;

use clap::{Args as _, FromArgMatches as _};
use toml::{Table, Value};

use super::{
    effective::{self, WithSources},
    file::ConfigFile,
    schema::{self, SettingKey, ValueType},
    server::{ServeArgs, ServerSettings},
};

const SECRET: &str = "q7RkZ2mVb9XcT4nWs8LpQ1zY";

/// Credentials that people paste, each with its secret part.
fn pasted() -> Vec<(String, String)> {
    let token = "Zy9".repeat(16) + "x";
    let password = "SeSame!77";
    let with = |text: &str, secret: &str| (text.replace("{}", secret), secret.to_owned());
    vec![
        with("postgres://u:{}@h:5432/k", password),
        with("redis://:{}@127.0.0.1:6379", password),
        with("mysql://u:{}@h/k?x=1", password),
        with("postgres://u:a b{}#@h/k", password),
        with("u:{}@h:80", password),
        with("host=h user=u password={}", password),
        with("Bearer {}", password),
        with("kw_live_{}", &token),
        with("{}", SECRET),
        with("{}/x+y==", SECRET),
    ]
}

/// A file in which one key has this value: `listener[].name` in a listener that has nothing else.
fn file_with(path: &str, value: Value) -> String {
    let mut value = value;
    for name in path.rsplit('.') {
        let (name, is_list) = name.strip_suffix("[]").map_or((name, false), |name| (name, true));
        let inner = if is_list { Value::Array(vec![value]) } else { value };
        value = Value::Table(Table::from_iter([(name.to_owned(), inner)]));
    }
    toml::to_string(&value).unwrap()
}

/// The output of `config check`, `config show` and `serve` for these flags and this file.
fn output(flags: &[String], text: &str) -> String {
    let document = match ConfigFile::parse(Path::new("keyward.toml"), text.to_owned()) {
        Ok(document) => document,
        Err(problems) => return format!("{problems:?}"),
    };
    let command = ServeArgs::augment_args(clap::Command::new("serve")).no_binary_name(true);
    let matches = command.try_get_matches_from(flags).unwrap();
    let sources = WithSources::<ServeArgs>::from_arg_matches(&matches).unwrap();
    let mut output = String::new();
    if let Err(error) = ServerSettings::resolve_for_serving(&sources.args, Some(&document)) {
        output += &error.to_string();
    }
    let in_force = ServerSettings::resolve(&sources.args, Some(&document));
    let in_force = in_force.or_else(|_| ServerSettings::resolve(&ServeArgs::default(), None)).unwrap();
    output + &format!("{:?}", effective::effective_settings(&sources, Some(&document), &in_force))
}

fn assert_kept(output: &str, secret: &str, place: &str) {
    assert!(!output.contains(secret), "{place}: {output}");
}

fn value(key: &SettingKey, text: &str) -> Value {
    let text = Value::String(text.to_owned());
    if matches!(key.value_type, ValueType::TextList | ValueType::TableList) {
        Value::Array(vec![text])
    } else {
        text
    }
}

#[test]
fn no_setting_repeats_a_credential_that_the_file_has_in_its_place() {
    for key in schema::all_keys() {
        for (text, secret) in pasted() {
            let output = output(&[], &file_with(&key.path, value(key, &text)));
            assert_kept(&output, &secret, &key.path);
        }
    }
}

#[test]
fn no_setting_repeats_a_credential_that_a_flag_has_in_its_place() {
    for key in schema::all_keys() {
        let Some(flag) = &key.flag else { continue };
        for (text, secret) in pasted() {
            assert_kept(&output(&[format!("{flag}={text}")], ""), &secret, flag);
        }
    }
    for flag in ["--log", "--log-format", "--require-revision"] {
        for (text, secret) in pasted() {
            assert_kept(&output(&[format!("{flag}={text}")], ""), &secret, flag);
        }
    }
}

#[test]
fn no_table_repeats_a_credential_in_place_of_a_key() {
    for section in schema::all_tables() {
        for (text, secret) in pasted() {
            let path = if section.path.is_empty() { String::new() } else { format!("{}.", section.path) };
            // A dot would make it a key of a table.
            let name = text.replace('.', "-");
            let output = output(&[], &file_with(&format!("{path}{name}"), Value::Integer(1)));
            assert_kept(&output, &secret, &section.path);
        }
    }
}

#[test]
fn a_password_in_place_of_the_file_that_holds_it_is_not_repeated() {
    let text = "database = 'postgres://u@h/k'\ndatabase_password_file = 'sesame'";
    let output = output(&[], text);
    assert!(output.contains("database_password_file = \"***\" cannot be read"), "{output}");
    assert!(output.contains("not the password") && !output.contains("\"sesame\" cannot"), "{output}");
}
