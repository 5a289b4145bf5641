//! What is there before the run begins: the account, live keys that nobody changes, and questions that must never be
//! allowed.

use std::{sync::Arc, time::Duration};

use keyward::{
    domain::{
        name::{TokenPrefix, TokenTag},
        token::Token,
    },
    pb,
};

use crate::{
    checkers::CheckTargets,
    dice::ScheduleRng,
    key_lives::{ACCOUNT, EVERYTHING, PRODUCTION, READ, WRITE, key},
    process::AuthorizedClients,
    shared_state::{CheckTarget, SharedState},
};

/// So many live keys.
const KEYS: usize = 24;
/// So many tokens that nobody issued.
const UNISSUED_TOKENS: usize = 8;

/// Makes all of it through the first replica.
pub(crate) async fn create_targets(
    field: &SharedState,
    squads: usize,
    dice: &mut ScheduleRng,
) -> CheckTargets {
    let mut operator = field.operator().swap_remove(0);
    let account = pb::CreateAccountRequest { id: ACCOUNT.to_owned(), ..Default::default() };
    retry_until_ok(async || operator.clone().accounts.create(account.clone()).await).await;
    let scopes = vec![READ.to_owned(), WRITE.to_owned()];
    let role = pb::PutRoleRequest { account: ACCOUNT.to_owned(), name: EVERYTHING.to_owned(), scopes };
    retry_until_ok(async || operator.clone().accounts.put_role(role.clone()).await).await;
    let mut stock = Vec::new();
    for _ in 0..KEYS {
        stock.push(Arc::new(create_live_key(field, &mut operator).await));
    }
    let never = unissued_tokens(field, dice).chain(ungranted_checks(field, &stock)).map(Arc::new).collect();
    CheckTargets::new(squads, stock, never)
}

async fn create_live_key(field: &SharedState, operator: &mut AuthorizedClients) -> CheckTarget {
    let request = key(ACCOUNT, &[WRITE], &[]);
    let made: pb::CreateKeyResponse =
        retry_until_ok(async || operator.clone().keys.create(request.clone()).await).await;
    let id = made.key.expect("a key").id;
    field.records().keys.insert(id.clone(), Some(pb::KeyState::Active));
    CheckTarget {
        id: field.history().new_token(&id, made.revision, &[]),
        key: id,
        token: made.token,
        environment: PRODUCTION,
        scope: WRITE,
        account: None,
        since: made.revision,
    }
}

/// Well-formed tokens that were never issued.
fn unissued_tokens(field: &SharedState, dice: &mut ScheduleRng) -> impl Iterator<Item = CheckTarget> {
    let (prefix, tag) = (TokenPrefix::parse("kw").unwrap(), TokenTag::parse("live").unwrap());
    (0..UNISSUED_TOKENS).map(move |_| {
        let mut random = [0; 32];
        random[..8].copy_from_slice(&dice.below(u64::MAX).to_be_bytes());
        CheckTarget {
            id: field.history().new_forbidden_token("a token that was never issued"),
            key: String::new(),
            token: Token::generate(&prefix, &tag, &random).reveal().to_owned(),
            environment: PRODUCTION,
            scope: WRITE,
            account: None,
            since: 0,
        }
    })
}

/// Questions about live keys that ask for what they were not given.
fn ungranted_checks(field: &SharedState, stock: &[Arc<CheckTarget>]) -> impl Iterator<Item = CheckTarget> {
    let never =
        |name, asked: CheckTarget| CheckTarget { id: field.history().new_forbidden_token(name), ..asked };
    let of = |at: usize| (*stock[at]).clone();
    [
        never("a scope that was never granted", CheckTarget { scope: "monitors:delete", ..of(0) }),
        never("another environment", CheckTarget { environment: "staging", ..of(1) }),
        never("another account", CheckTarget { account: Some("keyward".to_owned()), ..of(2) }),
    ]
    .into_iter()
}

/// Sends it until it is OK: replicas may still be on their way.
async fn retry_until_ok<T>(call: impl AsyncFn() -> Result<tonic::Response<T>, tonic::Status>) -> T {
    let mut last = None;
    for _ in 0..600 {
        match call().await {
            Ok(response) => return response.into_inner(),
            Err(status) => last = Some(status),
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("nothing can be made before the run: {last:?}");
}
