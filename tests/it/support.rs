//! What the tests over the wire are made with: a whole server in this process on a port of its own, with a clock
//! that stands until it is moved and randomness from a seed; clients for any caller; and words to make accounts
//! and keys, to ask, and to read refusals, in a line.

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use keyward::{
    clock::{Clock as _, EntropyError, EntropySource, ManualClock},
    config::server::{DatabaseArgs, ServerSettings},
    domain::time::Timestamp,
    pb::{
        self, account_service_client::AccountServiceClient, audit_service_client::AuditServiceClient,
        authz_service_client::AuthzServiceClient, key_service_client::KeyServiceClient,
    },
};
use rand::{Rng as _, SeedableRng as _, rngs::ChaCha8Rng};
use tonic::{
    Code, Status,
    metadata::{AsciiMetadataKey, AsciiMetadataValue},
    service::{Interceptor, interceptor::InterceptedService},
    transport::Channel,
};
use tonic_types::StatusExt as _;

/// 2026-01-01T00:00:00Z: when every server of the tests starts.
pub(crate) const START: i64 = 1_767_225_600;
pub(crate) const HOUR: u64 = 60 * 60;
pub(crate) const DAY: u64 = 24 * HOUR;

/// Randomness that is the same in every run.
struct SeededEntropy(Mutex<ChaCha8Rng>);

impl EntropySource for SeededEntropy {
    fn fill(&self, bytes: &mut [u8]) -> Result<(), EntropyError> {
        self.0.lock().unwrap().fill_bytes(bytes);
        Ok(())
    }
}

/// Where a server of the tests keeps its keys; gone when it is dropped.
pub(crate) trait TestStorage {
    /// How many servers it can be shared by in a test of several.
    const REPLICAS: u64;
    /// A statement that lets rows name keys that do not exist.
    const DROP_FOREIGN_KEY: &str;

    fn create() -> Self;
    fn url(&self) -> String;
    /// Runs statements behind the server's back.
    fn sql(&self, sql: &str);
}

/// A file in a folder of its own.
pub(crate) struct SqliteFile(tempfile::TempDir);

impl TestStorage for SqliteFile {
    const REPLICAS: u64 = 1;
    const DROP_FOREIGN_KEY: &str = "PRAGMA foreign_keys = OFF";

    fn create() -> Self {
        SqliteFile(tempfile::tempdir().unwrap())
    }

    fn url(&self) -> String {
        format!("sqlite:{}", self.0.path().join("keyward.db").display())
    }

    fn sql(&self, sql: &str) {
        let file = rusqlite::Connection::open(self.0.path().join("keyward.db")).unwrap();
        file.busy_timeout(Duration::from_secs(10)).unwrap();
        file.execute_batch(sql).unwrap();
    }
}

impl TestStorage for crate::postgres::PostgresDatabase {
    const REPLICAS: u64 = 2;
    const DROP_FOREIGN_KEY: &str = "ALTER TABLE secrets DROP CONSTRAINT secrets_key_id_fkey";

    fn create() -> Self {
        crate::postgres::PostgresDatabase::new()
    }

    fn url(&self) -> String {
        crate::postgres::PostgresDatabase::url(self)
    }

    fn sql(&self, sql: &str) {
        crate::postgres::PostgresDatabase::sql(self, &format!("SET search_path TO keyward; {sql}"));
    }
}

/// The servers of the tests that any store would do for.
pub(crate) type Server = TestServer<SqliteFile>;

/// A server with an empty database. It ends with the test's runtime.
pub(crate) struct TestServer<P> {
    pub(crate) root_token: String,
    clock: Arc<ManualClock>,
    channel: Channel,
    server: keyward::server::Server,
    replicas: Mutex<Vec<keyward::server::Server>>,
    storage: P,
}

/// Starts a server with this seed, and gives the way to it.
async fn start_server(
    place: &impl TestStorage,
    clock: &Arc<ManualClock>,
    seed: u64,
    configure: impl FnOnce(&mut ServerSettings),
) -> (keyward::server::Server, Channel) {
    let mut settings = ServerSettings::load_for_database(&DatabaseArgs::default()).unwrap();
    settings.listen = "127.0.0.1:0".to_owned();
    settings.admin_listen = "127.0.0.1:0".to_owned();
    settings.database = place.url().into();
    settings.threads = 2;
    configure(&mut settings);
    let entropy = Arc::new(SeededEntropy(Mutex::new(ChaCha8Rng::seed_from_u64(seed))));
    let server = keyward::server::Server::start(settings, clock.clone(), entropy).await.unwrap();
    let channel = Channel::from_shared(format!("http://{}", server.address)).unwrap().connect_lazy();
    (server, channel)
}

