//! A configuration file as it stands: where each key is, what no server would take, each with its line and column.
//! What values mean is the business of whoever reads them.

use std::{
    collections::BTreeMap,
    fmt,
    ops::Range,
    path::{Path, PathBuf},
};

use serde::Deserialize as _;
use toml::{
    Spanned, Table, Value,
    de::{DeTable, DeValue},
};

use super::{
    keys,
    server::{ConfigError, File},
};

/// The largest file, in bytes.
const MAX_BYTES: u64 = 1024 * 1024;
/// How alike two names must be for one to be meant by the other: of what `strsim` gives from 0 to 1.
const ALIKE: f64 = 0.6;

/// Something that is wrong with a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// The line, from 1.
    pub line: usize,
    /// The column, in characters from 1.
    pub column: usize,
    /// What, and what would be right.
    pub text: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "line {}, column {}: {}", self.line, self.column, self.text)
    }
}

/// A file whose keys are all known, and have values of the right type.
#[derive(Debug)]
pub struct Document {
    /// Where it is.
    pub path: PathBuf,
    text: String,
    /// Its values.
    pub(super) table: Table,
    /// Where each key stands: the name of a setting, and bytes of the text.
    places: BTreeMap<String, Range<usize>>,
}

impl Document {
    /// Reads a file.
    ///
    /// # Errors
    /// When it cannot be read, or with everything that is wrong with its form.
    pub fn read(path: &Path) -> Result<Document, ConfigError> {
        let text = text(path)
            .map_err(|source| ConfigError::Unreadable { path: path.display().to_string(), source })?;
        Document::parse(path, text)
            .map_err(|problems| ConfigError::Wrong { path: path.display().to_string(), problems })
    }

    fn parse(path: &Path, text: String) -> Result<Document, Vec<Problem>> {
        let (root, errors) = DeTable::parse_recoverable(&text);
        let place = |span: Option<Range<usize>>, said: String| {
            problem(&text, span.map_or(0, |span| span.start), said)
        };
        if !errors.is_empty() {
            return Err(errors.iter().map(|error| place(error.span(), error.message().to_owned())).collect());
        }
        let (mut found, mut places, mut unknowns) = (Vec::new(), BTreeMap::new(), Vec::new());
        walk("", root.get_ref(), &mut places, &mut |span, path| {
            found.push((span, unknown(path)));
            unknowns.push(path.to_owned());
        });
        let table: Table =
            toml::from_str(&text).map_err(|error| vec![place(error.span(), error.message().to_owned())])?;
        let whole =
            toml::from_str::<File>(&text).err().map(|error| (error.span(), error.message().to_owned()));
        if let Some((span, said)) = whole {
            found.extend(misfits(&table, &places, &unknowns));
            if found.is_empty() {
                found.push((span.unwrap_or_default(), said));
            }
        }
        if found.is_empty() {
            return Ok(Document { path: path.to_owned(), table, places, text });
        }
        found.sort_by_key(|(span, _)| span.start);
        Err(found.into_iter().map(|(span, said)| place(Some(span), said)).collect())
    }

    /// The settings that it holds, but without these.
    pub(super) fn file_without(&self, left_out: &[String]) -> Result<File, ConfigError> {
        let mut table = self.table.clone();
        for name in left_out {
            table.remove(name.as_str());
        }
        File::deserialize(table)
            .map_err(|error| self.wrong(vec![problem(&self.text, 0, error.message().to_owned())]))
    }

