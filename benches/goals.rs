//! The goals of `docs/performance.md`, measured one after the other by `keyward bench`, each told as met or missed:
//! `make bench`. Ratios are medians of alternating rounds in one run; read them, and not the rates, from machine to machine.
//!
//! Not here: what other programs measure (`cold_start`, `replicas`, `envoy`, `telemetry`).

#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    clippy::disallowed_methods,
    reason = "a benchmark talks and stops"
)]

use std::process::Command;

use serde_json::Value;

/// What `keyward bench` says of one load.
struct Told(Value);

fn bench(arguments: &[&str]) -> Told {
    let output = Command::new(env!("CARGO_BIN_EXE_keyward"))
        .arg("bench")
        .args(arguments)
        .arg("--json")
        .output()
        .unwrap();
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    Told(serde_json::from_slice(&output.stdout).unwrap())
}

impl Told {
    fn median(&self, of: &str) -> f64 {
        self.0["figures"][0][of]["median"].as_f64().unwrap()
    }

    /// The ratio to the subject whose name holds `to`: by rate, or by the server's processor time.
    fn ratio(&self, to: &str, by: &str) -> f64 {
        let ratios = self.0["figures"][0]["ratios"].as_array().unwrap();
        let found = ratios.iter().find(|ratio| ratio["to"].as_str().unwrap().contains(to)).unwrap();
        found[by]["median"].as_f64().unwrap()
    }

    fn resident(&self) -> f64 {
        self.0["resident_bytes"].as_f64().unwrap()
    }

    fn cores(&self) -> String {
        let of = |name: &str| self.0["figures"][0][name].as_f64().unwrap();
        format!("server {:.2}, load {:.2} cores", of("server_cores"), of("client_cores"))
    }
}

fn goal(what: &str, wanted: f64, found: f64, note: &str) {
    let verdict = if found >= wanted { "met" } else { "MISSED" };
    println!("{verdict:<7} {what:<62} {found:>10.2}  goal {wanted:>8.2}  {note}");
}

const RATE: &str = "rate";
const CPU: &str = "per_server_cpu_second";

fn main() {
    const MILLION: &str = "1000000";
    let many = ["--connections", "16", "--in-flight", "16"];
    let one_core = ["--one-core", "--connections", "4", "--in-flight", "64"];

    let both = bench(&[&["check", "--keys", MILLION, "--baseline"], &many[..]].concat());
    goal("Check, both cores, to tonic's hello-world", 2.0, both.ratio("hello", RATE), &both.cores());
    let empty = bench(&["check", "--keys", "1", "--rounds", "1"]);
    let bytes = (both.resident() - empty.resident()) / 1e6;
    let verdict = if bytes <= 100.0 { "met" } else { "MISSED" };
    let what = "resident bytes per key, 1 M keys, after the load";
    println!("{verdict:<7} {what:<62} {bytes:>10.2}  goal {:>8.2}  at most", 100.0);

    let alone = bench(&[&["check", "--keys", "10000", "--baseline"], &one_core[..]].concat());
    goal("Check, one core, to tonic's echo on one thread", 1.1, alone.ratio("echo", RATE), &alone.cores());
    goal("the same, by the server's processor time", 0.9, alone.ratio("echo", CPU), "");
    let large = bench(&[&["check", "--keys", MILLION], &one_core[..]].concat());
    let ratio = large.median(CPU) / alone.median(CPU);
    goal("1 M keys to 10,000 keys, one core, by processor time", 0.95, ratio, "two runs");

    let batch = bench(&[&["batch", "--keys", "10000"], &one_core[..]].concat());
    goal("items of BatchCheck (100) to Checks, one core", 10.0, batch.ratio("AuthzService/Check", CPU), "");
    let stream = bench(&[&["stream", "--keys", "10000"], &one_core[..]].concat());
    goal("items of StreamCheck to Checks, one core", 8.0, stream.ratio("AuthzService/Check", CPU), "");

    for (what, flag) in [("unknown", "--unknown"), ("denied", "--denied")] {
        let all = bench(&[&["check", "--keys", "10000", flag, "100"], &one_core[..]].concat());
        let ratio = all.median(CPU) / alone.median(CPU);
        goal(&format!("Checks of {what} tokens to allowed ones, one core"), 1.0, ratio, "two runs");
    }

    let created = bench(&["create", "--keys", "1", "--connections", "4", "--in-flight", "16"]);
    goal("keys created a second, 64 callers, SQLite", 15_000.0, created.median(RATE), &created.cores());
}
