//! Who may ask as Envoy does, at which listener, and what answers tell a proxy beside the verdict.

use keyward::pb::{self, envoy::service::auth::v3::authorization_client::AuthorizationClient};
use tonic::{Code, transport::Channel};

use crate::{
    ext_authz_client::{Ask, Passed, Refused, UNAUTHORIZED, ask, configured, with_key},
    support::{reason, refused, service_key, texts},
};

#[tokio::test]
async fn proxies_show_a_key_where_the_settings_ask_for_one() {
    let (server, made) = configured(|settings| settings.gateway.require_caller = true).await;
    server.account("other").await;
    let foreign = server.make(service_key("other", &["monitors:read"])).await;
    let stranger = ask(&server.anonymous(), Ask::monitors().bearer(&made.token).message()).await;
    refused(stranger, Code::Unauthenticated, "UNAUTHENTICATED");
    let proxy = server.caller("acme", &["keyward:check"]).await;
    let reader = server.caller("acme", &["keyward:keys:read"]).await;
    let asked = |token: &str| Ask::monitors().bearer(token).message();
    let answer = ask(&proxy, asked(&made.token)).await.unwrap();
    assert_eq!(Passed::from(answer).upstream["x-keyward-account"], "acme");
    let answer = ask(&proxy, asked(&foreign.token)).await.unwrap();
    assert_eq!(Refused::from(answer).reason(), "unknown", "another account's token");
    refused(ask(&reader, asked(&made.token)).await, Code::PermissionDenied, "PERMISSION_MISSING");
}

#[tokio::test]
async fn a_stranger_at_the_main_listener_hears_no_more_than_a_client() {
    let (server, made) = with_key().await;
    server.root().revoke(&made.id).await.unwrap();
    let asked = || Ask::monitors().bearer(&made.token).message();
    let stranger = Refused::from(ask(&server.anonymous(), asked()).await.unwrap());
    assert_eq!((stranger.status, stranger.body.as_str()), (401, UNAUTHORIZED));
    assert_eq!(stranger.metadata.into_iter().collect::<Vec<_>>(), [("allowed".into(), "false".into())]);
    let proxy = server.caller("acme", &["keyward:check"]).await;
    assert_eq!(Refused::from(ask(&proxy, asked()).await.unwrap()).reason(), "revoked");
    let liar = server.holder("nonsense");
    refused(ask(&liar, asked()).await, Code::Unauthenticated, "UNAUTHENTICATED");
}

#[tokio::test]
async fn the_listener_for_envoy_serves_nothing_else() {
    let (server, made) = configured(|settings| settings.envoy_listen = Some("127.0.0.1:0".into())).await;
    let address = server.running().envoy_address.unwrap();
    let channel = Channel::from_shared(format!("http://{address}")).unwrap().connect_lazy();
    let mut client = AuthorizationClient::new(channel.clone());
    let refused = client.check(Ask::monitors().bearer("nonsense").message()).await.unwrap().into_inner();
    assert_eq!(Refused::from(refused).reason(), "unknown");
    let answer = client.check(Ask::monitors().bearer(&made.token).message()).await.unwrap().into_inner();
    assert_eq!(Passed::from(answer).upstream["x-keyward-key-id"], made.id);

    let mut health = tonic_health::pb::health_client::HealthClient::new(channel.clone());
    let service = "envoy.service.auth.v3.Authorization".to_owned();
    let serving = health.check(tonic_health::pb::HealthCheckRequest { service }).await.unwrap().into_inner();
    assert_eq!(serving.status(), tonic_health::pb::health_check_response::ServingStatus::Serving);

    for method in [
        "keyward.v1.AuthzService/Check",
        "keyward.v1.KeyService/List",
        "grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
    ] {
        let mut grpc = tonic::client::Grpc::new(channel.clone());
        grpc.ready().await.unwrap();
        let path = format!("/{method}").parse().unwrap();
        let codec = tonic_prost::ProstCodec::<(), ()>::default();
        let status = grpc.unary(tonic::Request::new(()), path, codec).await.unwrap_err();
        assert_eq!(
            (status.code(), reason(&status)),
            (Code::Unimplemented, "NO_SUCH_RPC".to_owned()),
            "{method}"
        );
    }
}

#[tokio::test]
async fn what_the_proxy_may_limit_by_is_published() {
    let (server, _) =
        configured(|settings| settings.gateway.publish_metadata = texts(&["plan", "absent"])).await;
    let metadata =
        [("plan", "gold"), ("note", "private")].map(|(name, value)| (name.into(), value.into())).into();
    let made =
        server.make(pb::CreateKeyRequest { metadata, ..service_key("acme", &["monitors:read"]) }).await;
    let passed = Ask::monitors().bearer(&made.token).passes(&server).await;
    let names: Vec<_> = passed.metadata.keys().map(String::as_str).collect();
    assert_eq!(
        names,
        [
            "account",
            "allowed",
            "cost",
            "environment",
            "key_id",
            "metadata_plan",
            "mode",
            "reason",
            "secret_version"
        ]
    );
    assert_eq!(passed.metadata["metadata_plan"], "gold");
}
