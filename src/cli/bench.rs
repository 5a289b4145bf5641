//! `keyward bench`: puts a server under load and says what it does, for people who want to know what their machine
//! carries. It starts a server of its own, or asks one that runs; the load is made by this process.
//!
//! Not here: what is right or wrong about an answer beyond how it begins. Tests know that.

mod baseline;
mod keys;
mod load;
mod overload;
mod process;
mod report;
mod wire;

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use clap::{Args, ValueEnum};
use tokio::signal::unix::{SignalKind, signal};
use zeroize::Zeroizing;

use super::{client::Session, console::Console, failure::Failure, token, values::shown_path};
use crate::{
    config::{
        client::{ClientArgs, ClientSettings, Output},
        duration,
    },
    private_file,
};
use baseline::Baseline;
use keys::{Keys, Shares};
use load::{Calls, Expected, Load, Shape};
use overload::Overload;
use process::{Cores, Running};
use report::{Figures, Measured, Round};

/// The settings of a server that is given none: all keys of the load are one account's.
const ONE_ACCOUNT: &str = "[account_limits]\nkeys = 1000000000\nlog_rows_per_hour = 1000000000\n";

/// `keyward bench`.
#[derive(Debug, Args)]
pub(super) struct BenchArgs {
    /// What to ask
    #[arg(value_enum)]
    mode: Mode,
    /// How many connections
    #[arg(long, default_value_t = 4, value_name = "N", value_parser = up_to::<1000>)]
    connections: usize,
    /// How many calls in flight on each connection
    #[arg(long, default_value_t = 64, value_name = "N", value_parser = up_to::<256>)]
    in_flight: usize,
    /// How many keys the server has
    #[arg(long, default_value_t = 10_000, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    keys: u64,
    /// Of a hundred Checks, how many show a token that nobody has
    #[arg(long, default_value_t = 0.0, value_name = "PERCENT", value_parser = percent)]
    unknown: f64,
    /// Of a hundred Checks, how many are denied for a scope
    #[arg(long, default_value_t = 0.0, value_name = "PERCENT", value_parser = percent)]
    denied: f64,
    /// Checks in a batch
    #[arg(long, default_value_t = 100, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=100))]
    batch: u64,
    /// Long streams on each connection
    #[arg(long, default_value_t = 4, value_name = "N", value_parser = up_to::<256>)]
    streams: usize,
    /// Calls per second, whatever comes of them [default: as fast as answers come]
    #[arg(long, value_name = "N", value_parser = rate)]
    rate: Option<f64>,
    /// How long a round is
    #[arg(long, default_value = "1s", value_parser = duration::parse_timeout, value_name = "DURATION")]
    duration: Duration,
    /// How many rounds
    #[arg(long, default_value_t = 12, value_name = "N", value_parser = up_to::<10_000>)]
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

fn up_to<const MOST: usize>(text: &str) -> Result<usize, String> {
    let number = text.parse().ok().filter(|number| (1..=MOST).contains(number));
    number.ok_or_else(|| format!("must be 1 to {MOST}"))
}

fn percent(text: &str) -> Result<f64, String> {
    let number = text.parse().ok().filter(|number| (0.0..=100.0).contains(number));
    number.ok_or_else(|| "must be 0 to 100".to_owned())
}

fn rate(text: &str) -> Result<f64, String> {
    let number = text.parse().ok().filter(|number| (0.1..=1e7).contains(number));
    number.ok_or_else(|| "must be 0.1 to 10000000 calls a second".to_owned())
}

/// What to ask.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum Mode {
    /// AuthzService.Check
    Check,
    /// AuthzService.BatchCheck
    Batch,
    /// AuthzService.StreamCheck
    Stream,
    /// KeyService.Create
    Create,
    /// KeyService.Revoke, each key once
    Revoke,
    /// What Envoy asks
    ExtAuthz,
    /// AuthzService.Check at shares of what the server can answer, from half to twice as many
    Overload,
}

impl Mode {
    fn path(self) -> &'static str {
        match self {
            Mode::Check | Mode::Overload => "/keyward.v1.AuthzService/Check",
            Mode::Batch => "/keyward.v1.AuthzService/BatchCheck",
            Mode::Stream => "/keyward.v1.AuthzService/StreamCheck",
            Mode::Create => "/keyward.v1.KeyService/Create",
            Mode::Revoke => "/keyward.v1.KeyService/Revoke",
            Mode::ExtAuthz => "/envoy.service.auth.v3.Authorization/Check",
        }
    }
}

/// `keyward bench-baseline`: what the program starts to measure against.
#[derive(Debug, Args)]
pub(super) struct BaselineArgs {
    #[arg(value_enum)]
    baseline: Baseline,
}

