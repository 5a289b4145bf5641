//! Collects all problems of the settings with their sources, so that one start reports them together.
//!
//! The modules of the tables validate the values; this module knows which line, variable or flag each value comes from.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
};

use crate::domain::credential_mask::{mask_message, mask_value};

use super::{
    client::env_var,
    error::{ConfigError, ConfigProblem, InvalidSetting, ProblemSource},
    file::ConfigFile,
    schema,
};

/// The problems that one validation of settings has found so far.
pub(super) struct ProblemCollector<'d> {
    config_file: Option<&'d ConfigFile>,
    /// Settings that a flag or variable sets, with their text.
    overrides: BTreeMap<String, String>,
    /// Settings with a problem: whatever depends on them is not validated.
    invalid_settings: BTreeSet<String>,
    /// The list entries that are being validated: the list and the index.
    current_entries: Vec<(&'static str, usize)>,
    problems: Vec<ConfigProblem>,
}

impl<'d> ProblemCollector<'d> {
    /// Starts with the problems that parsing the file has found.
    pub(super) fn new(config_file: Option<&'d ConfigFile>) -> ProblemCollector<'d> {
        let (invalid_settings, problems) = match config_file {
            Some(config_file) => (config_file.invalid_keys.clone(), config_file.problems.clone()),
            None => Default::default(),
        };
        ProblemCollector {
            config_file,
            overrides: BTreeMap::new(),
            invalid_settings,
            current_entries: Vec::new(),
            problems,
        }
    }

    /// Runs a validation and fails if it has added any problem.
    pub(super) fn collect<T>(
        config_file: Option<&'d ConfigFile>,
        read: impl FnOnce(&mut ProblemCollector<'d>) -> Option<T>,
    ) -> Result<T, ConfigError> {
        let mut problems = ProblemCollector::new(config_file);
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
            path: self.config_file.map(|config_file| config_file.path.display().to_string()),
            problems: found,
        }
    }

    /// Records that a flag or variable overrides the file's value of a setting.
    pub(super) fn set_override(&mut self, setting: &str, text: &str) {
        self.overrides.insert(setting.to_owned(), text.to_owned());
        self.invalid_settings.remove(setting);
    }

    /// Whether a setting has no problem yet, so that other settings may be validated against it.
    pub(super) fn is_valid(&self, setting: &str) -> bool {
        !self.invalid_settings.contains(&self.indexed_path(setting))
    }

    /// Excludes a setting from the validation of others, because a part of it is invalid or unknown.
    pub(super) fn mark_invalid(&mut self, setting: &str) {
        let path = self.indexed_path(setting);
        self.invalid_settings.insert(path);
    }

    /// Validates an entry of a list: settings within `read` belong to that entry.
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

    /// The value, or None after the problem was added.
    pub(super) fn ok_or_add<T>(&mut self, read: Result<T, InvalidSetting>) -> Option<T> {
        read.map_err(|invalid| self.add(invalid)).ok()
    }

    /// Adds a problem, unless the setting has one already.
    pub(super) fn add(&mut self, invalid: InvalidSetting) {
        let path = self.indexed_path(invalid.setting);
        if !self.is_valid(invalid.setting) {
            return;
        }
        let source = self.find_source(invalid.setting, &path);
        self.invalid_settings.insert(path);
        self.problems.push(ConfigProblem { source, text: invalid.to_string() });
    }

    /// The path of a setting with the indexes of the current entries: `listener[1].address`.
    fn indexed_path(&self, setting: &str) -> String {
        let mut indexed = String::new();
        for (end, _) in setting.match_indices('.').chain([(setting.len(), "")]) {
            let path = &setting[..end];
            let name = path.rsplit('.').next().unwrap_or_default();
            if !indexed.is_empty() {
                indexed.push('.');
            }
            indexed.push_str(name);
            if let Some((_, at)) = self.current_entries.iter().find(|(list, _)| *list == path) {
                indexed.push_str(&format!("[{at}]"));
            }
        }
        indexed
    }

    fn find_source(&self, setting: &str, path: &str) -> ProblemSource {
        let key = schema::find_key_ignoring_lists(setting);
        if let (Some(text), Some(key)) = (self.overrides.get(setting), key) {
            let by_variable = key.env_var.as_ref().filter(|name| env_var(name).as_ref() == Some(text));
            return match (by_variable, &key.flag) {
                (Some(name), _) => ProblemSource::Variable(name.clone()),
                (None, Some(flag)) => ProblemSource::Flag(flag.clone()),
                (None, None) => ProblemSource::Unknown,
            };
        }
        let position = self.config_file.and_then(|config_file| config_file.position(path));
        position.map_or(ProblemSource::Unknown, |(line, column)| ProblemSource::File { line, column })
    }

    /// Adds a problem of a variable that is not Keyward's own, such as `OTEL_…`; its value is not shown.
    pub(super) fn add_variable(&mut self, variable: &str, problem: impl fmt::Display) {
        let source = ProblemSource::Variable(variable.to_owned());
        self.problems.push(ConfigProblem { source, text: format!("the value {problem}") });
    }

    /// Adds the problems of the file that a setting names.
    pub(super) fn add_all(&mut self, setting: &'static str, texts: impl IntoIterator<Item = String>) {
        let path = self.indexed_path(setting);
        let source = self.find_source(setting, &path);
        self.problems.extend(
            texts
                .into_iter()
                .map(|text| ConfigProblem { source: source.clone(), text: mask_message(&text).into_owned() }),
        );
        self.invalid_settings.insert(path);
    }

    /// Adds a problem of a flag or variable that has no key in the file.
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
    use crate::config::error::invalid_setting;

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
