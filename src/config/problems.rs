//! Collects everything that is wrong with settings, each problem with the line, variable or flag that it comes from, so
//! that one start reports all of it. The modules of the tables judge what values mean.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
};

use crate::domain::credential_mask::{mask_message, mask_value};

use super::{
    client::env_var,
    file::ConfigFile,
    schema,
    server::{ConfigError, InvalidSetting},
};

/// Where a wrong value is written.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum ProblemSource {
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
pub struct ConfigProblem {
    /// Where.
    pub source: ProblemSource,
    /// What, and what would be right.
    pub text: String,
}

impl fmt::Display for ConfigProblem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.source {
            ProblemSource::File { line, column } => write!(f, "line {line}, column {column}: ")?,
            ProblemSource::Variable(name) | ProblemSource::Flag(name) => write!(f, "{name}: ")?,
            ProblemSource::Unknown => {}
        }
        f.write_str(&self.text)
    }
}

/// What is wrong with the settings of one command.
pub(super) struct ProblemCollector<'d> {
    config_file: Option<&'d ConfigFile>,
    /// The settings that flags or variables give, with their text.
    overrides: BTreeMap<String, String>,
    /// The settings that have a problem: what depends on them is not judged.
    invalid_settings: BTreeSet<String>,
    /// The entries that are being read: of which list, and which of them.
    current_entries: Vec<(&'static str, usize)>,
    problems: Vec<ConfigProblem>,
}

