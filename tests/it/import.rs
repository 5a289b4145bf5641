//! `keyward keys import` of files as people have them: what spreadsheets, databases and APIs export is read, or refused
//! once with what is wrong.

use std::process::Command;

use keyward::pb::{self, Reason};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

use crate::process::{FinishedProcess, KeywardProcess, wait_for};

/// The token whose digest the samples hold under this number.
fn token(number: u32) -> String {
    format!("legacy_{number:04}_4f1c9a7be2d85306a1f47c0be96d3a52")
}

fn digest(number: u32) -> String {
    Sha256::digest(token(number)).iter().map(|byte| format!("{byte:02x}")).collect()
}

fn sample(name: &str) -> Vec<u8> {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/it/samples");
    std::fs::read(std::path::Path::new(folder).join(name)).unwrap()
}

async fn server() -> KeywardProcess {
    let server = KeywardProcess::start();
    server.root_caller().create_account("acme").await;
    server
}

fn import(server: &KeywardProcess, file: &str, flags: &[&str]) -> Command {
    let mut command = server.home.command(["keys", "import", file, "--environment", "production"]);
    command.args(["--server", &server.address.to_string(), "--token-file"]);
    command.arg(server.home.root_key_file()).args(["--output", "json"]).args(flags);
    command
}

/// Imports these bytes as a file of this name.
fn run(server: &KeywardProcess, name: &str, file: &[u8], flags: &[&str]) -> FinishedProcess {
    std::fs::write(server.home.path(name), file).unwrap();
    server.home.run_to_end(import(server, name, flags))
}

/// The summary of an import that came to the file's end.
#[track_caller]
fn summary(ended: &FinishedProcess) -> Value {
    assert!(ended.code.is_some_and(|code| code < 2), "{ended:?}");
    serde_json::from_str(&ended.out).unwrap_or_else(|error| panic!("{error}: {ended:?}"))
}

#[track_caller]
fn assert_counts(ended: &FinishedProcess, imported: u32, expired: u32, inactive: u32, rejected: u32) {
    let counts = summary(ended);
    let counts = ["imported", "expired", "inactive", "rejected"].map(|count| counts[count].clone());
    assert_eq!(counts, [imported, expired, inactive, rejected].map(Value::from), "{ended:?}");
    assert_eq!(ended.code, Some(i32::from(rejected > 0)), "{ended:?}");
}

async fn assert_live(server: &KeywardProcess, numbers: &[u32]) {
    for number in numbers {
        assert_eq!(server.root_caller().check_token(&token(*number)).await.unwrap(), Reason::Ok, "{number}");
    }
}

async fn assert_unknown(server: &KeywardProcess, numbers: &[u32]) {
    for number in numbers {
        assert_eq!(
            server.root_caller().check_token(&token(*number)).await.unwrap(),
            Reason::Unknown,
            "{number}"
        );
    }
}

