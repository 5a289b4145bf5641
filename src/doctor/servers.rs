//! Checks running servers from outside: the admin pages over HTTP, health over gRPC, and the certificate of a TLS listener.
//! No token is needed or sent.

use std::collections::BTreeMap;

use http::{Request, Uri};
use http_body_util::{BodyExt as _, Empty, Limited};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};

use crate::{clock::Clock, domain::time::Revision};

use super::{
    certificates,
    report::{CHECK_TIMEOUT, DoctorReport},
};

/// The maximum size of an admin page in bytes.
const MAX_PAGE_BYTES: usize = 4 << 20;

/// The address of a server: `http://HOST:PORT`, `https://HOST:PORT` or `HOST:PORT`.
#[derive(Clone, Debug)]
pub(crate) struct ServerEndpoint {
    text: String,
    host: String,
    port: u16,
    tls: bool,
}

impl std::str::FromStr for ServerEndpoint {
    type Err = String;

    fn from_str(text: &str) -> Result<ServerEndpoint, String> {
        let expected = || "use http://HOST:PORT, https://HOST:PORT or HOST:PORT".to_owned();
        let whole = if text.contains("://") { text.to_owned() } else { format!("http://{text}") };
        let uri: Uri = whole.parse().map_err(|_| expected())?;
        let tls = match uri.scheme_str() {
            Some("http") => false,
            Some("https") => true,
            _ => return Err(expected()),
        };
        let host = uri.host().filter(|host| !host.is_empty()).ok_or_else(expected)?;
        // A password in the address would be printed.
        if uri.authority().is_none_or(|authority| authority.as_str().contains('@')) {
            return Err(expected());
        }
        let (host, port) = (host.trim_matches(['[', ']']).to_owned(), uri.port_u16().ok_or_else(expected)?);
        Ok(ServerEndpoint { text: text.to_owned(), host, port, tls })
    }
}

impl ServerEndpoint {
    async fn connect(&self) -> Result<TcpStream, String> {
        let connection = TcpStream::connect((self.host.as_str(), self.port));
        with_timeout(connection).await?.map_err(|error| error.to_string())
    }
}

async fn with_timeout<T>(work: impl Future<Output = T>) -> Result<T, String> {
    tokio::time::timeout(CHECK_TIMEOUT, work)
        .await
        .map_err(|_| format!("no answer within {} s", CHECK_TIMEOUT.as_secs()))
}

/// Checks the servers. `head` is the newest revision of the database, if it is known.
pub(super) async fn check_servers(
    admin_endpoints: &[ServerEndpoint],
    grpc_endpoints: &[ServerEndpoint],
    head: Option<Revision>,
    clock: &dyn Clock,
    findings: &mut DoctorReport,
) {
    if admin_endpoints.is_empty() {
        findings
            .skip("server", "admin pages (readiness, revision, frozen clocks); name them with --admin URL");
    }
    for url in admin_endpoints {
        check_admin_endpoint(url, head, findings).await;
    }
    if grpc_endpoints.is_empty() {
        findings.skip("server", "gRPC listeners; name them with --server URL");
    }
    for url in grpc_endpoints {
        check_grpc_endpoint(url, clock, findings).await;
    }
}

async fn check_admin_endpoint(url: &ServerEndpoint, head: Option<Revision>, findings: &mut DoctorReport) {
    const TOPIC: &str = "server";
    if url.tls {
        findings.skip(TOPIC, format!("{}: admin pages over TLS", url.text));
        return;
    }
    let (status, _) = match fetch_page(url, "/readyz").await {
        Ok(answer) => answer,
        Err(error) => {
            findings.fail(
                TOPIC,
                format!("{}: {error}", url.text),
                "is it running there? its admin pages are on admin_listen",
            );
            return;
        }
    };
    match status {
        200 => findings.pass(TOPIC, format!("{} is ready", url.text)),
        503 => findings.fail(
            TOPIC,
            format!("{} is not ready: it answers no Check", url.text),
            "its log has the reason: loading, or no lease",
        ),
        other => findings.fail(
            TOPIC,
            format!("{} answers {other} to /readyz", url.text),
            "is that an admin listener of Keyward?",
        ),
    }
    match fetch_page(url, "/metrics").await {
        Ok((200, text)) => check_metrics(&url.text, &parse_unlabeled_metrics(&text), head, findings),
        Ok((status, _)) => findings.fail(
            TOPIC,
            format!("{} answers {status} to /metrics", url.text),
            "is that an admin listener of Keyward?",
        ),
        Err(error) => findings.fail(TOPIC, format!("{}: /metrics: {error}", url.text), "check its log"),
    }
}

/// Fetches a page; returns its status and text.
async fn fetch_page(url: &ServerEndpoint, path: &str) -> Result<(u16, String), String> {
    let stream = url.connect().await?;
    with_timeout(async {
        let failed = |error: &dyn std::fmt::Display| error.to_string();
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .map_err(|error| failed(&error))?;
        let connection_task = tokio::spawn(connection);
        let request = Request::get(path).header("host", &url.host).body(Empty::<bytes::Bytes>::new());
        let answer = sender.send_request(request.map_err(|error| failed(&error))?).await;
        let answer = answer.map_err(|error| failed(&error))?;
        let status = answer.status().as_u16();
        let body = Limited::new(answer.into_body(), MAX_PAGE_BYTES)
            .collect()
            .await
            .map_err(|error| failed(&error))?;
        connection_task.abort();
        Ok((status, String::from_utf8_lossy(&body.to_bytes()).into_owned()))
    })
    .await?
}

