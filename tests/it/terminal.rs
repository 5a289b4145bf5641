//! The command line's safety, with the real binary: what cannot be undone is asked about on the terminal, or refused; a
//! token goes to nobody who was not meant; a misspelt path creates nothing; a reader that has gone makes no false success.

use std::{
    io::Write as _,
    os::unix::fs::PermissionsExt as _,
    path::Path,
    process::{Command, Stdio},
};

use keyward::pb::{self, KeyState, Reason};

use crate::process::{
    FinishedProcess, KeywardProcess, TestHome, plain_key_request, read_text, same_environment_command,
    wait_for,
};

/// `keyward` as a client of a server, with its root key.
fn client(server: &KeywardProcess, arguments: &[&str]) -> Command {
    let mut command = server.home.command(arguments);
    command.env("KEYWARD_SERVER", server.address.to_string());
    command.env("KEYWARD_TOKEN_FILE", server.home.root_key_file());
    command.env("HOME", server.home.path(""));
    command
}

/// The command without a terminal, whatever the tests were started from.
fn without_terminal(command: &Command) -> Command {
    let mut setsid = same_environment_command("setsid", command);
    setsid.arg("--wait").arg(command.get_program()).args(command.get_args());
    setsid
}

/// Runs a line of the shell on a new terminal, and answers its question. Gives the exit code, and what the
/// terminal showed.
fn answered(like_this: &Command, line: &str, answer: &str) -> (Option<i32>, String) {
    let folder = like_this.get_current_dir().unwrap();
    let shown = folder.join("terminal");
    let mut script = same_environment_command("script", like_this);
    script.args(["-q", "-e", "-f", "-c", line]).arg(&shown);
    script.env("KEYWARD", like_this.get_program());
    let mut script =
        script.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let on_screen = || String::from_utf8_lossy(&std::fs::read(&shown).unwrap_or_default()).into_owned();
    wait_for("the question", || {
        (on_screen().contains("[y/N]") || script.try_wait().unwrap().is_some()).then_some(())
    });
    let mut keyboard = script.stdin.take().unwrap();
    // It may have ended without a question.
    let _ = writeln!(keyboard, "{answer}");
    let ended = wait_for("the command to end", || script.try_wait().unwrap());
    (ended.code(), on_screen())
}

async fn state(server: &KeywardProcess, id: &str) -> KeyState {
    server.root_caller().get_key(id).await.unwrap().state()
}

