//! AuthzService.StreamCheck: answers in the order of the questions, and streams that end with their caller's rights.

use futures_util::{StreamExt as _, stream};
use keyward::pb::{self, Reason};
use tokio::sync::mpsc;
use tonic::{Code, Status, Streaming};

use crate::{
    process::{KeywardProcess, check_request, plain_key_request, wait_for},
    support::{
        Client, Server, assert_invalid, assert_refused, authenticate_request, named_key_request,
        scope_check_request, service_key_request,
    },
};

/// A stream on which questions can be asked one after the other.
struct CheckStream {
    questions: mpsc::UnboundedSender<pb::CheckRequest>,
    answers: Streaming<pb::CheckResponse>,
}

impl CheckStream {
    async fn open(client: &Client) -> Result<CheckStream, Status> {
        let (questions, asked) = mpsc::unbounded_channel();
        let asked = stream::unfold(asked, |mut asked| async { Some((asked.recv().await?, asked)) });
        let answers = client.authz().stream_check(asked).await?.into_inner();
        Ok(CheckStream { questions, answers })
    }

    async fn ask(&mut self, question: pb::CheckRequest) -> Result<pb::CheckResponse, Status> {
        self.questions.send(question).unwrap();
        self.answers.next().await.unwrap()
    }

    /// With what it ends when nothing is asked.
    async fn end(mut self) -> Status {
        self.answers.next().await.unwrap().unwrap_err()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn answers_come_in_the_order_of_the_questions_and_are_those_of_a_check() {
    let server = Server::with_accounts().await;
    let root = server.root_client();
    let live = server.create_key(named_key_request("acme", "live")).await;
    let revoked = server.create_key(named_key_request("acme", "revoked")).await;
    root.revoke(&revoked.id).await.unwrap();
    let kinds = [
        scope_check_request(&live.token, "monitors:read"),
        scope_check_request(&revoked.token, "monitors:read"),
        scope_check_request("sk-123", "monitors:read"),
        scope_check_request(&live.token, "monitors:write"),
    ];
    let questions: Vec<_> = (0..1000).map(|at| kinds[at * 7 % kinds.len()].clone()).collect();
    let answers = root.authz().stream_check(stream::iter(questions.clone())).await.unwrap().into_inner();
    let answers: Vec<_> = answers.map(Result::unwrap).collect().await;
    assert_eq!(answers.len(), questions.len());
    for (question, answer) in questions.into_iter().zip(answers).take(kinds.len()) {
        assert_eq!(root.check(question).await.unwrap(), answer);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_ends_when_its_caller_is_revoked_with_a_question_and_without() {
    let server = Server::with_accounts().await;
    let live = server.create_key(named_key_request("acme", "live")).await;
    let manager = server.create_key(service_key_request("acme", &["keyward:check"])).await;
    let caller = server.client_with_token(&manager.token);
    let (mut asked, idle) =
        (CheckStream::open(&caller).await.unwrap(), CheckStream::open(&caller).await.unwrap());
    assert!(asked.ask(authenticate_request(&live.token)).await.unwrap().allowed);
    server.root_client().revoke(&manager.id).await.unwrap();
    assert_refused(
        asked.ask(authenticate_request(&live.token)).await,
        Code::Unauthenticated,
        "UNAUTHENTICATED",
    );
    assert_refused(Err::<(), _>(idle.end().await), Code::Unauthenticated, "UNAUTHENTICATED");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_ends_when_its_caller_may_not_ask_any_more() {
    let server = Server::with_accounts().await;
    let (root, live) = (server.root_client(), server.create_key(named_key_request("acme", "live")).await);
    let mut manager = server.create_key(service_key_request("acme", &["keyward:check"])).await;
    let mut asking = CheckStream::open(&server.client_with_token(&manager.token)).await.unwrap();
    assert!(asking.ask(authenticate_request(&live.token)).await.unwrap().allowed);
    manager.key.scopes = vec!["keyward:keys:read".to_owned()];
    root.update(&manager.key, &["scopes"]).await.unwrap();
    let ended = asking.ask(authenticate_request(&live.token)).await.unwrap_err();
    assert_eq!(ended.code(), Code::PermissionDenied, "{ended:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn each_question_is_a_call_of_the_callers_limits() {
    let server = Server::with_accounts().await;
    let live = server.create_key(named_key_request("acme", "live")).await;
    let limit =
        pb::RateLimit { name: "calls".into(), limit: 3, window: Some(crate::support::proto_seconds(3600)) };
    let limited =
        pb::CreateKeyRequest { rate_limits: vec![limit], ..service_key_request("acme", &["keyward:check"]) };
    let caller = server.create_key(limited).await;
    let mut asking = CheckStream::open(&server.client_with_token(&caller.token)).await.unwrap();
    for _ in 0..3 {
        assert!(asking.ask(authenticate_request(&live.token)).await.unwrap().allowed);
    }
    let ended = asking.ask(authenticate_request(&live.token)).await.unwrap_err();
    assert_eq!(ended.code(), Code::ResourceExhausted, "{ended:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn questions_about_a_key_with_limits_are_answered_in_their_turn_and_charged_once() {
    let server = Server::with_accounts().await;
    let live = server.create_key(named_key_request("acme", "live")).await;
    let limit =
        pb::RateLimit { name: "calls".into(), limit: 2, window: Some(crate::support::proto_seconds(3600)) };
    let limited = server
        .create_key(pb::CreateKeyRequest { rate_limits: vec![limit], ..named_key_request("acme", "limited") })
        .await;
    let caller = server.create_key(service_key_request("acme", &["keyward:check"])).await;
    let questions: Vec<_> = [&live, &limited, &limited, &live, &limited, &live]
        .map(|key| authenticate_request(&key.token))
        .into();
    let asked = server.client_with_token(&caller.token).authz().stream_check(stream::iter(questions)).await;
    let answers: Vec<_> = asked.unwrap().into_inner().map(|answer| answer.unwrap().reason()).collect().await;
    let (ok, limited_now) = (Reason::Ok, Reason::RateLimited);
    assert_eq!(answers, [ok, ok, ok, ok, limited_now, ok]);
    for (id, allowed, denied) in [(&caller.id, 6, 0), (&limited.id, 2, 1), (&live.id, 3, 0)] {
        let request = pb::KeyUsageRequest { id: id.clone(), ..Default::default() };
        let usage = server.root_client().keys().usage(request).await.unwrap().into_inner();
        assert_eq!((usage.allowed, usage.denied), (allowed, denied));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_question_that_cannot_be_decided_ends_the_stream_after_the_answers_before_it() {
    let server = Server::with_accounts().await;
    let (root, live) = (server.root_client(), server.create_key(named_key_request("acme", "live")).await);
    for (bad, field) in [
        (pb::CheckRequest { environment: String::new(), ..authenticate_request(&live.token) }, "environment"),
        (
            pb::CheckRequest { scopes: vec!["a:b".repeat(6000)], ..authenticate_request(&live.token) },
            "(message)",
        ),
    ] {
        let mut asking = CheckStream::open(&root).await.unwrap();
        assert_eq!(asking.ask(authenticate_request(&live.token)).await.unwrap().reason(), Reason::Ok);
        assert_invalid(asking.ask(bad).await, &[field]);
        assert!(asking.answers.next().await.is_none());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn strangers_get_no_stream() {
    let server = Server::with_accounts().await;
    let opened = CheckStream::open(&server.client_without_token()).await.map(drop);
    assert_refused(opened, Code::Unauthenticated, "UNAUTHENTICATED");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_stops_ends_its_streams_and_says_so() {
    let mut server = KeywardProcess::start();
    let mut root = server.root_caller();
    root.create_account("acme").await;
    let (_, token) = root.create_key(plain_key_request()).await.unwrap();
    let asked = stream::iter([check_request(&token)]).chain(stream::pending());
    let mut answers = root.authz.stream_check(asked).await.unwrap().into_inner();
    assert!(answers.next().await.unwrap().unwrap().allowed);
    server.process.terminate();
    let ended = answers.next().await.unwrap().unwrap_err();
    assert_refused(Err::<(), _>(ended), Code::Unavailable, "STOPPING");
    wait_for("the server to end", || server.process.has_ended().then_some(()));
}
