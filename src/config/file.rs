//! Parses a configuration file and checks its keys and types against the schema: each problem has a line and a column.
//!
//! The modules of the tables validate what the values mean.

use std::{
    collections::{BTreeMap, BTreeSet},
    io::Read as _,
    ops::Range,
    path::{Path, PathBuf},
};

use serde::Deserialize as _;
use toml::{
    Spanned, Table, Value,
    de::{DeTable, DeValue},
};

use crate::domain::credential_mask::mask_value;

use super::{
    error::{ConfigError, ConfigProblem, ProblemSource},
    raw::RawServerSettings,
    schema::{self, DefaultValue, SettingKey, ValueType},
    toml_messages,
};

/// The maximum size of a file in bytes.
const MAX_FILE_BYTES: u64 = 1024 * 1024;
/// The similarity from which one key is suggested for another, as `strsim` measures it from 0 to 1.
const MIN_SIMILARITY: f64 = 0.6;

/// A parsed file. Keys with a problem are left out of its table.
#[derive(Debug)]
pub(crate) struct ConfigFile {
    /// The path as it was given.
    pub path: PathBuf,
    text: String,
    /// The values without the invalid ones.
    pub(super) table: Table,
    /// The position of each key in bytes of the text; list entries have an index: `listener[0].name`.
    key_spans: BTreeMap<String, Range<usize>>,
    /// Unknown keys, wrong types and missing keys.
    pub(super) problems: Vec<ConfigProblem>,
    /// The keys with a problem, and the keys that misspelled ones probably mean.
    pub(super) invalid_keys: BTreeSet<String>,
}

impl ConfigFile {
    /// Reads a file. Problems of keys and types are kept, to be reported together with those of the values.
    ///
    /// # Errors
    /// If the file cannot be read, or is not TOML.
    pub(crate) fn load(path: &Path) -> Result<ConfigFile, ConfigError> {
        let display_path = || path.display().to_string();
        let text =
            read_text(path).map_err(|source| ConfigError::Unreadable { path: display_path(), source })?;
        ConfigFile::parse(path, text)
            .map_err(|problems| ConfigError::Invalid { path: Some(display_path()), problems })
    }

    /// Parses the text of a file.
    pub(super) fn parse(path: &Path, text: String) -> Result<ConfigFile, Vec<ConfigProblem>> {
        let (root, errors) = DeTable::parse_recoverable(&text);
        if !errors.is_empty() {
            let at = |span: Option<Range<usize>>| span.map_or(0, |span| span.start);
            let problem = |error: &toml::de::Error| {
                problem_at(&text, at(error.span()), toml_messages::rephrase_serde_error(error.message()))
            };
            return Err(errors.iter().map(problem).collect());
        }
        let table: Table = toml::from_str(&text).map_err(|error| {
            vec![problem_at(&text, 0, toml_messages::rephrase_serde_error(error.message()))]
        })?;
        let mut validator = SchemaValidator {
            text: &text,
            key_spans: BTreeMap::new(),
            problems: Vec::new(),
            invalid_keys: BTreeSet::new(),
            suggested_keys: BTreeSet::new(),
        };
        let mut table = table;
        validator.check_table("", "", root.get_ref(), &mut table);
        let SchemaValidator { key_spans, problems, mut invalid_keys, suggested_keys, .. } = validator;
        // A key that is present is validated, even if another one may be a misspelling of it.
        invalid_keys.extend(suggested_keys.into_iter().filter(|key| !key_spans.contains_key(key)));
        Ok(ConfigFile { path: path.to_owned(), table, key_spans, problems, invalid_keys, text })
    }

    /// Deserializes the values that have the right type.
    pub(super) fn deserialize_settings(&self) -> Result<RawServerSettings, ConfigError> {
        RawServerSettings::deserialize(self.table.clone()).map_err(|error| ConfigError::Invalid {
            path: Some(self.path.display().to_string()),
            problems: vec![problem_at(&self.text, 0, toml_messages::rephrase_serde_error(error.message()))],
        })
    }

    /// The value of a key, if the file has it.
    #[must_use]
    pub(crate) fn value(&self, path: &str) -> Option<&Value> {
        let mut names = path.split('.');
        let first = self.table.get(names.next()?)?;
        names.try_fold(first, |value, name| value.get(name))
    }

    /// The texts of a key in every table of a list, such as `listener[].tls.certificate`.
    #[must_use]
    pub(crate) fn strings(&self, path: &str) -> Vec<String> {
        let whole = Value::Table(self.table.clone());
        let mut values = vec![&whole];
        for name in path.split('.') {
            let (name, is_list) = name.strip_suffix("[]").map_or((name, false), |name| (name, true));
            values = values.into_iter().filter_map(|value| value.get(name)).collect();
            if is_list {
                values = values.into_iter().filter_map(Value::as_array).flatten().collect();
            }
        }
        values.into_iter().filter_map(Value::as_str).map(str::to_owned).collect()
    }

