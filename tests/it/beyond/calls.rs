//! Random calls of random managers. A round has a stage: one account, one role name and a few managers that all calls of the
//! round are about, so that they get in each other's way.

use futures_util::future::BoxFuture;
use keyward::pb;
use rand::{RngExt as _, rngs::ChaCha8Rng, seq::IndexedRandom as _};
use tonic::Status;

use crate::{
    escalation::as_import,
    support::{Client, service_key_request, to_strings, user_key_request},
};

const ACCOUNTS: [&str; 2] = ["acme", "other"];
const USERS: [&str; 3] = ["ann", "bob", "eve"];
const PATHS: [&[&str]; 3] = [&["scopes", "roles"], &["rate_limits"], &["metadata"]];
const GRANTS: [&str; 8] = ["a", "a", "a:x", "a:*", "b", "*", "keyward:keys:write", "keyward:*"];

/// The ids of the keys that a call made.
pub(super) type CallResult = Result<Vec<String>, Status>;
pub(super) type PendingCall = BoxFuture<'static, CallResult>;

/// Runs a call and drops what it answers.
fn plain<T: Send + 'static>(call: impl Future<Output = Result<T, Status>> + Send + 'static) -> PendingCall {
    Box::pin(async { call.await.map(|_| Vec::new()) })
}

/// A caller that may manage an account.
#[derive(Clone)]
pub(super) struct RandomManager {
    pub(super) id: String,
    account: String,
    token: String,
    /// The headers that go with its calls.
    headers: Vec<(&'static str, String)>,
    /// What it is bound to: keys like itself have these terms.
    template: pb::CreateKeyRequest,
    /// The role that its rights come from.
    role: Option<String>,
    user: Option<String>,
}

impl RandomManager {
    /// Its way to a replica.
    fn client_for(&self, replica: &Client) -> Client {
        let client = replica.with_header("authorization", &format!("Bearer {}", self.token));
        self.headers.iter().fold(client, |client, (name, value)| client.with_header(name, value))
    }
}

/// What a round is about.
pub(super) struct RoundSetup {
    pub(super) account: String,
    pub(super) role: String,
    pub(super) managers: Vec<RandomManager>,
    /// Keys of the account.
    pub(super) targets: Vec<String>,
}

/// Chooses everything, from a seed.
pub(super) struct RandomChooser {
    pub(super) rng: ChaCha8Rng,
    /// One client without a credential for each replica.
    pub(super) replicas: Vec<Client>,
    pub(super) root_token: String,
    serial: u64,
}

impl RandomChooser {
    pub(super) fn new(dice: ChaCha8Rng, replicas: Vec<Client>, root_token: String) -> RandomChooser {
        RandomChooser { rng: dice, replicas, root_token, serial: 0 }
    }

    fn one_in(&mut self, number: u32) -> bool {
        self.rng.random_range(0..number) == 0
    }

    fn pick<T: Clone>(&mut self, of: &[T]) -> T {
        of.choose(&mut self.rng).unwrap().clone()
    }

    fn replica(&mut self) -> Client {
        let replicas = self.replicas.clone();
        self.pick(&replicas)
    }

    /// The root key's way to some replica.
    pub(super) fn root(&mut self) -> Client {
        let token = format!("Bearer {}", self.root_token);
        self.replica().with_header("authorization", &token)
    }

    pub(super) fn account(&mut self) -> String {
        self.pick(&ACCOUNTS).to_owned()
    }

    /// A role name of no round before, and the roles that stand there at first: one of the account, a wider global one,
    /// both or none.
    pub(super) async fn role(&mut self, account: &str) -> String {
        self.serial += 1;
        let (role, root) = (format!("r{}", self.serial), self.root());
        let arrangement = self.rng.random_range(0..5);
        if arrangement > 0 {
            root.put_role(account, &role, &["a"]).await.unwrap();
        }
        if arrangement != 1 {
            let wide = self.pick(&["*", "keyward:*", "b", "a:*"]);
            root.put_role("", &role, &[wide]).await.unwrap();
        }
        role
    }

