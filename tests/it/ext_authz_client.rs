//! `envoy.service.auth.v3.Authorization` asked as Envoy asks: the questions, and what the answers make of a request.

use std::collections::BTreeMap;

use keyward::{
    config::server::ServerSettings,
    pb::{
        self,
        envoy::service::auth::v3::{
            CheckResponse, DeniedHttpResponse, OkHttpResponse, check_response::HttpResponse,
        },
        envoy_request::{
            EnvoyAddress, EnvoyAttributeContext, EnvoyCheckRequest, EnvoyHttpRequest, EnvoyMapEntry,
            EnvoyPeer, EnvoyRequest, EnvoySocketAddress,
        },
    },
};
use tonic::Status;

use crate::support::{Client, CreatedKey, Server, service_key_request};

/// A request that Envoy asks about.
#[derive(Clone)]
pub(crate) struct EnvoyCheck {
    pub(crate) http: EnvoyHttpRequest,
    pub(crate) extensions: Vec<EnvoyMapEntry>,
    pub(crate) peer: &'static str,
}

pub(crate) fn pair(key: &str, value: impl AsRef<[u8]>) -> EnvoyMapEntry {
    EnvoyMapEntry { key: key.to_owned().into(), value: value.as_ref().to_vec().into() }
}

impl EnvoyCheck {
    pub(crate) fn get(path: &str) -> EnvoyCheck {
        let http = EnvoyHttpRequest {
            id: "1".into(),
            method: "GET".into(),
            path: path.to_owned().into(),
            host: "api.test".into(),
            ..EnvoyHttpRequest::default()
        };
        EnvoyCheck { http, extensions: Vec::new(), peer: "192.0.2.1" }
    }

    /// A request to a route whose configuration says this.
    pub(crate) fn with_route_extensions(extensions: &[(&str, &str)]) -> EnvoyCheck {
        let mut ask = EnvoyCheck::get("/v1/monitors");
        ask.extensions = extensions.iter().map(|(key, value)| pair(key, value)).collect();
        ask
    }

    /// A request to a route that needs `monitors:read` in production.
    pub(crate) fn monitors_request() -> EnvoyCheck {
        EnvoyCheck::with_route_extensions(&[("scope", "monitors:read"), ("environment", "production")])
    }

    pub(crate) fn with_extension(mut self, extension: &str, value: &str) -> EnvoyCheck {
        self.extensions.push(pair(extension, value));
        self
    }

    pub(crate) fn with_header(mut self, name: &str, value: impl AsRef<[u8]>) -> EnvoyCheck {
        self.http.headers.push(pair(name, value));
        self
    }

    pub(crate) fn with_bearer(self, token: &str) -> EnvoyCheck {
        self.with_header("authorization", format!("Bearer {token}"))
    }

    pub(crate) fn with_method(mut self, method: &str) -> EnvoyCheck {
        self.http.method = method.to_owned().into();
        self
    }

    pub(crate) fn with_host(mut self, host: &str) -> EnvoyCheck {
        self.http.host = host.to_owned().into();
        self
    }

    pub(crate) fn with_path(mut self, path: &str) -> EnvoyCheck {
        self.http.path = path.to_owned().into();
        self
    }

    pub(crate) fn with_request_id(mut self, id: &str) -> EnvoyCheck {
        self.http.id = id.to_owned().into();
        self
    }

    pub(crate) fn into_message(self) -> EnvoyCheckRequest {
        let socket_address = Some(EnvoySocketAddress { address: self.peer.into() });
        let source = Some(EnvoyPeer { address: Some(EnvoyAddress { socket_address }) });
        let request = Some(EnvoyRequest { http: Some(self.http) });
        let attributes = EnvoyAttributeContext { source, request, context_extensions: self.extensions };
        EnvoyCheckRequest { attributes: Some(attributes) }
    }

    pub(crate) async fn try_send(self, server: &Server) -> Result<CheckResponse, Status> {
        send_check(&server.root_client(), self.into_message()).await
    }

    /// What passes, as it passes.
    #[track_caller]
    pub(crate) fn expect_allowed(self, server: &Server) -> impl Future<Output = AllowedAnswer> {
        let root = server.root_client();
        async move { AllowedAnswer::from(send_check(&root, self.into_message()).await.unwrap()) }
    }

