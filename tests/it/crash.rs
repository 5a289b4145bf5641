//! Power cuts: the server is killed again and again in the middle of its work, and whatever it had acknowledged
//! must hold at the next start. Here too: what group commit gains, measured.

use std::time::{Duration, Instant};

use keyward::{
    domain::{log::GENESIS_HASH, time::Revision},
    pb::{self, Reason},
    store,
};
use tonic::{Code, Status};

use crate::process::{AuthorizedClients, KeywardProcess, TestHome, check_request, plain_key_request};

const KILLS: u32 = 50;
const CLIENTS: u64 = 4;

/// SplitMix64: chance that a printed seed repeats.
#[derive(Clone)]
pub(crate) struct SplitMix64(pub(crate) u64);

impl SplitMix64 {
    pub(crate) fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(crate) fn below(&mut self, end: usize) -> usize {
        usize::try_from(self.next_u64() % u64::try_from(end).unwrap()).unwrap()
    }

    /// From `KEYWARD_SEED`, or new; either way printed, which shows when the test fails.
    pub(crate) fn from_environment() -> SplitMix64 {
        let given = std::env::var("KEYWARD_SEED").ok().map(|seed| seed.parse().unwrap());
        let seed = given.unwrap_or_else(|| {
            let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
            u64::try_from(now.as_nanos() & u128::from(u64::MAX)).unwrap()
        });
        println!("KEYWARD_SEED={seed} repeats the choices of this run");
        SplitMix64(seed)
    }
}

/// A change that was asked for and not answered before the kill.
#[derive(Clone, Copy, Debug, PartialEq)]
enum UnansweredChange {
    Revoke,
    Rotate,
}

/// An acknowledged key, as its client knows it.
#[derive(Debug)]
struct AcknowledgedKey {
    id: String,
    /// Every token it had, the newest last.
    tokens: Vec<String>,
    revoked: bool,
    unanswered: Option<UnansweredChange>,
    /// Changed since it was last read back.
    touched: bool,
}

impl AcknowledgedKey {
    fn new(id: String, token: String) -> AcknowledgedKey {
        AcknowledgedKey { id, tokens: vec![token], revoked: false, unanswered: None, touched: true }
    }

    fn newest(&self) -> &str {
        self.tokens.last().unwrap()
    }
}

/// One client with keys of its own.
struct CrashClient {
    random: SplitMix64,
    name: u64,
    made: u32,
    keys: Vec<AcknowledgedKey>,
    /// A create that was not answered.
    unanswered: Option<pb::CreateKeyRequest>,
}

impl CrashClient {
    /// Makes changes until the server is gone.
    async fn change_until_killed(&mut self, mut caller: AuthorizedClients) -> Status {
        loop {
            if let Err(status) = self.step(&mut caller).await {
                return status;
            }
        }
    }

    async fn step(&mut self, caller: &mut AuthorizedClients) -> Result<(), Status> {
        let living: Vec<usize> = (0..self.keys.len()).filter(|at| !self.keys[*at].revoked).collect();
        let dice = self.random.below(10);
        if living.is_empty() || dice < 5 {
            return self.create(caller).await;
        }
        let key = &mut self.keys[living[self.random.below(living.len())]];
        key.touched = true;
        if dice < 8 {
            key.unanswered = Some(UnansweredChange::Rotate);
            key.tokens.push(caller.rotate_key(&key.id).await?);
        } else {
            key.unanswered = Some(UnansweredChange::Revoke);
            caller.revoke_key(&key.id).await?;
            key.revoked = true;
        }
        key.unanswered = None;
        Ok(())
    }

    async fn create(&mut self, caller: &mut AuthorizedClients) -> Result<(), Status> {
        self.made += 1;
        let name = format!("client {} key {}", self.name, self.made);
        let request = pb::CreateKeyRequest {
            idempotency_key: Some(name.replace(' ', "-")),
            name: Some(name),
            ..plain_key_request()
        };
        self.unanswered = Some(request.clone());
        let (id, token) = caller.create_key(request).await?;
        self.unanswered = None;
        self.keys.push(AcknowledgedKey::new(id, token));
        Ok(())
    }

