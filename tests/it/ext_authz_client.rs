//! `envoy.service.auth.v3.Authorization` asked as Envoy asks: the questions, and what the answers make of a request.

use std::collections::BTreeMap;

use keyward::{
    config::server::Settings,
    pb::{
        self,
        envoy::service::auth::v3::{
            CheckResponse, DeniedHttpResponse, OkHttpResponse, check_response::HttpResponse,
        },
        envoy_request::{
            Address, AttributeContext, CheckRequest, HttpRequest, Pair, Peer, Request, SocketAddress,
        },
    },
};
use tonic::Status;

use crate::support::{Client, Made, Server, service_key};

/// A request that Envoy asks about.
#[derive(Clone)]
pub(crate) struct Ask {
    pub(crate) http: HttpRequest,
    pub(crate) extensions: Vec<Pair>,
    pub(crate) peer: &'static str,
}

pub(crate) fn pair(key: &str, value: impl AsRef<[u8]>) -> Pair {
    Pair { key: key.to_owned().into(), value: value.as_ref().to_vec().into() }
}

impl Ask {
    pub(crate) fn get(path: &str) -> Ask {
        let http = HttpRequest {
            id: "1".into(),
            method: "GET".into(),
            path: path.to_owned().into(),
            host: "api.test".into(),
            ..HttpRequest::default()
        };
        Ask { http, extensions: Vec::new(), peer: "192.0.2.1" }
    }

    /// A request to a route whose configuration says this.
    pub(crate) fn route(extensions: &[(&str, &str)]) -> Ask {
        let mut ask = Ask::get("/v1/monitors");
        ask.extensions = extensions.iter().map(|(key, value)| pair(key, value)).collect();
        ask
    }

    /// A request to a route that needs `monitors:read` in production.
    pub(crate) fn monitors() -> Ask {
        Ask::route(&[("scope", "monitors:read"), ("environment", "production")])
    }

    pub(crate) fn saying(mut self, extension: &str, value: &str) -> Ask {
        self.extensions.push(pair(extension, value));
        self
    }

    pub(crate) fn header(mut self, name: &str, value: impl AsRef<[u8]>) -> Ask {
        self.http.headers.push(pair(name, value));
        self
    }

    pub(crate) fn bearer(self, token: &str) -> Ask {
        self.header("authorization", format!("Bearer {token}"))
    }

    pub(crate) fn method(mut self, method: &str) -> Ask {
        self.http.method = method.to_owned().into();
        self
    }

    pub(crate) fn host(mut self, host: &str) -> Ask {
        self.http.host = host.to_owned().into();
        self
    }

    pub(crate) fn path(mut self, path: &str) -> Ask {
        self.http.path = path.to_owned().into();
        self
    }

    pub(crate) fn id(mut self, id: &str) -> Ask {
        self.http.id = id.to_owned().into();
        self
    }

    pub(crate) fn message(self) -> CheckRequest {
        let socket_address = Some(SocketAddress { address: self.peer.into() });
        let source = Some(Peer { address: Some(Address { socket_address }) });
        let request = Some(Request { http: Some(self.http) });
        let attributes = AttributeContext { source, request, context_extensions: self.extensions };
        CheckRequest { attributes: Some(attributes) }
    }

    pub(crate) async fn try_of(self, server: &Server) -> Result<CheckResponse, Status> {
        ask(&server.root(), self.message()).await
    }

    /// What passes, as it passes.
    #[track_caller]
    pub(crate) fn passes(self, server: &Server) -> impl Future<Output = Passed> {
        let root = server.root();
        async move { Passed::from(ask(&root, self.message()).await.unwrap()) }
    }

    /// What is refused, as it is refused.
    pub(crate) fn refused(self, server: &Server) -> impl Future<Output = Refused> {
        let root = server.root();
        async move { Refused::from(ask(&root, self.message()).await.unwrap()) }
    }
}

pub(crate) async fn ask(caller: &Client, message: CheckRequest) -> Result<CheckResponse, Status> {
    caller.ask("envoy.service.auth.v3.Authorization/Check", message).await
}

/// How a request with this token is decided, as the answer's metadata says it.
pub(crate) async fn decision(server: &Server, token: &str) -> String {
    let answer = Ask::monitors().bearer(token).try_of(server).await.unwrap();
    metadata(&answer)["reason"].clone()
}

