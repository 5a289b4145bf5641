//! The torture harness: PostgreSQL with a synchronous standby and several replicas as real processes, clients at full
//! speed, faults at random, and a judge who hears of every call. `docs/reliability.md` says what it shows.
//!
//! `cargo test --test torture -- --minutes 2`, or `make torture MINUTES=30`. Exit code 1: something did not hold.
//! Linux only: it reads `/proc` and signals processes.

#![allow(
    clippy::unwrap_used,
    clippy::disallowed_methods,
    clippy::print_stdout,
    clippy::print_stderr,
    missing_docs,
    reason = "a test stops at what it did not expect, and its name says what it holds"
)]

mod audit;
mod bouncer;
mod breakable_proxy;
mod change_driver;
mod checkers;
mod cluster;
#[allow(dead_code, reason = "the simulator's, which has clocks too")]
#[path = "../it/lease/dice.rs"]
mod dice;
mod faults;
mod guard;
mod initial_keys;
mod judge;
mod key_lives;
mod mutants;
mod namespaces;
#[allow(dead_code, reason = "the tests', which have one server and many databases")]
#[path = "../it/postgres.rs"]
mod postgres;
#[allow(dead_code, reason = "the tests', which start single servers")]
#[path = "../it/process.rs"]
mod process;
mod replicas;
mod report;
mod reversible_changes;
mod run;
mod shared_state;
mod test_bed;

use std::{
    path::PathBuf,
    process::ExitCode,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use clap::Parser;

use crate::{faults::FaultKind, replicas::ReplicaConfig, run::TortureRun, test_bed::TestBedConfig};

/// Tortures replicas over PostgreSQL, and judges every answer.
#[derive(Parser, Clone, Debug)]
struct TortureArguments {
    /// How long there are to be faults
    #[arg(long, default_value_t = 2.0)]
    minutes: f64,
    /// What decides everything that is left to chance
    #[arg(long)]
    seed: Option<u64>,
    /// How many replicas
    #[arg(long, default_value_t = 3)]
    replicas: usize,
    /// How many owners change keys at once; each has a checker at every replica
    #[arg(long, default_value_t = 4)]
    squads: usize,
    /// The lease, in milliseconds
    #[arg(long, default_value_t = 2000)]
    lease: u64,
    /// Cut links by proxies alone, as where there are no network namespaces
    #[arg(long)]
    no_namespaces: bool,
    /// Torture builds that leave out one rule each, all or these, until that is noticed; KEYWARD_BIN is a breakable build
    #[arg(long, value_name = "RULE", num_args = 0..)]
    mutants: Option<Vec<String>>,
}

fn main() -> ExitCode {
    let arguments = TortureArguments::parse();
    if !arguments.no_namespaces {
        namespaces::enter();
    }
    let seed = arguments.seed.unwrap_or_else(|| {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
        now.as_micros() as u64
    });
    println!("seed {seed}; --seed {seed} repeats the choices of this run");
    let program =
        std::env::var_os("KEYWARD_BIN").map_or_else(|| env!("CARGO_BIN_EXE_keyward").into(), PathBuf::from);
    let lease = Duration::from_millis(arguments.lease);
    let setup = ReplicaConfig { program, lease, environment: Vec::new(), wrapper: Vec::new() };
    let run = TortureRun {
        seed,
        length: Duration::from_secs_f64(arguments.minutes * 60.0),
        squads: arguments.squads,
        plan: TestBedConfig { replicas: arguments.replicas, setup, clocks: Vec::new() },
        faults: FaultKind::AT_REPLICAS.into_iter().chain(FaultKind::AT_DATABASE).collect(),
        victim: None,
        until_allowed: false,
    };
    let held = match arguments.mutants {
        Some(rules) => mutants::run(&run, &rules),
        None => run.run().held,
    };
    if held { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
