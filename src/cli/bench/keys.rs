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
    Mode,
    load::{Call, Expected},
};
use crate::{
    cli::{
        client::{Patience, Session},
        failure::Failure,
    },
    clock::{SystemEntropy, random},
    domain::{
        name::{TokenPrefix, TokenTag},
        token::Token,
    },
    pb::{self, envoy_request as envoy},
};

/// The account of the load's keys.
pub(super) const ACCOUNT: &str = "bench";
const SCOPE: &str = "monitors:read";
const LACKING: &str = "monitors:write";
const ENVIRONMENT: &str = "production";
/// How many keys an Import takes.
const BATCH: u64 = 1000;
/// How many Imports are under way at once: while one is written, the next is made ready.
const IMPORTS: usize = 4;
/// How many different calls a load has at the most; it goes round.
const CALLS: u64 = 65_536;

/// The keys of one run.
pub(super) struct Keys {
    secret: [u8; 32],
    prefix: TokenPrefix,
    tag: TokenTag,
    count: u64,
}

/// Of how many calls in a hundred the token is unknown, or lacks the scope.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Shares {
    pub(super) unknown: f64,
    pub(super) denied: f64,
}

impl Keys {
    /// Makes `count` keys on the server, in an account of theirs.
    ///
    /// # Errors
    /// When the server refuses.
    pub(super) async fn make(
        session: &Session,
        count: u64,
        mut each: impl FnMut(u64),
    ) -> Result<Keys, Failure> {
        let secret = random(&SystemEntropy).map_err(|error| Failure::usage(error.to_string()))?;
        let prefix = TokenPrefix::parse("kw").map_err(|error| Failure::usage(error.to_string()))?;
        let tag = TokenTag::parse("live").map_err(|error| Failure::usage(error.to_string()))?;
        let keys = Keys { secret, prefix, tag, count };
        let account = pb::CreateAccountRequest { id: ACCOUNT.to_owned(), ..Default::default() };
        let made = session
            .accounts(Patience::Short, account, async |mut client, request| {
                match client.create(request).await {
                    Err(status) if status.code() == tonic::Code::AlreadyExists => {
                        Ok(tonic::Response::new(pb::CreateAccountResponse::default()))
                    }
                    made => made,
                }
            })
            .await;
        made?;
        let firsts = (0..count).step_by(usize::try_from(BATCH).unwrap_or(1));
        let imports = firsts.map(|first| keys.import(session, first..count.min(first + BATCH)));
        let mut imports = stream::iter(imports).buffer_unordered(IMPORTS);
        while let Some(made) = imports.next().await {
            each(made?);
        }
        drop(imports);
        Ok(keys)
    }

    /// Makes some of them; gives how many.
    async fn import(&self, session: &Session, numbers: Range<u64>) -> Result<u64, Failure> {
        let request = pb::ImportKeysRequest { keys: numbers.map(|number| self.key(number)).collect() };
        let count = request.keys.len() as u64;
        let done = session
            .keys(Patience::Propagation, request, async |mut client, request| client.import(request).await)
            .await?;
        match done.results.iter().find(|result| !result.error.is_empty()) {
            Some(refused) => {
                Err(Failure::refused(format!("a key of the load was refused: {}", refused.message)))
            }
            None => Ok(count),
        }
    }

    fn key(&self, number: u64) -> pb::ImportKey {
        let token = self.token(number);
        pb::ImportKey {
            account: ACCOUNT.to_owned(),
            environment: ENVIRONMENT.to_owned(),
            scopes: vec![SCOPE.to_owned()],
            sha256: token.digest().as_bytes().to_vec(),
            hint: token.hint(),
            ..Default::default()
        }
    }

    fn token(&self, number: u64) -> Token {
        let random = Sha256::new().chain_update(self.secret).chain_update(number.to_be_bytes()).finalize();
        Token::generate(&self.prefix, &self.tag, &random.into())
    }

    fn check(&self, number: u64, scope: &str) -> pb::CheckRequest {
        pb::CheckRequest {
            token: self.token(number).reveal().to_owned(),
            environment: ENVIRONMENT.to_owned(),
            scopes: vec![scope.to_owned()],
            ..Default::default()
        }
    }

