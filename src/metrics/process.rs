//! Metrics of the process, under the names of Prometheus' client libraries.
//!
//! They are read from `/proc`, so on Linux only. A figure that cannot be read is left out.

use std::fs;

use crate::metrics_core::{
    MetricKind::{Counter, Gauge},
    MetricsText,
};

/// Writes the metrics of this process.
pub(super) fn write_process(text: &mut MetricsText) {
    let stat = fs::read_to_string("/proc/self/stat").ok();
    let stat = stat.as_deref().and_then(ProcessStat::parse);
    if let Some(stat) = &stat {
        let help = "Processor time in user and kernel mode.";
        text.single_sample("process_cpu_seconds_total", Counter, help, ticks_to_seconds(stat.cpu_ticks));
        let resident = stat.resident_pages * rustix::param::page_size() as u64;
        text.single_sample("process_resident_memory_bytes", Gauge, "Memory held.", resident);
    }
    // The start time is relative to the boot of the machine.
    if let Some((stat, boot)) = stat.zip(boot_time()) {
        let help = "Start time of the process, as a Unix time.";
        text.single_sample(
            "process_start_time_seconds",
            Gauge,
            help,
            boot + ticks_to_seconds(stat.start_ticks),
        );
    }
    if let Ok(open) = fs::read_dir("/proc/self/fd") {
        // Reading the directory opens one descriptor itself.
        text.single_sample(
            "process_open_fds",
            Gauge,
            "Open file descriptors.",
            open.count().saturating_sub(1),
        );
    }
    if let Some(limit) = max_open_fds() {
        text.single_sample("process_max_fds", Gauge, "Limit of open file descriptors.", limit);
    }
}

struct ProcessStat {
    /// User and kernel mode together, in ticks.
    cpu_ticks: u64,
    /// Start of the process after boot, in ticks.
    start_ticks: u64,
    resident_pages: u64,
}

impl ProcessStat {
    /// Parses `stat` of proc(5). The second field may contain anything; the last parenthesis ends it.
    fn parse(text: &str) -> Option<ProcessStat> {
        let (_, rest) = text.rsplit_once(") ")?;
        // Fields from the third on.
        let fields: Vec<_> = rest.split_ascii_whitespace().collect();
        let number = |field: usize| fields.get(field - 3)?.parse::<u64>().ok();
        Some(ProcessStat {
            cpu_ticks: number(14)? + number(15)?,
            start_ticks: number(22)?,
            resident_pages: number(24)?,
        })
    }
}

#[expect(clippy::cast_precision_loss, reason = "ticks are hundredths of a second")]
fn ticks_to_seconds(count: u64) -> f64 {
    count as f64 / rustix::param::clock_ticks_per_second() as f64
}

/// Boot time of the machine, as a Unix time.
fn boot_time() -> Option<f64> {
    let stat = fs::read_to_string("/proc/stat").ok()?;
    stat.lines().find_map(|line| line.strip_prefix("btime "))?.trim().parse().ok()
}

fn max_open_fds() -> Option<u64> {
    let limits = fs::read_to_string("/proc/self/limits").ok()?;
    let soft = limits.lines().find_map(|line| line.strip_prefix("Max open files"))?;
    soft.split_ascii_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_may_look_like_the_rest_of_its_line() {
        let after = "S 1 1 1 0 -1 4 10 0 0 0 250 50 0 0 20 0 9 0 1234 99 77 1 2";
        let stat = ProcessStat::parse(&format!("42 (a) S 1 (b) {after}")).unwrap();
        assert_eq!((stat.cpu_ticks, stat.start_ticks, stat.resident_pages), (300, 1234, 77));
    }
}
