//! PostgreSQL for the tests: one server for all of them, in a folder of its own below the system's temporary one,
//! reached through a socket in it; a pgbouncer in front of it for those who ask; a database for each test. They end
//! when this process does, however it ends: each runs under a shell that waits for its input to close.

use std::{
    ffi::OsStr,
    os::unix::fs::{PermissionsExt as _, chown},
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    sync::{
        OnceLock,
        atomic::{AtomicU32, Ordering},
    },
};

use crate::process::wait_for;

/// The role that Keyward has in every database of the tests; it owns that and nothing else.
const ROLE: &str = "keyward";

/// A wall clock that can be set without setting the machine's: the one that SQL asks is another function,
/// which adds what stands in `public.wall`. Sessions that are there already may go on by the true one.
pub(crate) const WALL_CLOCK_SQL: &str = "\
    CREATE TABLE public.wall (ahead interval NOT NULL); INSERT INTO public.wall VALUES ('0'); \
    GRANT SELECT ON public.wall TO PUBLIC; \
    ALTER FUNCTION pg_catalog.clock_timestamp() RENAME TO true_clock_timestamp; \
    CREATE FUNCTION pg_catalog.clock_timestamp() RETURNS timestamptz LANGUAGE sql VOLATILE AS \
    'SELECT pg_catalog.true_clock_timestamp() + (SELECT ahead FROM public.wall)'";

/// Where the server's programs are: those on PATH, or the newest that Debian has installed.
pub(crate) fn program_folder() -> &'static Path {
    static FOUND: OnceLock<PathBuf> = OnceLock::new();
    FOUND.get_or_init(|| {
        let path = std::env::var_os("PATH").unwrap_or_default();
        let on_path = std::env::split_paths(&path)
            .filter_map(|folder| folder.join("postgres").canonicalize().ok())
            .filter_map(|program| program.parent().map(Path::to_owned));
        let mut installed: Vec<_> = std::fs::read_dir("/usr/lib/postgresql")
            .into_iter()
            .flatten()
            .map(|entry| entry.unwrap().path().join("bin"))
            .collect();
        installed.sort_by_key(|folder| {
            folder.parent().and_then(|parent| parent.file_name()?.to_str()?.parse::<u32>().ok())
        });
        on_path
            .chain(installed.into_iter().rev())
            .find(|folder| ["postgres", "initdb", "psql"].iter().all(|name| folder.join(name).exists()))
            .expect("no PostgreSQL server here (postgres, initdb, psql): run tools/install postgres")
    })
}

pub(crate) fn pgbouncer() -> PathBuf {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain([PathBuf::from("/usr/sbin")])
        .map(|folder| folder.join("pgbouncer"))
        .find(|program| program.exists())
        .expect("no pgbouncer here: run tools/install pgbouncer")
}

/// PostgreSQL does not run as root: then its programs run as another user.
fn unprivileged_user() -> Option<&'static str> {
    static USER: OnceLock<Option<&'static str>> = OnceLock::new();
    *USER.get_or_init(|| {
        if id("-u", None) != Some(0) {
            return None;
        }
        let user = ["postgres", "nobody"].into_iter().find(|user| id("-u", Some(user)).is_some());
        Some(user.expect("neither a user postgres nor nobody, and PostgreSQL does not run as root"))
    })
}

fn id(kind: &str, user: Option<&str>) -> Option<u32> {
    let output = Command::new("id").arg(kind).args(user).output().ok()?;
    String::from_utf8(output.stdout).ok()?.trim().parse().ok()
}

/// A program as the user who may run it.
pub(crate) fn command(program: impl AsRef<OsStr>) -> Command {
    match unprivileged_user() {
        None => Command::new(program),
        Some(user) => {
            let mut command = Command::new("setpriv");
            command.args(["--reuid", user, "--regid", &id("-g", Some(user)).unwrap().to_string()]);
            command.arg("--clear-groups").arg(program.as_ref());
            command
        }
    }
}

/// Runs a program that must succeed.
#[track_caller]
pub(crate) fn run_checked(command: &mut Command) -> Output {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    output
}

/// `psql` with these statements, as the superuser.
pub(crate) fn psql(socket: &Path, database: &str, sql: &str) -> Command {
    let mut psql = command(program_folder().join("psql"));
    psql.args(["-X", "-q", "-A", "-t", "-v", "ON_ERROR_STOP=1", "-U", "postgres", "-d", database]);
    psql.arg("-h").arg(socket).args(["-c", sql]);
    psql
}

/// What a program printed.
pub(crate) fn stdout_text(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}

