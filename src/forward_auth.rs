//! Serves the gateway to proxies over HTTP: nginx `auth_request`, Traefik ForwardAuth and Envoy's HTTP ext_authz.
//!
//! Each proxy has its own path, because each describes the request in its own headers. A client can set the headers
//! that its proxy does not set. nginx and Traefik remove headers by their own lists, and ignore the list in the
//! response.
//!
//! | path | of the request, in |
//! |---|---|
//! | `/auth/nginx` | `X-OriginalRequest-Method`, `X-OriginalRequest-Host`, `X-OriginalRequest-URI` |
//! | `/auth/traefik` | `X-Forwarded-Method`, `X-Forwarded-Host`, `X-Forwarded-Uri` |
//! | `/auth/envoy/…` | method, host and the rest of the path |
//!
//! The query of the first two may set a rule's fields, such as `/auth/nginx?scope=monitors:read`.

use std::{net::SocketAddr, sync::Arc};

use http::{HeaderMap, StatusCode, request::Parts};
use tokio::{net::TcpListener, sync::watch};
use tracing::Instrument as _;

use crate::{
    clock::Clock,
    domain::name::AccountId,
    gateway::{
        ClientSource, Gateway, ProxyProtocol, ProxyRequest, ProxyResponse, Requester, RouteOverrides,
        parse_form, parse_route_overrides,
    },
    http1::{self, PageResponse},
    trace::{self, CallTracer},
    transport::memory_budget::MemoryBudget,
};

/// Serves proxies until `stopping` turns true.
pub(crate) async fn serve(
    listener: TcpListener,
    memory: Arc<MemoryBudget>,
    gateway: Arc<Gateway>,
    tracing: CallTracer,
    clock: Arc<dyn Clock>,
    stopping: watch::Receiver<bool>,
) {
    let operator = AccountId::operator();
    let page = move |request: Parts| {
        let (gateway, operator) = (gateway.clone(), operator.clone());
        let peer = request.extensions.get::<SocketAddr>().map(|peer| peer.ip().to_canonical());
        let call = tracing.new_call(Some(&request.headers), peer, clock.now());
        trace::scope(call, async move {
            let answer = authorize_request(&gateway, &operator, &request);
            match tracing.start_span("forward_auth") {
                Some(span) => answer.instrument(span).await,
                None => answer.await,
            }
        })
    };
    http1::serve(listener, memory, page, stopping).await;
}

/// The kind of proxy, which determines where the request is described.
#[derive(Clone, Copy, PartialEq, Eq)]
enum ProxyKind {
    Nginx,
    Traefik,
    Envoy,
}

/// The method, host and target of the request that the proxy holds.
struct OriginalRequest<'a>(&'a [u8], &'a [u8], &'a [u8]);

async fn authorize_request(gateway: &Gateway, operator: &AccountId, request: &Parts) -> PageResponse {
    let path = request.uri.path();
    let (proxy, original) = match path {
        "/auth/nginx" => (ProxyKind::Nginx, read_original_headers(&request.headers, "x-original", "uri")),
        "/auth/traefik" => {
            (ProxyKind::Traefik, read_original_headers(&request.headers, "x-forwarded", "uri"))
        }
        _ => match path.strip_prefix("/auth/envoy") {
            Some(rest) if rest.starts_with('/') => (ProxyKind::Envoy, read_original_path(request)),
            _ => {
                return PageResponse::from_text(
                    StatusCode::NOT_FOUND,
                    "there are /auth/nginx, /auth/traefik, /auth/envoy/…\n",
                );
            }
        },
    };
    let mut overrides = match proxy {
        ProxyKind::Envoy => RouteOverrides::default(),
        ProxyKind::Nginx | ProxyKind::Traefik => read_route_overrides(gateway, request),
    };
    let OriginalRequest(method, host, target) = original.unwrap_or_else(|problem| {
        overrides.problem.get_or_insert(problem);
        OriginalRequest(b"", b"", b"")
    });
    let headers = request.headers.iter().map(|(name, value)| (name.as_str().as_bytes(), value.as_bytes()));
    let proxy_request = ProxyRequest {
        protocol: ProxyProtocol::ForwardAuth,
        proxy_removes_headers: proxy == ProxyKind::Envoy,
        method,
        host,
        target,
        headers: headers.collect(),
        client_source: ClientSource::LastForwarded,
        proxy_request_id: b"",
    };
    render_reply(
        proxy,
        gateway.authorize(Requester::always_authorized(operator), &proxy_request, overrides).await,
    )
}

fn read_route_overrides(gateway: &Gateway, request: &Parts) -> RouteOverrides {
    let fields: Vec<_> = parse_form(request.uri.query().unwrap_or_default().as_bytes()).collect();
    let fields = fields.iter().map(|(name, value)| (&**name, &**value));
    parse_route_overrides(fields, gateway.environments(), true)
}

/// Reads the request from these headers. Each must occur exactly once.
fn read_original_headers<'a>(
    headers: &'a HeaderMap,
    start: &str,
    uri: &str,
) -> Result<OriginalRequest<'a>, String> {
    let one = |end: &str| {
        let name = format!("{start}-{end}");
        let mut values = headers.get_all(&name).iter();
        match (values.next(), values.next()) {
            (Some(value), None) => Ok(value.as_bytes()),
            (None, _) => Err(format!("the proxy sends no {name}: see deploy/nginx and docs/gateway.md")),
            _ => Err(format!("{name} comes more than once: the proxy must replace the client's")),
        }
    };
    Ok(OriginalRequest(one("method")?, one("host")?, one(uri)?))
}

/// Reads the request itself, without the prefix of its path.
fn read_original_path(request: &Parts) -> Result<OriginalRequest<'_>, String> {
    let target = request.uri.path_and_query().map(|target| target.as_str()).unwrap_or_default();
    let target = target.strip_prefix("/auth/envoy").unwrap_or_default();
    let mut hosts = request.headers.get_all(http::header::HOST).iter();
    match (hosts.next(), hosts.next()) {
        (Some(host), None) => {
            Ok(OriginalRequest(request.method.as_str().as_bytes(), host.as_bytes(), target.as_bytes()))
        }
        _ => Err("the request has no host, or several".to_owned()),
    }
}

fn render_reply(proxy: ProxyKind, reply: ProxyResponse) -> PageResponse {
    let ProxyResponse {
        is_allowed: passes,
        status,
        mut body,
        client_headers: mut headers,
        upstream_headers: upstream,
        remove_headers: remove,
        ..
    } = reply;
    if passes {
        headers.extend(upstream);
        let name = match proxy {
            // Envoy removes these headers from the request, and this one from the response.
            ProxyKind::Envoy => "x-envoy-auth-headers-to-remove",
            // Other proxies can see here whether to remove the credential.
            ProxyKind::Nginx | ProxyKind::Traefik => "x-keyward-remove",
        };
        headers.push((name, remove.join(",")));
        return PageResponse { status: StatusCode::OK, headers, body: String::new() };
    }
    if proxy == ProxyKind::Nginx {
        // nginx does not read the body of such a response, and reuses the connection only without one.
        body.clear();
    }
    let status = match (proxy, status) {
        // nginx passes only 401 and 403 on, and turns any other status into 500.
        (ProxyKind::Nginx, 400 | 429) => {
            headers.push(("x-keyward-status", status.to_string()));
            403
        }
        (_, status) => status,
    };
    let status = StatusCode::from_u16(status).unwrap_or(StatusCode::FORBIDDEN);
    PageResponse { status, headers, body }
}
