//! The files that the program creates: their owner's alone, whatever the umask, and written through no symbolic link.
//! And the database file's own permissions.

use std::{
    collections::BTreeMap,
    fs::{Permissions, set_permissions},
    os::unix::fs::{PermissionsExt as _, symlink},
    path::{Path, PathBuf},
    process::Command,
};

use crate::process::{
    FinishedProcess, KeywardProcess, TestHome, plain_key_request, read_text, same_environment_command,
    wait_for,
};

/// The command with this umask.
fn under_umask(umask: &str, command: &Command) -> Command {
    let mut shell = same_environment_command("sh", command);
    shell.args(["-c", &format!("umask {umask}; exec \"$0\" \"$@\"")]);
    shell.arg(command.get_program()).args(command.get_args());
    shell
}

/// A client command of an operator.
fn client(server: &KeywardProcess, arguments: &[&str]) -> Command {
    let mut command = server.home.command(arguments);
    command.arg("--server").arg(server.address.to_string()).arg("--token-file");
    command.arg(server.home.path("keyward-root.key"));
    command
}

/// Settings with a decision log, and a file of keys of which the second row is rejected.
fn inputs(home: &TestHome) {
    std::fs::write(home.path("keyward.toml"), "[decision_log]\nfile = 'decisions'\n").unwrap();
    let digest = "5e".repeat(32);
    std::fs::write(home.path("keys.csv"), format!("sha256,scopes\n{digest},monitors:read\nno digest,x:y\n"))
        .unwrap();
}

const IMPORT: [&str; 7] = ["keys", "import", "keys.csv", "--account", "acme", "--environment", "production"];
const CREATE: [&str; 8] =
    ["keys", "create", "--account", "acme", "--environment", "production", "--scope", "monitors:read"];