/// A folder for the user who runs the servers. Its name is short: a socket's path is at most 107 bytes.
pub(crate) fn short_temp_folder() -> tempfile::TempDir {
    let folder = tempfile::Builder::new().prefix("kw").tempdir().unwrap();
    if let Some(user) = unprivileged_user() {
        chown(folder.path(), id("-u", Some(user)), id("-g", Some(user))).unwrap();
    }
    std::fs::set_permissions(folder.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
    folder
}

/// Runs a server until this value is dropped or this process ends.
struct GuardedProcess(Child);

impl GuardedProcess {
    /// `program` runs in the background of a shell that reads until its input ends, and takes it down then. What is
    /// shared by the tests is never dropped: the shell removes its folder.
    fn start(program: &Path, arguments: &[&str], folder: &Path, shared: bool) -> GuardedProcess {
        const SCRIPT: &str = "folder=$1; shift; \"$@\" & server=$!; cat >/dev/null; kill -INT $server; \
             wait $server; test -z \"$folder\" || rm -rf \"$folder\"";
        let log = std::fs::File::create(folder.join("log")).unwrap();
        let remove = if shared { folder } else { Path::new("") };
        let child = command("/bin/sh")
            .args(["-c", SCRIPT, "sh"])
            .arg(remove)
            .arg(program)
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        GuardedProcess(child)
    }
}

impl GuardedProcess {
    /// Sends a signal to the server itself, not to the shell that guards it.
    fn signal(&self, name: &str) {
        run_checked(Command::new("pkill").args([name, "-P", &self.0.id().to_string(), "-f", "."]));
    }
}

impl Drop for GuardedProcess {
    fn drop(&mut self) {
        drop(self.0.stdin.take());
        let _ = self.0.wait();
    }
}

/// A running PostgreSQL server.
pub(crate) struct PostgresServer {
    server: Option<GuardedProcess>,
    settings: Vec<String>,
    shared: bool,
    folder: tempfile::TempDir,
}

impl PostgresServer {
    /// The server that the tests share. It stays until the process ends; nobody would drop it earlier.
    pub(crate) fn shared() -> &'static PostgresServer {
        static SHARED: OnceLock<PostgresServer> = OnceLock::new();
        SHARED.get_or_init(|| PostgresServer::new_server(&[], true))
    }

    /// A new server with these settings besides the usual.
    pub(crate) fn start(settings: &[&str]) -> PostgresServer {
        PostgresServer::new_server(settings, false)
    }

    fn new_server(settings: &[&str], shared: bool) -> PostgresServer {
        let folder = short_temp_folder();
        let data = folder.path().join("data");
        let mut initdb = command(program_folder().join("initdb"));
        initdb.args(["--username=postgres", "--auth=trust", "--encoding=UTF8", "--locale=C.UTF-8"]);
        run_checked(initdb.arg("--no-sync").arg("--pgdata").arg(&data));
        let settings = settings.iter().map(|&setting| setting.to_owned()).collect();
        let mut cluster = PostgresServer { server: None, settings, shared, folder };
        cluster.run();
        cluster.sql("postgres", &format!("CREATE ROLE {ROLE} LOGIN"));
        cluster
    }

    /// Another server, which follows this one as its hot standby.
    pub(crate) fn standby(&self) -> PostgresServer {
        let folder = short_temp_folder();
        let mut copy = command(program_folder().join("pg_basebackup"));
        copy.args(["-U", "postgres", "-c", "fast", "--no-sync", "-R", "-D"]).arg(folder.path().join("data"));
        run_checked(copy.arg("-d").arg(format!("host={}", self.socket().display())));
        let mut standby =
            PostgresServer { server: None, settings: self.settings.clone(), shared: false, folder };
        standby.run();
        standby
    }

    fn run(&mut self) {
        let socket = self.socket().display().to_string();
        let data = self.folder.path().join("data").display().to_string();
        let sockets = format!("unix_socket_directories={socket}");
        let usual = [&*sockets, "listen_addresses=", "max_connections=300", "shared_buffers=64MB"];
        let mut arguments = vec!["-D", &data];
        for setting in usual.into_iter().chain(self.settings.iter().map(String::as_str)) {
            arguments.extend(["-c", setting]);
        }
        let program = program_folder().join("postgres");
        self.server = Some(GuardedProcess::start(&program, &arguments, self.folder.path(), self.shared));
        wait_for("PostgreSQL to start", || {
            let mut ready = command(program_folder().join("pg_isready"));
            ready.arg("-h").arg(self.socket()).output().unwrap().status.success().then_some(())
        });
    }

    /// Stops the server, lets `change` do something to its folder of data, and starts it again.
    pub(crate) fn restart(&mut self, change: impl FnOnce(&Path)) {
        drop(self.server.take());
        change(&self.folder.path().join("data"));
        self.run();
    }

    /// Kills the server as a power cut does, does something meanwhile, and starts it again.
    pub(crate) fn crash(&mut self, meanwhile: impl FnOnce()) {
        if let Some(server) = &self.server {
            server.signal("-KILL");
        }
        drop(self.server.take());
        meanwhile();
        self.run();
    }

    /// The folder of the server's socket.
    pub(crate) fn socket(&self) -> &Path {
        self.folder.path()
    }

    /// Runs statements as the superuser: what they print, a line for each row.
    #[track_caller]
    pub(crate) fn sql(&self, database: &str, sql: &str) -> String {
        stdout_text(&run_checked(&mut psql(self.socket(), database, sql)))
    }

    /// A new database that belongs to Keyward's role, with an order of text that is not that of its bytes.
    pub(crate) fn database(&'static self) -> PostgresDatabase {
        static NEXT: AtomicU32 = AtomicU32::new(1);
        let name = format!("t{}", NEXT.fetch_add(1, Ordering::Relaxed));
        let version: u32 = self.sql("postgres", "SHOW server_version_num").parse().unwrap();
        let order = if version < 150_000 { "" } else { "LOCALE_PROVIDER icu ICU_LOCALE 'en'" };
        self.sql("postgres", &format!("CREATE DATABASE {name} OWNER {ROLE} TEMPLATE template0 {order}"));
        PostgresDatabase { name, cluster: self }
    }
}

