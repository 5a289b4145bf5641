//! The real binary as a child process: what signals, files, exit codes and other programs see of Keyward.
//!
//! A [`TestHome`] is a folder with a database and everything that servers on it have printed; a [`KeywardProcess`] is one
//! running server. Both are gone when they are dropped, whatever becomes of the test.

use std::{
    fs::File,
    io::{Read as _, Write as _},
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus},
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::{Duration, Instant},
};

use bytes::{Buf as _, BufMut as _, Bytes};
use keyward::pb::{
    self, account_service_client::AccountServiceClient, audit_service_client::AuditServiceClient,
    authz_service_client::AuthzServiceClient, key_service_client::KeyServiceClient,
};
use tempfile::TempDir;
use tonic::{
    Request, Status,
    codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder},
    service::{Interceptor, interceptor::InterceptedService},
    transport::{Channel, Endpoint},
};
use tonic_types::StatusExt as _;

/// How long a test waits for what should take milliseconds, on a machine that has much else to do.
pub(crate) const WAIT_TIMEOUT: Duration = Duration::from_secs(60);

/// Asks again and again until there is an answer.
pub(crate) fn wait_for<T>(what: &str, mut answer: impl FnMut() -> Option<T>) -> T {
    let end = Instant::now() + WAIT_TIMEOUT;
    loop {
        if let Some(answer) = answer() {
            return answer;
        }
        assert!(Instant::now() < end, "waited in vain for {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// The same, where to ask takes a call.
pub(crate) async fn wait_for_answer<T>(what: &str, mut answer: impl AsyncFnMut() -> Option<T>) -> T {
    let end = Instant::now() + WAIT_TIMEOUT;
    loop {
        if let Some(answer) = answer().await {
            return answer;
        }
        assert!(Instant::now() < end, "waited in vain for {what}");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

/// A folder with a database, and all that was printed by the processes that ran on it.
#[derive(Clone)]
pub(crate) struct TestHome {
    folder: Arc<TempDir>,
    /// Where the database is, if not in the folder.
    external_url: Option<String>,
    runs: Arc<AtomicU32>,
}

impl TestHome {
    pub(crate) fn new() -> TestHome {
        TestHome { folder: Arc::new(tempfile::tempdir().unwrap()), external_url: None, runs: Arc::default() }
    }

    /// A folder for servers whose database is somewhere else.
    pub(crate) fn with_database_url(url: String) -> TestHome {
        TestHome { external_url: Some(url), ..TestHome::new() }
    }

    /// The same folder, for a server that reaches the database by another way.
    pub(crate) fn with_url(&self, url: &str) -> TestHome {
        TestHome { external_url: Some(url.to_owned()), ..self.clone() }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub(crate) fn database(&self) -> PathBuf {
        self.path("keyward.db")
    }

    pub(crate) fn url(&self) -> String {
        self.external_url.clone().unwrap_or_else(|| format!("sqlite:{}", self.database().display()))
    }

    pub(crate) fn root_key_file(&self) -> PathBuf {
        self.path("root.key")
    }

    pub(crate) fn root_key(&self) -> String {
        std::fs::read_to_string(self.root_key_file()).unwrap()
    }

    /// Every file in the folder, with its content.
    pub(crate) fn files(&self) -> Vec<(PathBuf, Vec<u8>)> {
        let entries = std::fs::read_dir(self.folder.path()).unwrap();
        let paths = entries.map(|entry| entry.unwrap().path());
        paths
            .filter(|path| path.is_file())
            .map(|path| (path.clone(), std::fs::read(&path).unwrap()))
            .collect()
    }

    /// `keyward` with these arguments and nothing of the test's own environment that would steer it.
    pub(crate) fn command<S: AsRef<std::ffi::OsStr>>(
        &self,
        arguments: impl IntoIterator<Item = S>,
    ) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_keyward"));
        command.args(arguments).current_dir(self.folder.path());
        let steers = |name: &str| {
            ["KEYWARD_", "OTEL_", "TRACEPARENT", "TRACESTATE"].iter().any(|start| name.starts_with(start))
        };
        for (name, _) in std::env::vars_os().filter(|(name, _)| steers(&name.to_string_lossy())) {
            command.env_remove(name);
        }
        // Most tests stop servers that nobody looks at any more; a flag says otherwise.
        command.env("KEYWARD_SHUTDOWN_DELAY", "0s");
        command
    }

    /// `keyward root-key reset` on this database. The new key goes to `file`; `-` = to standard output.
    pub(crate) fn root_key_reset_command(&self, file: &str) -> Command {
        let mut command = self.command(["root-key", "reset", "--yes", "--database", &self.url()]);
        command.args(["--root-key-file", file]);
        command
    }

    /// `keyward serve` on ports of the system's choice, on this database, the root key going to its file.
    pub(crate) fn serve_command(&self) -> Command {
        let mut command = self.serve_command_without_root_key_file();
        command.arg("--root-key-file").arg(self.root_key_file());
        command
    }

    /// The same without `--root-key-file`; standard output is no terminal.
    pub(crate) fn serve_command_without_root_key_file(&self) -> Command {
        let url = self.url();
        let ports = ["--listen", "127.0.0.1:0", "--admin-listen", "127.0.0.1:0"];
        let mut command = self.command(["serve", "--database", &url]);
        command.args(ports);
        command
    }

    /// The command with a terminal as its standard output.
    pub(crate) fn with_terminal(&self, command: &Command) -> Command {
        let words = [command.get_program()].into_iter().chain(command.get_args());
        let words: Vec<_> = words.map(|word| format!("'{}'", word.to_str().unwrap())).collect();
        // It ends with the terminal, which a server by itself does not.
        let line = format!(
            "stty -onlcr; exec setpriv --pdeathsig KILL {} 2>{}",
            words.join(" "),
            self.path("on-terminal.log").display()
        );
        let mut script = same_environment_command("script", command);
        script.args(["-q", "-e", "-f", "-c", &line, "/dev/null"]);
        script
    }

    pub(crate) fn spawn(&self, mut command: Command) -> TestProcess {
        let run = self.runs.fetch_add(1, Ordering::Relaxed);
        let (out, err) = (self.path(&format!("stdout.{run}")), self.path(&format!("stderr.{run}")));
        let child = command
            .stdin(std::process::Stdio::null())
            .stdout(File::create(&out).unwrap())
            .stderr(File::create(&err).unwrap())
            .spawn()
            .unwrap();
        TestProcess { child, out, err }
    }

    /// Runs a command that ends by itself.
    pub(crate) fn run_to_end(&self, command: Command) -> FinishedProcess {
        self.spawn(command).wait_until_ended()
    }

    /// Runs a command that must not succeed, and gives what it says of that.
    #[track_caller]
    pub(crate) fn run_expecting_failure(&self, command: Command) -> String {
        let Err(ended) = self.start_with(command) else { panic!("it serves") };
        assert_eq!(ended.code, Some(1), "{ended:?}");
        assert!(!ended.err.contains("panicked"), "{ended:?}");
        ended.err
    }

    pub(crate) fn start(&self) -> KeywardProcess {
        self.start_with(self.serve_command()).unwrap()
    }

    /// Starts a server, unless it ends by itself.
    pub(crate) fn start_with(&self, command: Command) -> Result<KeywardProcess, FinishedProcess> {
        let mut process = self.spawn(command);
        let ended = wait_for("a server's addresses", || match process.addresses() {
            Some(addresses) => Some(Ok(addresses)),
            None => process.child.try_wait().unwrap().map(Err),
        });
        match ended {
            Ok((address, admin)) => {
                Ok(KeywardProcess { home: self.clone(), process, address, admin_address: admin })
            }
            Err(status) => Err(process.finish(status)),
        }
    }
}

/// Another program in the folder and the environment of a command.
pub(crate) fn same_environment_command(program: impl AsRef<std::ffi::OsStr>, command: &Command) -> Command {
    let mut other = Command::new(program);
    other.current_dir(command.get_current_dir().unwrap());
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => other.env(name, value),
            None => other.env_remove(name),
        };
    }
    other
}

/// How a process ended.
#[derive(Debug)]
pub(crate) struct FinishedProcess {
    pub(crate) code: Option<i32>,
    pub(crate) out: String,
    pub(crate) err: String,
}

/// A child process; it does not outlive this value.
pub(crate) struct TestProcess {
    child: Child,
    out: PathBuf,
    err: PathBuf,
}

impl TestProcess {
    pub(crate) fn stdout(&self) -> String {
        std::fs::read_to_string(&self.out).unwrap()
    }

    pub(crate) fn stderr(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(&self.err).unwrap()).into_owned()
    }

    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    pub(crate) fn has_ended(&mut self) -> bool {
        self.child.try_wait().unwrap().is_some()
    }

    /// Where it serves gRPC and the admin pages, once it says so.
    fn addresses(&self) -> Option<(SocketAddr, SocketAddr)> {
        let out = self.stdout();
        let (_, line) = out.split_once("keyward serves gRPC on ")?;
        let (line, _) = line.split_once('\n')?;
        let (address, admin) = line.split_once(", admin pages on http://")?;
        Some((address.parse().unwrap(), admin.parse().unwrap()))
    }

    /// Where it serves Envoy, if it was told to.
    pub(crate) fn envoy_address(&self) -> Option<SocketAddr> {
        let out = self.stdout();
        let (_, rest) = out.split_once("keyward serves Envoy on ")?;
        Some(rest.lines().next()?.parse().unwrap())
    }

    /// Where a listener of the settings file is, as the server says.
    pub(crate) fn listener_address(&self, name: &str) -> Option<String> {
        let out = self.stdout();
        let (_, rest) = out.split_once(&format!("keyward serves {name} on "))?;
        Some(rest.lines().next()?.trim_end_matches(" with TLS").to_owned())
    }

    /// Asks it to end, as an operator does.
    pub(crate) fn terminate(&self) {
        self.signal("TERM");
    }

    /// Asks it to read its files again.
    pub(crate) fn send_sighup(&self) {
        self.signal("HUP");
    }

    fn signal(&self, name: &str) {
        let kill = format!("kill -{name} \"$0\"");
        let kill = Command::new("sh").args(["-c", &kill, &self.id().to_string()]).status();
        assert!(kill.unwrap().success());
    }

    /// Ends it as a power cut does: it learns nothing of it.
    pub(crate) fn kill(mut self) -> FinishedProcess {
        self.child.kill().unwrap();
        self.wait_until_ended()
    }

    /// Waits until it has ended.
    pub(crate) fn wait_until_ended(mut self) -> FinishedProcess {
        let status = wait_for("a process to end", || self.child.try_wait().unwrap());
        self.finish(status)
    }

    fn finish(&self, status: ExitStatus) -> FinishedProcess {
        FinishedProcess { code: status.code(), out: self.stdout(), err: self.stderr() }
    }
}

impl Drop for TestProcess {
    fn drop(&mut self) {
        // It may have ended long ago.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A running server.
pub(crate) struct KeywardProcess {
    pub(crate) home: TestHome,
    pub(crate) process: TestProcess,
    pub(crate) address: SocketAddr,
    pub(crate) admin_address: SocketAddr,
}

impl KeywardProcess {
    /// A server on a new database.
    pub(crate) fn start() -> KeywardProcess {
        TestHome::new().start()
    }

    /// Stops it as an operator does, and sees that it ended well.
    #[track_caller]
    pub(crate) fn stop(self) -> TestHome {
        self.process.terminate();
        let ended = self.process.wait_until_ended();
        assert_eq!(ended.code, Some(0), "{ended:?}");
        assert!(!ended.err.contains("panicked"), "{ended:?}");
        self.home
    }

    /// A connection of its own.
    pub(crate) fn channel(&self) -> Channel {
        Endpoint::from_shared(format!("http://{}", self.address))
            .unwrap()
            .connect_timeout(WAIT_TIMEOUT)
            .connect_lazy()
    }

    /// Calls with this token.
    pub(crate) fn caller(&self, token: &str) -> AuthorizedClients {
        AuthorizedClients::with_token(self.channel(), token)
    }

    pub(crate) fn root_caller(&self) -> AuthorizedClients {
        self.caller(&self.home.root_key())
    }

    /// An admin page: the status line's code, and the text.
    pub(crate) fn fetch_admin_page(&self, path: &str) -> (u16, String) {
        let mut stream = std::net::TcpStream::connect(self.admin_address).unwrap();
        stream.set_read_timeout(Some(WAIT_TIMEOUT)).unwrap();
        write!(stream, "GET {path} HTTP/1.1\r\nhost: keyward\r\nconnection: close\r\n\r\n").unwrap();
        let mut response = String::new();
        stream.read_to_string(&mut response).unwrap();
        let (head, text) = response.split_once("\r\n\r\n").unwrap();
        let code = head.split(' ').nth(1).unwrap().parse().unwrap();
        (code, text.to_owned())
    }
}

fn is_starting(status: &Status) -> bool {
    status.get_details_error_info().is_some_and(|info| info.reason == "STARTING")
}

/// Puts the token into each call, if there is one.
#[derive(Clone)]
pub(crate) struct BearerInterceptor(String);

impl Interceptor for BearerInterceptor {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        if !self.0.is_empty() {
            request.metadata_mut().insert("authorization", self.0.parse().unwrap());
        }
        Ok(request)
    }
}

pub(crate) type AuthorizedChannel = InterceptedService<Channel, BearerInterceptor>;

/// Clients of every service, with one token, over one connection.
#[derive(Clone)]
pub(crate) struct AuthorizedClients {
    pub(crate) keys: KeyServiceClient<AuthorizedChannel>,
    pub(crate) authz: AuthzServiceClient<AuthorizedChannel>,
    pub(crate) accounts: AccountServiceClient<AuthorizedChannel>,
    pub(crate) audit: AuditServiceClient<AuthorizedChannel>,
}

impl AuthorizedClients {
    pub(crate) fn with_token(channel: Channel, token: &str) -> AuthorizedClients {
        AuthorizedClients::with_authorization(channel, format!("Bearer {token}"))
    }

    /// Calls without a token.
    pub(crate) fn without_token(channel: Channel) -> AuthorizedClients {
        AuthorizedClients::with_authorization(channel, String::new())
    }

    fn with_authorization(channel: Channel, authorization: String) -> AuthorizedClients {
        let bearer = InterceptedService::new(channel, BearerInterceptor(authorization));
        AuthorizedClients {
            keys: KeyServiceClient::new(bearer.clone()),
            authz: AuthzServiceClient::new(bearer.clone()),
            accounts: AccountServiceClient::new(bearer.clone()),
            audit: AuditServiceClient::new(bearer),
        }
    }

    /// Makes an account, once the server has started: it announces its addresses before it has loaded its keys.
    pub(crate) async fn create_account(&mut self, id: &str) {
        let request = pb::CreateAccountRequest { id: id.to_owned(), ..Default::default() };
        let made = wait_for_answer("the server to start", async || {
            match self.accounts.create(request.clone()).await {
                Err(status) if is_starting(&status) => None,
                made => Some(made),
            }
        });
        made.await.unwrap();
    }

    /// Makes a key: its id and its token.
    pub(crate) async fn create_key(
        &mut self,
        request: pb::CreateKeyRequest,
    ) -> Result<(String, String), Status> {
        let response = self.keys.create(request).await?.into_inner();
        Ok((response.key.unwrap().id, response.token))
    }

    /// Checks a token for `monitors:read` in production.
    pub(crate) async fn check_token(&mut self, token: &str) -> Result<pb::Reason, Status> {
        self.authz.check(check_request(token)).await.map(|response| response.into_inner().reason())
    }

    pub(crate) async fn revoke_key(&mut self, id: &str) -> Result<pb::Key, Status> {
        let request = pb::RevokeKeyRequest {
            id: id.to_owned(),
            reason: pb::RevokeReason::Compromised.into(),
            comment: String::new(),
        };
        self.keys.revoke(request).await.map(|response| response.into_inner().key.unwrap())
    }

    /// Rotates a key without overlap: the new token.
    pub(crate) async fn rotate_key(&mut self, id: &str) -> Result<String, Status> {
        let request = pb::RotateKeyRequest { id: id.to_owned(), ..Default::default() };
        self.keys.rotate(request).await.map(|response| response.into_inner().token)
    }

    pub(crate) async fn get_key(&mut self, id: &str) -> Result<pb::Key, Status> {
        let request = pb::GetKeyRequest { id: id.to_owned() };
        self.keys.get(request).await.map(|response| response.into_inner().key.unwrap())
    }
}

/// A key of `acme` that may `monitors:read` in production.
pub(crate) fn plain_key_request() -> pb::CreateKeyRequest {
    pb::CreateKeyRequest {
        account: "acme".to_owned(),
        environment: "production".to_owned(),
        scopes: vec!["monitors:read".to_owned()],
        ..Default::default()
    }
}

/// Whether a token may `monitors:read` in production.
pub(crate) fn check_request(token: &str) -> pb::CheckRequest {
    pb::CheckRequest {
        token: token.to_owned(),
        environment: "production".to_owned(),
        scopes: vec!["monitors:read".to_owned()],
        ..Default::default()
    }
}

/// Messages as bytes: for what no generated client would send.
#[derive(Default)]
pub(crate) struct BytesCodec;

impl Codec for BytesCodec {
    type Encode = Bytes;
    type Decode = Bytes;
    type Encoder = BytesCodec;
    type Decoder = BytesCodec;

    fn encoder(&mut self) -> BytesCodec {
        BytesCodec
    }

    fn decoder(&mut self) -> BytesCodec {
        BytesCodec
    }
}

impl Encoder for BytesCodec {
    type Item = Bytes;
    type Error = Status;

    fn encode(&mut self, item: Bytes, to: &mut EncodeBuf<'_>) -> Result<(), Status> {
        to.put(item);
        Ok(())
    }
}

impl Decoder for BytesCodec {
    type Item = Bytes;
    type Error = Status;

    fn decode(&mut self, from: &mut DecodeBuf<'_>) -> Result<Option<Bytes>, Status> {
        Ok(Some(from.copy_to_bytes(from.remaining())))
    }
}

/// Sends messages as bytes to an RPC, as they come out of `messages`.
pub(crate) async fn call_raw(
    channel: Channel,
    token: &str,
    method: &str,
    messages: impl futures_util::Stream<Item = Bytes> + Send + 'static,
) -> Result<Bytes, Status> {
    let bearer = InterceptedService::new(channel, BearerInterceptor(format!("Bearer {token}")));
    let mut client = tonic::client::Grpc::new(bearer);
    client.ready().await.map_err(|error| Status::unavailable(error.to_string()))?;
    let path = format!("/{method}").parse().unwrap();
    client
        .client_streaming(Request::new(messages), path, BytesCodec)
        .await
        .map(|response| response.into_inner())
}

/// What stands in a file, for tests that look for text in it.
pub(crate) fn read_text(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap()
}
