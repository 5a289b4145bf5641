//! What every gRPC server is expected to have: health, reflection, and errors that say what they are.

use keyward::pb;
use tonic::Code;
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};
use tonic_reflection::pb::{v1, v1alpha};

use crate::support::{
    Server, assert_refused, error_reason, named_key_request, scope_check_request, service_key_request,
};

#[tokio::test(flavor = "multi_thread")]
async fn health_is_told_of_the_server_and_each_of_its_services_without_a_credential() {
    let server = Server::start().await;
    let mut health = HealthClient::new(server.channel());
    for service in [
        "",
        "keyward.v1.AuthzService",
        "keyward.v1.KeyService",
        "keyward.v1.AccountService",
        "keyward.v1.AuditService",
    ] {
        let answer = health.check(HealthCheckRequest { service: service.into() }).await.unwrap();
        assert_eq!(answer.into_inner().status(), ServingStatus::Serving, "{service:?}");
    }
    let unknown = health.check(HealthCheckRequest { service: "keyward.v1.Nothing".into() }).await;
    assert_eq!(unknown.unwrap_err().code(), Code::NotFound);
}

const SERVICES: [&str; 8] = [
    "envoy.service.auth.v3.Authorization",
    "grpc.health.v1.Health",
    "grpc.reflection.v1.ServerReflection",
    "grpc.reflection.v1alpha.ServerReflection",
    "keyward.v1.AccountService",
    "keyward.v1.AuditService",
    "keyward.v1.AuthzService",
    "keyward.v1.KeyService",
];

/// Holds that a version of reflection lists the services and gives files for symbols.
macro_rules! reflects {
    ($version:ident, $own:literal) => {{
        use $version::{
            ServerReflectionRequest, server_reflection_client::ServerReflectionClient,
            server_reflection_request::MessageRequest, server_reflection_response::MessageResponse,
        };
        let server = Server::start().await;
        let mut client = ServerReflectionClient::new(server.channel());
        let symbols = [
            "keyward.v1.KeyService",
            "keyward.v1.CheckResponse",
            "keyward.v1.Reason",
            "google.rpc.ErrorInfo",
            "google.rpc.BadRequest",
            "grpc.health.v1.Health",
        ];
        let mut asked = vec![MessageRequest::ListServices(String::new())];
        asked.extend(symbols.map(|symbol| MessageRequest::FileContainingSymbol(symbol.to_owned())));
        let requests = asked.into_iter().map(|message_request| ServerReflectionRequest {
            host: String::new(),
            message_request: Some(message_request),
        });
        let requests = futures_util::stream::iter(requests.collect::<Vec<_>>());
        let mut answers = client.server_reflection_info(requests).await.unwrap().into_inner();
        let first = answers.message().await.unwrap().unwrap().message_response.unwrap();
        let MessageResponse::ListServicesResponse(list) = first else { panic!("{first:?}") };
        let mut names: Vec<_> = list.service.into_iter().map(|service| service.name).collect();
        names.sort();
        // Each version lists itself.
        let expected: Vec<_> =
            SERVICES.into_iter().filter(|name| !name.contains("reflection") || name.contains($own)).collect();
        names.retain(|name| !name.contains("reflection") || name.contains($own));
        assert_eq!(names, expected);
        for symbol in symbols {
            let answer = answers.message().await.unwrap().unwrap().message_response.unwrap();
            let MessageResponse::FileDescriptorResponse(files) = answer else {
                panic!("{symbol}: {answer:?}")
            };
            assert!(!files.file_descriptor_proto.is_empty(), "{symbol}");
        }
    }};
}

#[tokio::test(flavor = "multi_thread")]
async fn reflection_v1_lists_the_services_and_knows_their_messages() {
    reflects!(v1, ".v1.");
}

#[tokio::test(flavor = "multi_thread")]
async fn reflection_v1alpha_does_too_for_older_clients() {
    reflects!(v1alpha, ".v1alpha.");
}

/// Holds that a version of reflection answers what it does not know, and then what it knows.
macro_rules! answers_unknown_names {
    ($version:ident) => {{
        use $version::{
            ExtensionRequest, ServerReflectionRequest, server_reflection_client::ServerReflectionClient,
            server_reflection_request::MessageRequest, server_reflection_response::MessageResponse,
        };
        let server = Server::start().await;
        let extension = ExtensionRequest { containing_type: "keyward.v1.Key".into(), extension_number: 7 };
        let asked = [
            Some(MessageRequest::FileContainingSymbol("no.Such".into())),
            Some(MessageRequest::FileByFilename("no/such.proto".into())),
            Some(MessageRequest::FileContainingExtension(extension)),
            None,
            Some(MessageRequest::FileContainingSymbol("keyward.v1.Key.id".into())),
            Some(MessageRequest::AllExtensionNumbersOfType("keyward.v1.Key".into())),
        ];
        let requests =
            asked.map(|message_request| ServerReflectionRequest { host: "here".to_owned(), message_request });
        let mut client = ServerReflectionClient::new(server.channel());
        let requests = futures_util::stream::iter(requests);
        let mut answers = client.server_reflection_info(requests).await.unwrap().into_inner();
        for code in [Code::NotFound, Code::NotFound, Code::NotFound, Code::InvalidArgument] {
            let answer = answers.message().await.unwrap().unwrap();
            assert_eq!((answer.valid_host.as_str(), answer.original_request.is_some()), ("here", true));
            let Some(MessageResponse::ErrorResponse(error)) = answer.message_response else {
                panic!("{code}: {answer:?}")
            };
            assert_eq!(error.error_code, i32::from(code), "{error:?}");
            assert!(!error.error_message.is_empty());
        }
        let known = answers.message().await.unwrap().unwrap().message_response;
        assert!(matches!(known, Some(MessageResponse::FileDescriptorResponse(_))), "{known:?}");
        let numbers = answers.message().await.unwrap().unwrap().message_response;
        assert!(matches!(numbers, Some(MessageResponse::AllExtensionNumbersResponse(_))), "{numbers:?}");
        assert_eq!(answers.message().await.unwrap(), None);
    }};
}

