//! Implements `envoy.service.auth.v3.Authorization`: translates Envoy's request for the gateway, and
//! the gateway's response for Envoy.
//!
//! Decisions belong in `gateway`.
//!
//! Envoy takes an empty response for an ALLOW, and may let a request pass after a gRPC error. So a denial is always a
//! response, and only `allow_response` makes one that lets a request pass.

use std::{net::IpAddr, str, sync::Arc};

use tonic::{Code, Request, Response, Status};
use tracing::Instrument as _;

use crate::{
    engine::Requester,
    gateway::{
        ClientSource, Gateway, ProxyMetadataValue, ProxyProtocol, ProxyRequest, ProxyResponse,
        parse_route_overrides,
    },
    pb::{
        envoy::{
            config::core::v3::{HeaderValue, HeaderValueOption, header_value_option::HeaderAppendAction},
            service::auth::v3::{
                CheckResponse, DeniedHttpResponse, OkHttpResponse, authorization_server::Authorization,
                check_response::HttpResponse,
            },
            r#type::v3::HttpStatus,
        },
        envoy_request::{EnvoyAttributeContext, EnvoyCheckRequest, EnvoyHttpRequest, EnvoyMapEntry},
        google_rpc_status,
    },
    service_error::ServiceError,
    trace::{self, CallTracer},
};

use super::{
    call_extensions::{ProxyCaller, take_extension},
    rpc,
};

/// The ext_authz service over the gateway.
#[derive(Clone, Debug)]
pub(super) struct ExtAuthzService {
    pub(super) gateway: Arc<Gateway>,
    /// Decides which calls are traced.
    pub(super) tracing: CallTracer,
}

impl ExtAuthzService {
    /// Answers a Check of this proxy. Fails if it contains no HTTP request.
    pub(super) async fn handle_check(
        &self,
        request: EnvoyCheckRequest,
        proxy: &ProxyCaller,
    ) -> Result<CheckResponse, Status> {
        let attributes = request.attributes.unwrap_or_default();
        let Some(http) = attributes.request.as_ref().and_then(|request| request.http.as_ref()) else {
            return Err(ServiceError::invalid_field("attributes.request.http", "is required").into());
        };
        Ok(self.evaluate(&attributes, http, proxy).await)
    }

    /// The response to a message of `length` bytes that was not read, since the limit is `limit`.
    pub(super) fn refuse_too_large(&self, length: usize, limit: usize) -> CheckResponse {
        reply_to_proto(self.gateway.deny_too_large(length, limit))
    }

    async fn evaluate(
        &self,
        attributes: &EnvoyAttributeContext,
        http: &EnvoyHttpRequest,
        ProxyCaller { account, trusted, session }: &ProxyCaller,
    ) -> CheckResponse {
        let extensions = attributes.context_extensions.iter().filter_map(utf8_pair);
        let overrides = parse_route_overrides(extensions, self.gateway.environments(), false);
        let request = proxy_request(attributes, http);
        trace::adopt_ids(request.request_id(), || request.trace_context());
        let is_still_authorized = || match session {
            Some(session) => session.is_still_authorized(self.gateway.engine()),
            None => Ok(true),
        };
        let evaluation = self.gateway.authorize(
            Requester { account, is_still_authorized: &is_still_authorized },
            &request,
            overrides,
        );
        let mut reply = match self.tracing.start_span(rpc::EXT_AUTHZ_METHOD) {
            Some(span) => {
                let reply = evaluation.instrument(span.clone()).await;
                // A denial is a successful call, too.
                trace::finish_span(&span, Code::Ok);
                reply
            }
            None => evaluation.await,
        };
        if !trusted && !reply.is_allowed {
            reply.metadata = vec![("allowed".to_owned(), ProxyMetadataValue::Flag(false))];
        }
        reply_to_proto(reply)
    }
}

#[tonic::async_trait]
impl Authorization for ExtAuthzService {
    async fn check(
        &self,
        mut request: Request<EnvoyCheckRequest>,
    ) -> Result<Response<CheckResponse>, Status> {
        let proxy = take_extension(&mut request)?;
        self.handle_check(request.into_inner(), &proxy).await.map(Response::new)
    }
}

/// Context extensions of other filters may be any bytes; Keyward's are text.
fn utf8_pair(pair: &EnvoyMapEntry) -> Option<(&str, &str)> {
    Some((str::from_utf8(&pair.key).ok()?, str::from_utf8(&pair.value).unwrap_or("(not UTF-8)")))
}

fn proxy_request<'a>(attributes: &'a EnvoyAttributeContext, http: &'a EnvoyHttpRequest) -> ProxyRequest<'a> {
    let joined = http.headers.iter().map(|pair| (&*pair.key, &*pair.value));
    let raw = http.header_map.iter().flat_map(|map| &map.headers).map(|header| {
        let value = if header.raw_value.is_empty() { &header.value } else { &header.raw_value };
        (&*header.key, &**value)
    });
    ProxyRequest {
        protocol: ProxyProtocol::ExtAuthz,
        proxy_removes_headers: true,
        method: &http.method,
        host: &http.host,
        target: &http.path,
        headers: joined.chain(raw).collect(),
        client_source: ClientSource::Peer(peer_address(attributes)),
        proxy_request_id: &http.id,
    }
}

