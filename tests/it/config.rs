//! `keyward config` and the settings of a server, as whoever operates one meets them: the real binary, real files.

use std::{os::unix::fs::PermissionsExt as _, path::PathBuf, process::Command};

use serde_json::Value;

use crate::{
    postgres::Cluster,
    process::{Ended, Home},
};

/// A folder with a settings file of this text.
fn written(text: &str) -> (Home, PathBuf) {
    let home = Home::new();
    let file = home.path("keyward.toml");
    std::fs::write(&file, text).unwrap();
    (home, file)
}

fn run(home: &Home, arguments: &[&str], environment: &[(&str, &str)]) -> Ended {
    let mut command: Command = home.command(arguments);
    command.envs(environment.iter().copied());
    home.run(command)
}

#[test]
fn show_tells_each_setting_and_where_it_comes_from() {
    let (home, file) = written("listen = \"127.0.0.1:2\"\n\n[limits]\ntimeout = \"30ms\"\n");
    let ended = run(
        &home,
        &["config", "show", "--config", "keyward.toml", "--listen", "127.0.0.1:1", "--output", "json"],
        &[("KEYWARD_ADMIN_LISTEN", "127.0.0.1:3")],
    );
    assert_eq!(ended.code, Some(0), "{ended:?}");
    let shown: Value = serde_json::from_str(&ended.out).unwrap();
    let of = |key: &str| {
        let all = shown["settings"].as_array().unwrap();
        let one = all.iter().find(|setting| setting["key"] == key).unwrap();
        (one["value"].clone(), one["origin"].clone())
    };
    assert_eq!(of("listen"), ("127.0.0.1:1".into(), serde_json::json!({"kind": "flag", "name": "--listen"})));
    let variable = serde_json::json!({"kind": "environment", "name": "KEYWARD_ADMIN_LISTEN"});
    assert_eq!(of("admin_listen"), ("127.0.0.1:3".into(), variable));
    let line = serde_json::json!({"kind": "file", "file": "keyward.toml", "line": 4});
    assert_eq!(of("limits.timeout"), ("30ms".into(), line));
    assert_eq!(of("retention_days"), (90.into(), serde_json::json!({"kind": "default"})));
    assert!(file.exists());
}

#[test]
fn what_show_prints_can_be_used_again() {
    let (home, _) = written(
        "retention_days = 7\nenvironments = [{ name = 'moon', tag = 'm' }]\n[gateway]\ntrusted_hops = 2\n",
    );
    let first = run(&home, &["config", "show", "--config", "keyward.toml", "--threads", "3"], &[]);
    assert_eq!(first.code, Some(0), "{first:?}");
    std::fs::write(home.path("again.toml"), &first.out).unwrap();
    let again = run(&home, &["config", "show", "--config", "again.toml"], &[]);
    assert_eq!(again.code, Some(0), "{again:?}");
    let values = |text: &str| -> Vec<String> {
        let lines = text.lines().filter(|line| !line.starts_with('#'));
        lines.map(|line| line.split(" # ").next().unwrap().trim_end().to_owned()).collect()
    };
    assert_eq!(values(&first.out), values(&again.out));
    for said in ["retention_days = 7", "threads = 3", "trusted_hops = 2"] {
        assert!(first.out.contains(said), "{said}: {}", first.out);
    }
}

#[test]
fn no_secret_is_ever_shown() {
    let (home, _) = written("database = \"postgres://u:sesame@h/k\"\n[limits]\nbackend = \"redis\"\n");
    let redis = [("KEYWARD_LIMITS_URL", "redis://:sesame@h")];
    for arguments in [
        vec!["config", "show", "--config", "keyward.toml"],
        vec!["config", "show", "--config", "keyward.toml", "--output", "json"],
        vec!["config", "check", "keyward.toml"],
        vec!["config", "check", "keyward.toml", "--output", "json"],
    ] {
        let ended = run(&home, &arguments, &redis);
        assert_eq!(ended.code, Some(0), "{ended:?}");
        assert!(!format!("{}{}", ended.out, ended.err).contains("sesame"), "{ended:?}");
    }
    let shown = run(&home, &["config", "show", "--config", "keyward.toml"], &redis).out;
    assert!(shown.contains("(set, from KEYWARD_LIMITS_URL)"), "{shown}");
    assert!(
        shown.contains("postgres://u:***@h/k") && shown.contains("(set, from keyward.toml:1)"),
        "{shown}"
    );
}

