//! What Checks leave behind: counts by hour and reason, and when each secret was last used.

use tonic::{Code, Status};

use keyward::pb::{self, Reason};

use crate::support::{
    Client, DAY, HOUR, assert_invalid, assert_refused, authenticate_request, proto_seconds,
    scope_check_request, service_key_request,
};

use super::Server;

async fn usage(client: &Client, request: pb::KeyUsageRequest) -> Result<pb::KeyUsageResponse, Status> {
    Ok(client.keys().usage(request).await?.into_inner())
}

fn usage_request(id: &str) -> pb::KeyUsageRequest {
    pb::KeyUsageRequest { id: id.to_owned(), ..Default::default() }
}

fn reader() -> pb::CreateKeyRequest {
    service_key_request("acme", &["monitors:read"])
}

/// Asks so many Checks, allowed ones and denied ones.
async fn use_it(server: &Server, token: &str, allowed: usize, denied: usize) {
    for _ in 0..allowed {
        assert!(
            server.root_client().check(scope_check_request(token, "monitors:read")).await.unwrap().allowed
        );
    }
    for _ in 0..denied {
        assert!(
            !server.root_client().check(scope_check_request(token, "monitors:write")).await.unwrap().allowed
        );
    }
}

/// Each bucket: its start in seconds after `origin`, allowed, denied.
fn buckets(answer: &pb::KeyUsageResponse, origin: prost_types::Timestamp) -> Vec<(i64, u64, u64)> {
    let relative = |bucket: &pb::UsageBucket| {
        (bucket.start.unwrap().seconds - origin.seconds, bucket.allowed, bucket.denied)
    };
    answer.buckets.iter().map(relative).collect()
}

const H: i64 = 3600;

#[tokio::test]
async fn checks_are_counted_by_the_hour_and_hours_without_any_are_left_out() {
    let server = Server::with_accounts().await;
    let (origin, made) = (server.timestamp_after(0), server.create_key(reader()).await);
    server.advance(10 * 60);
    use_it(&server, &made.token, 2, 1).await;
    server.advance(50 * 60);
    use_it(&server, &made.token, 1, 0).await;
    server.advance(3 * HOUR);
    use_it(&server, &made.token, 0, 4).await;
    let answer = usage(&server.root_client(), usage_request(&made.id)).await.unwrap();
    assert_eq!(buckets(&answer, origin), [(0, 2, 1), (H, 1, 0), (4 * H, 0, 4)]);
    assert_eq!((answer.allowed, answer.denied), (3, 5));
}

#[tokio::test]
async fn a_step_gathers_hours_from_the_first_one_asked_for() {
    let server = Server::with_accounts().await;
    let (origin, made) = (server.timestamp_after(0), server.create_key(reader()).await);
    for _ in 0..7 {
        use_it(&server, &made.token, 1, 0).await;
        server.advance(HOUR);
    }
    let every = |step| pb::KeyUsageRequest {
        from: Some(origin),
        step: Some(proto_seconds(step)),
        ..usage_request(&made.id)
    };
    let three = usage(&server.root_client(), every(3 * HOUR)).await.unwrap();
    assert_eq!(buckets(&three, origin), [(0, 3, 0), (3 * H, 3, 0), (6 * H, 1, 0)]);
    let day = usage(&server.root_client(), every(DAY)).await.unwrap();
    assert_eq!(buckets(&day, origin), [(0, 7, 0)]);
    let from = Some(prost_types::Timestamp { seconds: origin.seconds + H + 1, nanos: 0 });
    let later = usage(&server.root_client(), pb::KeyUsageRequest { from, ..every(3 * HOUR) }).await.unwrap();
    assert_eq!(buckets(&later, origin), [(H, 3, 0), (4 * H, 3, 0)]);
}

#[tokio::test]
async fn from_and_to_are_whole_hours_and_both_count() {
    let server = Server::with_accounts().await;
    let (origin, made) = (server.timestamp_after(0), server.create_key(reader()).await);
    for _ in 0..4 {
        use_it(&server, &made.token, 1, 0).await;
        server.advance(HOUR);
    }
    let at = |seconds| Some(prost_types::Timestamp { seconds: origin.seconds + seconds, nanos: 0 });
    let between = pb::KeyUsageRequest { from: at(H + 1800), to: at(2 * H), ..usage_request(&made.id) };
    let answer = usage(&server.root_client(), between).await.unwrap();
    assert_eq!(buckets(&answer, origin), [(H, 1, 0), (2 * H, 1, 0)]);
}

