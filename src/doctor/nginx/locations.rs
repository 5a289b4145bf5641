//! The locations of nginx: which of them ask Keyward, which headers they send to a service, and how the location that
//! asks describes the request.

use std::collections::BTreeMap;

use crate::domain::header_name::{IDENTITY, OVERRIDES};

use super::{ABOUT, Directive, Findings};

/// The blocks that inherit from the one around them.
const LEVELS: [&str; 5] = ["http", "server", "location", "if", "limit_except"];
/// Ways to pass a request on that send other parameters than headers.
const OTHER_PASSES: [&str; 3] = ["fastcgi_pass", "uwsgi_pass", "scgi_pass"];

/// What holds at a level, its own directives and the inherited ones.
#[derive(Clone, Default)]
struct Level<'c> {
    /// What to call it in a finding.
    place: String,
    /// The path of its location; empty = none.
    path: &'c str,
    /// The path that `auth_request` asks; empty = none.
    asks: &'c str,
    /// The headers that are set for what it passes on, by name in lower case.
    headers: BTreeMap<String, &'c str>,
    /// The same of `grpc_set_header`.
    grpc_headers: BTreeMap<String, &'c str>,
    cache: &'c str,
}

impl<'c> Level<'c> {
    /// The level of a block inside this one.
    fn enter(&self, block: &'c [Directive]) -> Level<'c> {
        let last = |name: &str| {
            let found = block.iter().rev().find(|directive| directive.name == name);
            found.map(|directive| directive.argument(0)).map(|value| if value == "off" { "" } else { value })
        };
        // One such directive, and nothing is inherited.
        let headers = |name: &str, inherited: &BTreeMap<String, &'c str>| {
            let own = block.iter().filter(|directive| directive.name == name);
            let own: BTreeMap<_, _> = own
                .map(|directive| (directive.argument(0).to_ascii_lowercase(), directive.argument(1)))
                .collect();
            if own.is_empty() { inherited.clone() } else { own }
        };
        Level {
            place: self.place.clone(),
            path: self.path,
            asks: last("auth_request").unwrap_or(self.asks),
            headers: headers("proxy_set_header", &self.headers),
            grpc_headers: headers("grpc_set_header", &self.grpc_headers),
            cache: last("proxy_cache").unwrap_or(self.cache),
        }
    }
}

/// Looks at every location.
pub(super) fn examine(root: &[Directive], findings: &mut Findings) {
    // Where Keyward is asked; another's answer says nothing of these headers.
    let all = super::flat(root);
    let asks_keyward = |directive: &&&Directive| {
        directive
            .inside()
            .iter()
            .any(|inside| inside.name == "proxy_pass" && inside.argument(0).contains("/auth/nginx"))
    };
    let locations = all.iter().filter(|directive| directive.name == "location");
    let keyward: Vec<&str> = locations
        .filter(asks_keyward)
        .filter_map(|location| location.arguments.last())
        .map(String::as_str)
        .collect();
    walk(root, &Level::default(), &keyward, findings);
}

fn walk<'c>(block: &'c [Directive], around: &Level<'c>, keyward: &[&str], findings: &mut Findings) {
    let level = around.enter(block);
    for directive in block {
        match directive.name.as_str() {
            "proxy_pass" if directive.argument(0).contains("/auth/nginx") => {
                question(block, &level, findings)
            }
            "proxy_pass" => {
                passes_on(directive, &level, &level.headers, keyward, findings);
            }
            "grpc_pass" => passes_on(directive, &level, &level.grpc_headers, keyward, findings),
            name if OTHER_PASSES.contains(&name) => {
                let problem = format!("{}: which HTTP_… parameters {name} sends", level.place);
                findings.unseen(ABOUT, problem);
            }
            name if LEVELS.contains(&name) => {
                let mut level = level.clone();
                if name == "location" || level.place.is_empty() {
                    let words =
                        [std::slice::from_ref(&directive.name), directive.arguments.as_slice()].concat();
                    level.place = format!("{} (line {})", words.join(" "), directive.line);
                }
                if name == "location" {
                    level.path = directive.arguments.last().map_or("", String::as_str);
                }
                walk(directive.inside(), &level, keyward, findings);
            }
            _ => {}
        }
    }
}

/// Whether a header is set to something that is not the client's own header of this name.
fn is_set(headers: &BTreeMap<String, &str>, name: &str) -> bool {
    let own = format!("$http_{}", name.replace('-', "_"));
    headers.get(name).is_some_and(|value| !value.contains(&own))
}

/// The names that would pass as the client sends them.
fn unset<'n>(headers: &BTreeMap<String, &str>, names: &[&'n str]) -> Vec<&'n str> {
    names.iter().filter(|name| !is_set(headers, name)).copied().collect()
}

