//! `keyward bench` as a process, and what it says.

#![allow(dead_code, reason = "each benchmark uses its part")]

use std::process::Command;

use serde_json::Value;

/// By answers in a second.
pub(crate) const RATE: &str = "rate";
/// By answers in a second of the server's processor time.
pub(crate) const CPU: &str = "per_server_cpu_second";

/// The server on a core of its own, busy all the time.
pub(crate) const ONE_CORE: [&str; 5] = ["--one-core", "--connections", "4", "--in-flight", "64"];

/// The server on both cores beside its load.
pub(crate) const BOTH_CORES: [&str; 4] = ["--connections", "16", "--in-flight", "16"];

/// What `keyward bench` says of one load.
pub(crate) struct BenchFigures(Value);

/// Runs a load that must succeed: every answer was right.
pub(crate) fn run_bench(arguments: &[&str], more: &[&str]) -> BenchFigures {
    let mut command = Command::new(env!("CARGO_BIN_EXE_keyward"));
    command.arg("bench").args(arguments).args(more).arg("--json");
    // Settings of whoever measures are not the goals'.
    let steers = |name: &str| ["KEYWARD_", "OTEL_"].iter().any(|start| name.starts_with(start));
    for (name, _) in std::env::vars_os().filter(|(name, _)| steers(&name.to_string_lossy())) {
        command.env_remove(name);
    }
    let output = command.output().unwrap();
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    BenchFigures(serde_json::from_slice(&output.stdout).unwrap())
}

impl BenchFigures {
    pub(crate) fn median(&self, of: &str) -> f64 {
        self.0["figures"][0][of]["median"].as_f64().unwrap()
    }

    /// A figure of an overload, at this share of the capacity.
    pub(crate) fn step(&self, share: f64, of: &str) -> f64 {
        let mut steps = self.0["steps"].as_array().unwrap().iter();
        steps.find(|step| step["share"].as_f64() == Some(share)).unwrap()[of].as_f64().unwrap()
    }

    /// The ratio to the first subject whose name holds `to`.
    pub(crate) fn ratio(&self, to: &str, by: &str) -> f64 {
        self.spread(to, by)["median"].as_f64().unwrap()
    }

    /// That ratio's quartiles, in words.
    pub(crate) fn quartiles(&self, to: &str, by: &str) -> String {
        let at = |name: &str| self.spread(to, by)[name].as_f64().unwrap();
        format!("{:.2} to {:.2}", at("lower"), at("upper"))
    }

    fn spread(&self, to: &str, by: &str) -> &Value {
        let ratios = self.0["figures"][0]["ratios"].as_array().unwrap();
        let found = ratios.iter().find(|ratio| ratio["to"].as_str().unwrap().contains(to)).unwrap();
        &found[by]
    }

    pub(crate) fn resident(&self) -> f64 {
        self.0["resident_bytes"].as_f64().unwrap()
    }

    pub(crate) fn cores(&self) -> String {
        let of = |name: &str| self.0["figures"][0][name].as_f64().unwrap();
        format!("server {:.2}, load {:.2} cores", of("server_cores"), of("client_cores"))
    }
}