    /// Bounds of every kind, or none.
    fn add_random_limits(&mut self, now: &prost_types::Timestamp, request: &mut pb::CreateKeyRequest) {
        match self.rng.random_range(0..14) {
            0 => {
                let seconds = now.seconds + self.rng.random_range(1..4);
                request.expires_at = Some(prost_types::Timestamp { seconds, nanos: 0 });
            }
            1 => request.customers = self.pick(&[to_strings(&["c1"]), to_strings(&["c1", "c2"])]),
            2 => {
                request.allowed_cidrs =
                    self.pick(&[to_strings(&["127.0.0.0/8"]), to_strings(&["127.0.0.1/32"])])
            }
            3 => {
                let window = Some(prost_types::Duration { seconds: self.pick(&[60, 120]), nanos: 0 });
                let limit = self.pick(&[1000, 2000]);
                request.rate_limits = vec![pb::RateLimit { name: "all".to_owned(), limit, window }];
            }
            4 => {
                let period = self.pick(&[pb::QuotaPeriod::Day, pb::QuotaPeriod::Total]).into();
                request.quota = Some(pb::Quota { limit: self.pick(&[5000, 6000]), period });
            }
            5 | 6 => request.environment = self.pick(&["staging", "development"]).to_owned(),
            _ => {}
        }
    }

    /// A new manager that acts in this account.
    pub(super) async fn manager(&mut self, account: &str, now: &prost_types::Timestamp) -> RandomManager {
        const RIGHTS: [&[&str]; 5] = [
            &["a", "keyward:keys:write", "keyward:accounts:write"],
            &["a", "keyward:keys:write", "keyward:accounts:write"],
            &["a", "a:*", "b", "keyward:keys:*", "keyward:accounts:write"],
            &["*", "keyward:*"],
            &["a:x", "keyward:keys:write"],
        ];
        self.serial += 1;
        let (root, rights) = (self.root(), self.pick(&RIGHTS));
        let user = self.pick(&USERS).to_owned();
        let member = |role: &'static str| {
            let (root, account, user) = (root.clone(), account.to_owned(), user.clone());
            async move { root.put_member(&account, &user, role).await.unwrap() }
        };
        let mut manager = RandomManager {
            id: String::new(),
            account: account.to_owned(),
            token: String::new(),
            headers: Vec::new(),
            template: service_key_request(account, &[]),
            role: None,
            user: None,
        };
        let mut request = match self.rng.random_range(0..10) {
            0 => {
                member("boss").await;
                manager.headers.push(("x-keyward-account", account.to_owned()));
                manager.user = Some(user.clone());
                user_key_request(&user, rights)
            }
            1 => service_key_request("keyward", &["keyward:keys:write", "keyward:accounts:write"]),
            2 => {
                member("boss").await;
                manager.headers.push(("x-keyward-acting-user", user.clone()));
                manager.user = Some(user.clone());
                service_key_request("keyward", &["keyward:keys:*", "keyward:accounts:write"])
            }
            3..6 => {
                let role = format!("m{}", self.serial);
                root.put_role(account, &role, rights).await.unwrap();
                manager.role = Some(role.clone());
                pb::CreateKeyRequest { roles: vec![role], ..service_key_request(account, &[]) }
            }
            _ => service_key_request(account, rights),
        };
        self.add_random_limits(now, &mut request);
        manager.template = pb::CreateKeyRequest {
            account: account.to_owned(),
            user: String::new(),
            scopes: Vec::new(),
            roles: Vec::new(),
            ..request.clone()
        };
        let made = root.create_key(request).await;
        RandomManager { id: made.id, token: made.token, ..manager }
    }

    /// A key that a manager may want to make.
    fn random_key_request(
        &mut self,
        stage: &RoundSetup,
        by: &RandomManager,
        now: &prost_types::Timestamp,
    ) -> pb::CreateKeyRequest {
        let mut request = by.template.clone();
        match self.rng.random_range(0..4) {
            0 => request.scopes = to_strings(&[self.pick(&GRANTS)]),
            1 => {
                request.scopes = to_strings(&[self.pick(&GRANTS)]);
                request.roles = vec![stage.role.clone()];
            }
            _ => request.roles = vec![stage.role.clone()],
        }
        if self.one_in(4) {
            request = pb::CreateKeyRequest {
                scopes: request.scopes,
                roles: request.roles,
                ..service_key_request(&stage.account, &[])
            };
            self.add_random_limits(now, &mut request);
        }
        request
    }

