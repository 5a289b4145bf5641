//! Puts a server under more load than it can answer: an open loop at shares of its capacity, and what becomes of the calls.
//!
//! A call counts from when it was due, so that one which the load itself had to hold back counts as slow, not as absent.

use std::{fmt::Write as _, time::Duration};

use hdrhistogram::Histogram;
use serde::Serialize;

use super::{
    load_generator::RoundTally,
    report::{MedianAndQuartiles, RoundResult},
    subject::LoadSubject,
};
use crate::cli::error::CliError;

/// The shares of the capacity that are offered.
const OFFERED_SHARES: [f64; 5] = [0.5, 1.0, 1.2, 1.5, 2.0];
/// The largest part of a step that its beginning takes, which is not measured.
const UNMEASURED_START: Duration = Duration::from_secs(1);

/// What became of the calls at one share of the capacity.
#[derive(Debug, Serialize)]
pub(super) struct OverloadStep {
    /// Calls offered, to those that the server can answer.
    share: f64,
    /// Calls offered per second.
    offered: f64,
    /// Right answers per second.
    goodput: f64,
    /// That to the most that was reached in this run.
    of_peak: f64,
    /// Right answers per second of the server's processor time.
    per_server_cpu_second: Option<f64>,
    /// Calls that were refused, to those offered.
    refused: f64,
    /// Calls that had no answer at the end, to those offered.
    unanswered: f64,
    p50_ms: f64,
    p99_ms: f64,
    server_cores: Option<f64>,
    client_cores: f64,
    wrong: u64,
}

/// What a server does under overload.
#[derive(Debug, Serialize)]
pub(super) struct OverloadReport {
    /// Answers per second of a closed loop.
    capacity: f64,
    /// Answers of the closed loop per second of the server's processor time.
    per_server_cpu_second: Option<f64>,
    steps: Vec<OverloadStep>,
}

impl OverloadReport {
    /// Measures the capacity with `closed` loops, then offers shares of it in open loops, each for as long as all rounds.
    pub(super) async fn measure(
        closed: &mut LoadSubject,
        rounds: usize,
        duration: Duration,
        spins: bool,
    ) -> Result<OverloadReport, CliError> {
        let (mut rates, mut per_cpu) = (Vec::new(), Vec::new());
        closed.run_round(duration).await?;
        for _ in 0..rounds {
            let round = closed.run_round(duration).await?;
            rates.push(round.tally.answers_per_second());
            per_cpu.extend(round.answers_per_cpu_second());
        }
        let capacity = MedianAndQuartiles::from_values(rates).map_or(0.0, |rate| rate.median);
        let per_server_cpu_second = MedianAndQuartiles::from_values(per_cpu).map(|rate| rate.median);
        let each = duration.saturating_mul(u32::try_from(rounds).unwrap_or(u32::MAX));
        let mut steps = Vec::new();
        for share in OFFERED_SHARES {
            let mut subject = closed.with_rate(share * capacity, spins);
            subject.run_round(duration.min(UNMEASURED_START)).await?;
            let round = subject.run_round(each).await?;
            steps.push(OverloadStep::new(share, share * capacity, each, &round));
        }
        let peak = steps.iter().map(|step| step.goodput).fold(capacity, f64::max);
        steps.iter_mut().for_each(|step| step.of_peak = step.goodput / peak.max(1.0));
        Ok(OverloadReport { capacity, per_server_cpu_second, steps })
    }

    /// Answers that were wrong.
    pub(super) fn wrong_answers(&self) -> u64 {
        self.steps.iter().map(|step| step.wrong).sum()
    }

    /// A table for people.
    pub(super) fn to_text(&self) -> String {
        let rate = |rate: Option<f64>| rate.map_or("unknown".to_owned(), |rate| format!("{rate:.0}"));
        let mut text = format!(
            "capacity, closed loop: {:.0} Checks per second, {} per second of server CPU\n",
            self.capacity,
            rate(self.per_server_cpu_second),
        );
        let heads = [
            "offered",
            "goodput",
            "of peak",
            "per CPU s",
            "refused",
            "no answer",
            "p50 ms",
            "p99 ms",
            "server",
            "client",
        ];
        let _ = writeln!(text, "  share {}", heads.map(|head| format!("{head:>10}")).join(""));
        for step in &self.steps {
            let cells = [
                format!("{:.0}", step.offered),
                format!("{:.0}", step.goodput),
                format!("{:.1} %", step.of_peak * 100.0),
                rate(step.per_server_cpu_second),
                format!("{:.1} %", step.refused * 100.0),
                format!("{:.1} %", step.unanswered * 100.0),
                format!("{:.2}", step.p50_ms),
                format!("{:.2}", step.p99_ms),
                step.server_cores.map_or("unknown".to_owned(), |cores| format!("{cores:.2}")),
                format!("{:.2}", step.client_cores),
            ];
            // Writing to a String does not fail.
            let _ = writeln!(text, "  {:<6}{}", step.share, cells.map(|cell| format!("{cell:>10}")).join(""));
        }
        text
    }
}

impl OverloadStep {
    fn new(share: f64, offered: f64, duration: Duration, round: &RoundResult) -> OverloadStep {
        let RoundTally { answered, wrong, refused, latency, .. } = &round.tally;
        let seconds = duration.as_secs_f64();
        let calls = (offered * seconds).max(1.0);
        let millis = |histogram: &Histogram<u64>, part: f64| histogram.value_at_quantile(part) as f64 / 1e6;
        let refused = *refused as f64;
        OverloadStep {
            share,
            offered,
            goodput: (answered - wrong) as f64 / seconds,
            of_peak: 0.0,
            per_server_cpu_second: round.answers_per_cpu_second(),
            refused: refused / calls,
            unanswered: ((calls - refused - *answered as f64) / calls).max(0.0),
            p50_ms: millis(latency, 0.5),
            p99_ms: millis(latency, 0.99),
            server_cores: round.server_cpu.map(|cpu| cpu.as_secs_f64() / seconds),
            client_cores: round.client_cpu.as_secs_f64() / seconds,
            wrong: *wrong,
        }
    }
}
