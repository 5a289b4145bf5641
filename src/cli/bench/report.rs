//! What a load comes to: rates, percentiles, processor time, ratios with their spread, and the distribution of latency
//! drawn for the terminal.

use std::{fmt::Write as _, time::Duration};

use hdrhistogram::Histogram;
use serde::Serialize;

use super::load_generator::RoundTally;

/// How wide a full bar is, in characters.
const BAR_WIDTH: f64 = 50.0;

/// One round of one server.
#[derive(Clone, Debug)]
pub(super) struct RoundResult {
    pub(super) tally: RoundTally,
    /// The server's processor time; None = it is not a child of ours.
    pub(super) server_cpu: Option<Duration>,
    /// Ours.
    pub(super) client_cpu: Duration,
}

impl RoundResult {
    /// Answers per second of the server's processor time.
    pub(super) fn answers_per_cpu_second(&self) -> Option<f64> {
        let server = self.server_cpu?.as_secs_f64();
        (server > 0.0).then(|| self.tally.answered as f64 / server)
    }
}

/// The rounds of one server.
pub(super) struct ServerMeasurement {
    pub(super) name: String,
    /// How many items an answer stands for.
    pub(super) items_per_answer: u64,
    pub(super) rounds: Vec<RoundResult>,
}

/// A median with its quartiles.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(super) struct MedianAndQuartiles {
    pub(super) median: f64,
    pub(super) lower: f64,
    pub(super) upper: f64,
}

impl MedianAndQuartiles {
    /// Of these values; None = there are none.
    pub(super) fn from_values(values: impl IntoIterator<Item = f64>) -> Option<MedianAndQuartiles> {
        let mut values: Vec<_> = values.into_iter().collect();
        values.sort_by(f64::total_cmp);
        let last = values.len().checked_sub(1)?;
        let at = |part: f64| {
            let place = part * last as f64;
            let (below, above) = (values[place.floor() as usize], values[place.ceil() as usize]);
            below + (above - below) * place.fract()
        };
        Some(MedianAndQuartiles { median: at(0.5), lower: at(0.25), upper: at(0.75) })
    }
}

/// One server's figures, as programs read them.
#[derive(Debug, Serialize)]
pub(super) struct ServerFigures {
    name: String,
    /// Items per second.
    rate: Option<MedianAndQuartiles>,
    /// Items per second of the server's processor time.
    per_server_cpu_second: Option<MedianAndQuartiles>,
    /// Milliseconds.
    p50_ms: f64,
    p99_ms: f64,
    p999_ms: f64,
    max_ms: f64,
    /// Cores that were busy.
    server_cores: Option<f64>,
    client_cores: f64,
    answered: u64,
    wrong: u64,
    failed: u64,
    /// To the baselines, round by round: by rate, and by the server's processor time.
    ratios: Vec<BaselineRatio>,
}

/// A ratio to a baseline.
#[derive(Debug, Serialize)]
pub(super) struct BaselineRatio {
    to: String,
    rate: Option<MedianAndQuartiles>,
    per_server_cpu_second: Option<MedianAndQuartiles>,
}

fn quantile_millis(latency: &Histogram<u64>, quantile: f64) -> f64 {
    latency.value_at_quantile(quantile) as f64 / 1e6
}

impl ServerMeasurement {
    /// All rounds as one.
    pub(super) fn merge_rounds(&self) -> Option<RoundTally> {
        let (first, rest) = self.rounds.split_first()?;
        let mut total = first.tally.clone();
        rest.iter().for_each(|round| total.merge(&round.tally));
        Some(total)
    }

    /// The figures, with the ratios to these.
    pub(super) fn to_figures(&self, baselines: &[&ServerMeasurement]) -> Option<ServerFigures> {
        let total = self.merge_rounds()?;
        let items = self.items_per_answer as f64;
        let seconds: f64 = self.rounds.iter().map(|round| round.tally.duration.as_secs_f64()).sum();
        let cores = |time: Duration| time.as_secs_f64() / seconds.max(f64::MIN_POSITIVE);
        let server: Option<Duration> = self.rounds.iter().map(|round| round.server_cpu).sum();
        let ratios = baselines.iter().map(|baseline| BaselineRatio {
            to: baseline.name.clone(),
            rate: self.ratio_to(baseline, |round| Some(round.tally.answers_per_second())),
            per_server_cpu_second: self.ratio_to(baseline, RoundResult::answers_per_cpu_second),
        });
        Some(ServerFigures {
            name: self.name.clone(),
            rate: MedianAndQuartiles::from_values(
                self.rounds.iter().map(|round| items * round.tally.answers_per_second()),
            ),
            per_server_cpu_second: MedianAndQuartiles::from_values(
                self.rounds.iter().filter_map(RoundResult::answers_per_cpu_second).map(|rate| items * rate),
            ),
            p50_ms: quantile_millis(&total.latency, 0.5),
            p99_ms: quantile_millis(&total.latency, 0.99),
            p999_ms: quantile_millis(&total.latency, 0.999),
            max_ms: total.latency.max() as f64 / 1e6,
            server_cores: server.map(cores),
            client_cores: cores(self.rounds.iter().map(|round| round.client_cpu).sum()),
            answered: total.answered,
            wrong: total.wrong,
            failed: total.failed,
            ratios: ratios.collect(),
        })
    }

