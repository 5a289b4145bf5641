//! Running servers, as their callers meet them: the admin pages over HTTP, health over gRPC, the certificate that a TLS
//! listener shows. No token is needed and none is sent.

use std::collections::BTreeMap;

use http::{Request, Uri};
use http_body_util::{BodyExt as _, Empty, Limited};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};

use crate::{clock::Clock, domain::time::Revision};

use super::{Asked, Findings, PATIENCE, certificates};

/// The largest admin page that is read, in bytes.
const MAX_PAGE: usize = 4 << 20;

/// Where a server is: `http://HOST:PORT`, `https://HOST:PORT` or `HOST:PORT`.
#[derive(Clone, Debug)]
pub struct Url {
    text: String,
    host: String,
    port: u16,
    tls: bool,
}

impl std::str::FromStr for Url {
    type Err = String;

    fn from_str(text: &str) -> Result<Url, String> {
        let wanted = || "say http://HOST:PORT, https://HOST:PORT or HOST:PORT".to_owned();
        let whole = if text.contains("://") { text.to_owned() } else { format!("http://{text}") };
        let uri: Uri = whole.parse().map_err(|_| wanted())?;
        let tls = match uri.scheme_str() {
            Some("http") => false,
            Some("https") => true,
            _ => return Err(wanted()),
        };
        let host = uri.host().filter(|host| !host.is_empty()).ok_or_else(wanted)?;
        // A password in it would end up on the screen.
        if uri.authority().is_none_or(|authority| authority.as_str().contains('@')) {
            return Err(wanted());
        }
        let (host, port) = (host.trim_matches(['[', ']']).to_owned(), uri.port_u16().ok_or_else(wanted)?);
        Ok(Url { text: text.to_owned(), host, port, tls })
    }
}

impl Url {
    async fn connect(&self) -> Result<TcpStream, String> {
        let connecting = TcpStream::connect((self.host.as_str(), self.port));
        within(connecting).await?.map_err(|error| error.to_string())
    }
}

async fn within<T>(work: impl Future<Output = T>) -> Result<T, String> {
    tokio::time::timeout(PATIENCE, work)
        .await
        .map_err(|_| format!("no answer within {} s", PATIENCE.as_secs()))
}

/// Looks at the servers; `head` is the database's newest revision, if that is known.
pub(super) async fn examine(
    asked: &Asked<'_>,
    head: Option<Revision>,
    clock: &dyn Clock,
    findings: &mut Findings,
) {
    if asked.admin.is_empty() {
        findings
            .unseen("server", "admin pages (readiness, revision, frozen clocks); name them with --admin URL");
    }
    for url in asked.admin {
        admin(url, head, findings).await;
    }
    if asked.servers.is_empty() {
        findings.unseen("server", "gRPC listeners; name them with --server URL");
    }
    for url in asked.servers {
        grpc(url, clock, findings).await;
    }
}

async fn admin(url: &Url, head: Option<Revision>, findings: &mut Findings) {
    const ABOUT: &str = "server";
    if url.tls {
        findings.unseen(ABOUT, format!("{}: admin pages over TLS", url.text));
        return;
    }
    let (status, _) = match page(url, "/readyz").await {
        Ok(answer) => answer,
        Err(error) => {
            findings.fail(
                ABOUT,
                format!("{}: {error}", url.text),
                "is it running there? its admin pages are on admin_listen",
            );
            return;
        }
    };
    match status {
        200 => findings.good(ABOUT, format!("{} is ready", url.text)),
        503 => findings.fail(
            ABOUT,
            format!("{} is not ready: it answers no Check", url.text),
            "its log says why: loading, or no lease",
        ),
        other => findings.fail(
            ABOUT,
            format!("{} answers {other} to /readyz", url.text),
            "is that a keyward's admin listener?",
        ),
    }
    match page(url, "/metrics").await {
        Ok((200, text)) => metrics(&url.text, &numbers(&text), head, findings),
        Ok((status, _)) => findings.fail(
            ABOUT,
            format!("{} answers {status} to /metrics", url.text),
            "is that a keyward's admin listener?",
        ),
        Err(error) => findings.fail(ABOUT, format!("{}: /metrics: {error}", url.text), "look at its log"),
    }
}

/// A page: its status and text.
async fn page(url: &Url, path: &str) -> Result<(u16, String), String> {
    let stream = url.connect().await?;
    within(async {
        let failed = |error: &dyn std::fmt::Display| error.to_string();
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .map_err(|error| failed(&error))?;
        let driving = tokio::spawn(connection);
        let request = Request::get(path).header("host", &url.host).body(Empty::<bytes::Bytes>::new());
        let answer = sender.send_request(request.map_err(|error| failed(&error))?).await;
        let answer = answer.map_err(|error| failed(&error))?;
        let status = answer.status().as_u16();
        let body =
            Limited::new(answer.into_body(), MAX_PAGE).collect().await.map_err(|error| failed(&error))?;
        driving.abort();
        Ok((status, String::from_utf8_lossy(&body.to_bytes()).into_owned()))
    })
    .await?
}

