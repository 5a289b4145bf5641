//! Random managers, roles by place and concurrent calls: nothing is committed that goes beyond the caller that the log
//! names. The calls are in `calls.rs`; what a caller may do is said by `model.rs`, which replays the log.

mod authorization_model;
mod calls;

use std::collections::BTreeMap;

use futures_util::future::join_all;
use keyward::{
    clock::{SystemEntropy, random_bytes},
    config::server::ServerSettings,
    domain::account::AccountLimits,
    pb,
};
use rand::{SeedableRng as _, rngs::ChaCha8Rng};
use tonic::Code;

use self::{
    authorization_model::{AuthorizationModel, LoggedChange},
    calls::{RandomChooser, RandomManager, RoundSetup},
};
use crate::{
    postgres::PostgresDatabase,
    support::{Client, SqliteFile, TestServer, TestStorage, service_key_request},
};

/// How many calls a suite makes in every test run. A commit on PostgreSQL takes longer, and before authorizations were
/// compared in the transaction, one call in 14 went beyond its caller.
const CALLS_ON_SQLITE: u64 = 5_000;
const CALLS_ON_POSTGRES: u64 = 1_500;
/// How many calls of a round are under way at once.
const AT_ONCE: usize = 10;
/// How many managers of an account wait for their round.
const MANAGERS: usize = 6;

/// A number that the environment gives.
fn number(variable: &str) -> Option<u64> {
    std::env::var(variable).ok().map(|text| text.parse().unwrap())
}

/// Calls that are under way at once, round after round, on a store.
struct RandomCallRun<P: TestStorage> {
    server: TestServer<P>,
    chooser: RandomChooser,
    managers: BTreeMap<String, Vec<RandomManager>>,
    targets: BTreeMap<String, Vec<String>>,
    /// The answers to the managers' calls, by code.
    answers: BTreeMap<String, u64>,
    calls: u64,
}

impl<P: TestStorage> RandomCallRun<P> {
    async fn start(seed: u64) -> RandomCallRun<P> {
        // Very many calls make more roles than an account usually may have.
        let unlimited = |settings: &mut ServerSettings| {
            settings.key_settings.account_limits = AccountLimits {
                keys: u64::MAX,
                roles: u64::MAX,
                rotations_per_hour: u64::MAX,
                log_rows_per_hour: u64::MAX,
            };
        };
        let server = TestServer::<P>::start_with(unlimited).await;
        for account in ["acme", "other"] {
            server.create_account(account).await;
        }
        let mut replicas = vec![server.client_without_token()];
        for number in 1..P::REPLICAS {
            replicas.push(server.start_replica(number, unlimited).await);
        }
        for (role, scopes) in [("boss", &["*", "keyward:*"][..]), ("weak", &["a"])] {
            server.root_client().put_role("", role, scopes).await.unwrap();
        }
        let chooser =
            RandomChooser::new(ChaCha8Rng::seed_from_u64(seed), replicas, server.root_token.clone());
        let (managers, targets) = (BTreeMap::new(), BTreeMap::new());
        RandomCallRun { server, chooser, managers, targets, answers: BTreeMap::new(), calls: 0 }
    }

    async fn stage(&mut self) -> RoundSetup {
        let (account, now) = (self.chooser.account(), self.server.timestamp_after(0));
        let managers = self.managers.entry(account.clone()).or_default();
        while managers.len() < MANAGERS {
            managers.push(self.chooser.manager(&account, &now).await);
        }
        // Those that have waited longest; they go to the end.
        managers.rotate_left(3);
        let managers = managers[MANAGERS - 3..].to_vec();
        let targets = self.targets.entry(account.clone()).or_default();
        if targets.is_empty() {
            targets.push(self.server.create_key(service_key_request(&account, &["a"])).await.id);
        }
        let targets = targets.iter().rev().take(8).cloned().collect();
        let role = self.chooser.role(&account).await;
        RoundSetup { account, role, managers, targets }
    }

    async fn round(&mut self) {
        let (stage, now) = (self.stage().await, self.server.timestamp_after(0));
        let (calls, against): (Vec<_>, Vec<_>) =
            (0..AT_ONCE).map(|_| self.chooser.random_call(&stage, &now)).unzip();
        // Each on a task of its own, so that they are under way at once.
        let answers = join_all(calls.into_iter().map(tokio::spawn)).await;
        for answer in answers.into_iter().map(Result::unwrap) {
            let code = match &answer {
                // The connection ended, which says nothing of the call.
                Err(status) if std::error::Error::source(status).is_some() => "no answer".to_owned(),
                answer => format!("{:?}", answer.as_ref().err().map_or(Code::Ok, tonic::Status::code)),
            };
            *self.answers.entry(code).or_default() += 1;
            self.targets.entry(stage.account.clone()).or_default().extend(answer.unwrap_or_default());
        }
        self.calls += AT_ONCE as u64;
        let gone: Vec<_> = against.into_iter().flatten().collect();
        self.managers.entry(stage.account.clone()).or_default().retain(|one| !gone.contains(&one.id));
        self.server.root_client().resume(&stage.account).await.unwrap();
        self.server.advance_by(std::time::Duration::from_millis(100));
    }
}

