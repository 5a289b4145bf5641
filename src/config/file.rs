//! A configuration file: where each key is, and what is wrong with its form, each with its line and column. What values
//! mean is the business of the tables that read them.

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
    problems::{ConfigProblem, ProblemSource},
    schema::{self, DefaultValue, SettingKey, ValueType},
    server::{ConfigError, RawServerSettings},
    toml_messages,
};

/// The largest file, in bytes.
const MAX_FILE_BYTES: u64 = 1024 * 1024;
/// How alike two names must be for one to be meant by the other: of what `strsim` gives from 0 to 1.
const MIN_SIMILARITY: f64 = 0.6;

/// A file as it is used: keys with a problem of their form are left out of the table.
#[derive(Debug)]
pub struct ConfigFile {
    /// Where it is.
    pub path: PathBuf,
    text: String,
    /// Its values.
    pub(super) table: Table,
    /// Where each key is, in bytes of the text; entries of lists are numbered: `listener[0].name`.
    key_spans: BTreeMap<String, Range<usize>>,
    /// What is wrong with its form.
    pub(super) problems: Vec<ConfigProblem>,
    /// The keys that have a problem, and those that a misspelt key probably means.
    pub(super) invalid_keys: BTreeSet<String>,
}

impl ConfigFile {
    /// Reads a file. Problems of its form are kept, and reported together with those of its values.
    ///
    /// # Errors
    /// When it cannot be read, or is no TOML.
    pub fn load(path: &Path) -> Result<ConfigFile, ConfigError> {
        let shown = || path.display().to_string();
        let text = read_text(path).map_err(|source| ConfigError::Unreadable { path: shown(), source })?;
        ConfigFile::parse(path, text)
            .map_err(|problems| ConfigError::Invalid { path: Some(shown()), problems })
    }

