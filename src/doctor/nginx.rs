//! Checks an nginx configuration that asks Keyward for traps that let requests pass unjudged. Pure: nothing is asked.
//!
//! It reads one file. Files that it includes are not followed, and the findings name them. `docs/gateway.md` and
//! `deploy/nginx/keyward.conf` explain each trap.

mod config;
mod locations;

use super::Findings;
use config::Directive;

pub(super) const ABOUT: &str = "nginx";

/// Looks at a configuration: a whole `nginx.conf`, or a part of one such as `conf.d` holds.
pub(super) fn examine(name: &str, text: &str, findings: &mut Findings) {
    let root = match config::parse(text) {
        Ok(root) => root,
        Err(problem) => {
            findings.fail(ABOUT, format!("{name} is no nginx configuration: {problem}"), "nginx -t");
            return;
        }
    };
    let all = flat(&root);
    for include in all.iter().filter(|directive| directive.name == "include") {
        let file = format!("{}, which {name} includes in line {}", include.argument(0), include.line);
        findings.unseen(ABOUT, format!("{file}: nginx -T writes all files into one"));
    }
    if !all.iter().any(|directive| directive.name == "auth_request" && directive.argument(0) != "off") {
        let fix = "auth_request /keyward; as in deploy/nginx/keyward.conf";
        findings.fail(ABOUT, format!("{name} asks nobody: it has no auth_request"), fix);
        return;
    }
    let before = findings.grave();
    spellings(&all, findings);
    errors(&all, findings);
    locations::examine(&root, findings);
    if findings.grave() == before {
        let state = "asks Keyward for every location, and lets no header of a client pass for an answer";
        findings.good(ABOUT, format!("{name}: {state}"));
    }
}

/// Every directive at any depth.
fn flat(block: &[Directive]) -> Vec<&Directive> {
    block.iter().flat_map(|directive| std::iter::once(directive).chain(flat(directive.inside()))).collect()
}

/// Whether names and paths that services read otherwise reach them.
fn spellings(all: &[&Directive], findings: &mut Findings) {
    let line = |name: &str, value: &str| {
        let found = all.iter().find(|directive| directive.name == name && directive.argument(0) == value);
        found.map(|directive| directive.line)
    };
    for (name, value, lets) in [
        ("underscores_in_headers", "on", "X_Keyward_User"),
        ("ignore_invalid_headers", "off", "X.Keyward.User"),
    ] {
        if let Some(line) = line(name, value) {
            let problem = format!(
                "{name} is {value} (line {line}): {lets} passes, which many services take for X-Keyward-User"
            );
            findings.fail(ABOUT, problem, format!("take {name} away: nginx's default drops such headers"));
        }
    }
    if let Some(line) = line("merge_slashes", "off") {
        let problem = format!("merge_slashes is off (line {line}): //a meets another location than /a");
        findings.warn(ABOUT, problem, "merge_slashes on");
    }
}

