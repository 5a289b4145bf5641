//! What the source promises about itself, read from the source: who uses whom, which effect lives in which one
//! place, that every module says what it is. The map is in `src/lib.rs`.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
};

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn files_under(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files_under(&path, found);
        } else {
            found.push(path);
        }
    }
}

/// Every file with this ending under a folder of the repository: its path from the root, and its text.
fn files(folder: &str, ending: &str) -> BTreeMap<String, String> {
    let mut found = Vec::new();
    files_under(&root().join(folder), &mut found);
    let texts: BTreeMap<_, _> = found
        .into_iter()
        .filter(|path| path.extension().is_some_and(|end| end == ending))
        .map(|path| {
            let name = path.strip_prefix(root()).unwrap().to_str().unwrap().to_owned();
            (name, std::fs::read_to_string(&path).unwrap())
        })
        .collect();
    assert!(!texts.is_empty(), "{folder} holds no .{ending}");
    texts
}

/// The code of a file: no comments, no unit tests.
fn code(text: &str) -> String {
    let end = text.find("#[cfg(test)]\n").unwrap_or(text.len());
    let lines = text[..end].lines().map(|line| line.split("//").next().unwrap());
    lines.collect::<Vec<_>>().join("\n")
}

pub(super) fn source() -> BTreeMap<String, String> {
    files("src", "rs").into_iter().map(|(path, text)| (path, code(&text))).collect()
}

fn is_word(byte: Option<u8>) -> bool {
    byte.is_some_and(|byte| byte.is_ascii_alphanumeric() || byte == b'_')
}

/// Whether `text` has `word` with nothing of a name around it.
fn has_word(text: &str, word: &str) -> bool {
    text.match_indices(word).any(|(at, _)| {
        let (before, after) = (text[..at].bytes().last(), text[at + word.len()..].bytes().next());
        !(is_word(before) || is_word(word.bytes().last()) && is_word(after))
    })
}

/// The modules of this crate that some code names: after `crate::`, and at the top of `crate::{…}`.
fn modules_used(code: &str) -> BTreeSet<String> {
    let name = |text: &str| {
        let end = text.find(|letter: char| !letter.is_ascii_alphanumeric() && letter != '_');
        text[..end.unwrap_or(text.len())].to_owned()
    };
    let mut used = BTreeSet::new();
    for (at, start) in code.match_indices("crate::") {
        let rest = &code[at + start.len()..];
        let Some(group) = rest.strip_prefix('{') else {
            used.insert(name(rest));
            continue;
        };
        let (mut depth, mut expecting) = (0, true);
        for (at, letter) in group.char_indices() {
            match letter {
                '{' => depth += 1,
                '}' if depth == 0 => break,
                '}' => depth -= 1,
                ',' if depth == 0 => expecting = true,
                letter if expecting && letter.is_ascii_alphabetic() => {
                    used.insert(name(&group[at..]));
                    expecting = false;
                }
                _ => {}
            }
        }
    }
    used
}

