//! The keys that a load asks about, and the calls that it makes.
//!
//! Tokens are made of a secret of this run alone: on a server that people use, nobody else can have them. They are kept as
//! the numbers that they are made of, since a million of them would be large.

use std::ops::Range;

use bytes::{BufMut as _, Bytes, BytesMut};
use futures_util::stream::{self, StreamExt as _};
use prost::Message;
use sha2::{Digest as _, Sha256};

use super::{
    load_generator::{ExpectedAnswer, PreparedCall},
    mode::BenchMode,
};
use crate::{
    cli::{
        api_client::{ApiClient, DefaultTimeout},
        error::CliError,
    },
    clock::{SystemEntropy, random_bytes},
    domain::{
        name::{TokenPrefix, TokenTag},
        token::Token,
    },
    pb::{self, envoy_request as envoy},
};

/// The account of the load's keys.
pub(super) const BENCH_ACCOUNT: &str = "bench";
const GRANTED_SCOPE: &str = "monitors:read";
const MISSING_SCOPE: &str = "monitors:write";
const BENCH_ENVIRONMENT: &str = "production";
/// How many keys an Import takes.
const IMPORT_BATCH_SIZE: u64 = 1000;
/// How many Imports are under way at once: while one is written, the next is made ready.
const IMPORTS_IN_FLIGHT: usize = 4;
/// How many different calls a load has at the most; it goes round.
const MAX_PREPARED_CALLS: u64 = 65_536;

/// The keys of one run.
pub(super) struct BenchKeys {
    secret: [u8; 32],
    prefix: TokenPrefix,
    tag: TokenTag,
    count: u64,
}

/// Of how many calls in a hundred the token is unknown, or lacks the scope.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct CallMix {
    pub(super) unknown: f64,
    pub(super) denied: f64,
}

impl BenchKeys {
    /// Makes `count` keys on the server, in an account of theirs.
    ///
    /// # Errors
    /// When the server refuses.
    pub(super) async fn create(
        session: &ApiClient,
        count: u64,
        mut each: impl FnMut(u64),
    ) -> Result<BenchKeys, CliError> {
        let secret = random_bytes(&SystemEntropy).map_err(|error| CliError::new(error.to_string()))?;
        let prefix = TokenPrefix::parse("kw").map_err(|error| CliError::new(error.to_string()))?;
        let tag = TokenTag::parse("live").map_err(|error| CliError::new(error.to_string()))?;
        let keys = BenchKeys { secret, prefix, tag, count };
        let account = pb::CreateAccountRequest { id: BENCH_ACCOUNT.to_owned(), ..Default::default() };
        let made = session
            .call_accounts(DefaultTimeout::Quick, account, async |mut client, request| {
                match client.create(request).await {
                    Err(status) if status.code() == tonic::Code::AlreadyExists => {
                        Ok(tonic::Response::new(pb::CreateAccountResponse::default()))
                    }
                    made => made,
                }
            })
            .await;
        made?;
        let firsts = (0..count).step_by(usize::try_from(IMPORT_BATCH_SIZE).unwrap_or(1));
        let imports =
            firsts.map(|first| keys.import_batch(session, first..count.min(first + IMPORT_BATCH_SIZE)));
        let mut imports = stream::iter(imports).buffer_unordered(IMPORTS_IN_FLIGHT);
        while let Some(made) = imports.next().await {
            each(made?);
        }
        drop(imports);
        Ok(keys)
    }

    /// Makes some of them; gives how many.
    async fn import_batch(&self, session: &ApiClient, numbers: Range<u64>) -> Result<u64, CliError> {
        let request = pb::ImportKeysRequest { keys: numbers.map(|number| self.import_key(number)).collect() };
        let count = request.keys.len() as u64;
        let done = session
            .call_keys(DefaultTimeout::Propagation, request, async |mut client, request| {
                client.import(request).await
            })
            .await?;
        match done.results.iter().find(|result| !result.error.is_empty()) {
            Some(refused) => {
                Err(CliError::refused(format!("a key of the load was refused: {}", refused.message)))
            }
            None => Ok(count),
        }
    }

    fn import_key(&self, number: u64) -> pb::ImportKey {
        let token = self.token(number);
        pb::ImportKey {
            account: BENCH_ACCOUNT.to_owned(),
            environment: BENCH_ENVIRONMENT.to_owned(),
            scopes: vec![GRANTED_SCOPE.to_owned()],
            sha256: token.digest().as_bytes().to_vec(),
            hint: token.hint(),
            ..Default::default()
        }
    }

    fn token(&self, number: u64) -> Token {
        let random = Sha256::new().chain_update(self.secret).chain_update(number.to_be_bytes()).finalize();
        Token::generate(&self.prefix, &self.tag, &random.into())
    }

    fn check_request(&self, number: u64, scope: &str) -> pb::CheckRequest {
        pb::CheckRequest {
            token: self.token(number).reveal().to_owned(),
            environment: BENCH_ENVIRONMENT.to_owned(),
            scopes: vec![scope.to_owned()],
            ..Default::default()
        }
    }

    /// The calls of a load; `batch` = Checks in a BatchCheck.
    pub(super) fn prepare_calls(&self, mode: BenchMode, shares: CallMix, batch: u64) -> Vec<PreparedCall> {
        let count = match mode {
            BenchMode::Batch => (MAX_PREPARED_CALLS / batch.max(1)).max(1),
            _ => MAX_PREPARED_CALLS,
        };
        (0..count).map(|at| self.prepare_call(mode, at, shares, batch)).collect()
    }

