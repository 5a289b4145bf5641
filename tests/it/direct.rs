//! Checks go two ways: a short one for what is plainly in order, and the one of every other call. Who asks must not be
//! able to tell which it was; and what is answered at full load is what the policy says.

use std::net::IpAddr;

use futures_util::{StreamExt as _, stream};
use keyward::pb::{self, Reason};
use rand::{RngExt as _, SeedableRng as _, rngs::ChaCha8Rng, seq::IndexedRandom as _};
use tonic::{Code, Status};

use crate::support::{
    Client, Server, named_key_request, proto_seconds, scope_check_request, service_key_request, to_strings,
};

type CheckResult = Result<pb::CheckResponse, (Code, String, Vec<u8>)>;

async fn ask(client: &Client, question: &pb::CheckRequest) -> CheckResult {
    let told = |status: Status| (status.code(), status.message().to_owned(), status.details().to_vec());
    client.check(question.clone()).await.map_err(told)
}

/// Says what no service key is asked; and so each of its calls goes the long way.
fn forced_slow_path(client: &Client) -> Client {
    client.with_header("x-keyward-account", "keyward")
}

/// A token in each state, and strings that are none.
async fn tokens(server: &Server) -> Vec<String> {
    let root = server.root_client();
    let mut tokens = to_strings(&["", "kw_live_garbage", "somebody else's", "sk_unknown"]);
    for name in ["active", "revoked", "disabled", "expired"] {
        let ttl = (name == "expired").then(|| proto_seconds(1));
        let made = server.create_key(pb::CreateKeyRequest { ttl, ..named_key_request("acme", name) }).await;
        match name {
            "revoked" => drop(root.revoke(&made.id).await.unwrap()),
            "disabled" => drop(root.disable(&made.id).await.unwrap()),
            _ => {}
        }
        tokens.push(made.token);
    }
    server.advance(1);
    tokens
}

#[tokio::test(flavor = "multi_thread")]
async fn the_short_way_and_the_long_way_answer_alike() {
    let server = Server::with_accounts().await;
    let (short, long) = (server.root_client(), forced_slow_path(&server.root_client()));
    let (mut allowed, mut refused) = (0, 0);
    for token in tokens(&server).await {
        for environment in ["production", "staging", "nowhere", ""] {
            for scopes in [&[][..], &["monitors:read"], &["monitors:read", "none:such"], &["no scope"]] {
                for account in [None, Some("acme"), Some("other"), Some("NO ID")] {
                    let question = pb::CheckRequest {
                        environment: environment.into(),
                        scopes: to_strings(scopes),
                        account: account.map(Into::into),
                        dry_run: true,
                        ..scope_check_request(&token, "monitors:read")
                    };
                    let answer = ask(&short, &question).await;
                    assert_eq!(answer, ask(&long, &question).await, "{environment} {scopes:?} {account:?}");
                    allowed += u32::from(answer.as_ref().is_ok_and(|answer| answer.allowed));
                    refused += u32::from(answer.is_err());
                }
            }
        }
    }
    assert!(allowed > 0 && refused > 0, "{allowed} allowed, {refused} refused");
}

#[tokio::test(flavor = "multi_thread")]
async fn callers_over_one_connection_are_told_apart_and_a_revoked_one_is_refused_at_its_next_call() {
    let server = Server::with_accounts().await;
    let subject = server.create_key(named_key_request("acme", "subject")).await;
    let question = scope_check_request(&subject.token, "monitors:read");
    let caller = server.create_key(service_key_request("acme", &["keyward:check"])).await;
    let other = server.create_key(service_key_request("other", &["keyward:check"])).await;
    let useless = server.create_key(service_key_request("acme", &["keyward:keys:read"])).await;
    let (caller_wire, other_wire) =
        (server.client_with_token(&caller.token), server.client_with_token(&other.token));
    let useless_wire = server.client_with_token(&useless.token);
    for _ in 0..3 {
        assert_eq!(ask(&caller_wire, &question).await.unwrap().reason(), Reason::Ok);
        // Of another account's keys an account's caller knows nothing.
        assert_eq!(ask(&other_wire, &question).await.unwrap().reason(), Reason::Unknown);
        assert_eq!(ask(&useless_wire, &question).await.unwrap_err().0, Code::PermissionDenied);
    }
    server.root_client().revoke(&caller.id).await.unwrap();
    assert_eq!(ask(&caller_wire, &question).await.unwrap_err().0, Code::Unauthenticated);
    assert_eq!(ask(&other_wire, &question).await.unwrap().reason(), Reason::Unknown);
    server.root_client().suspend("other").await.unwrap();
    assert_eq!(ask(&other_wire, &question).await.unwrap_err().0, Code::Unauthenticated);
}