/// A place that sends requests to a service.
fn passes_on(
    pass: &Directive,
    level: &Level<'_>,
    headers: &BTreeMap<String, &str>,
    keyward: &[&str],
    findings: &mut Findings,
) {
    let place = &level.place;
    let identity = unset(headers, &IDENTITY);
    if level.asks.is_empty() {
        let fix = "set $keyward_needs \"public=true\"; instead of auth_request off: Keyward then looks at path and headers";
        if identity.is_empty() {
            findings.warn(
                ABOUT,
                format!("{place} does not ask Keyward: every request reaches its service"),
                fix,
            );
        } else {
            let names = identity.join(", ");
            let problem = format!("{place} does not ask Keyward: {names} of a client reach its service");
            findings.fail(ABOUT, problem, fix);
        }
        return;
    }
    // nginx asks nobody about the request to the location that answers.
    if level.asks == level.path {
        return;
    }
    if !keyward.contains(&level.asks) {
        findings.unseen(ABOUT, format!("{place}: {} asks another server than Keyward", level.asks));
        return;
    }
    let directive = if pass.name == "grpc_pass" { "grpc_set_header" } else { "proxy_set_header" };
    if !identity.is_empty() {
        let problem = format!("{place} sends {} as a client makes them up", identity.join(", "));
        let fix = format!("repeat every {directive} here: a location with any {directive} inherits none");
        findings.fail(ABOUT, problem, fix);
    }
    other_headers(place, directive, headers, findings);
    if pass.name == "proxy_pass" && changes_path(pass.argument(0)) {
        let problem = format!(
            "{place} has a proxy_pass with a path: the service gets another path than Keyward judged"
        );
        findings.warn(ABOUT, problem, "proxy_pass without a path, not even /");
    }
}

/// Headers that say something else than who calls.
fn other_headers(place: &str, directive: &str, headers: &BTreeMap<String, &str>, findings: &mut Findings) {
    let overrides = unset(headers, &OVERRIDES);
    if !overrides.is_empty() {
        let names = overrides.join(", ");
        let problem = format!("{place} sends {names}: a service that obeys them can be led around rules");
        findings.warn(ABOUT, problem, format!("{directive} NAME \"\"; for each of them"));
    }
    let credentials = unset(headers, &["authorization", "x-api-key"]);
    if !credentials.is_empty() {
        let problem = format!("{place} sends {}: the service sees the credential", credentials.join(", "));
        let fix = format!("{directive} from X-Keyward-Remove, as in deploy/nginx/keyward.conf");
        findings.warn(ABOUT, problem, fix);
    }
    if headers.get("host").is_some_and(|host| host.contains("$http_host")) {
        let problem = format!("{place} sends Host as the client wrote it: Keyward judged the host in $host");
        findings.warn(ABOUT, problem, format!("{directive} Host $host;"));
    }
}

/// Whether the target of a `proxy_pass` has a path; with variables it cannot be known.
fn changes_path(target: &str) -> bool {
    let (_, rest) = target.split_once("://").unwrap_or(("", target));
    !rest.starts_with("unix:") && !target.contains('$') && rest.contains('/')
}

/// The place that asks Keyward.
fn question(block: &[Directive], level: &Level<'_>, findings: &mut Findings) {
    let place = &level.place;
    for (name, right) in [
        ("X-Original-Method", "$request_method"),
        ("X-Original-Host", "$host"),
        ("X-Original-URI", "$request_uri"),
    ] {
        let problem = match level.headers.get(&name.to_ascii_lowercase()).copied() {
            Some(value) if value == right => continue,
            Some(value) => format!(
                "{place} sets {name} to {value}: Keyward judges another request than the service gets"
            ),
            None => format!("{place} does not set {name}: a client can, and so chooses what Keyward judges"),
        };
        findings.fail(ABOUT, problem, format!("proxy_set_header {name} {right};"));
    }
    let forwarded = level.headers.get("x-forwarded-for").copied().unwrap_or_default();
    if !["$proxy_add_x_forwarded_for", "$remote_addr"].contains(&forwarded) {
        let problem = format!("{place} does not set X-Forwarded-For: a client can make up its address");
        findings.warn(ABOUT, problem, "proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for;");
    }
    let says = |name: &str, value: &str| {
        block.iter().any(|directive| directive.name == name && directive.argument(0) == value)
    };
    if !says("internal", "") {
        findings.warn(
            ABOUT,
            format!("{place} is not internal: clients can ask Keyward about tokens"),
            "internal;",
        );
    }
    if !says("proxy_pass_request_body", "off") {
        let problem = format!("{place} sends bodies to Keyward, which does not look at them");
        findings.warn(ABOUT, problem, "proxy_pass_request_body off; proxy_set_header Content-Length \"\";");
    }
    if !level.cache.is_empty() {
        let problem = format!("{place} caches answers: what is revoked passes until they are old");
        findings.fail(ABOUT, problem, "proxy_cache off;");
    }
}
