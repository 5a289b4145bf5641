//! Checks the locations of an nginx configuration: which ones ask Keyward, which headers they send to a service, and how the
//! location that asks describes the request.

use std::collections::BTreeMap;

use crate::domain::header_name::{IDENTITY_HEADERS, OVERRIDE_HEADERS};

use super::{
    syntax::{NginxDirective, TOPIC, flatten},
    variables::NginxVariables,
};
use crate::doctor::report::DoctorReport;

/// The blocks that inherit from the one around them.
const INHERITING_BLOCKS: [&str; 5] = ["http", "server", "location", "if", "limit_except"];
/// Directives that forward a request with parameters instead of headers.
const NON_HTTP_PASSES: [&str; 3] = ["fastcgi_pass", "uwsgi_pass", "scgi_pass"];

/// The directives that apply in a block, its own and the inherited ones.
#[derive(Clone, Default)]
struct BlockContext<'c> {
    /// The name of the block in findings.
    label: String,
    /// The path of the location around it; empty = none.
    location_path: &'c str,
    /// The target of `auth_request`; empty = none.
    auth_request: &'c str,
    /// The headers of `proxy_set_header`, by lower-case name.
    headers: BTreeMap<String, &'c str>,
    /// The headers of `grpc_set_header`, by lower-case name.
    grpc_headers: BTreeMap<String, &'c str>,
    /// Whether it sets a header, and so inherits none.
    loses_inherited_headers: bool,
    proxy_cache: &'c str,
    satisfy: &'c str,
}

impl<'c> BlockContext<'c> {
    /// The context of a block inside this one.
    fn enter_block(&self, block: &'c [NginxDirective]) -> BlockContext<'c> {
        let last = |name: &str| {
            let found = block.iter().rev().find(|directive| directive.name == name);
            found.map(|directive| directive.argument(0)).map(|value| if value == "off" { "" } else { value })
        };
        // One such directive disables inheritance.
        let headers = |name: &str, inherited: &BTreeMap<String, &'c str>| {
            let own = block.iter().filter(|directive| directive.name == name);
            let own: BTreeMap<_, _> = own
                .map(|directive| (directive.argument(0).to_ascii_lowercase(), directive.argument(1)))
                .collect();
            if own.is_empty() { inherited.clone() } else { own }
        };
        let sets = |name: &str| block.iter().any(|directive| directive.name == name);
        let lost = sets("proxy_set_header") && !self.headers.is_empty()
            || sets("grpc_set_header") && !self.grpc_headers.is_empty();
        BlockContext {
            label: self.label.clone(),
            location_path: self.location_path,
            auth_request: last("auth_request").unwrap_or(self.auth_request),
            headers: headers("proxy_set_header", &self.headers),
            grpc_headers: headers("grpc_set_header", &self.grpc_headers),
            loses_inherited_headers: lost
                || self.loses_inherited_headers && !sets("proxy_set_header") && !sets("grpc_set_header"),
            proxy_cache: last("proxy_cache").unwrap_or(self.proxy_cache),
            satisfy: last("satisfy").unwrap_or(self.satisfy),
        }
    }
}

/// What the checks of a location need to know about the index configuration.
struct LocationIndex<'c> {
    variables: NginxVariables<'c>,
    /// The paths of the locations that ask Keyward.
    keyward_paths: Vec<&'c str>,
    /// The paths of all locations without a pattern.
    literal_paths: Vec<&'c str>,
    /// Whether locations may be missing: a file was not read, or a pattern leads to Keyward.
    is_incomplete: bool,
}

pub(super) fn check_locations(root: &[NginxDirective], findings: &mut DoctorReport) {
    let all = flatten(root);
    let locations: Vec<&NginxDirective> =
        all.iter().copied().filter(|directive| directive.name == "location").collect();
    let asks_keyward = |location: &NginxDirective| {
        let mut passes = location.children().iter().filter(|inside| inside.name == "proxy_pass");
        passes.any(|pass| pass.argument(0).contains("/auth/nginx"))
    };
    let (mut keyward_paths, mut literal_paths) = (Vec::new(), Vec::new());
    let mut is_incomplete = all.iter().any(|directive| directive.name == "include");
    for location in locations {
        let path = location.arguments.last().map_or("", String::as_str);
        let is_pattern = location.argument(0).starts_with('~');
        if asks_keyward(location) {
            keyward_paths.push(path);
            is_incomplete |= is_pattern;
        }
        if !is_pattern {
            literal_paths.push(path);
        }
    }
    let index = LocationIndex {
        variables: NginxVariables::from_directives(&all),
        keyward_paths,
        literal_paths,
        is_incomplete,
    };
    check_block(root, &BlockContext::default(), &index, findings);
}