    /// The settings that it holds.
    pub(super) fn file(&self) -> Result<File, ConfigError> {
        self.file_without(&[])
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
    pub fn texts(&self, path: &str) -> Vec<String> {
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
    pub fn line(&self, path: &str) -> Option<usize> {
        self.places.get(path).map(|span| line_and_column(&self.text, span.start).0)
    }

    /// Says of a key what is wrong with it.
    pub(super) fn problem_of(&self, path: &str, said: String) -> Problem {
        problem(&self.text, self.places.get(path).map_or(0, |span| span.start), said)
    }

    pub(super) fn wrong(&self, problems: Vec<Problem>) -> ConfigError {
        ConfigError::Wrong { path: self.path.display().to_string(), problems }
    }
}

fn text(path: &Path) -> std::io::Result<String> {
    let length = std::fs::metadata(path)?.len();
    if length > MAX_BYTES {
        return Err(std::io::Error::other(format!("it has {length} bytes; at most {MAX_BYTES} are allowed")));
    }
    std::fs::read_to_string(path)
}

fn problem(text: &str, at: usize, said: String) -> Problem {
    let (line, column) = line_and_column(text, at);
    Problem { line, column, text: said }
}

fn line_and_column(text: &str, at: usize) -> (usize, usize) {
    let before = text.get(..at).unwrap_or(text);
    let line = before.matches('\n').count() + 1;
    let start = before.rfind('\n').map_or(0, |end| end + 1);
    (line, before[start..].chars().count() + 1)
}

/// Notes where keys stand, and tells of those that are unknown.
fn walk(
    path: &str,
    table: &DeTable<'_>,
    places: &mut BTreeMap<String, Range<usize>>,
    unknown: &mut dyn FnMut(Range<usize>, &str),
) {
    for (name, value) in table {
        let path =
            if path.is_empty() { name.get_ref().to_string() } else { format!("{path}.{}", name.get_ref()) };
        let below = |path: &str| keys::sections().iter().any(|section| section.path == path);
        places.entry(path.clone()).or_insert_with(|| name.span());
        match value.get_ref() {
            DeValue::Table(table) if below(&path) => walk(&path, table, places, unknown),
            DeValue::Array(list) if below(&format!("{path}[]")) => {
                for entry in list.iter().filter_map(|entry| entry.get_ref().as_table()) {
                    walk(&format!("{path}[]"), entry, places, unknown);
                }
            }
            value if keys::find(&path).is_none() && !below(&path) => misspelt(&path, name, value, unknown),
            _ => {}
        }
    }
}

/// An unknown key; of an unknown table, each key in it.
fn misspelt(
    path: &str,
    name: &Spanned<std::borrow::Cow<'_, str>>,
    value: &DeValue<'_>,
    unknown: &mut dyn FnMut(Range<usize>, &str),
) {
    match value {
        DeValue::Table(table) if !table.is_empty() => {
            for (name, value) in table {
                misspelt(&format!("{path}.{}", name.get_ref()), name, value.get_ref(), unknown);
            }
        }
        _ => unknown(name.span(), path),
    }
}

fn unknown(path: &str) -> String {
    match nearest(path) {
        Some(meant) => format!("unknown key `{path}`: did you mean `{meant}`?"),
        None => {
            let table = path.rsplit_once('.').map_or("", |(table, _)| table);
            let known = keys::sections().iter().find(|section| section.path == table);
            let known = known.or(keys::sections().first()).into_iter().flat_map(|section| &section.keys);
            let known = known.map(|key| format!("`{}`", key.path)).collect::<Vec<_>>().join(", ");
            format!("unknown key `{path}`; there are {known}")
        }
    }
}

/// The key that was meant: the most alike in the same table, or of all, or else one of the same name elsewhere.
fn nearest(path: &str) -> Option<&'static str> {
    let split = |path: &'_ str| match path.rsplit_once('.') {
        Some((table, name)) => (table.to_owned(), name.to_owned()),
        None => (String::new(), path.to_owned()),
    };
    let (table, name) = split(path);
    let known = || keys::all().map(|key| key.path.as_str());
    let best = |found: &mut dyn Iterator<Item = (f64, &'static str)>| {
        let near = found.filter(|(alike, _)| *alike >= ALIKE).max_by(|one, other| one.0.total_cmp(&other.0));
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

/// The keys whose values are of the wrong type, but for those that are or have something unknown. Each is tried alone, so
/// that none hides another.
fn misfits(
    table: &Table,
    places: &BTreeMap<String, Range<usize>>,
    unknown: &[String],
) -> Vec<(Range<usize>, String)> {
    let mut found = Vec::new();
    let mut try_alone = |path: &str, alone: Table| {
        let told = unknown.iter().any(|unknown| unknown.starts_with(path));
        if !told && let Err(error) = File::deserialize(alone) {
            let secret = keys::find(path).is_some_and(|key| key.secret);
            let said = if secret { "must be text" } else { error.message() };
            found.push((places.get(path).cloned().unwrap_or_default(), format!("{path}: {said}")));
        }
    };
    for (name, value) in table {
        match value {
            Value::Table(inner) => {
                for (key, value) in inner {
                    let alone = Table::from_iter([(key.clone(), value.clone())]);
                    try_alone(
                        &format!("{name}.{key}"),
                        Table::from_iter([(name.clone(), Value::Table(alone))]),
                    );
                }
            }
            value => try_alone(name, Table::from_iter([(name.clone(), value.clone())])),
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn problems(text: &str) -> Vec<String> {
        match Document::parse(Path::new("keyward.toml"), text.to_owned()) {
            Ok(_) => Vec::new(),
            Err(problems) => problems.iter().map(ToString::to_string).collect(),
        }
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
        assert!(found[0].contains("threads: ") && found[2].contains("gateway.reason_header: "), "{found:?}");
        assert_eq!(problems("a = \nb = ").len(), 2);
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
        let document = Document::parse(Path::new("k.toml"), text).unwrap();
        assert_eq!(document.value("limits.backend").and_then(Value::as_str), Some("redis"));
        assert_eq!(document.texts("limits.backend"), ["redis"]);
        assert_eq!(document.texts("environments[].name"), Vec::<String>::new());
        assert_eq!((document.line("limits.backend"), document.line("limits.url")), (Some(3), None));
    }
}