impl BaselineArgs {
    /// Serves until it is killed.
    pub(super) fn run(&self) -> Result<u8, Failure> {
        baseline::serve(self.baseline).map(|()| 0).map_err(|error| Failure::usage(format!("{error:#}")))
    }
}

/// Ends early when the program is told to: the servers that it started end with what this drops.
pub(super) async fn unless_terminated(run: impl Future<Output = Result<u8, Failure>>) -> Result<u8, Failure> {
    /// As a shell says it of a process that SIGTERM has ended.
    const TERMINATED: u8 = 128 + 15;
    let mut terminate = signal(SignalKind::terminate())?;
    tokio::select! {
        ended = run => ended,
        _ = terminate.recv() => Ok(TERMINATED),
    }
}

/// A server under load.
struct Subject {
    measured: Measured,
    load: Load,
    server: Option<Arc<Running>>,
}

impl Subject {
    async fn round(&mut self, duration: Duration) -> Result<Round, Failure> {
        let server = || self.server.as_ref().map(|server| server.cpu());
        let (before, own) = (server(), process::own_cpu());
        let tally = self.load.round(duration).await?;
        let server = server().zip(before).map(|(after, before)| after.saturating_sub(before));
        Ok(Round { tally, server, client: process::own_cpu().saturating_sub(own) })
    }
}

impl Subject {
    /// The same server in an open loop.
    fn at_rate(&self, rate: f64, spins: bool) -> Subject {
        let measured = Measured { name: self.measured.name.clone(), items: 1, rounds: Vec::new() };
        Subject { measured, load: self.load.at_rate(rate, spins), server: self.server.clone() }
    }
}

/// A folder that goes with this value.
struct Folder(PathBuf);