/// Which module may use which others. `pb` is generated.
const MAY_USE: &[(&str, &[&str])] = &[
    ("domain", &[]),
    ("clock", &["domain"]),
    ("metrics_core", &[]),
    ("log_throttle", &["domain"]),
    ("private_file", &[]),
    ("trace", &["domain"]),
    ("store", &["domain", "metrics_core", "private_file", "trace"]),
    ("decision_log", &["clock", "domain", "engine", "private_file", "log_throttle", "store", "trace"]),
    ("engine", &["clock", "domain", "metrics_core", "store"]),
    ("replication", &["clock", "domain", "engine", "metrics_core", "log_throttle", "store", "trace"]),
    ("gateway", &["decision_log", "domain", "engine", "metrics_core", "log_throttle", "trace"]),
    ("caller", &["domain", "engine", "service_error", "store"]),
    ("audit", &["clock", "domain", "private_file", "service_error", "store"]),
    ("service_error", &["clock", "domain", "engine", "replication", "store"]),
    ("keys", &["caller", "clock", "domain", "engine", "service_error", "replication", "store"]),
    ("accounts", &["caller", "clock", "domain", "engine", "service_error", "store"]),
    ("pb", &[]),
    ("membership", &["caller", "clock", "domain", "engine", "keys", "service_error", "replication", "store"]),
    (
        "grpc",
        &[
            "caller",
            "accounts",
            "audit",
            "clock",
            "decision_log",
            "domain",
            "engine",
            "gateway",
            "metrics_core",
            "keys",
            "pb",
            "membership",
            "log_throttle",
            "service_error",
            "replication",
            "store",
            "trace",
            "transport",
        ],
    ),
    ("forward_auth", &["clock", "domain", "gateway", "http1", "trace", "transport"]),
    (
        "metrics",
        &[
            "clock",
            "decision_log",
            "domain",
            "engine",
            "gateway",
            "grpc",
            "metrics_core",
            "replication",
            "store",
            "trace",
            "transport",
        ],
    ),
    ("admin", &["http1", "metrics", "transport"]),
    ("http1", &["transport"]),
    ("file_watcher", &[]),
    ("transport", &["clock", "domain", "log_throttle"]),
    (
        "config",
        &[
            "decision_log",
            "domain",
            "engine",
            "gateway",
            "keys",
            "private_file",
            "store",
            "trace",
            "transport",
        ],
    ),
    ("telemetry", &["config", "domain", "trace"]),
    ("doctor", &["clock", "config", "domain", "pb", "store"]),
    (
        "server",
        &[
            "caller",
            "accounts",
            "admin",
            "audit",
            "clock",
            "config",
            "decision_log",
            "domain",
            "engine",
            "forward_auth",
            "gateway",
            "grpc",
            "keys",
            "metrics",
            "membership",
            "private_file",
            "service_error",
            "file_watcher",
            "replication",
            "store",
            "trace",
            "transport",
        ],
    ),
    ("cli", &["clock", "config", "doctor", "domain", "pb", "private_file", "server", "telemetry"]),
    ("main", &[]),
    ("lib", &[]),
];

/// The module that a file belongs to: `src/store/row_format.rs` to `store`, `src/keys.rs` to `keys`.
fn module(path: &str) -> &str {
    let path = path.strip_prefix("src/").unwrap();
    path.split(['/', '.']).next().unwrap()
}

#[test]
fn imports_run_one_way() {
    for (path, code) in source() {
        let module = module(&path);
        let allowed = MAY_USE.iter().find(|(name, _)| *name == module);
        let (_, allowed) = allowed.unwrap_or_else(|| panic!("{path}: say in MAY_USE what {module} may use"));
        for used in modules_used(&code) {
            assert!(used == module || allowed.contains(&&*used), "{path}: {module} may not use {used}");
        }
        assert!(!code.contains("super::super"), "{path}: name it from crate:: on");
    }
}

/// Back-doors around the rule: a use of the parent from a top-level file is a use of the crate.
#[test]
fn top_level_modules_name_others_by_crate() {
    for (path, code) in source().iter().filter(|(path, _)| path.matches('/').count() == 1) {
        assert!(!code.contains("super::"), "{path}: say crate::");
    }
}

/// What only some files may say. A path that ends in `/` is a folder.
const ONLY_IN: &[(&str, &[&str])] = &[
    ("sqlx", &["src/store/"]),
    ("\"SELECT ", &["src/store/"]),
    ("\"INSERT ", &["src/store/"]),
    ("\"UPDATE ", &["src/store/"]),
    ("\"DELETE ", &["src/store/"]),
    ("redis::", &["src/engine/limiter/"]),
    ("SystemTime", &["src/clock.rs"]),
    ("UNIX_EPOCH", &["src/clock.rs"]),
    ("SysRng", &["src/clock.rs"]),
    ("std::env", &["src/config/"]),
    ("env::var", &["src/config/"]),
    ("env = \"", &["src/config/"]),
    ("Response<Full", &["src/http1.rs"]),
    ("process::exit", &[]),
    ("OpenOptions", &["src/private_file.rs"]),
    ("File::create", &[]),
    ("fs::write", &[]),
    ("create_dir", &[]),
];