/// The whole log, in the order of its revisions.
async fn log(root: &Client) -> Vec<LoggedChange> {
    let mut entries = Vec::new();
    loop {
        let after_revision = entries.last().map_or(0, |entry: &LoggedChange| entry.audit_entry.revision);
        let page_size = Some(500);
        let request = pb::ListAuditEntriesRequest {
            full: true,
            oldest_first: true,
            after_revision,
            page_size,
            ..Default::default()
        };
        let page = root.list_audit_entries(request).await.unwrap().entries;
        if page.is_empty() {
            return entries;
        }
        entries.extend(page.into_iter().map(LoggedChange::read));
    }
}

/// Makes so many calls, and holds each committed change to the model.
async fn run_and_check<P: TestStorage>(calls: u64, seed: u64) {
    let mut run = RandomCallRun::<P>::start(seed).await;
    let root_id = run.server.root_client().who_am_i().await.unwrap().key.unwrap().id;
    while run.calls < calls {
        run.round().await;
    }
    let (mut model, mut changes) = (AuthorizationModel::default(), BTreeMap::<String, u64>::new());
    let (mut beyond, mut reasons) = (Vec::new(), BTreeMap::<String, u64>::new());
    for entry in log(&run.server.root_client()).await {
        let judged = model.check_and_apply(&entry);
        let pb::AuditEntry { revision, action, actor, payload, .. } = &entry.audit_entry;
        if *actor != root_id {
            *changes.entry(action.clone()).or_default() += 1;
        }
        if let Err(why) = judged {
            *reasons.entry(format!("{action}: {why}")).or_default() += 1;
            beyond.push(format!("{revision}: {action} by {actor}: {why}\n  {payload}"));
        }
    }
    println!("{} calls, SEED={seed}: {:?}\nchanges by managers: {changes:?}", run.calls, run.answers);
    let first = beyond.iter().take(5).map(String::as_str).collect::<Vec<_>>().join("\n");
    let found = beyond.len();
    assert!(beyond.is_empty(), "SEED={seed}: {found} changes beyond their caller: {reasons:#?}\n{first}");
    for action in [
        "key.created",
        "key.imported",
        "key.updated",
        "key.rotated",
        "role.put",
        "role.deleted",
        "member.put",
    ] {
        let made = changes.get(action).copied().unwrap_or_default();
        assert!(made >= calls / 2000, "SEED={seed}: {made} of {action}: the calls say little: {changes:?}");
    }
    for code in ["Internal", "Unknown", "DataLoss"] {
        assert_eq!(run.answers.get(code), None, "SEED={seed}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn whatever_managers_do_at_once_nothing_is_committed_beyond_its_caller() {
    run_and_check::<SqliteFile>(CALLS_ON_SQLITE, 1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn whatever_managers_do_at_once_on_two_replicas_nothing_is_committed_beyond_its_caller() {
    run_and_check::<PostgresDatabase>(CALLS_ON_POSTGRES, 2).await;
}

/// `make escalation`: very many calls on both stores. `CALLS` says how many, `SEED` repeats the choices of a run.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "make escalation runs it"]
async fn very_many_calls() {
    let calls = number("CALLS").unwrap_or(100_000);
    let chosen = || u64::from_le_bytes(random_bytes(&SystemEntropy).unwrap());
    let seed = number("SEED").unwrap_or_else(chosen);
    run_and_check::<SqliteFile>(calls / 2, seed).await;
    run_and_check::<PostgresDatabase>(calls / 2, seed).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_change_by_one_who_does_not_hold_it_is_beyond_its_caller() {
    let server = TestServer::<SqliteFile>::with_accounts().await;
    let narrow = server.create_key(service_key_request("acme", &["a", "keyward:keys:write"])).await;
    let made = server.create_key(service_key_request("acme", &["*"])).await;
    let mut model = AuthorizationModel::default();
    for mut entry in log(&server.root_client()).await {
        let forged = entry.audit_entry.key_id == made.id;
        if forged {
            (entry.audit_entry.actor, entry.audit_entry.actor_account) =
                (narrow.id.clone(), "acme".to_owned());
        }
        assert_eq!(model.check_and_apply(&entry).is_err(), forged, "{:?}", entry.audit_entry);
    }
}