impl Folder {
    fn new() -> std::io::Result<Folder> {
        let path =
            crate::config::client::temporary_folder().join(format!("keyward-bench-{}", std::process::id()));
        private_file::create_folder(&path)?;
        Ok(Folder(path))
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// A server that is asked, and how.
struct Asked {
    /// What it is called beside another: its settings file.
    called: Option<String>,
    address: String,
    envoy: Option<String>,
    token: Zeroizing<String>,
    session: Session,
    running: Option<Arc<Running>>,
}

/// For a server, which starts elsewhere.
fn absolute(path: &Path) -> Result<String, Failure> {
    let told = || shown_path(path);
    let absolute = path.canonicalize().map_err(|error| Failure::usage(format!("{}: {error}", told())))?;
    absolute.into_os_string().into_string().map_err(|_| Failure::usage(format!("{}: not UTF-8", told())))
}

impl BenchArgs {
    /// Measures, and tells.
    pub(super) async fn run(&self, client: ClientArgs, console: &mut Console) -> Result<u8, Failure> {
        let settings = ClientSettings::load(client)?;
        let json = self.json || settings.output == Output::Json;
        let folder = Folder::new()?;
        let mut servers = vec![self.asked(settings.clone(), &folder.0).await?];
        if let Some(file) = &self.against {
            let beside = folder.0.join("against");
            private_file::create_folder(&beside)?;
            let called = Some(file.display().to_string());
            servers.push(Asked { called, ..self.start(settings, &beside, Some(file)).await? });
        }
        let keys = self.make_keys(&servers).await;
        let ended = match keys {
            Ok(keys) if self.mode == Mode::Overload => {
                self.overload(&servers[0], &keys[0], json, console).await
            }
            Ok(keys) => match self.measure(&servers, &keys, &folder.0).await {
                Ok(measured) => self.tell(&measured, &servers[0], json, console),
                Err(failure) => Err(failure),
            },
            Err(failure) => Err(failure),
        };
        if self.attach {
            keys::revoke_all(&servers[0].session).await?;
        }
        ended
    }

    /// The keys of each server.
    async fn make_keys(&self, servers: &[Asked]) -> Result<Vec<Keys>, Failure> {
        let bar = super::console::progress(self.keys * servers.len() as u64);
        let mut all = Vec::new();
        for server in servers {
            let keys = Keys::make(&server.session, self.keys, |made| bar.inc(made)).await;
            all.push(keys.inspect_err(|_| bar.finish_and_clear())?);
        }
        bar.finish_and_clear();
        Ok(all)
    }

    /// The server to ask: one that runs, or one that is started.
    async fn asked(&self, settings: ClientSettings, folder: &Path) -> Result<Asked, Failure> {
        if self.attach {
            let address = settings.server.as_str().strip_prefix("http://").map(str::to_owned);
            let address = address.ok_or_else(|| {
                Failure::usage("a load is made over plain connections alone: --server http://HOST:PORT")
            })?;
            let file = settings.token_file.as_deref().ok_or_else(|| {
                Failure::usage("no token to call with").hint("name the file that holds it: --token-file FILE")
            })?;
            let token = Zeroizing::new(token::read_own(file)?.reveal().to_owned());
            let session = Session::open(&settings)?.quiet();
            return Ok(Asked { called: None, address, envoy: None, token, session, running: None });
        }
        self.start(settings, folder, self.config.as_deref()).await
    }

    /// Starts a server in this folder.
    async fn start(
        &self,
        settings: ClientSettings,
        folder: &Path,
        config: Option<&Path>,
    ) -> Result<Asked, Failure> {
        let threads = if self.one_core { 1 } else { process::core_count() }.to_string();
        let database = self.database.as_deref().unwrap_or("sqlite:bench.db");
        let mut arguments = vec!["serve", "--root-key-file", "root.key", "--log", "warn"];
        for flag in ["--listen", "--admin-listen", "--envoy-listen"] {
            arguments.extend([flag, "127.0.0.1:0"]);
        }
        arguments.extend(["--threads", &threads, "--database", database]);
        let usual = folder.join("keyward.toml");
        private_file::replace(&usual, ONE_ACCOUNT.as_bytes())?;
        let config = absolute(config.unwrap_or(&usual))?;
        arguments.extend(["--config", &config]);
        let out = folder.join("server");
        let program = self.program.as_deref().unwrap_or(Path::new(process::THIS));
        let mut running = Running::start(program, &arguments, folder, &out, self.cores())?;
        let address = running.address(&out, "keyward serves gRPC on ").await?;
        let envoy = running.address(&out, "keyward serves Envoy on ").await?;
        let root = folder.join("root.key");
        let token = Zeroizing::new(token::read_own(&root)?.reveal().to_owned());
        let server = crate::config::client::ServerUrl::parse(&address).map_err(Failure::from)?;
        let settings = ClientSettings { server, token_file: Some(root), ..settings };
        let session = Session::open(&settings)?.quiet();
        let (envoy, running) = (Some(envoy), Some(Arc::new(running)));
        Ok(Asked { called: None, address, envoy, token, session, running })
    }

    fn cores(&self) -> Cores {
        if self.one_core { Cores::First } else { Cores::All }
    }

    async fn measure(
        &self,
        servers: &[Asked],
        keys: &[Keys],
        folder: &Path,
    ) -> Result<Vec<Measured>, Failure> {
        let mut subjects = Vec::new();
        for (server, keys) in servers.iter().zip(keys) {
            subjects.push(self.subject(server, keys, self.mode).await?);
        }
        if matches!(self.mode, Mode::Batch | Mode::Stream) {
            subjects.push(self.subject(&servers[0], &keys[0], Mode::Check).await?);
        }
        if self.baseline {
            let others = self.baseline_program.as_deref();
            for program in [Some(Path::new(process::THIS)), others].into_iter().flatten() {
                for baseline in [Baseline::Hello, Baseline::Echo] {
                    subjects.push(self.baseline_subject(baseline, program, folder).await?);
                }
            }
        }
        if self.one_core {
            Cores::Others.keep_to()?;
        }
        let (rounds, duration) = match self.mode {
            // Each key is revoked once, however long that takes.
            Mode::Revoke => (1, Duration::from_secs(3600)),
            _ => (self.rounds.max(1), self.duration),
        };
        if self.mode != Mode::Revoke {
            for subject in &mut subjects {
                subject.round(self.warm_up).await?;
            }
        }
        for _ in 0..rounds {
            for subject in &mut subjects {
                let round = subject.round(duration).await?;
                subject.measured.rounds.push(round);
            }
        }
        Ok(subjects.into_iter().map(|subject| subject.measured).collect())
    }

    /// Measures overload, and shows it.
    async fn overload(
        &self,
        asked: &Asked,
        keys: &Keys,
        json: bool,
        console: &mut Console,
    ) -> Result<u8, Failure> {
        let mut closed = self.subject(asked, keys, Mode::Check).await?;
        if self.one_core {
            Cores::Others.keep_to()?;
        }
        let found = Overload::measure(&mut closed, self.rounds.max(1), self.duration, self.one_core).await?;
        if json {
            console.print(&format!("{}\n", serde_json::json!(found)))?;
        } else {
            console.print(&found.show())?;
            let resident = asked.running.as_ref().map(|running| running.resident());
            console.print(&self.conditions(self.rounds, resident))?;
        }
        match found.wrong() {
            0 => Ok(0),
            wrong => Err(Failure::refused(format!("{wrong} answers were wrong"))),
        }
    }

    async fn subject(&self, asked: &Asked, keys: &Keys, mode: Mode) -> Result<Subject, Failure> {
        let shares = Shares { unknown: self.unknown, denied: self.denied };
        let calls = match mode {
            Mode::Revoke => Calls::once(Keys::revocations(&asked.session, self.keys).await?),
            mode => Calls::ring(keys.calls(mode, shares, self.batch)),
        };
        let address = match (mode, &asked.envoy) {
            (Mode::ExtAuthz, Some(envoy)) => envoy,
            _ => &asked.address,
        };
        let target = wire::Target {
            address: address.clone(),
            path: mode.path().to_owned(),
            token: Some(asked.token.clone()),
        };
        let shape = Shape {
            connections: self.connections,
            in_flight: self.in_flight,
            rate: self.rate,
            spins: false,
            streams: (mode == Mode::Stream).then_some(self.streams),
        };
        let items = if mode == Mode::Batch { self.batch } else { 1 };
        let mut name = mode.path().trim_start_matches('/').to_owned();
        if let Some(called) = &asked.called {
            name = format!("{name} with {called}");
        }
        let measured = Measured { name, items, rounds: Vec::new() };
        Ok(Subject { measured, load: Load::new(target, shape, calls), server: asked.running.clone() })
    }

    async fn baseline_subject(
        &self,
        baseline: Baseline,
        program: &Path,
        folder: &Path,
    ) -> Result<Subject, Failure> {
        let kind = baseline.to_possible_value();
        let kind = kind.as_ref().map_or("", |value| value.get_name());
        let own = program == Path::new(process::THIS);
        let out = folder.join(if own { kind.to_owned() } else { format!("{kind}-too") });
        let mut running = Running::start(program, &["bench-baseline", kind], folder, &out, self.cores())?;
        let address = running.address(&out, "baseline on ").await?;
        let call = match baseline {
            Baseline::Hello => {
                let request = crate::pb::bench::SayHelloRequest { name: "world".to_owned() };
                keys::call(&request, Expected::Any)
            }
            // As much as a Check's request.
            Baseline::Echo => {
                let request = crate::pb::bench::EchoRequest { payload: vec![7; 100] };
                keys::call(&request, Expected::Any)
            }
        };
        let target = wire::Target { address, path: baseline.path().to_owned(), token: None };
        let shape = Shape {
            connections: self.connections,
            in_flight: self.in_flight,
            rate: self.rate,
            spins: false,
            streams: None,
        };
        let by = if own { String::new() } else { format!(", by {}", program.display()) };
        let measured = Measured { name: format!("{}{by}", baseline.name()), items: 1, rounds: Vec::new() };
        let load = Load::new(target, shape, Calls::ring(vec![call]));
        Ok(Subject { measured, load, server: Some(Arc::new(running)) })
    }

    fn tell(
        &self,
        measured: &[Measured],
        asked: &Asked,
        json: bool,
        console: &mut Console,
    ) -> Result<u8, Failure> {
        let Some((subject, baselines)) = measured.split_first() else { return Ok(0) };
        let baselines: Vec<_> = baselines.iter().collect();
        let mut figures: Vec<Figures> = subject.figures(&baselines).into_iter().collect();
        figures.extend(baselines.iter().filter_map(|baseline| baseline.figures(&[])));
        let resident = asked.running.as_ref().map(|running| running.resident());
        if json {
            let told = serde_json::json!({
                "cores": process::core_count(),
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
            let each: Vec<_> = figures.iter().map(Figures::show).collect();
            console.print(&each.join("\n"))?;
            if let Some(total) = subject.total() {
                console.print(&format!("\n{}", report::distribution(&total.latency)))?;
            }
            console.print(&self.conditions(subject.rounds.len(), resident))?;
        }
        let totals = measured.iter().filter_map(Measured::total);
        match totals.fold((0, 0), |(wrong, failed), each| (wrong + each.wrong, failed + each.failed)) {
            (0, 0) => Ok(0),
            (wrong, failed) => {
                Err(Failure::refused(format!("{wrong} answers were wrong, and {failed} calls failed")))
            }
        }
    }

    fn conditions(&self, rounds: usize, resident: Option<u64>) -> String {
        let held = resident.map_or(String::new(), |bytes| format!("; the server holds {} MiB", bytes >> 20));
        let cores =
            if self.one_core { "the server on one core, the load on others" } else { "all cores for both" };
        format!(
            "\nmedians of {rounds} rounds with their quartiles; {} connections, {} calls in flight on each; {} keys; \
             {} cores, {cores}{held}\n",
            self.connections,
            self.in_flight,
            self.keys,
            process::core_count(),
        )
    }
}
