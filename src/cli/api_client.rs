//! The client for the server's gRPC services: it adds the caller's token, a request id and a time limit to every call.
//!
//! Not here: which calls a command makes, and how its settings are read (`config::client`).

use std::{path::Path, time::Duration};

use tonic::{
    Request, Response, Status,
    metadata::{Ascii, MetadataValue},
    transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity},
};
use zeroize::Zeroizing;

use super::{
    console,
    error::{self, CliError},
    token_io,
    value_format::shown_path,
};
use crate::{
    clock::{SystemEntropy, random_bytes},
    config::{
        client::{ClientSettings, ServerUrl},
        trace_parent::InheritedTraceContext,
    },
    pb::{
        account_service_client::AccountServiceClient, audit_service_client::AuditServiceClient,
        authz_service_client::AuthzServiceClient, key_service_client::KeyServiceClient,
    },
};

/// Larger than the default of 4 MiB, because a page of large keys and the up to 5,000 keys of a BulkRevoke exceed that.
const MAX_RESPONSE_BYTES: usize = 256 << 20;

const REQUEST_ID_HEADER: &str = "x-request-id";

/// How long the client waits past the deadline. The server's own timeout status has more details than a local one.
const TIMEOUT_GRACE: Duration = Duration::from_millis(250);

/// The time limit of a call if `--timeout` is not given.
#[derive(Clone, Copy, Debug)]
pub(super) enum DefaultTimeout {
    /// The server answers without waiting for replicas.
    Quick,
    /// The server reads the whole log before it answers.
    FullScan,
    /// The server answers after every replica has applied the change or lost its lease.
    Propagation,
}

impl DefaultTimeout {
    fn duration(self) -> Duration {
        Duration::from_secs(match self {
            DefaultTimeout::Quick => 10,
            DefaultTimeout::FullScan => 600,
            // The default lease is 60 s, and the server waits 1.25 times as long for an unreachable replica.
            DefaultTimeout::Propagation => 90,
        })
    }
}

pub(super) struct ApiClient {
    channel: Channel,
    /// `None` if a client certificate authenticates the caller.
    authorization: Option<MetadataValue<Ascii>>,
    server: ServerUrl,
    timeout: Option<Duration>,
    /// The headers that make each call part of the inherited trace.
    trace_headers: Vec<(&'static str, MetadataValue<Ascii>)>,
    hides_spinner: bool,
}

impl ApiClient {
    /// Reads the caller's token and prepares the connection. The first call connects.
    pub(super) fn from_settings(settings: &ClientSettings) -> Result<ApiClient, CliError> {
        if !settings.insecure {
            refuse_exposed_plaintext(&settings.server)?;
        }
        let bearer = match settings.token_file.as_deref() {
            Some(file) => Some(read_authorization(file)?),
            None if settings.client_certificate.is_some() => None,
            None => {
                return Err(CliError::new("no token to call with").with_hint(
                    "name the file that holds it: --token-file FILE, KEYWARD_TOKEN_FILE, \
                     or token_file in the configuration file",
                ));
            }
        };
        let limit = settings.timeout.unwrap_or(DefaultTimeout::Quick.duration());
        let mut endpoint = Endpoint::from_shared(settings.server.as_str().to_owned())
            .map_err(|_| CliError::new(format!("{} is not a server address", settings.server)))?
            .connect_timeout(limit);
        if settings.server.is_tls() {
            let unusable =
                |error| CliError::new(format!("TLS cannot be used: {}", error::root_cause(&error)));
            endpoint = endpoint.tls_config(load_tls_config(settings)?).map_err(unusable)?;
        }
        Ok(ApiClient {
            channel: endpoint.connect_lazy(),
            authorization: bearer,
            server: settings.server.clone(),
            timeout: settings.timeout,
            // Their values are visible ASCII, so none fails to parse.
            trace_headers: settings
                .trace_parent
                .iter()
                .flat_map(InheritedTraceContext::headers)
                .filter_map(|(name, value)| Some((name, value.parse().ok()?)))
                .collect(),
            hides_spinner: false,
        })
    }

    /// Hides the spinner, for a command that shows its own progress.
    pub(super) fn without_spinner(self) -> ApiClient {
        ApiClient { hides_spinner: true, ..self }
    }

    pub(super) async fn call_keys<Q, A>(
        &self,
        timeout: DefaultTimeout,
        request: Q,
        call: impl AsyncFnOnce(KeyServiceClient<Channel>, Request<Q>) -> Result<Response<A>, Status>,
    ) -> Result<A, CliError> {
        let client =
            KeyServiceClient::new(self.channel.clone()).max_decoding_message_size(MAX_RESPONSE_BYTES);
        self.call(timeout, request, async |request| call(client, request).await).await
    }