    fn prepare_call(&self, mode: BenchMode, at: u64, shares: CallMix, batch: u64) -> PreparedCall {
        // Spread over the keys, so that a call's key is not in a processor's cache by chance.
        let number = |at: u64| at.wrapping_mul(0x9e37_79b9_7f4a_7c15) % self.count.max(1);
        let part = (at % 1000) as f64 / 10.0;
        let (number, scope, allowed) = if part < shares.unknown {
            (self.count + number(at) + 1, GRANTED_SCOPE, false)
        } else if part < shares.unknown + shares.denied {
            (number(at), MISSING_SCOPE, false)
        } else {
            (number(at), GRANTED_SCOPE, true)
        };
        match mode {
            BenchMode::Check | BenchMode::Stream | BenchMode::Overload => {
                frame_call(&self.check_request(number, scope), ExpectedAnswer::FirstBool(allowed))
            }
            BenchMode::Batch => {
                let keys = (0..batch).map(|more| at * batch + more);
                let checks = keys.map(|at| {
                    let key = at.wrapping_mul(0x9e37_79b9_7f4a_7c15) % self.count.max(1);
                    self.check_request(key, GRANTED_SCOPE)
                });
                frame_call(&pb::BatchCheckRequest { checks: checks.collect() }, ExpectedAnswer::Any)
            }
            BenchMode::ExtAuthz => frame_call(
                &envoy_check_request(self.token(number).reveal(), scope),
                ExpectedAnswer::Envoy(allowed),
            ),
            BenchMode::Create | BenchMode::Revoke => {
                let request = pb::CreateKeyRequest {
                    account: BENCH_ACCOUNT.to_owned(),
                    environment: BENCH_ENVIRONMENT.to_owned(),
                    scopes: vec![GRANTED_SCOPE.to_owned()],
                    ..Default::default()
                };
                frame_call(&request, ExpectedAnswer::Any)
            }
        }
    }

    /// Makes the ids of keys for a load that revokes each once.
    ///
    /// # Errors
    /// When the server refuses.
    pub(super) async fn prepare_revocations(
        session: &ApiClient,
        count: u64,
    ) -> Result<Vec<PreparedCall>, CliError> {
        let mut calls = Vec::new();
        let mut page_token = String::new();
        while (calls.len() as u64) < count {
            let request = pb::ListKeysRequest {
                account: BENCH_ACCOUNT.to_owned(),
                states: vec![pb::KeyState::Active as i32],
                page_size: Some(1000),
                page_token,
                ..Default::default()
            };
            let page = session
                .call_keys(DefaultTimeout::Quick, request, async |mut client, request| {
                    client.list(request).await
                })
                .await?;
            for key in page.keys {
                let request = pb::RevokeKeyRequest { id: key.id, ..Default::default() };
                calls.push(frame_call(&request, ExpectedAnswer::Any));
            }
            page_token = page.next_page_token;
            if page_token.is_empty() {
                break;
            }
        }
        calls.truncate(usize::try_from(count).unwrap_or(usize::MAX));
        Ok(calls)
    }
}

/// A message in gRPC's frame.
pub(super) fn frame_call(message: &impl Message, answer: ExpectedAnswer) -> PreparedCall {
    let length = message.encoded_len();
    let mut framed = BytesMut::with_capacity(length + 5);
    framed.put_u8(0);
    framed.put_u32(u32::try_from(length).unwrap_or(u32::MAX));
    // The buffer grows as it must.
    let _ = message.encode(&mut framed);
    PreparedCall { message: framed.freeze(), expected: answer }
}

fn envoy_check_request(token: &str, scope: &str) -> envoy::EnvoyCheckRequest {
    let pair = |key: &'static str, value: String| envoy::EnvoyMapEntry {
        key: Bytes::from_static(key.as_bytes()),
        value: Bytes::from(value),
    };
    let http = envoy::EnvoyHttpRequest {
        method: Bytes::from_static(b"GET"),
        path: Bytes::from_static(b"/v1/monitors"),
        host: Bytes::from_static(b"api.example.com"),
        headers: vec![
            pair("authorization", format!("Bearer {token}")),
            pair("user-agent", "keyward-bench".to_owned()),
            pair("accept", "*/*".to_owned()),
        ],
        ..Default::default()
    };
    let request = envoy::EnvoyRequest { http: Some(http) };
    let context_extensions =
        vec![pair("scope", scope.to_owned()), pair("environment", BENCH_ENVIRONMENT.to_owned())];
    let attributes =
        envoy::EnvoyAttributeContext { request: Some(request), context_extensions, ..Default::default() };
    envoy::EnvoyCheckRequest { attributes: Some(attributes) }
}

/// Revokes every key of the load's account.
///
/// # Errors
/// When the server refuses.
pub(super) async fn revoke_all(session: &ApiClient) -> Result<(), CliError> {
    loop {
        let request = pb::BulkRevokeKeysRequest {
            account: BENCH_ACCOUNT.to_owned(),
            reason: pb::RevokeReason::NoLongerNeeded as i32,
            comment: "keys of a load test".to_owned(),
            ..Default::default()
        };
        let done = session
            .call_keys(DefaultTimeout::Propagation, request, async |mut client, request| {
                client.bulk_revoke(request).await
            })
            .await?;
        if !done.more {
            return Ok(());
        }
    }
}
