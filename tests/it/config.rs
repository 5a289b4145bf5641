//! `keyward config` and the settings of a server, as whoever operates one meets them: the real binary, real files.

use std::{os::unix::fs::PermissionsExt as _, path::PathBuf, process::Command};

use keyward::domain::text::escape_toml;
use serde_json::Value;

use crate::{
    postgres::PostgresServer,
    process::{FinishedProcess, KeywardProcess, TestHome},
    test_ca::{PemCertificate, TestCa},
};

/// A folder with a settings file of this text.
fn write_settings(text: &str) -> (TestHome, PathBuf) {
    let home = TestHome::new();
    let file = home.path("keyward.toml");
    std::fs::write(&file, text).unwrap();
    (home, file)
}

fn run(home: &TestHome, arguments: &[&str], environment: &[(&str, &str)]) -> FinishedProcess {
    let mut command: Command = home.command(arguments);
    command.envs(environment.iter().copied());
    home.run_to_end(command)
}

#[test]
fn show_tells_each_setting_and_where_it_comes_from() {
    let (home, file) = write_settings("listen = \"127.0.0.1:2\"\n\n[limits]\ntimeout = \"30ms\"\n");
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
    let (home, _) = write_settings(
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
fn what_show_prints_steers_no_terminal_and_is_the_same_value() {
    let name = "a\u{202e}b\u{1b}[2J\u{e0041}\"'\\\n";
    let (home, _) = write_settings(&format!("[telemetry]\nservice_name = {}\n", escape_toml(name)));
    let shown = run(&home, &["config", "show", "--config", "keyward.toml"], &[]);
    assert_eq!(shown.code, Some(0), "{shown:?}");
    assert!(shown.out.chars().all(|character| character == '\n' || !character.is_control()), "{shown:?}");
    assert!(!shown.out.contains(['\u{202e}', '\u{e0041}']), "{shown:?}");
    std::fs::write(home.path("again.toml"), &shown.out).unwrap();
    let again = run(&home, &["config", "show", "--config", "again.toml", "--output", "json"], &[]);
    let again: Value = serde_json::from_str(&again.out).unwrap();
    let all = again["settings"].as_array().unwrap();
    let one = all.iter().find(|setting| setting["key"] == "telemetry.service_name").unwrap();
    assert_eq!(one["value"], name);
}

#[test]
fn no_command_repeats_a_credential_that_was_pasted_into_a_setting() {
    let random = "q7RkZ2mVb9XcT4nWs8LpQ1zY";
    for (key, value, secret) in [
        ("listen", "postgres://u:sesame77@h:5432", "sesame77"),
        ("lease", "redis://:sesame77@h", "sesame77"),
        ("database_password_file", "sesame77", "sesame77"),
        ("rules", random, random),
        ("token_prefix", random, random),
        ("threads", "u:sesame77@h", "sesame77"),
    ] {
        let (home, _) = write_settings(&format!("database = 'postgres://u@h/k'\n{key} = '{value}'\n"));
        for arguments in [
            &["config", "check", "keyward.toml"][..],
            &["config", "show", "--config", "keyward.toml"],
            &["serve", "--config", "keyward.toml"],
        ] {
            let ended = run(&home, arguments, &[]);
            let output = format!("{}{}", ended.out, ended.err);
            assert_eq!(ended.code, Some(1), "{key} {arguments:?}: {output}");
            assert!(!output.contains(secret) && output.contains(key), "{key} {arguments:?}: {output}");
        }
    }
}

#[test]
fn no_secret_is_ever_shown() {
    let (home, _) = write_settings("database = \"postgres://u:sesame@h/k\"\n[limits]\nbackend = \"redis\"\n");
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
    let (home, _) = write_settings("lisen = \"x\"\nthreads = \"two\"\n[limts]\nbackend = \"redis\"\n");
    let refused = run(&home, &["config", "check", "keyward.toml"], &[]);
    assert_eq!(refused.code, Some(1), "{refused:?}");
    for said in [
        "line 1, column 1: unknown key `lisen`: did you mean `listen`?",
        "line 2, column 1: threads = \"two\" must be a whole number of 1 or more",
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
    let unread = run(&home, &["config", "show"], &[("KEYWARD_CONFIG", "nowhere.toml")]);
    assert!(
        unread.code == Some(2) && unread.err.contains("nowhere.toml (KEYWARD_CONFIG) cannot be read"),
        "{unread:?}"
    );
    std::fs::write(home.path("keyward.toml"), "retention_days = 1\n").unwrap();
    let accepted = run(&home, &["config", "check", "keyward.toml"], &[]);
    assert_eq!((accepted.code, &*accepted.out), (Some(0), "keyward.toml: accepted\n"));
}

/// The problems among the lines of an answer: those that are indented.
fn indented(text: &str) -> Vec<String> {
    text.lines().filter_map(|line| line.strip_prefix("  ")).map(str::to_owned).collect()
}

/// Settings that no server starts with: the file, the environment, and a piece of each problem's text.
type InvalidSettings = (&'static str, &'static [(&'static str, &'static str)], &'static [&'static str]);

const PLAIN: &str = "[[listener]]\nname = 'a'\naddress = '0.0.0.0:0'\nservices = ['check']\n";
const SECURE: &str = "[[listener]]\nname = 'a'\naddress = '127.0.0.1:0'\nservices = ['check']\n[listener.tls]\n\
                      certificate = 'cert.pem'\nkey = 'key.pem'\n";

const SOCKET: &str = "[[listener]]\nname = 'a'\naddress = 'unix:/nowhere/a.sock'\nservices = ['check']\n";
/// A listener with TLS, or one that is insecure, may be anywhere, if that is an address.
const UNRESOLVED: &str = "listen = 'a..b:1'\nadmin_listen = 'a..b:2'\nenvoy_listen = 'a..b:3'\n\
                          forward_auth_listen = 'a..b:4'\ninsecure = true";

const WRONG: &[InvalidSettings] = &[
    (
        "database = 'sqlite:/nowhere/dir/k.db'",
        &[],
        &[
            "database = \"sqlite:/nowhere/dir/k.db\" cannot be opened: the folder /nowhere/dir does not exist; create it",
        ],
    ),
    ("database = 'sqlite:/tmp'", &[], &["it is a folder; name a file in it"]),
    (
        "root_key_file = 'nowhere/root.key'",
        &[],
        &[
            "root_key_file = \"nowhere/root.key\" cannot be created: the folder nowhere does not exist; create it",
        ],
    ),
    ("root_key_file = 'wrong.toml'", &[], &["it exists already and is not overwritten; move it away"]),
    (
        "[decision_log]\nfile = '/nowhere/x.log'",
        &[],
        &["decision_log.file = \"/nowhere/x.log\" cannot be written"],
    ),
    ("[decision_log]\nfile = 'wrong.toml/x.log'", &[], &["decision_log.file"]),
    (
        SOCKET,
        &[],
        &["listener.address = \"unix:/nowhere/a.sock\" cannot be bound: the folder /nowhere does not"],
    ),
    (
        "listen = '127.0.0.1:0'\nthreads = 100000000",
        &[],
        &["line 2, column 1: threads = \"100000000\" must be 1 to 512"],
    ),
    ("", &[("KEYWARD_THREADS", "513")], &["KEYWARD_THREADS: threads = \"513\" must be 1 to 512"]),
    (
        UNRESOLVED,
        &[],
        &[
            "line 1, column 1: listen = \"a..b:1\" cannot be bound: its host cannot be looked up",
            "line 2, column 1: admin_listen",
            "line 3, column 1: envoy_listen",
            "line 4, column 1: forward_auth_listen",
        ],
    ),
    ("database = 'kw.db'", &[], &["write sqlite:kw.db"]),
    ("database = 'mysql://u:sesame@h/k'", &[], &["names no known kind of database"]),
    ("database = 'sqlite:k.db?mode=ro'", &[], &["must name a file without options"]),
    ("database = 'postgres://u:p@ss#sesame@h/k'", &[], &["more than one way"]),
    ("database = 'postgres://u@h/k?ssl=on'", &[], &["unknown option"]),
    ("database = 'postgres://u@h/k?sslrootcert=/nowhere.pem'", &[], &["/nowhere.pem"]),
    (
        "",
        &[("KEYWARD_DATABASE", "postgres://u:sesame@h/k?p%61ss=sesame")],
        &["KEYWARD_DATABASE: database = "],
    ),
    ("listen = '0.0.0.0:0'", &[], &["line 1, column 1: listen = \"0.0.0.0:0\" cannot be bound"]),
    (PLAIN, &[], &["line 3, column 1: listener.address"]),
    (
        SECURE,
        &[("KEYWARD_THREADS", "two")],
        &["KEYWARD_THREADS: threads", "cert.pem cannot be read", "key.pem cannot be read"],
    ),
    ("rules = 'nowhere.toml'", &[], &["rules = \"nowhere.toml\" cannot be read"]),
    ("rules = 'wrong.toml'", &[], &["rules = \"wrong.toml\" is wrong: line 4"]),
    ("root_key_file = '-'", &[], &["is standard output"]),
    (
        "lisen = 'x'\nlease = '0s'\n[limits]\ntimeout = '2h'\nprefix = 'a b'\non_backend_failure = 'open'",
        &[("KEYWARD_ADMIN_LISTEN", "nowhere"), ("KEYWARD_LOG", "keyward=loud")],
        &[
            "unknown key `lisen`",
            "lease",
            "limits.timeout",
            "limits.prefix",
            "limits.on_backend_failure",
            "KEYWARD_ADMIN_LISTEN: admin_listen",
            "KEYWARD_LOG: ",
        ],
    ),
    (
        "[[listener]]\nname = 'A'\naddress = 'x'\nservices = []\n[[listener]]\naddress = 5\nservices = ['chek']",
        &[],
        &[
            "line 2, column 1: listener.name",
            "line 3, column 1: listener.address",
            "line 4, column 1: listener.services",
            "listener.name is missing",
            "line 6, column 1: listener.address = 5 must be text",
            "line 7, column 1: listener.services",
        ],
    ),
    (
        "[telemetry]\notlp_endpoint = 'http://h:1'\notlp_headers_file = 'nowhere'\notlp_ca_file = 'wrong.toml'",
        &[],
        &["otlp_headers_file", "otlp_ca_file"],
    ),
    (
        "[limits]\nbackend = 'redis'",
        &[("KEYWARD_LIMITS_URL", "redis://:p#sesame@h")],
        &["KEYWARD_LIMITS_URL: limits.url"],
    ),
    (
        "",
        &[
            ("KEYWARD_INSECURE", "maybe"),
            ("KEYWARD_NO_MIGRATE", "2"),
            ("KEYWARD_REQUIRE_REVISION", "x"),
            ("KEYWARD_LOG_FORMAT", "xml"),
        ],
        &[
            "KEYWARD_INSECURE: insecure",
            "KEYWARD_NO_MIGRATE: migrate",
            "KEYWARD_REQUIRE_REVISION: ",
            "KEYWARD_LOG_FORMAT: ",
        ],
    ),
    (
        "environments = [{ name = 'A', tag = 'LIVE' }]\n[gateway]\nenvironment = 'moon'\ntrusted_hops = 17\nmode = 'off'",
        &[],
        &["environments.name", "environments.tag", "gateway.trusted_hops", "gateway.mode"],
    ),
];

#[test]
fn check_show_and_serve_refuse_the_same_settings_with_the_same_problems_all_at_once() {
    for (settings, environment, expected) in WRONG {
        let (home, _) = write_settings(settings);
        let rule = "[[rule]]\npath = '/a'\nhosts = ['*']\nmethods = ['get']\npublic = true\n";
        std::fs::write(home.path("wrong.toml"), rule).unwrap();
        let checked = run(&home, &["config", "check", "keyward.toml"], environment);
        assert_eq!(checked.code, Some(1), "{settings}: {checked:?}");
        let problems = indented(&checked.out);
        for part in *expected {
            assert!(
                problems.iter().any(|problem| problem.contains(part)),
                "{settings}: {part}: {problems:#?}"
            );
        }
        assert_eq!(problems.len(), expected.len(), "{settings}: {problems:#?}");
        let shown = run(&home, &["config", "show", "--config", "keyward.toml"], environment);
        assert_eq!((shown.code, indented(&shown.err)), (Some(1), problems.clone()), "{settings}");
        let mut serve = home.command(["serve", "--config", "keyward.toml"]);
        serve.envs(environment.iter().copied());
        let refused = home.run_expecting_failure(serve);
        assert_eq!(indented(&refused), problems, "{settings}");
        let all = format!("{checked:?}{shown:?}{refused}");
        assert!(!all.contains("sesame"), "{all}");
        for rust in ["expected", "invalid type", "usize", "u32", "variant"] {
            assert!(!all.contains(rust), "{rust}: {all}");
        }
        let files = home.files();
        assert!(files.iter().all(|(path, _)| path.extension().is_none_or(|end| end != "db")), "{settings}");
    }
}

#[test]
fn a_later_start_needs_no_folder_for_the_root_key() {
    let home = KeywardProcess::start().stop();
    std::fs::write(home.path("keyward.toml"), "root_key_file = 'nowhere/root.key'").unwrap();
    let checked = run(&home, &["config", "check", "keyward.toml"], &[]);
    assert_eq!(checked.code, Some(0), "{checked:?}");
    let mut serve = home.serve_command_without_root_key_file();
    serve.args(["--config", "keyward.toml"]);
    home.start_with(serve).unwrap().stop();
}

#[test]
fn an_address_that_cannot_be_had_is_named_by_its_setting_with_what_to_do() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let taken = taken.local_addr().unwrap();
    for (address, insecure, remedy) in [
        (taken.to_string(), "false", "is another server running there?"),
        ("192.0.2.1:1".to_owned(), "true", "name an address of this machine"),
    ] {
        let listener = format!("[[listener]]\nname = 'a'\naddress = '{address}'\nservices = ['check']\n");
        let (home, file) = write_settings(&format!("insecure = {insecure}\n{listener}"));
        let mut serve = home.command(["serve", "--admin-listen", "127.0.0.1:0", "--config"]);
        serve.arg(&file);
        let refused = home.run_expecting_failure(serve);
        let setting = format!("listener \"a\": address = \"{address}\" cannot be bound");
        assert!(refused.contains(&setting) && refused.contains(remedy), "{refused}");
    }
}

#[test]
fn certificates_that_do_not_fit_are_refused_alike() {
    let (home, _) = write_settings(SECURE);
    let authority = TestCa::new("ours");
    let pair = authority.issue_server_certificate(2040);
    let wrong = |pair: &PemCertificate, said: &str| {
        pair.write_files(&home.path("cert.pem"), &home.path("key.pem"));
        let checked = run(&home, &["config", "check", "keyward.toml"], &[]);
        assert!(checked.code == Some(1) && checked.out.contains(said), "{checked:?}");
        let refused = home.run_expecting_failure(home.command(["serve", "--config", "keyward.toml"]));
        assert_eq!(indented(&refused), indented(&checked.out));
    };
    wrong(&PemCertificate { certificate: "nothing".into(), ..pair.clone() }, "holds no certificate");
    wrong(&PemCertificate { key: "nothing".into(), ..pair.clone() }, "holds no private key");
    wrong(
        &PemCertificate { key: authority.issue_server_certificate(2040).key, ..pair.clone() },
        "does not fit the certificate",
    );
    pair.write_files(&home.path("cert.pem"), &home.path("key.pem"));
    assert_eq!(run(&home, &["config", "check", "keyward.toml"], &[]).code, Some(0));
}

#[test]
fn a_command_that_only_opens_the_database_needs_no_file_of_the_server() {
    let (home, _) = write_settings(&format!("database = 'sqlite:k.db'\nrules = 'nowhere.toml'\n{SECURE}"));
    std::fs::write(home.path("k.db"), "").unwrap();
    let migrated = run(&home, &["migrate", "--config", "keyward.toml"], &[]);
    assert_eq!(migrated.code, Some(0), "{migrated:?}");
    std::fs::write(home.path("keyward.toml"), "database = 'sqlite:k.db'\nlease = '0s'\nlisen = 1\n").unwrap();
    let refused = run(&home, &["migrate", "--config", "keyward.toml"], &[]);
    assert!(refused.code == Some(1) && indented(&refused.err).len() == 2, "{refused:?}");
}

#[test]
fn empty_environment_variables_count_as_absent() {
    let home = TestHome::new();
    let page = run(&home, &["config", "reference"], &[]).out;
    let word =
        |text: &str| text.chars().take_while(|c| c.is_ascii_uppercase() || *c == '_').collect::<String>();
    let named = page.match_indices("KEYWARD_").map(|(at, _)| word(&page[at..]));
    let mut names: Vec<_> = named.filter(|name| name != "KEYWARD_").collect();
    names.extend(
        ["OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_SERVICE_NAME", "KEYWARD_SERVER", "KEYWARD_TOKEN_FILE"]
            .map(str::to_owned),
    );
    assert!(names.len() > 20, "{names:?}");
    let empty: Vec<_> = names.iter().map(|name| (name.as_str(), "")).collect();
    let without = run(&home, &["config", "show"], &[("KEYWARD_SHUTDOWN_DELAY", "")]);
    let with = run(&home, &["config", "show"], &empty);
    assert_eq!((with.code, with.out), (Some(0), without.out));
    let whoami = run(&home, &["whoami"], &empty);
    assert!(whoami.err.contains("no token to call with"), "{whoami:?}");
}

#[test]
fn a_truth_value_in_the_environment_is_said_in_eight_ways() {
    let home = TestHome::new();
    for (value, is_true) in [
        ("1", true),
        ("true", true),
        ("YES", true),
        ("on", true),
        ("0", false),
        ("false", false),
        ("No", false),
        ("off", false),
    ] {
        let environment = [("KEYWARD_INSECURE", value), ("KEYWARD_NO_MIGRATE", value)];
        let shown = run(&home, &["config", "show"], &environment);
        assert_eq!(shown.code, Some(0), "{value}: {shown:?}");
        for line in [format!("insecure = {is_true} "), format!("migrate = {} ", !is_true)] {
            assert!(shown.out.contains(&line), "{value}: {line}: {}", shown.out);
        }
        let exposed = run(&home, &["config", "show", "--listen", "0.0.0.0:1"], &environment);
        assert_eq!(exposed.code, Some(if is_true { 0 } else { 1 }), "{value}: {exposed:?}");
    }
}

#[test]
fn a_server_tells_every_problem_of_its_file_and_does_not_start() {
    let (home, file) = write_settings("token_prefix = 'K'\nretention_days = 1\nlease = '0s'\n");
    let mut serve = home.serve_command();
    serve.arg("--config").arg(&file);
    let said = home.run_expecting_failure(serve);
    assert!(
        said.contains("line 1, column 1: token_prefix") && said.contains("line 3, column 1: lease"),
        "{said}"
    );
    std::fs::write(&file, "reteintion_days = 1\n").unwrap();
    let mut serve = home.serve_command();
    serve.arg("--config").arg(&file);
    let said = home.run_expecting_failure(serve);
    assert!(said.contains("unknown key `reteintion_days`: did you mean `retention_days`?"), "{said}");
}

#[test]
fn the_databases_password_can_have_a_file_of_its_own() {
    let mut cluster = PostgresServer::start(&[]);
    cluster.sql("postgres", "ALTER ROLE keyward PASSWORD 'open & ses@me'");
    cluster.sql("postgres", "CREATE DATABASE keys OWNER keyward TEMPLATE template0");
    // The superuser keeps his way in.
    cluster.restart(|data| {
        std::fs::write(data.join("pg_hba.conf"), "local all postgres trust\nlocal all all scram-sha-256\n")
            .unwrap();
    });
    let home = TestHome::with_database_url(crate::postgres::url(cluster.socket(), 5432, "keys"));
    let password = home.path("password");
    std::fs::write(&password, "wrong\n").unwrap();
    std::fs::set_permissions(&password, std::fs::Permissions::from_mode(0o600)).unwrap();
    let serve = || {
        let mut serve = home.serve_command();
        serve.arg("--database-password-file").arg(&password);
        serve
    };
    let said = home.run_expecting_failure(serve());
    assert!(said.contains("password authentication failed"), "{said}");
    std::fs::write(&password, "open & ses@me\n").unwrap();
    home.start_with(serve()).unwrap().stop();
    assert!(
        !home
            .files()
            .iter()
            .any(|(path, text)| { *path != password && text.windows(6).any(|part| part == b"ses@me") })
    );
}

#[test]
fn a_password_file_that_is_of_no_use_is_refused() {
    let (home, _) = write_settings("");
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
    let home = TestHome::new();
    let page = run(&home, &["config", "reference"], &[]);
    assert!(page.code == Some(0) && page.out.starts_with("# Configuration\n"), "{page:?}");
    let schema = run(&home, &["config", "schema"], &[]);
    let schema: Value = serde_json::from_str(&schema.out).unwrap();
    assert_eq!(schema["properties"]["retention_days"]["default"], 90);
}
