//! The connection to the server, and one way to ask over it: with the caller's token, a time limit and
//! patience.

use std::{path::Path, time::Duration};

use tonic::{
    Request, Response, Status,
    metadata::{Ascii, MetadataValue},
    transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity},
};
use zeroize::Zeroizing;

use super::{
    console,
    failure::{self, Failure},
    token,
    values::shown_path,
};
use crate::{
    clock::{SystemEntropy, random},
    config::{
        client::{ClientSettings, ServerUrl},
        trace_parent::TraceParent,
    },
    pb::{
        account_service_client::AccountServiceClient, audit_service_client::AuditServiceClient,
        authz_service_client::AuthzServiceClient, key_service_client::KeyServiceClient,
    },
};

/// A page of keys with all they may hold is larger than the 4 MiB that clients take by default, and BulkRevoke
/// answers with up to 5,000 keys.
const LARGEST_ANSWER: usize = 256 << 20;

const REQUEST_ID: &str = "x-request-id";

/// How long this side waits on after the server should have answered: its report is worth more than ours.
const GRACE: Duration = Duration::from_millis(250);

/// How long a call may take when nobody said.
#[derive(Clone, Copy, Debug)]
pub(super) enum Patience {
    /// It is answered at once.
    Short,
    /// It reads all there is before it is answered.
    Reading,
    /// It is answered when every replica knows of the change, or its lease has run out.
    Propagation,
}

impl Patience {
    fn limit(self) -> Duration {
        Duration::from_secs(match self {
            Patience::Short => 10,
            Patience::Reading => 600,
            // The default lease is 60 s, and an unreachable replica is waited for 1.25 times as long.
            Patience::Propagation => 90,
        })
    }
}

/// The caller, connected.
pub(super) struct Session {
    channel: Channel,
    /// None = the client certificate says who calls.
    bearer: Option<MetadataValue<Ascii>>,
    server: ServerUrl,
    timeout: Option<Duration>,
    /// The headers that say which trace a call is part of.
    trace: Vec<(&'static str, MetadataValue<Ascii>)>,
    quiet: bool,
}

impl Session {
    /// Reads the caller's token and makes ready to connect, which the first call does.
    pub(super) fn open(settings: &ClientSettings) -> Result<Session, Failure> {
        if !settings.insecure {
            check_plaintext(&settings.server)?;
        }
        let bearer = match settings.token_file.as_deref() {
            Some(file) => Some(bearer(file)?),
            None if settings.client_certificate.is_some() => None,
            None => {
                return Err(Failure::usage("no token to call with").hint(
                    "name the file that holds it: --token-file FILE, KEYWARD_TOKEN_FILE, \
                     or token_file in the configuration file",
                ));
            }
        };
        let limit = settings.timeout.unwrap_or(Patience::Short.limit());
        let mut endpoint = Endpoint::from_shared(settings.server.as_str().to_owned())
            .map_err(|_| Failure::usage(format!("{} is no server's address", settings.server)))?
            .connect_timeout(limit);
        if settings.server.is_tls() {
            let unusable =
                |error| Failure::usage(format!("TLS cannot be spoken: {}", failure::innermost(&error)));
            endpoint = endpoint.tls_config(tls(settings)?).map_err(unusable)?;
        }
        Ok(Session {
            channel: endpoint.connect_lazy(),
            bearer,
            server: settings.server.clone(),
            timeout: settings.timeout,
            // They are visible ASCII, which no header refuses.
            trace: settings
                .trace
                .iter()
                .flat_map(TraceParent::headers)
                .filter_map(|(name, value)| Some((name, value.parse().ok()?)))
                .collect(),
            quiet: false,
        })
    }

    /// The same without a spinner, for a command that shows by itself how far it is.
    pub(super) fn quiet(self) -> Session {
        Session { quiet: true, ..self }
    }

    /// Asks KeyService.
    pub(super) async fn keys<Q, A>(
        &self,
        patience: Patience,
        question: Q,
        call: impl AsyncFnOnce(KeyServiceClient<Channel>, Request<Q>) -> Result<Response<A>, Status>,
    ) -> Result<A, Failure> {
        let client = KeyServiceClient::new(self.channel.clone()).max_decoding_message_size(LARGEST_ANSWER);
        self.ask(patience, question, async |request| call(client, request).await).await
    }

    /// Asks AccountService.
    pub(super) async fn accounts<Q, A>(
        &self,
        patience: Patience,
        question: Q,
        call: impl AsyncFnOnce(AccountServiceClient<Channel>, Request<Q>) -> Result<Response<A>, Status>,
    ) -> Result<A, Failure> {
        let client =
            AccountServiceClient::new(self.channel.clone()).max_decoding_message_size(LARGEST_ANSWER);
        self.ask(patience, question, async |request| call(client, request).await).await
    }

    /// Asks AuthzService.
    pub(super) async fn authz<Q, A>(
        &self,
        question: Q,
        call: impl AsyncFnOnce(AuthzServiceClient<Channel>, Request<Q>) -> Result<Response<A>, Status>,
    ) -> Result<A, Failure> {
        let client = AuthzServiceClient::new(self.channel.clone());
        self.ask(Patience::Short, question, async |request| call(client, request).await).await
    }

    /// Asks AuditService.
    pub(super) async fn audit<Q, A>(
        &self,
        patience: Patience,
        question: Q,
        call: impl AsyncFnOnce(AuditServiceClient<Channel>, Request<Q>) -> Result<Response<A>, Status>,
    ) -> Result<A, Failure> {
        let client = AuditServiceClient::new(self.channel.clone()).max_decoding_message_size(LARGEST_ANSWER);
        self.ask(patience, question, async |request| call(client, request).await).await
    }