    /// The line of a key, counted from 1, if the file has it.
    #[must_use]
    pub(crate) fn line_number(&self, path: &str) -> Option<usize> {
        self.key_spans.get(path).map(|span| line_and_column(&self.text, span.start).0)
    }

    /// The line and column of a key or of the table that it would be in, counted from 1.
    pub(super) fn position(&self, indexed_path: &str) -> Option<(usize, usize)> {
        let mut indexed_path = indexed_path;
        loop {
            if let Some(span) = self.key_spans.get(indexed_path) {
                return Some(line_and_column(&self.text, span.start));
            }
            indexed_path = indexed_path.rsplit_once('.')?.0;
        }
    }
}

fn read_text(path: &Path) -> std::io::Result<String> {
    read_text_up_to(path, MAX_FILE_BYTES)
}

/// The text of a file of at most `max_bytes`. The length of a device is 0, so that the read itself has the bound.
///
/// # Errors
/// When the file cannot be read, has more bytes, or is not UTF-8.
pub(crate) fn read_text_up_to(path: &Path, max_bytes: u64) -> std::io::Result<String> {
    let file = std::fs::File::open(path)?;
    let length = file.metadata()?.len();
    if length > max_bytes {
        return Err(std::io::Error::other(format!("it has {length} bytes; at most {max_bytes} are allowed")));
    }
    let mut text = Vec::new();
    file.take(max_bytes + 1).read_to_end(&mut text)?;
    if text.len() as u64 > max_bytes {
        return Err(std::io::Error::other(format!(
            "it has more than {max_bytes} bytes; at most {max_bytes} are allowed"
        )));
    }
    String::from_utf8(text).map_err(|_| {
        std::io::Error::new(std::io::ErrorKind::InvalidData, "stream did not contain valid UTF-8")
    })
}

fn problem_at(text: &str, at: usize, problem: String) -> ConfigProblem {
    let (line, column) = line_and_column(text, at);
    ConfigProblem { source: ProblemSource::File { line, column }, text: problem }
}

fn line_and_column(text: &str, at: usize) -> (usize, usize) {
    let before = text.get(..at).unwrap_or(text);
    let line = before.matches('\n').count() + 1;
    let start = before.rfind('\n').map_or(0, |end| end + 1);
    (line, before[start..].chars().count() + 1)
}

fn join_path(table: &str, name: &str) -> String {
    if table.is_empty() { name.to_owned() } else { format!("{table}.{name}") }
}

/// Checks keys and types of a file against the schema.
struct SchemaValidator<'t> {
    text: &'t str,
    key_spans: BTreeMap<String, Range<usize>>,
    problems: Vec<ConfigProblem>,
    invalid_keys: BTreeSet<String>,
    /// The keys that misspelled ones probably mean.
    suggested_keys: BTreeSet<String>,
}

