//! Engines that know the same keys, as replicas of one database do: each with an index, a memory of uses and limits of
//! its own, over one store.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use keyward::{
    clock::ManualClock,
    domain::{
        key::{Key, Owner, Quota, QuotaPeriod, RateLimit, Secret, Terms},
        name::{AccountId, EnvironmentName, KeyId, TokenPrefix, TokenTag},
        scope::Scope,
        time::{Revision, Timestamp},
        token::Token,
    },
    engine::{
        Answer, Asker, CannotAnswer, Engine, Question,
        index::Index,
        lease::Lease,
        limiter::{Charge, LimitSettings, OnFailure},
        usage::Usage,
    },
    store::SnapshotItem,
};

use crate::support::START;

/// When every clock of the tests starts.
pub(crate) fn clock() -> Arc<ManualClock> {
    Arc::new(ManualClock::at(Timestamp::from_micros(START * 1_000_000)))
}

pub(crate) fn rate(name: &str, limit: u64, window: Duration) -> RateLimit {
    RateLimit { name: name.to_owned(), limit, window }
}

/// A key with these limits, and its token.
#[derive(Clone)]
pub(crate) struct Limited {
    pub(crate) key: Arc<Key>,
    pub(crate) token: Arc<Token>,
}

impl Limited {
    pub(crate) fn new(number: u8, rate_limits: Vec<RateLimit>, quota: Option<u64>) -> Limited {
        let (prefix, tag) = (TokenPrefix::parse("kw").unwrap(), TokenTag::parse("live").unwrap());
        let token = Token::generate(&prefix, &tag, &[number; 32]);
        let at = Timestamp::from_micros(START * 1_000_000);
        let secret = Secret {
            version: 1,
            digest: token.digest(),
            hint: token.hint(),
            created_at: at,
            expires_at: None,
        };
        let terms = Terms {
            name: None,
            scopes: [Scope::parse_grant("*").unwrap()].into_iter().collect(),
            roles: Vec::new(),
            expires_at: None,
            customers: Vec::new(),
            allowed_cidrs: Vec::new(),
            rate_limits,
            quota: quota.map(|limit| Quota { limit, period: QuotaPeriod::Day }),
            metadata: BTreeMap::new(),
        };
        let key = Key {
            id: KeyId::generate(at, [number; 10]),
            owner: Owner::Account(AccountId::parse("acme").unwrap()),
            environment: EnvironmentName::parse("production").unwrap(),
            terms,
            created_at: at,
            created_by: "system".to_owned(),
            updated_at: at,
            disabled_at: None,
            revocation: None,
            secrets: vec![secret],
            revision: Revision(1),
        };
        Limited { key: Arc::new(key), token: Arc::new(token) }
    }
}

/// An engine that knows one key.
#[derive(Clone)]
pub(crate) struct Replica {
    pub(crate) engine: Arc<Engine>,
    limited: Limited,
    environment: EnvironmentName,
}

impl Replica {
    /// One that is connected to Redis, if it is to be.
    pub(crate) async fn start(limited: &Limited, limits: &LimitSettings, clock: Arc<ManualClock>) -> Replica {
        let index = Arc::new(Index::default());
        index.load(SnapshotItem::Key(limited.key.clone(), Vec::new()));
        index.loaded(Revision(1));
        let engine =
            Arc::new(Engine::new(index, Arc::new(Usage::default()), Arc::new(Lease::sole()), limits, clock));
        let (told, tried) = tokio::sync::oneshot::channel();
        let connecting = engine.clone();
        tokio::spawn(async move { connecting.limiter.keep_connected(told).await });
        tried.await.unwrap();
        let environment = EnvironmentName::parse("production").unwrap();
        Replica { engine, limited: limited.clone(), environment }
    }

    pub(crate) async fn ask(&self, cost: u64) -> Result<Answer, CannotAnswer> {
        self.ask_as(cost, None, false).await
    }

    pub(crate) async fn ask_as(
        &self,
        cost: u64,
        number: Option<&str>,
        dry_run: bool,
    ) -> Result<Answer, CannotAnswer> {
        let question = Question {
            token: self.limited.token.reveal(),
            environment: &self.environment,
            scopes: &[],
            account: None,
            customer: None,
            client_ip: None,
            cost,
            dry_run,
            min_revision: None,
            charge: number.map(|number| Charge::of(number.as_bytes())),
            bar_management: false,
        };
        self.engine.check(Asker::always(&AccountId::operator()), &question).await
    }
}

/// Settings of replicas that do not answer what Redis does not.
pub(crate) fn denying(mut limits: LimitSettings) -> LimitSettings {
    if let Some(redis) = &mut limits.redis {
        redis.on_failure = OnFailure::Deny;
    }
    limits
}
