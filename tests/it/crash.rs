//! Power cuts: the server is killed again and again in the middle of its work, and whatever it had acknowledged
//! must hold at the next start. Here too: what group commit gains, measured.

use std::time::{Duration, Instant};

use keyward::{
    domain::{log::GENESIS, time::Revision},
    pb::{self, Reason},
    store,
};
use tonic::{Code, Status};

use crate::process::{Caller, Home, Keyward, plain_key, question};

const KILLS: u32 = 50;
const CLIENTS: u64 = 4;

/// SplitMix64: chance that a printed seed repeats.
#[derive(Clone)]
pub(crate) struct Chance(pub(crate) u64);

impl Chance {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(crate) fn below(&mut self, end: usize) -> usize {
        usize::try_from(self.next() % u64::try_from(end).unwrap()).unwrap()
    }

    /// From `KEYWARD_SEED`, or new; either way printed, which shows when the test fails.
    pub(crate) fn seeded() -> Chance {
        let given = std::env::var("KEYWARD_SEED").ok().map(|seed| seed.parse().unwrap());
        let seed = given.unwrap_or_else(|| {
            let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
            u64::try_from(now.as_nanos() & u128::from(u64::MAX)).unwrap()
        });
        println!("KEYWARD_SEED={seed} repeats the choices of this run");
        Chance(seed)
    }
}

/// A change that was asked for and not answered before the kill.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Doubt {
    Revoke,
    Rotate,
}

/// An acknowledged key, as its client knows it.
#[derive(Debug)]
struct Known {
    id: String,
    /// Every token it had, the newest last.
    tokens: Vec<String>,
    revoked: bool,
    doubt: Option<Doubt>,
    /// Changed since it was last read back.
    touched: bool,
}

impl Known {
    fn new(id: String, token: String) -> Known {
        Known { id, tokens: vec![token], revoked: false, doubt: None, touched: true }
    }

    fn newest(&self) -> &str {
        self.tokens.last().unwrap()
    }
}

/// One client with keys of its own.
struct Client {
    chance: Chance,
    name: u64,
    made: u32,
    keys: Vec<Known>,
    /// A create that was not answered.
    unanswered: Option<pb::CreateKeyRequest>,
}

impl Client {
    /// Makes changes until the server is gone.
    async fn work(&mut self, mut caller: Caller) -> Status {
        loop {
            if let Err(status) = self.step(&mut caller).await {
                return status;
            }
        }
    }

    async fn step(&mut self, caller: &mut Caller) -> Result<(), Status> {
        let living: Vec<usize> = (0..self.keys.len()).filter(|at| !self.keys[*at].revoked).collect();
        let dice = self.chance.below(10);
        if living.is_empty() || dice < 5 {
            return self.create(caller).await;
        }
        let key = &mut self.keys[living[self.chance.below(living.len())]];
        key.touched = true;
        if dice < 8 {
            key.doubt = Some(Doubt::Rotate);
            key.tokens.push(caller.rotate(&key.id).await?);
        } else {
            key.doubt = Some(Doubt::Revoke);
            caller.revoke(&key.id).await?;
            key.revoked = true;
        }
        key.doubt = None;
        Ok(())
    }

    async fn create(&mut self, caller: &mut Caller) -> Result<(), Status> {
        self.made += 1;
        let name = format!("client {} key {}", self.name, self.made);
        let request = pb::CreateKeyRequest {
            idempotency_key: Some(name.replace(' ', "-")),
            name: Some(name),
            ..plain_key()
        };
        self.unanswered = Some(request.clone());
        let (id, token) = caller.create(request).await?;
        self.unanswered = None;
        self.keys.push(Known::new(id, token));
        Ok(())
    }

    /// Sees that everything acknowledged holds, and learns what became of the rest.
    async fn verify(&mut self, mut caller: Caller) {
        if let Some(request) = self.unanswered.take() {
            // Sent again it is done once, whether or not it was done before.
            let again = caller.keys.create(request).await.unwrap().into_inner();
            assert_eq!(again.replayed, again.token.is_empty());
            if !again.replayed {
                self.keys.push(Known::new(again.key.unwrap().id, again.token));
            }
        }
        for keys in self.keys.chunks_mut(20) {
            let tokens = keys.iter().flat_map(|key| &key.tokens);
            let checks: Vec<_> = tokens.map(|token| question(token)).collect();
            let mut answers = Vec::new();
            for checks in checks.chunks(100) {
                let request = pb::BatchCheckRequest { checks: checks.to_vec() };
                answers.extend(caller.authz.batch_check(request).await.unwrap().into_inner().results);
            }
            let mut answers = answers.iter();
            for key in keys {
                let reasons: Vec<Reason> =
                    answers.by_ref().take(key.tokens.len()).map(|answer| answer.reason()).collect();
                settle(key, &reasons, &mut caller).await;
            }
        }
        for key in self.keys.iter_mut().filter(|key| key.touched) {
            let found = caller.get(&key.id).await.unwrap();
            let state = if key.revoked { pb::KeyState::Revoked } else { pb::KeyState::Active };
            assert_eq!(found.state(), state, "{}", key.id);
            key.touched = false;
        }
    }
}

