//! Checks whether an nginx configuration asks Keyward in a way that lets no request pass unchecked. Pure: it contacts no server.
//!
//! It reads one file, or the output of `nginx -T`. Other files are not read; the findings name them. `docs/gateway.md` and
//! `deploy/nginx/keyward.conf` explain each finding.

mod config_dump;
mod locations;
mod syntax;
mod variables;

use super::report::DoctorReport;
use syntax::{NginxDirective, flatten};

pub(super) use syntax::TOPIC;

/// Checks the output of `nginx -T`, a whole `nginx.conf`, or a part as in `conf.d`.
pub(super) fn check_configuration(name: &str, text: &str, findings: &mut DoctorReport) {
    let root = match config_dump::parse_dump(text) {
        Ok(root) => root,
        Err(problem) => {
            findings.fail(TOPIC, format!("{name} is not an nginx configuration: {problem}"), "nginx -t");
            return;
        }
    };
    let all = flatten(&root);
    let before = findings.iter().count();
    for include in all.iter().filter(|directive| directive.name == "include") {
        let file = format!("{}, which {name} includes in line {}", include.argument(0), include.line);
        findings.skip(TOPIC, format!("{file}: name the output of nginx -T, which has all files"));
    }
    if !all.iter().any(|directive| directive.name == "auth_request" && directive.argument(0) != "off") {
        let fix = "auth_request /keyward; as in deploy/nginx/keyward.conf";
        findings.fail(TOPIC, format!("{name} does not ask Keyward: it has no auth_request"), fix);
        return;
    }
    check_name_normalization(&all, findings);
    check_error_pages(&all, findings);
    locations::check_locations(&root, findings);
    // What was not checked may be wrong, so only a configuration without any finding is good.
    if findings.iter().count() == before {
        let state = "every location asks Keyward, and no header of a client passes as its answer";
        findings.pass(TOPIC, format!("{name}: {state}"));
    }
}

/// Checks settings by which names and paths reach services that read them differently.
fn check_name_normalization(all: &[&NginxDirective], findings: &mut DoctorReport) {
    let line = |name: &str, value: &str| {
        let found = all.iter().find(|directive| directive.name == name && directive.argument(0) == value);
        found.map(|directive| directive.line)
    };
    for (name, value, header) in [
        ("underscores_in_headers", "on", "X_Keyward_User"),
        ("ignore_invalid_headers", "off", "X.Keyward.User"),
    ] {
        if let Some(line) = line(name, value) {
            let problem = format!(
                "{name} is {value} (line {line}): {header} passes, which many services read as X-Keyward-User"
            );
            findings.fail(TOPIC, problem, format!("remove {name}: by default nginx drops such headers"));
        }
    }
    if let Some(line) = line("merge_slashes", "off") {
        let problem = format!("merge_slashes is off (line {line}): //a matches another location than /a");
        findings.warn(TOPIC, problem, "merge_slashes on");
    }
}