/// A database of the shared server. It is gone when this value is dropped.
pub(crate) struct PostgresDatabase {
    pub(crate) name: String,
    cluster: &'static PostgresServer,
}

impl PostgresDatabase {
    pub(crate) fn new() -> PostgresDatabase {
        PostgresServer::shared().database()
    }

    pub(crate) fn url(&self) -> String {
        url(self.cluster.socket(), 5432, &self.name)
    }

    /// The same database through pgbouncer.
    pub(crate) fn pgbouncer_url(&self) -> String {
        shared_bouncer().url(&self.name)
    }

    /// Runs statements in this database as the superuser.
    #[track_caller]
    pub(crate) fn sql(&self, sql: &str) -> String {
        self.cluster.sql(&self.name, sql)
    }
}

impl Drop for PostgresDatabase {
    fn drop(&mut self) {
        self.cluster.sql("postgres", &format!("DROP DATABASE {} WITH (FORCE)", self.name));
    }
}

pub(crate) fn url(socket: &Path, port: u16, database: &str) -> String {
    format!("postgres:///{database}?host={}&port={port}&user={ROLE}", socket.display())
}

/// A pgbouncer in transaction mode before a server. So few sessions that each is used by many.
pub(crate) struct PgBouncer {
    server: GuardedProcess,
    folder: tempfile::TempDir,
}

impl PgBouncer {
    /// One that ends with this value; a replica needs several sessions at once.
    pub(crate) fn start(cluster: &PostgresServer) -> PgBouncer {
        PgBouncer::new_bouncer(cluster, 10, false)
    }

    fn new_bouncer(cluster: &PostgresServer, sessions: u32, shared: bool) -> PgBouncer {
        let (folder, cluster) = (short_temp_folder(), cluster.socket().display());
        let (config, socket) = (folder.path().join("pgbouncer.ini"), folder.path().display());
        let text = format!(
            "[databases]\n* = host={cluster} port=5432 user={ROLE}\n[pgbouncer]\npool_mode = transaction\n\
             default_pool_size = {sessions}\nmax_client_conn = 1000\nauth_type = any\nlisten_addr =\n\
             listen_port = 6432\nunix_socket_dir = {socket}\n"
        );
        std::fs::write(&config, text).unwrap();
        let server = GuardedProcess::start(&pgbouncer(), &[config.to_str().unwrap()], folder.path(), shared);
        // The file is there before anybody listens.
        let path = folder.path().join(".s.PGSQL.6432");
        wait_for("pgbouncer to start", || std::os::unix::net::UnixStream::connect(&path).ok());
        PgBouncer { server, folder }
    }

    /// A database of the server, through it.
    pub(crate) fn url(&self, database: &str) -> String {
        url(self.folder.path(), 6432, database)
    }

    /// Says nothing more, as a network does that is cut.
    pub(crate) fn pause(&self) {
        self.server.signal("-STOP");
    }

    /// Goes on.
    pub(crate) fn resume(&self) {
        self.server.signal("-CONT");
    }
}

impl Drop for PgBouncer {
    fn drop(&mut self) {
        self.resume();
    }
}

/// The one before the shared server. A replica's purposes take turns on so few sessions.
fn shared_bouncer() -> &'static PgBouncer {
    static BOUNCER: OnceLock<PgBouncer> = OnceLock::new();
    BOUNCER.get_or_init(|| PgBouncer::new_bouncer(PostgresServer::shared(), 3, true))
}
