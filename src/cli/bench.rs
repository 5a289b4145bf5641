//! `keyward bench`: puts a server under load and says what it does, for people who want to know what their machine
//! carries. It starts a server of its own, or asks one that runs; the load is made by this process.
//!
//! Not here: what is right or wrong about an answer beyond how it begins. Tests know that.

mod baseline;
mod bench_keys;
mod child_process;
mod http2_client;
mod load_generator;
mod mode;
mod overload;
mod report;
mod subject;

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use clap::{Args, ValueEnum};
use tokio::signal::unix::{SignalKind, signal};
use zeroize::Zeroizing;

use super::{api_client::ApiClient, console::Console, error::CliError, token_io, value_format::shown_path};
use crate::{
    config::{
        client::{ClientArgs, ClientSettings, OutputFormat},
        duration,
    },
    private_file,
};
use baseline::BaselineKind;
use bench_keys::{BenchKeys, CallMix};
use child_process::{ChildProcess, CoreSet};
use load_generator::{CallSource, ExpectedAnswer, LoadGenerator, LoadShape};
use mode::BenchMode;
use overload::OverloadReport;
use report::{ServerFigures, ServerMeasurement};
use subject::LoadSubject;

/// The settings of a server that is given none: all keys of the load are one account's.
const BENCH_CONFIG: &str = "[account_limits]\nkeys = 1000000000\nlog_rows_per_hour = 1000000000\n";

/// `keyward bench`.
#[derive(Debug, Args)]
pub(super) struct BenchArgs {
    /// What to ask
    #[arg(value_enum)]
    mode: BenchMode,
    /// How many connections
    #[arg(long, default_value_t = 4, value_name = "N", value_parser = parse_up_to::<1000>)]
    connections: usize,
    /// How many calls in flight on each connection
    #[arg(long, default_value_t = 64, value_name = "N", value_parser = parse_up_to::<256>)]
    in_flight: usize,
    /// How many keys the server has
    #[arg(long, default_value_t = 10_000, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    keys: u64,
    /// Of a hundred Checks, how many show a token that nobody has
    #[arg(long, default_value_t = 0.0, value_name = "PERCENT", value_parser = parse_percent)]
    unknown: f64,
    /// Of a hundred Checks, how many are denied for a scope
    #[arg(long, default_value_t = 0.0, value_name = "PERCENT", value_parser = parse_percent)]
    denied: f64,
    /// Checks in a batch
    #[arg(long, default_value_t = 100, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=100))]
    batch: u64,
    /// Long streams on each connection
    #[arg(long, default_value_t = 4, value_name = "N", value_parser = parse_up_to::<256>)]
    streams: usize,
    /// Calls per second, whatever comes of them [default: as fast as answers come]
    #[arg(long, value_name = "N", value_parser = parse_rate)]
    rate: Option<f64>,
    /// How long a round is
    #[arg(long, default_value = "1s", value_parser = duration::parse_timeout, value_name = "DURATION")]
    duration: Duration,
    /// How many rounds
    #[arg(long, default_value_t = 12, value_name = "N", value_parser = parse_up_to::<10_000>)]
    rounds: usize,
    /// How long everybody warms up
    #[arg(long, default_value = "1s", value_parser = duration::parse_timeout, value_name = "DURATION")]
    warm_up: Duration,
    /// Measure tonic's hello-world and an echo in turn, and show ratios
    #[arg(long)]
    baseline: bool,
    /// Measure those that this program serves, too: it is this one with another allocator
    #[arg(long, hide = true, requires = "baseline", value_name = "FILE")]
    baseline_program: Option<PathBuf>,
    /// Give servers the first core alone, and the load the others
    #[arg(long)]
    one_core: bool,
    /// The database of the server that is started [default: an SQLite file of its own]
    #[arg(long, value_name = "URL", conflicts_with = "attach")]
    database: Option<String>,
    /// The settings file of the server that is started. Its addresses, threads and database are the load's own all the
    /// same; files that it names need absolute paths
    #[arg(long, value_name = "FILE", conflicts_with = "attach")]
    config: Option<PathBuf>,
    /// A second server with this settings file is asked in turn with the first, and ratios of the first to it are shown
    #[arg(long, value_name = "FILE", conflicts_with_all = ["attach", "database"])]
    against: Option<PathBuf>,
    /// The program that is started as the server [default: this one]
    #[arg(long, hide = true, value_name = "FILE", conflicts_with = "attach")]
    program: Option<PathBuf>,
    /// Print the figures as one JSON object, as --output json does
    #[arg(long)]
    json: bool,
    /// Ask the server that --server names, with the token of --token-file: keys are made in the account "bench" there
    #[arg(long)]
    attach: bool,
}

