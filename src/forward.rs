//! The gateway for proxies that ask over HTTP: nginx `auth_request`, Traefik ForwardAuth, Envoy's HTTP ext_authz.
//! Each has a path of its own, since each tells of the request in headers of its own, and headers that a proxy does
//! not set are the client's. nginx and Traefik remove headers by their own lists, not by what the reply names.
//!
//! | path | of the request, in |
//! |---|---|
//! | `/auth/nginx` | `X-Original-Method`, `X-Original-Host`, `X-Original-URI` |
//! | `/auth/traefik` | `X-Forwarded-Method`, `X-Forwarded-Host`, `X-Forwarded-Uri` |
//! | `/auth/envoy/…` | method, host and the rest of the path |
//!
//! The query of the first two may say what the route needs, in a rule's fields: `/auth/nginx?scope=monitors:read`.

use std::{net::SocketAddr, sync::Arc};

use http::{HeaderMap, StatusCode, request::Parts};
use tokio::{net::TcpListener, sync::watch};
use tracing::Instrument as _;

use crate::{
    clock::Clock,
    domain::name::AccountId,
    gateway::{Asked, Asker, Client, Gateway, Reply, Said, Via, read_extensions, read_form},
    http1::{self, Page},
    trace::{self, Tracing},
    transport::budget::MemoryBudget,
};

/// Serves proxies until `stopping` turns true.
pub async fn serve(
    listener: TcpListener,
    memory: Arc<MemoryBudget>,
    gateway: Arc<Gateway>,
    tracing: Tracing,
    clock: Arc<dyn Clock>,
    stopping: watch::Receiver<bool>,
) {
    let asker = AccountId::operator();
    let page = move |request: Parts| {
        let (gateway, asker) = (gateway.clone(), asker.clone());
        let peer = request.extensions.get::<SocketAddr>().map(|peer| peer.ip().to_canonical());
        let call = tracing.call(Some(&request.headers), peer, clock.now());
        trace::within(call, async move {
            let answer = answer(&gateway, &asker, &request);
            match tracing.span("forward_auth") {
                Some(span) => answer.instrument(span).await,
                None => answer.await,
            }
        })
    };
    http1::serve(listener, memory, page, stopping).await;
}

/// Which proxy asks.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Proxy {
    Nginx,
    Traefik,
    Envoy,
}

/// The request that a proxy asks about: method, host, target.
struct Original<'a>(&'a [u8], &'a [u8], &'a [u8]);

async fn answer(gateway: &Gateway, asker: &AccountId, request: &Parts) -> Page {
    let path = request.uri.path();
    let (proxy, original) = match path {
        "/auth/nginx" => (Proxy::Nginx, told(&request.headers, "x-original", "uri")),
        "/auth/traefik" => (Proxy::Traefik, told(&request.headers, "x-forwarded", "uri")),
        _ => match path.strip_prefix("/auth/envoy") {
            Some(rest) if rest.starts_with('/') => (Proxy::Envoy, direct(request)),
            _ => {
                return Page::text(
                    StatusCode::NOT_FOUND,
                    "there are /auth/nginx, /auth/traefik, /auth/envoy/…\n",
                );
            }
        },
    };
    let mut said = match proxy {
        Proxy::Envoy => Said::default(),
        Proxy::Nginx | Proxy::Traefik => said(gateway, request),
    };
    let Original(method, host, target) = original.unwrap_or_else(|problem| {
        said.problem.get_or_insert(problem);
        Original(b"", b"", b"")
    });
    let headers = request.headers.iter().map(|(name, value)| (name.as_str().as_bytes(), value.as_bytes()));
    let asked = Asked {
        via: Via::Forward,
        proxy_removes: proxy == Proxy::Envoy,
        method,
        host,
        target,
        headers: headers.collect(),
        client: Client::LastForwarded,
        id: b"",
    };
    page(proxy, gateway.judge(Asker::always(asker), &asked, said).await)
}

fn said(gateway: &Gateway, request: &Parts) -> Said {
    let fields: Vec<_> = read_form(request.uri.query().unwrap_or_default().as_bytes()).collect();
    let fields = fields.iter().map(|(name, value)| (&**name, &**value));
    read_extensions(fields, gateway.environments(), true)
}

/// The request that headers tell of, each given once.
fn told<'a>(headers: &'a HeaderMap, start: &str, uri: &str) -> Result<Original<'a>, String> {
    let one = |end: &str| {
        let name = format!("{start}-{end}");
        let mut values = headers.get_all(&name).iter();
        match (values.next(), values.next()) {
            (Some(value), None) => Ok(value.as_bytes()),
            (None, _) => Err(format!("the proxy sends no {name}: see deploy/nginx and docs/gateway.md")),
            _ => Err(format!("{name} comes more than once: the proxy must replace the client's")),
        }
    };
    Ok(Original(one("method")?, one("host")?, one(uri)?))
}

/// The request itself, its path behind ours.
fn direct(request: &Parts) -> Result<Original<'_>, String> {
    let target = request.uri.path_and_query().map(|target| target.as_str()).unwrap_or_default();
    let target = target.strip_prefix("/auth/envoy").unwrap_or_default();
    let mut hosts = request.headers.get_all(http::header::HOST).iter();
    match (hosts.next(), hosts.next()) {
        (Some(host), None) => {
            Ok(Original(request.method.as_str().as_bytes(), host.as_bytes(), target.as_bytes()))
        }
        _ => Err("the request has no host, or several".to_owned()),
    }
}

fn page(proxy: Proxy, reply: Reply) -> Page {
    let Reply { passes, status, mut body, mut headers, upstream, remove, .. } = reply;
    if passes {
        headers.extend(upstream);
        let name = match proxy {
            // Envoy takes these from the request, and this header from the answer.
            Proxy::Envoy => "x-envoy-auth-headers-to-remove",
            // Others may look whether the credential is among them.
            Proxy::Nginx | Proxy::Traefik => "x-keyward-remove",
        };
        headers.push((name, remove.join(",")));
        return Page { status: StatusCode::OK, headers, body: String::new() };
    }
    if proxy == Proxy::Nginx {
        // It reads no body of such an answer, and keeps the connection only where there is none.
        body.clear();
    }
    let status = match (proxy, status) {
        // nginx passes on 401 and 403 alone, and makes a 500 of anything else.
        (Proxy::Nginx, 400 | 429) => {
            headers.push(("x-keyward-status", status.to_string()));
            403
        }
        (_, status) => status,
    };
    let status = StatusCode::from_u16(status).unwrap_or(StatusCode::FORBIDDEN);
    Page { status, headers, body }
}
