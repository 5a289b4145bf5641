//! The middleware that asks Keyward: what it sends, and which headers of a client it replaces by the answer.

use std::net::IpAddr;

use regex::Regex;
use serde_json::Value;

use crate::domain::header_name::IDENTITY_HEADERS;

use super::config::{JsonObject as _, TOPIC};
use crate::doctor::report::DoctorReport;

/// The most bytes that the body of an answer has.
const ANSWER_BYTES: i64 = 512;

/// Names as Go writes them, which PHP and WSGI services take for `X-Keyward-User`.
const SPELLINGS: [&str; 3] = ["X_keyward_user", "X.keyward.user", "X!keyward|account"];

/// Whether a `forwardAuth` asks Keyward, and not another server.
pub(super) fn asks_keyward(forward: &Value) -> bool {
    forward.text("address").contains("/auth/traefik")
}

/// Looks at a `forwardAuth` that asks Keyward.
pub(super) fn check_forward_auth(name: &str, forward: &Value, findings: &mut DoctorReport) {
    if forward.is_true("trustForwardHeader") {
        let problem =
            format!("{name} trusts X-Forwarded-… of clients: a client chooses which path Keyward judges");
        findings.fail(TOPIC, problem, "trustForwardHeader: false");
    }
    check_response_headers(name, forward, findings);
    let sees_all = check_request_headers(name, forward, findings);
    check_name_spellings(name, forward, sees_all, findings);
    check_body_settings(name, forward, findings);
    check_connection(name, forward, findings);
}

/// The headers that Traefik replaces by Keyward's answer, or removes.
fn check_response_headers(name: &str, forward: &Value, findings: &mut DoctorReport) {
    let replaced = forward.texts("authResponseHeaders");
    let passes = |wanted: &&str| !replaced.iter().any(|known| known.eq_ignore_ascii_case(wanted));
    let identity: Vec<&str> = IDENTITY_HEADERS.into_iter().filter(passes).collect();
    if !identity.is_empty() {
        let names = identity.join(", ");
        let problem = format!(
            "{name} lets {names} of a client reach the service, which takes them for Keyward's answer"
        );
        findings.fail(TOPIC, problem, format!("add to authResponseHeaders: {names}"));
    }
    let credential: Vec<&str> = ["authorization", "x-api-key"].into_iter().filter(passes).collect();
    if !credential.is_empty() {
        let names = credential.join(", ");
        let problem = format!("{name} sends the credential on to the service: {names}");
        findings.warn(TOPIC, problem, format!("add to authResponseHeaders, but for shadow mode: {names}"));
    }
}

/// The headers that Keyward sees. Gives whether it sees all.
fn check_request_headers(name: &str, forward: &Value, findings: &mut DoctorReport) -> bool {
    let sent = forward.texts("authRequestHeaders");
    if sent.is_empty() {
        return true;
    }
    let sends = |wanted: &str| sent.iter().any(|known| known.eq_ignore_ascii_case(wanted));
    if !sends("authorization") && !sends("x-api-key") {
        let problem = format!("{name} sends Keyward no credential: every request is denied");
        findings.fail(TOPIC, problem, "take authRequestHeaders away");
    } else {
        let problem = format!(
            "{name} sends Keyward only some headers: it cannot refuse x-http-method-override and odd spellings of names"
        );
        findings.warn(TOPIC, problem, "take authRequestHeaders away");
    }
    false
}

/// Other spellings of Keyward's names. Keyward answers them 400, if it sees them.
fn check_name_spellings(name: &str, forward: &Value, sees_all: bool, findings: &mut DoctorReport) {
    let pattern = forward.text("authResponseHeadersRegex");
    let fix = "authResponseHeadersRegex: \"[^A-Za-z0-9-]\"";
    let regex = match Regex::new(pattern) {
        Ok(regex) => regex,
        Err(_) => {
            return findings.skip(TOPIC, format!("{name}: which names authResponseHeadersRegex matches"));
        }
    };
    if !pattern.is_empty() && SPELLINGS.iter().all(|spelling| regex.is_match(spelling)) {
        return;
    }
    let problem = format!(
        "{name} does not remove spellings such as X_Keyward_User, which PHP takes for X-Keyward-User"
    );
    if sees_all {
        findings.warn(TOPIC, format!("{problem}; Keyward alone refuses them"), fix);
    } else {
        findings.fail(TOPIC, problem, fix);
    }
}

fn check_body_settings(name: &str, forward: &Value, findings: &mut DoctorReport) {
    let number = |field: &str| forward.field(field).and_then(Value::as_i64);
    if forward.is_true("forwardBody") {
        match number("maxBodySize") {
            Some(most) if most >= 0 => {
                let problem = format!("{name} sends bodies to Keyward, which does not look at them");
                findings.warn(TOPIC, problem, "take forwardBody away");
            }
            _ => {
                let problem =
                    format!("{name} sends bodies of any length to Keyward: Traefik holds each in memory");
                findings.fail(TOPIC, problem, "take forwardBody away: Keyward does not look at bodies");
            }
        }
    }
    if let Some(most) = number("maxResponseBodySize").filter(|most| (0..ANSWER_BYTES).contains(most)) {
        let problem =
            format!("{name} takes answers of {most} bytes: what Keyward says of a denial can be longer");
        findings.warn(TOPIC, problem, format!("maxResponseBodySize: {ANSWER_BYTES}, or more"));
    }
}

/// Whether others on the network can read tokens, or answer in place of Keyward.
fn check_connection(name: &str, forward: &Value, findings: &mut DoctorReport) {
    let address = forward.text("address");
    let uri: Option<http::Uri> = address.parse().ok();
    let Some((scheme, host)) = uri.as_ref().and_then(|uri| Some((uri.scheme_str()?, uri.host()?))) else {
        return findings.skip(TOPIC, format!("{name}: where its address leads to"));
    };
    let ip = host.trim_matches(['[', ']']).parse::<IpAddr>();
    let is_local = host == "localhost" || ip.is_ok_and(|address| address.is_loopback());
    if scheme == "http" && !is_local {
        let problem = format!("{name} asks {host} without TLS: tokens cross the network readable");
        findings.fail(TOPIC, problem, "address: https://…, or Keyward on the same machine");
    }
    if forward.field("tls").is_some_and(|tls| tls.is_true("insecureSkipVerify")) {
        let problem = format!("{name} takes any certificate: another server can answer in place of Keyward");
        findings.fail(TOPIC, problem, "tls: { ca: … } in place of insecureSkipVerify");
    }
}
