//! Parses a dynamic configuration of Traefik into routers and middlewares. Field names are case-insensitive, as in Traefik.

use serde_json::Value;

/// The topic of every finding about Traefik.
pub(in crate::doctor) const TOPIC: &str = "traefik";

/// The maximum depth of nested chains.
const MAX_DEPTH: usize = 8;

/// A table with case-insensitive field names.
pub(super) trait JsonObject {
    /// A field that is not null.
    fn field(&self, name: &str) -> Option<&Value>;
    /// Whether a field is true.
    fn is_true(&self, name: &str) -> bool;
    /// A text field; empty if it is absent.
    fn text(&self, name: &str) -> &str;
    /// The texts of a list; empty if there is no list.
    fn texts(&self, name: &str) -> Vec<&str>;
    /// The entries of a table field with their names.
    fn entries(&self, name: &str) -> impl Iterator<Item = (&str, &Value)>;
}

impl JsonObject for Value {
    fn field(&self, name: &str) -> Option<&Value> {
        let fields = self.as_object()?;
        fields
            .iter()
            .find(|(known, value)| known.eq_ignore_ascii_case(name) && !value.is_null())
            .map(|(_, value)| value)
    }

    fn is_true(&self, name: &str) -> bool {
        // Traefik accepts text too.
        self.field(name).is_some_and(|value| *value == true || *value == "true")
    }

    fn text(&self, name: &str) -> &str {
        self.field(name).and_then(Value::as_str).unwrap_or_default()
    }

    fn texts(&self, name: &str) -> Vec<&str> {
        let list = self.field(name).and_then(Value::as_array);
        list.into_iter().flatten().filter_map(Value::as_str).collect()
    }

    fn entries(&self, name: &str) -> impl Iterator<Item = (&str, &Value)> {
        let table = self.field(name).and_then(Value::as_object);
        table.into_iter().flatten().map(|(name, value)| (name.as_str(), value))
    }
}

/// A router, or a route of an `IngressRoute`.
pub(super) struct TraefikRouter {
    /// The name of the router in findings.
    pub(super) place: String,
    /// The name of its service.
    pub(super) service: String,
    /// The names of its middlewares, in order.
    pub(super) middlewares: Vec<String>,
}

/// A middleware: a table with one field, whose name is its kind.
#[derive(Clone, Copy)]
pub(super) struct TraefikMiddleware<'c>(&'c Value);

impl<'c> TraefikMiddleware<'c> {
    /// Whether the middleware is of this kind.
    pub(super) fn is(&self, kind: &str) -> bool {
        self.0.field(kind).is_some()
    }

    /// Its `forwardAuth`, if it is one.
    pub(super) fn forward_auth(&self) -> Option<&'c Value> {
        self.0.field("forwardAuth")
    }

    /// The headers of requests that it sets; an empty value removes one.
    pub(super) fn request_headers(&self) -> impl Iterator<Item = (&'c str, &'c str)> + use<'c> {
        let headers = self.0.field("headers").into_iter();
        headers
            .flat_map(|headers| headers.entries("customRequestHeaders"))
            .map(|(name, value)| (name, value.as_str().unwrap_or("(no text)")))
    }
}

/// The middlewares and routers of a file.
pub(super) struct TraefikConfig {
    middlewares: Vec<(String, Value)>,
    routers: Vec<TraefikRouter>,
    other_routers: Option<&'static str>,
}

impl TraefikConfig {
    /// Parses YAML with one or several documents, or TOML if the name ends in `.toml`.
    ///
    /// # Errors
    /// The message of the parser, in one line.
    pub(super) fn parse(name: &str, text: &str) -> Result<TraefikConfig, String> {
        let first_line = |error: String| error.lines().next().unwrap_or_default().to_owned();
        let documents: Vec<Value> = if name.ends_with(".toml") {
            vec![toml::from_str(text).map_err(|error| first_line(error.message().to_owned()))?]
        } else {
            serde_saphyr::from_multiple(text).map_err(|error| first_line(error.to_string()))?
        };
        let mut configuration =
            TraefikConfig { middlewares: Vec::new(), routers: Vec::new(), other_routers: None };
        for document in &documents {
            match document.text("kind") {
                "" => configuration.add_file(document),
                "List" => {
                    let items = document.field("items").and_then(Value::as_array);
                    items.into_iter().flatten().for_each(|item| configuration.add_resource(item));
                }
                _ => configuration.add_resource(document),
            }
        }
        Ok(configuration)
    }

