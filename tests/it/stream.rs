//! AuthzService.StreamCheck: answers in the order of the questions, and streams that end with their caller's rights.

use futures_util::{StreamExt as _, stream};
use keyward::pb::{self, Reason};
use tokio::sync::mpsc;
use tonic::{Code, Status, Streaming};

use crate::{
    process::{Keyward, plain_key, question, wait_for},
    support::{Client, Server, authenticate, check, invalid, named_key, refused, service_key},
};

/// A stream on which questions can be asked one after the other.
struct Asking {
    questions: mpsc::UnboundedSender<pb::CheckRequest>,
    answers: Streaming<pb::CheckResponse>,
}

impl Asking {
    async fn open(client: &Client) -> Result<Asking, Status> {
        let (questions, asked) = mpsc::unbounded_channel();
        let asked = stream::unfold(asked, |mut asked| async { Some((asked.recv().await?, asked)) });
        let answers = client.authz().stream_check(asked).await?.into_inner();
        Ok(Asking { questions, answers })
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
    let root = server.root();
    let live = server.make(named_key("acme", "live")).await;
    let revoked = server.make(named_key("acme", "revoked")).await;
    root.revoke(&revoked.id).await.unwrap();
    let kinds = [
        check(&live.token, "monitors:read"),
        check(&revoked.token, "monitors:read"),
        check("sk-123", "monitors:read"),
        check(&live.token, "monitors:write"),
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
    let live = server.make(named_key("acme", "live")).await;
    let manager = server.make(service_key("acme", &["keyward:check"])).await;
    let caller = server.holder(&manager.token);
    let (mut asked, idle) = (Asking::open(&caller).await.unwrap(), Asking::open(&caller).await.unwrap());
    assert!(asked.ask(authenticate(&live.token)).await.unwrap().allowed);
    server.root().revoke(&manager.id).await.unwrap();
    refused(asked.ask(authenticate(&live.token)).await, Code::Unauthenticated, "UNAUTHENTICATED");
    refused(Err::<(), _>(idle.end().await), Code::Unauthenticated, "UNAUTHENTICATED");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_ends_when_its_caller_may_not_ask_any_more() {
    let server = Server::with_accounts().await;
    let (root, live) = (server.root(), server.make(named_key("acme", "live")).await);
    let mut manager = server.make(service_key("acme", &["keyward:check"])).await;
    let mut asking = Asking::open(&server.holder(&manager.token)).await.unwrap();
    assert!(asking.ask(authenticate(&live.token)).await.unwrap().allowed);
    manager.key.scopes = vec!["keyward:keys:read".to_owned()];
    root.update(&manager.key, &["scopes"]).await.unwrap();
    let ended = asking.ask(authenticate(&live.token)).await.unwrap_err();
    assert_eq!(ended.code(), Code::PermissionDenied, "{ended:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn each_question_is_a_call_of_the_callers_limits() {
    let server = Server::with_accounts().await;
    let live = server.make(named_key("acme", "live")).await;
    let limit = pb::RateLimit { name: "calls".into(), limit: 3, window: Some(crate::support::seconds(3600)) };
    let limited =
        pb::CreateKeyRequest { rate_limits: vec![limit], ..service_key("acme", &["keyward:check"]) };
    let caller = server.make(limited).await;
    let mut asking = Asking::open(&server.holder(&caller.token)).await.unwrap();
    for _ in 0..3 {
        assert!(asking.ask(authenticate(&live.token)).await.unwrap().allowed);
    }
    let ended = asking.ask(authenticate(&live.token)).await.unwrap_err();
    assert_eq!(ended.code(), Code::ResourceExhausted, "{ended:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn questions_about_a_key_with_limits_are_answered_in_their_turn_and_charged_once() {
    let server = Server::with_accounts().await;
    let live = server.make(named_key("acme", "live")).await;
    let limit = pb::RateLimit { name: "calls".into(), limit: 2, window: Some(crate::support::seconds(3600)) };
    let limited =
        server.make(pb::CreateKeyRequest { rate_limits: vec![limit], ..named_key("acme", "limited") }).await;
    let caller = server.make(service_key("acme", &["keyward:check"])).await;
    let questions: Vec<_> =
        [&live, &limited, &limited, &live, &limited, &live].map(|key| authenticate(&key.token)).into();
    let asked = server.holder(&caller.token).authz().stream_check(stream::iter(questions)).await;
    let answers: Vec<_> = asked.unwrap().into_inner().map(|answer| answer.unwrap().reason()).collect().await;
    let (ok, limited_now) = (Reason::Ok, Reason::RateLimited);
    assert_eq!(answers, [ok, ok, ok, ok, limited_now, ok]);
    for (id, allowed, denied) in [(&caller.id, 6, 0), (&limited.id, 2, 1), (&live.id, 3, 0)] {
        let request = pb::KeyUsageRequest { id: id.clone(), ..Default::default() };
        let usage = server.root().keys().usage(request).await.unwrap().into_inner();
        assert_eq!((usage.allowed, usage.denied), (allowed, denied));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_question_that_cannot_be_decided_ends_the_stream_after_the_answers_before_it() {
    let server = Server::with_accounts().await;
    let (root, live) = (server.root(), server.make(named_key("acme", "live")).await);
    for (bad, field) in [
        (pb::CheckRequest { environment: String::new(), ..authenticate(&live.token) }, "environment"),
        (pb::CheckRequest { scopes: vec!["a:b".repeat(6000)], ..authenticate(&live.token) }, "(message)"),
    ] {
        let mut asking = Asking::open(&root).await.unwrap();
        assert_eq!(asking.ask(authenticate(&live.token)).await.unwrap().reason(), Reason::Ok);
        invalid(asking.ask(bad).await, &[field]);
        assert!(asking.answers.next().await.is_none());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn strangers_get_no_stream() {
    let server = Server::with_accounts().await;
    let opened = Asking::open(&server.anonymous()).await.map(drop);
    refused(opened, Code::Unauthenticated, "UNAUTHENTICATED");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_stops_ends_its_streams_and_says_so() {
    let mut server = Keyward::start();
    let mut root = server.root();
    root.make_account("acme").await;
    let (_, token) = root.create(plain_key()).await.unwrap();
    let asked = stream::iter([question(&token)]).chain(stream::pending());
    let mut answers = root.authz.stream_check(asked).await.unwrap().into_inner();
    assert!(answers.next().await.unwrap().unwrap().allowed);
    server.process.terminate();
    let ended = answers.next().await.unwrap().unwrap_err();
    refused(Err::<(), _>(ended), Code::Unavailable, "STOPPING");
    wait_for("the server to end", || server.process.has_ended().then_some(()));
}
