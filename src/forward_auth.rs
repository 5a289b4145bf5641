//! The gateway's HTTP interface for proxies: nginx `auth_request`, Traefik ForwardAuth, Envoy's HTTP ext_authz.
//!
//! Each proxy has its own path, because each describes the original request in its own headers, and a header that the
//! proxy does not set comes from the client. nginx and Traefik remove headers by their own lists, not by the reply.
//!
//! | path | of the request, in |
//! |---|---|
//! | `/auth/nginx` | `X-OriginalRequest-Method`, `X-OriginalRequest-Host`, `X-OriginalRequest-URI` |
//! | `/auth/traefik` | `X-Forwarded-Method`, `X-Forwarded-Host`, `X-Forwarded-Uri` |
//! | `/auth/envoy/…` | method, host and the rest of the path |
//!
//! For the first two, the query may set the fields of a rule: `/auth/nginx?scope=monitors:read`.

use std::{net::SocketAddr, sync::Arc};

use http::{HeaderMap, StatusCode, request::Parts};
use tokio::{net::TcpListener, sync::watch};
use tracing::Instrument as _;

use crate::{
    clock::Clock,
    domain::name::AccountId,
    gateway::{
        ClientSource, Gateway, ProxyProtocol, ProxyRequest, ProxyResponse, Requester, RouteOverrides,
        read_extensions, read_form,
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
    let requester = AccountId::operator();
    let page = move |request: Parts| {
        let (gateway, requester) = (gateway.clone(), requester.clone());
        let peer = request.extensions.get::<SocketAddr>().map(|peer| peer.ip().to_canonical());
        let call = tracing.new_call(Some(&request.headers), peer, clock.now());
        trace::scope(call, async move {
            let answer = authorize_request(&gateway, &requester, &request);
            match tracing.start_span("forward_auth") {
                Some(span) => answer.instrument(span).await,
                None => answer.await,
            }
        })
    };
    http1::serve(listener, memory, page, stopping).await;
}

/// The kind of proxy that sends the request.
#[derive(Clone, Copy, PartialEq, Eq)]
enum ProxyKind {
    Nginx,
    Traefik,
    Envoy,
}

/// The original request that the proxy asks about: method, host, target.
struct OriginalRequest<'a>(&'a [u8], &'a [u8], &'a [u8]);

async fn authorize_request(gateway: &Gateway, requester: &AccountId, request: &Parts) -> PageResponse {
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
                    "not found; the paths are /auth/nginx, /auth/traefik, /auth/envoy/…\n",
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
    let original_request = ProxyRequest {
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
        gateway.authorize(Requester::always_authorized(requester), &original_request, overrides).await,
    )
}

fn read_route_overrides(gateway: &Gateway, request: &Parts) -> RouteOverrides {
    let fields: Vec<_> = read_form(request.uri.query().unwrap_or_default().as_bytes()).collect();
    let fields = fields.iter().map(|(name, value)| (&**name, &**value));
    read_extensions(fields, gateway.environments(), true)
}

/// Reads the original request from headers, each of which must be present once.
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

/// The request itself, without the prefix of its path.
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
            // Envoy removes these from the request, and this header from the reply.
            ProxyKind::Envoy => "x-envoy-auth-headers-to-remove",
            // Other proxies may check whether the credential is listed.
            ProxyKind::Nginx | ProxyKind::Traefik => "x-keyward-remove",
        };
        headers.push((name, remove.join(",")));
        return PageResponse { status: StatusCode::OK, headers, body: String::new() };
    }
    if proxy == ProxyKind::Nginx {
        // nginx ignores the body, and keeps the connection open only without one.
        body.clear();
    }
    let status = match (proxy, status) {
        // nginx passes on only 401 and 403, and turns other codes into 500.
        (ProxyKind::Nginx, 400 | 429) => {
            headers.push(("x-keyward-status", status.to_string()));
            403
        }
        (_, status) => status,
    };
    let status = StatusCode::from_u16(status).unwrap_or(StatusCode::FORBIDDEN);
    PageResponse { status, headers, body }
}
