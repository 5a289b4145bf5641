//! The locations of nginx: which of them ask Keyward, which headers they send to a service, and how the location that
//! asks describes the request.

use std::collections::BTreeMap;

use crate::domain::header_name::{IDENTITY, OVERRIDES};

use super::{ABOUT, Directive, Findings, variables::Variables};

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
    /// Whether headers of the block around it were lost, because it sets some.
    lost: bool,
    cache: &'c str,
    satisfy: &'c str,
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
        let sets = |name: &str| block.iter().any(|directive| directive.name == name);
        let lost = sets("proxy_set_header") && !self.headers.is_empty()
            || sets("grpc_set_header") && !self.grpc_headers.is_empty();
        Level {
            place: self.place.clone(),
            path: self.path,
            asks: last("auth_request").unwrap_or(self.asks),
            headers: headers("proxy_set_header", &self.headers),
            grpc_headers: headers("grpc_set_header", &self.grpc_headers),
            lost: lost || self.lost && !sets("proxy_set_header") && !sets("grpc_set_header"),
            cache: last("proxy_cache").unwrap_or(self.cache),
            satisfy: last("satisfy").unwrap_or(self.satisfy),
        }
    }
}

/// What the whole configuration says.
struct Whole<'c> {
    variables: Variables<'c>,
    /// The paths of the locations that ask Keyward; another's answer says nothing of its headers.
    keyward: Vec<&'c str>,
    /// The paths of all locations that are no patterns.
    exact: Vec<&'c str>,
    /// Whether a location may be missing here: files are not read, or a pattern leads to Keyward.
    open: bool,
}

/// Looks at every location.
pub(super) fn examine(root: &[Directive], findings: &mut Findings) {
    let all = super::flat(root);
    let locations: Vec<&Directive> =
        all.iter().copied().filter(|directive| directive.name == "location").collect();
    let asks_keyward = |location: &Directive| {
        let mut passes = location.inside().iter().filter(|inside| inside.name == "proxy_pass");
        passes.any(|pass| pass.argument(0).contains("/auth/nginx"))
    };
    let (mut keyward, mut exact) = (Vec::new(), Vec::new());
    let mut open = all.iter().any(|directive| directive.name == "include");
    for location in locations {
        let path = location.arguments.last().map_or("", String::as_str);
        let is_pattern = location.argument(0).starts_with('~');
        if asks_keyward(location) {
            keyward.push(path);
            open |= is_pattern;
        }
        if !is_pattern {
            exact.push(path);
        }
    }
    let whole = Whole { variables: Variables::of(&all), keyward, exact, open };
    walk(root, &Level::default(), &whole, findings);
}

fn walk<'c>(block: &'c [Directive], around: &Level<'c>, whole: &Whole<'_>, findings: &mut Findings) {
    let level = around.enter(block);
    for directive in block {
        match directive.name.as_str() {
            "proxy_pass" if directive.argument(0).contains("/auth/nginx") => {
                question(block, &level, findings)
            }
            "proxy_pass" => {
                passes_on(directive, &level, &level.headers, whole, findings);
            }
            "grpc_pass" => passes_on(directive, &level, &level.grpc_headers, whole, findings),
            "rewrite" => rewrite(directive, &level, findings),
            name if OTHER_PASSES.contains(&name) => other_pass(name, &level, findings),
            name if is_script(name) => {
                findings.unseen(ABOUT, format!("{}: what {name} does with requests", level.place));
            }
            name if LEVELS.contains(&name) => {
                let mut level = level.clone();
                if name == "location" || level.place.is_empty() || level.place.starts_with("http ") {
                    let words =
                        [std::slice::from_ref(&directive.name), directive.arguments.as_slice()].concat();
                    level.place = format!("{} (line {})", words.join(" "), directive.line);
                }
                if name == "location" {
                    level.path = directive.arguments.last().map_or("", String::as_str);
                }
                walk(directive.inside(), &level, whole, findings);
            }
            _ => {}
        }
    }
}

/// Whether a directive runs what is not read here, or takes a request to another place.
fn is_script(name: &str) -> bool {
    let harmless = ["init_", "exit_", "log_", "ssl_"].iter().any(|start| name.starts_with(start));
    name.contains("_by_lua") && !harmless || ["js_content", "perl", "try_files", "mirror"].contains(&name)
}

