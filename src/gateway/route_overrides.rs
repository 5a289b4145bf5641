//! Reads the route settings that a proxy sends: Envoy's `context_extensions`, or the query of other proxies. The fields
//! are those of a rule. Unknown fields of Envoy belong to other filters and are ignored.
//!
//! Envoy merges the fields of the virtual host and the route, and the route's fields win. An empty value or `false`
//! therefore means "not set": with it, a route clears a field of its virtual host.

use crate::domain::{
    account::EnvironmentSet,
    name::{AccountId, CustomerId, NameError},
    policy_decision::{MAX_REQUEST_COST, MAX_REQUIRED_SCOPES},
    route::{EnforcementMode, NameSource, RouteRequirement, RouteSpec, parse_header_name},
    scope::Scope,
};

/// Route settings that a proxy sends with a request.
#[derive(Clone, Debug, Default)]
pub(crate) struct RouteOverrides {
    /// The fields that were valid.
    pub(crate) route: RouteSpec,
    /// The first invalid field. Such a route is a misconfiguration, because its requirement is unknown.
    pub(crate) problem: Option<String>,
}

/// Parses the fields that a proxy sends. If `strict`, an unknown field is an error.
#[must_use]
pub(crate) fn parse_route_overrides<'a>(
    fields: impl Iterator<Item = (&'a str, &'a str)>,
    environments: &EnvironmentSet,
    strict: bool,
) -> RouteOverrides {
    let mut reader =
        RouteOverrideParser { environments, overrides: RouteOverrides::default(), requirement_count: 0 };
    for (field, value) in fields {
        let value = value.trim();
        let is_field = reader.parse_field(field, value);
        if !is_field && strict {
            reader.add_problem(field, "is not a field of a route");
        }
    }
    if reader.requirement_count > 1 {
        reader.add_problem("scope, scopes, authenticate_only, public", "exclude each other");
    }
    reader.overrides
}

struct RouteOverrideParser<'a> {
    environments: &'a EnvironmentSet,
    overrides: RouteOverrides,
    requirement_count: usize,
}

impl RouteOverrideParser<'_> {
    fn add_problem(&mut self, field: &str, problem: impl std::fmt::Display) {
        // One problem is reported at a time.
        self.overrides.problem.get_or_insert_with(|| format!("{field} {problem}"));
    }

    /// Parses one field. False = the field is unknown.
    fn parse_field(&mut self, field: &str, value: &str) -> bool {
        const OURS: [&str; 11] = [
            "scope",
            "scopes",
            "authenticate_only",
            "public",
            "environment",
            "account",
            "account_header",
            "customer",
            "customer_header",
            "cost",
            "mode",
        ];
        if !OURS.contains(&field) {
            return false;
        }
        // An empty value or `false` sets nothing.
        if value.is_empty() || value == "false" && ["authenticate_only", "public"].contains(&field) {
            return true;
        }
        match field {
            "scope" | "scopes" => {
                let scopes = parse_scopes(value);
                self.set_requirement(field, scopes.map(RouteRequirement::Scopes));
            }
            "authenticate_only" => {
                self.set_requirement(field, parse_true(value).map(|()| RouteRequirement::Authenticated))
            }
            "public" => self.set_requirement(field, parse_true(value).map(|()| RouteRequirement::Public)),
            "environment" => match self.environments.get(value) {
                Some(environment) => self.overrides.route.environment = Some(environment.name.clone()),
                None => self.add_problem(field, format!("must be one of {}", self.environments.names())),
            },
            "account" | "account_header" => {
                let named = parse_name_source(field, value, AccountId::parse);
                let before = self.overrides.route.account.take();
                self.overrides.route.account = self.set_once(field, before, named);
            }
            "customer" | "customer_header" => {
                let named = parse_name_source(field, value, CustomerId::parse);
                let before = self.overrides.route.customer.take();
                self.overrides.route.customer = self.set_once(field, before, named);
            }
            "cost" => match value.parse() {
                Ok(cost @ 1..=MAX_REQUEST_COST) => self.overrides.route.cost = Some(cost),
                _ => self.add_problem(field, format!("must be 1 to {MAX_REQUEST_COST}")),
            },
            _ => match EnforcementMode::parse(value) {
                Ok(mode) => self.overrides.route.mode = Some(mode),
                Err(error) => {
                    self.add_problem(field, error);
                    // A misspelled value must not open the route.
                    self.overrides.route.mode = Some(EnforcementMode::Enforce);
                }
            },
        }
        true
    }

    fn set_requirement(&mut self, field: &str, requirement: Result<RouteRequirement, String>) {
        self.requirement_count += 1;
        match requirement {
            Ok(requirement) => self.overrides.route.requirement = Some(requirement),
            Err(problem) => self.add_problem(field, problem),
        }
    }

    fn set_once<T>(
        &mut self,
        field: &str,
        before: Option<NameSource<T>>,
        named: Result<NameSource<T>, NameError>,
    ) -> Option<NameSource<T>> {
        if before.is_some() {
            self.add_problem(field, "is set in two ways");
        }
        named.map_err(|error| self.add_problem(field, error)).ok().or(before)
    }
}