    /// The calls of a load; `batch` = Checks in a BatchCheck.
    pub(super) fn calls(&self, mode: Mode, shares: Shares, batch: u64) -> Vec<Call> {
        let count = match mode {
            Mode::Batch => (CALLS / batch.max(1)).max(1),
            _ => CALLS,
        };
        (0..count).map(|at| self.call(mode, at, shares, batch)).collect()
    }

    fn call(&self, mode: Mode, at: u64, shares: Shares, batch: u64) -> Call {
        // Spread over the keys, so that a call's key is not in a processor's cache by chance.
        let number = |at: u64| at.wrapping_mul(0x9e37_79b9_7f4a_7c15) % self.count.max(1);
        let part = (at % 1000) as f64 / 10.0;
        let (number, scope, allowed) = if part < shares.unknown {
            (self.count + number(at) + 1, SCOPE, false)
        } else if part < shares.unknown + shares.denied {
            (number(at), LACKING, false)
        } else {
            (number(at), SCOPE, true)
        };
        match mode {
            Mode::Check | Mode::Stream | Mode::Overload => {
                call(&self.check(number, scope), Expected::First(allowed))
            }
            Mode::Batch => {
                let keys = (0..batch).map(|more| at * batch + more);
                let checks = keys.map(|at| {
                    let key = at.wrapping_mul(0x9e37_79b9_7f4a_7c15) % self.count.max(1);
                    self.check(key, SCOPE)
                });
                call(&pb::BatchCheckRequest { checks: checks.collect() }, Expected::Any)
            }
            Mode::ExtAuthz => call(&envoy_asks(self.token(number).reveal(), scope), Expected::Envoy(allowed)),
            Mode::Create | Mode::Revoke => {
                let request = pb::CreateKeyRequest {
                    account: ACCOUNT.to_owned(),
                    environment: ENVIRONMENT.to_owned(),
                    scopes: vec![SCOPE.to_owned()],
                    ..Default::default()
                };
                call(&request, Expected::Any)
            }
        }
    }

    /// Makes the ids of keys for a load that revokes each once.
    ///
    /// # Errors
    /// When the server refuses.
    pub(super) async fn revocations(session: &Session, count: u64) -> Result<Vec<Call>, Failure> {
        let mut calls = Vec::new();
        let mut page_token = String::new();
        while (calls.len() as u64) < count {
            let request = pb::ListKeysRequest {
                account: ACCOUNT.to_owned(),
                states: vec![pb::KeyState::Active as i32],
                page_size: Some(1000),
                page_token,
                ..Default::default()
            };
            let page = session
                .keys(Patience::Short, request, async |mut client, request| client.list(request).await)
                .await?;
            for key in page.keys {
                let request = pb::RevokeKeyRequest { id: key.id, ..Default::default() };
                calls.push(call(&request, Expected::Any));
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
pub(super) fn call(message: &impl Message, answer: Expected) -> Call {
    let length = message.encoded_len();
    let mut framed = BytesMut::with_capacity(length + 5);
    framed.put_u8(0);
    framed.put_u32(u32::try_from(length).unwrap_or(u32::MAX));
    // The buffer grows as it must.
    let _ = message.encode(&mut framed);
    Call { message: framed.freeze(), answer }
}

fn envoy_asks(token: &str, scope: &str) -> envoy::CheckRequest {
    let pair = |key: &'static str, value: String| envoy::Pair {
        key: Bytes::from_static(key.as_bytes()),
        value: Bytes::from(value),
    };
    let http = envoy::HttpRequest {
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
    let request = envoy::Request { http: Some(http) };
    let context_extensions =
        vec![pair("scope", scope.to_owned()), pair("environment", ENVIRONMENT.to_owned())];
    let attributes =
        envoy::AttributeContext { request: Some(request), context_extensions, ..Default::default() };
    envoy::CheckRequest { attributes: Some(attributes) }
}

/// Revokes every key of the load's account.
///
/// # Errors
/// When the server refuses.
pub(super) async fn revoke_all(session: &Session) -> Result<(), Failure> {
    loop {
        let request = pb::BulkRevokeKeysRequest {
            account: ACCOUNT.to_owned(),
            reason: pb::RevokeReason::NoLongerNeeded as i32,
            comment: "keys of a load test".to_owned(),
            ..Default::default()
        };
        let done = session
            .keys(Patience::Propagation, request, async |mut client, request| {
                client.bulk_revoke(request).await
            })
            .await?;
        if !done.more {
            return Ok(());
        }
    }
}
