//! PostgreSQL as it is run where nothing may be lost: a primary and a synchronous standby, which take over from each
//! other. Where the primary is, the links are told.
//!
//! What the promise assumes of a database is kept here, or a run would show nothing: a standby takes over only while
//! commits wait for it, and after it has once caught up with everything that a restarted primary came back with.

use std::{
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use rustix::process::Signal;

use crate::{
    guard::GuardedProcess,
    postgres::{WALL_CLOCK_SQL, command, program_folder, psql, run_checked, short_temp_folder, stdout_text},
    process::wait_for,
};

const DATABASE: &str = "keyward";
const ROLE: &str = "keyward";
/// What the standby calls itself, whichever node it is.
const STANDBY: &str = "standby";

struct PostgresNode {
    folder: tempfile::TempDir,
    server: Option<GuardedProcess>,
}

impl PostgresNode {
    fn new() -> PostgresNode {
        PostgresNode { folder: short_temp_folder(), server: None }
    }

    fn data(&self) -> PathBuf {
        self.folder.path().join("data")
    }

    fn log(&self) -> PathBuf {
        self.folder.path().join("log")
    }

    fn run(&mut self) {
        let sockets = format!("unix_socket_directories={}", self.folder.path().display());
        let mut postgres = std::process::Command::new(program_folder().join("postgres"));
        postgres.arg("-D").arg(self.data());
        for setting in [
            &*sockets,
            "listen_addresses=",
            "max_connections=200",
            "shared_buffers=64MB",
            "hot_standby=on",
            "wal_retrieve_retry_interval=200ms",
            "wal_receiver_status_interval=1s",
            "log_min_messages=warning",
        ] {
            postgres.args(["-c", setting]);
        }
        self.server = Some(GuardedProcess::start(command("/bin/sh"), &self.log(), &self.log(), &postgres));
    }

    fn server(&self) -> &GuardedProcess {
        self.server.as_ref().expect("this node runs")
    }

    fn is_ready(&self) -> bool {
        let mut ready = command(program_folder().join("pg_isready"));
        ready.arg("-q").arg("-h").arg(self.folder.path()).output().unwrap().status.success()
    }

    /// Runs the server until it answers. One that was killed may leave shared memory that its last process holds on
    /// to for a moment, so it is tried again. Its number may be another program's by now: then PostgreSQL takes it for
    /// running, until the file that says so is gone. Its guard has ended every process of it.
    fn start(&mut self) {
        const HELD_ON_TO: Duration = Duration::from_secs(15);
        let begun = Instant::now();
        self.run();
        wait_for("PostgreSQL to start", || {
            if self.server().has_ended() {
                self.server = None;
                if begun.elapsed() > HELD_ON_TO {
                    let _ = std::fs::remove_file(self.data().join("postmaster.pid"));
                }
                self.run();
            }
            self.is_ready().then_some(())
        });
    }

    fn sql(&self, sql: &str) -> Option<String> {
        query(self.folder.path(), DATABASE, sql)
    }
}

/// The two servers.
pub(crate) struct PrimaryAndStandby {
    nodes: [PostgresNode; 2],
    primary: usize,
}

impl PrimaryAndStandby {
    /// Makes both, with an empty database for Keyward.
    pub(crate) fn start() -> PrimaryAndStandby {
        let mut cluster = PrimaryAndStandby { nodes: [PostgresNode::new(), PostgresNode::new()], primary: 0 };
        let mut initdb = command(program_folder().join("initdb"));
        initdb.args(["--username=postgres", "--auth=trust", "--encoding=UTF8", "--locale=C.UTF-8"]);
        run_checked(initdb.arg("--no-sync").arg("--pgdata").arg(cluster.nodes[0].data()));
        cluster.nodes[0].start();
        let folder = cluster.primary().folder.path();
        for sql in [format!("CREATE ROLE {ROLE} LOGIN"), format!("CREATE DATABASE {DATABASE} OWNER {ROLE}")] {
            query(folder, "postgres", &sql).expect("a new server takes it");
        }
        cluster.run_sql(WALL_CLOCK_SQL);
        cluster.make_standby();
        cluster
    }

    /// Where the primary is.
    pub(crate) fn socket(&self) -> PathBuf {
        self.nodes[self.primary].folder.path().join(".s.PGSQL.5432")
    }

    /// Keyward's URL for its database at this address.
    pub(crate) fn url(address: std::net::SocketAddr) -> String {
        format!("postgres://{ROLE}@{address}/{DATABASE}?sslmode=disable")
    }

    /// The logs of both servers.
    pub(crate) fn logs(&self) -> Vec<PathBuf> {
        self.nodes.iter().map(PostgresNode::log).collect()
    }

    /// Runs statements on the primary as the superuser, in Keyward's database; again, where it does not take them yet.
    pub(crate) fn run_sql(&self, sql: &str) -> String {
        wait_for(sql, || self.primary().sql(sql))
    }

    /// Sets the wall clock that Keyward's database shows, so many seconds on or back.
    pub(crate) fn step_wall(&self, seconds: i64) {
        self.run_sql(&format!("UPDATE public.wall SET ahead = ahead + interval '{seconds} s'"));
    }

    fn primary(&self) -> &PostgresNode {
        &self.nodes[self.primary]
    }

    fn standby(&self) -> &PostgresNode {
        &self.nodes[1 - self.primary]
    }

    /// Copies the primary to the other node, starts that as its standby, and has commits wait for it.
    fn make_standby(&mut self) {
        let from = self.primary().folder.path().to_owned();
        let node = &mut self.nodes[1 - self.primary];
        node.server = None;
        remove(&node.data());
        let mut copy = command(program_folder().join("pg_basebackup"));
        copy.args(["-U", "postgres", "-c", "fast", "--no-sync", "-D"]).arg(node.data());
        copy.arg("-d").arg(format!("host={} application_name={STANDBY}", from.display()));
        run_checked(copy.arg("-R"));
        node.start();
        wait_for("the standby to follow", || {
            let state = self.primary().sql("SELECT state FROM pg_stat_replication")?;
            (state == "streaming").then_some(())
        });
        self.commits_wait_for(STANDBY);
        self.wait_for_standby();
    }

    fn commits_wait_for(&self, standbys: &str) {
        self.run_sql(&format!("ALTER SYSTEM SET synchronous_standby_names = '{standbys}'"));
        self.run_sql("SELECT pg_reload_conf()");
    }

    /// Waits until the standby has everything that can be seen on the primary now; later commits wait for it.
    fn wait_for_standby(&self) {
        wait_for("the standby to have everything", || {
            let caught_up = "SELECT sync_state = 'sync' AND flush_lsn >= pg_current_wal_flush_lsn() \
                             FROM pg_stat_replication";
            (self.primary().sql(caught_up)? == "t").then_some(())
        });
    }

    /// Kills every process of the primary, and starts it again.
    pub(crate) fn kill_primary(&mut self) {
        let node = &mut self.nodes[self.primary];
        node.server = None;
        node.start();
        self.wait_for_standby();
    }

    /// Ends the primary without a checkpoint (`pg_ctl stop -m immediate`), and starts it again.
    pub(crate) fn stop_primary_at_once(&mut self) {
        let node = &mut self.nodes[self.primary];
        node.server().signal(Signal::QUIT);
        node.server.take().expect("it ran").wait_until_ended();
        node.start();
        self.wait_for_standby();
    }

    /// The standby becomes the primary. The old one is killed before, or goes on, cut off from everything new.
    pub(crate) fn promote(&mut self, old_goes_on: bool) {
        self.wait_for_standby();
        if !old_goes_on {
            self.nodes[self.primary].server = None;
        }
        self.primary = 1 - self.primary;
        wait_for("the standby to be promoted", || {
            // On a busy machine it may take longer than one call waits.
            self.primary().sql("SELECT pg_promote(true, 10)");
            (self.primary().sql("SELECT pg_is_in_recovery()")? == "f").then_some(())
        });
        self.commits_wait_for("");
    }

    /// The old primary, which went on, is killed.
    pub(crate) fn kill_old(&mut self) {
        self.nodes[1 - self.primary].server = None;
    }

    /// Makes a standby of whatever is left of the old primary.
    pub(crate) fn rebuild(&mut self) {
        self.make_standby();
    }

    /// Stops or continues every process of the primary.
    pub(crate) fn signal_primary(&self, signal: Signal) {
        self.primary().server().signal_all(signal);
    }

    /// Stops or continues every process of the standby.
    pub(crate) fn signal_standby(&self, signal: Signal) {
        self.standby().server().signal_all(signal);
    }
}

/// What the statements print; None = the server does not take them now.
fn query(socket: &Path, database: &str, sql: &str) -> Option<String> {
    let output = psql(socket, database, sql).output().unwrap();
    output.status.success().then(|| stdout_text(&output))
}

fn remove(folder: &Path) {
    match std::fs::remove_dir_all(folder) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => panic!("{}: {error}", folder.display()),
        _ => {}
    }
}
