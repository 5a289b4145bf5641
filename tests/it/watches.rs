//! Calls that last: how many a connection has, and what ends them.

use keyward::pb;
use tonic::{Code, Streaming};
use tonic_health::pb::{
    HealthCheckRequest, HealthCheckResponse, health_check_response::ServingStatus,
    health_client::HealthClient,
};

use crate::{
    process::{KeywardProcess, TestHome, WAIT_TIMEOUT, plain_key_request, wait_for},
    replicas::{ReplicaCluster, revoke_with_deadline, send_signal, unconfirmed_replicas},
    support::{Server, assert_refused},
};

async fn watch_health(
    channel: tonic::transport::Channel,
) -> Result<Streaming<HealthCheckResponse>, tonic::Status> {
    let request = HealthCheckRequest { service: String::new() };
    HealthClient::new(channel).watch(request).await.map(tonic::Response::into_inner)
}

async fn next<T>(stream: &mut Streaming<T>) -> Result<Option<T>, tonic::Status> {
    tokio::time::timeout(WAIT_TIMEOUT, stream.message()).await.expect("the stream goes on in time")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_watches_health_eight_times_at_the_most() {
    let server = Server::start().await;
    let mut watching = Vec::new();
    for _ in 0..8 {
        let mut watch = watch_health(server.channel()).await.unwrap();
        assert_eq!(next(&mut watch).await.unwrap().unwrap().status(), ServingStatus::Serving);
        watching.push(watch);
    }
    assert_refused(watch_health(server.channel()).await, Code::ResourceExhausted, "TOO_MANY_WATCHES");
    watching.pop();
    wait_for("the place to be free", || {
        let again = tokio::task::block_in_place(|| {
            tokio::runtime::Handle::current().block_on(watch_health(server.channel()))
        });
        again.ok()
    });
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_stops_tells_those_who_watch_its_health_and_ends_them() {
    let mut server = KeywardProcess::start();
    let mut watch = watch_health(server.channel()).await.unwrap();
    assert_eq!(next(&mut watch).await.unwrap().unwrap().status(), ServingStatus::Serving);
    server.process.terminate();
    assert_eq!(next(&mut watch).await.unwrap().unwrap().status(), ServingStatus::NotServing);
    assert_refused(next(&mut watch).await, Code::Unavailable, "STOPPING");
    wait_for("the server to end", || server.process.has_ended().then_some(()));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_that_is_old_ends_those_who_watch_health_over_it() {
    let home = TestHome::new();
    let table = "[[listener]]\nname = 'brief'\naddress = '127.0.0.1:0'\nservices = ['health']\n\
                 max_connection_age = '1s'\n";
    std::fs::write(home.path("keyward.toml"), table).unwrap();
    let mut command = home.serve_command();
    command.args(["--config", "keyward.toml"]);
    let server = home.start_with(command).unwrap();
    let to = format!("http://{}", server.process.listener_address("brief").unwrap());
    let channel = tonic::transport::Channel::from_shared(to).unwrap().connect_lazy();
    let mut watch = watch_health(channel).await.unwrap();
    assert_eq!(next(&mut watch).await.unwrap().unwrap().status(), ServingStatus::Serving);
    assert_refused(next(&mut watch).await, Code::Unavailable, "CONNECTION_ENDS");
    server.stop();
}

#[tokio::test(flavor = "multi_thread")]
async fn the_propagation_of_a_revision_that_does_not_exist_is_not_found() {
    let server = Server::with_accounts().await;
    let made = server.create_key(crate::support::named_key_request("acme", "CI")).await;
    let watch = async |revision| {
        let request = pb::WatchPropagationRequest { revision };
        server.root_client().keys().watch_propagation(request).await.map(tonic::Response::into_inner)
    };
    let report = next(&mut watch(made.revision).await.unwrap()).await.unwrap().unwrap();
    assert!(report.propagation.unwrap().complete);
    for revision in [made.revision + 1, u64::MAX >> 1] {
        assert_refused(watch(revision).await, Code::NotFound, "REVISION_NOT_FOUND");
    }
}

/// A change that one replica does not acknowledge, as it stands still, and two who follow it: the root, and a caller of
/// its own with the id of its key.
struct StalledChange {
    fleet: ReplicaCluster,
    root: Streaming<pb::WatchPropagationResponse>,
    caller: Streaming<pb::WatchPropagationResponse>,
    caller_id: String,
}

impl StalledChange {
    async fn start() -> StalledChange {
        let fleet = ReplicaCluster::start(2, "static").await;
        let (id, _) = fleet.create_key().await;
        let scopes = vec!["keyward:keys:read".to_owned()];
        let reader = pb::CreateKeyRequest { scopes, ..plain_key_request() };
        let (caller_id, token) = fleet.replicas[0].root_caller().create_key(reader).await.unwrap();
        send_signal("-STOP", &fleet.replicas[1].process);
        let waited =
            revoke_with_deadline(&fleet.replicas[0], &id, Some(std::time::Duration::from_secs(1))).await;
        assert_eq!(waited.unwrap_err().code(), Code::DeadlineExceeded);
        let revision = fleet.replicas[0].root_caller().get_key(&id).await.unwrap().revision;
        let watch = async |mut caller: crate::process::AuthorizedClients| {
            let request = pb::WatchPropagationRequest { revision };
            let mut reports = caller.keys.watch_propagation(request).await.unwrap().into_inner();
            let first = next(&mut reports).await.unwrap().unwrap();
            assert_eq!(unconfirmed_replicas(&first.propagation.unwrap()), ["r1"]);
            reports
        };
        let root = watch(fleet.replicas[0].root_caller()).await;
        let caller = watch(fleet.replicas[0].caller(&token)).await;
        StalledChange { fleet, root, caller, caller_id }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_follows_a_change_is_told_nothing_more_once_its_key_is_revoked() {
    let StalledChange { fleet, root, mut caller, caller_id } = StalledChange::start().await;
    let waited =
        revoke_with_deadline(&fleet.replicas[0], &caller_id, Some(std::time::Duration::from_millis(300)))
            .await;
    assert_eq!(waited.unwrap_err().code(), Code::DeadlineExceeded);
    // What was said before the revocation may still be on its way.
    let ended = loop {
        match next(&mut caller).await {
            Ok(report) => assert!(report.is_some(), "it ends with a status"),
            Err(status) => break status,
        }
    };
    assert_eq!(ended.code(), Code::Unauthenticated, "{ended:?}");
    send_signal("-CONT", &fleet.replicas[1].process);
    let mut root = root;
    let mut last = None;
    while let Some(report) = next(&mut root).await.unwrap() {
        last = report.propagation;
    }
    assert!(last.unwrap().complete, "others are told to the end");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_stops_ends_those_who_follow_a_change() {
    let StalledChange { mut fleet, mut root, .. } = StalledChange::start().await;
    fleet.replicas[0].process.terminate();
    assert_refused(next(&mut root).await, Code::Unavailable, "STOPPING");
    let stopping = &mut fleet.replicas[0].process;
    wait_for("the server to end", || stopping.has_ended().then_some(()));
    send_signal("-CONT", &fleet.replicas[1].process);
}