    /// Adds a file of the file provider.
    fn add_file(&mut self, document: &Value) {
        for (kind, shown) in [("tcp", "TCP"), ("udp", "UDP")] {
            if document.field(kind).is_some_and(|part| part.entries("routers").next().is_some()) {
                self.other_routers = Some(shown);
            }
        }
        let Some(http) = document.field("http") else { return };
        let middlewares = http.entries("middlewares");
        self.middlewares.extend(middlewares.map(|(name, value)| (name.to_owned(), value.clone())));
        self.routers.extend(http.entries("routers").map(|(name, router)| TraefikRouter {
            place: format!("router {name}"),
            service: router.text("service").to_owned(),
            middlewares: middleware_names(router),
        }));
    }

    /// Adds a Kubernetes resource.
    fn add_resource(&mut self, resource: &Value) {
        let name = resource.field("metadata").map(|metadata| metadata.text("name")).unwrap_or_default();
        let Some(spec) = resource.field("spec") else { return };
        match resource.text("kind") {
            "Middleware" => self.middlewares.push((name.to_owned(), spec.clone())),
            "IngressRoute" => {
                let routes = spec.field("routes").and_then(Value::as_array).into_iter().flatten();
                self.routers.extend(routes.map(|route| {
                    let services = route.field("services").and_then(Value::as_array);
                    let service = services.and_then(|services| services.first());
                    TraefikRouter {
                        place: format!("IngressRoute {name}"),
                        service: service.map(|service| service.text("name")).unwrap_or_default().to_owned(),
                        middlewares: middleware_names(route),
                    }
                }));
            }
            "IngressRouteTCP" => self.other_routers = Some("TCP"),
            "IngressRouteUDP" => self.other_routers = Some("UDP"),
            _ => {}
        }
    }

    /// All middlewares with their names.
    pub(super) fn middlewares(&self) -> impl Iterator<Item = (&str, TraefikMiddleware<'_>)> {
        self.middlewares.iter().map(|(name, value)| (name.as_str(), TraefikMiddleware(value)))
    }

    /// The HTTP routers; `IngressRoute` has one per route.
    pub(super) fn routers(&self) -> &[TraefikRouter] {
        &self.routers
    }

    /// The kind of other routers in the file: TCP or UDP.
    pub(super) fn other_routers(&self) -> Option<&'static str> {
        self.other_routers
    }

    /// Finds middlewares by name, and replaces chains by their members. None = the file does not have it.
    pub(super) fn resolve(&self, names: &[String]) -> Vec<(String, Option<TraefikMiddleware<'_>>)> {
        let mut resolved = Vec::new();
        self.add_resolved(names, 0, &mut resolved);
        resolved
    }

    fn add_resolved<'c>(
        &'c self,
        names: &[String],
        depth: usize,
        resolved: &mut Vec<(String, Option<TraefikMiddleware<'c>>)>,
    ) {
        for name in names {
            let own = name.strip_suffix("@file").unwrap_or(name);
            let found = self.middlewares.iter().find(|(known, _)| known == own).map(|(_, value)| value);
            match found.map(|value| (value, value.field("chain"))) {
                // A chain that contains itself counts as missing.
                Some((_, Some(chain))) if depth < MAX_DEPTH => {
                    self.add_resolved(&middleware_names(chain), depth + 1, resolved);
                }
                Some((value, None)) => resolved.push((name.clone(), Some(TraefikMiddleware(value)))),
                Some((_, Some(_))) | None => resolved.push((name.clone(), None)),
            }
        }
    }
}

/// The names in a `middlewares` list of texts or of tables with a name.
fn middleware_names(object: &Value) -> Vec<String> {
    let list = object.field("middlewares").and_then(Value::as_array).into_iter().flatten();
    list.filter_map(|entry| entry.as_str().or_else(|| entry.field("name")?.as_str()))
        .map(str::to_owned)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_found_whatever_their_case() {
        let value = serde_json::json!({ "TrustForwardHeader": "true", "none": null, "list": ["a", 1] });
        assert!(value.is_true("trustForwardHeader") && value.field("none").is_none());
        assert_eq!((value.texts("LIST"), value.text("list")), (vec!["a"], ""));
    }

    #[test]
    fn chains_are_resolved_in_their_place() {
        let text = "http: { middlewares: { a: { chain: { middlewares: [b, c] } }, b: { headers: {} } } }";
        let configuration = TraefikConfig::parse("t.yaml", text).unwrap();
        let names = ["b", "a", "d"].map(str::to_owned);
        let resolved = configuration.resolve(&names);
        let shown: Vec<_> = resolved.iter().map(|(name, found)| (name.as_str(), found.is_some())).collect();
        assert_eq!(shown, [("b", true), ("b", true), ("c", false), ("d", false)]);
    }
}