impl<P: TestStorage> TestServer<P> {
    pub(crate) async fn start() -> Self {
        Self::start_with(|_| {}).await
    }

    /// A server with other settings than usual.
    pub(crate) async fn start_with(configure: impl FnOnce(&mut ServerSettings)) -> Self {
        let place = P::create();
        let clock = Arc::new(ManualClock::new(Timestamp::from_micros(START * 1_000_000)));
        let (server, channel) = start_server(&place, &clock, 7, configure).await;
        let root_token = server.root_token.as_ref().unwrap().reveal().to_owned();
        TestServer { root_token, clock, channel, server, replicas: Mutex::default(), storage: place }
    }

    /// Starts another replica on the same database, with the same clock; the way to it, without any header. Each has a
    /// number of its own.
    pub(crate) async fn start_replica(
        &self,
        number: u64,
        configure: impl FnOnce(&mut ServerSettings),
    ) -> Client {
        let named = |settings: &mut ServerSettings| {
            settings.replica_name = Some(format!("replica-{number}"));
            configure(settings);
        };
        let (server, channel) = start_server(&self.storage, &self.clock, 7 + number, named).await;
        self.replicas.lock().unwrap().push(server);
        Client { channel, headers: ExtraHeaders::default() }
    }

    /// A server with an account `acme`, and one `other`.
    pub(crate) async fn with_accounts() -> Self {
        let server = Self::start().await;
        server.create_account("acme").await;
        server.create_account("other").await;
        server
    }

    /// Runs statements behind its back.
    pub(crate) fn sql(&self, sql: &str) {
        self.storage.sql(sql);
    }

    /// Runs statements behind its back, after which secrets may name keys that do not exist.
    pub(crate) fn sql_without_foreign_key(&self, sql: &str) {
        self.sql(&format!("{}; {sql}", P::DROP_FOREIGN_KEY));
    }

    /// The server itself.
    pub(crate) fn inner(&self) -> &keyward::server::Server {
        &self.server
    }

    /// The way to the server, without any header.
    pub(crate) fn channel(&self) -> Channel {
        self.channel.clone()
    }

    /// Whoever sends no credential.
    pub(crate) fn client_without_token(&self) -> Client {
        Client { channel: self.channel(), headers: ExtraHeaders::default() }
    }

    /// Whoever holds this token.
    pub(crate) fn client_with_token(&self, token: &str) -> Client {
        self.client_without_token().with_header("authorization", &format!("Bearer {token}"))
    }

    /// The holder of the root key.
    pub(crate) fn root_client(&self) -> Client {
        self.client_with_token(&self.root_token)
    }

    /// Makes an account.
    pub(crate) async fn create_account(&self, id: &str) {
        let request = pb::CreateAccountRequest { id: id.to_owned(), ..Default::default() };
        self.root_client().accounts().create(request).await.unwrap();
    }

    /// Makes a key as root.
    pub(crate) async fn create_key(&self, request: pb::CreateKeyRequest) -> CreatedKey {
        self.root_client().create_key(request).await
    }

    /// The holder of a new key of this account with these scopes.
    pub(crate) async fn client_with_scopes(&self, account: &str, scopes: &[&str]) -> Client {
        let made = self.create_key(service_key_request(account, scopes)).await;
        self.client_with_token(&made.token)
    }

    /// Moves the clock on.
    pub(crate) fn advance(&self, seconds: u64) {
        self.advance_by(Duration::from_secs(seconds));
    }

    /// Moves the clock on.
    pub(crate) fn advance_by(&self, by: Duration) {
        self.clock.advance(by);
    }

    /// The instant so many seconds from now.
    pub(crate) fn timestamp_after(&self, seconds: i64) -> prost_types::Timestamp {
        let micros = self.clock.now().as_micros();
        prost_types::Timestamp {
            seconds: micros.div_euclid(1_000_000) + seconds,
            nanos: i32::try_from(micros.rem_euclid(1_000_000) * 1000).unwrap(),
        }
    }
}

