//! Collects everything that is wrong with settings, each problem with the line, variable or flag that it comes from, so
//! that one start reports all of it. The modules of the tables judge what values mean.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
};

use crate::domain::credential_mask::{mask_message, mask_value};

use super::{
    client::environment,
    document::Document,
    keys,
    server::{ConfigError, Invalid},
};

/// Where a wrong value is written.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Source {
    /// In the file.
    File {
        /// From 1.
        line: usize,
        /// In characters, from 1.
        column: usize,
    },
    /// In this environment variable.
    Variable(String),
    /// In this flag.
    Flag(String),
    /// Nowhere: a default, or what several settings make together.
    Unknown,
}

/// Something that is wrong with settings.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Problem {
    /// Where.
    pub source: Source,
    /// What, and what would be right.
    pub text: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.source {
            Source::File { line, column } => write!(f, "line {line}, column {column}: ")?,
            Source::Variable(name) | Source::Flag(name) => write!(f, "{name}: ")?,
            Source::Unknown => {}
        }
        f.write_str(&self.text)
    }
}

/// What is wrong with the settings of one command.
pub(super) struct Problems<'d> {
    document: Option<&'d Document>,
    /// The settings that flags or variables give, with their text.
    given: BTreeMap<String, String>,
    /// The settings that have a problem: what depends on them is not judged.
    broken: BTreeSet<String>,
    /// The entries that are being read: of which list, and which of them.
    entries: Vec<(&'static str, usize)>,
    found: Vec<Problem>,
}

impl<'d> Problems<'d> {
    /// None yet but those of the file's form.
    pub(super) fn new(document: Option<&'d Document>) -> Problems<'d> {
        let (broken, found) = match document {
            Some(document) => (document.broken.clone(), document.problems.clone()),
            None => Default::default(),
        };
        Problems { document, given: BTreeMap::new(), broken, entries: Vec::new(), found }
    }

    /// Reads settings, and fails with everything that was wrong on the way.
    pub(super) fn collect<T>(
        document: Option<&'d Document>,
        read: impl FnOnce(&mut Problems<'d>) -> Option<T>,
    ) -> Result<T, ConfigError> {
        let mut problems = Problems::new(document);
        let read = read(&mut problems);
        match read {
            Some(value) if problems.found.is_empty() => Ok(value),
            _ => Err(problems.into_error()),
        }
    }

    fn into_error(self) -> ConfigError {
        let mut found = self.found;
        found.sort();
        found.dedup();
        ConfigError::Wrong {
            path: self.document.map(|document| document.path.display().to_string()),
            problems: found,
        }
    }

    /// Notes that a flag or a variable gives a setting, which then counts in place of the file's.
    pub(super) fn give(&mut self, setting: &str, text: &str) {
        self.given.insert(setting.to_owned(), text.to_owned());
        self.broken.remove(setting);
    }

    /// Whether a setting has no problem yet, so that others may be judged by it.
    pub(super) fn is_sound(&self, setting: &str) -> bool {
        !self.broken.contains(&self.place(setting))
    }

    /// Has nothing be judged by a setting of which a part is wrong.
    pub(super) fn distrust(&mut self, setting: &str) {
        let place = self.place(setting);
        self.broken.insert(place);
    }

    /// Reads a part of the settings that is an entry of a list.
    pub(super) fn in_entry<T>(
        &mut self,
        list: &'static str,
        at: usize,
        read: impl FnOnce(&mut Problems<'d>) -> T,
    ) -> T {
        self.entries.push((list, at));
        let read = read(self);
        self.entries.pop();
        read
    }

    /// Takes a value, or notes what is wrong with it.
    pub(super) fn take<T>(&mut self, read: Result<T, Invalid>) -> Option<T> {
        read.map_err(|invalid| self.add(invalid)).ok()
    }

    /// Notes a problem. A setting whose form is wrong already has no other.
    pub(super) fn add(&mut self, invalid: Invalid) {
        let place = self.place(invalid.setting);
        if !self.is_sound(invalid.setting) {
            return;
        }
        let source = self.source(invalid.setting, &place);
        self.broken.insert(place);
        self.found.push(Problem { source, text: invalid.to_string() });
    }

    /// The setting with the numbers of the entries that are being read: `listener[1].address`.
    fn place(&self, setting: &str) -> String {
        let mut place = String::new();
        for (end, _) in setting.match_indices('.').chain([(setting.len(), "")]) {
            let path = &setting[..end];
            let name = path.rsplit('.').next().unwrap_or_default();
            if !place.is_empty() {
                place.push('.');
            }
            place.push_str(name);
            if let Some((_, at)) = self.entries.iter().find(|(list, _)| *list == path) {
                place.push_str(&format!("[{at}]"));
            }
        }
        place
    }

    fn source(&self, setting: &str, place: &str) -> Source {
        let key = keys::find_unlisted(setting);
        if let (Some(text), Some(key)) = (self.given.get(setting), key) {
            let by_variable = key.variable.as_ref().filter(|name| environment(name).as_ref() == Some(text));
            return match (by_variable, &key.flag) {
                (Some(name), _) => Source::Variable(name.clone()),
                (None, Some(flag)) => Source::Flag(flag.clone()),
                (None, None) => Source::Unknown,
            };
        }
        let position = self.document.and_then(|document| document.position(place));
        position.map_or(Source::Unknown, |(line, column)| Source::File { line, column })
    }

    /// Notes what is wrong with a variable of all programs; its value is not shown.
    pub(super) fn add_variable(&mut self, variable: &str, problem: impl fmt::Display) {
        let source = Source::Variable(variable.to_owned());
        self.found.push(Problem { source, text: format!("the value {problem}") });
    }

    /// Notes several problems of the file that a setting names.
    pub(super) fn add_all(&mut self, setting: &'static str, texts: impl IntoIterator<Item = String>) {
        let place = self.place(setting);
        let source = self.source(setting, &place);
        self.found.extend(
            texts
                .into_iter()
                .map(|text| Problem { source: source.clone(), text: mask_message(&text).into_owned() }),
        );
        self.broken.insert(place);
    }

    /// Notes what is wrong with a flag or variable that has no key in the file.
    pub(super) fn add_flag(&mut self, flag: &str, variable: &str, text: &str, problem: impl fmt::Display) {
        let source = match environment(variable).as_deref() == Some(text) {
            true => Source::Variable(variable.to_owned()),
            false => Source::Flag(flag.to_owned()),
        };
        let problem = problem.to_string();
        let text = format!("{:?} {}", mask_value(text), mask_message(&problem));
        self.found.push(Problem { source, text });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::server::invalid;

    #[test]
    fn a_setting_in_an_entry_of_a_list_is_placed_by_its_number() {
        let mut problems = Problems::new(None);
        let place = problems.in_entry("listener", 1, |problems| {
            problems.in_entry("listener.identity", 0, |problems| problems.place("listener.identity.uri"))
        });
        assert_eq!(place, "listener[1].identity[0].uri");
    }

    #[test]
    fn a_setting_has_one_problem_and_every_setting_has_its_own() {
        let found = Problems::collect(None, |problems| -> Option<()> {
            problems.add(invalid("listen", "a", "is wrong"));
            problems.add(invalid("listen", "a", "is wrong again"));
            problems.add(invalid("lease", "b", "is wrong"));
            assert!(!problems.is_sound("lease") && problems.is_sound("rules"));
            Some(())
        });
        let text = found.unwrap_err().to_string();
        assert!(
            text.contains("lease = \"b\" is wrong") && text.contains("listen = \"a\" is wrong"),
            "{text}"
        );
        assert!(!text.contains("again"), "{text}");
    }
}
