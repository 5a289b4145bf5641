//! What the operating system says of this process, under the names that Prometheus' own libraries have for it. Read
//! from `/proc`, so on Linux alone; elsewhere, and where a figure cannot be read, it is left out.

use std::fs;

use crate::instruments::{
    Kind::{Counter, Gauge},
    Text,
};

/// The figures.
pub(super) fn tell(text: &mut Text) {
    let stat = fs::read_to_string("/proc/self/stat").ok();
    let stat = stat.as_deref().and_then(Stat::read);
    if let Some(stat) = &stat {
        let help = "Processor time spent, by the kernel for the process too.";
        text.single("process_cpu_seconds_total", Counter, help, ticks(stat.spent));
        let resident = stat.resident_pages * rustix::param::page_size() as u64;
        text.single("process_resident_memory_bytes", Gauge, "Memory held.", resident);
    }
    // The process begins so long after the machine did.
    if let Some((stat, boot)) = stat.zip(boot()) {
        let help = "When the process began, as a Unix time.";
        text.single("process_start_time_seconds", Gauge, help, boot + ticks(stat.begun));
    }
    if let Ok(open) = fs::read_dir("/proc/self/fd") {
        // Reading the folder holds one open.
        text.single("process_open_fds", Gauge, "File descriptors open.", open.count().saturating_sub(1));
    }
    if let Some(most) = most_fds() {
        text.single("process_max_fds", Gauge, "File descriptors that may be open.", most);
    }
}

struct Stat {
    /// In user and kernel mode, in ticks.
    spent: u64,
    /// After the machine's start, in ticks.
    begun: u64,
    resident_pages: u64,
}

impl Stat {
    /// Reads proc(5)'s `stat`. The second field may hold anything, and ends with the last parenthesis.
    fn read(text: &str) -> Option<Stat> {
        let (_, rest) = text.rsplit_once(") ")?;
        // From the third field on.
        let fields: Vec<_> = rest.split_ascii_whitespace().collect();
        let number = |field: usize| fields.get(field - 3)?.parse::<u64>().ok();
        Some(Stat { spent: number(14)? + number(15)?, begun: number(22)?, resident_pages: number(24)? })
    }
}

#[expect(clippy::cast_precision_loss, reason = "ticks are hundredths of a second")]
fn ticks(count: u64) -> f64 {
    count as f64 / rustix::param::clock_ticks_per_second() as f64
}

/// When the machine started, as a Unix time.
fn boot() -> Option<f64> {
    let stat = fs::read_to_string("/proc/stat").ok()?;
    stat.lines().find_map(|line| line.strip_prefix("btime "))?.trim().parse().ok()
}

fn most_fds() -> Option<u64> {
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
        let stat = Stat::read(&format!("42 (a) S 1 (b) {after}")).unwrap();
        assert_eq!((stat.spent, stat.begun, stat.resident_pages), (300, 1234, 77));
    }
}
