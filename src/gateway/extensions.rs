//! What a proxy's own configuration says of a route: Envoy's `context_extensions`, and the query with which other
//! proxies ask. The fields are those of a rule. Fields that are not ours are other filters', and are left alone.
//!
//! Envoy merges what virtual host and route say, field by field, the route's first. So an empty value or `false`
//! says nothing, and a route can take back with it what its virtual host says.

use crate::domain::{
    account::Environments,
    decision::{MAX_COST, MAX_SCOPES},
    name::{AccountId, CustomerId, NameError},
    route::{Demand, Mode, Named, Route, header_name},
    scope::Scope,
};

/// What a proxy says of a route.
#[derive(Clone, Debug, Default)]
pub struct Said {
    /// What could be read.
    pub route: Route,
    /// What is wrong with the rest: such a route answers nothing, since what it asks for is unknown.
    pub problem: Option<String>,
}

/// Reads what a proxy says, field by field; `strict` where all fields should be ours.
#[must_use]
pub fn read<'a>(
    fields: impl Iterator<Item = (&'a str, &'a str)>,
    environments: &Environments,
    strict: bool,
) -> Said {
    let mut reader = Reader { environments, said: Said::default(), demands: 0 };
    for (field, value) in fields {
        let value = value.trim();
        let known = reader.field(field, value);
        if !known && strict {
            reader.problem(field, "is no field of a route");
        }
    }
    if reader.demands > 1 {
        reader.problem("scope, scopes, authenticate_only, public", "exclude each other");
    }
    reader.said
}

struct Reader<'a> {
    environments: &'a Environments,
    said: Said,
    demands: usize,
}

impl Reader<'_> {
    fn problem(&mut self, field: &str, problem: impl std::fmt::Display) {
        // The first is enough: the others are told when it is mended.
        self.said.problem.get_or_insert_with(|| format!("{field} {problem}"));
    }

    /// Reads one field; whether it is one of ours.
    fn field(&mut self, field: &str, value: &str) -> bool {
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
        // Said to be nothing.
        if value.is_empty() || value == "false" && ["authenticate_only", "public"].contains(&field) {
            return true;
        }
        match field {
            "scope" | "scopes" => {
                let scopes = read_scopes(value);
                self.demand(field, scopes.map(Demand::Scopes));
            }
            "authenticate_only" => self.demand(field, read_true(value).map(|()| Demand::Authenticated)),
            "public" => self.demand(field, read_true(value).map(|()| Demand::Public)),
            "environment" => match self.environments.get(value) {
                Some(environment) => self.said.route.environment = Some(environment.name.clone()),
                None => self.problem(field, format!("is none of {}", self.environments.names())),
            },
            "account" | "account_header" => {
                let named = read_named(field, value, AccountId::parse);
                let before = self.said.route.account.take();
                self.said.route.account = self.one_of(field, before, named);
            }
            "customer" | "customer_header" => {
                let named = read_named(field, value, CustomerId::parse);
                let before = self.said.route.customer.take();
                self.said.route.customer = self.one_of(field, before, named);
            }
            "cost" => match value.parse() {
                Ok(cost @ 1..=MAX_COST) => self.said.route.cost = Some(cost),
                _ => self.problem(field, format!("must be 1 to {MAX_COST}")),
            },
            _ => match Mode::parse(value) {
                Ok(mode) => self.said.route.mode = Some(mode),
                Err(error) => {
                    self.problem(field, error);
                    // Who misspells it does not mean to open the route.
                    self.said.route.mode = Some(Mode::Enforce);
                }
            },
        }
        true
    }

    fn demand(&mut self, field: &str, demand: Result<Demand, String>) {
        self.demands += 1;
        match demand {
            Ok(demand) => self.said.route.demand = Some(demand),
            Err(problem) => self.problem(field, problem),
        }
    }

    fn one_of<T>(
        &mut self,
        field: &str,
        before: Option<Named<T>>,
        named: Result<Named<T>, NameError>,
    ) -> Option<Named<T>> {
        if before.is_some() {
            self.problem(field, "is said in two ways");
        }
        named.map_err(|error| self.problem(field, error)).ok().or(before)
    }
}

fn read_true(value: &str) -> Result<(), String> {
    if value == "true" { Ok(()) } else { Err("must be true or false".to_owned()) }
}

/// Scopes with commas or spaces between them.
fn read_scopes(value: &str) -> Result<Vec<Scope>, String> {
    let texts: Vec<_> = value.split([',', ' ']).filter(|text| !text.is_empty()).collect();
    if !(1..=MAX_SCOPES).contains(&texts.len()) {
        return Err(format!("must be 1 to {MAX_SCOPES} scopes"));
    }
    texts.into_iter().map(Scope::parse_required).collect::<Result<_, _>>().map_err(|error| error.to_string())
}

fn read_named<T>(
    field: &str,
    value: &str,
    parse: fn(&str) -> Result<T, NameError>,
) -> Result<Named<T>, NameError> {
    if field.ends_with("_header") {
        header_name(value).map(Named::Header)
    } else {
        parse(value).map(Named::Is)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn said(fields: &[(&str, &str)], strict: bool) -> Said {
        read(fields.iter().copied(), &Environments::default(), strict)
    }

    fn problem(fields: &[(&str, &str)]) -> Option<String> {
        said(fields, false).problem
    }

    #[test]
    fn a_route_is_read_field_by_field() {
        let said = said(
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
        assert_eq!(said.problem, None);
        let route = said.route;
        assert!(matches!(route.demand, Some(Demand::Scopes(scopes)) if scopes.len() == 2));
        assert_eq!(route.environment.unwrap().as_str(), "staging");
        assert_eq!(route.account, Some(Named::Header("x-account".into())));
        assert_eq!(route.customer, Some(Named::Is(CustomerId::parse("c1").unwrap())));
        assert_eq!((route.cost, route.mode), (Some(3), Some(Mode::Shadow)));
    }

    #[test]
    fn a_route_takes_back_what_its_virtual_host_says() {
        let said = said(&[("scope", ""), ("public", "true"), ("authenticate_only", "false")], false);
        assert_eq!((said.route.demand, said.problem), (Some(Demand::Public), None));
        assert_eq!(
            self::said(&[("scope", "")], false).route.demand,
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
        assert!(said(&[("scop", "a:read")], true).problem.unwrap().contains("scop"));
        assert_eq!(said(&[("scop", "a:read")], false).route.demand, None, "and so it is denied");
    }

    proptest! {
        #[test]
        fn no_value_makes_it_panic(
            fields in proptest::collection::vec(("(scopes?|public|cost|mode|account|customer_header)", any::<String>()), 0..5)
        ) {
            let _ = read(fields.iter().map(|(field, value)| (&**field, &**value)), &Environments::default(), true);
        }
    }
}
