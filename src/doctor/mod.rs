//! What is wrong with a running deployment, and what to do about it. It looks and changes nothing: the settings, the
//! database, the replicas on it, the servers, certificates, the configurations of Envoy, nginx and Traefik. What could not be looked
//! at is reported as such, and never passes for good.
//!
//! Each file looks at one thing and gives [`Finding`]s; what is decided from facts at hand is a pure function.

mod certificates;
mod database;
pub mod envoy;
mod nginx;
mod servers;
mod traefik;

use std::time::Duration;

use crate::{
    clock::Clock,
    config::{
        document::Document,
        effective,
        server::{ConfigError, ServeArgs, Settings},
    },
};

pub use servers::Url;

/// How long each thing that is looked at may take to answer.
const PATIENCE: Duration = Duration::from_secs(5);

/// How grave a finding is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Level {
    /// As it should be.
    Good,
    /// It works, and something is asking for trouble.
    Warning,
    /// It does not work, or not as it must.
    Failure,
    /// It was not looked at.
    Unseen,
}

impl Level {
    /// Its word.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Level::Good => "ok",
            Level::Warning => "warn",
            Level::Failure => "fail",
            Level::Unseen => "not looked at",
        }
    }
}

/// Something that was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// How grave it is.
    pub level: Level,
    /// What it is about, in a word.
    pub about: &'static str,
    /// What was found.
    pub said: String,
    /// What to do; empty = nothing.
    pub fix: String,
}

/// Findings, in the order in which they were made.
#[derive(Debug, Default)]
pub struct Findings(Vec<Finding>);

impl Findings {
    fn add(&mut self, level: Level, about: &'static str, said: impl Into<String>, fix: impl Into<String>) {
        self.0.push(Finding { level, about, said: said.into(), fix: fix.into() });
    }

    fn good(&mut self, about: &'static str, said: impl Into<String>) {
        self.add(Level::Good, about, said, "");
    }

    fn warn(&mut self, about: &'static str, said: impl Into<String>, fix: impl Into<String>) {
        self.add(Level::Warning, about, said, fix);
    }

    fn fail(&mut self, about: &'static str, said: impl Into<String>, fix: impl Into<String>) {
        self.add(Level::Failure, about, said, fix);
    }

    fn unseen(&mut self, about: &'static str, said: impl Into<String>) {
        self.add(Level::Unseen, about, said, "");
    }

    /// How many are warnings or failures.
    fn grave(&self) -> usize {
        self.0.iter().filter(|finding| matches!(finding.level, Level::Warning | Level::Failure)).count()
    }

    /// Each of them.
    pub fn iter(&self) -> impl Iterator<Item = &Finding> {
        self.0.iter()
    }

    /// A line for each, for tests: how grave, and what was found.
    #[cfg(test)]
    fn lines(&self) -> Vec<String> {
        self.iter().map(|found| format!("{} {}", found.level.as_str(), found.said)).collect()
    }

    /// Whether there is a failure among them.
    #[must_use]
    pub fn failed(&self) -> bool {
        self.0.iter().any(|finding| finding.level == Level::Failure)
    }
}

/// What is to be looked at.
#[derive(Debug)]
pub struct Asked<'a> {
    /// The flags that the servers are started with.
    pub serve: &'a ServeArgs,
    /// Their file, read; None = they have none.
    pub document: Option<&'a Document>,
    /// The servers' gRPC addresses.
    pub servers: &'a [Url],
    /// The servers' admin pages.
    pub admin: &'a [Url],
    /// Envoy's bootstrap: its name and its text.
    pub envoy: Option<(&'a str, &'a str)>,
    /// nginx's configuration: its name and its text.
    pub nginx: Option<(&'a str, &'a str)>,
    /// Traefik's dynamic configuration: its name and its text.
    pub traefik: Option<(&'a str, &'a str)>,
}

/// Looks at all of it.
pub async fn examine(asked: &Asked<'_>, clock: &dyn Clock) -> Findings {
    let mut findings = Findings::default();
    let settings = settings(asked, &mut findings);
    let head = match &settings {
        Some(settings) => database::examine(settings, clock, &mut findings).await,
        None => {
            findings.unseen("store", "the settings do not say which");
            None
        }
    };
    servers::examine(asked, head, clock, &mut findings).await;
    certificates::examine_files(asked.document, clock, &mut findings);
    match asked.envoy {
        Some((name, text)) => envoy::examine(name, text, settings.as_ref(), &mut findings),
        None => findings.unseen("envoy", "its bootstrap; name it with --envoy FILE"),
    }
    match asked.nginx {
        Some((name, text)) => nginx::examine(name, text, &mut findings),
        None => findings.unseen(nginx::ABOUT, "its configuration; name it with --nginx FILE"),
    }
    match asked.traefik {
        Some((name, text)) => traefik::examine(name, text, &mut findings),
        None => findings.unseen(traefik::ABOUT, "its dynamic configuration; name it with --traefik FILE"),
    }
    findings
}

fn settings(asked: &Asked<'_>, findings: &mut Findings) -> Option<Settings> {
    const ABOUT: &str = "settings";
    let settings = match Settings::of(asked.serve, asked.document) {
        Ok(settings) => settings,
        Err(ConfigError::Wrong { problems, .. }) => {
            for problem in problems {
                findings.fail(ABOUT, problem.to_string(), "no server starts with this: correct it");
            }
            return None;
        }
        Err(error) => {
            findings.fail(ABOUT, error.to_string(), "no server starts with this: correct it");
            return None;
        }
    };
    match asked.document {
        Some(document) => {
            let advice = effective::advice(document);
            for advice in &advice {
                findings.warn(
                    ABOUT,
                    format!("{}, {advice}", document.path.display()),
                    "take the password out of the file",
                );
            }
            if advice.is_empty() {
                findings.good(ABOUT, format!("{} is accepted", document.path.display()));
            }
        }
        None => findings.unseen(ABOUT, "a configuration file; name it with --config FILE"),
    }
    Some(settings)
}

/// A length of time for people: whole seconds, and milliseconds of what is shorter.
fn spoken(length: Duration) -> String {
    let whole = if length >= Duration::from_secs(1) {
        length.as_secs() * 1000
    } else {
        u64::try_from(length.as_millis()).unwrap_or(0)
    };
    crate::config::duration::format(Duration::from_millis(whole))
}