    /// What is refused, as it is refused.
    pub(crate) fn expect_denied(self, server: &Server) -> impl Future<Output = DeniedAnswer> {
        let root = server.root_client();
        async move { DeniedAnswer::from(send_check(&root, self.into_message()).await.unwrap()) }
    }
}

pub(crate) async fn send_check(caller: &Client, message: EnvoyCheckRequest) -> Result<CheckResponse, Status> {
    caller.call_rpc_for_answer("envoy.service.auth.v3.Authorization/Check", message).await
}

/// How a request with this token is decided, as the answer's metadata says it.
pub(crate) async fn decision_reason(server: &Server, token: &str) -> String {
    let answer = EnvoyCheck::monitors_request().with_bearer(token).try_send(server).await.unwrap();
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

pub(crate) type HeaderValues = BTreeMap<String, String>;

pub(crate) fn headers(list: &[pb::envoy::config::core::v3::HeaderValueOption]) -> HeaderValues {
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
pub(crate) struct AllowedAnswer {
    pub(crate) upstream: HeaderValues,
    pub(crate) removed: Vec<String>,
    pub(crate) removed_queries: Vec<String>,
    pub(crate) response: HeaderValues,
    pub(crate) metadata: BTreeMap<String, String>,
}

impl From<CheckResponse> for AllowedAnswer {
    #[track_caller]
    fn from(answer: CheckResponse) -> AllowedAnswer {
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
        AllowedAnswer { upstream, removed, removed_queries, response, metadata }
    }
}

#[derive(Debug)]
pub(crate) struct DeniedAnswer {
    pub(crate) status: i32,
    /// Whether Envoy counts it as an error, not as a denial.
    pub(crate) fault: bool,
    pub(crate) code: i32,
    pub(crate) headers: HeaderValues,
    pub(crate) body: String,
    pub(crate) metadata: BTreeMap<String, String>,
}

impl From<CheckResponse> for DeniedAnswer {
    #[track_caller]
    fn from(answer: CheckResponse) -> DeniedAnswer {
        let metadata = metadata(&answer);
        let code = answer.status.unwrap().code;
        assert_ne!(code, 0, "{metadata:?}");
        let (fault, denied) = match answer.http_response {
            Some(HttpResponse::DeniedResponse(denied)) => (false, denied),
            Some(HttpResponse::ErrorResponse(denied)) => (true, denied),
            other => panic!("{other:?}"),
        };
        let DeniedHttpResponse { status, headers: sent, body } = denied;
        DeniedAnswer { status: status.unwrap().code, fault, code, headers: headers(&sent), body, metadata }
    }
}

impl DeniedAnswer {
    pub(crate) fn reason(&self) -> &str {
        &self.metadata["reason"]
    }
}

pub(crate) const UNAUTHORIZED: &str =
    r#"{"success":false,"error":{"code":"UNAUTHORIZED","message":"Invalid or missing API key"}}"#;
pub(crate) const FORBIDDEN: &str =
    r#"{"success":false,"error":{"code":"FORBIDDEN","message":"Insufficient permissions for this action"}}"#;

/// A server with `acme`, and a key of it that may `monitors:read`.
pub(crate) async fn server_with_key() -> (Server, CreatedKey) {
    let server = Server::with_accounts().await;
    let made = server.create_key(service_key_request("acme", &["monitors:read"])).await;
    (server, made)
}

/// A server with these rules.
pub(crate) async fn server_with_rules(rules: &str) -> (Server, tempfile::TempDir) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("rules.toml");
    std::fs::write(&path, rules).unwrap();
    let server = Server::start_with(|settings| settings.rules_file = Some(path)).await;
    server.create_account("acme").await;
    (server, folder)
}

pub(crate) async fn server_with_settings(
    configure: impl FnOnce(&mut ServerSettings),
) -> (Server, CreatedKey) {
    let server = Server::start_with(configure).await;
    server.create_account("acme").await;
    let made = server.create_key(service_key_request("acme", &["monitors:read"])).await;
    (server, made)
}