/// A place that passes requests on by another protocol.
fn other_pass(name: &str, level: &Level<'_>, findings: &mut Findings) {
    let place = &level.place;
    if level.asks.is_empty() {
        let problem = format!("{place} does not ask Keyward: every request reaches its service by {name}");
        findings.warn(ABOUT, problem, "auth_request /keyward; as in deploy/nginx/keyward.conf");
    } else {
        findings.unseen(ABOUT, format!("{place}: which HTTP_… parameters {name} sends"));
    }
}

/// A change of the path after Keyward has judged it. A redirect to the client is none.
fn rewrite(directive: &Directive, level: &Level<'_>, findings: &mut Findings) {
    let target = directive.argument(1);
    let redirects = ["redirect", "permanent"].contains(&directive.argument(2))
        || ["http://", "https://", "$scheme"].iter().any(|start| target.starts_with(start));
    if redirects || level.asks.is_empty() && !level.path.is_empty() {
        return;
    }
    let place = &level.place;
    let problem =
        format!("{place} has a rewrite to {target}: the service gets another path than Keyward judged");
    findings.warn(ABOUT, problem, "let the service do it, or send clients there: rewrite … redirect;");
}

/// The names that would pass as the client sends them, or with a value that is not right.
fn unset<'n>(
    headers: &BTreeMap<String, &str>,
    names: &[&'n str],
    right: impl Fn(&str, &str) -> bool,
) -> Vec<&'n str> {
    let is_right = |name: &str| headers.get(name).is_some_and(|value| right(name, value));
    names.iter().filter(|name| !is_right(name)).copied().collect()
}

/// A place that sends requests to a service.
fn passes_on(
    pass: &Directive,
    level: &Level<'_>,
    headers: &BTreeMap<String, &str>,
    whole: &Whole<'_>,
    findings: &mut Findings,
) {
    let (place, variables) = (&level.place, &whole.variables);
    let is_answer = |name: &str, value: &str| value.is_empty() || variables.answers(value, name);
    let identity = unset(headers, &IDENTITY, is_answer);
    if level.asks.is_empty() {
        not_asking(place, &identity, findings);
        return;
    }
    // nginx asks nobody about the request to the location that answers.
    if level.asks == level.path {
        return;
    }
    if !whole.keyward.contains(&level.asks) {
        asks_another(level, whole, findings);
        return;
    }
    let directive = if pass.name == "grpc_pass" { "grpc_set_header" } else { "proxy_set_header" };
    if !identity.is_empty() {
        who_calls(level, directive, &identity, headers, findings);
    }
    if level.satisfy == "any" {
        let problem = format!(
            "{place} has satisfy any: Keyward is not asked about what an address or a password lets pass"
        );
        findings.fail(ABOUT, problem, "satisfy all; and a location of its own for what passes without a key");
    }
    other_headers(place, directive, headers, variables, findings);
    if pass.name == "proxy_pass" {
        path_of(pass.argument(0), place, variables, findings);
    }
}

fn not_asking(place: &str, identity: &[&str], findings: &mut Findings) {
    let fix = "set $keyward_needs \"public=true\"; instead of auth_request off: Keyward then looks at path and headers";
    if identity.is_empty() {
        let problem = format!("{place} does not ask Keyward: every request reaches its service");
        findings.warn(ABOUT, problem, fix);
    } else {
        let names = identity.join(", ");
        let problem = format!("{place} does not ask Keyward: {names} of a client reach its service");
        findings.fail(ABOUT, problem, fix);
    }
}

/// A place whose `auth_request` leads to no location that asks Keyward.
fn asks_another(level: &Level<'_>, whole: &Whole<'_>, findings: &mut Findings) {
    let (place, asks) = (&level.place, level.asks);
    if whole.exact.contains(&asks) {
        findings.unseen(ABOUT, format!("{place}: {asks} asks another server than Keyward"));
    } else if whole.open {
        findings.unseen(ABOUT, format!("{place}: which location {asks} leads to"));
    } else {
        let problem =
            format!("{place} asks {asks}, and there is no location of that path: another one answers");
        let fix = format!("location = {asks} {{ … }} as in deploy/nginx/keyward.conf");
        findings.fail(ABOUT, problem, fix);
    }
}