    /// The same of a text at hand.
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
        let mut form = SchemaValidator {
            text: &text,
            key_spans: BTreeMap::new(),
            problems: Vec::new(),
            invalid_keys: BTreeSet::new(),
            suggested_keys: BTreeSet::new(),
        };
        let mut values = table;
        form.check_table("", "", root.get_ref(), &mut values);
        let SchemaValidator {
            key_spans: places,
            problems,
            invalid_keys: mut broken,
            suggested_keys: meant,
            ..
        } = form;
        // A key that is there is judged, also if another may have been misspelt for it.
        broken.extend(meant.into_iter().filter(|key| !places.contains_key(key)));
        Ok(ConfigFile {
            path: path.to_owned(),
            table: values,
            key_spans: places,
            problems,
            invalid_keys: broken,
            text,
        })
    }

    /// The settings that it holds.
    pub(super) fn deserialize_settings(&self) -> Result<RawServerSettings, ConfigError> {
        RawServerSettings::deserialize(self.table.clone()).map_err(|error| ConfigError::Invalid {
            path: Some(self.path.display().to_string()),
            problems: vec![problem_at(&self.text, 0, toml_messages::rephrase_serde_error(error.message()))],
        })
    }

    /// The value of a key, if it is there.
    #[must_use]
    pub fn value(&self, path: &str) -> Option<&Value> {
        let mut names = path.split('.');
        let first = self.table.get(names.next()?)?;
        names.try_fold(first, |value, name| value.get(name))
    }

    /// The texts of a key, which may stand in every table of a list: `listener[].tls.certificate`.
    #[must_use]
    pub fn strings(&self, path: &str) -> Vec<String> {
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

    /// The line of a key, from 1, if it is there.
    #[must_use]
    pub fn line_number(&self, path: &str) -> Option<usize> {
        self.key_spans.get(path).map(|span| line_and_column(&self.text, span.start).0)
    }

    /// The line and the column of a key, or of the table that it would be in, from 1.
    pub(super) fn position(&self, place: &str) -> Option<(usize, usize)> {
        let mut place = place;
        loop {
            if let Some(span) = self.key_spans.get(place) {
                return Some(line_and_column(&self.text, span.start));
            }
            place = place.rsplit_once('.')?.0;
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
pub fn read_text_up_to(path: &Path, max_bytes: u64) -> std::io::Result<String> {
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

fn problem_at(text: &str, at: usize, what: String) -> ConfigProblem {
    let (line, column) = line_and_column(text, at);
    ConfigProblem { source: ProblemSource::File { line, column }, text: what }
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

/// The examination of a file's form.
struct SchemaValidator<'t> {
    text: &'t str,
    key_spans: BTreeMap<String, Range<usize>>,
    problems: Vec<ConfigProblem>,
    invalid_keys: BTreeSet<String>,
    /// What misspelt keys probably mean.
    suggested_keys: BTreeSet<String>,
}

impl SchemaValidator<'_> {
    /// Examines a table: `path` is its name, `place` the same with the numbers of entries. What is wrong leaves `values`.
    fn check_table(&mut self, path: &str, place: &str, table: &DeTable<'_>, values: &mut Table) {
        for (name, value) in table {
            let (path, place) = (join_path(path, name.get_ref()), join_path(place, name.get_ref()));
            self.key_spans.entry(place.clone()).or_insert_with(|| name.span());
            self.check_entry(&path, &place, name, value.get_ref(), values);
        }
        for key in schema::find_table(path).into_iter().flat_map(|section| &section.keys) {
            let name = key.path.rsplit('.').next().unwrap_or_default();
            if key.default == DefaultValue::Required && !table.keys().any(|there| there.get_ref() == name) {
                values.insert(name.to_owned(), placeholder_value(key));
                // The misspelt key is reported already.
                if self.suggested_keys.contains(&key.path) {
                    self.invalid_keys.insert(join_path(place, name));
                    continue;
                }
                let at = self.key_spans.get(place).map_or(0, |span| span.start);
                self.add_problem(
                    &join_path(place, name),
                    at,
                    format!("{} is missing: {}", key.path.replace("[]", ""), key.description),
                );
            }
        }
    }

    /// Examines a key with its value.
    fn check_entry(
        &mut self,
        path: &str,
        place: &str,
        name: &Spanned<std::borrow::Cow<'_, str>>,
        value: &DeValue<'_>,
        values: &mut Table,
    ) {
        let (at, key) = (name.span().start, schema::find_key(path));
        let list = format!("{path}[]");
        let name_text = name.get_ref().as_ref();
        match (value, values.get_mut(name_text)) {
            (DeValue::Table(table), Some(Value::Table(inner))) if schema::find_table(path).is_some() => {
                return self.check_table(path, place, table, inner);
            }
            (DeValue::Array(entries), Some(Value::Array(inner)))
                if schema::find_table(&list).is_some() && inner.iter().all(Value::is_table) =>
            {
                for (number, (entry, inner)) in entries.iter().zip(inner).enumerate() {
                    if let (Some(table), Value::Table(inner)) = (entry.get_ref().as_table(), inner) {
                        let place = format!("{place}[{number}]");
                        self.key_spans.insert(place.clone(), entry.span());
                        self.check_table(&list, &place, table, inner);
                    }
                }
                return;
            }
            _ => {}
        }
        let given = values.get(name_text);
        let misfit = match key {
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
        if let Some(misfit) = misfit {
            self.add_problem(place, at, format!("{} {misfit}", path.replace("[]", "")));
            values.remove(name_text);
            if let Some(key) = key.filter(|key| key.default == DefaultValue::Required) {
                values.insert(name_text.to_owned(), placeholder_value(key));
            }
        }
    }

    fn add_problem(&mut self, place: &str, at: usize, text: String) {
        self.problems.push(problem_at(self.text, at, text));
        self.invalid_keys.insert(place.to_owned());
    }
}

/// Has a table be read whose required key is wrong or missing, so that its other keys are judged.
fn placeholder_value(key: &SettingKey) -> Value {
    match key.value_type {
        ValueType::TextList | ValueType::TableList => Value::Array(Vec::new()),
        _ => Value::String(String::new()),
    }
}

/// An unknown key; of an unknown table, each key in it.
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

/// The key that was meant: the most alike in the same table, or of all, or else one of the same name elsewhere.
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
    let beside = known().filter(|known| split(known).0 == table);
    // What the names of tables have in common does not make keys alike.
    best(&mut beside.map(|known| (alike(&name, &split(known).1), known)))
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
