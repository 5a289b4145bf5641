//! What a Check costs inside the process: the format of a token, its digest, the policy, and the whole answer from indexes of
//! 10,000, a million and ten million keys (some 3 GB while they are made). `cargo bench --bench check`; the wire is not part
//! of it.

#![allow(missing_docs, clippy::unwrap_used, reason = "a benchmark that cannot be set up has nothing to say")]

use std::{collections::BTreeMap, hint::black_box, sync::Arc, time::Duration};

use criterion::{Criterion, criterion_group, criterion_main};
use futures_util::FutureExt as _;
use keyward::{
    clock::{Clock as _, SystemClock},
    domain::{
        key::{ApiKey, KeyOwner, KeySecret, KeySpec, RateLimit},
        name::{AccountId, EnvironmentName, KeyId, TokenPrefix, TokenTag},
        policy_decision::{CheckSubject, MembershipStatus, PolicyRequest, TokenPurpose, decide},
        scope::Scope,
        time::Revision,
        token::{Token, TokenDigest, can_be_token},
    },
    engine::{
        CheckInput, Engine, Requester, index::Index, limiter::LimitSettings, serving_lease::ServingLease,
        usage::UsageRecorder,
    },
    store::SnapshotRecord,
};

fn token(number: u32) -> Token {
    let mut random = [7; 32];
    random[..4].copy_from_slice(&number.to_be_bytes());
    Token::generate(&TokenPrefix::parse("kw").unwrap(), &TokenTag::parse("live").unwrap(), &random)
}

fn key(number: u32) -> ApiKey {
    let (now, token) = (SystemClock.now(), token(number));
    let mut random = [0; 10];
    random[..4].copy_from_slice(&number.to_be_bytes());
    ApiKey {
        id: KeyId::generate(now, random),
        owner: KeyOwner::Account(AccountId::parse("acme").unwrap()),
        environment: EnvironmentName::parse("production").unwrap(),
        spec: KeySpec {
            name: None,
            scopes: [Scope::parse_grant("monitors:*").unwrap()].into_iter().collect(),
            roles: Vec::new(),
            expires_at: None,
            customers: Vec::new(),
            allowed_cidrs: Vec::new(),
            rate_limits: Vec::new(),
            quota: None,
            metadata: BTreeMap::new(),
        },
        created_at: now,
        created_by: "system".to_owned(),
        updated_at: now,
        disabled_at: None,
        revocation: None,
        secrets: vec![KeySecret {
            version: 1,
            digest: token.digest(),
            hint: token.hint(),
            created_at: now,
            expires_at: None,
        }],
        revision: Revision(1),
    }
}

fn engine(keys: u32, limited: Option<RateLimit>) -> Engine {
    let index = Arc::new(Index::default());
    for number in 0..keys {
        let mut key = key(number);
        key.spec.rate_limits.extend(limited.clone());
        index.load_record(SnapshotRecord::Key(Arc::new(key), Vec::new()));
    }
    index.finish_load(Revision(1));
    let (lease, limits) = (Arc::new(ServingLease::for_sole_owner()), LimitSettings::default());
    Engine::new(index, Arc::new(UsageRecorder::default()), lease, &limits, Arc::new(SystemClock))
}

/// Asks for these tokens in turn, each time another. Uses are noted only with `dry_run` off: of many keys, to note them is
/// another cost than to find them.
fn bench_checks(criterion: &mut Criterion, name: &str, engine: &Engine, tokens: &[Token], dry_run: bool) {
    let (asker, environment) = (AccountId::operator(), EnvironmentName::parse("production").unwrap());
    let scopes = [Scope::parse_required("monitors:read").unwrap()];
    let mut tokens = tokens.iter().cycle();
    criterion.bench_function(name, |b| {
        b.iter(|| {
            let question = CheckInput {
                token: tokens.next().unwrap().reveal(),
                environment: &environment,
                scopes: &scopes,
                account: None,
                customer: None,
                client_ip: None,
                cost: 1,
                dry_run,
                min_revision: None,
                dedup_id: None,
                refuse_management_keys: false,
            };
            // Without Redis a Check is answered the first time that it is polled.
            engine
                .check(Requester::always_authorized(&asker), black_box(&question))
                .now_or_never()
                .unwrap()
                .unwrap()
        });
    });
}

/// Tokens that lie far apart, more than a cache holds the keys of.
fn spread_tokens(of: u32) -> Vec<Token> {
    const TOKENS_ASKED: u32 = 100_000;
    (0..TOKENS_ASKED).map(|number| token(number.wrapping_mul(2_654_435_761) % of)).collect()
}

fn bench_components(criterion: &mut Criterion) {
    let presented = token(1);
    criterion.bench_function("format of a token", |b| b.iter(|| can_be_token(black_box(presented.reveal()))));
    criterion.bench_function("digest of a token", |b| {
        b.iter(|| TokenDigest::from_token(black_box(presented.reveal())))
    });
    let (key, environment) = (key(1), EnvironmentName::parse("production").unwrap());
    let scopes = [Scope::parse_required("monitors:read").unwrap()];
    let request = PolicyRequest {
        purpose: TokenPurpose::Service { environment: &environment, customer: None },
        account: None,
        client_ip: None,
        scopes: &scopes,
    };
    let now = SystemClock.now();
    criterion.bench_function("the policy alone", |b| {
        b.iter(|| {
            let membership = MembershipStatus::NotApplicable;
            let subject = CheckSubject {
                key: black_box(&key),
                secret_version: 1,
                account_suspended: false,
                roles: &[],
                membership,
            };
            decide(subject, black_box(request), now)
        });
    });
}

fn bench_engines(criterion: &mut Criterion) {
    let small = engine(10_000, None);
    bench_checks(criterion, "a Check of one key", &small, &[token(1)], false);
    bench_checks(criterion, "a Check of an unknown token", &small, &[token(u32::MAX)], false);
    bench_checks(criterion, "Checks of many of 10,000 keys", &small, &spread_tokens(10_000), true);
    let rate = RateLimit { name: "fast".into(), limit: u64::from(u32::MAX), window: Duration::from_secs(1) };
    bench_checks(
        criterion,
        "a Check of one key with a rate limit",
        &engine(1, Some(rate)),
        &[token(0)],
        false,
    );
    for keys in [1_000_000, 10_000_000] {
        let name = format!("Checks of many of {keys} keys");
        bench_checks(criterion, &name, &engine(keys, None), &spread_tokens(keys), true);
    }
}

criterion_group!(benches, bench_components, bench_engines);
criterion_main!(benches);
