//! Checks a `forwardAuth` middleware that asks Keyward: what it sends, and which headers of a client the answer replaces.

use std::net::IpAddr;

use regex::Regex;
use serde_json::Value;

use crate::domain::header_name::IDENTITY_HEADERS;

use super::config::{JsonObject as _, TOPIC};
use crate::doctor::report::DoctorReport;

/// The maximum size of the body of an answer.
const MAX_ANSWER_BYTES: i64 = 512;

/// Names in Go's spelling that PHP and WSGI services read as `X-Keyward-User` or `X-Keyward-Account`.
const SPELLINGS: [&str; 3] = ["X_keyward_user", "X.keyward.user", "X!keyward|account"];

/// Whether a `forwardAuth` asks Keyward, and not another server.
pub(super) fn asks_keyward(forward: &Value) -> bool {
    forward.text("address").contains("/auth/traefik")
}

pub(super) fn check_forward_auth(name: &str, forward: &Value, findings: &mut DoctorReport) {
    if forward.is_true("trustForwardHeader") {
        let problem =
            format!("{name} trusts X-Forwarded-… of clients: a client chooses which path Keyward checks");
        findings.fail(TOPIC, problem, "trustForwardHeader: false");
    }
    check_response_headers(name, forward, findings);
    let sees_all = check_request_headers(name, forward, findings);
    check_name_spellings(name, forward, sees_all, findings);
    check_body_settings(name, forward, findings);
    check_connection(name, forward, findings);
}

/// Checks the headers that Traefik replaces by Keyward's answer or removes.
fn check_response_headers(name: &str, forward: &Value, findings: &mut DoctorReport) {
    let replaced = forward.texts("authResponseHeaders");
    let passes = |wanted: &&str| !replaced.iter().any(|known| known.eq_ignore_ascii_case(wanted));
    let identity: Vec<&str> = IDENTITY_HEADERS.into_iter().filter(passes).collect();
    if !identity.is_empty() {
        let names = identity.join(", ");
        let problem = format!(
            "{name} lets {names} of a client reach the service, which reads them as Keyward's answer"
        );
        findings.fail(TOPIC, problem, format!("add to authResponseHeaders: {names}"));
    }
    let credential: Vec<&str> = ["authorization", "x-api-key"].into_iter().filter(passes).collect();
    if !credential.is_empty() {
        let names = credential.join(", ");
        let problem = format!("{name} forwards the credential to the service: {names}");
        findings.warn(TOPIC, problem, format!("add to authResponseHeaders, except in shadow mode: {names}"));
    }
}

/// Checks the headers that Keyward sees. Returns whether it sees all.
fn check_request_headers(name: &str, forward: &Value, findings: &mut DoctorReport) -> bool {
    let sent = forward.texts("authRequestHeaders");
    if sent.is_empty() {
        return true;
    }
    let sends = |wanted: &str| sent.iter().any(|known| known.eq_ignore_ascii_case(wanted));
    if !sends("authorization") && !sends("x-api-key") {
        let problem = format!("{name} sends Keyward no credential: every request is denied");
        findings.fail(TOPIC, problem, "remove authRequestHeaders");
    } else {
        let problem = format!(
            "{name} sends Keyward only some headers: it cannot reject x-http-method-override and other spellings of names"
        );
        findings.warn(TOPIC, problem, "remove authRequestHeaders");
    }
    false
}

/// Checks the removal of other spellings of Keyward's header names. Keyward answers 400 to those that it sees.
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
    let problem =
        format!("{name} does not remove spellings such as X_Keyward_User, which PHP reads as X-Keyward-User");
    if sees_all {
        findings.warn(TOPIC, format!("{problem}; only Keyward rejects them"), fix);
    } else {
        findings.fail(TOPIC, problem, fix);
    }
}

fn check_body_settings(name: &str, forward: &Value, findings: &mut DoctorReport) {
    let number = |field: &str| forward.field(field).and_then(Value::as_i64);
    if forward.is_true("forwardBody") {
        match number("maxBodySize") {
            Some(max_bytes) if max_bytes >= 0 => {
                let problem = format!("{name} sends bodies to Keyward, which ignores them");
                findings.warn(TOPIC, problem, "remove forwardBody");
            }
            _ => {
                let problem =
                    format!("{name} sends bodies of any length to Keyward: Traefik buffers each in memory");
                findings.fail(TOPIC, problem, "remove forwardBody: Keyward ignores bodies");
            }
        }
    }
    if let Some(max_bytes) =
        number("maxResponseBodySize").filter(|max_bytes| (0..MAX_ANSWER_BYTES).contains(max_bytes))
    {
        let problem =
            format!("{name} accepts answers of {max_bytes} bytes: the description of a denial can be longer");
        findings.warn(TOPIC, problem, format!("maxResponseBodySize: {MAX_ANSWER_BYTES}, or more"));
    }
}

/// Checks that others on the network can neither read tokens nor answer in place of Keyward.
fn check_connection(name: &str, forward: &Value, findings: &mut DoctorReport) {
    let address = forward.text("address");
    let uri: Option<http::Uri> = address.parse().ok();
    let Some((scheme, host)) = uri.as_ref().and_then(|uri| Some((uri.scheme_str()?, uri.host()?))) else {
        return findings.skip(TOPIC, format!("{name}: where its address leads"));
    };
    let ip = host.trim_matches(['[', ']']).parse::<IpAddr>();
    let is_local = host == "localhost" || ip.is_ok_and(|address| address.is_loopback());
    if scheme == "http" && !is_local {
        let problem = format!("{name} asks {host} without TLS: tokens cross the network in plaintext");
        findings.fail(TOPIC, problem, "address: https://…, or Keyward on the same machine");
    }
    if forward.field("tls").is_some_and(|tls| tls.is_true("insecureSkipVerify")) {
        let problem =
            format!("{name} accepts any certificate: another server can answer in place of Keyward");
        findings.fail(TOPIC, problem, "tls: { ca: … } in place of insecureSkipVerify");
    }
}