fn parse_up_to<const MOST: usize>(text: &str) -> Result<usize, String> {
    let number = text.parse().ok().filter(|number| (1..=MOST).contains(number));
    number.ok_or_else(|| format!("must be 1 to {MOST}"))
}

fn parse_percent(text: &str) -> Result<f64, String> {
    let number = text.parse().ok().filter(|number| (0.0..=100.0).contains(number));
    number.ok_or_else(|| "must be 0 to 100".to_owned())
}

fn parse_rate(text: &str) -> Result<f64, String> {
    let number = text.parse().ok().filter(|number| (0.1..=1e7).contains(number));
    number.ok_or_else(|| "must be 0.1 to 10000000 calls a second".to_owned())
}

/// `keyward bench-baseline`: what the program starts to measure against.
#[derive(Debug, Args)]
pub(super) struct BaselineArgs {
    #[arg(value_enum)]
    baseline: BaselineKind,
}

impl BaselineArgs {
    /// Serves until it is killed.
    pub(super) fn run(&self) -> Result<u8, CliError> {
        baseline::serve(self.baseline).map(|()| 0).map_err(|error| CliError::new(format!("{error:#}")))
    }
}

/// Ends early when the program is told to: the servers that it started end with what this drops.
pub(super) async fn run_until_sigterm(
    run: impl Future<Output = Result<u8, CliError>>,
) -> Result<u8, CliError> {
    /// As a shell says it of a process that SIGTERM has ended.
    const TERMINATED: u8 = 128 + 15;
    let mut terminate = signal(SignalKind::terminate())?;
    tokio::select! {
        ended = run => ended,
        _ = terminate.recv() => Ok(TERMINATED),
    }
}

/// A folder that goes with this value.
struct TempFolder(PathBuf);

impl TempFolder {
    fn new() -> std::io::Result<TempFolder> {
        let path = crate::config::client::temp_dir().join(format!("keyward-bench-{}", std::process::id()));
        private_file::create_private_dir(&path)?;
        Ok(TempFolder(path))
    }
}

impl Drop for TempFolder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// A server that is asked, and how.
struct BenchServer {
    /// What it is called beside another: its settings file.
    label: Option<String>,
    address: String,
    envoy_address: Option<String>,
    token: Zeroizing<String>,
    session: ApiClient,
    process: Option<Arc<ChildProcess>>,
}

/// For a server, which starts elsewhere.
fn absolute_path(path: &Path) -> Result<String, CliError> {
    let told = || shown_path(path);
    let absolute = path.canonicalize().map_err(|error| CliError::new(format!("{}: {error}", told())))?;
    absolute.into_os_string().into_string().map_err(|_| CliError::new(format!("{}: not UTF-8", told())))
}

impl BenchArgs {
    /// Measures, and tells.
    pub(super) async fn run(&self, client: ClientArgs, console: &mut Console) -> Result<u8, CliError> {
        let settings = ClientSettings::load(client)?;
        let json = self.json || settings.output == OutputFormat::Json;
        let folder = TempFolder::new()?;
        let mut servers = vec![self.connect_or_start(settings.clone(), &folder.0).await?];
        if let Some(file) = &self.against {
            let beside = folder.0.join("against");
            private_file::create_private_dir(&beside)?;
            let called = Some(file.display().to_string());
            servers.push(BenchServer {
                label: called,
                ..self.start_server(settings, &beside, Some(file)).await?
            });
        }
        let keys = self.create_keys(&servers).await;
        let ended = match keys {
            Ok(keys) if self.mode == BenchMode::Overload => {
                self.measure_overload(&servers[0], &keys[0], json, console).await
            }
            Ok(keys) => match self.measure(&servers, &keys, &folder.0).await {
                Ok(measured) => self.print_results(&measured, &servers[0], json, console),
                Err(failure) => Err(failure),
            },
            Err(failure) => Err(failure),
        };
        if self.attach {
            bench_keys::revoke_all(&servers[0].session).await?;
        }
        ended
    }

