//! The walk of `docs/deploy.md`, taken: its commands as they stand there, but for the ports.

use std::{
    net::TcpListener,
    os::unix::fs::{PermissionsExt as _, symlink},
    path::Path,
    process::Command,
};

use crate::{
    postgres,
    process::{TestHome, wait_for},
};

const START: &str = "## From nothing to two replicas";

/// The ports of the walk, which may be in use on the machine of a test.
const PORTS: [&str; 9] = ["5433", "50051", "50052", "9090", "50061", "50062", "9091", "9901", "10000"];

/// Every command of the walk.
fn walk() -> String {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let text = std::fs::read_to_string(root.join("docs/deploy.md")).unwrap();
    let (_, part) = text.split_once(START).unwrap();
    let (part, _) = part.split_once("\n## ").unwrap();
    let blocks = part.split("```sh\n").skip(1).map(|block| block.split_once("```").unwrap().0);
    let commands: String = blocks.collect();
    let free: Vec<_> = PORTS.iter().map(|_| TcpListener::bind("127.0.0.1:0").unwrap()).collect();
    // By way of marks: a port that is free may contain the digits of another.
    let marked = PORTS.iter().enumerate().fold(commands, |commands, (at, port)| {
        assert!(commands.contains(port), "the walk says nothing of {port}");
        commands.replace(port, &format!("<{at}>"))
    });
    free.iter().enumerate().fold(marked, |commands, (at, free)| {
        commands.replace(&format!("<{at}>"), &free.local_addr().unwrap().port().to_string())
    })
}

/// PostgreSQL's programs do not run as root: then others of their names run them as somebody else, to whom they give
/// the folder that they are started in.
fn stand_ins(folder: &Path) {
    std::fs::create_dir(folder.join("bin")).unwrap();
    for name in ["initdb", "pg_ctl"] {
        let real = postgres::command(postgres::program_folder().join(name));
        let words = [real.get_program()].into_iter().chain(real.get_args());
        let words: Vec<_> = words.map(|word| word.to_str().unwrap()).collect();
        let script = format!(
            "#!/bin/sh\nchown -R --reference='{}' . && exec {} \"$@\"\n",
            folder.display(),
            words.join(" ")
        );
        let file = folder.join("bin").join(name);
        std::fs::write(&file, script).unwrap();
        std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o755)).unwrap();
    }
}

#[test]
fn the_walk_of_the_docs_leads_from_nothing_to_a_key_that_is_allowed_and_then_revoked() {
    let folder = postgres::short_temp_folder();
    symlink(Path::new(env!("CARGO_MANIFEST_DIR")).join("deploy"), folder.path().join("deploy")).unwrap();
    stand_ins(folder.path());
    let script = folder.path().join("walk.sh");
    // Whatever becomes of it, nothing that it started stays.
    let start = "set -euo pipefail\ntrap 'exit 1' TERM\n\
        trap 'kill $(jobs -p) 2>/dev/null || true; wait; pg_ctl -D pg -m immediate stop >/dev/null 2>&1 || true' EXIT\n";
    std::fs::write(&script, format!("{start}{}", walk())).unwrap();

    let home = TestHome::new();
    let binary = Path::new(env!("CARGO_BIN_EXE_keyward")).parent().unwrap();
    let path = std::env::var("PATH").unwrap();
    let ours = folder.path().join("bin");
    let mut bash = Command::new("timeout");
    bash.args(["--kill-after=5", "50", "bash"]).arg(&script).current_dir(folder.path());
    bash.env("PATH", format!("{}:{}:{path}", ours.display(), binary.display()));
    for (name, _) in
        std::env::vars().filter(|(name, _)| name.starts_with("KEYWARD_") || name.starts_with("PG"))
    {
        bash.env_remove(name);
    }
    let ended = home.run_to_end(bash);
    let log = |name: &str| std::fs::read_to_string(folder.path().join("walk").join(name)).unwrap_or_default();
    let told = format!("{ended:?}\n{}\n{}\n{}", log("one.log"), log("two.log"), log("envoy.log"));
    assert_eq!(ended.code, Some(0), "{told}");
    let allowed = "allowed: your service goes here\n 200\n";
    assert_eq!(ended.out.matches(allowed).count(), 2, "with two replicas and with one: {told}");
    assert!(ended.out.ends_with(" 401\n"), "{told}");
    wait_for("its database to be gone", || {
        (!folder.path().join("walk/pg/postmaster.pid").exists()).then_some(())
    });
}
