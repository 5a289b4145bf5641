//! The goals of `docs/performance.md` that `keyward bench` measures, each told as met or missed. Ratios are medians of
//! alternating rounds in one run; read them, and not the rates, from machine to machine.
//!
//! `cargo bench --bench goals -- [checks|observed|items|creates|tokens|overload]`: all unless said. `make bench` measures every goal.
//!
//! Not here: what other programs measure (`many_keys`, `cold_start`, `replicas`, `envoy`).

#![allow(
    dead_code,
    clippy::unwrap_used,
    clippy::print_stdout,
    clippy::disallowed_methods,
    unreachable_pub,
    missing_docs,
    reason = "a benchmark talks and stops, and uses a part of what the tests are made with"
)]

#[path = "../tests/it/collector.rs"]
mod collector;
#[path = "shared/goal.rs"]
mod goal;
#[path = "shared/load.rs"]
mod load;
#[path = "../tests/it/process.rs"]
mod process;

use std::process::ExitCode;

use collector::SpanCollector;
use load::{BOTH_CORES, CPU, ONE_CORE, RATE, run_bench};

const KEY_COUNT: &str = "10000";
/// How baselines begin: those of this program, and those of `keyward`.
const HELLO: &str = "tonic hello-world, by";
const ECHO: &str = "tonic echo, one thread, by";
const OURS_HELLO: &str = "tonic hello-world";
const OURS_ECHO: &str = "tonic echo, one thread";

fn main() -> ExitCode {
    // As the servers that we are measured against, with the system's allocator, which this program has.
    if std::env::args().any(|word| word == "bench-baseline") {
        return keyward::cli::main();
    }
    // Cargo says `--bench` to every benchmark.
    let part = std::env::args().skip(1).find(|word| !word.starts_with("--"));
    let parts: [(&str, fn()); 6] = [
        ("checks", checks),
        ("observed", observed),
        ("items", items),
        ("creates", creates),
        ("tokens", tokens),
        ("overload", overload),
    ];
    let wanted = |name: &str| part.as_deref().is_none_or(|part| part == name);
    assert!(
        parts.iter().any(|(name, _)| wanted(name)),
        "say checks, observed, items, creates, tokens or overload"
    );
    parts.iter().filter(|(name, _)| wanted(name)).for_each(|(_, measure)| measure());
    ExitCode::SUCCESS
}

fn checks() {
    const MANY: &str = "1000000";
    let own = std::env::current_exe().unwrap();
    let baselines = ["--baseline", "--baseline-program", own.to_str().unwrap()];
    let both = run_bench(&[&["check", "--keys", MANY], &baselines[..]].concat(), &BOTH_CORES);
    let what = "Check, both cores, 1 M keys, to tonic's hello-world, rate";
    let note = format!("{:.2} with our allocator; {}", both.ratio(OURS_HELLO, RATE), both.cores());
    goal::at_least(what, 2.0, both.ratio(HELLO, RATE), &note);
    let alone = run_bench(&[&["check", "--keys", KEY_COUNT], &baselines[..]].concat(), &ONE_CORE);
    let what = "Check, one core, to tonic's echo on one thread, rate";
    let note = format!("{:.2} with our allocator; {}", alone.ratio(OURS_ECHO, RATE), alone.cores());
    goal::at_least(what, 1.1, alone.ratio(ECHO, RATE), &note);
    let what = "the same with our allocator, by the server's processor time";
    goal::at_least(what, 0.9, alone.ratio(OURS_ECHO, CPU), "");
    let few = run_bench(&["check", "--keys", KEY_COUNT, "--rounds", "6"], &BOTH_CORES);
    let ratio = both.median(CPU) / few.median(CPU);
    goal::at_least("Check, both cores, 1 M keys to 10,000, by processor time", 0.95, ratio, "two runs");
    let empty = run_bench(&["check", "--keys", "1", "--rounds", "1"], &[]);
    let bytes = (both.resident() - empty.resident()) / 1e6;
    goal::at_most("resident bytes per key, 1 M keys, a server after its load", 100.0, bytes, "");
}

/// Two servers in turn: one that tells all it can tell by default, and one that has metrics alone, which it always has.
fn observed() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let (all, bare, log) = (path("all.toml"), path("bare.toml"), path("decisions.jsonl"));
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let collector = runtime.block_on(SpanCollector::start());
    let settings = format!(
        "[telemetry]\notlp_endpoint = {:?}\nsample_ratio = 0.01\n[decision_log]\nfile = {log:?}\n",
        collector.url()
    );
    std::fs::write(&all, settings).unwrap();
    std::fs::write(&bare, "").unwrap();
    // Denials are what a decision log has by default.
    let load = ["check", "--keys", KEY_COUNT, "--denied", "1", "--config", &all, "--against", &bare];
    let told = run_bench(&[&load[..], &["--duration", "3s", "--rounds", "7"]].concat(), &ONE_CORE);
    let (spans, lines) = (collector.spans().len(), std::fs::read_to_string(&log).unwrap().lines().count());
    assert!(spans > 0 && lines > 0, "{spans} spans and {lines} decisions arrived");
    let note = format!("{}; {spans} spans, {lines} decisions", told.quartiles("bare.toml", CPU));
    let what = "Check, metrics, 1 % of traces, decisions, to metrics alone";
    goal::at_least(what, 0.95, told.ratio("bare.toml", CPU), &note);
}

fn items() {
    let batch = run_bench(&["batch", "--keys", KEY_COUNT], &ONE_CORE);
    goal::at_least("items of BatchCheck (100) to Checks", 10.0, batch.ratio("AuthzService/Check", CPU), "");
    let stream = run_bench(&["stream", "--keys", KEY_COUNT], &ONE_CORE);
    goal::at_least("items of StreamCheck to Checks", 8.0, stream.ratio("AuthzService/Check", CPU), "");
}

fn creates() {
    let created = run_bench(&["create", "--keys", "1", "--connections", "4", "--in-flight", "16"], &[]);
    goal::at_least(
        "keys created a second, 64 callers, SQLite",
        15_000.0,
        created.median(RATE),
        &created.cores(),
    );
}

fn tokens() {
    let allowed = run_bench(&["check", "--keys", KEY_COUNT], &ONE_CORE).median(CPU);
    for (what, flag) in [("unknown", "--unknown"), ("denied", "--denied")] {
        let ratio = run_bench(&["check", "--keys", KEY_COUNT, flag, "100"], &ONE_CORE).median(CPU) / allowed;
        goal::at_least(&format!("Checks of {what} tokens to allowed ones"), 1.0, ratio, "two runs");
    }
}

/// An open loop on a core of its own, against a server on the other.
fn overload() {
    let load = ["overload", "--keys", KEY_COUNT, "--one-core", "--connections", "32", "--in-flight", "256"];
    let told = run_bench(&load, &["--rounds", "5"]);
    let half = told.step(0.5, "p99_ms");
    for share in [1.2, 1.5, 2.0] {
        let note = format!("{:.0} % refused", 100.0 * told.step(share, "refused"));
        let what = format!("goodput at {share} times the capacity, to the peak");
        goal::at_least(&what, 0.9, told.step(share, "of_peak"), &note);
        let p99 = told.step(share, "p99_ms");
        let note = format!("{p99:.1} to {half:.1} ms");
        goal::at_most(
            &format!("p99 at {share} times the capacity, to that at half"),
            10.0,
            p99 / half,
            &note,
        );
    }
}