#[tokio::test]
async fn without_from_and_to_it_is_the_last_24_hours() {
    let server = Server::with_accounts().await;
    let made = server.create_key(reader()).await;
    use_it(&server, &made.token, 1, 0).await;
    server.advance(23 * HOUR);
    assert_eq!(usage(&server.root_client(), usage_request(&made.id)).await.unwrap().allowed, 1);
    server.advance(HOUR);
    assert_eq!(usage(&server.root_client(), usage_request(&made.id)).await.unwrap().allowed, 0);
}

#[tokio::test]
async fn denied_checks_are_counted_by_their_first_reason() {
    let server = Server::with_accounts().await;
    let rate_limits =
        vec![pb::RateLimit { name: "requests".to_owned(), limit: 1, window: Some(proto_seconds(60)) }];
    let made = server.create_key(pb::CreateKeyRequest { rate_limits, ..reader() }).await;
    use_it(&server, &made.token, 1, 3).await;
    assert_eq!(server.root_client().check_reason(&made.token).await, Reason::RateLimited);
    let staging = pb::CheckRequest {
        environment: "staging".to_owned(),
        ..scope_check_request(&made.token, "alerts:read")
    };
    for _ in 0..2 {
        assert_eq!(
            server.root_client().check(staging.clone()).await.unwrap().reason(),
            Reason::WrongEnvironment
        );
    }
    server.root_client().revoke(&made.id).await.unwrap();
    assert_eq!(server.root_client().check_reason(&made.token).await, Reason::Revoked);
    let answer = usage(&server.root_client(), usage_request(&made.id)).await.unwrap();
    assert_eq!((answer.allowed, answer.denied, answer.buckets.len()), (1, 7, 1));
    let told: Vec<_> =
        answer.buckets[0].denied_by_reason.iter().map(|count| (count.reason(), count.count)).collect();
    let expected = [
        (Reason::Revoked, 1),
        (Reason::WrongEnvironment, 2),
        (Reason::MissingScope, 3),
        (Reason::RateLimited, 1),
    ];
    assert_eq!(told, expected);
}

#[tokio::test]
async fn a_dry_run_leaves_no_trace() {
    let server = Server::with_accounts().await;
    let made = server.create_key(reader()).await;
    let dry = pb::CheckRequest { dry_run: true, ..authenticate_request(&made.token) };
    assert!(server.root_client().check(dry).await.unwrap().allowed);
    assert_eq!(
        usage(&server.root_client(), usage_request(&made.id)).await.unwrap(),
        pb::KeyUsageResponse::default()
    );
    assert_eq!(server.root_client().get(&made.id).await.unwrap().last_used_at, None);
}

#[tokio::test]
async fn last_used_is_when_a_check_last_allowed_it() {
    let server = Server::with_accounts().await;
    let made = server.create_key(reader()).await;
    assert_eq!(server.root_client().get(&made.id).await.unwrap().last_used_at, None);
    server.advance(7);
    let at = Some(server.timestamp_after(0));
    use_it(&server, &made.token, 1, 0).await;
    server.advance(7);
    use_it(&server, &made.token, 0, 1).await;
    assert_eq!(server.root_client().get(&made.id).await.unwrap().last_used_at, at);
}

#[tokio::test]
async fn each_secret_shows_when_it_has_fallen_silent() {
    let server = Server::with_accounts().await;
    let made = server.create_key(reader()).await;
    use_it(&server, &made.token, 1, 0).await;
    let old = Some(server.timestamp_after(0));
    let new_token = server.root_client().rotate(&made.id, DAY).await.unwrap().token;
    server.advance(60);
    use_it(&server, &new_token, 1, 0).await;
    let key = server.root_client().get(&made.id).await.unwrap();
    let told: Vec<_> = key.secrets.iter().map(|secret| (secret.version, secret.last_used_at)).collect();
    assert_eq!(told, [(2, Some(server.timestamp_after(0))), (1, old)]);
    assert_eq!(key.last_used_at, Some(server.timestamp_after(0)));
}

#[tokio::test]
async fn calls_to_keyward_itself_are_uses_too() {
    let server = Server::with_accounts().await;
    let made = server.create_key(service_key_request("acme", &["keyward:keys:read"])).await;
    server.client_with_token(&made.token).get(&made.id).await.unwrap();
    assert_eq!(
        server.root_client().get(&made.id).await.unwrap().last_used_at,
        Some(server.timestamp_after(0))
    );
    assert_eq!(usage(&server.root_client(), usage_request(&made.id)).await.unwrap().allowed, 1);
}