fn check_block<'c>(
    block: &'c [NginxDirective],
    outer: &BlockContext<'c>,
    index: &LocationIndex<'_>,
    findings: &mut DoctorReport,
) {
    let level = outer.enter_block(block);
    for directive in block {
        match directive.name.as_str() {
            "proxy_pass" if directive.argument(0).contains("/auth/nginx") => {
                check_auth_location(block, &level, findings)
            }
            "proxy_pass" => {
                check_proxy_pass(directive, &level, &level.headers, index, findings);
            }
            "grpc_pass" => check_proxy_pass(directive, &level, &level.grpc_headers, index, findings),
            "rewrite" => check_rewrite(directive, &level, findings),
            name if NON_HTTP_PASSES.contains(&name) => check_non_http_pass(name, &level, findings),
            name if runs_unchecked_code(name) => {
                findings.skip(TOPIC, format!("{}: what {name} does with requests", level.label));
            }
            name if INHERITING_BLOCKS.contains(&name) => {
                let mut level = level.clone();
                if name == "location" || level.label.is_empty() || level.label.starts_with("http ") {
                    let words =
                        [std::slice::from_ref(&directive.name), directive.arguments.as_slice()].concat();
                    level.label = format!("{} (line {})", words.join(" "), directive.line);
                }
                if name == "location" {
                    level.location_path = directive.arguments.last().map_or("", String::as_str);
                }
                check_block(directive.children(), &level, index, findings);
            }
            _ => {}
        }
    }
}

/// Whether a directive runs code that is not checked, or sends the request elsewhere.
fn runs_unchecked_code(name: &str) -> bool {
    let harmless = ["init_", "exit_", "log_", "ssl_"].iter().any(|start| name.starts_with(start));
    name.contains("_by_lua") && !harmless || ["js_content", "perl", "try_files", "mirror"].contains(&name)
}

/// Checks a location that forwards requests by FastCGI, uwsgi or SCGI.
fn check_non_http_pass(name: &str, level: &BlockContext<'_>, findings: &mut DoctorReport) {
    let place = &level.label;
    if level.auth_request.is_empty() {
        let problem = format!("{place} does not ask Keyward: every request reaches its service by {name}");
        findings.warn(TOPIC, problem, "auth_request /keyward; as in deploy/nginx/keyward.conf");
    } else {
        findings.skip(TOPIC, format!("{place}: which HTTP_… parameters {name} sends"));
    }
}

/// Checks for a change of the path after Keyward has checked it. A redirect of the client does not count.
fn check_rewrite(directive: &NginxDirective, level: &BlockContext<'_>, findings: &mut DoctorReport) {
    let target = directive.argument(1);
    let redirects = ["redirect", "permanent"].contains(&directive.argument(2))
        || ["http://", "https://", "$scheme"].iter().any(|start| target.starts_with(start));
    if redirects || level.auth_request.is_empty() && !level.location_path.is_empty() {
        return;
    }
    let place = &level.label;
    let problem =
        format!("{place} has a rewrite to {target}: the service gets another path than Keyward checked");
    findings.warn(TOPIC, problem, "let the service do it, or redirect clients: rewrite … redirect;");
}

/// The headers that pass as the client sends them, or whose value `right` rejects.
fn unprotected_headers<'n>(
    headers: &BTreeMap<String, &str>,
    names: &[&'n str],
    right: impl Fn(&str, &str) -> bool,
) -> Vec<&'n str> {
    let is_right = |name: &str| headers.get(name).is_some_and(|value| right(name, value));
    names.iter().filter(|name| !is_right(name)).copied().collect()
}

