//! Processes that die with the harness, however it ends: each runs under a shell that reads until its input is
//! closed, and then kills it and its children, those that stand still too. And signals to them.

use std::{
    io::{BufRead as _, BufReader},
    path::Path,
    process::{Child, Command, Stdio},
};

use rustix::process::{Pid, Signal, kill_process};

use crate::process::wait_for;

/// `$1` takes what the program prints, `$2` what it says went wrong. The first line tells its id. A signal from a
/// terminal ends the reading, and so the program too.
const SCRIPT: &str = r#"
out=$1; err=$2; shift 2
trap : INT TERM HUP QUIT
"$@" </dev/null >>"$out" 2>>"$err" & child=$!
echo $child
exec >/dev/null 2>&1
read -r _
children=
for stat in /proc/[0-9]*/stat; do
    read -r line <"$stat" || continue
    rest=${line##*) ? }
    [ "${rest%% *}" = $child ] && pid=${stat#/proc/} && children="$children ${pid%/stat}"
done
kill -KILL $child $children
wait $child
exit $?
"#;

/// A running program, and the shell that guards it.
pub(crate) struct GuardedProcess {
    shell: Child,
    pid: Pid,
}

impl GuardedProcess {
    /// Starts a program under a guard that runs as `shell` does; the program's output is appended to two files.
    pub(crate) fn start(mut shell: Command, out: &Path, err: &Path, program: &Command) -> GuardedProcess {
        shell.args(["-c", SCRIPT, "sh"]).arg(out).arg(err);
        shell.arg(program.get_program()).args(program.get_args());
        let mut shell = shell.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(shell.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let pid = line.trim().parse().ok().and_then(Pid::from_raw).expect("the id of a process");
        GuardedProcess { shell, pid }
    }

    /// Whether the program has ended, whoever ended it.
    pub(crate) fn has_ended(&self) -> bool {
        stat(self.pid).is_none_or(|(state, _)| state == 'Z')
    }

    /// Sends it a signal. It may have ended.
    pub(crate) fn signal(&self, signal: Signal) {
        let _ = kill_process(self.pid, signal);
    }

    /// Sends a signal to it and to its children.
    pub(crate) fn signal_all(&self, signal: Signal) {
        let children = children(self.pid);
        self.signal(signal);
        for child in children {
            let _ = kill_process(child, signal);
        }
    }

    /// Kills it and its children, and gives the code it ended with: 128 and more for a signal.
    pub(crate) fn kill(mut self) -> i32 {
        self.end()
    }

    /// Waits until it ends by itself.
    pub(crate) fn wait_until_ended(self) -> i32 {
        wait_for("a process to end", || self.has_ended().then_some(()));
        self.kill()
    }

    fn end(&mut self) -> i32 {
        drop(self.shell.stdin.take());
        self.shell.wait().unwrap().code().unwrap_or_default()
    }
}

impl Drop for GuardedProcess {
    fn drop(&mut self) {
        self.end();
    }
}

/// A process's state and its parent, as `/proc` tells them.
fn stat(pid: Pid) -> Option<(char, i32)> {
    let text = std::fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_nonzero())).ok()?;
    // The name before may hold anything, brackets too.
    let (_, rest) = text.rsplit_once(") ")?;
    let mut fields = rest.split(' ');
    Some((fields.next()?.chars().next()?, fields.next()?.parse().ok()?))
}

fn children(of: Pid) -> Vec<Pid> {
    let entries = std::fs::read_dir("/proc").unwrap();
    let pids = entries.filter_map(|entry| Pid::from_raw(entry.ok()?.file_name().to_str()?.parse().ok()?));
    pids.filter(|pid| stat(*pid).is_some_and(|(_, parent)| parent == of.as_raw_nonzero().get())).collect()
}