/// The series of a metrics page that have no labels.
fn numbers(text: &str) -> BTreeMap<&str, f64> {
    let series = text.lines().filter(|line| !line.starts_with('#') && !line.contains('{'));
    series
        .filter_map(|line| line.split_once(' '))
        .filter_map(|(name, value)| Some((name, value.parse().ok()?)))
        .collect()
}

fn metrics(server: &str, numbers: &BTreeMap<&str, f64>, head: Option<Revision>, findings: &mut Findings) {
    const ABOUT: &str = "server";
    let number = |name: &str| numbers.get(name).copied();
    if number("keyward_regressed") == Some(1.0) {
        let fix =
            "restore what was lost, or accept it: keyward replicas accept-regression (docs/reliability.md)";
        findings.fail(ABOUT, format!("{server} knows changes that the database has lost"), fix);
    }
    match (number("keyward_revision"), head) {
        (Some(revision), Some(head)) => {
            #[expect(
                clippy::cast_possible_truncation,
                clippy::cast_sign_loss,
                reason = "a revision came in as a number"
            )]
            let behind = head.0.saturating_sub(revision as u64);
            match behind {
                0 => findings.good(ABOUT, format!("{server} has the database's newest revision, {head}")),
                _ => findings.warn(
                    ABOUT,
                    format!("{server} is {behind} revisions behind the database's {head}"),
                    "ask again; if it stays so, its log says why",
                ),
            }
        }
        _ => findings.unseen(ABOUT, format!("{server}: its revision against the database's")),
    }
    match number("keyward_clock_frozen_total") {
        Some(0.0) => findings.good(ABOUT, format!("{server}: its machine's clock has not stood still")),
        Some(times) => findings.warn(
            "clocks",
            format!("{server}: its machine's clock has stood still {times} times, while a lease ran"),
            "do not suspend or clone that virtual machine while it serves",
        ),
        None => {}
    }
}

async fn grpc(url: &Url, clock: &dyn Clock, findings: &mut Findings) {
    const ABOUT: &str = "server";
    let answer = if url.tls {
        match certificates::shown(url.connect(), &url.host).await {
            Ok((stream, chain)) => {
                certificates::examine_chain(&url.text, &chain, clock, findings);
                health(url, stream).await
            }
            Err(error) => Err(error),
        }
    } else {
        match url.connect().await {
            Ok(stream) => health(url, stream).await,
            Err(error) => Err(error),
        }
    };
    match answer {
        Ok(ServingStatus::Serving) => findings.good(ABOUT, format!("{} is SERVING", url.text)),
        Ok(status) => findings.fail(
            ABOUT,
            format!("{} says {}", url.text, status.as_str_name()),
            "its log says why: loading, stopping, or no lease",
        ),
        Err(error) => findings.fail(
            ABOUT,
            format!("{}: {error}", url.text),
            "is it running there, and does it serve health?",
        ),
    }
}

/// Asks for health over a connection that is there already.
async fn health<S>(url: &Url, stream: S) -> Result<ServingStatus, String>
where
    S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Send + Unpin + 'static,
{
    let mut once = Some(TokioIo::new(stream));
    let connector = tower::service_fn(move |_: Uri| {
        std::future::ready(once.take().ok_or_else(|| std::io::Error::other("the connection has ended")))
    });
    let endpoint =
        tonic::transport::Endpoint::from_shared(format!("http://{}:{}", bracketed(&url.host), url.port));
    let endpoint = endpoint.map_err(|error| chain(&error))?.timeout(PATIENCE);
    let channel = within(endpoint.connect_with_connector(connector)).await?.map_err(|error| chain(&error))?;
    let asked = HealthClient::new(channel).check(HealthCheckRequest::default()).await;
    asked
        .map(|answer| answer.into_inner().status())
        .map_err(|status| format!("health: {} ({:?})", status.message(), status.code()))
}

fn bracketed(host: &str) -> String {
    if host.contains(':') { format!("[{host}]") } else { host.to_owned() }
}

/// An error with its causes.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::Level;

    #[test]
    fn a_server_is_named_by_host_and_port() {
        for good in ["127.0.0.1:9090", "http://keyward:9090", "https://[::1]:443"] {
            assert!(good.parse::<Url>().is_ok(), "{good}");
        }
        for bad in ["keyward", "ftp://a:1", "http://u:p@a:1", "", "http://:1", "https://a"] {
            assert!(bad.parse::<Url>().is_err(), "{bad}");
        }
    }

    #[test]
    fn a_server_that_lags_regressed_or_stood_still_is_told() {
        let levels = |page: &str, head| {
            let mut findings = Findings::default();
            metrics("a:1", &numbers(page), Some(Revision(head)), &mut findings);
            findings.iter().map(|found| found.level).collect::<Vec<_>>()
        };
        let page = "# HELP x y\nkeyward_revision 7\nkeyward_regressed 0\nkeyward_clock_frozen_total 0\nx{a=\"b\"} 1\n";
        assert_eq!(levels(page, 7), [Level::Good, Level::Good]);
        assert_eq!(levels(page, 9), [Level::Warning, Level::Good]);
        assert_eq!(levels(&page.replace("regressed 0", "regressed 1"), 7)[0], Level::Failure);
        assert_eq!(levels(&page.replace("frozen_total 0", "frozen_total 2"), 7)[1], Level::Warning);
    }
}
