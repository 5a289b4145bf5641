//! pgbouncer in transaction mode, for the replicas that reach the database through one. It follows the primary
//! through a link, which it takes for the server.

use std::{net::SocketAddr, os::unix::net::UnixStream, path::PathBuf};

use crate::{
    guard::GuardedProcess,
    postgres::{command, pgbouncer, short_temp_folder},
    process::wait_for,
};

/// A pgbouncer.
pub(crate) struct PgBouncer {
    folder: tempfile::TempDir,
    server: Option<GuardedProcess>,
}

impl PgBouncer {
    /// Starts one before the server at this address.
    pub(crate) fn start(server: SocketAddr) -> PgBouncer {
        let folder = short_temp_folder();
        let text = format!(
            "[databases]\n* = host={} port={} user=keyward\n[pgbouncer]\npool_mode = transaction\n\
             default_pool_size = 8\nmax_client_conn = 500\nauth_type = any\nlisten_addr =\nlisten_port = 6432\n\
             server_login_retry = 1\nserver_tls_sslmode = disable\nunix_socket_dir = {}\n",
            server.ip(),
            server.port(),
            folder.path().display()
        );
        std::fs::write(folder.path().join("pgbouncer.ini"), text).unwrap();
        let mut bouncer = PgBouncer { folder, server: None };
        bouncer.run();
        bouncer
    }

    /// Where it listens.
    pub(crate) fn socket(&self) -> PathBuf {
        self.folder.path().join(".s.PGSQL.6432")
    }

    fn run(&mut self) {
        let mut program = std::process::Command::new(pgbouncer());
        program.arg(self.folder.path().join("pgbouncer.ini"));
        let log = self.folder.path().join("log");
        self.server = Some(GuardedProcess::start(command("/bin/sh"), &log, &log, &program));
        // The file is there before anybody listens.
        wait_for("pgbouncer to start", || UnixStream::connect(self.socket()).ok());
    }

    /// Kills it and starts it again.
    pub(crate) fn restart(&mut self) {
        self.server = None;
        // It refuses to start where it finds the socket of another.
        let _ = std::fs::remove_file(self.socket());
        self.run();
    }
}
