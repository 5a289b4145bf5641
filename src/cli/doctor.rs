//! `keyward doctor`: what is wrong with a running deployment, one finding a line. Like `replicas`, it has the database at
//! hand, since it is for when servers do not answer; it changes nothing.

use std::{
    fmt::Write as _,
    path::{Path, PathBuf},
};

use clap::Args;
use serde_json::json;

use super::{
    config::config_file_error,
    console::Console,
    error::{CliError, EXIT_REFUSED},
    table::escape_terminal,
    value_format::shown_path,
};
use crate::{
    clock::SystemClock,
    config::{
        client::{ClientArgs, ClientSettings, OutputFormat},
        file::{ConfigFile, read_text_up_to},
        server::ServeArgs,
    },
    doctor::{self, DoctorFinding, DoctorInput, DoctorReport, ServerEndpoint, Severity},
    domain::text::escape_json,
};

/// The largest configuration of a proxy that is read, in bytes.
const MAX_PROXY_CONFIG_BYTES: u64 = 16 << 20;

const EXIT_CODES_HELP: &str = "\
Exit codes: 0 nothing fails, though there may be warnings; 1 something fails; 2 it could not be looked at.

Give it what the servers are started with (--config, or KEYWARD_ variables), so that it looks at their database. It \
sends no token, changes nothing, and may run beside servers.";

/// `keyward doctor`.
#[derive(Debug, Args)]
#[command(after_long_help = EXIT_CODES_HELP)]
pub(super) struct DoctorArgs {
    /// A server's gRPC listener: http://HOST:PORT, https://HOST:PORT or HOST:PORT; may be given again
    #[arg(long = "server", id = "grpc_server", value_name = "URL")]
    servers: Vec<String>,
    /// A server's admin listener: http://HOST:PORT or HOST:PORT; may be given again
    #[arg(long, value_name = "URL")]
    admin: Vec<String>,
    /// Envoy's bootstrap, YAML or JSON
    #[arg(long, value_name = "FILE")]
    envoy: Option<PathBuf>,
    /// nginx's configuration, whole or in part; what it includes is not followed
    #[arg(long, value_name = "FILE")]
    nginx: Option<PathBuf>,
    /// Traefik's dynamic configuration, YAML or TOML, or Middleware and IngressRoute resources of Kubernetes
    #[arg(long, value_name = "FILE")]
    traefik: Option<PathBuf>,
    /// How to print the findings [default: table]
    #[arg(long, value_enum, value_name = "FORMAT")]
    output: Option<OutputFormat>,
    /// What the servers are started with.
    #[command(flatten, next_help_heading = "The servers' settings, as for keyward serve")]
    serve: Box<ServeArgs>,
}

/// Runs the command; `outer` are flags before its name.
pub(super) fn run(args: DoctorArgs, outer: ClientArgs, console: &mut Console) -> Result<u8, CliError> {
    let output = ClientArgs { output: args.output.or(outer.output), ..ClientArgs::default() };
    let outer_server = outer.server;
    let json = ClientSettings::load(output)?.output == OutputFormat::Json;
    let document =
        args.serve.database.config.as_deref().map(ConfigFile::load).transpose().map_err(config_file_error)?;
    let [envoy, nginx, traefik] = [&args.envoy, &args.nginx, &args.traefik]
        .map(|path| path.as_deref().map(read_proxy_config).transpose());
    let (envoy, nginx, traefik) = (envoy?, nginx?, traefik?);
    let mut servers = parse_urls("--server", &args.servers)?;
    if servers.is_empty() {
        servers = parse_urls("--server", outer_server.as_slice())?;
    }
    let admin = parse_urls("--admin", &args.admin)?;
    let asked = DoctorInput {
        serve_args: &args.serve,
        config_file: document.as_ref(),
        grpc_endpoints: &servers,
        admin_endpoints: &admin,
        envoy: named(envoy.as_ref()),
        nginx: named(nginx.as_ref()),
        traefik: named(traefik.as_ref()),
    };
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    let findings = runtime.block_on(doctor::run_checks(&asked, &SystemClock));
    runtime.shutdown_background();
    console.print(&if json { format_json(&findings) } else { format_text(&findings) })?;
    Ok(if findings.has_failures() { EXIT_REFUSED } else { 0 })
}

/// Reads addresses; one that is wrong is not repeated, since it may hold a password.
fn parse_urls(flag: &str, texts: &[String]) -> Result<Vec<ServerEndpoint>, CliError> {
    let read = |text: &String| {
        text.parse::<ServerEndpoint>().map_err(|problem| CliError::new(format!("{flag}: {problem}")))
    };
    texts.iter().map(read).collect()
}

fn named(file: Option<&(String, String)>) -> Option<(&str, &str)> {
    file.map(|(name, text)| (name.as_str(), text.as_str()))
}

/// The name and the text of a proxy's configuration.
fn read_proxy_config(path: &Path) -> Result<(String, String), CliError> {
    let name = shown_path(path);
    let unreadable = |error: std::io::Error| CliError::new(format!("{name} cannot be read: {error}"));
    let text = read_text_up_to(path, MAX_PROXY_CONFIG_BYTES).map_err(unreadable)?;
    Ok((name, text))
}

/// A line for each: how grave, about what, what, and what to do.
fn format_text(findings: &DoctorReport) -> String {
    let mut text = String::new();
    for DoctorFinding { severity: level, topic: about, message: said, fix } in findings.iter() {
        let line = match level {
            Severity::Skipped => format!("{:<5} {about:<10} not looked at: {}", "-", escape_terminal(said)),
            _ => format!("{:<5} {about:<10} {}", level.as_str(), escape_terminal(said)),
        };
        let fix = if fix.is_empty() { String::new() } else { format!(" → {}", escape_terminal(fix)) };
        // Writing to a String does not fail.
        let _ = writeln!(text, "{line}{fix}");
    }
    let count = |wanted: Severity| findings.iter().filter(|finding| finding.severity == wanted).count();
    let [good, warnings, failures, unseen] =
        [Severity::Ok, Severity::Warning, Severity::Failure, Severity::Skipped].map(count);
    let _ = writeln!(text, "{good} ok, {warnings} warn, {failures} fail, {unseen} not looked at");
    text
}

fn format_json(findings: &DoctorReport) -> String {
    let one = |DoctorFinding { severity: level, topic: about, message: said, fix }: &DoctorFinding| {
        let fix = Some(fix).filter(|fix| !fix.is_empty());
        json!({ "level": level.as_str(), "about": about, "said": said, "fix": fix })
    };
    escape_json(format!("{:#}\n", json!({ "findings": findings.iter().map(one).collect::<Vec<_>>() })))
}