/// Headers that go with every call.
#[derive(Clone, Default)]
pub(crate) struct ExtraHeaders(Vec<(AsciiMetadataKey, AsciiMetadataValue)>);

impl Interceptor for ExtraHeaders {
    fn call(&mut self, mut request: tonic::Request<()>) -> Result<tonic::Request<()>, Status> {
        for (name, value) in &self.0 {
            request.metadata_mut().append(name.clone(), value.clone());
        }
        Ok(request)
    }
}

type ChannelWithHeaders = InterceptedService<Channel, ExtraHeaders>;

/// A key and its token.
#[derive(Clone)]
pub(crate) struct CreatedKey {
    pub(crate) id: String,
    pub(crate) token: String,
    pub(crate) key: pb::Key,
    pub(crate) revision: u64,
}

/// One caller's way to the server.
#[derive(Clone)]
pub(crate) struct Client {
    channel: Channel,
    headers: ExtraHeaders,
}

impl Client {
    /// The same caller with one more header.
    pub(crate) fn with_header(&self, name: &str, value: &str) -> Client {
        let mut client = self.clone();
        client.headers.0.push((name.parse().unwrap(), value.parse().unwrap()));
        client
    }

    fn channel_with_headers(&self) -> ChannelWithHeaders {
        InterceptedService::new(self.channel.clone(), self.headers.clone())
    }

    pub(crate) fn keys(&self) -> KeyServiceClient<ChannelWithHeaders> {
        KeyServiceClient::new(self.channel_with_headers())
    }

    pub(crate) fn authz(&self) -> AuthzServiceClient<ChannelWithHeaders> {
        AuthzServiceClient::new(self.channel_with_headers())
    }

    pub(crate) fn accounts(&self) -> AccountServiceClient<ChannelWithHeaders> {
        AccountServiceClient::new(self.channel_with_headers())
    }

    pub(crate) fn audit(&self) -> AuditServiceClient<ChannelWithHeaders> {
        AuditServiceClient::new(self.channel_with_headers())
    }

    /// Calls any unary RPC by its path, `package.Service/Method`; what it answers is not read.
    pub(crate) async fn call_rpc(
        &self,
        method: &str,
        message: impl prost::Message + 'static,
    ) -> Result<(), Status> {
        self.call_rpc_for_answer(method, message).await
    }

    /// Calls any unary RPC by its path, `package.Service/Method`.
    pub(crate) async fn call_rpc_for_answer<A>(
        &self,
        method: &str,
        message: impl prost::Message + 'static,
    ) -> Result<A, Status>
    where
        A: prost::Message + Default + 'static,
    {
        let mut grpc = tonic::client::Grpc::new(self.channel_with_headers());
        grpc.ready().await.unwrap();
        let path = format!("/{method}").parse().unwrap();
        let codec = tonic_prost::ProstCodec::default();
        grpc.unary(tonic::Request::new(message), path, codec).await.map(tonic::Response::into_inner)
    }

    /// Calls any RPC by its path; its message comes out of `messages`, as bytes, after its headers.
    pub(crate) async fn call_slowly(
        &self,
        method: &str,
        messages: impl futures_util::Stream<Item = bytes::Bytes> + Send + 'static,
    ) -> Result<bytes::Bytes, Status> {
        let mut grpc = tonic::client::Grpc::new(self.channel_with_headers());
        grpc.ready().await.unwrap();
        let path = format!("/{method}").parse().unwrap();
        let answer =
            grpc.client_streaming(tonic::Request::new(messages), path, crate::process::BytesCodec).await;
        answer.map(tonic::Response::into_inner)
    }

    /// Makes a key that may be made.
    pub(crate) async fn create_key(&self, request: pb::CreateKeyRequest) -> CreatedKey {
        let pb::CreateKeyResponse { key, token, revision, replayed: _ } = self.create(request).await.unwrap();
        let key = key.unwrap();
        CreatedKey { id: key.id.clone(), token, key, revision }
    }

    pub(crate) async fn create(
        &self,
        request: pb::CreateKeyRequest,
    ) -> Result<pb::CreateKeyResponse, Status> {
        Ok(self.keys().create(request).await?.into_inner())
    }