impl SchemaValidator<'_> {
    /// Checks a table and removes invalid values from `values`. `path` is its name; `indexed_path` also has the indexes of entries.
    fn check_table(&mut self, path: &str, indexed_path: &str, table: &DeTable<'_>, values: &mut Table) {
        for (name, value) in table {
            let (path, indexed_path) =
                (join_path(path, name.get_ref()), join_path(indexed_path, name.get_ref()));
            self.key_spans.entry(indexed_path.clone()).or_insert_with(|| name.span());
            self.check_entry(&path, &indexed_path, name, value.get_ref(), values);
        }
        for key in schema::find_table(path).into_iter().flat_map(|section| &section.keys) {
            let name = key.path.rsplit('.').next().unwrap_or_default();
            if key.default == DefaultValue::Required && !table.keys().any(|there| there.get_ref() == name) {
                values.insert(name.to_owned(), placeholder_value(key));
                // The misspelled key is reported already.
                if self.suggested_keys.contains(&key.path) {
                    self.invalid_keys.insert(join_path(indexed_path, name));
                    continue;
                }
                let at = self.key_spans.get(indexed_path).map_or(0, |span| span.start);
                self.add_problem(
                    &join_path(indexed_path, name),
                    at,
                    format!("{} is missing: {}", key.path.replace("[]", ""), key.description),
                );
            }
        }
    }

    /// Checks a key and its value.
    fn check_entry(
        &mut self,
        path: &str,
        indexed_path: &str,
        name: &Spanned<std::borrow::Cow<'_, str>>,
        value: &DeValue<'_>,
        values: &mut Table,
    ) {
        let (at, key) = (name.span().start, schema::find_key(path));
        let list = format!("{path}[]");
        let name_text = name.get_ref().as_ref();
        match (value, values.get_mut(name_text)) {
            (DeValue::Table(table), Some(Value::Table(inner))) if schema::find_table(path).is_some() => {
                return self.check_table(path, indexed_path, table, inner);
            }
            (DeValue::Array(entries), Some(Value::Array(inner)))
                if schema::find_table(&list).is_some() && inner.iter().all(Value::is_table) =>
            {
                for (number, (entry, inner)) in entries.iter().zip(inner).enumerate() {
                    if let (Some(table), Value::Table(inner)) = (entry.get_ref().as_table(), inner) {
                        let indexed_path = format!("{indexed_path}[{number}]");
                        self.key_spans.insert(indexed_path.clone(), entry.span());
                        self.check_table(&list, &indexed_path, table, inner);
                    }
                }
                return;
            }
            _ => {}
        }
        let given = values.get(name_text);
        let type_error = match key {
            Some(key) if key.value_type == ValueType::TableList && given.is_some_and(Value::is_table) => {
                Some(format!("must be a list of tables: write [[{path}]]"))
            }
            Some(key) => given.and_then(|value| key.value_type.type_error(value, key.is_secret)),
            None if schema::find_table(path).is_some() => Some(format!("must be a table: write [{path}]")),
            None => {
                values.remove(name_text);
                return visit_unknown_keys(path, name, value, &mut |span, path| {
                    self.suggested_keys.extend(closest_key(path).map(str::to_owned));
                    let text = unknown_key_message(path);
                    self.problems.push(problem_at(self.text, span.start, text));
                });
            }
        };
        if let Some(type_error) = type_error {
            self.add_problem(indexed_path, at, format!("{} {type_error}", path.replace("[]", "")));
            values.remove(name_text);
            if let Some(key) = key.filter(|key| key.default == DefaultValue::Required) {
                values.insert(name_text.to_owned(), placeholder_value(key));
            }
        }
    }

    fn add_problem(&mut self, indexed_path: &str, at: usize, text: String) {
        self.problems.push(problem_at(self.text, at, text));
        self.invalid_keys.insert(indexed_path.to_owned());
    }
}

/// A value for a required key that is invalid or missing, so that the other keys of its table are validated.
fn placeholder_value(key: &SettingKey) -> Value {
    match key.value_type {
        ValueType::TextList | ValueType::TableList => Value::Array(Vec::new()),
        _ => Value::String(String::new()),
    }
}

/// Visits an unknown key, or each key of an unknown table.
fn visit_unknown_keys(
    path: &str,
    name: &Spanned<std::borrow::Cow<'_, str>>,
    value: &DeValue<'_>,
    unknown: &mut dyn FnMut(Range<usize>, &str),
) {
    match value {
        DeValue::Table(table) if !table.is_empty() => {
            for (name, value) in table {
                visit_unknown_keys(&format!("{path}.{}", name.get_ref()), name, value.get_ref(), unknown);
            }
        }
        _ => unknown(name.span(), path),
    }
}

fn unknown_key_message(path: &str) -> String {
    let shown = mask_value(path);
    match closest_key(path) {
        Some(meant) => format!("unknown key `{shown}`: did you mean `{meant}`?"),
        None => {
            let table = path.rsplit_once('.').map_or("", |(table, _)| table);
            let known = schema::all_tables().iter().find(|section| section.path == table);
            let known = known.or(schema::all_tables().first()).into_iter().flat_map(|section| &section.keys);
            let known = known.map(|key| format!("`{}`", key.path)).collect::<Vec<_>>().join(", ");
            format!("unknown key `{shown}`; there are {known}")
        }
    }
}