    /// Sees that everything acknowledged holds, and learns what became of the rest.
    async fn verify(&mut self, mut caller: AuthorizedClients) {
        if let Some(request) = self.unanswered.take() {
            // Sent again it is done once, whether or not it was done before.
            let again = caller.keys.create(request).await.unwrap().into_inner();
            assert_eq!(again.replayed, again.token.is_empty());
            if !again.replayed {
                self.keys.push(AcknowledgedKey::new(again.key.unwrap().id, again.token));
            }
        }
        for keys in self.keys.chunks_mut(20) {
            let tokens = keys.iter().flat_map(|key| &key.tokens);
            let checks: Vec<_> = tokens.map(|token| check_request(token)).collect();
            let mut answers = Vec::new();
            for checks in checks.chunks(100) {
                let request = pb::BatchCheckRequest { checks: checks.to_vec() };
                answers.extend(caller.authz.batch_check(request).await.unwrap().into_inner().results);
            }
            let mut answers = answers.iter();
            for key in keys {
                let reasons: Vec<Reason> =
                    answers.by_ref().take(key.tokens.len()).map(|answer| answer.reason()).collect();
                check_tokens(key, &reasons, &mut caller).await;
            }
        }
        for key in self.keys.iter_mut().filter(|key| key.touched) {
            let found = caller.get_key(&key.id).await.unwrap();
            let state = if key.revoked { pb::KeyState::Revoked } else { pb::KeyState::Active };
            assert_eq!(found.state(), state, "{}", key.id);
            key.touched = false;
        }
    }
}

/// Holds the answers for each of a key's tokens against what its client knows.
async fn check_tokens(key: &mut AcknowledgedKey, reasons: &[Reason], caller: &mut AuthorizedClients) {
    let newest = *reasons.last().unwrap();
    let mut rotated = false;
    match (key.unanswered.take(), newest) {
        (Some(UnansweredChange::Revoke), Reason::Revoked) => key.revoked = true,
        (Some(UnansweredChange::Rotate), Reason::Rotated) => rotated = true,
        _ => {}
    }
    let (old, new) = match (key.revoked, rotated) {
        (true, _) => (Reason::Revoked, Reason::Revoked),
        (false, true) => (Reason::Rotated, Reason::Rotated),
        (false, false) => (Reason::Rotated, Reason::Ok),
    };
    let mut expected = vec![old; key.tokens.len()];
    *expected.last_mut().unwrap() = new;
    assert_eq!(reasons, expected, "{}", key.id);
    if rotated {
        // Its new token went down with the answer; another rotation is the way to one.
        key.tokens.push(caller.rotate_key(&key.id).await.unwrap());
        assert_eq!(caller.check_token(key.newest()).await.unwrap(), Reason::Ok);
    }
}

async fn for_each_client<'c, F>(
    server: &KeywardProcess,
    clients: &'c mut [CrashClient],
    work: impl Fn(&'c mut CrashClient, AuthorizedClients) -> F,
) where
    F: Future + 'c,
{
    let all = clients.iter_mut().map(|client| work(client, server.root_caller()));
    futures_util::future::join_all(all).await;
}