impl<'d> ProblemCollector<'d> {
    /// None yet but those of the file's form.
    pub(super) fn new(document: Option<&'d ConfigFile>) -> ProblemCollector<'d> {
        let (broken, found) = match document {
            Some(document) => (document.invalid_keys.clone(), document.problems.clone()),
            None => Default::default(),
        };
        ProblemCollector {
            config_file: document,
            overrides: BTreeMap::new(),
            invalid_settings: broken,
            current_entries: Vec::new(),
            problems: found,
        }
    }

    /// Reads settings, and fails with everything that was wrong on the way.
    pub(super) fn collect<T>(
        document: Option<&'d ConfigFile>,
        read: impl FnOnce(&mut ProblemCollector<'d>) -> Option<T>,
    ) -> Result<T, ConfigError> {
        let mut problems = ProblemCollector::new(document);
        let read = read(&mut problems);
        match read {
            Some(value) if problems.problems.is_empty() => Ok(value),
            _ => Err(problems.into_error()),
        }
    }

    fn into_error(self) -> ConfigError {
        let mut found = self.problems;
        found.sort();
        found.dedup();
        ConfigError::Invalid {
            path: self.config_file.map(|document| document.path.display().to_string()),
            problems: found,
        }
    }

    /// Notes that a flag or a variable gives a setting, which then counts in place of the file's.
    pub(super) fn set_override(&mut self, setting: &str, text: &str) {
        self.overrides.insert(setting.to_owned(), text.to_owned());
        self.invalid_settings.remove(setting);
    }

    /// Whether a setting has no problem yet, so that others may be judged by it.
    pub(super) fn is_valid(&self, setting: &str) -> bool {
        !self.invalid_settings.contains(&self.indexed_path(setting))
    }

    /// Has nothing be judged by a setting of which a part is wrong.
    pub(super) fn mark_invalid(&mut self, setting: &str) {
        let place = self.indexed_path(setting);
        self.invalid_settings.insert(place);
    }

    /// Reads a part of the settings that is an entry of a list.
    pub(super) fn with_list_entry<T>(
        &mut self,
        list: &'static str,
        at: usize,
        read: impl FnOnce(&mut ProblemCollector<'d>) -> T,
    ) -> T {
        self.current_entries.push((list, at));
        let read = read(self);
        self.current_entries.pop();
        read
    }

    /// Takes a value, or notes what is wrong with it.
    pub(super) fn ok_or_add<T>(&mut self, read: Result<T, InvalidSetting>) -> Option<T> {
        read.map_err(|invalid| self.add(invalid)).ok()
    }

    /// Notes a problem. A setting whose form is wrong already has no other.
    pub(super) fn add(&mut self, invalid: InvalidSetting) {
        let place = self.indexed_path(invalid.setting);
        if !self.is_valid(invalid.setting) {
            return;
        }
        let source = self.find_source(invalid.setting, &place);
        self.invalid_settings.insert(place);
        self.problems.push(ConfigProblem { source, text: invalid.to_string() });
    }

    /// The setting with the numbers of the entries that are being read: `listener[1].address`.
    fn indexed_path(&self, setting: &str) -> String {
        let mut place = String::new();
        for (end, _) in setting.match_indices('.').chain([(setting.len(), "")]) {
            let path = &setting[..end];
            let name = path.rsplit('.').next().unwrap_or_default();
            if !place.is_empty() {
                place.push('.');
            }
            place.push_str(name);
            if let Some((_, at)) = self.current_entries.iter().find(|(list, _)| *list == path) {
                place.push_str(&format!("[{at}]"));
            }
        }
        place
    }

    fn find_source(&self, setting: &str, place: &str) -> ProblemSource {
        let key = schema::find_key_ignoring_lists(setting);
        if let (Some(text), Some(key)) = (self.overrides.get(setting), key) {
            let by_variable = key.env_var.as_ref().filter(|name| env_var(name).as_ref() == Some(text));
            return match (by_variable, &key.flag) {
                (Some(name), _) => ProblemSource::Variable(name.clone()),
                (None, Some(flag)) => ProblemSource::Flag(flag.clone()),
                (None, None) => ProblemSource::Unknown,
            };
        }
        let position = self.config_file.and_then(|document| document.position(place));
        position.map_or(ProblemSource::Unknown, |(line, column)| ProblemSource::File { line, column })
    }

    /// Notes what is wrong with a variable of all programs; its value is not shown.
    pub(super) fn add_variable(&mut self, variable: &str, problem: impl fmt::Display) {
        let source = ProblemSource::Variable(variable.to_owned());
        self.problems.push(ConfigProblem { source, text: format!("the value {problem}") });
    }

    /// Notes several problems of the file that a setting names.
    pub(super) fn add_all(&mut self, setting: &'static str, texts: impl IntoIterator<Item = String>) {
        let place = self.indexed_path(setting);
        let source = self.find_source(setting, &place);
        self.problems.extend(
            texts
                .into_iter()
                .map(|text| ConfigProblem { source: source.clone(), text: mask_message(&text).into_owned() }),
        );
        self.invalid_settings.insert(place);
    }

    /// Notes what is wrong with a flag or variable that has no key in the file.
    pub(super) fn add_flag(&mut self, flag: &str, variable: &str, text: &str, problem: impl fmt::Display) {
        let source = match env_var(variable).as_deref() == Some(text) {
            true => ProblemSource::Variable(variable.to_owned()),
            false => ProblemSource::Flag(flag.to_owned()),
        };
        let problem = problem.to_string();
        let text = format!("{:?} {}", mask_value(text), mask_message(&problem));
        self.problems.push(ConfigProblem { source, text });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::server::invalid_setting;

    #[test]
    fn a_setting_in_an_entry_of_a_list_is_placed_by_its_number() {
        let mut problems = ProblemCollector::new(None);
        let place = problems.with_list_entry("listener", 1, |problems| {
            problems.with_list_entry("listener.identity", 0, |problems| {
                problems.indexed_path("listener.identity.uri")
            })
        });
        assert_eq!(place, "listener[1].identity[0].uri");
    }

    #[test]
    fn a_setting_has_one_problem_and_every_setting_has_its_own() {
        let found = ProblemCollector::collect(None, |problems| -> Option<()> {
            problems.add(invalid_setting("listen", "a", "is wrong"));
            problems.add(invalid_setting("listen", "a", "is wrong again"));
            problems.add(invalid_setting("lease", "b", "is wrong"));
            assert!(!problems.is_valid("lease") && problems.is_valid("rules"));
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
