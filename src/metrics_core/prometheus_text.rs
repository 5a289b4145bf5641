//! Writes the Prometheus text format, version 0.0.4: families with their help, then samples.

use std::fmt::{Display, Write as _};

use super::histogram::HistogramSnapshot;

/// The type of a metric.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum MetricKind {
    /// A value that only grows, until the process restarts.
    Counter,
    /// A value that rises and falls.
    Gauge,
    /// A distribution of durations.
    Histogram,
}

impl MetricKind {
    const fn as_str(self) -> &'static str {
        match self {
            MetricKind::Counter => "counter",
            MetricKind::Gauge => "gauge",
            MetricKind::Histogram => "histogram",
        }
    }
}

/// A page under construction. Names, help and labels are constants or settings, and need no escaping.
#[derive(Debug, Default)]
pub(crate) struct MetricsText {
    page: String,
    family: &'static str,
}

/// Label names and values, in output order.
type LabelPairs<'a> = &'a [(&'static str, &'a str)];

impl MetricsText {
    /// Starts a family; its samples follow.
    pub(crate) fn family(&mut self, name: &'static str, kind: MetricKind, help: &str) -> &mut MetricsText {
        self.family = name;
        // Writing to a String does not fail.
        let _ = writeln!(self.page, "# HELP {name} {help}\n# TYPE {name} {}", kind.as_str());
        self
    }

    /// Writes a sample of the current family.
    pub(crate) fn sample(&mut self, labels: LabelPairs<'_>, value: impl Display) -> &mut MetricsText {
        self.write_sample("", labels, None, value);
        self
    }

    /// Writes a family with one sample and no labels.
    pub(crate) fn single_sample(
        &mut self,
        name: &'static str,
        kind: MetricKind,
        help: &str,
        value: impl Display,
    ) {
        self.family(name, kind, help).sample(&[], value);
    }

    /// Writes a histogram of the current family, in seconds.
    pub(crate) fn histogram(&mut self, labels: LabelPairs<'_>, held: &HistogramSnapshot) -> &mut MetricsText {
        let mut count = 0;
        for (bound, more) in &held.buckets {
            count += more;
            self.write_sample("_bucket", labels, Some(&seconds(*bound).to_string()), count);
        }
        count += held.overflow;
        self.write_sample("_bucket", labels, Some("+Inf"), count);
        self.write_sample("_sum", labels, None, seconds(held.sum));
        self.write_sample("_count", labels, None, count);
        self
    }

    #[must_use]
    pub(crate) fn finish(self) -> String {
        self.page
    }

    fn write_sample(
        &mut self,
        ending: &str,
        labels: LabelPairs<'_>,
        up_to: Option<&str>,
        value: impl Display,
    ) {
        let page = &mut self.page;
        let _ = write!(page, "{}{ending}", self.family);
        let labels = labels.iter().copied().chain(up_to.map(|bound| ("le", bound)));
        let mut before = '{';
        for (name, value) in labels {
            let _ = write!(page, "{before}{name}=\"{value}\"");
            before = ',';
        }
        if before == ',' {
            page.push('}');
        }
        let _ = writeln!(page, " {value}");
    }
}

#[expect(
    clippy::cast_precision_loss,
    reason = "no figure is exact beyond 2^53 nanoseconds, which are 104 days"
)]
fn seconds(nanos: u64) -> f64 {
    nanos as f64 / 1e9
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_is_written_as_prometheus_reads_it() {
        let mut text = MetricsText::default();
        text.family("a_total", MetricKind::Counter, "As.").sample(&[("x", "1"), ("y", "2")], 3);
        text.single_sample("b", MetricKind::Gauge, "Bs.", 0.5);
        let held =
            HistogramSnapshot { buckets: vec![(50_000, 1), (1_000_000, 2)], overflow: 1, sum: 2_500_000_000 };
        text.family("c_seconds", MetricKind::Histogram, "Cs.").histogram(&[("x", "1")], &held);
        let page = "# HELP a_total As.\n# TYPE a_total counter\na_total{x=\"1\",y=\"2\"} 3\n\
             # HELP b Bs.\n# TYPE b gauge\nb 0.5\n\
             # HELP c_seconds Cs.\n# TYPE c_seconds histogram\n\
             c_seconds_bucket{x=\"1\",le=\"0.00005\"} 1\nc_seconds_bucket{x=\"1\",le=\"0.001\"} 3\n\
             c_seconds_bucket{x=\"1\",le=\"+Inf\"} 4\nc_seconds_sum{x=\"1\"} 2.5\nc_seconds_count{x=\"1\"} 4\n";
        assert_eq!(text.finish(), page);
    }
}