pub(crate) fn metadata(answer: &CheckResponse) -> BTreeMap<String, String> {
    use prost_types::value::Kind;
    let fields = answer.dynamic_metadata.as_ref().unwrap().fields.iter();
    fields
        .map(|(name, value)| match value.kind.as_ref().unwrap() {
            Kind::StringValue(text) => (name.clone(), text.clone()),
            Kind::NumberValue(number) => (name.clone(), number.to_string()),
            Kind::BoolValue(flag) => (name.clone(), flag.to_string()),
            other => panic!("{name} is no scalar: {other:?}"),
        })
        .collect()
}

pub(crate) type Headers = BTreeMap<String, String>;

pub(crate) fn headers(list: &[pb::envoy::config::core::v3::HeaderValueOption]) -> Headers {
    list.iter()
        .map(|option| {
            // Envoys differ in what they make of anything else.
            assert_eq!(option.append_action, 2, "OVERWRITE_IF_EXISTS_OR_ADD: {option:?}");
            let header = option.header.clone().unwrap();
            (header.key, header.value)
        })
        .collect()
}

#[derive(Debug)]
pub(crate) struct Passed {
    pub(crate) upstream: Headers,
    pub(crate) removed: Vec<String>,
    pub(crate) removed_queries: Vec<String>,
    pub(crate) response: Headers,
    pub(crate) metadata: BTreeMap<String, String>,
}

impl From<CheckResponse> for Passed {
    #[track_caller]
    fn from(answer: CheckResponse) -> Passed {
        let metadata = metadata(&answer);
        assert_eq!(answer.status.unwrap().code, 0, "{metadata:?}");
        let Some(HttpResponse::OkResponse(ok)) = answer.http_response else { panic!("{metadata:?}") };
        let OkHttpResponse {
            headers: upstream,
            headers_to_remove: removed,
            response_headers_to_add,
            query_parameters_to_remove: removed_queries,
            ..
        } = ok;
        let (upstream, response) = (headers(&upstream), headers(&response_headers_to_add));
        Passed { upstream, removed, removed_queries, response, metadata }
    }
}

#[derive(Debug)]
pub(crate) struct Refused {
    pub(crate) status: i32,
    /// Whether Envoy counts it as an error, not as a denial.
    pub(crate) fault: bool,
    pub(crate) code: i32,
    pub(crate) headers: Headers,
    pub(crate) body: String,
    pub(crate) metadata: BTreeMap<String, String>,
}

impl From<CheckResponse> for Refused {
    #[track_caller]
    fn from(answer: CheckResponse) -> Refused {
        let metadata = metadata(&answer);
        let code = answer.status.unwrap().code;
        assert_ne!(code, 0, "{metadata:?}");
        let (fault, denied) = match answer.http_response {
            Some(HttpResponse::DeniedResponse(denied)) => (false, denied),
            Some(HttpResponse::ErrorResponse(denied)) => (true, denied),
            other => panic!("{other:?}"),
        };
        let DeniedHttpResponse { status, headers: sent, body } = denied;
        Refused { status: status.unwrap().code, fault, code, headers: headers(&sent), body, metadata }
    }
}

impl Refused {
    pub(crate) fn reason(&self) -> &str {
        &self.metadata["reason"]
    }
}

pub(crate) const UNAUTHORIZED: &str =
    r#"{"success":false,"error":{"code":"UNAUTHORIZED","message":"Invalid or missing API key"}}"#;
pub(crate) const FORBIDDEN: &str =
    r#"{"success":false,"error":{"code":"FORBIDDEN","message":"Insufficient permissions for this action"}}"#;

/// A server with `acme`, and a key of it that may `monitors:read`.
pub(crate) async fn with_key() -> (Server, Made) {
    let server = Server::with_accounts().await;
    let made = server.make(service_key("acme", &["monitors:read"])).await;
    (server, made)
}

/// A server with these rules.
pub(crate) async fn with_rules(rules: &str) -> (Server, tempfile::TempDir) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("rules.toml");
    std::fs::write(&path, rules).unwrap();
    let server = Server::start_with(|settings| settings.rules = Some(path)).await;
    server.account("acme").await;
    (server, folder)
}

pub(crate) async fn configured(configure: impl FnOnce(&mut Settings)) -> (Server, Made) {
    let server = Server::start_with(configure).await;
    server.account("acme").await;
    let made = server.make(service_key("acme", &["monitors:read"])).await;
    (server, made)
}