/// An outage of Keyward is a 500 to `auth_request`, which clients take for a fault of the service.
fn errors(all: &[&Directive], findings: &mut Findings) {
    let mut pages = all.iter().filter(|directive| directive.name == "error_page");
    if !pages.any(|page| page.arguments.iter().any(|argument| argument == "500")) {
        let problem = "no error_page for 500: an outage of Keyward looks like a fault of the service";
        findings.warn(
            ABOUT,
            problem,
            "error_page 500 = @keyward_unavailable; as in deploy/nginx/keyward.conf",
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHIPPED: &str = include_str!("../../deploy/nginx/keyward.conf");

    /// What is found of a configuration, but for what is good.
    fn found(text: &str) -> Vec<String> {
        let mut findings = Findings::default();
        examine("n.conf", text, &mut findings);
        let grave = findings.iter().filter(|found| found.level != crate::doctor::Level::Good);
        grave.map(|found| format!("{} {}", found.level.as_str(), found.said)).collect()
    }

    #[test]
    fn the_configuration_that_comes_with_keyward_has_no_trap() {
        assert_eq!(found(SHIPPED), Vec::<String>::new());
        assert_eq!(found(&format!("events {{}} http {{ {SHIPPED} }}")), Vec::<String>::new());
    }

    #[test]
    fn each_trap_is_found_and_nothing_else_with_it() {
        let own_headers =
            "location /other { proxy_set_header Host $host; proxy_pass http://service; } location / {";
        for (before, after, problem) in [
            ("underscores_in_headers off", "underscores_in_headers on", "fail underscores_in_headers is on"),
            ("ignore_invalid_headers on", "ignore_invalid_headers off", "fail ignore_invalid_headers is off"),
            ("merge_slashes on", "merge_slashes off", "warn merge_slashes is off"),
            ("error_page 500 = @keyward_unavailable;", "", "warn no error_page for 500"),
            ("server_name _;", "include more/*.conf;", "not looked at more/*.conf, which n.conf includes"),
            ("location = /health {", "location = /health { auth_request off;", "warn location = /health"),
            (
                "location = /health {",
                "location = /open { auth_request off; return 204; } location = /health {",
                "",
            ),
            ("proxy_set_header X-Original-Method $request_method;", "", "fail location = /keyward"),
            ("X-Original-URI $request_uri", "X-Original-URI $uri", "fail location = /keyward"),
            ("X-Original-Host $host", "X-Original-Host $http_x_original_host", "fail location = /keyward"),
            ("internal;", "", "warn location = /keyward"),
            ("proxy_pass_request_body off;", "", "warn location = /keyward"),
            ("proxy_cache off;", "proxy_cache answers;", "fail location = /keyward"),
            ("proxy_set_header Host keyward;\n", "", ""),
        ] {
            assert!(SHIPPED.contains(before), "{before}");
            let found = found(&SHIPPED.replacen(before, after, 1));
            let right = if problem.is_empty() {
                found.is_empty()
            } else {
                found.len() == 1 && found[0].starts_with(problem)
            };
            assert!(right, "{after} {problem}: {found:?}");
        }
        // Each location that passes on suffers from what the server lacks.
        for (before, after, problem) in [
            ("proxy_set_header X-Keyward-User $keyward_user;", "", "fail location / (line"),
            ("X-Keyward-User $keyward_user", "X-Keyward-User $http_x_keyward_user", "fail location / (line"),
            ("proxy_set_header X-Rewrite-Url \"\";", "", "warn location / (line"),
            ("proxy_set_header Authorization $keyward_authorization;", "", "warn location / (line"),
            ("proxy_set_header Host $host;", "proxy_set_header Host $http_host;", "warn location / (line"),
            ("location / {", own_headers, "fail location /other (line"),
            (
                "proxy_pass http://service;",
                "proxy_pass http://service/v1/;",
                "warn location ~ ^/monitors(/|$) (line",
            ),
            (
                "proxy_pass http://service;",
                "fastcgi_pass unix:/run/php.sock;",
                "not looked at location ~ ^/monitors",
            ),
        ] {
            assert!(SHIPPED.contains(before), "{before}");
            let found = found(&SHIPPED.replacen(before, after, 1));
            assert!(found.iter().any(|found| found.starts_with(problem)), "{problem}: {found:?}");
        }
    }

    #[test]
    fn a_file_that_asks_nobody_or_cannot_be_read_fails() {
        assert!(found("server { location / { proxy_pass http://a; } }")[0].contains("asks nobody"));
        assert!(found("server { auth_request off; }")[0].contains("asks nobody"));
        assert!(found("server {")[0].starts_with("fail n.conf is no nginx configuration: line 1"));
    }

    #[test]
    fn who_else_is_asked_is_not_judged() {
        let text = "server { error_page 500 /e; auth_request /sso; location = /sso { internal; \
                    proxy_pass http://sso/check; } location / { proxy_pass http://a; } }";
        let found = found(text);
        assert_eq!(found.len(), 1, "{found:?}");
        assert!(found[0].starts_with("not looked at location / (line 1)"), "{found:?}");
    }
}
