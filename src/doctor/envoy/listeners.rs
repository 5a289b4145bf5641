//! Checks the listeners in front of the services: that Keyward and the service see the same paths and headers, and that no
//! request bypasses Keyward.

use serde_json::Value;

use crate::domain::header_name::IDENTITY_HEADERS;

use super::message::{
    EXT_AUTHZ_PER_ROUTE_TYPE, EXT_AUTHZ_TYPE, HTTP_CONNECTION_MANAGER_TYPE, JsonMessage as _, TOPIC,
    all_objects, messages_with_type,
};
use crate::doctor::report::DoctorReport;

pub(super) fn check_listeners(root: &Value, findings: &mut DoctorReport) {
    let listeners =
        root.field("static_resources").map_or(&[][..], |resources| resources.list_field("listeners"));
    for listener in listeners {
        for manager in messages_with_type(listener, HTTP_CONNECTION_MANAGER_TYPE) {
            if messages_with_type(manager, EXT_AUTHZ_TYPE).is_empty() {
                let problem = format!("listener {} does not ask Keyward", listener.text_field("name"));
                findings.warn(
                    TOPIC,
                    problem,
                    "put ext_authz into its http_filters, unless nothing behind it needs a key",
                );
            } else {
                check_connection_manager(listener.text_field("name"), manager, findings);
            }
        }
    }
}

fn check_connection_manager(name: &str, manager: &Value, findings: &mut DoctorReport) {
    let around = "otherwise /public/../admin can bypass routes and rules";
    for setting in ["normalize_path", "merge_slashes"] {
        if !manager.is_true(setting) {
            findings.fail(
                TOPIC,
                format!("listener {name}: {setting} is off: {around}"),
                format!("{setting}: true"),
            );
        }
    }
    let slashes = manager.text_field("path_with_escaped_slashes_action");
    if !["REJECT_REQUEST", "UNESCAPE_AND_REDIRECT"].contains(&slashes) {
        let problem = format!("listener {name}: path_with_escaped_slashes_action lets %2F pass: {around}");
        findings.fail(TOPIC, problem, "path_with_escaped_slashes_action: REJECT_REQUEST");
    }
    let common = manager.field("common_http_protocol_options").unwrap_or(&Value::Null);
    if !["REJECT_REQUEST", "DROP_HEADER"].contains(&common.text_field("headers_with_underscores_action")) {
        let problem = format!(
            "listener {name}: headers_with_underscores_action lets X_Keyward_Account pass, which many services read as X-Keyward-Account"
        );
        let fix = "common_http_protocol_options: { headers_with_underscores_action: REJECT_REQUEST }";
        findings.fail(TOPIC, problem, fix);
    }
    if !manager.is_true("use_remote_address") {
        let problem = format!(
            "listener {name}: use_remote_address is off: a client can forge its address in x-forwarded-for"
        );
        findings.warn(
            TOPIC,
            problem,
            "use_remote_address: true at the edge; behind other proxies set gateway.trusted_hops",
        );
    }
    check_filter_order(name, manager.list_field("http_filters"), findings);
    check_disabled_routes(manager, findings);
}

/// Checks that `cors` comes first: a preflight has no key, so it must be answered before Keyward is asked.
fn check_filter_order(name: &str, filters: &[Value], findings: &mut DoctorReport) {
    let at = |ending: &str| filters.iter().position(|filter| !messages_with_type(filter, ending).is_empty());
    if let (Some(cors), Some(authz)) = (at(".cors.v3.Cors"), at(EXT_AUTHZ_TYPE))
        && cors > authz
    {
        let problem = format!(
            "listener {name}: cors comes after ext_authz: preflights of browsers, which have no key, are denied"
        );
        findings.warn(TOPIC, problem, "put envoy.filters.http.cors before ext_authz");
    }
}

/// Checks routes without Keyward, whose service receives whatever a client sends.
fn check_disabled_routes(manager: &Value, findings: &mut DoctorReport) {
    let routes = manager.field("route_config").unwrap_or(&Value::Null);
    for place in all_objects(routes) {
        let per_filter = place.field("typed_per_filter_config");
        let off = per_filter.is_some_and(|config| {
            messages_with_type(config, EXT_AUTHZ_PER_ROUTE_TYPE)
                .iter()
                .any(|config| config.is_true("disabled"))
        });
        let cleans = |place: &Value| {
            let removed = place.list_field("request_headers_to_remove");
            IDENTITY_HEADERS.iter().all(|name| {
                removed
                    .iter()
                    .any(|removed| removed.as_str().is_some_and(|removed| removed.eq_ignore_ascii_case(name)))
            })
        };
        if off && !cleans(place) && !cleans(routes) {
            let problem = "a route is without Keyward (disabled: true), and forged x-keyward-… headers reach its service";
            let fix = "check_settings: { context_extensions: { public: \"true\" } } instead: Keyward allows it and removes such headers";
            findings.fail(TOPIC, problem, fix);
        }
    }
}