    /// A random call of a round, and the manager whose rights it takes away, if it does so.
    pub(super) fn random_call(
        &mut self,
        stage: &RoundSetup,
        now: &prost_types::Timestamp,
    ) -> (PendingCall, Option<String>) {
        if self.one_in(5) {
            return self.random_restriction(stage);
        }
        let manager = self.pick(&stage.managers);
        let client = manager.client_for(&self.replica());
        let (account, role) = (stage.account.clone(), stage.role.clone());
        let user = self.pick(&USERS).to_owned();
        let target = self.pick(&[stage.targets.as_slice(), std::slice::from_ref(&manager.id)].concat());
        let request = self.random_key_request(stage, &manager, now);
        let grant = self.pick(&GRANTS);
        let call: PendingCall = match self.rng.random_range(0..24) {
            0..5 => Box::pin(async move { Ok(vec![client.create(request).await?.key.unwrap().id]) }),
            5 | 6 => {
                let sha256 = (0..32).map(|_| self.rng.random::<u8>()).collect();
                let row = pb::ImportKey { sha256, ..as_import(&request, 0) };
                Box::pin(async move {
                    let results = client.import(vec![row]).await?;
                    Ok(results.into_iter().filter_map(|result| Some(result.key?.id)).collect())
                })
            }
            7..10 => {
                let (scopes, roles, rate_limits) = (request.scopes, request.roles, request.rate_limits);
                let key = pb::Key { id: target, scopes, roles, rate_limits, ..Default::default() };
                let paths = self.pick(&PATHS);
                plain(async move { client.update(&key, paths).await })
            }
            10 | 11 => plain(async move { client.rotate(&target, 0).await }),
            12 => plain(async move { client.enable(&target).await }),
            13 => plain(async move { client.disable(&target).await }),
            14 => plain(async move { client.revoke(&target).await }),
            15 | 16 => plain(async move { client.put_role(&account, &role, &[grant]).await }),
            17..20 => {
                let request = pb::DeleteRoleRequest { account, name: role };
                plain(async move { client.accounts().delete_role(request).await })
            }
            20 | 21 => plain(async move { client.put_member(&account, &user, &role).await }),
            22 => {
                let request = pb::RemoveMemberRequest { account, user };
                plain(async move { client.accounts().remove_member(request).await })
            }
            _ => {
                let environment = self.pick(&["staging", "development"]).to_owned();
                let bulk = pb::BulkRevokeKeysRequest { account, environment, ..Default::default() };
                plain(async move { client.keys().bulk_revoke(bulk).await })
            }
        };
        (call, None)
    }

    /// A call by which the root key takes something from a manager or from its account, or changes what a role means.
    fn random_restriction(&mut self, stage: &RoundSetup) -> (PendingCall, Option<String>) {
        let (manager, root) = (self.pick(&stage.managers), self.root());
        let (account, role) = (stage.account.clone(), stage.role.clone());
        let id = manager.id.clone();
        let grant = self.pick(&GRANTS);
        let call: PendingCall = match self.rng.random_range(0..9) {
            0 => plain(async move { root.revoke(&id).await }),
            1 => plain(async move { root.disable(&id).await }),
            2 => {
                let scopes = to_strings(&["keyward:keys:write"]);
                let key = pb::Key { id, scopes, ..Default::default() };
                plain(async move { root.update(&key, &["scopes", "roles"]).await })
            }
            3 => plain(async move { root.suspend(&account).await }),
            4 => match (manager.role.clone(), manager.user.clone()) {
                (Some(own), _) => {
                    plain(async move { root.put_role(&account, &own, &["keyward:keys:write"]).await })
                }
                (None, Some(user)) => {
                    let request = pb::RemoveMemberRequest { account: manager.account.clone(), user };
                    plain(async move { root.accounts().remove_member(request).await })
                }
                (None, None) => plain(async move { root.rotate(&id, 0).await }),
            },
            5 => {
                let request = pb::DeleteRoleRequest { account: String::new(), name: role };
                return (plain(async move { root.accounts().delete_role(request).await }), None);
            }
            6 => return (plain(async move { root.put_role(&account, &role, &[grant]).await }), None),
            _ => return (plain(async move { root.put_role("", &role, &[grant]).await }), None),
        };
        (call, Some(manager.id))
    }
}