/// Headers that say who calls, and are not what Keyward answers.
fn who_calls(
    level: &Level<'_>,
    directive: &str,
    names: &[&str],
    headers: &BTreeMap<String, &str>,
    findings: &mut Findings,
) {
    let place = &level.place;
    let variable = |name: &str| format!("${}", name.trim_start_matches("x-").replace('-', "_"));
    let (wrong, missing): (Vec<&str>, Vec<&str>) =
        names.iter().copied().partition(|name| headers.contains_key(*name));
    for name in wrong {
        let (variable, answer) = (variable(name), name.replace('-', "_"));
        let problem = format!("{place} sets {name} to {}, which is not Keyward's answer", headers[name]);
        let fix =
            format!("{directive} {name} {variable}; auth_request_set {variable} $upstream_http_{answer};");
        findings.fail(ABOUT, problem, fix);
    }
    if missing.is_empty() {
        return;
    }
    let problem = format!("{place} sends {} as a client makes them up", missing.join(", "));
    let fix = if level.lost {
        format!("repeat every {directive} here: a location with any {directive} inherits none")
    } else {
        let one = |name: &&str| format!("{directive} {name} {};", variable(name));
        missing.iter().map(one).collect::<Vec<_>>().join(" ")
    };
    findings.fail(ABOUT, problem, fix);
}

/// Headers that say something else than who calls.
fn other_headers(
    place: &str,
    directive: &str,
    headers: &BTreeMap<String, &str>,
    variables: &Variables<'_>,
    findings: &mut Findings,
) {
    let overrides = unset(headers, &OVERRIDES, |_, value| variables.is_fixed(value));
    if !overrides.is_empty() {
        let names = overrides.join(", ");
        let problem = format!("{place} sends {names}: a service that obeys them can be led around rules");
        findings.warn(ABOUT, problem, format!("{directive} NAME \"\"; for each of them"));
    }
    let shows = |value: &str| variables.leaves(value).iter().any(|name| name.starts_with("http_"));
    let credentials = unset(headers, &["authorization", "x-api-key"], |_, value| !shows(value));
    if !credentials.is_empty() {
        let problem = format!("{place} sends {}: the service sees the credential", credentials.join(", "));
        let fix = format!("{directive} from X-Keyward-Remove, as in deploy/nginx/keyward.conf");
        findings.warn(ABOUT, problem, fix);
    }
    if headers.get("host").is_some_and(|host| variables.client_chooses(host)) {
        let problem = format!("{place} sends Host as the client wrote it: Keyward judged the host in $host");
        findings.warn(ABOUT, problem, format!("{directive} Host $host;"));
    }
    upgrades(place, directive, headers, variables, findings);
}

/// Whether a client chooses which protocol a connection changes to.
fn upgrades(
    place: &str,
    directive: &str,
    headers: &BTreeMap<String, &str>,
    variables: &Variables<'_>,
    findings: &mut Findings,
) {
    let upgrade = headers.get("upgrade").copied().unwrap_or_default();
    if variables.client_chooses(upgrade) {
        let problem = format!(
            "{place} lets clients choose what to upgrade to: h2c is a tunnel for requests that nobody judges"
        );
        let fix = format!("{directive} Upgrade $keyward_upgrade; with its map of deploy/nginx/keyward.conf");
        findings.fail(ABOUT, problem, fix);
    } else if !variables.is_fixed(upgrade) {
        findings.unseen(ABOUT, format!("{place}: where {upgrade}, its Upgrade, comes from"));
    }
}

/// Whether the service gets the path that Keyward judged. A target of `proxy_pass` without a path hands it on.
fn path_of(target: &str, place: &str, variables: &Variables<'_>, findings: &mut Findings) {
    let (_, rest) = target.split_once("://").unwrap_or(("", target));
    let server = rest.strip_suffix("$request_uri").unwrap_or(rest);
    if server.starts_with("unix:") && !server.contains('$') {
        return;
    }
    if server.contains('/') || variables.client_chooses(server) {
        let problem = format!(
            "{place} has a proxy_pass with a path: the service gets another path than Keyward judged"
        );
        findings.warn(ABOUT, problem, "proxy_pass without a path, not even /");
    } else if server.contains('$') {
        findings.unseen(ABOUT, format!("{place}: whether {target} has a path"));
    }
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
            Some(value) if value.replace(['{', '}'], "") == right => continue,
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