    pub(super) async fn call_accounts<Q, A>(
        &self,
        timeout: DefaultTimeout,
        request: Q,
        call: impl AsyncFnOnce(AccountServiceClient<Channel>, Request<Q>) -> Result<Response<A>, Status>,
    ) -> Result<A, CliError> {
        let client =
            AccountServiceClient::new(self.channel.clone()).max_decoding_message_size(MAX_RESPONSE_BYTES);
        self.call(timeout, request, async |request| call(client, request).await).await
    }

    pub(super) async fn call_authz<Q, A>(
        &self,
        request: Q,
        call: impl AsyncFnOnce(AuthzServiceClient<Channel>, Request<Q>) -> Result<Response<A>, Status>,
    ) -> Result<A, CliError> {
        let client = AuthzServiceClient::new(self.channel.clone());
        self.call(DefaultTimeout::Quick, request, async |request| call(client, request).await).await
    }

    pub(super) async fn call_audit<Q, A>(
        &self,
        timeout: DefaultTimeout,
        request: Q,
        call: impl AsyncFnOnce(AuditServiceClient<Channel>, Request<Q>) -> Result<Response<A>, Status>,
    ) -> Result<A, CliError> {
        let client =
            AuditServiceClient::new(self.channel.clone()).max_decoding_message_size(MAX_RESPONSE_BYTES);
        self.call(timeout, request, async |request| call(client, request).await).await
    }

