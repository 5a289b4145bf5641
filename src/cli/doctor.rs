//! `keyward doctor`: what is wrong with a running deployment, one finding a line. Like `replicas`, it has the database at
//! hand, since it is for when servers do not answer; it changes nothing.

use std::{
    fmt::Write as _,
    path::{Path, PathBuf},
};

use clap::Args;
use serde_json::json;

use super::{
    config::wrong,
    console::Console,
    failure::{Failure, REFUSED},
    table::clean,
    values::shown_path,
};
use crate::{
    clock::SystemClock,
    config::{
        client::{ClientArgs, ClientSettings, Output},
        document::Document,
        server::ServeArgs,
    },
    doctor::{self, Asked, Finding, Findings, Level, Url},
    domain::text::escape_json,
};

/// The largest configuration of a proxy that is read, in bytes.
const MAX_CONFIGURATION: u64 = 16 << 20;

const CODES: &str = "\
Exit codes: 0 nothing fails, though there may be warnings; 1 something fails; 2 it could not be looked at.

Give it what the servers are started with (--config, or KEYWARD_ variables), so that it looks at their database. It \
sends no token, changes nothing, and may run beside servers.";

/// `keyward doctor`.
#[derive(Debug, Args)]
#[command(after_long_help = CODES)]
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
    output: Option<Output>,
    /// What the servers are started with.
    #[command(flatten, next_help_heading = "The servers' settings, as for keyward serve")]
    serve: Box<ServeArgs>,
}

/// Runs the command; `outer` are flags before its name.
pub(super) fn run(args: DoctorArgs, outer: ClientArgs, console: &mut Console) -> Result<u8, Failure> {
    let output = ClientArgs { output: args.output.or(outer.output), ..ClientArgs::default() };
    let outer_server = outer.server;
    let json = ClientSettings::load(output)?.output == Output::Json;
    let document = args.serve.database.config.as_deref().map(Document::read).transpose().map_err(wrong)?;
    let [envoy, nginx, traefik] =
        [&args.envoy, &args.nginx, &args.traefik].map(|path| path.as_deref().map(configuration).transpose());
    let (envoy, nginx, traefik) = (envoy?, nginx?, traefik?);
    let mut servers = urls("--server", &args.servers)?;
    if servers.is_empty() {
        servers = urls("--server", outer_server.as_slice())?;
    }
    let admin = urls("--admin", &args.admin)?;
    let asked = Asked {
        serve: &args.serve,
        document: document.as_ref(),
        servers: &servers,
        admin: &admin,
        envoy: named(envoy.as_ref()),
        nginx: named(nginx.as_ref()),
        traefik: named(traefik.as_ref()),
    };
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    let findings = runtime.block_on(doctor::examine(&asked, &SystemClock));
    runtime.shutdown_background();
    console.print(&if json { as_json(&findings) } else { words(&findings) })?;
    Ok(if findings.failed() { REFUSED } else { 0 })
}

/// Reads addresses; one that is wrong is not repeated, since it may hold a password.
fn urls(flag: &str, texts: &[String]) -> Result<Vec<Url>, Failure> {
    let read =
        |text: &String| text.parse::<Url>().map_err(|problem| Failure::usage(format!("{flag}: {problem}")));
    texts.iter().map(read).collect()
}

fn named(file: Option<&(String, String)>) -> Option<(&str, &str)> {
    file.map(|(name, text)| (name.as_str(), text.as_str()))
}

/// The name and the text of a proxy's configuration.
fn configuration(path: &Path) -> Result<(String, String), Failure> {
    let name = shown_path(path);
    let unreadable = |error: std::io::Error| Failure::usage(format!("{name} cannot be read: {error}"));
    let length = std::fs::metadata(path).map_err(unreadable)?.len();
    if length > MAX_CONFIGURATION {
        let problem = format!("{name} has {length} bytes; a configuration may have {MAX_CONFIGURATION}");
        return Err(Failure::usage(problem));
    }
    let text = std::fs::read_to_string(path).map_err(unreadable)?;
    Ok((name, text))
}

/// A line for each: how grave, about what, what, and what to do.
fn words(findings: &Findings) -> String {
    let mut text = String::new();
    for Finding { level, about, said, fix } in findings.iter() {
        let line = match level {
            Level::Unseen => format!("{:<5} {about:<10} not looked at: {}", "-", clean(said)),
            _ => format!("{:<5} {about:<10} {}", level.as_str(), clean(said)),
        };
        let fix = if fix.is_empty() { String::new() } else { format!(" → {}", clean(fix)) };
        // Writing to a String does not fail.
        let _ = writeln!(text, "{line}{fix}");
    }
    let count = |wanted: Level| findings.iter().filter(|finding| finding.level == wanted).count();
    let [good, warnings, failures, unseen] =
        [Level::Good, Level::Warning, Level::Failure, Level::Unseen].map(count);
    let _ = writeln!(text, "{good} ok, {warnings} warn, {failures} fail, {unseen} not looked at");
    text
}

fn as_json(findings: &Findings) -> String {
    let one = |Finding { level, about, said, fix }: &Finding| {
        let fix = Some(fix).filter(|fix| !fix.is_empty());
        json!({ "level": level.as_str(), "about": about, "said": said, "fix": fix })
    };
    escape_json(format!("{:#}\n", json!({ "findings": findings.iter().map(one).collect::<Vec<_>>() })))
}