    pub(crate) async fn get(&self, id: &str) -> Result<pb::Key, Status> {
        let request = pb::GetKeyRequest { id: id.to_owned() };
        Ok(self.keys().get(request).await?.into_inner().key.unwrap())
    }

    pub(crate) async fn list(&self, request: pb::ListKeysRequest) -> Result<pb::ListKeysResponse, Status> {
        Ok(self.keys().list(request).await?.into_inner())
    }

    /// Changes the fields that `paths` name to what they are in `key`.
    pub(crate) async fn update(&self, key: &pb::Key, paths: &[&str]) -> Result<pb::Key, Status> {
        let update_mask = Some(prost_types::FieldMask { paths: to_strings(paths) });
        let request = pb::UpdateKeyRequest { key: Some(key.clone()), update_mask };
        Ok(self.keys().update(request).await?.into_inner().key.unwrap())
    }

    pub(crate) async fn disable(&self, id: &str) -> Result<pb::Key, Status> {
        let request = pb::DisableKeyRequest { id: id.to_owned() };
        Ok(self.keys().disable(request).await?.into_inner().key.unwrap())
    }

    pub(crate) async fn enable(&self, id: &str) -> Result<pb::Key, Status> {
        let request = pb::EnableKeyRequest { id: id.to_owned() };
        Ok(self.keys().enable(request).await?.into_inner().key.unwrap())
    }

    pub(crate) async fn revoke(&self, id: &str) -> Result<pb::RevokeKeyResponse, Status> {
        let request = pb::RevokeKeyRequest { id: id.to_owned(), ..Default::default() };
        Ok(self.keys().revoke(request).await?.into_inner())
    }

    pub(crate) async fn rotate(
        &self,
        id: &str,
        overlap_seconds: u64,
    ) -> Result<pb::RotateKeyResponse, Status> {
        let overlap = Some(proto_seconds(overlap_seconds));
        let request = pb::RotateKeyRequest { id: id.to_owned(), overlap, idempotency_key: None };
        Ok(self.keys().rotate(request).await?.into_inner())
    }

    pub(crate) async fn finish_rotation(&self, id: &str) -> Result<pb::FinishRotationResponse, Status> {
        let request = pb::FinishRotationRequest { id: id.to_owned() };
        Ok(self.keys().finish_rotation(request).await?.into_inner())
    }

    pub(crate) async fn import(&self, keys: Vec<pb::ImportKey>) -> Result<Vec<pb::ImportResult>, Status> {
        Ok(self.keys().import(pb::ImportKeysRequest { keys }).await?.into_inner().results)
    }

    pub(crate) async fn lookup(&self, token: &str) -> Result<pb::LookupKeyResponse, Status> {
        let request = pb::LookupKeyRequest { token: token.to_owned() };
        Ok(self.keys().lookup(request).await?.into_inner())
    }

    pub(crate) async fn who_am_i(&self) -> Result<pb::WhoAmIResponse, Status> {
        Ok(self.keys().who_am_i(pb::WhoAmIRequest {}).await?.into_inner())
    }

    pub(crate) async fn revoke_self(&self) -> Result<pb::RevokeSelfResponse, Status> {
        Ok(self.keys().revoke_self(pb::RevokeSelfRequest {}).await?.into_inner())
    }

    pub(crate) async fn check(&self, request: pb::CheckRequest) -> Result<pb::CheckResponse, Status> {
        Ok(self.authz().check(request).await?.into_inner())
    }

    /// What a Check of this token says that asks nothing else.
    pub(crate) async fn check_reason(&self, token: &str) -> pb::Reason {
        self.check(authenticate_request(token)).await.unwrap().reason()
    }

    pub(crate) async fn suspend(&self, account: &str) -> Result<pb::SuspendAccountResponse, Status> {
        let request = pb::SuspendAccountRequest { id: account.to_owned() };
        Ok(self.accounts().suspend(request).await?.into_inner())
    }

    pub(crate) async fn resume(&self, account: &str) -> Result<pb::ResumeAccountResponse, Status> {
        let request = pb::ResumeAccountRequest { id: account.to_owned() };
        Ok(self.accounts().resume(request).await?.into_inner())
    }