/// Holds the answers for each of a key's tokens against what its client knows.
async fn settle(key: &mut Known, reasons: &[Reason], caller: &mut Caller) {
    let newest = *reasons.last().unwrap();
    let mut rotated = false;
    match (key.doubt.take(), newest) {
        (Some(Doubt::Revoke), Reason::Revoked) => key.revoked = true,
        (Some(Doubt::Rotate), Reason::Rotated) => rotated = true,
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
        key.tokens.push(caller.rotate(&key.id).await.unwrap());
        assert_eq!(caller.check(key.newest()).await.unwrap(), Reason::Ok);
    }
}

async fn each<'c, F>(server: &Keyward, clients: &'c mut [Client], work: impl Fn(&'c mut Client, Caller) -> F)
where
    F: Future + 'c,
{
    let all = clients.iter_mut().map(|client| work(client, server.root()));
    futures_util::future::join_all(all).await;
}

async fn verified_chain(home: &Home) -> Revision {
    let store = store::open(&home.url()).await.unwrap();
    let (mut revision, mut hash) = (Revision(0), GENESIS);
    loop {
        let rows = store.log_after(revision, 1000).await.unwrap();
        for row in &rows {
            assert!(row.follows(revision, &hash), "the chain breaks after {revision}");
            (revision, hash) = (row.revision, row.hash);
        }
        if rows.is_empty() {
            break;
        }
    }
    assert_eq!(store.head().await.unwrap(), store::Head { revision, hash });
    store.close().await;
    revision
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_acknowledged_is_lost_by_fifty_kills() {
    let mut chance = Chance::seeded();
    let begun = Instant::now();
    let home = Home::new();
    let mut server = home.start();
    server.root().make_account("acme").await;
    let mut clients: Vec<Client> = (0..CLIENTS)
        .map(|name| Client {
            chance: Chance(chance.next()),
            name,
            made: 0,
            keys: Vec::new(),
            unanswered: None,
        })
        .collect();
    let mut kills = 0;
    while kills < KILLS {
        let life = Duration::from_micros(chance.next() % 120_000);
        let mut killed = Some(server);
        let caller = killed.as_ref().unwrap().root();
        let mut work = Vec::new();
        for client in std::mem::take(&mut clients) {
            let (mut client, caller) = (client, caller.clone());
            work.push(tokio::spawn(async move {
                let status = client.work(caller).await;
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
            let starting = home.spawn(home.serve());
            tokio::time::sleep(Duration::from_micros(chance.next() % 40_000)).await;
            let ended = starting.kill();
            assert!(!ended.err.contains("keyward: "), "it refused to start: {ended:?}");
            kills += 1;
        }
        server = home.start();
        each(&server, &mut clients, |client, caller| client.verify(caller)).await;
    }
    for key in clients.iter_mut().flat_map(|client| &mut client.keys) {
        key.touched = true;
    }
    each(&server, &mut clients, |client, caller| client.verify(caller)).await;
    let home = server.stop();
    let changes = verified_chain(&home).await;
    let keys: usize = clients.iter().map(|client| client.keys.len()).sum();
    assert!(keys > 50, "too little was done to mean anything: {keys} keys");
    println!("{kills} kills, {keys} keys, {changes} changes, {:?}", begun.elapsed());
}

/// The ratio is printed, not asserted: it is the disk's as much as ours.
#[tokio::test(flavor = "multi_thread")]
async fn a_thousand_creates_at_once_all_succeed() {
    const KEYS: usize = 1000;
    let server = Keyward::start();
    let mut caller = server.root();
    caller.make_account("acme").await;

    let begun = Instant::now();
    for _ in 0..KEYS {
        caller.create(plain_key()).await.unwrap();
    }
    let one_by_one = begun.elapsed();

    // One connection has 256 streams at the most.
    let callers: Vec<Caller> = (0..4).map(|_| server.root()).collect();
    let begun = Instant::now();
    let creates = (0..KEYS).map(|at| {
        let mut caller = callers[at % callers.len()].clone();
        tokio::spawn(async move { caller.create(plain_key()).await.unwrap() })
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
        let checks = chunk.iter().map(|(_, token)| question(token)).collect();
        let answers = caller.authz.batch_check(pb::BatchCheckRequest { checks }).await.unwrap().into_inner();
        assert!(answers.results.iter().all(|answer| answer.allowed));
    }
    let ids: std::collections::BTreeSet<_> = made.iter().map(|(id, _)| id).collect();
    assert_eq!(ids.len(), KEYS);
    let home = server.stop();
    // The operator account, its root key, acme, and every key.
    assert_eq!(verified_chain(&home).await, Revision(3 + 2 * KEYS as u64));
}
