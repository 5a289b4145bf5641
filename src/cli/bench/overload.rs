//! Puts a server under more load than it can answer: an open loop at shares of its capacity, and what becomes of the calls.
//!
//! A call counts from when it was due, so that one which the load itself had to hold back counts as slow, not as absent.

use std::{fmt::Write as _, time::Duration};

use hdrhistogram::Histogram;
use serde::Serialize;

use super::{
    Subject,
    load::Tally,
    report::{Round, Spread},
};
use crate::cli::failure::Failure;

/// The shares of the capacity that are offered.
const SHARES: [f64; 5] = [0.5, 1.0, 1.2, 1.5, 2.0];
/// The largest part of a step that its beginning takes, which is not measured.
const LEAD_IN: Duration = Duration::from_secs(1);

/// What became of the calls at one share of the capacity.
#[derive(Debug, Serialize)]
pub(super) struct Step {
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
pub(super) struct Overload {
    /// Answers per second of a closed loop.
    capacity: f64,
    /// Answers of the closed loop per second of the server's processor time.
    per_server_cpu_second: Option<f64>,
    steps: Vec<Step>,
}

impl Overload {
    /// Measures the capacity with `closed` loops, then offers shares of it in open loops, each for as long as all rounds.
    pub(super) async fn measure(
        closed: &mut Subject,
        rounds: usize,
        duration: Duration,
        spins: bool,
    ) -> Result<Overload, Failure> {
        let (mut rates, mut per_cpu) = (Vec::new(), Vec::new());
        closed.round(duration).await?;
        for _ in 0..rounds {
            let round = closed.round(duration).await?;
            rates.push(round.tally.rate());
            per_cpu.extend(round.per_cpu());
        }
        let capacity = Spread::of(rates).map_or(0.0, |rate| rate.median);
        let per_server_cpu_second = Spread::of(per_cpu).map(|rate| rate.median);
        let each = duration.saturating_mul(u32::try_from(rounds).unwrap_or(u32::MAX));
        let mut steps = Vec::new();
        for share in SHARES {
            let mut subject = closed.at_rate(share * capacity, spins);
            subject.round(duration.min(LEAD_IN)).await?;
            let round = subject.round(each).await?;
            steps.push(Step::new(share, share * capacity, each, &round));
        }
        let peak = steps.iter().map(|step| step.goodput).fold(capacity, f64::max);
        steps.iter_mut().for_each(|step| step.of_peak = step.goodput / peak.max(1.0));
        Ok(Overload { capacity, per_server_cpu_second, steps })
    }

    /// Answers that were wrong.
    pub(super) fn wrong(&self) -> u64 {
        self.steps.iter().map(|step| step.wrong).sum()
    }

    /// A table for people.
    pub(super) fn show(&self) -> String {
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

impl Step {
    fn new(share: f64, offered: f64, duration: Duration, round: &Round) -> Step {
        let Tally { answered, wrong, refused, latency, .. } = &round.tally;
        let seconds = duration.as_secs_f64();
        let calls = (offered * seconds).max(1.0);
        let millis = |histogram: &Histogram<u64>, part: f64| histogram.value_at_quantile(part) as f64 / 1e6;
        let refused = *refused as f64;
        Step {
            share,
            offered,
            goodput: (answered - wrong) as f64 / seconds,
            of_peak: 0.0,
            per_server_cpu_second: round.per_cpu(),
            refused: refused / calls,
            unanswered: ((calls - refused - *answered as f64) / calls).max(0.0),
            p50_ms: millis(latency, 0.5),
            p99_ms: millis(latency, 0.99),
            server_cores: round.server.map(|cpu| cpu.as_secs_f64() / seconds),
            client_cores: round.client.as_secs_f64() / seconds,
            wrong: *wrong,
        }
    }
}