#[test]
fn each_effect_lives_in_its_place() {
    for (path, code) in source() {
        for (word, places) in ONLY_IN {
            let allowed =
                places.iter().any(|place| path == *place || place.ends_with('/') && path.starts_with(place));
            assert!(allowed || !has_word(&code, word), "{path}: {word} belongs in {places:?}");
        }
    }
}

#[test]
fn only_one_file_builds_a_status() {
    const MADE_BY: [&str; 24] = [
        "new",
        "with_details",
        "with_metadata",
        "with_details_and_metadata",
        "from_error",
        "try_from_error",
        "ok",
        "cancelled",
        "unknown",
        "invalid_argument",
        "deadline_exceeded",
        "not_found",
        "already_exists",
        "permission_denied",
        "resource_exhausted",
        "failed_precondition",
        "aborted",
        "out_of_range",
        "unimplemented",
        "internal",
        "unavailable",
        "data_loss",
        "unauthenticated",
        "with_error_details",
    ];
    let builds = |code: &str| MADE_BY.iter().any(|made| has_word(code, &format!("Status::{made}")));
    let makers: Vec<_> =
        source().into_iter().filter(|(_, code)| builds(code)).map(|(path, _)| path).collect();
    assert_eq!(makers, ["src/grpc/status.rs"]);
}

#[test]
fn every_module_says_what_it_is() {
    for (path, text) in files("src", "rs").into_iter().chain(files("tests", "rs")) {
        let head = text.lines().next().unwrap_or_default();
        let said = head.strip_prefix("//! ").unwrap_or_default();
        assert!(said.len() > 10, "{path} begins with {head:?}");
    }
}

#[test]
fn nothing_is_left_for_later_in_the_source() {
    let all = [files("src", "rs"), files("tests", "rs"), files("proto", "proto"), files("src/store", "sql")];
    let later = [["TO", "DO"].concat(), ["FIX", "ME"].concat(), ["XX", "X"].concat()];
    let macros = [["todo", "!"].concat(), ["unimplemented", "!"].concat(), ["dbg", "!"].concat()];
    for (path, text) in all.into_iter().flatten() {
        for word in later.iter().chain(&macros) {
            assert!(!has_word(&text, word), "{path}: {word}");
        }
    }
}

#[test]
fn every_backend_has_the_same_migrations() {
    let mut by_backend = BTreeMap::<String, BTreeSet<String>>::new();
    for path in files("src/store/migrations", "sql").into_keys() {
        let mut parts = path.rsplit('/').map(str::to_owned);
        let (name, backend) = (parts.next().unwrap(), parts.next().unwrap());
        by_backend.entry(backend).or_default().insert(name);
    }
    let code: String =
        source().into_iter().filter(|(path, _)| module(path) == "store").map(|(_, code)| code).collect();
    let (first, names) = by_backend.first_key_value().unwrap();
    for (backend, others) in &by_backend {
        assert_eq!(others, names, "{backend} and {first}");
        for name in others {
            assert!(code.contains(&format!("migrations/{backend}/{name}")), "{backend}/{name} is never run");
        }
    }
    for (at, name) in names.iter().enumerate() {
        assert_eq!(name.split('_').next().unwrap(), format!("{:04}", at + 1), "numbered without gaps");
    }
}

#[test]
fn the_rules_find_what_breaks_them() {
    let used = modules_used(
        "use crate::{\n    engine::{Engine, index::Index},\n    store, pb,\n};\nlet x = crate::keys::y();",
    );
    assert_eq!(used.into_iter().collect::<Vec<_>>(), ["engine", "keys", "pb", "store"]);
    assert!(has_word("tonic::Status::internal(\"x\")", "Status::internal"));
    assert!(!has_word("ServingStatus::new()", "Status::new"));
    assert!(!has_word("Status::okay()", "Status::ok"));
    assert_eq!(code("a // b\n#[cfg(test)]\nc"), "a ");
}
