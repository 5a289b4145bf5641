//! Engines that know the same keys, as replicas of one database do: each with an index, a memory of uses and limits of
//! its own, over one store.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use keyward::{
    clock::ManualClock,
    domain::{
        key::{ApiKey, KeyOwner, KeySecret, KeySpec, Quota, QuotaPeriod, RateLimit},
        name::{AccountId, EnvironmentName, KeyId, TokenPrefix, TokenTag},
        scope::Scope,
        time::{Revision, Timestamp},
        token::Token,
    },
    engine::{
        CheckError, CheckInput, CheckOutcome, Engine, Requester,
        index::Index,
        limiter::{LimitSettings, RedisFailurePolicy, RequestDedupId},
        serving_lease::ServingLease,
        usage::UsageRecorder,
    },
    store::SnapshotRecord,
};

use crate::support::START;

/// When every clock of the tests starts.
pub(crate) fn start_clock() -> Arc<ManualClock> {
    Arc::new(ManualClock::new(Timestamp::from_micros(START * 1_000_000)))
}

pub(crate) fn rate_limit(name: &str, limit: u64, window: Duration) -> RateLimit {
    RateLimit { name: name.to_owned(), limit, window }
}

/// A key with these limits, and its token.
#[derive(Clone)]
pub(crate) struct LimitedKey {
    pub(crate) key: Arc<ApiKey>,
    pub(crate) token: Arc<Token>,
}

impl LimitedKey {
    pub(crate) fn new(number: u8, rate_limits: Vec<RateLimit>, quota: Option<u64>) -> LimitedKey {
        let (prefix, tag) = (TokenPrefix::parse("kw").unwrap(), TokenTag::parse("live").unwrap());
        let token = Token::generate(&prefix, &tag, &[number; 32]);
        let at = Timestamp::from_micros(START * 1_000_000);
        let secret = KeySecret {
            version: 1,
            digest: token.digest(),
            hint: token.hint(),
            created_at: at,
            expires_at: None,
        };
        let terms = KeySpec {
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
        let key = ApiKey {
            id: KeyId::generate(at, [number; 10]),
            owner: KeyOwner::Account(AccountId::parse("acme").unwrap()),
            environment: EnvironmentName::parse("production").unwrap(),
            spec: terms,
            created_at: at,
            created_by: "system".to_owned(),
            updated_at: at,
            disabled_at: None,
            revocation: None,
            secrets: vec![secret],
            revision: Revision(1),
        };
        LimitedKey { key: Arc::new(key), token: Arc::new(token) }
    }
}

/// An engine that knows one key.
#[derive(Clone)]
pub(crate) struct EngineReplica {
    pub(crate) engine: Arc<Engine>,
    limited: LimitedKey,
    environment: EnvironmentName,
}

impl EngineReplica {
    /// One that is connected to Redis, if it is to be.
    pub(crate) async fn start(
        limited: &LimitedKey,
        limits: &LimitSettings,
        clock: Arc<ManualClock>,
    ) -> EngineReplica {
        let index = Arc::new(Index::default());
        index.load_record(SnapshotRecord::Key(limited.key.clone(), Vec::new()));
        index.finish_load(Revision(1));
        let engine = Arc::new(Engine::new(
            index,
            Arc::new(UsageRecorder::default()),
            Arc::new(ServingLease::for_sole_owner()),
            limits,
            clock,
        ));
        let (told, tried) = tokio::sync::oneshot::channel();
        let connecting = engine.clone();
        tokio::spawn(async move { connecting.limiter.maintain_connection(told).await });
        tried.await.unwrap();
        let environment = EnvironmentName::parse("production").unwrap();
        EngineReplica { engine, limited: limited.clone(), environment }
    }

    pub(crate) async fn check(&self, cost: u64) -> Result<CheckOutcome, CheckError> {
        self.check_as(cost, None, false).await
    }

    pub(crate) async fn check_as(
        &self,
        cost: u64,
        number: Option<&str>,
        dry_run: bool,
    ) -> Result<CheckOutcome, CheckError> {
        let question = CheckInput {
            token: self.limited.token.reveal(),
            environment: &self.environment,
            scopes: &[],
            account: None,
            customer: None,
            client_ip: None,
            cost,
            dry_run,
            min_revision: None,
            dedup_id: number.map(|number| RequestDedupId::from_request_id(number.as_bytes())),
            refuse_management_keys: false,
        };
        self.engine.check(Requester::always_authorized(&AccountId::operator()), &question).await
    }
}

/// Settings of replicas that do not answer what Redis does not.
pub(crate) fn with_deny_on_failure(mut limits: LimitSettings) -> LimitSettings {
    if let Some(redis) = &mut limits.redis {
        redis.on_failure = RedisFailurePolicy::Deny;
    }
    limits
}