#[tokio::test(flavor = "multi_thread")]
async fn reflection_answers_names_that_it_does_not_know_and_keeps_the_stream() {
    answers_unknown_names!(v1);
    answers_unknown_names!(v1alpha);
}

#[tokio::test(flavor = "multi_thread")]
async fn every_refusal_carries_a_stable_reason_of_the_domain_keyward() {
    let server = Server::with_accounts().await;
    let root = server.root_client();
    let made = server.create_key(named_key_request("acme", "CI")).await;
    let manager = server.client_with_scopes("acme", &["keyward:*"]).await;
    root.revoke(&made.id).await.unwrap();
    server.create_key(named_key_request("acme", "taken")).await;
    let fresh = pb::CheckRequest { min_revision: Some(u64::MAX), ..scope_check_request("x", "a") };
    assert_refused(root.get("x").await, Code::InvalidArgument, "INVALID_REQUEST");
    assert_refused(root.get(&made.id.replace('0', "1")).await, Code::NotFound, "KEY_NOT_FOUND");
    assert_refused(root.suspend("nowhere").await, Code::NotFound, "ACCOUNT_NOT_FOUND");
    assert_refused(
        root.create(named_key_request("acme", "taken")).await,
        Code::AlreadyExists,
        "KEY_NAME_TAKEN",
    );
    assert_refused(root.enable(&made.id).await, Code::FailedPrecondition, "KEY_REVOKED");
    assert_refused(root.suspend("keyward").await, Code::FailedPrecondition, "OPERATOR_ACCOUNT");
    assert_refused(manager.suspend("acme").await, Code::PermissionDenied, "OPERATOR_ONLY");
    assert_refused(
        manager.create(service_key_request("acme", &["*"])).await,
        Code::PermissionDenied,
        "GRANT_BEYOND_CALLER",
    );
    assert_refused(server.client_without_token().get("x").await, Code::Unauthenticated, "UNAUTHENTICATED");
    assert_refused(root.check(fresh).await, Code::Unavailable, "STALE");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_path_that_is_no_rpc_says_so() {
    let server = Server::start().await;
    let root = server.root_client();
    for path in ["keyward.v1.KeyService/Nothing", "keyward.v1.Nothing/Get", "keyward.v2.KeyService/Get"] {
        assert_refused(root.call_rpc(path, ()).await, Code::Unimplemented, "NO_SUCH_RPC");
        assert_refused(
            server.client_without_token().call_rpc(path, ()).await,
            Code::Unimplemented,
            "NO_SUCH_RPC",
        );
    }
}

/// A message whose first field is a number, where every one of ours has a text or a message.
#[derive(Clone, PartialEq, prost::Message)]
struct WrongTypeMessage {
    #[prost(uint64, tag = "1")]
    number: u64,
}

#[tokio::test(flavor = "multi_thread")]
async fn bytes_that_are_no_message_are_the_callers_fault_and_told_so() {
    let server = Server::start().await;
    let root = server.root_client();
    for method in
        ["keyward.v1.KeyService/Get", "keyward.v1.AuthzService/Check", "keyward.v1.AuditService/List"]
    {
        let status = root.call_rpc(method, WrongTypeMessage { number: 1 }).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument, "{method}: {status:?}");
        assert_eq!(error_reason(&status), "UNREADABLE_REQUEST", "{method}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_compression_that_is_not_spoken_is_told_with_a_reason() {
    let server = Server::start().await;
    let brotli = server.root_client().with_header("grpc-encoding", "br");
    let asked = crate::support::scope_check_request("kw_live_x", "monitors:read");
    for status in [brotli.who_am_i().await.unwrap_err(), brotli.check(asked).await.unwrap_err()] {
        assert_eq!(status.code(), Code::Unimplemented, "{status:?}");
        assert_eq!(error_reason(&status), "UNKNOWN_ENCODING");
        assert_eq!(status.metadata().get("grpc-accept-encoding").unwrap(), "identity,gzip");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn fields_of_newer_clients_are_passed_over() {
    #[derive(Clone, PartialEq, prost::Message)]
    struct Newer {
        #[prost(string, tag = "1000")]
        text: String,
    }
    let server = Server::start().await;
    let newer = Newer { text: "x".into() };
    server.root_client().call_rpc("keyward.v1.KeyService/WhoAmI", newer).await.unwrap();
}