async fn with_key() -> (KeywardProcess, String, String) {
    let server = KeywardProcess::start();
    server.root_caller().create_account("acme").await;
    let (id, token) = server.root_caller().create_key(plain_key_request()).await.unwrap();
    (server, id, token)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_question_is_asked_on_the_terminal_though_stdin_is_a_pipe() {
    let (server, id, _) = with_key().await;
    let command = client(&server, &[]);
    let revoke = format!("cat root.key | \"$KEYWARD\" --token-file - keys revoke {id}");
    let (code, shown) = answered(&command, &revoke, "n");
    assert!(
        code == Some(1)
            && shown.contains("Permanently revoke key ")
            && shown.contains("[y/N]")
            && shown.contains("not confirmed"),
        "{shown}"
    );
    assert_eq!(state(&server, &id).await, KeyState::Active);
    let bulk = "cat root.key | \"$KEYWARD\" --token-file - keys bulk-revoke --account acme";
    let (code, shown) = answered(&command, bulk, "");
    assert!(code == Some(1) && shown.contains("Permanently revoke 1 key of account acme? [y/N]"), "{shown}");
    assert_eq!(state(&server, &id).await, KeyState::Active);
    let (code, shown) = answered(&command, &revoke, "y");
    assert_eq!(code, Some(0), "{shown}");
    assert_eq!(state(&server, &id).await, KeyState::Revoked);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_undone_is_refused_without_a_terminal_and_without_yes() {
    let (server, id, token) = with_key().await;
    for arguments in [
        &["keys", "revoke", &id][..],
        &["keys", "bulk-revoke", "--all-accounts"],
        &["keys", "finish-rotation", &id],
        &["accounts", "suspend", "acme"],
        &["members", "remove", "acme", "ann"],
        &["roles", "delete", "reader"],
        &["revoke-self"],
    ] {
        let ended = server.home.run_to_end(without_terminal(&client(&server, arguments)));
        assert!(
            ended.code == Some(2) && ended.err.contains("repeat the command with --yes"),
            "{arguments:?} {ended:?}"
        );
    }
    assert_eq!(server.root_caller().check_token(&token).await.unwrap(), Reason::Ok);
    let done = server.home.run_to_end(without_terminal(&client(&server, &["keys", "revoke", &id, "--yes"])));
    assert_eq!(done.code, Some(0), "{done:?}");
    assert_eq!(server.root_caller().check_token(&token).await.unwrap(), Reason::Revoked);
    let home = server.stop();
    let url = home.url();
    for arguments in [
        &["root-key", "reset", "--root-key-file", "new.key", "--database", &url][..],
        &["audit", "archive", "--before", "2200-01-01T00:00:00Z", "--to", "archive", "--database", &url],
        &["accept-lost-wal", "--database", &url],
        &["replicas", "accept-regression", "--database", "postgres://u@127.0.0.1:1/k"],
    ] {
        let ended = home.run_to_end(without_terminal(&home.command(arguments)));
        assert!(
            ended.code == Some(2) && ended.err.contains("repeat the command with --yes"),
            "{arguments:?} {ended:?}"
        );
    }
    assert!(!home.path("new.key").exists() && !home.path("archive").exists());
    let server = home.start();
    server.root_caller().get_key(&id).await.unwrap();
}

#[test]
fn a_misspelt_path_creates_no_database() {
    let home = TestHome::new();
    for arguments in [
        &["root-key", "reset", "--yes", "--root-key-file", "new.key"][..],
        &["audit", "archive", "--yes", "--before", "1d", "--to", "archive"],
        &["accept-lost-wal", "--yes"],
        &["backup", "--to", "backup.db"],
        &["migrate", "--dry-run"],
        &["migrate"],
    ] {
        let ended = home.run_to_end(home.command([arguments, &["--database", "sqlite:mispelt.db"]].concat()));
        let said = "there is no database at mispelt.db, and none was created";
        assert!(ended.code == Some(1) && ended.err.contains(said), "{arguments:?} {ended:?}");
        let left: Vec<_> = home.files().into_iter().map(|(path, _)| path).collect();
        let ours =
            |path: &Path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("std"));
        assert!(left.iter().all(|path| ours(path)), "{arguments:?} {left:?}");
    }
}

#[test]
fn a_backup_is_not_written_over_a_file() {
    let home = KeywardProcess::start().stop();
    std::fs::write(home.path("backup.db"), "mine").unwrap();
    let ended = home.run_to_end(home.command(["backup", "--to", "backup.db", "--database", &home.url()]));
    let said =
        "backup.db exists already and is not overwritten; nothing was copied. Name a new file with --to";
    assert!(ended.code == Some(1) && ended.err.contains(said), "{ended:?}");
    assert_eq!(read_text(&home.path("backup.db")), "mine");
}

/// Runs a command whose standard output nobody reads any more.
fn without_reader(home: &TestHome, mut command: Command) -> FinishedProcess {
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let output = command.stdin(Stdio::null()).stdout(writer).stderr(Stdio::piped()).output().unwrap();
    assert!(home.path("").exists());
    let err = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!err.contains("panicked"), "{err}");
    FinishedProcess { code: output.status.code(), out: String::new(), err }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reader_that_has_gone_makes_neither_a_panic_nor_a_false_success() {
    let (server, _, _) = with_key().await;
    let url = server.home.url();
    // What is done stays done, and who reads a list has seen enough.
    for command in [
        server.home.command(["backup", "--to", "backup.db", "--database", &url]),
        server.home.command(["migrate", "--help"]),
        client(&server, &["keys", "list", "--account", "acme"]),
    ] {
        let ended = without_reader(&server.home, command);
        assert_eq!(ended.code, Some(0), "{ended:?}");
    }
    assert!(server.home.path("backup.db").exists());
    // A token that nobody has, and a copy that is not whole, are no success.
    let create = ["keys", "create", "--account", "acme", "--environment", "production", "--scope", "a:b"];
    for (arguments, code) in [
        (create.to_vec(), 2),
        ([&create[..], &["--token-only"]].concat(), 2),
        ([&create[..], &["--output", "json"]].concat(), 2),
        (vec!["audit", "export"], 2),
    ] {
        let ended = without_reader(&server.home, client(&server, &arguments));
        assert!(
            ended.code == Some(code) && ended.err.contains("cannot write to stdout"),
            "{arguments:?} {ended:?}"
        );
    }
    let home = server.stop();
    let ended = without_reader(&home, home.root_key_reset_command("-"));
    assert!(ended.code == Some(1) && ended.err.contains("repeat the command"), "{ended:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn scopes_are_added_and_removed_and_what_is_replaced_is_said() {
    let (server, id, _) = with_key().await;
    let update =
        |more: &[&str]| server.home.run_to_end(client(&server, &[&["keys", "update", &id], more].concat()));
    let scopes = async || server.root_caller().get_key(&id).await.unwrap().scopes;
    let added = update(&["--add-scope", "jobs:run,jobs:read"]);
    assert!(
        added.code == Some(0) && added.err.contains("removed: none; added: jobs:read, jobs:run"),
        "{added:?}"
    );
    assert!(!added.err.contains("warning"), "nobody else changed it: {added:?}");
    assert_eq!(scopes().await, ["jobs:read", "jobs:run", "monitors:read"]);
    let removed = update(&["--remove-scope", "jobs:run", "--name", "ci"]);
    assert_eq!(removed.code, Some(0), "{removed:?}");
    assert_eq!(scopes().await, ["jobs:read", "monitors:read"]);
    let missing = update(&["--remove-scope", "jobs:run"]);
    assert!(
        missing.code == Some(1) && missing.err.contains("it has jobs:read, monitors:read"),
        "{missing:?}"
    );
    let replaced = update(&["--scope", "jobs:read"]);
    let said = "Scopes removed: monitors:read; added: none.";
    assert!(replaced.code == Some(0) && replaced.err.contains(said), "{replaced:?}");
}

/// Each has read the scopes before another wrote, and none may say that it is done while its scope is lost.
#[tokio::test(flavor = "multi_thread")]
async fn scopes_that_are_added_at_the_same_time_are_all_added() {
    let (server, id, _) = with_key().await;
    let add = |number: u32| client(&server, &["keys", "update", &id, "--add-scope", &format!("s:n{number}")]);
    let ended: Vec<_> = std::thread::scope(|threads| {
        let started: Vec<_> =
            (0..6).map(add).map(|command| threads.spawn(|| server.home.run_to_end(command))).collect();
        started.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    for ended in &ended {
        assert_eq!(ended.code, Some(0), "{ended:?}");
    }
    let scopes = server.root_caller().get_key(&id).await.unwrap().scopes;
    assert_eq!(scopes, ["monitors:read", "s:n0", "s:n1", "s:n2", "s:n3", "s:n4", "s:n5"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rotation_needs_to_be_told_when_the_old_token_stops() {
    let (server, id, token) = with_key().await;
    let rotate =
        |more: &[&str]| server.home.run_to_end(client(&server, &[&["keys", "rotate", &id], more].concat()));
    let vague = rotate(&[]);
    assert!(
        vague.code == Some(2) && vague.err.contains("--overlap") && vague.err.contains("--now"),
        "{vague:?}"
    );
    assert_eq!(rotate(&["--overlap", "1h", "--token-only"]).code, Some(0));
    assert_eq!(server.root_caller().check_token(&token).await.unwrap(), Reason::Ok);
    assert_eq!(rotate(&["--now", "--token-only"]).code, Some(0));
    assert_eq!(server.root_caller().check_token(&token).await.unwrap(), Reason::Rotated);
}

#[test]
fn a_token_goes_to_no_other_machine_in_plaintext_and_its_file_is_for_its_owner() {
    let server = KeywardProcess::start();
    let mut elsewhere = client(&server, &["whoami"]);
    elsewhere.env("KEYWARD_SERVER", "http://192.0.2.1:50051");
    let refused = server.home.run_to_end(elsewhere);
    assert!(refused.code == Some(2) && refused.err.contains("is another machine"), "{refused:?}");
    let quiet = server.home.run_to_end(client(&server, &["whoami"]));
    assert!(quiet.code == Some(0) && quiet.err.is_empty(), "{quiet:?}");
    let file = server.home.root_key_file();
    std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o644)).unwrap();
    let warned = server.home.run_to_end(client(&server, &["whoami"]));
    assert!(
        warned.code == Some(0) && warned.err.starts_with("warning: everybody can read the token"),
        "{warned:?}"
    );
    let mut wrong = client(&server, &["whoami"]);
    wrong.env("KEYWARD_SERVER", "http://u:sesame@h/x@y");
    let wrong = server.home.run_to_end(wrong);
    assert!(wrong.code == Some(2) && wrong.err.contains("KEYWARD_SERVER: "), "{wrong:?}");
    assert!(!wrong.err.contains("sesame") && !wrong.err.contains("x@y"), "{wrong:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_answers_of_a_client_name_no_request_that_was_not_sent() {
    let (server, ..) = with_key().await;
    let ended = server
        .home
        .run_to_end(without_terminal(&client(&server, &["keys", "bulk-revoke", "--all-accounts"])));
    assert!(ended.code == Some(2) && !ended.err.contains("request id"), "{ended:?}");
    let entries =
        server.root_caller().audit.list(pb::ListAuditEntriesRequest::default()).await.unwrap().into_inner();
    assert!(entries.entries.iter().all(|entry| entry.action != "key.revoked"));
}
