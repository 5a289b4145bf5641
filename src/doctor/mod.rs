//! Inspects a running deployment and reports what is wrong and how to fix it: settings, database, replicas, servers,
//! certificates, and the configurations of Envoy, nginx and Traefik.
//!
//! - It changes nothing.
//! - What could not be checked is reported as such, and never as good.
//! - Each file checks one subject; judging facts that were already read is a pure function.

mod certificates;
mod database;
mod envoy;
mod nginx;
mod report;
mod servers;
mod traefik;

use crate::{
    clock::Clock,
    config::{
        effective,
        file::ConfigFile,
        server::{ConfigError, ServeArgs, ServerSettings},
    },
};

pub(crate) use report::{DoctorFinding, DoctorReport, Severity};
pub(crate) use servers::ServerEndpoint;

/// The parts of a deployment to inspect.
#[derive(Debug)]
pub(crate) struct DoctorInput<'a> {
    /// The flags of the servers.
    pub serve_args: &'a ServeArgs,
    /// The configuration file of the servers; None = they have none.
    pub config_file: Option<&'a ConfigFile>,
    /// The gRPC addresses of the servers.
    pub grpc_endpoints: &'a [ServerEndpoint],
    /// The addresses of the servers' admin pages.
    pub admin_endpoints: &'a [ServerEndpoint],
    /// Envoy's bootstrap: the file name and the text.
    pub envoy: Option<(&'a str, &'a str)>,
    /// nginx's configuration: the file name and the text.
    pub nginx: Option<(&'a str, &'a str)>,
    /// Traefik's dynamic configuration: the file name and the text.
    pub traefik: Option<(&'a str, &'a str)>,
}

/// Runs every check, one after the other.
pub(crate) async fn run_checks(input: &DoctorInput<'_>, clock: &dyn Clock) -> DoctorReport {
    let mut findings = DoctorReport::default();
    let settings = check_settings(input, &mut findings);
    let head = match &settings {
        Some(settings) => database::check_database(settings, clock, &mut findings).await,
        None => {
            findings.skip("store", "the settings are invalid");
            None
        }
    };
    servers::check_servers(input.admin_endpoints, input.grpc_endpoints, head, clock, &mut findings).await;
    certificates::check_certificate_files(input.config_file, clock, &mut findings);
    match input.envoy {
        Some((name, text)) => envoy::check_bootstrap(name, text, settings.as_ref(), &mut findings),
        None => findings.skip("envoy", "its bootstrap; name it with --envoy FILE"),
    }
    match input.nginx {
        Some((name, text)) => nginx::check_configuration(name, text, &mut findings),
        None => findings.skip(nginx::TOPIC, "its configuration; name it with --nginx FILE"),
    }
    match input.traefik {
        Some((name, text)) => traefik::check_configuration(name, text, &mut findings),
        None => findings.skip(traefik::TOPIC, "its dynamic configuration; name it with --traefik FILE"),
    }
    findings
}

fn check_settings(input: &DoctorInput<'_>, findings: &mut DoctorReport) -> Option<ServerSettings> {
    const TOPIC: &str = "settings";
    let settings = match ServerSettings::resolve(input.serve_args, input.config_file) {
        Ok(settings) => settings,
        Err(ConfigError::Invalid { problems, .. }) => {
            for problem in problems {
                findings.fail(TOPIC, problem.to_string(), "correct it: no server starts with this");
            }
            return None;
        }
        Err(error) => {
            findings.fail(TOPIC, error.to_string(), "correct it: no server starts with this");
            return None;
        }
    };
    match input.config_file {
        Some(config_file) => {
            let warnings = effective::password_warnings(config_file);
            for warning in &warnings {
                findings.warn(
                    TOPIC,
                    format!("{}, {warning}", config_file.path.display()),
                    "take the password out of the file",
                );
            }
            if warnings.is_empty() {
                findings.pass(TOPIC, format!("{} is accepted", config_file.path.display()));
            }
        }
        None => findings.skip(TOPIC, "a configuration file; name it with --config FILE"),
    }
    Some(settings)
}