/// The mode of every file in the folder, but for those that the test has made.
fn modes(home: &TestHome) -> BTreeMap<String, u32> {
    let made = |name: &str| {
        ["stdout", "stderr", "keyward.toml", "keys.csv"].iter().any(|made| {
            name.strip_prefix(made).is_some_and(|rest| rest.is_empty() || rest.parse::<f32>().is_ok())
        })
    };
    let files = home.files().into_iter().map(|(path, _)| path);
    let modes = files.map(|path| {
        let mode = path.metadata().unwrap().permissions().mode() & 0o7777;
        (path.file_name().unwrap().to_string_lossy().into_owned(), mode)
    });
    modes.filter(|(name, _)| !made(name)).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn every_file_that_the_program_creates_is_its_owners_alone_whatever_the_umask() {
    for umask in ["000", "777"] {
        let home = TestHome::new();
        inputs(&home);
        let mut serve = home.serve_command_without_root_key_file();
        serve.args(["--config", "keyward.toml"]);
        let server = home.start_with(under_umask(umask, &serve)).unwrap();
        let mut root = server.caller(&read_text(&home.path("keyward-root.key")));
        root.create_account("acme").await;
        root.check_token("unknown").await.unwrap();
        wait_for("a decision to be written", || home.path("decisions").exists().then_some(()));
        let run = |command: &Command| home.run_to_end(under_umask(umask, command));
        let good = |command: &Command| {
            let ended = run(command);
            assert_eq!(ended.code, Some(0), "{ended:?}");
        };
        good(&client(&server, &[&CREATE[..], &["--write-token", "new.key"]].concat()));
        good(&client(&server, &["audit", "export", "--to", "export.jsonl"]));
        assert_eq!(run(&client(&server, &IMPORT)).code, Some(1), "one row is rejected");
        let url = home.url();
        good(&home.command(["backup", "--database", &url, "--to", "backup.db"]));
        let mut modes_seen = modes(&home);
        server.stop();
        let archive =
            ["audit", "archive", "--before", "2200-01-01T00:00:00Z", "--yes", "--to", "archive.jsonl"];
        good(&home.command(archive.iter().chain(&["--database", &*url])));
        good(&home.root_key_reset_command("reset.key"));
        modes_seen.extend(modes(&home));
        let names: Vec<_> = modes_seen.keys().map(String::as_str).collect();
        let expected = [
            "archive.jsonl",
            "backup.db",
            "decisions",
            "export.jsonl",
            "keys.csv.keyward-progress",
            "keys.csv.rejected",
            "keyward-root.key",
            "keyward.db",
            "keyward.db-lock",
            "keyward.db-shm",
            "keyward.db-wal",
            "new.key",
            "reset.key",
        ];
        assert_eq!(names, expected);
        for (name, mode) in modes_seen {
            assert_eq!(mode, 0o600, "{name} has mode {mode:o} under umask {umask}");
        }
    }
}

/// A link at a place where the program would create a file. It leads to a file of somebody else, or to none.
struct PlantedLink {
    link: PathBuf,
    target: PathBuf,
    content: Option<&'static str>,
}

impl PlantedLink {
    fn at(link: PathBuf, exists: bool) -> PlantedLink {
        let mut target = link.clone().into_os_string();
        target.push(".target");
        let (target, content) = (PathBuf::from(target), exists.then_some("precious"));
        if let Some(content) = content {
            std::fs::write(&target, content).unwrap();
        }
        symlink(&target, &link).unwrap();
        PlantedLink { link, target, content }
    }

    #[track_caller]
    fn assert_untouched(&self) {
        let found = std::fs::read_to_string(&self.target).ok();
        assert_eq!(found.as_deref(), self.content, "through {}", self.link.display());
    }
}

#[track_caller]
fn refused(ended: &FinishedProcess, path: &Path) {
    let name = path.file_name().unwrap().to_string_lossy();
    assert!(ended.code.is_some_and(|code| code > 0) && ended.err.contains(&*name), "{name}: {ended:?}");
    assert!(!ended.err.contains("panicked"), "{ended:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn no_file_is_written_through_a_symbolic_link() {
    for exists in [true, false] {
        let home = TestHome::new();
        inputs(&home);
        let mut serve = home.serve_command_without_root_key_file();
        serve.args(["--config", "keyward.toml"]);
        let start = |path: &str| {
            let planted = PlantedLink::at(home.path(path), exists);
            let mut command = same_environment_command(serve.get_program(), &serve);
            command.args(serve.get_args());
            let Err(ended) = home.start_with(command) else { panic!("{path}: it serves") };
            refused(&ended, &planted.link);
            planted.assert_untouched();
            std::fs::remove_file(&planted.link).unwrap();
        };
        for path in ["keyward.db-lock", "keyward-root.key", "decisions"] {
            start(path);
        }
        assert!(!home.path("keyward-root.key").exists(), "no refused start has made a root key");
        let server = home.start_with(serve).unwrap();
        let mut root = server.caller(&read_text(&home.path("keyward-root.key")));
        root.create_account("acme").await;
        root.create_key(plain_key_request()).await.unwrap();
        let url = home.url();
        let create = [&CREATE[..], &["--write-token", "new.key"]].concat();
        let commands = [
            ("new.key", client(&server, &create)),
            ("export.jsonl", client(&server, &["audit", "export", "--to", "export.jsonl"])),
            ("backup.db", home.command(["backup", "--database", &url, "--to", "backup.db"])),
            ("keys.csv.rejected", client(&server, &IMPORT)),
        ];
        for (path, command) in commands {
            let planted = PlantedLink::at(home.path(path), exists);
            refused(&home.run_to_end(command), &planted.link);
            planted.assert_untouched();
            std::fs::remove_file(&planted.link).unwrap();
        }
        // A progress file is replaced, and never written through.
        let planted = PlantedLink::at(home.path("keys.csv.keyward-progress.new"), exists);
        assert_eq!(home.run_to_end(client(&server, &IMPORT)).code, Some(1), "one row is rejected");
        planted.assert_untouched();
        server.stop();
        let planted = PlantedLink::at(home.path("archive.jsonl"), exists);
        let archive =
            ["audit", "archive", "--before", "2200-01-01T00:00:00Z", "--yes", "--to", "archive.jsonl"];
        refused(&home.run_to_end(home.command(archive.iter().chain(&["--database", &*url]))), &planted.link);
        planted.assert_untouched();
    }
}

#[test]
fn sqlite_writes_through_no_link_beside_the_database() {
    for name in ["keyward.db-wal", "keyward.db-shm", "keyward.db-journal"] {
        let home = TestHome::new();
        let planted = PlantedLink::at(home.path(name), true);
        let said = home.run_expecting_failure(home.serve_command());
        assert!(said.contains(name) && said.contains("symbolic link"), "{said}");
        planted.assert_untouched();
    }
}

fn allow(path: &Path, mode: u32) {
    set_permissions(path, Permissions::from_mode(mode)).unwrap();
}

/// A folder of its own for the database, since the home's is the test's.
fn stopped_database() -> (TestHome, PathBuf, String) {
    let home = TestHome::new();
    let folder = home.path("data");
    std::fs::create_dir(&folder).unwrap();
    let database = folder.join("keyward.db");
    let home = home.with_url(&format!("sqlite:{}", database.display()));
    let url = home.start().stop().url();
    (home, database, url)
}

#[test]
fn a_database_that_everybody_can_write_is_refused_with_the_fix() {
    let (home, database, _) = stopped_database();
    let folder = database.parent().unwrap().to_owned();
    let wal = folder.join("keyward.db-wal");
    std::fs::write(&wal, "").unwrap();
    for (path, mode, fix) in [
        (&database, 0o602, "chmod 600"),
        (&database, 0o666, "chmod 600"),
        (&wal, 0o666, "chmod 600"),
        (&folder, 0o777, "chmod o-w"),
    ] {
        allow(path, mode);
        let said = home.run_expecting_failure(home.serve_command());
        for part in
            [&*path.display().to_string(), &format!("mode {mode:04o}"), fix, "every user of this machine can"]
        {
            assert!(said.contains(part), "{part}: {said}");
        }
        let reset = home.run_to_end(home.root_key_reset_command("-"));
        assert!(reset.code == Some(1) && reset.out.is_empty(), "{reset:?}");
        allow(path, if path == &folder { 0o700 } else { 0o600 });
    }
    std::fs::remove_file(&wal).unwrap();
    // Where users can remove only what is theirs, nobody puts another file in its place.
    allow(&folder, 0o1777);
    home.start_with(home.serve_command()).unwrap().stop();
}

#[test]
fn a_database_that_a_group_can_write_is_warned_of_and_serves() {
    let (home, database, _) = stopped_database();
    let folder = database.parent().unwrap().to_owned();
    for (path, mode, usual) in [(&database, 0o660, 0o600), (&folder, 0o770, 0o700)] {
        allow(path, mode);
        let server = home.start_with(home.serve_command()).unwrap();
        let said = server.process.stderr();
        assert!(
            said.contains("a group can change the database") && said.contains(&format!("{mode:04o}")),
            "{said}"
        );
        server.stop();
        allow(path, usual);
    }
    let server = home.start_with(home.serve_command()).unwrap();
    assert!(!server.process.stderr().contains("a group can change"), "nothing is left to warn of");
}
