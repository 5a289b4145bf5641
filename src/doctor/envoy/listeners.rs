//! The listeners in front of the services: whether paths and headers reach Keyward and the service alike, and whether
//! anything goes around Keyward.

use serde_json::Value;

use crate::domain::header_name::IDENTITY;

use super::{
    ABOUT, FILTER, Findings, MANAGER, PER_ROUTE,
    reading::{Object as _, objects, typed},
};

/// Looks at every listener.
pub(super) fn examine(root: &Value, findings: &mut Findings) {
    let listeners = root.at("static_resources").map_or(&[][..], |resources| resources.list("listeners"));
    for listener in listeners {
        for manager in typed(listener, MANAGER) {
            if typed(manager, FILTER).is_empty() {
                let said = format!("listener {} does not ask Keyward", listener.text("name"));
                findings.warn(
                    ABOUT,
                    said,
                    "put ext_authz into its http_filters, unless nothing behind it needs a key",
                );
            } else {
                examine_manager(listener.text("name"), manager, findings);
            }
        }
    }
}

fn examine_manager(name: &str, manager: &Value, findings: &mut Findings) {
    let around = "otherwise routes and rules can be walked around, as by /public/../admin";
    for setting in ["normalize_path", "merge_slashes"] {
        if !manager.is_true(setting) {
            findings.fail(
                ABOUT,
                format!("listener {name}: {setting} is off: {around}"),
                format!("{setting}: true"),
            );
        }
    }
    let slashes = manager.text("path_with_escaped_slashes_action");
    if !["REJECT_REQUEST", "UNESCAPE_AND_REDIRECT"].contains(&slashes) {
        let said = format!("listener {name}: path_with_escaped_slashes_action lets %2F through: {around}");
        findings.fail(ABOUT, said, "path_with_escaped_slashes_action: REJECT_REQUEST");
    }
    let common = manager.at("common_http_protocol_options").unwrap_or(&Value::Null);
    if !["REJECT_REQUEST", "DROP_HEADER"].contains(&common.text("headers_with_underscores_action")) {
        let said = format!(
            "listener {name}: headers_with_underscores_action lets X_Keyward_Account through, which many services take for X-Keyward-Account"
        );
        let fix = "common_http_protocol_options: { headers_with_underscores_action: REJECT_REQUEST }";
        findings.fail(ABOUT, said, fix);
    }
    if !manager.is_true("use_remote_address") {
        let said = format!(
            "listener {name}: use_remote_address is off: a client can make up its address in x-forwarded-for"
        );
        findings.warn(
            ABOUT,
            said,
            "use_remote_address: true at the edge; behind other proxies set gateway.trusted_hops",
        );
    }
    order(name, manager.list("http_filters"), findings);
    unguarded(manager, findings);
}

/// A preflight has no key: it must be answered before Keyward is asked.
fn order(name: &str, filters: &[Value], findings: &mut Findings) {
    let at = |ending: &str| filters.iter().position(|filter| !typed(filter, ending).is_empty());
    if let (Some(cors), Some(authz)) = (at(".cors.v3.Cors"), at(FILTER))
        && cors > authz
    {
        let said = format!(
            "listener {name}: cors comes after ext_authz: browsers' preflights, which have no key, are denied"
        );
        findings.warn(ABOUT, said, "put envoy.filters.http.cors before ext_authz");
    }
}

/// Routes that Keyward is not asked about: whatever a client sends reaches their service.
fn unguarded(manager: &Value, findings: &mut Findings) {
    let routes = manager.at("route_config").unwrap_or(&Value::Null);
    for place in objects(routes) {
        let per_filter = place.at("typed_per_filter_config");
        let off = per_filter
            .is_some_and(|config| typed(config, PER_ROUTE).iter().any(|config| config.is_true("disabled")));
        let cleans = |place: &Value| {
            let removed = place.list("request_headers_to_remove");
            IDENTITY.iter().all(|name| {
                removed
                    .iter()
                    .any(|removed| removed.as_str().is_some_and(|removed| removed.eq_ignore_ascii_case(name)))
            })
        };
        if off && !cleans(place) && !cleans(routes) {
            let said = "a route is without Keyward (disabled: true), and x-keyward-… headers that a client makes up reach its service";
            let fix = "check_settings: { context_extensions: { public: \"true\" } } instead: Keyward lets it pass and cleans its headers";
            findings.fail(ABOUT, said, fix);
        }
    }
}