    /// The keys of each server.
    async fn create_keys(&self, servers: &[BenchServer]) -> Result<Vec<BenchKeys>, CliError> {
        let bar = super::console::new_progress_bar(self.keys * servers.len() as u64);
        let mut all = Vec::new();
        for server in servers {
            let keys = BenchKeys::create(&server.session, self.keys, |made| bar.inc(made)).await;
            all.push(keys.inspect_err(|_| bar.finish_and_clear())?);
        }
        bar.finish_and_clear();
        Ok(all)
    }

    /// The server to ask: one that runs, or one that is started.
    async fn connect_or_start(
        &self,
        settings: ClientSettings,
        folder: &Path,
    ) -> Result<BenchServer, CliError> {
        if self.attach {
            let address = settings.server.as_str().strip_prefix("http://").map(str::to_owned);
            let address = address.ok_or_else(|| {
                CliError::new("a load is made over plain connections alone: --server http://HOST:PORT")
            })?;
            let file = settings.token_file.as_deref().ok_or_else(|| {
                CliError::new("no token to call with")
                    .with_hint("name the file that holds it: --token-file FILE")
            })?;
            let token = Zeroizing::new(token_io::read_caller_token(file)?.reveal().to_owned());
            let session = ApiClient::from_settings(&settings)?.without_spinner();
            return Ok(BenchServer {
                label: None,
                address,
                envoy_address: None,
                token,
                session,
                process: None,
            });
        }
        self.start_server(settings, folder, self.config.as_deref()).await
    }

    /// Starts a server in this folder.
    async fn start_server(
        &self,
        settings: ClientSettings,
        folder: &Path,
        config: Option<&Path>,
    ) -> Result<BenchServer, CliError> {
        let threads = if self.one_core { 1 } else { child_process::core_count() }.to_string();
        let database = self.database.as_deref().unwrap_or("sqlite:bench.db");
        let mut arguments = vec!["serve", "--root-key-file", "root.key", "--log", "warn"];
        for flag in ["--listen", "--admin-listen", "--envoy-listen"] {
            arguments.extend([flag, "127.0.0.1:0"]);
        }
        arguments.extend(["--threads", &threads, "--database", database]);
        let usual = folder.join("keyward.toml");
        private_file::replace_content(&usual, BENCH_CONFIG.as_bytes())?;
        let config = absolute_path(config.unwrap_or(&usual))?;
        arguments.extend(["--config", &config]);
        let out = folder.join("server");
        let program = self.program.as_deref().unwrap_or(Path::new(child_process::THIS_PROGRAM));
        let mut running = ChildProcess::start(program, &arguments, folder, &out, self.cores())?;
        let address = running.wait_for_address(&out, "keyward serves gRPC on ").await?;
        let envoy = running.wait_for_address(&out, "keyward serves Envoy on ").await?;
        let root = folder.join("root.key");
        let token = Zeroizing::new(token_io::read_caller_token(&root)?.reveal().to_owned());
        let server = crate::config::client::ServerUrl::parse(&address).map_err(CliError::from)?;
        let settings = ClientSettings { server, token_file: Some(root), ..settings };
        let session = ApiClient::from_settings(&settings)?.without_spinner();
        let (envoy, running) = (Some(envoy), Some(Arc::new(running)));
        Ok(BenchServer { label: None, address, envoy_address: envoy, token, session, process: running })
    }

    fn cores(&self) -> CoreSet {
        if self.one_core { CoreSet::First } else { CoreSet::All }
    }

