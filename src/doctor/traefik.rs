//! Checks whether a dynamic configuration of Traefik asks Keyward in a way that lets no request pass unchecked. Pure: it
//! contacts no server.
//!
//! It reads one file of the file provider, or `Middleware` and `IngressRoute` resources of Kubernetes. Other
//! providers and the static configuration are not checked. `docs/gateway.md` and `deploy/traefik/keyward.yaml` explain each
//! finding.

mod config;
mod forward_auth;

use crate::domain::header_name::{self, IDENTITY_HEADERS, OVERRIDE_HEADERS};

use super::report::DoctorReport;
use config::{TraefikConfig, TraefikMiddleware, TraefikRouter};

pub(super) use config::TOPIC;

/// The middlewares that change the path.
const REWRITES: [&str; 5] =
    ["addPrefix", "replacePath", "replacePathRegex", "stripPrefix", "stripPrefixRegex"];

/// Checks a dynamic configuration: TOML if the file name ends in `.toml`, otherwise YAML.
pub(super) fn check_configuration(name: &str, text: &str, findings: &mut DoctorReport) {
    let configuration = match TraefikConfig::parse(name, text) {
        Ok(configuration) => configuration,
        Err(problem) => {
            let problem = format!("{name} is not a Traefik configuration: {problem}");
            return findings.fail(TOPIC, problem, "correct it; templates are not supported");
        }
    };
    let before = findings.iter().count();
    let mut asking = configuration.middlewares().filter_map(|(name, middleware)| {
        Some((name, middleware.forward_auth().filter(|forward| forward_auth::asks_keyward(forward))?))
    });
    let Some(first) = asking.next() else {
        let fix = "forwardAuth with address: http://…/auth/traefik, as in deploy/traefik/keyward.yaml";
        return findings.fail(TOPIC, format!("{name} does not ask Keyward: it has no such forwardAuth"), fix);
    };
    for (name, forward) in std::iter::once(first).chain(asking) {
        forward_auth::check_forward_auth(name, forward, findings);
    }
    for router in configuration.routers() {
        check_router(router, &configuration, findings);
    }
    if configuration.routers().is_empty() {
        findings.skip(TOPIC, format!("which routers use it: {name} has no routers"));
    }
    if let Some(kind) = configuration.other_routers() {
        findings.skip(TOPIC, format!("the {kind} routers of {name}, which cannot ask Keyward"));
    }
    // What was not checked may be wrong, so only a configuration without any finding is good.
    if findings.iter().count() == before {
        let state = "every router asks Keyward, and no header of a client passes as its answer";
        findings.pass(TOPIC, format!("{name}: {state}"));
    }
}

fn check_router(router: &TraefikRouter, configuration: &TraefikConfig, findings: &mut DoctorReport) {
    // Services of Traefik itself, such as the dashboard.
    if router.service.ends_with("@internal") {
        return;
    }
    let all = configuration.resolve(&router.middlewares);
    let place = &router.place;
    for name in all.iter().filter(|(_, middleware)| middleware.is_none()).map(|(name, _)| name) {
        findings.skip(TOPIC, format!("{place}: the middleware {name}, which the file does not have"));
    }
    let known: Vec<TraefikMiddleware<'_>> = all.iter().filter_map(|(_, middleware)| *middleware).collect();
    let asks = known.iter().position(|one| one.forward_auth().is_some_and(forward_auth::asks_keyward));
    match asks {
        Some(at) => check_later_middlewares(place, &known, at, findings),
        // A middleware that is not in the file may ask Keyward.
        None if known.len() < all.len() => {}
        None if known.iter().any(|one| one.forward_auth().is_some()) => {
            findings.skip(TOPIC, format!("{place}: its forwardAuth asks another server than Keyward"));
        }
        None => report_unasked_router(place, &known, findings),
    }
}