fn parse_true(value: &str) -> Result<(), String> {
    if value == "true" { Ok(()) } else { Err("must be true or false".to_owned()) }
}

/// Scopes with commas or spaces between them.
fn parse_scopes(value: &str) -> Result<Vec<Scope>, String> {
    let texts: Vec<_> = value.split([',', ' ']).filter(|text| !text.is_empty()).collect();
    if !(1..=MAX_REQUIRED_SCOPES).contains(&texts.len()) {
        return Err(format!("must be 1 to {MAX_REQUIRED_SCOPES} scopes"));
    }
    texts.into_iter().map(Scope::parse_required).collect::<Result<_, _>>().map_err(|error| error.to_string())
}

fn parse_name_source<T>(
    field: &str,
    value: &str,
    parse: fn(&str) -> Result<T, NameError>,
) -> Result<NameSource<T>, NameError> {
    if field.ends_with("_header") {
        parse_header_name(value).map(NameSource::Header)
    } else {
        parse(value).map(NameSource::Fixed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn parse_overrides(fields: &[(&str, &str)], strict: bool) -> RouteOverrides {
        parse_route_overrides(fields.iter().copied(), &EnvironmentSet::default(), strict)
    }

    fn problem(fields: &[(&str, &str)]) -> Option<String> {
        parse_overrides(fields, false).problem
    }

    #[test]
    fn a_route_is_read_field_by_field() {
        let overrides = parse_overrides(
            &[
                ("scopes", "monitors:read, runs:read"),
                ("environment", "staging"),
                ("account_header", "X-Account"),
                ("customer", "c1"),
                ("cost", "3"),
                ("mode", "shadow"),
                ("vhost", "another filter's"),
            ],
            false,
        );
        assert_eq!(overrides.problem, None);
        let route = overrides.route;
        assert!(matches!(route.requirement, Some(RouteRequirement::Scopes(scopes)) if scopes.len() == 2));
        assert_eq!(route.environment.unwrap().as_str(), "staging");
        assert_eq!(route.account, Some(NameSource::Header("x-account".into())));
        assert_eq!(route.customer, Some(NameSource::Fixed(CustomerId::parse("c1").unwrap())));
        assert_eq!((route.cost, route.mode), (Some(3), Some(EnforcementMode::Shadow)));
    }

    #[test]
    fn a_route_takes_back_what_its_virtual_host_says() {
        let overrides =
            parse_overrides(&[("scope", ""), ("public", "true"), ("authenticate_only", "false")], false);
        assert_eq!((overrides.route.requirement, overrides.problem), (Some(RouteRequirement::Public), None));
        assert_eq!(
            self::parse_overrides(&[("scope", "")], false).route.requirement,
            None,
            "and then nothing is demanded by it"
        );
    }

    #[test]
    fn what_cannot_be_meant_is_a_problem() {
        for fields in [
            &[("scope", "a:read"), ("public", "true")][..],
            &[("scope", "a:*")],
            &[("scopes", ",")],
            &[("public", "yes")],
            &[("environment", "moon")],
            &[("account", "A B")],
            &[("account", "acme"), ("account_header", "x-a")],
            &[("customer_header", "x a")],
            &[("cost", "0")],
            &[("cost", "-1")],
            &[("mode", "off")],
        ] {
            assert!(problem(fields).is_some(), "{fields:?}");
        }
        assert!(parse_overrides(&[("scop", "a:read")], true).problem.unwrap().contains("scop"));
        assert_eq!(
            parse_overrides(&[("scop", "a:read")], false).route.requirement,
            None,
            "and so it is denied"
        );
    }

    proptest! {
        #[test]
        fn no_value_makes_it_panic(
            fields in proptest::collection::vec(("(scopes?|public|cost|mode|account|customer_header)", any::<String>()), 0..5)
        ) {
            let _ = parse_route_overrides(fields.iter().map(|(field, value)| (&**field, &**value)), &EnvironmentSet::default(), true);
        }
    }
}