/// The names of all keys of the account.
async fn names(server: &KeywardProcess) -> Vec<String> {
    let (mut names, mut page_token) = (Vec::new(), String::new());
    loop {
        let account = "acme".to_owned();
        let request =
            pb::ListKeysRequest { account, page_size: Some(1000), page_token, ..Default::default() };
        let page = server.root_caller().keys.list(request).await.unwrap().into_inner();
        names.extend(page.keys.into_iter().map(|key| key.name));
        page_token = page.next_page_token;
        if page_token.is_empty() {
            return names;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_export_of_excel_with_semicolons_is_imported_and_its_unclear_date_named_once() {
    let server = server().await;
    let ended = run(&server, "keys.csv", &sample("excel-semicolons.csv"), &[]);
    assert_counts(&ended, 2, 1, 1, 1);
    assert_live(&server, &[1, 2]).await;
    assert_unknown(&server, &[3, 4, 5]).await;
    let problems = summary(&ended)["problems"].clone();
    assert_eq!((&problems[0]["first_line"], &problems[0]["rows"]), (&json!(8), &json!(1)));
    let message = problems[0]["message"].as_str().unwrap();
    assert!(message.starts_with("Expires At: write never") && !message.contains("31.01."), "{message}");
    // The rejected row, put right, is imported by itself.
    let rejected = std::fs::read_to_string(server.home.path("keys.csv.rejected")).unwrap();
    let mended = rejected.replace("31.01.2099", "2099-01-31");
    assert_counts(&run(&server, "keys.csv.rejected", mended.as_bytes(), &[]), 1, 0, 0, 0);
    assert_live(&server, &[5]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_unicode_text_of_excel_is_imported() {
    let server = server().await;
    assert_counts(&run(&server, "keys.txt", &sample("excel-unicode-text.txt"), &[]), 2, 0, 0, 0);
    assert_live(&server, &[11, 12]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_in_an_old_encoding_is_refused_once_leaves_nothing_and_is_read_when_it_is_named() {
    let server = server().await;
    let file = sample("excel-windows-1252.csv");
    let refused = run(&server, "keys.csv", &file, &[]);
    assert_eq!(refused.code, Some(2), "{refused:?}");
    assert_eq!(refused.err.matches("is not UTF-8").count(), 1, "{refused:?}");
    assert!(refused.err.contains("line 3") && refused.err.contains("--encoding windows-1252"), "{refused:?}");
    for left in ["keys.csv.keyward-progress", "keys.csv.rejected"] {
        assert!(!server.home.path(left).exists(), "{left}");
    }
    assert_counts(&run(&server, "keys.csv", &file, &["--encoding", "windows-1252"]), 2, 0, 0, 0);
    assert_live(&server, &[21, 22]).await;
    let names = names(&server).await;
    assert!(names.contains(&"Caf\u{e9}".to_owned()), "{names:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tab_separated_download_of_google_sheets_is_imported() {
    let server = server().await;
    let file = sample("google-sheets.tsv");
    let refused = run(&server, "keys.tsv", &file, &[]);
    assert!(refused.code == Some(2) && refused.err.contains("unknown column \"Notes\""), "{refused:?}");
    assert_counts(&run(&server, "keys.tsv", &file, &["--ignore", "notes"]), 2, 0, 0, 0);
    assert_live(&server, &[31, 32]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_json_array_of_an_api_is_imported() {
    let server = server().await;
    let file = sample("api-keys.json");
    let refused = run(&server, "keys.json", &file, &[]);
    assert!(refused.err.contains("unknown columns \"id\", \"createdAt\", \"keyHash\""), "{refused:?}");
    let flags = ["--ignore", "id", "--ignore", "createdAt", "--rename", "keyHash=sha256"];
    assert_counts(&run(&server, "keys.json", &file, &flags), 2, 1, 1, 0);
    assert_live(&server, &[41, 42]).await;
    assert_unknown(&server, &[43, 44]).await;
    let broken = [&file[..file.len() - 4], b"\n"].concat();
    let refused = run(&server, "broken.json", &broken, &flags);
    assert!(refused.code == Some(2) && refused.err.matches("not valid JSON").count() == 1, "{refused:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_copy_of_a_table_of_postgresql_is_imported() {
    let server = server().await;
    let flags = ["--ignore", "id", "--rename", "key_digest=sha256"];
    assert_counts(&run(&server, "keys.csv", &sample("postgres-copy.csv"), &flags), 2, 1, 1, 0);
    assert_unknown(&server, &[53, 54]).await;
    // The first is bound to its networks, of which this test's address is none.
    assert_eq!(server.root_caller().check_token(&token(51)).await.unwrap(), Reason::AddressNotAllowed);
    assert_live(&server, &[52]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_strength_of_tokens_decides_whether_they_are_imported() {
    let server = server().await;
    let file = format!(
        "sha256,account,scopes,entropy_bits\n{},acme,monitors:read,64\n{},acme,monitors:read,112\n",
        digest(61),
        digest(62)
    );
    let ended = run(&server, "keys.csv", file.as_bytes(), &[]);
    assert_counts(&ended, 1, 0, 0, 1);
    let message = summary(&ended)["problems"][0]["message"].to_string();
    assert!(message.contains("entropy_bits") && message.contains("112"), "{message}");
    assert_unknown(&server, &[61]).await;
    assert_live(&server, &[62]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_import_of_one_json_array_that_was_killed_continues_where_it_was() {
    let server = server().await;
    let row = |number: u32| {
        let scopes = ["monitors:read"];
        json!({"account": "acme", "scopes": scopes, "sha256": digest(number), "name": format!("n{number}")})
    };
    let rows: Vec<Value> = (10_000..22_000).map(row).collect();
    std::fs::write(server.home.path("keys.json"), serde_json::to_vec(&rows).unwrap()).unwrap();
    let progress = server.home.path("keys.json.keyward-progress");
    let running = server.home.spawn(import(&server, "keys.json", &[]));
    wait_for("some rows to be imported", || {
        let text = std::fs::read_to_string(&progress).ok()?;
        let bytes = text.lines().find_map(|line| line.strip_prefix("bytes = "))?;
        (bytes != "0").then_some(())
    });
    running.kill();
    let ended = server.home.run_to_end(import(&server, "keys.json", &[]));
    let done = summary(&ended);
    let count = |name: &str| done[name].as_u64().unwrap();
    assert_eq!(count("imported") + count("there_already"), 12_000, "{done}");
    assert_eq!((count("rejected"), &done["complete"]), (0, &json!(true)), "{done}");
    assert!(count("rows_now") < 12_000, "it began anew: {done}");
    assert_live(&server, &[10_000, 15_000, 21_999]).await;
    assert_eq!(names(&server).await.len(), 12_000, "every key once");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mended_file_is_imported_once_the_files_of_its_first_import_are_removed() {
    let server = server().await;
    let row = |number: u32| format!("{},acme,monitors:read\n", digest(number));
    let file = |second: &str| format!("sha256,account,scopes\n{}{second}", row(81));
    assert_counts(&run(&server, "keys.csv", file("no digest,acme,x:y\n").as_bytes(), &[]), 1, 0, 0, 1);
    let mended = file(&row(82));
    let refused = run(&server, "keys.csv", mended.as_bytes(), &[]);
    assert!(refused.code == Some(2) && refused.err.contains("keys.csv has changed since"), "{refused:?}");
    // Without its progress alone, the rejected rows would be lost.
    std::fs::remove_file(server.home.path("keys.csv.keyward-progress")).unwrap();
    let rejected = server.home.path("keys.csv.rejected");
    let kept = std::fs::read(&rejected).unwrap();
    let refused = run(&server, "keys.csv", mended.as_bytes(), &[]);
    assert!(refused.code == Some(2) && refused.err.contains("it is not overwritten"), "{refused:?}");
    assert_eq!(std::fs::read(&rejected).unwrap(), kept);
    std::fs::remove_file(&rejected).unwrap();
    let ended = run(&server, "keys.csv", mended.as_bytes(), &[]);
    assert_counts(&ended, 1, 0, 0, 0);
    assert_eq!(summary(&ended)["there_already"], 1, "{ended:?}");
    assert_live(&server, &[81, 82]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unknown_field_of_any_object_is_refused_before_anything_is_sent() {
    let server = server().await;
    let row = |number: u32| json!({"sha256": digest(number), "account": "acme", "scopes": ["monitors:read"]});
    let mut last = row(93);
    last["foo"] = json!("x");
    let file = serde_json::to_vec(&[row(91), row(92), last]).unwrap();
    let refused = run(&server, "keys.json", &file, &[]);
    assert!(refused.code == Some(2) && refused.err.contains("unknown column \"foo\""), "{refused:?}");
    assert_unknown(&server, &[91]).await;
    let ended = run(&server, "keys.json", &file, &["--ignore", "foo", "--ignore", "nosuch"]);
    assert_counts(&ended, 3, 0, 0, 0);
    assert!(ended.err.contains("--ignore nosuch") && !ended.err.contains("--ignore foo"), "{ended:?}");
    assert_eq!(summary(&ended)["rows"], 3);
    let table = format!("sha256\n{}\n", digest(94));
    let refused = run(&server, "keys.csv", table.as_bytes(), &["--rename", "nosuch=hint"]);
    assert!(refused.code == Some(2) && refused.err.contains("no column for --rename nosuch"), "{refused:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_of_another_kind_is_refused_by_what_it_is_and_nothing_of_it_is_shown() {
    let server = server().await;
    let wrapped = json!({"data": [{"sha256": digest(71)}]}).to_string();
    let headerless = "acme,sk_live_secret,monitors:read\n";
    for (name, file, said) in [
        ("keys.xlsx", &b"PK\x03\x04rest"[..], "Excel workbook"),
        ("keys.csv", b"caf\xe9,sha256\n", "line 1 is not UTF-8"),
        ("damaged.csv", b"sha256\n\0\0\0", "line 2 has a zero byte"),
        ("wrapped.json", wrapped.as_bytes(), "an object that contains the array"),
        ("headerless.csv", headerless.as_bytes(), "the first row names no columns"),
        ("empty.csv", b"", "the file is empty"),
    ] {
        let refused = run(&server, name, file, &[]);
        assert_eq!((refused.code, refused.err.matches(said).count()), (Some(2), 1), "{refused:?}");
        assert!(!refused.err.contains("sk_live"), "{refused:?}");
        assert!(!server.home.path(&format!("{name}.keyward-progress")).exists(), "{name}");
    }
}