    async fn call<Q, A>(
        &self,
        timeout: DefaultTimeout,
        request: Q,
        call: impl AsyncFnOnce(Request<Q>) -> Result<Response<A>, Status>,
    ) -> Result<A, CliError> {
        let limit = self.timeout.unwrap_or(timeout.duration());
        let mut request = Request::new(request);
        if let Some(bearer) = &self.authorization {
            request.metadata_mut().insert("authorization", bearer.clone());
        }
        let id = new_request_id()?;
        request.metadata_mut().insert(REQUEST_ID_HEADER, id.clone());
        for (name, value) in &self.trace_headers {
            request.metadata_mut().insert(*name, value.clone());
        }
        // Sends the deadline to the server; the transport also ends the call then.
        request.set_timeout(limit);
        let response = tokio::time::timeout(limit + TIMEOUT_GRACE, call(request));
        match if self.hides_spinner { response.await } else { console::with_spinner(response).await } {
            Ok(Ok(response)) => Ok(response.into_inner()),
            // The status that the transport returns when its own time limit ends a call.
            Ok(Err(status)) if status.code() == tonic::Code::Cancelled => {
                Err(CliError::from_timeout(limit).with_request_id(&id))
            }
            Ok(Err(status)) => Err(CliError::from_status(&status, &self.server).with_request_id(&id)),
            Err(_) => Err(CliError::from_timeout(limit).with_request_id(&id)),
        }
    }
}

/// Refuses to send a token in plaintext to another machine. `--insecure` skips this check.
fn refuse_exposed_plaintext(server: &ServerUrl) -> Result<(), CliError> {
    // A failed lookup is an error: a second lookup, when connecting, could return the address of another machine.
    let exposed = server.exposed_address().map_err(|error| {
        CliError::new(format!("cannot reach {server}: {error}"))
            .with_hint("is the name right? --server or KEYWARD_SERVER names another")
    })?;
    let Some(address) = exposed else { return Ok(()) };
    let message =
        format!("{server} ({address}) is another machine, and without TLS the network could read tokens");
    Err(CliError::new(message).with_hint(
        "use https://HOST:PORT; if something else protects the network, allow plaintext with --insecure",
    ))
}

/// Creates a request id. The server's log, audit log and traces contain it, even if the response is lost.
fn new_request_id() -> Result<MetadataValue<Ascii>, CliError> {
    let failed =
        |error: &dyn std::error::Error| CliError::new(format!("cannot create a request id: {error}"));
    let random = random_bytes(&SystemEntropy).map_err(|error| failed(&error))?;
    let id = uuid::Builder::from_random_bytes(random).into_uuid();
    id.to_string().parse().map_err(|error| failed(&error))
}

/// Reads a token from a file as the value of the `authorization` header.
fn read_authorization(file: &Path) -> Result<MetadataValue<Ascii>, CliError> {
    let secret = token_io::read_caller_token(file)?;
    let text = Zeroizing::new(format!("Bearer {}", secret.reveal()));
    let mut bearer: MetadataValue<Ascii> =
        text.parse().map_err(|_| CliError::new("the token cannot be sent"))?;
    bearer.set_sensitive(true);
    Ok(bearer)
}

/// Builds the TLS configuration: trusted CAs and, if configured, the client certificate.
fn load_tls_config(settings: &ClientSettings) -> Result<ClientTlsConfig, CliError> {
    let read = |path: &Path| {
        std::fs::read(path)
            .map_err(|error| CliError::new(format!("cannot read {}: {error}", shown_path(path))))
    };
    let config = match &settings.ca_file {
        Some(path) => ClientTlsConfig::new().ca_certificate(Certificate::from_pem(read(path)?)),
        None => ClientTlsConfig::new().with_native_roots(),
    };
    Ok(match &settings.client_certificate {
        Some((certificate, key)) => {
            let key = Zeroizing::new(read(key)?);
            config.identity(Identity::from_pem(read(certificate)?, &*key))
        }
        None => config,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        config::client::{DEFAULT_SERVER, OutputFormat},
        pb,
    };

    fn settings(server: &str, token: Option<&std::path::Path>) -> ClientSettings {
        ClientSettings {
            server: ServerUrl::parse(server).unwrap(),
            token_file: token.map(Into::into),
            ca_file: None,
            client_certificate: None,
            output: OutputFormat::Table,
            timeout: Some(Duration::from_millis(300)),
            insecure: false,
            trace_parent: None,
        }
    }

    fn token_file(folder: &tempfile::TempDir) -> std::path::PathBuf {
        let path = folder.path().join("token");
        std::fs::write(&path, "kw_live_x").unwrap();
        path
    }

    async fn whoami(server: &str) -> CliError {
        let folder = tempfile::tempdir().unwrap();
        let session = ApiClient::from_settings(&settings(server, Some(&token_file(&folder)))).unwrap();
        let response = session
            .call_keys(DefaultTimeout::Quick, pb::WhoAmIRequest {}, async |mut client, request| {
                client.who_am_i(request).await
            })
            .await;
        response.unwrap_err()
    }

    #[tokio::test]
    async fn without_a_token_the_error_names_every_place_for_one() {
        let error = ApiClient::from_settings(&settings(DEFAULT_SERVER, None)).err().unwrap().to_string();
        assert!(error.contains("--token-file FILE, KEYWARD_TOKEN_FILE"), "{error}");
    }

    #[tokio::test]
    async fn no_token_is_sent_in_plaintext_to_another_machine_unless_that_is_allowed() {
        let folder = tempfile::tempdir().unwrap();
        let file = token_file(&folder);
        for (server, insecure, allowed) in [
            ("http://127.0.0.1:1", false, true),
            ("http://[::1]:1", false, true),
            ("http://[::ffff:127.0.0.1]:1", false, true),
            ("localhost", false, true),
            ("unix:/run/keyward.sock", false, true),
            ("https://192.0.2.1:1", false, true),
            ("http://192.0.2.1:1", false, false),
            ("192.0.2.1", false, false),
            ("http://[2001:db8::1]", false, false),
            ("http://name.invalid:1", false, false),
            ("http://192.0.2.1:1", true, true),
        ] {
            let opened =
                ApiClient::from_settings(&ClientSettings { insecure, ..settings(server, Some(&file)) });
            assert_eq!(opened.is_ok(), allowed, "{server} {insecure}");
            assert!(
                opened.err().is_none_or(|failure| failure.exit_code() == error::EXIT_UNANSWERED),
                "{server}"
            );
        }
    }

    #[tokio::test]
    async fn the_callers_token_is_sent_as_a_sensitive_value() {
        let folder = tempfile::tempdir().unwrap();
        let session =
            ApiClient::from_settings(&settings(DEFAULT_SERVER, Some(&token_file(&folder)))).unwrap();
        assert!(session.authorization.as_ref().unwrap().is_sensitive());
        assert!(!format!("{:?}", session.authorization).contains("kw_live"));
    }

    #[tokio::test]
    async fn a_server_that_is_not_there_is_unanswered() {
        // A port that was free a moment ago.
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let error = whoami(&format!("127.0.0.1:{port}")).await;
        assert_eq!(error.exit_code(), crate::cli::error::EXIT_UNANSWERED);
        assert!(error.to_string().contains("cannot reach http://127.0.0.1:"), "{error}");
        assert!(error.to_string().contains("refused"), "{error}");
    }

    #[tokio::test]
    async fn a_server_that_says_nothing_is_waited_for_only_so_long() {
        let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let error = whoami(&silent.local_addr().unwrap().to_string()).await;
        assert!(error.to_string().contains("no answer within 300ms"), "{error}");
    }
}