    async fn measure(
        &self,
        servers: &[BenchServer],
        keys: &[BenchKeys],
        folder: &Path,
    ) -> Result<Vec<ServerMeasurement>, CliError> {
        let mut subjects = Vec::new();
        for (server, keys) in servers.iter().zip(keys) {
            subjects.push(self.new_subject(server, keys, self.mode).await?);
        }
        if matches!(self.mode, BenchMode::Batch | BenchMode::Stream) {
            subjects.push(self.new_subject(&servers[0], &keys[0], BenchMode::Check).await?);
        }
        if self.baseline {
            let others = self.baseline_program.as_deref();
            for program in [Some(Path::new(child_process::THIS_PROGRAM)), others].into_iter().flatten() {
                for baseline in [BaselineKind::Hello, BaselineKind::Echo] {
                    subjects.push(self.new_baseline_subject(baseline, program, folder).await?);
                }
            }
        }
        if self.one_core {
            CoreSet::Others.pin_current_thread()?;
        }
        let (rounds, duration) = match self.mode {
            // Each key is revoked once, however long that takes.
            BenchMode::Revoke => (1, Duration::from_secs(3600)),
            _ => (self.rounds.max(1), self.duration),
        };
        if self.mode != BenchMode::Revoke {
            for subject in &mut subjects {
                subject.run_round(self.warm_up).await?;
            }
        }
        for _ in 0..rounds {
            for subject in &mut subjects {
                let round = subject.run_round(duration).await?;
                subject.measurement.rounds.push(round);
            }
        }
        Ok(subjects.into_iter().map(|subject| subject.measurement).collect())
    }

    /// Measures overload, and shows it.
    async fn measure_overload(
        &self,
        asked: &BenchServer,
        keys: &BenchKeys,
        json: bool,
        console: &mut Console,
    ) -> Result<u8, CliError> {
        let mut closed = self.new_subject(asked, keys, BenchMode::Check).await?;
        if self.one_core {
            CoreSet::Others.pin_current_thread()?;
        }
        let found =
            OverloadReport::measure(&mut closed, self.rounds.max(1), self.duration, self.one_core).await?;
        if json {
            console.print(&format!("{}\n", serde_json::json!(found)))?;
        } else {
            console.print(&found.to_text())?;
            let resident = asked.process.as_ref().map(|running| running.resident_bytes());
            console.print(&self.format_conditions(self.rounds, resident))?;
        }
        match found.wrong_answers() {
            0 => Ok(0),
            wrong => Err(CliError::refused(format!("{wrong} answers were wrong"))),
        }
    }

    async fn new_subject(
        &self,
        asked: &BenchServer,
        keys: &BenchKeys,
        mode: BenchMode,
    ) -> Result<LoadSubject, CliError> {
        let shares = CallMix { unknown: self.unknown, denied: self.denied };
        let calls = match mode {
            BenchMode::Revoke => {
                CallSource::each_once(BenchKeys::prepare_revocations(&asked.session, self.keys).await?)
            }
            mode => CallSource::cycling(keys.prepare_calls(mode, shares, self.batch)),
        };
        let address = match (mode, &asked.envoy_address) {
            (BenchMode::ExtAuthz, Some(envoy)) => envoy,
            _ => &asked.address,
        };
        let target = http2_client::CallTarget {
            address: address.clone(),
            path: mode.method_path().to_owned(),
            token: Some(asked.token.clone()),
        };
        let shape = LoadShape {
            connections: self.connections,
            in_flight: self.in_flight,
            rate: self.rate,
            spin_waits: false,
            streams: (mode == BenchMode::Stream).then_some(self.streams),
        };
        let items = if mode == BenchMode::Batch { self.batch } else { 1 };
        let mut name = mode.method_path().trim_start_matches('/').to_owned();
        if let Some(called) = &asked.label {
            name = format!("{name} with {called}");
        }
        let measured = ServerMeasurement { name, items_per_answer: items, rounds: Vec::new() };
        Ok(LoadSubject {
            measurement: measured,
            load: LoadGenerator::new(target, shape, calls),
            server: asked.process.clone(),
        })
    }

