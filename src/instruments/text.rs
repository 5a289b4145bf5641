//! Prometheus' text format, version 0.0.4: families with their help, then samples.

use std::fmt::{Display, Write as _};

use super::Distribution;

/// What a metric is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// It only grows, until the process starts anew.
    Counter,
    /// It rises and falls.
    Gauge,
    /// It counts durations.
    Histogram,
}

impl Kind {
    const fn as_str(self) -> &'static str {
        match self {
            Kind::Counter => "counter",
            Kind::Gauge => "gauge",
            Kind::Histogram => "histogram",
        }
    }
}

/// A page that is being written. Names, help and labels are ours, and need no escaping.
#[derive(Debug, Default)]
pub struct Text {
    page: String,
    family: &'static str,
}

/// Label names and values, in the order in which they are told.
type Labels<'a> = &'a [(&'static str, &'a str)];

impl Text {
    /// Begins a family; its samples follow.
    pub fn family(&mut self, name: &'static str, kind: Kind, help: &str) -> &mut Text {
        self.family = name;
        // Writing to a String does not fail.
        let _ = writeln!(self.page, "# HELP {name} {help}\n# TYPE {name} {}", kind.as_str());
        self
    }

    /// One sample of the family.
    pub fn sample(&mut self, labels: Labels<'_>, value: impl Display) -> &mut Text {
        self.line("", labels, None, value);
        self
    }

    /// A family with one sample and no label.
    pub fn single(&mut self, name: &'static str, kind: Kind, help: &str, value: impl Display) {
        self.family(name, kind, help).sample(&[], value);
    }

    /// One histogram of the family, in seconds.
    pub fn histogram(&mut self, labels: Labels<'_>, held: &Distribution) -> &mut Text {
        let mut count = 0;
        for (bound, more) in &held.buckets {
            count += more;
            self.line("_bucket", labels, Some(&seconds(*bound).to_string()), count);
        }
        count += held.longer;
        self.line("_bucket", labels, Some("+Inf"), count);
        self.line("_sum", labels, None, seconds(held.sum));
        self.line("_count", labels, None, count);
        self
    }

    /// The page.
    #[must_use]
    pub fn finish(self) -> String {
        self.page
    }

    fn line(&mut self, ending: &str, labels: Labels<'_>, up_to: Option<&str>, value: impl Display) {
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
        let mut text = Text::default();
        text.family("a_total", Kind::Counter, "As.").sample(&[("x", "1"), ("y", "2")], 3);
        text.single("b", Kind::Gauge, "Bs.", 0.5);
        let held = Distribution { buckets: vec![(50_000, 1), (1_000_000, 2)], longer: 1, sum: 2_500_000_000 };
        text.family("c_seconds", Kind::Histogram, "Cs.").histogram(&[("x", "1")], &held);
        let page = "# HELP a_total As.\n# TYPE a_total counter\na_total{x=\"1\",y=\"2\"} 3\n\
             # HELP b Bs.\n# TYPE b gauge\nb 0.5\n\
             # HELP c_seconds Cs.\n# TYPE c_seconds histogram\n\
             c_seconds_bucket{x=\"1\",le=\"0.00005\"} 1\nc_seconds_bucket{x=\"1\",le=\"0.001\"} 3\n\
             c_seconds_bucket{x=\"1\",le=\"+Inf\"} 4\nc_seconds_sum{x=\"1\"} 2.5\nc_seconds_count{x=\"1\"} 4\n";
        assert_eq!(text.finish(), page);
    }
}