    async fn ask<Q, A>(
        &self,
        patience: Patience,
        question: Q,
        call: impl AsyncFnOnce(Request<Q>) -> Result<Response<A>, Status>,
    ) -> Result<A, Failure> {
        let limit = self.timeout.unwrap_or(patience.limit());
        let mut request = Request::new(question);
        if let Some(bearer) = &self.bearer {
            request.metadata_mut().insert("authorization", bearer.clone());
        }
        let id = request_id()?;
        request.metadata_mut().insert(REQUEST_ID, id.clone());
        for (name, value) in &self.trace {
            request.metadata_mut().insert(*name, value.clone());
        }
        // Tells the server how long there is; the transport gives up then too.
        request.set_timeout(limit);
        let answer = tokio::time::timeout(limit + GRACE, call(request));
        match if self.quiet { answer.await } else { console::watched(answer).await } {
            Ok(Ok(answer)) => Ok(answer.into_inner()),
            // What the transport makes of its own time limit.
            Ok(Err(status)) if status.code() == tonic::Code::Cancelled => {
                Err(Failure::timeout(limit).called(&id))
            }
            Ok(Err(status)) => Err(Failure::status(&status, &self.server).called(&id)),
            Err(_) => Err(Failure::timeout(limit).called(&id)),
        }
    }
}

/// Tokens are not sent in plaintext to another machine; `--insecure` is the way to do it all the same.
fn check_plaintext(server: &ServerUrl) -> Result<(), Failure> {
    // Without an address nothing can be sent; and what another look-up would find is not known.
    let exposed = server.exposed_address().map_err(|error| {
        Failure::usage(format!("cannot reach {server}: {error}"))
            .hint("is the name right? --server or KEYWARD_SERVER names another")
    })?;
    let Some(address) = exposed else { return Ok(()) };
    let message = format!(
        "{server} ({address}) is another machine, and without TLS tokens would be readable on the way"
    );
    Err(Failure::usage(message)
        .hint("use https://HOST:PORT; where something else protects the network, allow it with --insecure"))
}

/// A name for a call: by it the server's log, its audit log and its traces tell of this one, whatever became of the
/// answer.
fn request_id() -> Result<MetadataValue<Ascii>, Failure> {
    let failed = |error: &dyn std::error::Error| Failure::usage(format!("no name for the call: {error}"));
    let random = random(&SystemEntropy).map_err(|error| failed(&error))?;
    let id = uuid::Builder::from_random_bytes(random).into_uuid();
    id.to_string().parse().map_err(|error| failed(&error))
}

/// The token of a file, as it is sent.
fn bearer(file: &Path) -> Result<MetadataValue<Ascii>, Failure> {
    let secret = token::read_own(file)?;
    let text = Zeroizing::new(format!("Bearer {}", secret.reveal()));
    let mut bearer: MetadataValue<Ascii> =
        text.parse().map_err(|_| Failure::usage("the token cannot be sent"))?;
    bearer.set_sensitive(true);
    Ok(bearer)
}

/// Whom to believe, and what to show.
fn tls(settings: &ClientSettings) -> Result<ClientTlsConfig, Failure> {
    let read = |path: &Path| {
        std::fs::read(path)
            .map_err(|error| Failure::usage(format!("cannot read {}: {error}", shown_path(path))))
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
        config::client::{DEFAULT_SERVER, Output},
        pb,
    };

    fn settings(server: &str, token: Option<&std::path::Path>) -> ClientSettings {
        ClientSettings {
            server: ServerUrl::parse(server).unwrap(),
            token_file: token.map(Into::into),
            ca_file: None,
            client_certificate: None,
            output: Output::Table,
            timeout: Some(Duration::from_millis(300)),
            insecure: false,
            trace: None,
        }
    }

    fn token_file(folder: &tempfile::TempDir) -> std::path::PathBuf {
        let path = folder.path().join("token");
        std::fs::write(&path, "kw_live_x").unwrap();
        path
    }

    async fn whoami(server: &str) -> Failure {
        let folder = tempfile::tempdir().unwrap();
        let session = Session::open(&settings(server, Some(&token_file(&folder)))).unwrap();
        let answer = session
            .keys(Patience::Short, pb::WhoAmIRequest {}, async |mut client, request| {
                client.who_am_i(request).await
            })
            .await;
        answer.unwrap_err()
    }

    #[tokio::test]
    async fn without_a_token_the_error_names_every_place_for_one() {
        let error = Session::open(&settings(DEFAULT_SERVER, None)).err().unwrap().to_string();
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
            let opened = Session::open(&ClientSettings { insecure, ..settings(server, Some(&file)) });
            assert_eq!(opened.is_ok(), allowed, "{server} {insecure}");
            assert!(opened.err().is_none_or(|failure| failure.exit() == failure::UNANSWERED), "{server}");
        }
    }

    #[tokio::test]
    async fn the_callers_token_is_sent_as_a_sensitive_value() {
        let folder = tempfile::tempdir().unwrap();
        let session = Session::open(&settings(DEFAULT_SERVER, Some(&token_file(&folder)))).unwrap();
        assert!(session.bearer.as_ref().unwrap().is_sensitive());
        assert!(!format!("{:?}", session.bearer).contains("kw_live"));
    }

    #[tokio::test]
    async fn a_server_that_is_not_there_is_unanswered() {
        // A port that was free a moment ago.
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let error = whoami(&format!("127.0.0.1:{port}")).await;
        assert_eq!(error.exit(), super::super::failure::UNANSWERED);
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
