//! Services that take other spellings of a header's name for the name: PHP's own server, and a WSGI program under
//! gunicorn as it was before it dropped underscores. Each answers with the headers that it sees.

use std::{
    net::{SocketAddr, TcpListener, TcpStream},
    process::Command,
};

use serde_json::Value;

use crate::process::{TestHome, TestProcess, wait_for};

/// How often another process may take the port that PHP was to have.
const MAX_PORT_ATTEMPTS: usize = 5;

const PHP: &str = r#"<?php
header('Content-Type: application/json');
$http = fn ($name) => str_starts_with($name, 'HTTP_');
$seen = [array_filter($_SERVER, $http, ARRAY_FILTER_USE_KEY), getallheaders()];
echo json_encode($seen, JSON_INVALID_UTF8_SUBSTITUTE);
"#;

const WSGI: &str = r#"
import json

def app(environ, start_response):
    seen = {name: value for name, value in environ.items() if name.startswith("HTTP_")}
    body = json.dumps([seen]).encode()
    start_response("200 OK", [("Content-Type", "application/json"), ("Content-Length", str(len(body)))])
    return [body]
"#;

/// A running service.
pub(crate) struct HeaderFoldingService {
    process: TestProcess,
    _home: TestHome,
    pub(crate) address: SocketAddr,
}

impl HeaderFoldingService {
    /// PHP's own server.
    #[track_caller]
    pub(crate) fn start_php() -> HeaderFoldingService {
        let home = TestHome::new();
        std::fs::write(home.path("router.php"), PHP).unwrap();
        let started = (0..MAX_PORT_ATTEMPTS).find_map(|_| {
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            let address = listener.local_addr().unwrap();
            drop(listener);
            let mut command = program("php", "php-cli");
            command.current_dir(home.path("."));
            command.args(["-n", "-S", &address.to_string(), "router.php"]);
            let mut process = home.spawn(command);
            let serves = wait_for("PHP to serve", || match process.has_ended() {
                true => Some(false),
                false => process.stderr().contains(") started").then_some(true),
            });
            serves.then_some((process, address))
        });
        let (process, address) = started.expect("a port that stays free until PHP has it");
        HeaderFoldingService { process, _home: home, address }
    }

    /// A WSGI program.
    #[track_caller]
    pub(crate) fn start_wsgi() -> HeaderFoldingService {
        let home = TestHome::new();
        std::fs::write(home.path("service.py"), WSGI).unwrap();
        let mut command = program("gunicorn", "gunicorn");
        command.current_dir(home.path("."));
        command.args(["--bind", "127.0.0.1:0", "--worker-class", "gthread", "--threads", "4"]);
        command.args([
            "--keep-alive",
            "60",
            "--header-map",
            "dangerous",
            "--no-control-socket",
            "service:app",
        ]);
        let mut process = home.spawn(command);
        let address = wait_for("gunicorn to serve", || {
            let log = process.stderr();
            assert!(!process.has_ended(), "gunicorn does not start:\n{log}");
            let (_, rest) = log.split_once("Listening at: http://")?;
            let address: SocketAddr = rest.split_whitespace().next()?.parse().ok()?;
            TcpStream::connect(address).is_ok().then_some(address)
        });
        HeaderFoldingService { process, _home: home, address }
    }
}

impl Drop for HeaderFoldingService {
    fn drop(&mut self) {
        // gunicorn ends its workers when it is asked to end, and not when it is killed.
        self.process.terminate();
        wait_for("a service to end", || self.process.has_ended().then_some(()));
    }
}

/// A program that `make tools` installs.
#[track_caller]
fn program(name: &str, tool: &str) -> Command {
    if let Err(error) = Command::new(name).arg("--version").output() {
        panic!("{name} does not run ({error}): 'tools/install {tool}' installs it, for 'make test' to find");
    }
    Command::new(name)
}

/// What the service sees: names without `HTTP_`, and values. One header may be there under several names.
#[track_caller]
pub(crate) fn parse_seen_headers(body: &[u8]) -> Vec<(String, String)> {
    let text = || String::from_utf8_lossy(body).into_owned();
    let all: Value = serde_json::from_slice(body).unwrap_or_else(|error| panic!("{error}: {}", text()));
    let maps = all.as_array().unwrap().iter().filter_map(Value::as_object).flatten();
    maps.map(|(name, value)| {
        let name = name.strip_prefix("HTTP_").unwrap_or(name);
        (name.to_owned(), value.as_str().unwrap_or_default().to_owned())
    })
    .collect()
}