async fn verify_chain(home: &TestHome) -> Revision {
    let store = store::open(&home.url()).await.unwrap();
    let (mut revision, mut hash) = (Revision(0), GENESIS_HASH);
    loop {
        let rows = store.list_log_after(revision, 1000).await.unwrap();
        for row in &rows {
            assert!(row.follows(revision, &hash), "the chain breaks after {revision}");
            (revision, hash) = (row.revision, row.hash);
        }
        if rows.is_empty() {
            break;
        }
    }
    assert_eq!(store.log_head().await.unwrap(), store::LogHead { revision, hash });
    store.close().await;
    revision
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_acknowledged_is_lost_by_fifty_kills() {
    let mut chance = SplitMix64::from_environment();
    let begun = Instant::now();
    let home = TestHome::new();
    let mut server = home.start();
    server.root_caller().create_account("acme").await;
    let mut clients: Vec<CrashClient> = (0..CLIENTS)
        .map(|name| CrashClient {
            random: SplitMix64(chance.next_u64()),
            name,
            made: 0,
            keys: Vec::new(),
            unanswered: None,
        })
        .collect();
    let mut kills = 0;
    while kills < KILLS {
        let life = Duration::from_micros(chance.next_u64() % 120_000);
        let mut killed = Some(server);
        let caller = killed.as_ref().unwrap().root_caller();
        let mut work = Vec::new();
        for client in std::mem::take(&mut clients) {
            let (mut client, caller) = (client, caller.clone());
            work.push(tokio::spawn(async move {
                let status = client.change_until_killed(caller).await;
                (client, status)
            }));
        }
        tokio::time::sleep(life).await;
        killed.take().unwrap().process.kill();
        kills += 1;
        for task in work {
            let (client, status) = task.await.unwrap();
            assert!(
                matches!(status.code(), Code::Unavailable | Code::Unknown | Code::Cancelled),
                "{status:?}"
            );
            clients.push(client);
        }
        if chance.below(5) == 0 {
            // Killed while it starts, too.
            let starting = home.spawn(home.serve_command());
            tokio::time::sleep(Duration::from_micros(chance.next_u64() % 40_000)).await;
            let ended = starting.kill();
            assert!(!ended.err.contains("keyward: "), "it refused to start: {ended:?}");
            kills += 1;
        }
        server = home.start();
        for_each_client(&server, &mut clients, |client, caller| client.verify(caller)).await;
    }
    for key in clients.iter_mut().flat_map(|client| &mut client.keys) {
        key.touched = true;
    }
    for_each_client(&server, &mut clients, |client, caller| client.verify(caller)).await;
    let home = server.stop();
    let changes = verify_chain(&home).await;
    let keys: usize = clients.iter().map(|client| client.keys.len()).sum();
    assert!(keys > 50, "too little was done to mean anything: {keys} keys");
    println!("{kills} kills, {keys} keys, {changes} changes, {:?}", begun.elapsed());
}

/// The ratio is printed, not asserted: it is the disk's as much as ours.
#[tokio::test(flavor = "multi_thread")]
async fn a_thousand_creates_at_once_all_succeed() {
    const KEYS: usize = 1000;
    let server = KeywardProcess::start();
    let mut caller = server.root_caller();
    caller.create_account("acme").await;

    let begun = Instant::now();
    for _ in 0..KEYS {
        caller.create_key(plain_key_request()).await.unwrap();
    }
    let one_by_one = begun.elapsed();

    // One connection has 256 streams at the most.
    let callers: Vec<AuthorizedClients> = (0..4).map(|_| server.root_caller()).collect();
    let begun = Instant::now();
    let creates = (0..KEYS).map(|at| {
        let mut caller = callers[at % callers.len()].clone();
        tokio::spawn(async move { caller.create_key(plain_key_request()).await.unwrap() })
    });
    let mut made = Vec::new();
    for create in creates.collect::<Vec<_>>() {
        made.push(create.await.unwrap());
    }
    let at_once = begun.elapsed();
    println!(
        "{KEYS} creates: one by one {one_by_one:?}, at once {at_once:?}: {:.1} times as fast",
        one_by_one.as_secs_f64() / at_once.as_secs_f64()
    );

    for chunk in made.chunks(100) {
        let checks = chunk.iter().map(|(_, token)| check_request(token)).collect();
        let answers = caller.authz.batch_check(pb::BatchCheckRequest { checks }).await.unwrap().into_inner();
        assert!(answers.results.iter().all(|answer| answer.allowed));
    }
    let ids: std::collections::BTreeSet<_> = made.iter().map(|(id, _)| id).collect();
    assert_eq!(ids.len(), KEYS);
    let home = server.stop();
    // The operator account, its root key, acme, and every key.
    assert_eq!(verify_chain(&home).await, Revision(3 + 2 * KEYS as u64));
}