#[test]
fn check_says_everything_that_is_wrong_and_its_exit_code_says_whether() {
    let (home, _) = written("lisen = \"x\"\nthreads = \"two\"\n[limts]\nbackend = \"redis\"\n");
    let refused = run(&home, &["config", "check", "keyward.toml"], &[]);
    assert_eq!(refused.code, Some(1), "{refused:?}");
    for said in [
        "line 1, column 1: unknown key `lisen`: did you mean `listen`?",
        "line 2, column 1: threads: invalid",
        "line 4, column 1: unknown key `limts.backend`: did you mean `limits.backend`?",
    ] {
        assert!(refused.out.contains(said), "{refused:?}");
    }
    std::fs::write(home.path("keyward.toml"), "token_prefix = 'K'\nlease = '0s'\n[gateway]\nmode = 'off'\n")
        .unwrap();
    let refused = run(&home, &["config", "check"], &[("KEYWARD_CONFIG", "keyward.toml")]);
    assert_eq!(refused.code, Some(1), "{refused:?}");
    for said in
        ["line 1, column 1: token_prefix", "line 2, column 1: lease", "line 4, column 1: gateway.mode"]
    {
        assert!(refused.out.contains(said), "{refused:?}");
    }
    assert_eq!(run(&home, &["config", "check", "nowhere.toml"], &[]).code, Some(2));
    std::fs::write(home.path("keyward.toml"), "retention_days = 1\n").unwrap();
    let accepted = run(&home, &["config", "check", "keyward.toml"], &[]);
    assert_eq!((accepted.code, &*accepted.out), (Some(0), "keyward.toml: accepted\n"));
}

#[test]
fn a_server_tells_every_problem_of_its_file_and_does_not_start() {
    let (home, file) = written("token_prefix = 'K'\nretention_days = 1\nlease = '0s'\n");
    let mut serve = home.serve();
    serve.arg("--config").arg(&file);
    let said = home.refusal(serve);
    assert!(
        said.contains("line 1, column 1: token_prefix") && said.contains("line 3, column 1: lease"),
        "{said}"
    );
    std::fs::write(&file, "reteintion_days = 1\n").unwrap();
    let mut serve = home.serve();
    serve.arg("--config").arg(&file);
    let said = home.refusal(serve);
    assert!(said.contains("unknown key `reteintion_days`: did you mean `retention_days`?"), "{said}");
}

#[test]
fn the_databases_password_can_have_a_file_of_its_own() {
    let mut cluster = Cluster::start(&[]);
    cluster.sql("postgres", "ALTER ROLE keyward PASSWORD 'open & ses@me'");
    cluster.sql("postgres", "CREATE DATABASE keys OWNER keyward TEMPLATE template0");
    // The superuser keeps his way in.
    cluster.restart(|data| {
        std::fs::write(data.join("pg_hba.conf"), "local all postgres trust\nlocal all all scram-sha-256\n")
            .unwrap();
    });
    let home = Home::on(crate::postgres::url(cluster.socket(), 5432, "keys"));
    let password = home.path("password");
    std::fs::write(&password, "wrong\n").unwrap();
    std::fs::set_permissions(&password, std::fs::Permissions::from_mode(0o600)).unwrap();
    let serve = || {
        let mut serve = home.serve();
        serve.arg("--database-password-file").arg(&password);
        serve
    };
    let said = home.refusal(serve());
    assert!(said.contains("password authentication failed"), "{said}");
    std::fs::write(&password, "open & ses@me\n").unwrap();
    home.start_as(serve()).unwrap().stop();
    assert!(
        !home
            .files()
            .iter()
            .any(|(path, text)| { *path != password && text.windows(6).any(|part| part == b"ses@me") })
    );
}

#[test]
fn a_password_file_that_is_of_no_use_is_refused() {
    let (home, _) = written("");
    std::fs::write(home.path("password"), "sesame").unwrap();
    std::fs::write(home.path("empty"), "\n").unwrap();
    for (database, file, said) in [
        ("sqlite:keyward.db", "password", "no postgres:// URL"),
        ("postgres://u:sesame@h/k", "password", "one password too many"),
        ("postgres://u@h/k", "empty", "is empty"),
        ("postgres://u@h/k", "nowhere", "cannot be read"),
    ] {
        let arguments = ["config", "show", "--database", database, "--database-password-file", file];
        let ended = run(&home, &arguments, &[]);
        assert!(ended.code == Some(1) && ended.err.contains(said), "{ended:?}");
        assert!(!ended.err.contains("sesame"), "{ended:?}");
    }
}

#[test]
fn the_reference_page_and_the_schema_are_printed() {
    let home = Home::new();
    let page = run(&home, &["config", "reference"], &[]);
    assert!(page.code == Some(0) && page.out.starts_with("# Configuration\n"), "{page:?}");
    let schema = run(&home, &["config", "schema"], &[]);
    let schema: Value = serde_json::from_str(&schema.out).unwrap();
    assert_eq!(schema["properties"]["retention_days"]["default"], 90);
}