/// The key that was probably meant: the most similar one of the same table, else of all, else one with the same name.
fn closest_key(path: &str) -> Option<&'static str> {
    let split = |path: &'_ str| match path.rsplit_once('.') {
        Some((table, name)) => (table.to_owned(), name.to_owned()),
        None => (String::new(), path.to_owned()),
    };
    let (table, name) = split(path);
    let known = || schema::all_keys().map(|key| key.path.as_str());
    let best = |found: &mut dyn Iterator<Item = (f64, &'static str)>| {
        let near = found
            .filter(|(alike, _)| *alike >= MIN_SIMILARITY)
            .max_by(|one, other| one.0.total_cmp(&other.0));
        near.map(|(_, known)| known)
    };
    let alike = |one: &str, other: &str| strsim::normalized_damerau_levenshtein(one, other);
    let same_table = known().filter(|known| split(known).0 == table);
    // The name of the table, which they share, must not count as similarity.
    best(&mut same_table.map(|known| (alike(&name, &split(known).1), known)))
        .or_else(|| {
            best(
                &mut known().filter(|known| split(known).0 != table).map(|known| (alike(path, known), known)),
            )
        })
        .or_else(|| known().find(|known| split(known).1 == name))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn problems(text: &str) -> Vec<String> {
        let mut problems = match ConfigFile::parse(Path::new("keyward.toml"), text.to_owned()) {
            Ok(document) => document.problems,
            Err(problems) => problems,
        };
        problems.sort();
        problems.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn a_device_that_never_ends_is_read_up_to_the_bound() {
        let problem = read_text_up_to(Path::new("/dev/zero"), 10).unwrap_err().to_string();
        assert_eq!(problem, "it has more than 10 bytes; at most 10 are allowed");
    }

    #[test]
    fn an_unknown_key_is_told_with_its_place_and_the_nearest_one() {
        for (text, said) in [
            (
                "[limts]\nbackend = 'redis'",
                "line 2, column 1: unknown key `limts.backend`: did you mean `limits.backend`?",
            ),
            ("\n  lisen = 'x'", "line 2, column 3: unknown key `lisen`: did you mean `listen`?"),
            (
                "trusted_hops = 1",
                "line 1, column 1: unknown key `trusted_hops`: did you mean `gateway.trusted_hops`?",
            ),
            (
                "environments = [{ name = 'a', tg = 'b' }]",
                "column 31: unknown key `environments[].tg`: did you mean `environments[].tag`?",
            ),
            (
                "[gateway]\nxyzzy = 1",
                "line 2, column 1: unknown key `gateway.xyzzy`; there are `gateway.credential_headers`, ",
            ),
        ] {
            let problems = problems(text);
            assert!(problems.len() == 1 && problems[0].contains(said), "{text}: {problems:?}");
        }
    }

    #[test]
    fn every_problem_of_the_form_is_told_at_once() {
        assert_eq!(
            problems("lisen = 'x'\nthreads = 'two'\n[limits]\nurrl = 'y'\nbackend = 'redis'").len(),
            3
        );
        let found = problems("threads = 'x'\nretention_days = -1\n[gateway]\nreason_header = 1\nmode = 2");
        let lines: Vec<_> = found.iter().map(|problem| problem.split(',').next().unwrap()).collect();
        assert_eq!(lines, ["line 1", "line 2", "line 4", "line 5"]);
        assert!(found[0].ends_with("threads = \"x\" must be a whole number of 1 or more"), "{found:?}");
        assert!(
            found[1].ends_with("retention_days = -1 must be a whole number from 0 to 4294967295"),
            "{found:?}"
        );
        assert!(
            found[2].ends_with("gateway.reason_header = 1 must be true or false, without quotes"),
            "{found:?}"
        );
        assert!(found[3].ends_with("gateway.mode = 2 must be text, in quotes"), "{found:?}");
        assert_eq!(problems("a = \nb = ").len(), 2);
    }

    #[test]
    fn a_table_in_the_place_of_a_list_and_what_is_missing_in_an_entry_are_told_with_their_line() {
        assert_eq!(
            problems("[listener]\nname = 'a'"),
            ["line 1, column 2: listener must be a list of tables: write [[listener]]"]
        );
        assert_eq!(problems("limits = 5"), ["line 1, column 1: limits must be a table: write [limits]"]);
        let found = problems("[[listener]]\nname = 'a'\naddress = 5\n[listener.tls]\nkey = 'k'");
        let starts = [
            "line 1, column 1: listener.services is missing: ",
            "line 3, column 1: listener.address = 5 must be text",
            "line 4, column 11: listener.tls.certificate is missing: ",
        ];
        assert_eq!(found.len(), starts.len(), "{found:?}");
        for (found, start) in found.iter().zip(starts) {
            assert!(found.starts_with(start), "{found}");
        }
    }

    #[test]
    fn a_value_that_may_be_a_secret_is_not_repeated() {
        for text in [
            "[limits]\nulr = 'redis://:sesame@h'",
            "[limits]\nurl = ['sesame']",
            "database = ['sesame']",
            "[limits]\nurl = 'sesame",
        ] {
            let found = problems(text).join("\n");
            assert!(!found.is_empty() && !found.contains("sesame"), "{found}");
        }
    }

    #[test]
    fn values_and_lines_are_found_by_name() {
        let text = "listen = 'a:1'\n[limits]\nbackend = 'redis'".to_owned();
        let document = ConfigFile::parse(Path::new("k.toml"), text).unwrap();
        assert_eq!(document.value("limits.backend").and_then(Value::as_str), Some("redis"));
        assert_eq!(document.strings("limits.backend"), ["redis"]);
        assert_eq!(document.strings("environments[].name"), Vec::<String>::new());
        assert_eq!(
            (document.line_number("limits.backend"), document.line_number("limits.url")),
            (Some(3), None)
        );
    }
}
