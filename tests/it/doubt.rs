//! Changes whose outcome is unknown: what they would refuse is refused until the log decides.

use std::time::Instant;

use keyward::pb::{self, Reason};

use crate::{
    process::{WAIT_TIMEOUT, plain_key_request},
    replicas::{ReplicaCluster, check_token},
};

fn admin(account: &str, scope: &str) -> pb::PutRoleRequest {
    let (account, name) = (account.to_owned(), "admin".to_owned());
    pb::PutRoleRequest { account, name, scopes: vec![scope.to_owned()] }
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_that_a_pending_account_role_would_narrow_are_refused_until_the_log_decides() {
    let mut fleet = ReplicaCluster::start(1, "default").await;
    let mut root = fleet.replicas[0].root_caller();
    root.accounts.put_role(admin("", "monitors:read")).await.unwrap();
    let key = pb::CreateKeyRequest { scopes: vec![], roles: vec!["admin".to_owned()], ..plain_key_request() };
    let (_, token) = root.create_key(key).await.unwrap();
    assert_eq!(check_token(&fleet.replicas[0], &token).await.unwrap(), Reason::Ok, "by the global role");
    let (cluster, replicas) = (&mut fleet.cluster, &fleet.replicas);
    let handle = tokio::runtime::Handle::current();
    tokio::task::block_in_place(|| {
        cluster.crash(|| {
            handle.block_on(async {
                let pending = replicas[0].root_caller().accounts.put_role(admin("acme", "other:read")).await;
                assert_eq!(pending.unwrap_err().code(), tonic::Code::Unavailable);
                assert_eq!(check_token(&replicas[0], &token).await.unwrap(), Reason::MissingScope);
            });
        });
    });
    let end = Instant::now() + WAIT_TIMEOUT;
    while root.accounts.put_role(admin("", "monitors:read")).await.is_err() {
        assert!(Instant::now() < end, "the database is there again");
    }
    assert_eq!(check_token(&fleet.replicas[0], &token).await.unwrap(), Reason::Ok, "it was not recorded");
}