    async fn new_baseline_subject(
        &self,
        baseline: BaselineKind,
        program: &Path,
        folder: &Path,
    ) -> Result<LoadSubject, CliError> {
        let kind = baseline.to_possible_value();
        let kind = kind.as_ref().map_or("", |value| value.get_name());
        let own = program == Path::new(child_process::THIS_PROGRAM);
        let out = folder.join(if own { kind.to_owned() } else { format!("{kind}-too") });
        let mut running =
            ChildProcess::start(program, &["bench-baseline", kind], folder, &out, self.cores())?;
        let address = running.wait_for_address(&out, "baseline on ").await?;
        let call = match baseline {
            BaselineKind::Hello => {
                let request = crate::pb::bench::SayHelloRequest { name: "world".to_owned() };
                bench_keys::frame_call(&request, ExpectedAnswer::Any)
            }
            // As much as a Check's request.
            BaselineKind::Echo => {
                let request = crate::pb::bench::EchoRequest { payload: vec![7; 100] };
                bench_keys::frame_call(&request, ExpectedAnswer::Any)
            }
        };
        let target =
            http2_client::CallTarget { address, path: baseline.method_path().to_owned(), token: None };
        let shape = LoadShape {
            connections: self.connections,
            in_flight: self.in_flight,
            rate: self.rate,
            spin_waits: false,
            streams: None,
        };
        let by = if own { String::new() } else { format!(", by {}", program.display()) };
        let measured = ServerMeasurement {
            name: format!("{}{by}", baseline.label()),
            items_per_answer: 1,
            rounds: Vec::new(),
        };
        let load = LoadGenerator::new(target, shape, CallSource::cycling(vec![call]));
        Ok(LoadSubject { measurement: measured, load, server: Some(Arc::new(running)) })
    }

    fn print_results(
        &self,
        measured: &[ServerMeasurement],
        asked: &BenchServer,
        json: bool,
        console: &mut Console,
    ) -> Result<u8, CliError> {
        let Some((subject, baselines)) = measured.split_first() else { return Ok(0) };
        let baselines: Vec<_> = baselines.iter().collect();
        let mut figures: Vec<ServerFigures> = subject.to_figures(&baselines).into_iter().collect();
        figures.extend(baselines.iter().filter_map(|baseline| baseline.to_figures(&[])));
        let resident = asked.process.as_ref().map(|running| running.resident_bytes());
        if json {
            let told = serde_json::json!({
                "cores": child_process::core_count(),
                "one_core": self.one_core,
                "keys": self.keys,
                "connections": self.connections,
                "in_flight": self.in_flight,
                "rounds": subject.rounds.len(),
                "resident_bytes": resident,
                "figures": figures,
            });
            console.print(&format!("{told}\n"))?;
        } else {
            let each: Vec<_> = figures.iter().map(ServerFigures::to_text).collect();
            console.print(&each.join("\n"))?;
            if let Some(total) = subject.merge_rounds() {
                console.print(&format!("\n{}", report::render_distribution(&total.latency)))?;
            }
            console.print(&self.format_conditions(subject.rounds.len(), resident))?;
        }
        let totals = measured.iter().filter_map(ServerMeasurement::merge_rounds);
        match totals.fold((0, 0), |(wrong, failed), each| (wrong + each.wrong, failed + each.failed)) {
            (0, 0) => Ok(0),
            (wrong, failed) => {
                Err(CliError::refused(format!("{wrong} answers were wrong, and {failed} calls failed")))
            }
        }
    }

    fn format_conditions(&self, rounds: usize, resident: Option<u64>) -> String {
        let held = resident.map_or(String::new(), |bytes| format!("; the server holds {} MiB", bytes >> 20));
        let cores =
            if self.one_core { "the server on one core, the load on others" } else { "all cores for both" };
        format!(
            "\nmedians of {rounds} rounds with their quartiles; {} connections, {} calls in flight on each; {} keys; \
             {} cores, {cores}{held}\n",
            self.connections,
            self.in_flight,
            self.keys,
            child_process::core_count(),
        )
    }
}