fn peer_address(attributes: &EnvoyAttributeContext) -> Option<IpAddr> {
    let address = attributes.source.as_ref()?.address.as_ref()?.socket_address.as_ref()?;
    let ip: IpAddr = str::from_utf8(&address.address).ok()?.parse().ok()?;
    Some(ip.to_canonical())
}

fn reply_to_proto(reply: ProxyResponse) -> CheckResponse {
    let metadata = metadata_to_struct(&reply.metadata);
    let mut answer = if reply.is_allowed { allow_response(reply) } else { deny_response(reply) };
    answer.dynamic_metadata = Some(metadata);
    answer
}

/// The only place that makes a response which lets a request pass.
fn allow_response(reply: ProxyResponse) -> CheckResponse {
    let ok = OkHttpResponse {
        headers: overwrite_headers(reply.upstream_headers),
        headers_to_remove: reply.remove_headers,
        response_headers_to_add: overwrite_headers(reply.client_headers),
        // Envoy rewrites the whole query if any parameter is removed.
        query_parameters_to_remove: reply.remove_query_parameter.into_iter().collect(),
        ..OkHttpResponse::default()
    };
    CheckResponse {
        status: Some(google_rpc_status(Code::Ok as i32)),
        http_response: Some(HttpResponse::OkResponse(ok)),
        dynamic_metadata: None,
    }
}

fn deny_response(reply: ProxyResponse) -> CheckResponse {
    let code = match reply.status {
        400 => Code::InvalidArgument,
        401 => Code::Unauthenticated,
        413 | 429 => Code::ResourceExhausted,
        503 => Code::Unavailable,
        _ => Code::PermissionDenied,
    };
    let denied = DeniedHttpResponse {
        status: Some(HttpStatus { code: i32::from(reply.status) }),
        headers: overwrite_headers(reply.client_headers),
        body: reply.body,
    };
    let response = if reply.is_error {
        HttpResponse::ErrorResponse(denied)
    } else {
        HttpResponse::DeniedResponse(denied)
    };
    CheckResponse {
        status: Some(google_rpc_status(code as i32)),
        http_response: Some(response),
        dynamic_metadata: None,
    }
}

/// Headers that replace existing ones. Versions of Envoy differ in the default, so the action is explicit.
fn overwrite_headers(list: Vec<(&'static str, String)>) -> Vec<HeaderValueOption> {
    list.into_iter()
        .map(|(key, value)| HeaderValueOption {
            header: Some(HeaderValue { key: key.to_owned(), value, ..HeaderValue::default() }),
            append_action: HeaderAppendAction::OverwriteIfExistsOrAdd.into(),
            ..HeaderValueOption::default()
        })
        .collect()
}

fn metadata_to_struct(metadata: &[(String, ProxyMetadataValue)]) -> prost_types::Struct {
    use prost_types::value::Kind;
    let value = |value: &ProxyMetadataValue| match value {
        ProxyMetadataValue::Text(text) => Kind::StringValue(text.clone()),
        #[expect(clippy::cast_precision_loss, reason = "costs and versions are far below 2^53")]
        ProxyMetadataValue::Number(number) => Kind::NumberValue(*number as f64),
        ProxyMetadataValue::Flag(flag) => Kind::BoolValue(*flag),
    };
    let fields = metadata
        .iter()
        .map(|(name, field)| (name.clone(), prost_types::Value { kind: Some(value(field)) }))
        .collect();
    prost_types::Struct { fields }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_does_not_pass_is_never_an_ok() {
        for status in [0, 200, 400, 401, 403, 413, 429, 503, 999] {
            let reply = ProxyResponse { status, is_error: status == 503, ..ProxyResponse::default() };
            let answer = reply_to_proto(reply);
            assert_ne!(answer.status.unwrap().code, 0, "{status}");
            assert!(!matches!(answer.http_response, None | Some(HttpResponse::OkResponse(_))), "{status}");
        }
    }

    #[test]
    fn raw_headers_and_joined_ones_are_both_read() {
        use crate::pb::envoy_request::{EnvoyHeaderMap, EnvoyHeaderValue};
        let pair = EnvoyMapEntry { key: "a".into(), value: "1".into() };
        let raw = |raw: &'static str, value: &'static str| EnvoyHeaderValue {
            key: "b".into(),
            value: value.into(),
            raw_value: raw.into(),
        };
        let header_map = Some(EnvoyHeaderMap { headers: vec![raw("2", ""), raw("", "3")] });
        let http = EnvoyHttpRequest { headers: vec![pair], header_map, ..EnvoyHttpRequest::default() };
        let attributes = EnvoyAttributeContext::default();
        let read: Vec<_> = proxy_request(&attributes, &http).headers;
        assert_eq!(read, [(&b"a"[..], &b"1"[..]), (b"b", b"2"), (b"b", b"3")]);
    }
}
