//! `keyward doctor`: inspects a running deployment and prints one finding per line.
//!
//! It opens the database itself, like `replicas`, so that it works when servers do not answer. It changes nothing.

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

/// The largest proxy configuration that is read.
const MAX_PROXY_CONFIG_BYTES: u64 = 16 << 20;

const EXIT_CODES_HELP: &str = "\
Exit codes: 0 nothing fails, though there may be warnings; 1 something fails; 2 the check could not run.

Use the same settings as the servers (--config, or KEYWARD_ variables), so that it inspects their database. It \
sends no token, changes nothing, and may run while servers run.";

#[derive(Debug, Args)]
#[command(after_long_help = EXIT_CODES_HELP)]
pub(super) struct DoctorArgs {
    /// A server's gRPC listener: http://HOST:PORT, https://HOST:PORT or HOST:PORT (repeatable)
    #[arg(long = "server", id = "grpc_server", value_name = "URL")]
    servers: Vec<String>,
    /// A server's admin listener: http://HOST:PORT or HOST:PORT (repeatable)
    #[arg(long, value_name = "URL")]
    admin: Vec<String>,
    /// Envoy's bootstrap configuration, YAML or JSON
    #[arg(long, value_name = "FILE")]
    envoy: Option<PathBuf>,
    /// nginx's configuration, complete or in part; include directives are not followed
    #[arg(long, value_name = "FILE")]
    nginx: Option<PathBuf>,
    /// Traefik's dynamic configuration, YAML or TOML, or Middleware and IngressRoute resources of Kubernetes
    #[arg(long, value_name = "FILE")]
    traefik: Option<PathBuf>,
    /// The format of the findings [default: table]
    #[arg(long, value_enum, value_name = "FORMAT")]
    output: Option<OutputFormat>,
    #[command(flatten, next_help_heading = "The servers' settings, as for keyward serve")]
    serve: Box<ServeArgs>,
}

/// Runs the command. `outer` has the flags before the command's name.
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
    let input = DoctorInput {
        serve_args: &args.serve,
        config_file: document.as_ref(),
        grpc_endpoints: &servers,
        admin_endpoints: &admin,
        envoy: named(envoy.as_ref()),
        nginx: named(nginx.as_ref()),
        traefik: named(traefik.as_ref()),
    };
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    let findings = runtime.block_on(doctor::run_checks(&input, &SystemClock));
    runtime.shutdown_background();
    console.print(&if json { format_json(&findings) } else { format_text(&findings) })?;
    Ok(if findings.has_failures() { EXIT_REFUSED } else { 0 })
}

/// Parses addresses. Errors do not repeat an address, because it may hold a password.
fn parse_urls(flag: &str, texts: &[String]) -> Result<Vec<ServerEndpoint>, CliError> {
    let read = |text: &String| {
        text.parse::<ServerEndpoint>().map_err(|problem| CliError::new(format!("{flag}: {problem}")))
    };
    texts.iter().map(read).collect()
}

fn named(file: Option<&(String, String)>) -> Option<(&str, &str)> {
    file.map(|(name, text)| (name.as_str(), text.as_str()))
}

/// Reads a proxy's configuration; returns its path for messages and its text.
fn read_proxy_config(path: &Path) -> Result<(String, String), CliError> {
    let name = shown_path(path);
    let unreadable = |error: std::io::Error| CliError::new(format!("cannot read {name}: {error}"));
    let text = read_text_up_to(path, MAX_PROXY_CONFIG_BYTES).map_err(unreadable)?;
    Ok((name, text))
}

/// Formats each finding as a line: severity, topic, message and fix.
fn format_text(findings: &DoctorReport) -> String {
    let mut text = String::new();
    for DoctorFinding { severity, topic, message, fix } in findings.iter() {
        let line = match severity {
            Severity::Skipped => {
                format!("{:<5} {topic:<10} not looked at: {}", "-", escape_terminal(message))
            }
            _ => format!("{:<5} {topic:<10} {}", severity.as_str(), escape_terminal(message)),
        };
        let fix = if fix.is_empty() { String::new() } else { format!(" → {}", escape_terminal(fix)) };
        // Writing to a String cannot fail.
        let _ = writeln!(text, "{line}{fix}");
    }
    let count = |wanted: Severity| findings.iter().filter(|finding| finding.severity == wanted).count();
    let [good, warnings, failures, skipped] =
        [Severity::Ok, Severity::Warning, Severity::Failure, Severity::Skipped].map(count);
    let _ = writeln!(text, "{good} ok, {warnings} warn, {failures} fail, {skipped} not looked at");
    text
}

fn format_json(findings: &DoctorReport) -> String {
    let to_json = |DoctorFinding { severity, topic, message, fix }: &DoctorFinding| {
        let fix = Some(fix).filter(|fix| !fix.is_empty());
        json!({ "level": severity.as_str(), "about": topic, "said": message, "fix": fix })
    };
    escape_json(format!("{:#}\n", json!({ "findings": findings.iter().map(to_json).collect::<Vec<_>>() })))
}
