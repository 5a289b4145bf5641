//! `envoy.service.auth.v3.Authorization`: Envoy's question to the gateway, and the gateway's reply to Envoy.
//!
//! To Envoy an empty answer is an ALLOW, and a gRPC error is no denial: it may let the request through. So a denial
//! is always an answer, and one function alone makes the answer that lets a request pass.

use std::{net::IpAddr, str, sync::Arc};

use tonic::{Code, Request, Response, Status};
use tracing::Instrument as _;

use crate::{
    domain::name::AccountId,
    engine::Asker,
    gateway::{Asked, Client, Gateway, Reply, Value, Via, read_extensions},
    pb::{
        envoy::{
            config::core::v3::{HeaderValue, HeaderValueOption, header_value_option::HeaderAppendAction},
            service::auth::v3::{
                CheckResponse, DeniedHttpResponse, OkHttpResponse, authorization_server::Authorization,
                check_response::HttpResponse,
            },
            r#type::v3::HttpStatus,
        },
        envoy_request::{AttributeContext, CheckRequest, HttpRequest, Pair},
        google_status,
    },
    refusal::Refusal,
    trace::{self, Tracing},
};

use super::{gate::shown, rpc, vigil::Vigil};

/// Who asks.
#[derive(Clone, Debug)]
pub(super) struct Proxy {
    /// Whose tokens it may ask about; the operator account's caller, about all.
    pub account: AccountId,
    /// Whether it hears why: who came by Envoy's own listener, or showed a key with `keyward:check`. A stranger
    /// hears what a client would.
    pub trusted: bool,
    /// What it has shown, if anything.
    pub vigil: Option<Vigil>,
}

/// The service over the gateway.
#[derive(Clone, Debug)]
pub(super) struct ExtAuthz {
    /// Judges.
    pub gateway: Arc<Gateway>,
    /// Which calls are recorded.
    pub tracing: Tracing,
}

impl ExtAuthz {
    /// Answers what this proxy asks.
    ///
    /// # Errors
    /// When it asks about no request.
    pub(super) async fn answer(&self, asked: CheckRequest, proxy: &Proxy) -> Result<CheckResponse, Status> {
        let attributes = asked.attributes.unwrap_or_default();
        let Some(http) = attributes.request.as_ref().and_then(|request| request.http.as_ref()) else {
            return Err(Refusal::field("attributes.request.http", "is required").into());
        };
        Ok(self.judge(&attributes, http, proxy).await)
    }

    /// Answers a question that was not read, since it has `length` bytes and at most `limit` are read.
    pub(super) fn refuse_too_large(&self, length: usize, limit: usize) -> CheckResponse {
        reply_of(self.gateway.refuse_too_large(length, limit))
    }

    async fn judge(
        &self,
        attributes: &AttributeContext,
        http: &HttpRequest,
        Proxy { account, trusted, vigil }: &Proxy,
    ) -> CheckResponse {
        let extensions = attributes.context_extensions.iter().filter_map(text_pair);
        let said = read_extensions(extensions, self.gateway.environments(), false);
        let asked = asked(attributes, http);
        trace::adopt(asked.request_id(), || asked.parent());
        let stands = || match vigil {
            Some(vigil) => vigil.stands(self.gateway.engine()),
            None => Ok(true),
        };
        let judged = self.gateway.judge(Asker { account, stands: &stands }, &asked, said);
        let mut reply = match self.tracing.span(rpc::EXT_AUTHZ) {
            Some(span) => {
                let reply = judged.instrument(span.clone()).await;
                // Whatever the verdict, it is an answer.
                trace::end(&span, Code::Ok);
                reply
            }
            None => judged.await,
        };
        if !trusted && !reply.passes {
            reply.metadata = vec![("allowed".to_owned(), Value::Flag(false))];
        }
        reply_of(reply)
    }
}

#[tonic::async_trait]
impl Authorization for ExtAuthz {
    async fn check(&self, mut request: Request<CheckRequest>) -> Result<Response<CheckResponse>, Status> {
        let asker = shown(&mut request)?;
        self.answer(request.into_inner(), &asker).await.map(Response::new)
    }
}

/// Another filter's fields may be anything; ours are text.
fn text_pair(pair: &Pair) -> Option<(&str, &str)> {
    Some((str::from_utf8(&pair.key).ok()?, str::from_utf8(&pair.value).unwrap_or("(not UTF-8)")))
}