/// Checks a location that sends requests to a service.
fn check_proxy_pass(
    pass: &NginxDirective,
    level: &BlockContext<'_>,
    headers: &BTreeMap<String, &str>,
    index: &LocationIndex<'_>,
    findings: &mut DoctorReport,
) {
    let (place, variables) = (&level.label, &index.variables);
    let is_answer =
        |name: &str, value: &str| value.is_empty() || variables.is_auth_response_header(value, name);
    let identity = unprotected_headers(headers, &IDENTITY_HEADERS, is_answer);
    if level.auth_request.is_empty() {
        report_missing_auth_request(place, &identity, findings);
        return;
    }
    // nginx does not check the subrequest to the location that answers.
    if level.auth_request == level.location_path {
        return;
    }
    if !index.keyward_paths.contains(&level.auth_request) {
        report_other_auth_target(level, index, findings);
        return;
    }
    let directive = if pass.name == "grpc_pass" { "grpc_set_header" } else { "proxy_set_header" };
    if !identity.is_empty() {
        report_identity_headers(level, directive, &identity, headers, findings);
    }
    if level.satisfy == "any" {
        let problem =
            format!("{place} has satisfy any: Keyward is not asked if an address or a password is accepted");
        findings.fail(TOPIC, problem, "satisfy all; and a separate location for requests without a key");
    }
    check_other_headers(place, directive, headers, variables, findings);
    if pass.name == "proxy_pass" {
        check_target_path(pass.argument(0), place, variables, findings);
    }
}

fn report_missing_auth_request(place: &str, identity: &[&str], findings: &mut DoctorReport) {
    let fix = "set $keyward_needs \"public=true\"; instead of auth_request off: Keyward then checks path and headers";
    if identity.is_empty() {
        let problem = format!("{place} does not ask Keyward: every request reaches its service");
        findings.warn(TOPIC, problem, fix);
    } else {
        let names = identity.join(", ");
        let problem = format!("{place} does not ask Keyward: {names} of a client reach its service");
        findings.fail(TOPIC, problem, fix);
    }
}

/// Reports an `auth_request` that leads to no location that asks Keyward.
fn report_other_auth_target(
    level: &BlockContext<'_>,
    index: &LocationIndex<'_>,
    findings: &mut DoctorReport,
) {
    let (place, asks) = (&level.label, level.auth_request);
    if index.literal_paths.contains(&asks) {
        findings.skip(TOPIC, format!("{place}: {asks} asks another server than Keyward"));
    } else if index.is_incomplete {
        findings.skip(TOPIC, format!("{place}: which location {asks} leads to"));
    } else {
        let problem =
            format!("{place} asks {asks}, but there is no location of that path: another one answers");
        let fix = format!("location = {asks} {{ … }} as in deploy/nginx/keyward.conf");
        findings.fail(TOPIC, problem, fix);
    }
}

/// Reports identity headers whose value is not Keyward's answer.
fn report_identity_headers(
    level: &BlockContext<'_>,
    directive: &str,
    names: &[&str],
    headers: &BTreeMap<String, &str>,
    findings: &mut DoctorReport,
) {
    let place = &level.label;
    let variable = |name: &str| format!("${}", name.trim_start_matches("x-").replace('-', "_"));
    let (wrong, missing): (Vec<&str>, Vec<&str>) =
        names.iter().copied().partition(|name| headers.contains_key(*name));
    for name in wrong {
        let (variable, answer) = (variable(name), name.replace('-', "_"));
        let problem = format!("{place} sets {name} to {}, which is not Keyward's answer", headers[name]);
        let fix =
            format!("{directive} {name} {variable}; auth_request_set {variable} $upstream_http_{answer};");
        findings.fail(TOPIC, problem, fix);
    }
    if missing.is_empty() {
        return;
    }
    let problem = format!("{place} forwards {} as a client forges them", missing.join(", "));
    let fix = if level.loses_inherited_headers {
        format!("repeat every {directive} here: a location with any {directive} inherits none")
    } else {
        let one = |name: &&str| format!("{directive} {name} {};", variable(name));
        missing.iter().map(one).collect::<Vec<_>>().join(" ")
    };
    findings.fail(TOPIC, problem, fix);
}