/// Checks for an error page: `auth_request` turns an outage of Keyward into a 500, which looks like a fault of the service.
fn check_error_pages(all: &[&NginxDirective], findings: &mut DoctorReport) {
    let mut pages = all.iter().filter(|directive| directive.name == "error_page");
    if !pages.any(|page| page.arguments.iter().any(|argument| argument == "500")) {
        let problem = "no error_page for 500: an outage of Keyward looks like a fault of the service";
        findings.warn(
            TOPIC,
            problem,
            "error_page 500 = @keyward_unavailable; as in deploy/nginx/keyward.conf",
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHIPPED: &str = include_str!("../../deploy/nginx/keyward.conf");

    const GOOD: &str =
        "ok n.conf: every location asks Keyward, and no header of a client passes as its answer";

    /// What is found of a configuration.
    fn finding_messages(text: &str) -> Vec<String> {
        let mut findings = DoctorReport::default();
        check_configuration("n.conf", text, &mut findings);
        findings.lines()
    }

    /// The shipped configuration with one change, which must be possible.
    fn changed(before: &str, after: &str) -> String {
        assert!(SHIPPED.contains(before), "{before}");
        SHIPPED.replacen(before, after, 1)
    }

    #[test]
    fn the_configuration_that_comes_with_keyward_has_no_trap() {
        assert_eq!(finding_messages(SHIPPED), [GOOD]);
        assert_eq!(finding_messages(&format!("events {{}} http {{ {SHIPPED} }}")), [GOOD]);
        let dump = format!(
            "# configuration file /etc/nginx/nginx.conf:\nhttp {{ include conf.d/*.conf; }}\n\n\
             # configuration file /etc/nginx/conf.d/keyward.conf:\n{SHIPPED}\n"
        );
        assert_eq!(finding_messages(&dump), [GOOD]);
    }

    #[test]
    fn nothing_is_good_while_something_is_not_looked_at() {
        for text in [
            "server { error_page 500 /e; auth_request /keyward; location ~ \\.php$ { fastcgi_pass unix:/a; } }",
            &changed("server_name _;", "include more/*.conf;"),
            &changed("proxy_pass http://service;", "fastcgi_pass unix:/run/php.sock;"),
            &changed("proxy_pass http://service;", "content_by_lua_block { ngx.say('}') }"),
            &changed("proxy_pass http://service;", "proxy_pass http://$backend;"),
        ] {
            let found = finding_messages(text);
            let unseen = found.iter().all(|found| found.starts_with("not looked at "));
            assert!(unseen && !found.is_empty(), "{found:?}");
        }
    }

    #[test]
    fn what_a_client_chooses_is_no_answer_in_any_spelling() {
        let user = "X-Keyward-User $keyward_user";
        let set = "auth_request_set $keyward_user $upstream_http_x_keyward_user;";
        let pass = "proxy_pass http://service;";
        let wrong = "sets x-keyward-user to";
        for (before, after, problem) in [
            (user, "X-Keyward-User ${http_x_keyward_user}", wrong),
            (user, "X-Keyward-User $arg_user", wrong),
            (user, "X-Keyward-User $http_x_user", wrong),
            (user, "X-Keyward-User root", wrong),
            (user, "X-Keyward-User $keyward_account", wrong),
            (set, "auth_request_set $keyward_user $http_x_keyward_user;", wrong),
            (set, "set $keyward_user $http_x_keyward_user;", wrong),
            ("location = /health", "location ~ ^/(?<keyward_user>h)$", wrong),
            ("X-Original-Url \"\"", "X-Original-Url $http_x_original_uri", "sends x-original-url"),
            ("Authorization $keyward_authorization", "Authorization ${http_authorization}", "the credential"),
            ("# Every location is asked", "satisfy any; allow 10.0.0.0/8;\n# Every", "satisfy any"),
            ("Upgrade $keyward_upgrade", "Upgrade $http_upgrade", "choose what to upgrade to"),
            (pass, "rewrite ^/monitors/(.*)$ /$1 break; proxy_pass http://service;", "has a rewrite"),
            (pass, "proxy_pass http://service$1;", "proxy_pass with a path"),
            (pass, "proxy_pass http://service/$request_uri;", "proxy_pass with a path"),
            ("location = /keyward {", "location = /asks {", "there is no location of that path"),
        ] {
            let found = finding_messages(&changed(before, after));
            assert!(found.iter().any(|found| found.contains(problem)), "{after}: {found:?}");
            assert!(!found.contains(&GOOD.to_owned()), "{after}");
        }
        for (before, after) in [
            (user, "X-Keyward-User ${keyward_user}"),
            (user, "X-Keyward-User \"\""),
            (pass, "proxy_pass http://service$request_uri;"),
            (pass, "rewrite ^/old$ /new permanent; proxy_pass http://service;"),
            ("X-Forwarded-Host \"\"", "X-Forwarded-Host $host"),
        ] {
            assert_eq!(finding_messages(&changed(before, after)), [GOOD], "{after}");
        }
    }

    #[test]
    fn a_server_that_lacks_a_header_sets_it_and_a_location_that_inherits_none_repeats_them() {
        let fixes = |text: &str| {
            let mut findings = DoctorReport::default();
            check_configuration("n.conf", text, &mut findings);
            findings.iter().map(|found| found.fix.clone()).collect::<Vec<_>>()
        };
        let lacking = fixes(&changed("proxy_set_header X-Keyward-User $keyward_user;", ""));
        let right = "proxy_set_header x-keyward-user $keyward_user;";
        assert!(!lacking.is_empty() && lacking.iter().all(|fix| fix == right), "{lacking:?}");
        let own = "location /other { proxy_set_header Host $host; proxy_pass http://service; } location / {";
        let own = fixes(&changed("location / {", own));
        assert!(own[0].starts_with("repeat every proxy_set_header here"), "{own:?}");
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
            let found = finding_messages(&changed(before, after));
            let right = if problem.is_empty() {
                found == [GOOD]
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
            let found = finding_messages(&changed(before, after));
            assert!(found.iter().any(|found| found.starts_with(problem)), "{problem}: {found:?}");
        }
    }

    #[test]
    fn a_file_that_asks_nobody_or_cannot_be_read_fails() {
        assert!(
            finding_messages("server { location / { proxy_pass http://a; } }")[0]
                .contains("does not ask Keyward")
        );
        assert!(finding_messages("server { auth_request off; }")[0].contains("does not ask Keyward"));
        assert!(
            finding_messages("server {")[0].starts_with("fail n.conf is not an nginx configuration: line 1")
        );
    }

    #[test]
    fn who_else_is_asked_is_not_judged() {
        let text = "server { error_page 500 /e; auth_request /sso; location = /sso { internal; \
                    proxy_pass http://sso/check; } location / { proxy_pass http://a; } }";
        let found = finding_messages(text);
        assert_eq!(found.len(), 1, "{found:?}");
        assert!(found[0].starts_with("not looked at location / (line 1)"), "{found:?}");
    }
}
