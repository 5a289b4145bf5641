//! What a Check costs inside the process: the shape of a token, its digest, and the whole answer from an index of
//! 10,000 keys. `cargo bench`; the wire is not part of it.

#![allow(missing_docs, clippy::unwrap_used, reason = "a benchmark that cannot be set up has nothing to say")]

use std::{collections::BTreeMap, hint::black_box, sync::Arc};

use criterion::{Criterion, criterion_group, criterion_main};
use futures_util::FutureExt as _;
use keyward::{
    clock::{Clock as _, SystemClock},
    domain::{
        key::{Key, Owner, Secret, Terms},
        name::{AccountId, EnvironmentName, KeyId, TokenPrefix, TokenTag},
        scope::Scope,
        time::Revision,
        token::{Digest, Token, shape},
    },
    engine::{Engine, Question, index::Index, lease::Lease, limiter::LimitSettings, usage::Usage},
    store::SnapshotItem,
};

const KEYS: u32 = 10_000;

fn token(number: u32) -> Token {
    let mut random = [7; 32];
    random[..4].copy_from_slice(&number.to_be_bytes());
    Token::generate(&TokenPrefix::parse("kw").unwrap(), &TokenTag::parse("live").unwrap(), &random)
}

fn key(number: u32) -> Key {
    let (now, token) = (SystemClock.now(), token(number));
    let mut random = [0; 10];
    random[..4].copy_from_slice(&number.to_be_bytes());
    Key {
        id: KeyId::generate(now, random),
        owner: Owner::Account(AccountId::parse("acme").unwrap()),
        environment: EnvironmentName::parse("production").unwrap(),
        terms: Terms {
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
        secrets: vec![Secret {
            version: 1,
            digest: token.digest(),
            hint: token.hint(),
            created_at: now,
            expires_at: None,
        }],
        revision: Revision(1),
    }
}

fn checks(criterion: &mut Criterion) {
    let presented = token(KEYS / 2);
    criterion.bench_function("shape of a token", |b| b.iter(|| shape(black_box(presented.reveal()))));
    criterion.bench_function("digest of a token", |b| b.iter(|| Digest::of(black_box(presented.reveal()))));

    let index = Arc::new(Index::default());
    (0..KEYS).for_each(|number| index.load(SnapshotItem::Key(Arc::new(key(number)), Vec::new())));
    index.loaded(Revision(1));
    let (lease, limits) = (Arc::new(Lease::sole()), LimitSettings::default());
    let engine = Engine::new(index, Arc::new(Usage::default()), lease, &limits, Arc::new(SystemClock));
    let (asker, environment) = (AccountId::operator(), EnvironmentName::parse("production").unwrap());
    let scopes = [Scope::parse_required("monitors:read").unwrap()];
    let question = Question {
        token: presented.reveal(),
        environment: &environment,
        scopes: &scopes,
        account: None,
        customer: None,
        client_ip: None,
        cost: 1,
        dry_run: false,
        min_revision: None,
        charge: None,
        bar_management: false,
    };
    // Without limits a Check is answered the first time that it is polled.
    criterion.bench_function("a Check that is allowed", |b| {
        b.iter(|| engine.check(&asker, black_box(&question)).now_or_never())
    });
    let unknown = token(KEYS + 1);
    let question = Question { token: unknown.reveal(), ..question };
    criterion.bench_function("a Check of an unknown token", |b| {
        b.iter(|| engine.check(&asker, black_box(&question)).now_or_never())
    });
}

criterion_group!(benches, checks);
criterion_main!(benches);
