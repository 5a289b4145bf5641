//! Requests that a client has compressed with gzip: every call takes them, within the limits of what they inflate to.

use std::io::Write as _;

use bytes::Bytes;
use flate2::{Compression, write::GzEncoder};
use http_body_util::{BodyExt as _, Full};
use keyward::pb::{self, envoy::service::auth::v3::check_response::HttpResponse};
use prost::Message;
use tonic::{Code, Status, body::Body};
use tower::ServiceExt as _;

use crate::support::{Server, error_reason, named_key_request, scope_check_request, service_key_request};

/// A message as gRPC frames it.
fn framed(flag: u8, message: &[u8]) -> Vec<u8> {
    [&[flag], &u32::try_from(message.len()).unwrap().to_be_bytes()[..], message].concat()
}

fn gzip(message: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::default());
    encoder.write_all(message).unwrap();
    framed(1, &encoder.finish().unwrap())
}

/// What a call with these bytes is answered: its messages, and how it ends.
async fn call(server: &Server, path: &str, encoding: &str, bytes: Vec<u8>) -> (Vec<Bytes>, Status) {
    let request = http::Request::post(format!("http://x/{path}"))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .header("grpc-encoding", encoding)
        .header("authorization", format!("Bearer {}", server.root_token))
        .body(Body::new(Full::new(Bytes::from(bytes))))
        .unwrap();
    let response = server.channel().oneshot(request).await.unwrap();
    let (parts, body) = response.into_parts();
    assert_eq!(parts.headers["grpc-accept-encoding"], "identity,gzip", "{path}");
    assert!(!parts.headers.contains_key("grpc-encoding"), "answers are not compressed");
    let body = body.collect().await.unwrap();
    let trailers = body.trailers().cloned().unwrap_or(parts.headers);
    let (mut rest, mut messages) = (body.to_bytes(), Vec::new());
    while !rest.is_empty() {
        let head = rest.split_to(5);
        assert_eq!(head[0], 0);
        messages.push(rest.split_to(u32::from_be_bytes([head[1], head[2], head[3], head[4]]) as usize));
    }
    (messages, Status::from_header_map(&trailers).unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn every_call_takes_compressed_requests() {
    let server = Server::with_accounts().await;
    let key = server.create_key(service_key_request("acme", &["monitors:read"])).await;
    let asked = scope_check_request(&key.token, "monitors:read");
    let batch = pb::BatchCheckRequest { checks: vec![asked.clone(); 3] };
    let made = named_key_request("acme", "compressed");
    let health = tonic_health::pb::HealthCheckRequest::default();
    for (path, message) in [
        ("keyward.v1.AuthzService/Check", asked.encode_to_vec()),
        ("keyward.v1.AuthzService/BatchCheck", batch.encode_to_vec()),
        ("keyward.v1.KeyService/Create", made.encode_to_vec()),
        ("keyward.v1.KeyService/WhoAmI", Vec::new()),
        ("keyward.v1.AuditService/List", Vec::new()),
        ("grpc.health.v1.Health/Check", health.encode_to_vec()),
    ] {
        let (answers, status) = call(&server, path, "gzip", gzip(&message)).await;
        assert_eq!((answers.len(), status.code()), (1, Code::Ok), "{path}: {status:?}");
        let (plain, status) = call(&server, path, "gzip", framed(0, &message)).await;
        // A second key of that name is refused.
        let created = path.ends_with("/Create");
        assert!(created || (plain.len(), status.code()) == (1, Code::Ok), "{path}, uncompressed: {status:?}");
    }
    // Envoy's question is read: what is wrong with it is not its encoding.
    let path = "envoy.service.auth.v3.Authorization/Check";
    let (_, status) = call(&server, path, "gzip", gzip(b"")).await;
    assert!(status.message().contains("attributes.request.http"), "{status:?}");
    let (answers, _) =
        call(&server, "keyward.v1.AuthzService/Check", "gzip", gzip(&asked.encode_to_vec())).await;
    assert_eq!(pb::CheckResponse::decode(answers[0].clone()).unwrap().reason(), pb::Reason::Ok);
}

#[tokio::test(flavor = "multi_thread")]
async fn messages_of_a_stream_may_be_compressed_each_for_itself() {
    let server = Server::with_accounts().await;
    let key = server.create_key(service_key_request("acme", &["monitors:read"])).await;
    let asked = scope_check_request(&key.token, "monitors:read").encode_to_vec();
    let three = [gzip(&asked), framed(0, &asked), gzip(&asked)].concat();
    let (answers, status) = call(&server, "keyward.v1.AuthzService/StreamCheck", "gzip", three).await;
    assert_eq!(status.code(), Code::Ok, "{status:?}");
    let reasons: Vec<_> =
        answers.into_iter().map(|answer| pb::CheckResponse::decode(answer).unwrap().reason()).collect();
    assert_eq!(reasons, [pb::Reason::Ok; 3]);
    let listed = tonic_reflection::pb::v1::ServerReflectionRequest {
        host: String::new(),
        message_request: Some(
            tonic_reflection::pb::v1::server_reflection_request::MessageRequest::ListServices(String::new()),
        ),
    };
    let path = "grpc.reflection.v1.ServerReflection/ServerReflectionInfo";
    let (answers, status) = call(&server, path, "gzip", gzip(&listed.encode_to_vec()).repeat(2)).await;
    assert_eq!((answers.len(), status.code()), (2, Code::Ok));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bomb_is_refused_by_what_it_inflates_to() {
    let server = Server::start().await;
    for (path, limit) in
        [("keyward.v1.AuthzService/Check", 16 << 10), ("keyward.v1.KeyService/Create", 4 << 20)]
    {
        let bomb = gzip(&vec![0; 3 * limit]);
        assert!(bomb.len() < limit / 20, "{path}");
        let (_, status) = call(&server, path, "gzip", bomb).await;
        assert_eq!(
            (status.code(), error_reason(&status).as_str()),
            (Code::InvalidArgument, "INVALID_REQUEST"),
            "{path}"
        );
        assert!(status.message().contains("inflates to more than"), "{status:?}");
    }
    let many = gzip(&vec![0; 15 << 10]).repeat(1000);
    let (_, status) = call(&server, "keyward.v1.AuthzService/StreamCheck", "gzip", many).await;
    assert_eq!(status.code(), Code::InvalidArgument, "the first of them is no Check");
}

/// A gRPC error is a fault to Envoy, which `failure_mode_allow` lets pass: a client could choose it by a large body.
#[tokio::test(flavor = "multi_thread")]
async fn a_question_of_envoy_that_inflates_beyond_its_bound_is_a_denial_like_a_plain_one() {
    let server = Server::with_accounts().await;
    let path = "envoy.service.auth.v3.Authorization/Check";
    let body = vec![0; 16 << 20];
    for message in [gzip(&body), framed(0, &body)] {
        let (answers, status) = call(&server, path, "gzip", message).await;
        assert_eq!((answers.len(), status.code()), (1, Code::Ok), "{status:?}");
        let answer = pb::envoy::service::auth::v3::CheckResponse::decode(answers[0].clone()).unwrap();
        let Some(HttpResponse::DeniedResponse(denied)) = answer.http_response else { panic!("{answer:?}") };
        assert_eq!(denied.status.unwrap().code, 413);
        assert_eq!(answer.status.unwrap().code, Code::ResourceExhausted as i32);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_what_it_says_is_unreadable() {
    let server = Server::start().await;
    let path = "keyward.v1.KeyService/WhoAmI";
    let (_, status) = call(&server, path, "gzip", framed(1, b"no gzip")).await;
    assert_eq!(
        (status.code(), error_reason(&status).as_str()),
        (Code::InvalidArgument, "UNREADABLE_REQUEST")
    );
    let (_, status) = call(&server, path, "identity", gzip(b"")).await;
    assert_eq!(status.code(), Code::InvalidArgument, "compressed, and no word of how: {status:?}");
    let (_, status) = call(&server, path, "br", framed(1, b"x")).await;
    assert_eq!((status.code(), error_reason(&status).as_str()), (Code::Unimplemented, "UNKNOWN_ENCODING"));
}
