//! The rules file of a server: read at the start, and again whenever it changes.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use tokio::sync::watch;

use crate::{
    config::{
        rules::{self, RulesError},
        server::Settings,
    },
    domain::{account::Environments, route::RuleBook},
    gateway::Gateway,
    reload,
};

/// The rules file, read for the first time.
pub(super) struct Rules {
    path: PathBuf,
    text: String,
    book: RuleBook,
    environments: Environments,
}

impl Rules {
    pub(super) fn read(path: &Path, settings: &Settings) -> Result<Rules, RulesError> {
        let environments = settings.keys.environments.clone();
        let (text, book) = rules::read(path, &environments)?;
        Ok(Rules { path: path.to_owned(), text, book, environments })
    }

    /// Puts the rules in force.
    pub(super) fn apply(&self, gateway: &Gateway) {
        gateway.set_rules(self.book.clone());
    }

    /// Puts every later version in force that is right.
    pub(super) async fn watch(self, gateway: Arc<Gateway>, asked: watch::Receiver<()>) {
        let Rules { path, text, book: _, environments } = self;
        let named = path.clone();
        let take = move |text: &String| gateway.reload(rules::parse_named(&named, text, &environments));
        let read = path.clone();
        reload::watch(&path, text, move || rules::text(&read), take, asked).await;
    }
}