fn asked<'a>(attributes: &'a AttributeContext, http: &'a HttpRequest) -> Asked<'a> {
    let joined = http.headers.iter().map(|pair| (&*pair.key, &*pair.value));
    let raw = http.header_map.iter().flat_map(|map| &map.headers).map(|header| {
        let value = if header.raw_value.is_empty() { &header.value } else { &header.raw_value };
        (&*header.key, &**value)
    });
    Asked {
        via: Via::ExtAuthz,
        proxy_removes: true,
        method: &http.method,
        host: &http.host,
        target: &http.path,
        headers: joined.chain(raw).collect(),
        client: Client::Peer(peer(attributes)),
        id: &http.id,
    }
}

fn peer(attributes: &AttributeContext) -> Option<IpAddr> {
    let address = attributes.source.as_ref()?.address.as_ref()?.socket_address.as_ref()?;
    let ip: IpAddr = str::from_utf8(&address.address).ok()?.parse().ok()?;
    Some(ip.to_canonical())
}

fn reply_of(reply: Reply) -> CheckResponse {
    let metadata = struct_of(&reply.metadata);
    let mut answer = if reply.passes { pass(reply) } else { refuse(reply) };
    answer.dynamic_metadata = Some(metadata);
    answer
}

/// The only place that makes an answer which lets a request pass.
fn pass(reply: Reply) -> CheckResponse {
    let ok = OkHttpResponse {
        headers: headers(reply.upstream),
        headers_to_remove: reply.remove,
        response_headers_to_add: headers(reply.headers),
        // Envoy writes the whole query anew when anything is to be removed.
        query_parameters_to_remove: reply.remove_query.into_iter().collect(),
        ..OkHttpResponse::default()
    };
    CheckResponse {
        status: Some(google_status(Code::Ok as i32)),
        http_response: Some(HttpResponse::OkResponse(ok)),
        dynamic_metadata: None,
    }
}

fn refuse(reply: Reply) -> CheckResponse {
    let code = match reply.status {
        400 => Code::InvalidArgument,
        401 => Code::Unauthenticated,
        413 | 429 => Code::ResourceExhausted,
        503 => Code::Unavailable,
        _ => Code::PermissionDenied,
    };
    let denied = DeniedHttpResponse {
        status: Some(HttpStatus { code: i32::from(reply.status) }),
        headers: headers(reply.headers),
        body: reply.body,
    };
    let response =
        if reply.fault { HttpResponse::ErrorResponse(denied) } else { HttpResponse::DeniedResponse(denied) };
    CheckResponse {
        status: Some(google_status(code as i32)),
        http_response: Some(response),
        dynamic_metadata: None,
    }
}

/// Headers that take the place of any by their name. Envoys differ in what they make of the default.
fn headers(list: Vec<(&'static str, String)>) -> Vec<HeaderValueOption> {
    list.into_iter()
        .map(|(key, value)| HeaderValueOption {
            header: Some(HeaderValue { key: key.to_owned(), value, ..HeaderValue::default() }),
            append_action: HeaderAppendAction::OverwriteIfExistsOrAdd.into(),
            ..HeaderValueOption::default()
        })
        .collect()
}

fn struct_of(metadata: &[(String, Value)]) -> prost_types::Struct {
    use prost_types::value::Kind;
    let value = |value: &Value| match value {
        Value::Text(text) => Kind::StringValue(text.clone()),
        #[expect(clippy::cast_precision_loss, reason = "costs and versions are far below 2^53")]
        Value::Number(number) => Kind::NumberValue(*number as f64),
        Value::Flag(flag) => Kind::BoolValue(*flag),
    };
    let fields = metadata
        .iter()
        .map(|(name, of)| (name.clone(), prost_types::Value { kind: Some(value(of)) }))
        .collect();
    prost_types::Struct { fields }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_does_not_pass_is_never_an_ok() {
        for status in [0, 200, 400, 401, 403, 413, 429, 503, 999] {
            let reply = Reply { status, fault: status == 503, ..Reply::default() };
            let answer = reply_of(reply);
            assert_ne!(answer.status.unwrap().code, 0, "{status}");
            assert!(!matches!(answer.http_response, None | Some(HttpResponse::OkResponse(_))), "{status}");
        }
    }

    #[test]
    fn raw_headers_and_joined_ones_are_both_read() {
        use crate::pb::envoy_request::{HeaderMap, HeaderValue};
        let pair = Pair { key: "a".into(), value: "1".into() };
        let raw = |raw: &'static str, value: &'static str| HeaderValue {
            key: "b".into(),
            value: value.into(),
            raw_value: raw.into(),
        };
        let header_map = Some(HeaderMap { headers: vec![raw("2", ""), raw("", "3")] });
        let http = HttpRequest { headers: vec![pair], header_map, ..HttpRequest::default() };
        let attributes = AttributeContext::default();
        let read: Vec<_> = asked(&attributes, &http).headers;
        assert_eq!(read, [(&b"a"[..], &b"1"[..]), (b"b", b"2"), (b"b", b"3")]);
    }
}