    pub(crate) async fn put_role(&self, account: &str, name: &str, scopes: &[&str]) -> Result<u64, Status> {
        let (account, name) = (account.to_owned(), name.to_owned());
        let request = pb::PutRoleRequest { account, name, scopes: to_strings(scopes) };
        Ok(self.accounts().put_role(request).await?.into_inner().revision)
    }

    pub(crate) async fn put_member(&self, account: &str, user: &str, role: &str) -> Result<u64, Status> {
        let (account, user, role) = (account.to_owned(), user.to_owned(), role.to_owned());
        let request = pb::PutMemberRequest { account, user, role };
        Ok(self.accounts().put_member(request).await?.into_inner().revision)
    }

    pub(crate) async fn verify_audit_log(&self) -> pb::VerifyAuditLogResponse {
        self.audit().verify(pb::VerifyAuditLogRequest::default()).await.unwrap().into_inner()
    }

    pub(crate) async fn list_audit_entries(
        &self,
        request: pb::ListAuditEntriesRequest,
    ) -> Result<pb::ListAuditEntriesResponse, Status> {
        Ok(self.audit().list(request).await?.into_inner())
    }
}

/// A key of an account in production.
pub(crate) fn service_key_request(account: &str, scopes: &[&str]) -> pb::CreateKeyRequest {
    pb::CreateKeyRequest {
        account: account.to_owned(),
        environment: "production".to_owned(),
        scopes: to_strings(scopes),
        ..Default::default()
    }
}

/// A key of a user in production.
pub(crate) fn user_key_request(user: &str, scopes: &[&str]) -> pb::CreateKeyRequest {
    pb::CreateKeyRequest { user: user.to_owned(), ..service_key_request("", scopes) }
}

/// A key of an account in production with a name.
pub(crate) fn named_key_request(account: &str, name: &str) -> pb::CreateKeyRequest {
    pb::CreateKeyRequest { name: Some(name.to_owned()), ..service_key_request(account, &["monitors:read"]) }
}

/// Whether a token has a scope in production.
pub(crate) fn scope_check_request(token: &str, scope: &str) -> pb::CheckRequest {
    pb::CheckRequest { authenticate_only: false, scopes: to_strings(&[scope]), ..authenticate_request(token) }
}

/// Whether a token is valid in production.
pub(crate) fn authenticate_request(token: &str) -> pb::CheckRequest {
    pb::CheckRequest {
        token: token.to_owned(),
        environment: "production".to_owned(),
        authenticate_only: true,
        ..Default::default()
    }
}

pub(crate) fn to_strings(list: &[&str]) -> Vec<String> {
    list.iter().map(|&text| text.to_owned()).collect()
}

pub(crate) fn proto_seconds(seconds: u64) -> prost_types::Duration {
    prost_types::Duration { seconds: i64::try_from(seconds).unwrap(), nanos: 0 }
}

/// The reason in a refusal's ErrorInfo, which is always ours.
#[track_caller]
pub(crate) fn error_reason(status: &Status) -> String {
    let info = status.get_details_error_info().unwrap_or_else(|| panic!("no ErrorInfo: {status:?}"));
    assert_eq!(info.domain, "keyward", "{status:?}");
    info.reason
}

/// The fields that a refusal calls wrong, in its order.
pub(crate) fn violated_fields(status: &Status) -> Vec<String> {
    let violations = status.get_details_bad_request().map(|wrong| wrong.field_violations).unwrap_or_default();
    violations.into_iter().map(|violation| violation.field).collect()
}

/// Holds that a call was refused so, and gives the status.
#[track_caller]
pub(crate) fn assert_refused<T>(result: Result<T, Status>, code: Code, with_reason: &str) -> Status {
    let Err(status) = result else { panic!("was not refused; {code:?} {with_reason} was expected") };
    assert_eq!((status.code(), error_reason(&status).as_str()), (code, with_reason), "{status:?}");
    status
}

/// Holds that a call was refused for these fields, and for no others.
#[track_caller]
pub(crate) fn assert_invalid<T>(result: Result<T, Status>, wrong: &[&str]) -> Status {
    let status = assert_refused(result, Code::InvalidArgument, "INVALID_REQUEST");
    assert_eq!(violated_fields(&status), wrong, "{status:?}");
    status
}