#[tokio::test]
async fn unused_since_lists_keys_that_no_check_has_allowed_since_then() {
    let server = Server::with_accounts().await;
    let named = |name: &str| pb::CreateKeyRequest { name: Some(name.to_owned()), ..reader() };
    let [never, long_ago, denied, today] = [
        server.create_key(named("never")).await,
        server.create_key(named("long ago")).await,
        server.create_key(named("denied")).await,
        server.create_key(named("today")).await,
    ];
    use_it(&server, &long_ago.token, 1, 0).await;
    server.advance(30 * DAY);
    use_it(&server, &denied.token, 0, 1).await;
    use_it(&server, &today.token, 1, 0).await;
    let unused_since = Some(server.timestamp_after(0));
    let request = pb::ListKeysRequest { account: "acme".to_owned(), unused_since, ..Default::default() };
    let found = server.root_client().list(request).await.unwrap().keys;
    let mut ids: Vec<_> = found.into_iter().map(|key| key.id).collect();
    ids.sort();
    let mut expected = [never.id, long_ago.id, denied.id];
    expected.sort();
    assert_eq!(ids, expected, "a use at that very instant counts");
}

#[tokio::test]
async fn counts_are_there_for_90_days() {
    let server = Server::with_accounts().await;
    let (origin, made) = (server.timestamp_after(0), server.create_key(reader()).await);
    use_it(&server, &made.token, 2, 0).await;
    server.advance(90 * DAY - HOUR);
    use_it(&server, &made.token, 1, 0).await;
    let (from, step) = (Some(origin), Some(proto_seconds(90 * DAY)));
    let answer = usage(&server.root_client(), pb::KeyUsageRequest { from, step, ..usage_request(&made.id) })
        .await
        .unwrap();
    assert_eq!(buckets(&answer, origin), [(0, 3, 0)]);
}

#[tokio::test]
async fn an_accounts_caller_reads_the_usage_of_its_own_keys_alone() {
    let server = Server::with_accounts().await;
    let [own, others] = [
        server.create_key(reader()).await,
        server.create_key(service_key_request("other", &["monitors:read"])).await,
    ];
    let caller = server.client_with_scopes("acme", &["keyward:keys:read"]).await;
    usage(&caller, usage_request(&own.id)).await.unwrap();
    assert_refused(usage(&caller, usage_request(&others.id)).await, Code::NotFound, "KEY_NOT_FOUND");
    let writer = server.client_with_scopes("acme", &["keyward:keys:write"]).await;
    assert_refused(
        usage(&writer, usage_request(&own.id)).await,
        Code::PermissionDenied,
        "PERMISSION_MISSING",
    );
}

#[tokio::test]
async fn a_wrong_request_names_its_fields() {
    let server = Server::with_accounts().await;
    let made = server.create_key(reader()).await;
    let good = || usage_request(&made.id);
    let root = server.root_client();
    assert_invalid(usage(&root, usage_request("")).await, &["id"]);
    assert_invalid(usage(&root, usage_request("not-an-id")).await, &["id"]);
    for length in [0, 1800, HOUR + 1, 90 * DAY + HOUR] {
        assert_invalid(
            usage(&root, pb::KeyUsageRequest { step: Some(proto_seconds(length)), ..good() }).await,
            &["step"],
        );
    }
    let backwards = Some(prost_types::Duration { seconds: -3600, nanos: 0 });
    assert_invalid(usage(&root, pb::KeyUsageRequest { step: backwards, ..good() }).await, &["step"]);
    let (from, to) = (Some(server.timestamp_after(H)), Some(server.timestamp_after(-H)));
    assert_invalid(usage(&root, pb::KeyUsageRequest { from, to, ..good() }).await, &["from"]);
    let never = Some(prost_types::Timestamp { seconds: i64::MAX, nanos: 0 });
    assert_invalid(usage(&root, pb::KeyUsageRequest { to: never, ..good() }).await, &["to"]);
    assert_invalid(usage(&root, pb::KeyUsageRequest { from: never, ..good() }).await, &["from"]);
    let all_of_time = pb::KeyUsageRequest {
        from: Some(prost_types::Timestamp { seconds: -62_135_596_800, nanos: 0 }),
        to: Some(prost_types::Timestamp { seconds: 253_402_300_799, nanos: 0 }),
        ..good()
    };
    usage(&root, all_of_time).await.unwrap();
}
