//! What is wrong with a running deployment, and what to do about it. It looks and changes nothing: the settings, the
//! database, the replicas on it, the servers, certificates, the configurations of Envoy, nginx and Traefik. What could not be looked
//! at is reported as such, and never passes for good.
//!
//! Each file looks at one thing and gives [`DoctorFinding`]s; what is decided from facts at hand is a pure function.

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
        effective,
        file::ConfigFile,
        server::{ConfigError, ServeArgs, ServerSettings},
    },
};

pub use servers::ServerEndpoint;

/// How long each thing that is looked at may take to answer.
const CHECK_TIMEOUT: Duration = Duration::from_secs(5);

/// How grave a finding is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Severity {
    /// As it should be.
    Ok,
    /// It works, and something is asking for trouble.
    Warning,
    /// It does not work, or not as it must.
    Failure,
    /// It was not looked at.
    Skipped,
}

impl Severity {
    /// Its word.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Severity::Ok => "ok",
            Severity::Warning => "warn",
            Severity::Failure => "fail",
            Severity::Skipped => "not looked at",
        }
    }
}

/// Something that was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DoctorFinding {
    /// How grave it is.
    pub severity: Severity,
    /// What it is about, in a word.
    pub topic: &'static str,
    /// What was found.
    pub message: String,
    /// What to do; empty = nothing.
    pub fix: String,
}

/// Findings, in the order in which they were made.
#[derive(Debug, Default)]
pub struct DoctorReport(Vec<DoctorFinding>);

impl DoctorReport {
    fn add(&mut self, level: Severity, about: &'static str, said: impl Into<String>, fix: impl Into<String>) {
        self.0.push(DoctorFinding { severity: level, topic: about, message: said.into(), fix: fix.into() });
    }

    fn pass(&mut self, about: &'static str, said: impl Into<String>) {
        self.add(Severity::Ok, about, said, "");
    }

    fn warn(&mut self, about: &'static str, said: impl Into<String>, fix: impl Into<String>) {
        self.add(Severity::Warning, about, said, fix);
    }

    fn fail(&mut self, about: &'static str, said: impl Into<String>, fix: impl Into<String>) {
        self.add(Severity::Failure, about, said, fix);
    }

    fn skip(&mut self, about: &'static str, said: impl Into<String>) {
        self.add(Severity::Skipped, about, said, "");
    }

    /// How many are warnings or failures.
    fn problem_count(&self) -> usize {
        self.0
            .iter()
            .filter(|finding| matches!(finding.severity, Severity::Warning | Severity::Failure))
            .count()
    }

    /// Each of them.
    pub fn iter(&self) -> impl Iterator<Item = &DoctorFinding> {
        self.0.iter()
    }

    /// A line for each, for tests: how grave, and what was found.
    #[cfg(test)]
    fn lines(&self) -> Vec<String> {
        self.iter().map(|found| format!("{} {}", found.severity.as_str(), found.message)).collect()
    }

    /// Whether there is a failure among them.
    #[must_use]
    pub fn has_failures(&self) -> bool {
        self.0.iter().any(|finding| finding.severity == Severity::Failure)
    }
}

/// What is to be looked at.
#[derive(Debug)]
pub struct DoctorInput<'a> {
    /// The flags that the servers are started with.
    pub serve_args: &'a ServeArgs,
    /// Their file, read; None = they have none.
    pub config_file: Option<&'a ConfigFile>,
    /// The servers' gRPC addresses.
    pub grpc_endpoints: &'a [ServerEndpoint],
    /// The servers' admin pages.
    pub admin_endpoints: &'a [ServerEndpoint],
    /// Envoy's bootstrap: its name and its text.
    pub envoy: Option<(&'a str, &'a str)>,
    /// nginx's configuration: its name and its text.
    pub nginx: Option<(&'a str, &'a str)>,
    /// Traefik's dynamic configuration: its name and its text.
    pub traefik: Option<(&'a str, &'a str)>,
}

/// Looks at all of it.
pub async fn run_checks(asked: &DoctorInput<'_>, clock: &dyn Clock) -> DoctorReport {
    let mut findings = DoctorReport::default();
    let settings = check_settings(asked, &mut findings);
    let head = match &settings {
        Some(settings) => database::check_database(settings, clock, &mut findings).await,
        None => {
            findings.skip("store", "the settings do not say which");
            None
        }
    };
    servers::check_servers(asked, head, clock, &mut findings).await;
    certificates::check_certificate_files(asked.config_file, clock, &mut findings);
    match asked.envoy {
        Some((name, text)) => envoy::check_bootstrap(name, text, settings.as_ref(), &mut findings),
        None => findings.skip("envoy", "its bootstrap; name it with --envoy FILE"),
    }
    match asked.nginx {
        Some((name, text)) => nginx::check_configuration(name, text, &mut findings),
        None => findings.skip(nginx::TOPIC, "its configuration; name it with --nginx FILE"),
    }
    match asked.traefik {
        Some((name, text)) => traefik::examine(name, text, &mut findings),
        None => findings.skip(traefik::ABOUT, "its dynamic configuration; name it with --traefik FILE"),
    }
    findings
}

fn check_settings(asked: &DoctorInput<'_>, findings: &mut DoctorReport) -> Option<ServerSettings> {
    const TOPIC: &str = "settings";
    let settings = match ServerSettings::resolve(asked.serve_args, asked.config_file) {
        Ok(settings) => settings,
        Err(ConfigError::Invalid { problems, .. }) => {
            for problem in problems {
                findings.fail(TOPIC, problem.to_string(), "no server starts with this: correct it");
            }
            return None;
        }
        Err(error) => {
            findings.fail(TOPIC, error.to_string(), "no server starts with this: correct it");
            return None;
        }
    };
    match asked.config_file {
        Some(document) => {
            let advice = effective::password_warnings(document);
            for advice in &advice {
                findings.warn(
                    TOPIC,
                    format!("{}, {advice}", document.path.display()),
                    "take the password out of the file",
                );
            }
            if advice.is_empty() {
                findings.pass(TOPIC, format!("{} is accepted", document.path.display()));
            }
        }
        None => findings.skip(TOPIC, "a configuration file; name it with --config FILE"),
    }
    Some(settings)
}

/// A length of time for people: whole seconds, and milliseconds of what is shorter.
fn format_rounded(length: Duration) -> String {
    let whole = if length >= Duration::from_secs(1) {
        length.as_secs() * 1000
    } else {
        u64::try_from(length.as_millis()).unwrap_or(0)
    };
    crate::config::duration::format_duration(Duration::from_millis(whole))
}
