//! A Redis server for a test, in a folder of its own and reached through a socket in it. It ends when it is dropped
//! or this process does, however it ends: it runs under a shell that waits for its input to close.

use std::{
    path::PathBuf,
    process::{Child, Command, Stdio},
};

use keyward::engine::limiter::{ClockSource, RedisFailurePolicy, RedisKeyPrefix, RedisSettings, RedisUrl};

use crate::process::{WAIT_TIMEOUT, wait_for};

fn redis_program() -> PathBuf {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let names = ["redis-server", "valkey-server"];
    std::env::split_paths(&path)
        .flat_map(|folder| names.map(|name| folder.join(name)))
        .find(|program| program.exists())
        .expect(
            "no Redis server on PATH: 'make tools' installs one into .tools/bin, where 'make test' finds it",
        )
}

/// A running Redis server with nothing in it.
pub(crate) struct RedisServer {
    guard: Child,
    folder: tempfile::TempDir,
}

impl RedisServer {
    pub(crate) fn start() -> RedisServer {
        let folder = tempfile::Builder::new().prefix("kw").tempdir().unwrap();
        let guard = spawn_server(&folder);
        let server = RedisServer { guard, folder };
        server.wait_until_ready();
        server
    }

    fn socket(&self) -> PathBuf {
        self.folder.path().join("socket")
    }

    fn wait_until_ready(&self) {
        let client = redis::Client::open(self.url()).unwrap();
        wait_for("Redis to start", || {
            let mut connection = client.get_connection().ok()?;
            redis::cmd("PING").query::<String>(&mut connection).ok()
        });
    }

    pub(crate) fn url(&self) -> String {
        format!("unix://{}", self.socket().display())
    }

    /// Settings to use it with, and to wait for its answers as long as it takes.
    pub(crate) fn settings(&self) -> RedisSettings {
        RedisSettings {
            url: RedisUrl::parse(&self.url()).unwrap(),
            key_prefix: RedisKeyPrefix::parse("test:").unwrap(),
            timeout: WAIT_TIMEOUT,
            on_failure: RedisFailurePolicy::Allow,
            clock_source: ClockSource::Redis,
        }
    }

    /// Runs a command.
    #[track_caller]
    pub(crate) fn run_command<T: redis::FromRedisValue>(&self, words: &[&str]) -> T {
        let mut connection = redis::Client::open(self.url()).unwrap().get_connection().unwrap();
        let mut command = redis::cmd(words[0]);
        command.arg(&words[1..]);
        command.query(&mut connection).unwrap()
    }

    fn signal(&self, signal: &str) {
        let id = std::fs::read_to_string(self.folder.path().join("pid")).unwrap();
        let script = "kill -\"$0\" \"$1\"";
        assert!(Command::new("sh").args(["-c", script, signal, id.trim()]).status().unwrap().success());
    }

    /// Stops its time: it takes connections and answers nothing.
    pub(crate) fn pause(&self) {
        self.signal("STOP");
    }

    /// Lets it go on.
    pub(crate) fn resume(&self) {
        self.signal("CONT");
    }

    /// Ends it as a power cut does.
    pub(crate) fn kill(&mut self) {
        self.signal("KILL");
        drop(self.guard.stdin.take());
        self.guard.wait().unwrap();
    }

    /// Starts it again after a kill. It has forgotten everything.
    pub(crate) fn restart(&mut self) {
        self.guard = spawn_server(&self.folder);
        self.wait_until_ready();
    }
}

fn spawn_server(folder: &tempfile::TempDir) -> Child {
    const SCRIPT: &str =
        "\"$@\" & server=$!; echo $server >\"$0\"; cat >/dev/null; kill -KILL $server; wait $server";
    let log = std::fs::File::create(folder.path().join("log")).unwrap();
    Command::new("/bin/sh")
        .args(["-c", SCRIPT])
        .arg(folder.path().join("pid"))
        .arg(redis_program())
        .args(["--port", "0", "--save", "", "--appendonly", "no", "--unixsocket"])
        .arg(folder.path().join("socket"))
        .arg("--dir")
        .arg(folder.path())
        .stdin(Stdio::piped())
        .stdout(log.try_clone().unwrap())
        .stderr(log)
        .spawn()
        .unwrap()
}

impl Drop for RedisServer {
    fn drop(&mut self) {
        drop(self.guard.stdin.take());
        let _ = self.guard.wait();
    }
}
