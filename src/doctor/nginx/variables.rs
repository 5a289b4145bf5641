//! Traces where the values of nginx's variables come from: Keyward's answer, the client's request, or elsewhere.

use std::collections::{BTreeMap, BTreeSet};

use super::syntax::NginxDirective;

/// The maximum depth of references between variables, which may refer to themselves.
const MAX_RESOLUTION_DEPTH: usize = 8;
/// Variables with values that Keyward has checked, or that the proxy sets itself.
const TRUSTED_VARIABLES: [&str; 8] = [
    "host",
    "request_uri",
    "request_method",
    "scheme",
    "server_name",
    "server_port",
    "server_addr",
    "request_id",
];

/// The source of a variable's value.
enum VariableSource<'c> {
    /// A header of the answer to `auth_request`, such as `x_keyward_user`.
    AuthResponseHeader(&'c str),
    /// A text that may contain variables (`set`).
    Text(&'c str),
    /// One of several values, chosen by a text (`map`).
    Map { by: &'c str, values: Vec<&'c str> },
    /// A script or a part of the path.
    Unknown,
}

/// All assignments of a configuration, by lower-case variable.
pub(super) struct NginxVariables<'c>(BTreeMap<String, Vec<VariableSource<'c>>>);

impl<'c> NginxVariables<'c> {
    /// Collects the assignments of all directives.
    pub(super) fn from_directives(all: &[&'c NginxDirective]) -> NginxVariables<'c> {
        let mut variables = NginxVariables(BTreeMap::new());
        for directive in all {
            variables.add_assignments(directive);
            for argument in &directive.arguments {
                for name in capture_group_names(argument) {
                    variables.add(name, VariableSource::Unknown);
                }
            }
        }
        variables
    }

    fn add_assignments(&mut self, directive: &'c NginxDirective) {
        let (first, second) = (directive.argument(0), directive.argument(1));
        match directive.name.as_str() {
            "auth_request_set" => {
                let header = second.strip_prefix("$upstream_http_");
                self.add(
                    first,
                    header.map_or(VariableSource::Text(second), VariableSource::AuthResponseHeader),
                );
            }
            "set" => self.add(first, VariableSource::Text(second)),
            "map" => {
                let inside = directive.children().iter();
                for name in inside.clone().flat_map(|entry| capture_group_names(&entry.name)) {
                    self.add(name, VariableSource::Unknown);
                }
                let values = inside.map(|entry| entry.argument(0)).collect();
                self.add(second, VariableSource::Map { by: first, values });
            }
            "geo" | "split_clients" => {
                self.add(directive.arguments.last().map_or("", String::as_str), VariableSource::Unknown);
            }
            name if name.starts_with("set_") || name.ends_with("_set") || name == "js_var" => {
                self.add(first, VariableSource::Unknown);
            }
            _ => {}
        }
    }

    fn add(&mut self, variable: &str, source: VariableSource<'c>) {
        let name = variable.trim_start_matches('$').to_ascii_lowercase();
        self.0.entry(name).or_default().push(source);
    }

    /// Whether a value is exactly the header of Keyward's answer, such as `x-keyward-user`.
    pub(super) fn is_auth_response_header(&self, value: &str, header: &str) -> bool {
        let names = referenced_variables(value);
        let [name] = names.as_slice() else { return false };
        if value != format!("${name}") && value != format!("${{{name}}}") {
            return false;
        }
        let header = header.replace('-', "_");
        let sources = self.0.get(&name.to_ascii_lowercase());
        sources.is_some_and(|sources| {
            sources
                .iter()
                .all(|source| matches!(source, VariableSource::AuthResponseHeader(of) if of.eq_ignore_ascii_case(&header)))
        })
    }

    /// The variables that a value finally comes from; none if Keyward's list of headers to remove decides.
    pub(super) fn resolve_sources(&self, value: &str) -> BTreeSet<String> {
        let mut leaves = BTreeSet::new();
        self.collect_sources(value, 0, &mut leaves);
        leaves
    }

    fn collect_sources(&self, value: &str, depth: usize, leaves: &mut BTreeSet<String>) {
        for name in referenced_variables(value) {
            let name = name.to_ascii_lowercase();
            let Some(sources) = self.0.get(&name).filter(|_| depth < MAX_RESOLUTION_DEPTH) else {
                leaves.insert(name);
                continue;
            };
            for source in sources {
                match source {
                    VariableSource::Text(text) => self.collect_sources(text, depth + 1, leaves),
                    VariableSource::Map { by, .. }
                        if self.is_auth_response_header(by, "x-keyward-remove") => {}
                    VariableSource::Map { values, .. } => {
                        values.iter().for_each(|value| self.collect_sources(value, depth + 1, leaves));
                    }
                    VariableSource::AuthResponseHeader(_) | VariableSource::Unknown => {
                        _ = leaves.insert(name.clone())
                    }
                }
            }
        }
    }

    /// Whether a client certainly controls a part of a value.
    pub(super) fn is_client_controlled(&self, value: &str) -> bool {
        self.resolve_sources(value).iter().any(|name| is_client_variable(name))
    }

    /// Whether every part of a value is known and no client controls one.
    pub(super) fn is_trusted(&self, value: &str) -> bool {
        self.resolve_sources(value).iter().all(|name| TRUSTED_VARIABLES.contains(&name.as_str()))
    }
}

/// Whether a built-in variable of nginx holds a part of the client's request.
fn is_client_variable(name: &str) -> bool {
    let starts = ["http_", "arg_", "cookie_", "sent_http_"];
    let whole = ["args", "query_string", "uri", "document_uri", "request", "request_body", "remote_user"];
    starts.iter().any(|start| name.starts_with(start))
        || whole.contains(&name)
        || name.bytes().all(|byte| byte.is_ascii_digit())
}

/// The names of the variables in a value, without `$` and braces.
fn referenced_variables(value: &str) -> Vec<&str> {
    let parts = value.split('$').skip(1);
    let name = |part: &'_ str| {
        let end = |text: &str| {
            text.find(|letter: char| !letter.is_ascii_alphanumeric() && letter != '_').unwrap_or(text.len())
        };
        let start = usize::from(part.starts_with('{'));
        (start, start + end(&part[start..]))
    };
    let names = parts.map(|part| {
        let (start, end) = name(part);
        &part[start..end]
    });
    names.filter(|name| !name.is_empty()).collect()
}

/// The names of the capture groups in a regular expression: `(?<name>…)`, `(?P<name>…)`, `(?'name'…)`.
fn capture_group_names(text: &str) -> Vec<&str> {
    let groups = text.split("(?").skip(1);
    let named = groups.filter_map(|group| {
        let group = group.strip_prefix('P').unwrap_or(group);
        let rest = group.strip_prefix(['<', '\''])?;
        rest.split(['>', '\'']).next()
    });
    named.filter(|name| name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_')).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "auth_request_set $user $upstream_http_x_keyward_user; \
        auth_request_set $said $upstream_http_x_keyward_remove; auth_request_set $evil $http_x_user; \
        auth_request_set $Both $upstream_http_x_keyward_user; set $both x; set $copy $http_x_user; set $loop $loop; \
        auth_request_set $part $upstream_http_x_keyward_user; \
        map $said $authorization { default $http_authorization; '~(^|,)authorization(,|$)' ''; } \
        map $http_upgrade $upgrade { default ''; websocket websocket; } map $http_a $free { default $http_a; } \
        location ~ '^/(?<part>.*)$' { }";

    #[test]
    fn only_what_auth_request_set_takes_from_the_right_header_is_an_answer() {
        let root = crate::doctor::nginx::syntax::parse_directives(TEXT, 1).unwrap();
        let all = crate::doctor::nginx::syntax::flatten(&root);
        let variables = NginxVariables::from_directives(&all);
        for right in ["$user", "${user}", "$USER"] {
            assert!(variables.is_auth_response_header(right, "x-keyward-user"), "{right}");
        }
        for wrong in [
            "",
            "root",
            "x$user",
            "$user$user",
            "$said",
            "$evil",
            "$both",
            "$part",
            "$copy",
            "$none",
            "$http_x_keyward_user",
        ] {
            assert!(!variables.is_auth_response_header(wrong, "x-keyward-user"), "{wrong}");
        }
    }

    #[test]
    fn what_a_client_chooses_is_found_behind_other_variables() {
        let root = crate::doctor::nginx::syntax::parse_directives(TEXT, 1).unwrap();
        let all = crate::doctor::nginx::syntax::flatten(&root);
        let variables = NginxVariables::from_directives(&all);
        for chosen in ["$evil", "a${http_x}", "$arg_user", "$copy", "$free", "$1", "/x$uri"] {
            assert!(variables.is_client_controlled(chosen) && !variables.is_trusted(chosen), "{chosen}");
        }
        for fixed in ["", "text", "$host:$server_port", "$authorization", "$upgrade", "$request_uri"] {
            assert!(!variables.is_client_controlled(fixed) && variables.is_trusted(fixed), "{fixed}");
        }
        for unknown in ["$loop", "$part", "$user", "$module"] {
            assert!(!variables.is_client_controlled(unknown) && !variables.is_trusted(unknown), "{unknown}");
        }
    }
}
