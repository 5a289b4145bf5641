//! Loads the rules file at the start, and applies it again when it changes.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use tokio::sync::watch;

use crate::{
    config::{
        rules::{self, RulesFileError},
        server::ServerSettings,
    },
    domain::{account::EnvironmentSet, route::RuleBook},
    file_watcher,
    gateway::Gateway,
};

/// The rules file, as first read.
pub(super) struct RulesFile {
    path: PathBuf,
    text: String,
    rule_book: RuleBook,
    environments: EnvironmentSet,
}

impl RulesFile {
    pub(super) fn load(path: &Path, settings: &ServerSettings) -> Result<RulesFile, RulesFileError> {
        let environments = settings.key_settings.environments.clone();
        let (text, book) = rules::load_rules(path, &environments)?;
        Ok(RulesFile { path: path.to_owned(), text, rule_book: book, environments })
    }

    /// Applies the rules to the gateway.
    pub(super) fn apply(&self, gateway: &Gateway) {
        gateway.set_rules(self.rule_book.clone());
    }

    /// Applies every later valid version of the file.
    pub(super) async fn watch(self, gateway: Arc<Gateway>, reload: watch::Receiver<()>) {
        let RulesFile { path, text, rule_book: _, environments } = self;
        let named = path.clone();
        let take =
            move |text: &String| gateway.reload_rules(rules::parse_rules_file(&named, text, &environments));
        let read = path.clone();
        file_watcher::watch_file(&path, text, move || rules::read_rules_text(&read), take, reload).await;
    }
}