/// Checks the headers that are no identity headers: overrides, credentials, Host and Upgrade.
fn check_other_headers(
    place: &str,
    directive: &str,
    headers: &BTreeMap<String, &str>,
    variables: &NginxVariables<'_>,
    findings: &mut DoctorReport,
) {
    let overrides = unprotected_headers(headers, &OVERRIDE_HEADERS, |_, value| variables.is_trusted(value));
    if !overrides.is_empty() {
        let names = overrides.join(", ");
        let problem = format!("{place} sends {names}: they can lead a service around the rules");
        findings.warn(TOPIC, problem, format!("{directive} NAME \"\"; for each of them"));
    }
    let shows = |value: &str| variables.resolve_sources(value).iter().any(|name| name.starts_with("http_"));
    let credentials = unprotected_headers(headers, &["authorization", "x-api-key"], |_, value| !shows(value));
    if !credentials.is_empty() {
        let problem = format!("{place} sends {}: the service sees the credential", credentials.join(", "));
        let fix = format!("{directive} from X-Keyward-Remove, as in deploy/nginx/keyward.conf");
        findings.warn(TOPIC, problem, fix);
    }
    if headers.get("host").is_some_and(|host| variables.is_client_controlled(host)) {
        let problem = format!("{place} sends Host as the client wrote it: Keyward checked the host in $host");
        findings.warn(TOPIC, problem, format!("{directive} Host $host;"));
    }
    check_upgrade(place, directive, headers, variables, findings);
}

/// Checks that a client cannot choose the protocol of an upgrade.
fn check_upgrade(
    place: &str,
    directive: &str,
    headers: &BTreeMap<String, &str>,
    variables: &NginxVariables<'_>,
    findings: &mut DoctorReport,
) {
    let upgrade = headers.get("upgrade").copied().unwrap_or_default();
    if variables.is_client_controlled(upgrade) {
        let problem =
            format!("{place} lets clients choose what to upgrade to: h2c is a tunnel for unchecked requests");
        let fix = format!("{directive} Upgrade $keyward_upgrade; with its map of deploy/nginx/keyward.conf");
        findings.fail(TOPIC, problem, fix);
    } else if !variables.is_trusted(upgrade) {
        findings.skip(TOPIC, format!("{place}: where {upgrade}, its Upgrade, comes from"));
    }
}

/// Checks that the service gets the path that Keyward checked, which needs a `proxy_pass` without a path.
fn check_target_path(target: &str, place: &str, variables: &NginxVariables<'_>, findings: &mut DoctorReport) {
    let (_, rest) = target.split_once("://").unwrap_or(("", target));
    let server = rest.strip_suffix("$request_uri").unwrap_or(rest);
    if server.starts_with("unix:") && !server.contains('$') {
        return;
    }
    if server.contains('/') || variables.is_client_controlled(server) {
        let problem = format!(
            "{place} has a proxy_pass with a path: the service gets another path than Keyward checked"
        );
        findings.warn(TOPIC, problem, "proxy_pass without a path, not even /");
    } else if server.contains('$') {
        findings.skip(TOPIC, format!("{place}: whether {target} has a path"));
    }
}

/// Checks the location that asks Keyward.
fn check_auth_location(block: &[NginxDirective], level: &BlockContext<'_>, findings: &mut DoctorReport) {
    let place = &level.label;
    for (name, right) in [
        ("X-Original-Method", "$request_method"),
        ("X-Original-Host", "$host"),
        ("X-Original-URI", "$request_uri"),
    ] {
        let problem = match level.headers.get(&name.to_ascii_lowercase()).copied() {
            Some(value) if value.replace(['{', '}'], "") == right => continue,
            Some(value) => format!(
                "{place} sets {name} to {value}: Keyward checks another request than the service gets"
            ),
            None => format!("{place} does not set {name}: a client can, and so chooses what Keyward checks"),
        };
        findings.fail(TOPIC, problem, format!("proxy_set_header {name} {right};"));
    }
    let forwarded = level.headers.get("x-forwarded-for").copied().unwrap_or_default();
    if !["$proxy_add_x_forwarded_for", "$remote_addr"].contains(&forwarded) {
        let problem = format!("{place} does not set X-Forwarded-For: a client can forge its address");
        findings.warn(TOPIC, problem, "proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for;");
    }
    let says = |name: &str, value: &str| {
        block.iter().any(|directive| directive.name == name && directive.argument(0) == value)
    };
    if !says("internal", "") {
        findings.warn(
            TOPIC,
            format!("{place} is not internal: clients can ask Keyward about tokens"),
            "internal;",
        );
    }
    if !says("proxy_pass_request_body", "off") {
        let problem = format!("{place} sends bodies to Keyward, which ignores them");
        findings.warn(TOPIC, problem, "proxy_pass_request_body off; proxy_set_header Content-Length \"\";");
    }
    if !level.proxy_cache.is_empty() {
        let problem = format!("{place} caches answers: revoked keys pass until the answers expire");
        findings.fail(TOPIC, problem, "proxy_cache off;");
    }
}
