//! Children of this program that are measured: where they run, and what processor time they take.

use std::{
    fs, io,
    path::Path,
    process::{Child, Command, Stdio},
    time::Duration,
};

use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
use tokio::time::Instant;

use crate::private_file;

/// This program.
pub(super) const THIS_PROGRAM: &str = "/proc/self/exe";
/// How long a child may take to start.
const START_TIMEOUT: Duration = Duration::from_secs(60);

/// A child, which ends with this value.
pub(super) struct ChildProcess(Child);

impl Drop for ChildProcess {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl ChildProcess {
    /// Starts a program with these arguments on these cores; its standard output goes to `out`.
    ///
    /// # Errors
    /// When it does not start.
    pub(super) fn start(
        program: &Path,
        arguments: &[&str],
        folder: &Path,
        out: &Path,
        cores: CoreSet,
    ) -> io::Result<ChildProcess> {
        let log = private_file::create_new(&out.with_extension("log"))?;
        let mut command = Command::new(program);
        command.args(arguments).current_dir(folder).stdin(Stdio::null());
        command.stdout(private_file::create_new(out)?).stderr(log);
        // A child inherits where its parent may run.
        cores.pin_current_thread()?;
        let child = command.spawn();
        CoreSet::All.pin_current_thread()?;
        child.map(ChildProcess)
    }

    /// What processor time it has taken.
    pub(super) fn cpu_time(&self) -> Duration {
        read_cpu_time(&format!("/proc/{}/stat", self.0.id()))
    }

    /// What it holds in memory, in bytes.
    pub(super) fn resident_bytes(&self) -> u64 {
        let pages = fs::read_to_string(format!("/proc/{}/statm", self.0.id())).ok();
        let pages = pages.and_then(|text| text.split(' ').nth(1)?.parse::<u64>().ok()).unwrap_or(0);
        pages * rustix::param::page_size() as u64
    }

    /// Waits until its output holds `start`; gives the address that follows.
    ///
    /// # Errors
    /// When it ends before, or takes too long.
    pub(super) async fn wait_for_address(&mut self, out: &Path, start: &str) -> io::Result<String> {
        let end = Instant::now() + START_TIMEOUT;
        loop {
            let text = fs::read_to_string(out)?;
            if text.ends_with('\n')
                && let Some((_, rest)) = text.split_once(start)
                && let Some(address) = rest.split(['\n', ',']).next()
            {
                return Ok(address.to_owned());
            }
            if self.0.try_wait()?.is_some() || Instant::now() > end {
                let log = fs::read_to_string(out.with_extension("log")).unwrap_or_default();
                return Err(io::Error::other(format!("a server did not start: {}", log.trim())));
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

/// The processor time of this process.
pub(super) fn own_cpu_time() -> Duration {
    read_cpu_time("/proc/self/stat")
}

/// User and system time, in fields 14 and 15 (proc(5)); those after the name, which may hold anything.
fn read_cpu_time(path: &str) -> Duration {
    let text = fs::read_to_string(path).unwrap_or_default();
    let fields: Vec<_> = text.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
    let ticks = [11, 12].map(|at| fields.get(at).and_then(|field| field.parse::<u64>().ok()).unwrap_or(0));
    let per_second = rustix::param::clock_ticks_per_second().max(1);
    Duration::from_secs_f64(ticks.iter().sum::<u64>() as f64 / per_second as f64)
}

/// Where a process may run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum CoreSet {
    /// On all.
    All,
    /// On the first alone, where servers are measured that have one.
    First,
    /// On all but the first, where the load comes from then.
    Others,
}

impl CoreSet {
    /// Keeps this thread, and what it starts, there. A machine with one core has no others.
    ///
    /// # Errors
    /// When the system refuses.
    pub(super) fn pin_current_thread(self) -> io::Result<()> {
        let all = available_cores()?;
        let chosen: &[usize] = match (self, all.as_slice()) {
            (CoreSet::First, [first, ..]) => std::slice::from_ref(first),
            (CoreSet::Others, [_, others @ ..]) if !others.is_empty() => others,
            (_, all) => all,
        };
        let mut set = CpuSet::new();
        chosen.iter().for_each(|core| set.set(*core));
        Ok(sched_setaffinity(None, &set)?)
    }
}

/// The cores that the first thread of the process started with.
fn available_cores() -> io::Result<Vec<usize>> {
    static ALL: std::sync::OnceLock<Vec<usize>> = std::sync::OnceLock::new();
    if let Some(all) = ALL.get() {
        return Ok(all.clone());
    }
    let set = sched_getaffinity(None)?;
    let all: Vec<_> = (0..CpuSet::MAX_CPU).filter(|core| set.is_set(*core)).collect();
    Ok(ALL.get_or_init(|| all).clone())
}

/// How many cores there are.
pub(super) fn core_count() -> usize {
    available_cores().map_or(1, |all| all.len().max(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processor_time_is_read_after_a_name_with_anything_in_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("stat");
        let fields = (3..=20).map(|field| field.to_string()).collect::<Vec<_>>().join(" ");
        fs::write(&path, format!("7 (a) 9 (b) {fields}")).unwrap();
        let ticks = rustix::param::clock_ticks_per_second() as f64;
        assert_eq!(read_cpu_time(path.to_str().unwrap()), Duration::from_secs_f64((14.0 + 15.0) / ticks));
        assert!(own_cpu_time() < Duration::from_secs(3600));
    }
}
