//! The replicas: real `keyward` processes. Whoever finds one ended starts it again, as an orchestrator would.

use std::{
    net::{SocketAddr, TcpStream},
    path::{Path, PathBuf},
    process::Command,
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use rustix::process::Signal;

use crate::{guard::GuardedProcess, process::wait_for};

/// How a replica is started.
#[derive(Clone, Debug)]
pub(crate) struct ReplicaConfig {
    /// The program; it may be another build.
    pub(crate) program: PathBuf,
    pub(crate) lease: Duration,
    /// More of its environment.
    pub(crate) environment: Vec<(String, String)>,
    /// What goes before the program on the command line.
    pub(crate) wrapper: Vec<String>,
}

/// One of them.
pub(crate) struct ReplicaProcess {
    pub(crate) name: String,
    pub(crate) address: SocketAddr,
    admin: SocketAddr,
    database: String,
    setup: ReplicaConfig,
    folder: tempfile::TempDir,
    process: Mutex<Option<GuardedProcess>>,
    /// Counts the changes of process: odd while one serves, and none begins or ends.
    life: AtomicU32,
    /// How often it ended by itself.
    pub(crate) ended: AtomicU32,
}

impl ReplicaProcess {
    /// One that does not run yet.
    pub(crate) fn new(
        name: &str,
        address: SocketAddr,
        admin: SocketAddr,
        database: String,
        setup: ReplicaConfig,
    ) -> Self {
        ReplicaProcess {
            name: name.to_owned(),
            address,
            admin,
            database,
            setup,
            folder: tempfile::tempdir().unwrap(),
            process: Mutex::new(None),
            life: AtomicU32::new(0),
            ended: AtomicU32::new(0),
        }
    }

    fn process(&self) -> MutexGuard<'_, Option<GuardedProcess>> {
        self.process.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Which life it is in; None = one ends, or another begins.
    pub(crate) fn life(&self) -> Option<u32> {
        let life = self.life.load(Ordering::Acquire);
        (life % 2 == 1).then_some(life)
    }

    /// Where its root key is, if it was the one that made it.
    pub(crate) fn root_key(&self) -> Option<String> {
        std::fs::read_to_string(self.folder.path().join("root.key")).ok()
    }

    pub(crate) fn log(&self) -> PathBuf {
        self.folder.path().join("stderr")
    }

    fn command(&self) -> Command {
        let mut words = self.setup.wrapper.iter().map(String::as_str);
        let mut command = match words.next() {
            None => Command::new(&self.setup.program),
            Some(first) => {
                let mut command = Command::new(first);
                command.args(words).arg(&self.setup.program);
                command
            }
        };
        command.args(["serve", "--threads", "1", "--database", &self.database]);
        // Behind cables, replicas are machines of their own, in networks that nobody else is on.
        command.arg("--insecure");
        command.args(["--listen", &self.address.to_string(), "--admin-listen", &self.admin.to_string()]);
        command.arg("--root-key-file").arg(self.folder.path().join("root.key"));
        command.args(["--replica-name", &self.name]);
        command.args(["--lease", &format!("{}ms", self.setup.lease.as_millis())]);
        command
    }

    /// Starts the process, and leaves it to itself.
    fn launch(&self, process: &mut Option<GuardedProcess>) {
        let mut shell = Command::new("/bin/sh");
        let ours = |name: &str| name.starts_with("KEYWARD_");
        for (name, _) in std::env::vars_os().filter(|(name, _)| ours(&name.to_string_lossy())) {
            shell.env_remove(name);
        }
        shell.envs(self.setup.environment.iter().cloned()).current_dir(self.folder.path());
        let (out, err) = (self.folder.path().join("stdout"), self.log());
        *process = Some(GuardedProcess::start(shell, &out, &err, &self.command()));
    }

    /// Starts it, and waits until it listens.
    pub(crate) fn start(&self) {
        self.launch(&mut self.process());
        wait_for(&format!("{} to listen", self.name), || {
            self.restart_if_ended();
            self.life()
        });
    }

    /// Sees whether it has ended, and then starts it again; or whether it listens by now.
    pub(crate) fn restart_if_ended(&self) {
        let mut process = self.process();
        let Some(running) = process.as_ref() else { return };
        if running.has_ended() {
            self.ended.fetch_add(1, Ordering::Relaxed);
            self.change(false);
            self.launch(&mut process);
        } else if self.life().is_none() && TcpStream::connect_timeout(&self.address, CONNECT_TIMEOUT).is_ok()
        {
            self.change(true);
        }
    }

    /// A life begins or ends.
    fn change(&self, serves: bool) {
        if self.life().is_some() != serves {
            self.life.fetch_add(1, Ordering::AcqRel);
        }
    }

    /// Kills it, and starts it again after a while.
    pub(crate) fn kill(&self, pause: Duration) {
        let mut process = self.process();
        self.change(false);
        *process = None;
        std::thread::sleep(pause);
        self.launch(&mut process);
    }

    /// Ends it as an operator does, and starts it again: the code it ended with.
    pub(crate) fn restart(&self) -> i32 {
        let mut process = self.process();
        self.change(false);
        let code = process.take().map_or(0, |running| {
            running.signal(Signal::TERM);
            running.wait_until_ended()
        });
        self.launch(&mut process);
        code
    }

    /// Lets it stand still.
    pub(crate) fn pause(&self, length: Duration) {
        if let Some(running) = &*self.process() {
            running.signal(Signal::STOP);
            std::thread::sleep(length);
            running.signal(Signal::CONT);
        }
    }

    /// Ends it for good.
    pub(crate) fn stop(&self) -> i32 {
        self.change(false);
        self.process().take().map_or(0, |running| {
            running.signal(Signal::TERM);
            running.wait_until_ended()
        })
    }

    /// What its log says that no fault explains: a panic, or damage, which nobody has done to the database.
    pub(crate) fn find_log_errors(&self) -> Vec<String> {
        let is_bug = |line: &String| line.contains("panicked") || line.contains("is damaged");
        read_log_lines(&self.log()).into_iter().filter(is_bug).collect()
    }
}

/// How long a connection to a process that listens may take.
const CONNECT_TIMEOUT: Duration = Duration::from_millis(200);

/// The lines of a log.
pub(crate) fn read_log_lines(path: &Path) -> Vec<String> {
    let text = std::fs::read(path).map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
    text.unwrap_or_default().lines().map(str::to_owned).collect()
}
