//! The root key: where a first start puts it, and what a reset does about the keys that descend from it. With the real
//! binary, on both stores.

use std::os::unix::fs::{PermissionsExt as _, symlink};

use keyward::pb::{self, KeyState, Reason};
use sha2::{Digest as _, Sha256};

use crate::{
    postgres::PostgresDatabase,
    process::{
        AuthorizedClients, FinishedProcess, KeywardProcess, TestHome, plain_key_request, read_text, wait_for,
    },
};

// The first start. ---------------------------------------------------------------------------------------------------

/// The token in the file, which is its owner's alone and holds nothing else.
#[track_caller]
fn read_root_key_file(server: &KeywardProcess, file: &std::path::Path) -> String {
    assert_eq!(file.metadata().unwrap().permissions().mode() & 0o777, 0o600);
    let (out, err) = (server.process.stdout(), server.process.stderr());
    assert!(err.contains(&*file.canonicalize().unwrap().to_string_lossy()), "the log names it: {err}");
    let token = read_text(file);
    assert!(token.starts_with("kw_live_") && token.len() == 57, "it holds the token alone: {token:?}");
    assert!(!out.contains(&token) && !err.contains(&token), "the token is in one place");
    token
}

#[tokio::test(flavor = "multi_thread")]
async fn a_first_start_without_a_terminal_writes_the_root_key_beside_the_database_and_serves() {
    let home = TestHome::new();
    std::fs::create_dir(home.path("data")).unwrap();
    symlink(home.path("data/keys.db"), home.path("link.db")).unwrap();
    let home = home.with_url(&format!("sqlite:{}", home.path("link.db").display()));
    let server = home.start_with(home.serve_command_without_root_key_file()).unwrap();
    let token = read_root_key_file(&server, &home.path("data/keyward-root.key"));
    server.caller(&token).create_account("acme").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_first_start_on_postgresql_without_a_terminal_writes_the_root_key_into_its_working_directory() {
    let database = PostgresDatabase::new();
    let home = TestHome::with_database_url(database.url());
    let server = home.start_with(home.serve_command_without_root_key_file()).unwrap();
    let token = read_root_key_file(&server, &home.path("keyward-root.key"));
    server.caller(&token).create_account("acme").await;
    server.stop();
    let other = TestHome::with_database_url(database.url());
    other.start_with(other.serve_command_without_root_key_file()).unwrap();
    assert!(!other.path("keyward-root.key").exists(), "it is not the first start");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_root_key_file_of_the_usual_name_is_not_overwritten_and_no_key_is_created() {
    let home = TestHome::new();
    let file = home.path("keyward-root.key");
    std::fs::write(&file, "mine").unwrap();
    let said = home.run_expecting_failure(home.serve_command_without_root_key_file());
    for part in
        ["keyward-root.key exists already", "no root key was created", "move it away", "--root-key-file"]
    {
        assert!(said.contains(part), "{part}: {said}");
    }
    assert_eq!(read_text(&file), "mine");
    std::fs::rename(&file, home.path("moved")).unwrap();
    let server = home.start_with(home.serve_command_without_root_key_file()).unwrap();
    read_root_key_file(&server, &file);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_first_start_on_a_terminal_shows_the_root_key_once_and_writes_no_file() {
    let home = TestHome::new();
    let server = home.start_with(home.with_terminal(&home.serve_command_without_root_key_file())).unwrap();
    let out = server.process.stdout();
    let (_, token) = out.split_once("ROOT_KEY='").unwrap();
    let (token, _) = token.split_once('\'').unwrap();
    server.caller(token).create_account("acme").await;
    assert_eq!(out.matches(token).count(), 1, "{out}");
    assert!(!home.path("keyward-root.key").exists());
}

// A reset and the descendants. ---------------------------------------------------------------------------------------

fn scopes(scopes: &[&str]) -> Vec<String> {
    scopes.iter().map(|scope| (*scope).to_owned()).collect()
}

fn key_of(account: &str, granted: &[&str]) -> pb::CreateKeyRequest {
    pb::CreateKeyRequest { account: account.to_owned(), scopes: scopes(granted), ..plain_key_request() }
}

/// A key: its id and its token.
type KeyAndToken = (String, String);

/// The id of the caller's key.
async fn id_of(caller: &mut AuthorizedClients) -> String {
    caller.keys.who_am_i(pb::WhoAmIRequest {}).await.unwrap().into_inner().key.unwrap().id
}

fn reset(home: &TestHome, more: &[&str]) -> FinishedProcess {
    let mut command = home.command(["root-key", "reset"]);
    command.args(["--yes", "--database", &home.url()]).args(more);
    home.run_to_end(command)
}

#[track_caller]
fn assert_success(ended: FinishedProcess) -> String {
    assert_eq!(ended.code, Some(0), "{ended:?}");
    ended.out
}

const MANAGER: [&str; 3] = ["monitors:read", "keyward:keys:write", "keyward:keys:read"];

/// What two root keys have made. The second one descends from nothing, and the first has been replaced by it.
struct RootKeyFamily {
    first_root: String,
    second_root: String,
    /// A manager that the first root key has made, and a key of that manager.
    strangers: [KeyAndToken; 2],
    /// An operator's key of the second root key; a manager of the operator's; the manager's key; a user key of the
    /// operator's; and a key of the stranger's that the second root key has rotated.
    descendants: [KeyAndToken; 5],
}

impl RootKeyFamily {
    /// Makes them; the newest root key is in the file `second.key`.
    async fn on(home: &TestHome) -> RootKeyFamily {
        let server = home.start();
        let mut root = server.root_caller();
        let first_root = id_of(&mut root).await;
        root.create_account("acme").await;
        let manager = root.create_key(key_of("acme", &MANAGER)).await.unwrap();
        let mut stranger = server.caller(&manager.1);
        let strangers = [manager, stranger.create_key(plain_key_request()).await.unwrap()];
        let (rotated, _) = stranger.create_key(plain_key_request()).await.unwrap();
        server.stop();
        assert_success(reset(home, &["--root-key-file", "second.key"]));

        let server = home.start_with(home.serve_command()).unwrap();
        let mut root = server.caller(&read_text(&home.path("second.key")));
        let second_root = id_of(&mut root).await;
        root.create_account("globex").await;
        let operator = root.create_key(key_of("keyward", &["keyward:*"])).await.unwrap();
        let mut operators = server.caller(&operator.1);
        let role = pb::PutRoleRequest {
            account: "acme".into(),
            name: "reader".into(),
            scopes: scopes(&["monitors:read"]),
        };
        operators.accounts.put_role(role).await.unwrap();
        let member =
            pb::PutMemberRequest { account: "acme".into(), user: "ann".into(), role: "reader".into() };
        operators.accounts.put_member(member).await.unwrap();
        let manager = operators.create_key(key_of("globex", &MANAGER)).await.unwrap();
        let leaf = server.caller(&manager.1).create_key(key_of("globex", &["monitors:read"])).await.unwrap();
        let of_user = pb::CreateKeyRequest { user: "ann".to_owned(), ..key_of("", &["all"]) };
        let of_user = operators.create_key(of_user).await.unwrap();
        let rotated = (rotated.clone(), root.rotate_key(&rotated).await.unwrap());
        server.stop();
        RootKeyFamily {
            first_root,
            second_root,
            strangers,
            descendants: [operator, manager, leaf, of_user, rotated],
        }
    }

    /// Sees that the strangers' keys work, and of the descendants those from `revoked` on.
    async fn assert_living(&self, home: &TestHome, root_key: &str, revoked: bool) {
        let server = home.start_with(home.serve_command()).unwrap();
        let mut root = server.caller(&read_text(&home.path(root_key)));
        let expected = if revoked { KeyState::Revoked } else { KeyState::Active };
        for (id, _) in &self.descendants {
            assert_eq!(root.get_key(id).await.unwrap().state(), expected, "{id}");
        }
        let leaf = pb::CheckRequest {
            account: Some("globex".into()),
            ..crate::process::check_request(&self.descendants[2].1)
        };
        let leaf = root.authz.check(leaf).await.unwrap().into_inner().reason();
        assert_eq!(leaf, if revoked { Reason::Revoked } else { Reason::Ok });
        for (id, token) in &self.strangers {
            assert_eq!(
                root.check_token(token).await.unwrap(),
                Reason::Ok,
                "{id} descends from another root key"
            );
        }
        let found = root.audit.verify(pb::VerifyAuditLogRequest::default()).await.unwrap().into_inner();
        assert!(found.valid, "{found:?}");
        server.stop();
    }

    #[track_caller]
    fn assert_listed(&self, out: &str) {
        for (id, _) in &self.descendants {
            assert!(out.lines().any(|line| line.starts_with(id)), "{id}: {out}");
        }
        for (id, _) in &self.strangers {
            assert!(!out.contains(id), "{id}: {out}");
        }
        for part in
            ["user ann", "account globex", "which rotated it", "role.put", "role reader", "account.created"]
        {
            assert!(out.contains(part), "{part}: {out}");
        }
    }
}

async fn lists_and_then_revokes(home: TestHome) {
    let family = RootKeyFamily::on(&home).await;
    let out = assert_success(reset(&home, &["--root-key-file", "third.key"]));
    family.assert_listed(&out);
    let next = format!(
        "keyward root-key reset --revoke-descendants --lost {} --database '{}'\n",
        family.second_root,
        home.url()
    );
    assert!(out.contains("Not revoked: 5 keys") && out.contains(&next), "{out}");
    family.assert_living(&home, "third.key", false).await;

    // What the key after it has made stays, although that key is replaced too.
    let server = home.start_with(home.serve_command()).unwrap();
    let (id, token) =
        server.caller(&read_text(&home.path("third.key"))).create_key(plain_key_request()).await.unwrap();
    server.stop();
    let again = ["--revoke-descendants", "--lost", &family.second_root, "--root-key-file", "fourth.key"];
    let out = assert_success(reset(&home, &again));
    family.assert_listed(&out);
    assert!(out.contains("Revoked: 5 keys") && !out.contains(&id), "{out}");
    family.assert_living(&home, "fourth.key", true).await;
    let server = home.start_with(home.serve_command()).unwrap();
    assert_eq!(
        server.caller(&read_text(&home.path("fourth.key"))).check_token(&token).await.unwrap(),
        Reason::Ok
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reset_lists_what_the_lost_root_key_has_made_and_a_later_one_revokes_it_in_sqlite() {
    lists_and_then_revokes(TestHome::new()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reset_lists_what_the_lost_root_key_has_made_and_a_later_one_revokes_it_in_postgresql() {
    let database = PostgresDatabase::new();
    lists_and_then_revokes(TestHome::with_database_url(database.url())).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reset_that_revokes_descendants_leaves_none_of_any_generation_and_says_so_in_the_log() {
    let home = TestHome::new();
    let family = RootKeyFamily::on(&home).await;
    let out = assert_success(reset(&home, &["--revoke-descendants", "--root-key-file", "third.key"]));
    family.assert_listed(&out);
    family.assert_living(&home, "third.key", true).await;
    let server = home.start_with(home.serve_command()).unwrap();
    let mut root = server.caller(&read_text(&home.path("third.key")));
    for (id, _) in &family.descendants {
        let about = pb::ListAuditEntriesRequest { key_id: id.clone(), ..Default::default() };
        let newest = root.audit.list(about).await.unwrap().into_inner().entries.remove(0);
        assert_eq!(
            (&*newest.action, &*newest.actor, &*newest.method),
            ("key.revoked", "system", "keyward root-key reset")
        );
        let key = root.get_key(id).await.unwrap();
        assert_eq!(key.revoke_reason(), pb::RevokeReason::Compromised);
    }
    server.stop();
    // Nothing is left, and what was lost long ago can still be named.
    let out = assert_success(reset(&home, &["--root-key-file", "fourth.key"]));
    assert!(out.contains("No active key descends") && out.contains(&family.first_root), "{out}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reset_of_what_is_no_root_key_or_into_a_file_that_exists_changes_nothing() {
    let home = TestHome::new();
    let family = RootKeyFamily::on(&home).await;
    let no_root = &family.descendants[0].0;
    let head = || {
        let file = rusqlite::Connection::open(home.database()).unwrap();
        file.query_row("SELECT head FROM meta", [], |row| row.get::<_, i64>(0)).unwrap()
    };
    let before = head();
    for (arguments, said) in [
        (
            &["--lost", no_root, "--root-key-file", "-"][..],
            &*format!("{no_root} is no root key of this database"),
        ),
        (&["--lost", "root"], "must be a UUID"),
        (&["--root-key-file", "second.key"], "exists already"),
        (&["--root-key-file", "nowhere/root.key"], "cannot be created"),
        (&[], "standard output is not a terminal"),
    ] {
        let ended = reset(&home, &[&["--revoke-descendants"][..], arguments].concat());
        assert!(ended.code.is_some_and(|code| code > 0) && ended.err.contains(said), "{said}: {ended:?}");
        assert!(!ended.out.contains("ROOT_KEY"), "{ended:?}");
    }
    assert_eq!(before, head(), "nothing was revoked");
    let ended = reset(&home, &["--lost", no_root, "--root-key-file", "third.key"]);
    assert!(ended.err.contains(&family.first_root) && ended.err.contains(&family.second_root), "{ended:?}");
}

/// Runs SQL on the database of a server that has stopped.
type RunSql<'a> = &'a dyn Fn(&str);

/// Ends a reset in the middle: the database refuses to revoke one of many descendants.
async fn is_finished_by_the_same_command(home: TestHome, sql: RunSql<'_>, stop: &str, go_on: &str) {
    const KEYS: usize = 1100;
    let server = home.start();
    let mut root = server.root_caller();
    root.create_account("acme").await;
    let row = |number: usize| pb::ImportKey {
        account: "acme".to_owned(),
        environment: "production".to_owned(),
        scopes: scopes(&["monitors:read"]),
        name: Some(format!("key {number}")),
        sha256: Sha256::digest(format!("elsewhere_{number}")).to_vec(),
        hint: "kw_live".to_owned(),
        ..Default::default()
    };
    for part in (0..KEYS).collect::<Vec<_>>().chunks(550) {
        let keys = part.iter().copied().map(row).collect();
        root.keys.import(pb::ImportKeysRequest { keys }).await.unwrap();
    }
    server.stop();
    sql(stop);
    let command = ["--revoke-descendants", "--root-key-file", "new.key"];
    let ended = reset(&home, &command);
    assert!(ended.code == Some(1) && !home.path("new.key").exists(), "{ended:?}");
    sql(go_on);
    let out = assert_success(reset(&home, &command));
    let left = out.lines().filter(|line| line.contains("key ")).count();
    assert!((1..KEYS).contains(&left), "some were revoked by the first run, and some by the second: {left}");

    let server = home.start_with(home.serve_command()).unwrap();
    let mut root = server.caller(&read_text(&home.path("new.key")));
    let living = pb::ListKeysRequest {
        account: "acme".to_owned(),
        states: vec![KeyState::Active.into()],
        ..Default::default()
    };
    assert_eq!(root.keys.list(living).await.unwrap().into_inner().keys.len(), 0);
    for number in [0, KEYS - 1] {
        assert_eq!(root.check_token(&format!("elsewhere_{number}")).await.unwrap(), Reason::Revoked);
    }
    let found = root.audit.verify(pb::VerifyAuditLogRequest::default()).await.unwrap().into_inner();
    assert!(found.valid && found.entries == found.head, "{found:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reset_that_is_broken_off_is_finished_by_the_same_command_in_sqlite() {
    let home = TestHome::new();
    let file = home.database();
    let sql = |sql: &str| rusqlite::Connection::open(&file).unwrap().execute_batch(sql).unwrap();
    let stop = "CREATE TRIGGER stop BEFORE UPDATE ON keys \
                WHEN NEW.revoked_at IS NOT NULL AND NEW.id = (SELECT max(id) FROM keys) \
                BEGIN SELECT RAISE(ABORT, 'the disk is on fire'); END";
    is_finished_by_the_same_command(home.clone(), &sql, stop, "DROP TRIGGER stop").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reset_that_is_broken_off_is_finished_by_the_same_command_in_postgresql() {
    let database = PostgresDatabase::new();
    let stop = "CREATE FUNCTION keyward.stop() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN \
                IF NEW.id = (SELECT id FROM keyward.keys ORDER BY id DESC LIMIT 1) THEN \
                RAISE EXCEPTION 'the disk is on fire'; END IF; RETURN NEW; END$$; \
                CREATE TRIGGER stop BEFORE UPDATE ON keyward.keys FOR EACH ROW \
                WHEN (NEW.revoked_at IS NOT NULL) EXECUTE FUNCTION keyward.stop()";
    let sql = |sql: &str| drop(database.sql(sql));
    let home = TestHome::with_database_url(database.url());
    is_finished_by_the_same_command(home, &sql, stop, "DROP TRIGGER stop ON keyward.keys").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn when_a_reset_ends_no_replica_that_runs_allows_a_descendant() {
    let database = PostgresDatabase::new();
    let home = TestHome::with_database_url(database.url());
    let server = home.start();
    let other = TestHome::with_database_url(database.url());
    let other = other.start_with(other.serve_command()).unwrap();
    let mut root = server.root_caller();
    root.create_account("acme").await;
    let known_to_both = |id: &str| {
        let sql = format!(
            "SELECT count(*) FROM keyward.replicas WHERE applied >= (SELECT revision FROM keyward.keys WHERE id = '\\x{}')",
            id.replace('-', "")
        );
        wait_for("both replicas to know the key", || (database.sql(&sql) == "2").then_some(()));
    };
    let (id, manager) = root.create_key(key_of("acme", &MANAGER)).await.unwrap();
    known_to_both(&id);
    let (_, leaf) = other.caller(&manager).create_key(plain_key_request()).await.unwrap();
    let (checks_id, checker) = root.create_key(key_of("keyward", &["keyward:check"])).await.unwrap();
    known_to_both(&checks_id);
    let file = home.path("new.key");
    assert_success(reset(&home, &["--revoke-descendants", "--root-key-file", file.to_str().unwrap()]));
    for server in [&server, &other] {
        let mut root = server.caller(&read_text(&file));
        for token in [&manager, &leaf, &checker] {
            assert_eq!(root.check_token(token).await.unwrap(), Reason::Revoked);
        }
        let refused = server.caller(&manager).get_key(&id).await.unwrap_err();
        assert_eq!(refused.code(), tonic::Code::Unauthenticated);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_that_took_the_root_keys_name_does_not_keep_a_reset_from_ending() {
    let server = KeywardProcess::start();
    let mut root = server.root_caller();
    let id = id_of(&mut root).await;
    let key = pb::Key { id, name: "another".to_owned(), ..Default::default() };
    let update_mask = Some(prost_types::FieldMask { paths: vec!["name".to_owned()] });
    root.keys.update(pb::UpdateKeyRequest { key: Some(key), update_mask }).await.unwrap();
    root.create_key(pb::CreateKeyRequest {
        name: Some("root".to_owned()),
        ..key_of("keyward", &["keyward:check"])
    })
    .await
    .unwrap();
    let home = server.stop();
    assert_success(reset(&home, &["--root-key-file", "new.key"]));
    let server = home.start_with(home.serve_command()).unwrap();
    server.caller(&read_text(&home.path("new.key"))).create_account("acme").await;
}
