//! Who may ask as Envoy does, at which listener, and what answers tell a proxy beside the verdict.

use keyward::pb::{self, envoy::service::auth::v3::authorization_client::AuthorizationClient};
use tonic::{Code, transport::Channel};

use crate::{
    ext_authz_client::{
        AllowedAnswer, DeniedAnswer, EnvoyCheck, UNAUTHORIZED, send_check, server_with_key,
        server_with_settings,
    },
    support::{assert_refused, error_reason, service_key_request, to_strings},
};

#[tokio::test]
async fn proxies_show_a_key_where_the_settings_ask_for_one() {
    let (server, made) = server_with_settings(|settings| settings.gateway.require_caller = true).await;
    server.create_account("other").await;
    let foreign = server.create_key(service_key_request("other", &["monitors:read"])).await;
    let stranger = send_check(
        &server.client_without_token(),
        EnvoyCheck::monitors_request().with_bearer(&made.token).into_message(),
    )
    .await;
    assert_refused(stranger, Code::Unauthenticated, "UNAUTHENTICATED");
    let proxy = server.client_with_scopes("acme", &["keyward:check"]).await;
    let reader = server.client_with_scopes("acme", &["keyward:keys:read"]).await;
    let asked = |token: &str| EnvoyCheck::monitors_request().with_bearer(token).into_message();
    let answer = send_check(&proxy, asked(&made.token)).await.unwrap();
    assert_eq!(AllowedAnswer::from(answer).upstream["x-keyward-account"], "acme");
    let answer = send_check(&proxy, asked(&foreign.token)).await.unwrap();
    assert_eq!(DeniedAnswer::from(answer).reason(), "unknown", "another account's token");
    assert_refused(
        send_check(&reader, asked(&made.token)).await,
        Code::PermissionDenied,
        "PERMISSION_MISSING",
    );
}

#[tokio::test]
async fn a_stranger_at_the_main_listener_hears_no_more_than_a_client() {
    let (server, made) = server_with_key().await;
    server.root_client().revoke(&made.id).await.unwrap();
    let asked = || EnvoyCheck::monitors_request().with_bearer(&made.token).into_message();
    let stranger = DeniedAnswer::from(send_check(&server.client_without_token(), asked()).await.unwrap());
    assert_eq!((stranger.status, stranger.body.as_str()), (401, UNAUTHORIZED));
    assert_eq!(stranger.metadata.into_iter().collect::<Vec<_>>(), [("allowed".into(), "false".into())]);
    let proxy = server.client_with_scopes("acme", &["keyward:check"]).await;
    assert_eq!(DeniedAnswer::from(send_check(&proxy, asked()).await.unwrap()).reason(), "revoked");
    let liar = server.client_with_token("nonsense");
    assert_refused(send_check(&liar, asked()).await, Code::Unauthenticated, "UNAUTHENTICATED");
}

#[tokio::test]
async fn the_listener_for_envoy_serves_nothing_else() {
    let (server, made) =
        server_with_settings(|settings| settings.envoy_listen = Some("127.0.0.1:0".into())).await;
    let address = server.inner().envoy_address.unwrap();
    let channel = Channel::from_shared(format!("http://{address}")).unwrap().connect_lazy();
    let mut client = AuthorizationClient::new(channel.clone());
    let refused = client
        .check(EnvoyCheck::monitors_request().with_bearer("nonsense").into_message())
        .await
        .unwrap()
        .into_inner();
    assert_eq!(DeniedAnswer::from(refused).reason(), "unknown");
    let answer = client
        .check(EnvoyCheck::monitors_request().with_bearer(&made.token).into_message())
        .await
        .unwrap()
        .into_inner();
    assert_eq!(AllowedAnswer::from(answer).upstream["x-keyward-key-id"], made.id);

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
            (status.code(), error_reason(&status)),
            (Code::Unimplemented, "NO_SUCH_RPC".to_owned()),
            "{method}"
        );
    }
}

#[tokio::test]
async fn what_the_proxy_may_limit_by_is_published() {
    let (server, _) =
        server_with_settings(|settings| settings.gateway.publish_metadata = to_strings(&["plan", "absent"]))
            .await;
    let metadata =
        [("plan", "gold"), ("note", "private")].map(|(name, value)| (name.into(), value.into())).into();
    let made = server
        .create_key(pb::CreateKeyRequest { metadata, ..service_key_request("acme", &["monitors:read"]) })
        .await;
    let passed = EnvoyCheck::monitors_request().with_bearer(&made.token).expect_allowed(&server).await;
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