/// Whether one of these middlewares removes a request header.
fn removes_header(middlewares: &[TraefikMiddleware<'_>], name: &str) -> bool {
    middlewares
        .iter()
        .flat_map(TraefikMiddleware::request_headers)
        .any(|(known, value)| value.is_empty() && known.eq_ignore_ascii_case(name))
}

fn report_unasked_router(place: &str, middlewares: &[TraefikMiddleware<'_>], findings: &mut DoctorReport) {
    let fix = "give it a forwardAuth with ?public=true: Keyward then checks path and headers";
    let identity: Vec<&str> =
        IDENTITY_HEADERS.into_iter().filter(|name| !removes_header(middlewares, name)).collect();
    if identity.is_empty() {
        let problem = format!("{place} does not ask Keyward: every request reaches its service");
        findings.warn(TOPIC, problem, fix);
    } else {
        let names = identity.join(", ");
        let problem = format!("{place} does not ask Keyward: {names} of a client reach its service");
        findings.fail(TOPIC, problem, fix);
    }
}

/// Checks the middlewares that follow Keyward, which is at index `at`.
fn check_later_middlewares(
    place: &str,
    middlewares: &[TraefikMiddleware<'_>],
    at: usize,
    findings: &mut DoctorReport,
) {
    let left: Vec<&str> =
        OVERRIDE_HEADERS.into_iter().filter(|name| !removes_header(middlewares, name)).collect();
    if !left.is_empty() {
        let names = left.join(", ");
        let problem = format!(
            "{place} sends {names} of a client to its service, which may read the request differently than \
             Keyward"
        );
        let fix = "a headers middleware with customRequestHeaders that sets them to \"\", as keyward-clean in \
                   deploy/traefik/keyward.yaml";
        findings.warn(TOPIC, problem, fix);
    }
    for middleware in &middlewares[at + 1..] {
        for (name, _) in middleware
            .request_headers()
            .filter(|(name, value)| !value.is_empty() && header_name::has_keyward_prefix(name.as_bytes()))
        {
            let problem = format!("{place} sets {name}: the service reads it as Keyward's answer");
            findings.warn(TOPIC, problem, format!("remove {name} from customRequestHeaders"));
        }
        if let Some(kind) = REWRITES.into_iter().find(|kind| middleware.is(kind)) {
            let problem = format!(
                "{place} has {kind} after Keyward: the service gets another path than Keyward checked"
            );
            findings.warn(TOPIC, problem, format!("put {kind} before the middleware that asks Keyward"));
        }
        if middleware.is("plugin") {
            findings.skip(TOPIC, format!("{place}: what its plugin does with requests"));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHIPPED: &str = include_str!("../../deploy/traefik/keyward.yaml");

    const GOOD: &str = "ok t.yaml: every router asks Keyward, and no header of a client passes as its answer";

    fn found(text: &str) -> Vec<String> {
        let mut findings = DoctorReport::default();
        check_configuration("t.yaml", text, &mut findings);
        findings.lines()
    }

    /// The shipped configuration with one change, which must be possible.
    fn changed(before: &str, after: &str) -> String {
        assert!(SHIPPED.contains(before), "{before}");
        SHIPPED.replacen(before, after, 1)
    }

    #[test]
    fn the_configuration_that_comes_with_keyward_has_no_trap() {
        assert_eq!(found(SHIPPED), [GOOD]);
    }

    #[test]
    fn the_same_in_toml_and_as_resources_of_kubernetes_is_read() {
        let value: toml::Value = serde_saphyr::from_str(SHIPPED).unwrap();
        let mut findings = DoctorReport::default();
        check_configuration("t.toml", &toml::to_string(&value).unwrap(), &mut findings);
        assert_eq!(findings.lines(), [GOOD.replace("t.yaml", "t.toml")]);

        let whole: serde_json::Value = serde_saphyr::from_str(SHIPPED).unwrap();
        let middleware = |name: &str| {
            let spec = &whole["http"]["middlewares"][name];
            serde_json::json!({ "kind": "Middleware", "metadata": { "name": name }, "spec": spec })
                .to_string()
        };
        let route = |middlewares: &str| {
            format!(
                "kind: IngressRoute\nmetadata: {{ name: api }}\nspec: {{ routes: [ {{ kind: Rule, match: a, \
                 services: [ {{ name: service }} ], middlewares: [ {middlewares} ] }} ] }}"
            )
        };
        let all = |middlewares: &str| {
            [middleware("keyward"), middleware("keyward-clean"), route(middlewares)].join("\n---\n")
        };
        assert_eq!(found(&all("{ name: keyward }, { name: keyward-clean }")), [GOOD]);
        let open = found(&all("{ name: keyward-clean }"));
        assert!(open[0].starts_with("fail IngressRoute api does not ask Keyward"), "{open:?}");
    }

    #[test]
    fn each_trap_is_found_and_nothing_else_with_it() {
        let forward = "address: http://127.0.0.1:50053/auth/traefik\n";
        let with = |more: &str| format!("{forward}        {more}\n");
        let router = "middlewares: [keyward, keyward-clean]";
        for (before, after, problem) in [
            ("trustForwardHeader: false", "trustForwardHeader: true", "fail keyward-monitors trusts"),
            (forward, &*with("authRequestHeaders: [Cookie]"), "fail keyward sends Keyward no credential"),
            (forward, &*with("authRequestHeaders: [Authorization]"), "warn keyward sends Keyward only some"),
            (forward, &*with("forwardBody: true"), "fail keyward sends bodies of any length"),
            (
                forward,
                &*with("{ forwardBody: true, maxBodySize: 1024 }")
                    .replace("{ ", "")
                    .replace(" }", "")
                    .replace(", ", "\n        "),
                "warn keyward sends bodies",
            ),
            (forward, &*with("maxResponseBodySize: 100"), "warn keyward accepts answers of 100 bytes"),
            (forward, &*with("tls: { insecureSkipVerify: true }"), "fail keyward accepts any certificate"),
            (
                "http://127.0.0.1:50053/auth/traefik\n",
                "http://keyward:50053/auth/traefik\n",
                "fail keyward asks keyward",
            ),
            (router, "middlewares: [keyward-clean]", "fail router other does not ask Keyward"),
            (
                router,
                "middlewares: [keyward, keyward-clean, path]",
                "not looked at router other: the middleware path",
            ),
            (router, "middlewares: [keyward]", "warn router other sends x-http-method-override"),
            ("X-Rewrite-Url: \"\"", "X-Rewrite-Url: x", ""),
            ("- X-Keyward-User\n", "", ""),
            ("- X-Api-Key\n", "", ""),
            ("\"[^A-Za-z0-9-]\"", "\"[.]\"", ""),
        ] {
            let found = found(&changed(before, after));
            if problem.is_empty() {
                // The two routers, or the two middlewares, share it.
                assert!(found.len() == 2 && !found.contains(&GOOD.to_owned()), "{after}: {found:?}");
            } else {
                assert!(found.len() == 1 && found[0].starts_with(problem), "{after}: {found:?}");
            }
        }
    }

    #[test]
    fn what_comes_behind_keyward_is_looked_at() {
        let with = |kind: &str, order: &str| {
            let text = changed("middlewares: [keyward, keyward-clean]", order);
            text.replacen("    keyward-clean:\n", &format!("    more: {{ {kind} }}\n    keyward-clean:\n"), 1)
        };
        let behind = "middlewares: [keyward, keyward-clean, more]";
        for (kind, problem) in [
            ("stripPrefix: { prefixes: [/v1] }", "warn router other has stripPrefix after Keyward"),
            (
                "headers: { customRequestHeaders: { X-Keyward-User: root } }",
                "warn router other sets X-Keyward-User",
            ),
            ("plugin: { odd: {} }", "not looked at router other: what its plugin does"),
        ] {
            let found = found(&with(kind, behind));
            assert!(found.len() == 1 && found[0].starts_with(problem), "{kind}: {found:?}");
        }
        let before = with("replacePath: { path: /a }", "middlewares: [more, keyward, keyward-clean]");
        assert_eq!(found(&before), [GOOD], "Keyward judges the path that the service gets");
        let chain = with("chain: { middlewares: [keyward, keyward-clean] }", "middlewares: [more@file]");
        assert_eq!(found(&chain), [GOOD]);
        let circle = with("chain: { middlewares: [more] }", "middlewares: [more]");
        assert!(found(&circle)[0].starts_with("not looked at router other"), "{:?}", found(&circle));
    }

    #[test]
    fn a_file_that_asks_nobody_or_cannot_be_read_fails() {
        assert!(found("http: { routers: {} }")[0].contains("does not ask Keyward"));
        assert!(found("http: [")[0].starts_with("fail t.yaml is not a Traefik configuration"));
        let other = "http: { middlewares: { sso: { forwardAuth: { address: \"http://sso/check\" } } } }";
        assert!(found(other)[0].contains("does not ask Keyward"));
    }
}