    /// Round by round, since a noisy moment is noisy for both.
    fn ratio_to(
        &self,
        baseline: &ServerMeasurement,
        of: impl Fn(&RoundResult) -> Option<f64>,
    ) -> Option<MedianAndQuartiles> {
        let scale = self.items_per_answer as f64 / baseline.items_per_answer as f64;
        let pairs = self.rounds.iter().zip(&baseline.rounds);
        MedianAndQuartiles::from_values(
            pairs.filter_map(|(ours, theirs)| Some(scale * of(ours)? / of(theirs)?)),
        )
    }
}

impl ServerFigures {
    /// A few lines for people.
    pub(super) fn to_text(&self) -> String {
        let spread = |spread: &Option<MedianAndQuartiles>| match spread {
            Some(MedianAndQuartiles { median, lower, upper }) => {
                format!("{median:.0} ({lower:.0} to {upper:.0})")
            }
            None => "unknown".to_owned(),
        };
        let mut text = format!("{}\n", self.name);
        let mut line = |name: &str, value: String| {
            // Writing to a String does not fail.
            let _ = writeln!(text, "  {name:<28} {value}");
        };
        line("per second", spread(&self.rate));
        line("per second of server CPU", spread(&self.per_server_cpu_second));
        let quantiles = [self.p50_ms, self.p99_ms, self.p999_ms, self.max_ms].map(|ms| format!("{ms:.2}"));
        line("p50, p99, p99.9, max, in ms", quantiles.join(", "));
        let server = self.server_cores.map_or("unknown".to_owned(), |cores| format!("{cores:.2}"));
        line("busy cores: server, client", format!("{server}, {:.2}", self.client_cores));
        line("answered, wrong, failed", format!("{}, {}, {}", self.answered, self.wrong, self.failed));
        for ratio in &self.ratios {
            let shown = |spread: &Option<MedianAndQuartiles>| {
                spread.map_or("unknown".to_owned(), |MedianAndQuartiles { median, lower, upper }| {
                    format!("{median:.2} ({lower:.2} to {upper:.2})")
                })
            };
            line(&format!("to {}", ratio.to), shown(&ratio.rate));
            line("  by server CPU", shown(&ratio.per_server_cpu_second));
        }
        text
    }
}

/// The distribution of latency: a bar for each step of a tenth of a decade that something fell into.
pub(super) fn render_distribution(latency: &Histogram<u64>) -> String {
    let total = latency.len();
    if total == 0 {
        return "  nothing was answered\n".to_owned();
    }
    // Steps of 1, 1.25, 1.6, 2, ... from 1 µs: each is a tenth of a decade.
    let bound = |step: i32| 1_000.0 * 10f64.powf(f64::from(step) / 10.0);
    let mut counts: Vec<_> = (0..=80).map(|step| (bound(step + 1), 0)).collect();
    for recorded in latency.iter_recorded() {
        let value = recorded.value_iterated_to() as f64;
        let at = counts.iter().position(|(to, _)| value < *to).unwrap_or(counts.len() - 1);
        counts[at].1 += recorded.count_at_value();
    }
    let most = counts.iter().map(|(_, count)| *count).max().unwrap_or(1).max(1);
    let shown = |at: &(f64, u64)| at.1 > 0;
    let first = counts.iter().position(shown).unwrap_or(0);
    let last = counts.iter().rposition(shown).unwrap_or(0);
    let mut text = String::new();
    for (to, count) in &counts[first..=last] {
        let bar = "█".repeat((*count as f64 / most as f64 * BAR_WIDTH).ceil() as usize);
        let share = *count as f64 / total as f64 * 100.0;
        // Writing to a String does not fail.
        let _ = writeln!(text, "  {:>9} {share:>6.2} % {bar}", format_nanos(*to));
    }
    text
}

/// A time in nanoseconds, for people.
fn format_nanos(nanos: f64) -> String {
    match nanos {
        nanos if nanos < 1e6 => format!("{:.0} µs", nanos / 1e3),
        nanos if nanos < 1e9 => format!("{:.1} ms", nanos / 1e6),
        nanos => format!("{:.1} s", nanos / 1e9),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_spread_is_the_median_with_its_quartiles() {
        assert_eq!(
            MedianAndQuartiles::from_values([4.0, 1.0, 2.0, 3.0, 5.0]),
            Some(MedianAndQuartiles { median: 3.0, lower: 2.0, upper: 4.0 })
        );
        assert_eq!(
            MedianAndQuartiles::from_values([1.0, 2.0]),
            Some(MedianAndQuartiles { median: 1.5, lower: 1.25, upper: 1.75 })
        );
        assert_eq!(MedianAndQuartiles::from_values([]), None);
    }

    #[test]
    fn the_distribution_shows_where_answers_fell() {
        let mut latency = Histogram::new_with_bounds(1_000, 60_000_000_000, 3).unwrap();
        (0..99).for_each(|_| latency.saturating_record(100_000));
        latency.saturating_record(10_000_000);
        let shown = render_distribution(&latency);
        assert_eq!(shown.lines().filter(|line| line.contains('█')).count(), 2, "{shown}");
        assert!(shown.contains("99.00 %") && shown.contains("1.00 %"), "{shown}");
        latency.clear();
        assert_eq!(render_distribution(&latency), "  nothing was answered\n");
    }
}