/// Parses the series without labels of a metrics page.
fn parse_unlabeled_metrics(text: &str) -> BTreeMap<&str, f64> {
    let series = text.lines().filter(|line| !line.starts_with('#') && !line.contains('{'));
    series
        .filter_map(|line| line.split_once(' '))
        .filter_map(|(name, value)| Some((name, value.parse().ok()?)))
        .collect()
}

fn check_metrics(
    server: &str,
    numbers: &BTreeMap<&str, f64>,
    head: Option<Revision>,
    findings: &mut DoctorReport,
) {
    const TOPIC: &str = "server";
    let number = |name: &str| numbers.get(name).copied();
    if number("keyward_regressed") == Some(1.0) {
        let fix =
            "restore them, or accept the loss: keyward replicas accept-regression (docs/reliability.md)";
        findings.fail(TOPIC, format!("{server} has changes that the database has lost"), fix);
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
                0 => findings.pass(TOPIC, format!("{server} has the database's newest revision, {head}")),
                _ => findings.warn(
                    TOPIC,
                    format!("{server} is {behind} revisions behind the database's {head}"),
                    "repeat the check; if it stays behind, its log has the reason",
                ),
            }
        }
        _ => findings.skip(TOPIC, format!("{server}: its revision against the database's")),
    }
    match number("keyward_clock_frozen_total") {
        Some(0.0) => findings.pass(TOPIC, format!("{server}: its machine's clock has not stood still")),
        Some(times) => findings.warn(
            "clocks",
            format!("{server}: its machine's clock has stood still {times} times during a lease"),
            "do not suspend or clone that virtual machine while it serves",
        ),
        None => {}
    }
}

async fn check_grpc_endpoint(url: &ServerEndpoint, clock: &dyn Clock, findings: &mut DoctorReport) {
    const TOPIC: &str = "server";
    let answer = if url.tls {
        match certificates::tls_handshake(url.connect(), &url.host).await {
            Ok((stream, chain)) => {
                certificates::check_certificate_chain(&url.text, &chain, clock, findings);
                query_health(url, stream).await
            }
            Err(error) => Err(error),
        }
    } else {
        match url.connect().await {
            Ok(stream) => query_health(url, stream).await,
            Err(error) => Err(error),
        }
    };
    match answer {
        Ok(ServingStatus::Serving) => findings.pass(TOPIC, format!("{} is SERVING", url.text)),
        Ok(status) => findings.fail(
            TOPIC,
            format!("{} reports {}", url.text, status.as_str_name()),
            "its log has the reason: loading, stopping, or no lease",
        ),
        Err(error) => findings.fail(
            TOPIC,
            format!("{}: {error}", url.text),
            "is it running there, and does it serve health?",
        ),
    }
}

/// Queries health over an established connection.
async fn query_health<S>(url: &ServerEndpoint, stream: S) -> Result<ServingStatus, String>
where
    S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Send + Unpin + 'static,
{
    let mut once = Some(TokioIo::new(stream));
    let connector = tower::service_fn(move |_: Uri| {
        std::future::ready(once.take().ok_or_else(|| std::io::Error::other("the connection has ended")))
    });
    let endpoint =
        tonic::transport::Endpoint::from_shared(format!("http://{}:{}", bracket_ipv6(&url.host), url.port));
    let endpoint = endpoint.map_err(|error| error_chain(&error))?.timeout(CHECK_TIMEOUT);
    let channel = with_timeout(endpoint.connect_with_connector(connector))
        .await?
        .map_err(|error| error_chain(&error))?;
    let response = HealthClient::new(channel).check(HealthCheckRequest::default()).await;
    response
        .map(|answer| answer.into_inner().status())
        .map_err(|status| format!("health: {} ({:?})", status.message(), status.code()))
}

fn bracket_ipv6(host: &str) -> String {
    if host.contains(':') { format!("[{host}]") } else { host.to_owned() }
}

/// Formats an error with its causes.
fn error_chain(error: &dyn std::error::Error) -> String {
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
    use crate::doctor::report::Severity;

    #[test]
    fn a_server_is_named_by_host_and_port() {
        for good in ["127.0.0.1:9090", "http://keyward:9090", "https://[::1]:443"] {
            assert!(good.parse::<ServerEndpoint>().is_ok(), "{good}");
        }
        for bad in ["keyward", "ftp://a:1", "http://u:p@a:1", "", "http://:1", "https://a"] {
            assert!(bad.parse::<ServerEndpoint>().is_err(), "{bad}");
        }
    }

    #[test]
    fn a_server_that_lags_regressed_or_stood_still_is_told() {
        let levels = |page: &str, head| {
            let mut findings = DoctorReport::default();
            check_metrics("a:1", &parse_unlabeled_metrics(page), Some(Revision(head)), &mut findings);
            findings.iter().map(|found| found.severity).collect::<Vec<_>>()
        };
        let page = "# HELP x y\nkeyward_revision 7\nkeyward_regressed 0\nkeyward_clock_frozen_total 0\nx{a=\"b\"} 1\n";
        assert_eq!(levels(page, 7), [Severity::Ok, Severity::Ok]);
        assert_eq!(levels(page, 9), [Severity::Warning, Severity::Ok]);
        assert_eq!(levels(&page.replace("regressed 0", "regressed 1"), 7)[0], Severity::Failure);
        assert_eq!(levels(&page.replace("frozen_total 0", "frozen_total 2"), 7)[1], Severity::Warning);
    }
}
