//! What is kept, and for how long: the table in `docs/operations.md`.

use keyward::pb;
use sha2::{Digest as _, Sha256};

use crate::{
    postgres::PostgresDatabase,
    process::{KeywardProcess, TestHome, plain_key_request},
};

/// A server that tells a revoked key from an unknown one for no time at all.
fn forgetful(home: &TestHome) -> KeywardProcess {
    std::fs::write(home.path("keyward.toml"), "retention_days = 0").unwrap();
    let mut command = home.serve_command();
    command.args(["--config", "keyward.toml"]);
    home.start_with(command).unwrap_or_else(|ended| panic!("{ended:?}"))
}

/// A key that ended before the server was started again: revoked, and rotated before that.
async fn stays_on_record(home: TestHome) {
    let before = forgetful(&home);
    let mut root = before.root_caller();
    root.create_account("acme").await;
    let (id, first) = root.create_key(plain_key_request()).await.unwrap();
    let second = root.rotate_key(&id).await.unwrap();
    root.revoke_key(&id).await.unwrap();
    before.stop();

    let after = forgetful(&home);
    let mut root = after.root_caller();
    for token in [&first, &second] {
        assert_eq!(root.check_token(token).await.unwrap(), pb::Reason::Unknown);
    }
    assert_eq!(root.get_key(&id).await.unwrap().state(), pb::KeyState::Revoked);
    let rows = [&first, &second].map(|token| pb::ImportKey {
        account: "acme".to_owned(),
        environment: "production".to_owned(),
        scopes: vec!["monitors:read".to_owned()],
        sha256: Sha256::digest(token).to_vec(),
        hint: "kw_live".to_owned(),
        ..Default::default()
    });
    let keys = pb::ImportKeysRequest { keys: rows.to_vec() };
    let results = root.keys.import(keys).await.unwrap().into_inner().results;
    let errors: Vec<_> = results.iter().map(|result| result.error.as_str()).collect();
    assert_eq!(errors, ["DIGEST_TAKEN"; 2], "no token comes back to life");
    let found = root.audit.verify(pb::VerifyAuditLogRequest::default()).await.unwrap().into_inner();
    assert!(found.valid, "{found:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_revoked_key_past_its_retention_is_unknown_to_checks_and_stays_on_record_in_sqlite() {
    stays_on_record(TestHome::new()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_revoked_key_past_its_retention_is_unknown_to_checks_and_stays_on_record_in_postgresql() {
    let database = PostgresDatabase::new();
    stays_on_record(TestHome::with_database_url(database.url())).await;
}