const SCOPES: [&str; 4] = ["a:read", "a:write", "b:read", "c"];
const ENVIRONMENTS: [&str; 3] = ["production", "staging", "development"];
const CUSTOMERS: [&str; 2] = ["c1", "c2"];
const ADDRESSES: [&str; 2] = ["10.1.2.3", "192.0.2.7"];

/// A key, and what it is for.
struct KeyUnderTest {
    token: String,
    request: pb::CreateKeyRequest,
    revoked: bool,
}

fn random_subset<'a>(random: &mut ChaCha8Rng, from: &[&'a str]) -> Vec<&'a str> {
    from.iter().copied().filter(|_| random.random()).collect()
}

fn random_key(random: &mut ChaCha8Rng, number: usize) -> pb::CreateKeyRequest {
    let networks = random_subset(random, &["10.0.0.0/8"]);
    pb::CreateKeyRequest {
        environment: (*ENVIRONMENTS.choose(random).unwrap()).into(),
        scopes: to_strings(&[&["d"], &random_subset(random, &SCOPES)[..]].concat()),
        customers: to_strings(&random_subset(random, &CUSTOMERS)),
        allowed_cidrs: to_strings(&networks),
        ..named_key_request("acme", &format!("key {number}"))
    }
}

fn random_check(random: &mut ChaCha8Rng, token: &str) -> pb::CheckRequest {
    pb::CheckRequest {
        environment: (*ENVIRONMENTS.choose(random).unwrap()).into(),
        scopes: to_strings(&[SCOPES.choose(random).unwrap()]),
        customer: random.random::<bool>().then(|| (*CUSTOMERS.choose(random).unwrap()).into()),
        client_ip: Some((*ADDRESSES.choose(random).unwrap()).into()),
        ..scope_check_request(token, "a:read")
    }
}

/// The policy, as the documents say it.
fn allowed(subject: &KeyUnderTest, question: &pb::CheckRequest) -> bool {
    let key = &subject.request;
    let inside = |ip: &String| matches!(ip.parse(), Ok(IpAddr::V4(ip)) if ip.octets()[0] == 10);
    !subject.revoked
        && key.environment == question.environment
        && question.scopes.iter().all(|scope| key.scopes.contains(scope))
        && (key.customers.is_empty()
            || question.customer.as_ref().is_some_and(|customer| key.customers.contains(customer)))
        && (key.allowed_cidrs.is_empty() || question.client_ip.as_ref().is_some_and(inside))
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_answered_at_full_load_is_what_the_policy_says() {
    let server = Server::with_accounts().await;
    let random = &mut ChaCha8Rng::seed_from_u64(7);
    let mut subjects = Vec::new();
    for number in 0..100 {
        let request = random_key(random, number);
        let made = server.create_key(request.clone()).await;
        let revoked = number % 10 == 0;
        if revoked {
            server.root_client().revoke(&made.id).await.unwrap();
        }
        subjects.push(KeyUnderTest { token: made.token, request, revoked });
    }
    let asked: Vec<_> = (0..4000)
        .map(|_| {
            let subject = subjects.choose(random).unwrap();
            (subject, random_check(random, &subject.token))
        })
        .collect();
    // As many connections as callers, each of which always has a question.
    let callers: Vec<_> = std::iter::repeat_with(|| server.root_client()).take(8).collect();
    let answers = stream::iter(asked.iter().enumerate()).map(|(at, (subject, question))| {
        let caller = &callers[at % callers.len()];
        async move { (allowed(subject, question), ask(caller, question).await.unwrap().allowed) }
    });
    let answers: Vec<_> = answers.buffer_unordered(128).collect().await;
    assert!(answers.iter().all(|(expected, answer)| expected == answer));
    let allowed = answers.iter().filter(|(_, answer)| *answer).count();
    assert!((40..3960).contains(&allowed), "{allowed} of {} were allowed", answers.len());
}
