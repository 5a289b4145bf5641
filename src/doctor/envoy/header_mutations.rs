//! Checks which headers Envoy lets Keyward change. Any other header reaches the service as the client sent it.

use serde_json::Value;

use crate::domain::header_name::{IDENTITY_HEADERS, OVERRIDE_HEADERS};

use super::message::{JsonMessage as _, TOPIC, full_match_regex};
use crate::doctor::report::DoctorReport;

/// Checks the `HeaderMutationRules` of a filter.
pub(super) fn check_header_mutation_rules(filter: &Value, findings: &mut DoctorReport) {
    let Some(rules) = filter.field("decoder_header_mutation_rules") else { return };
    let expression =
        |name: &str| rules.field(name).map(|expression| full_match_regex(expression.text_field("regex")));
    let (allowed, refused) = (expression("allow_expression"), expression("disallow_expression"));
    if matches!(allowed, Some(None)) || matches!(refused, Some(None)) {
        findings
            .skip(TOPIC, "an expression of decoder_header_mutation_rules that the doctor does not support");
    }
    let (allowed, refused) = (allowed.flatten(), refused.flatten());
    // The order of Envoy's checks.
    let may_change = |name: &str| {
        if refused.as_ref().is_some_and(|regex| regex.is_match(name.as_bytes())) {
            return false;
        }
        allowed.as_ref().is_some_and(|regex| regex.is_match(name.as_bytes()))
            || !rules.is_true("disallow_all")
    };
    let read = ["x-keyward-later", "authorization", "x-api-key"];
    let changed = IDENTITY_HEADERS.into_iter().chain(read).chain(OVERRIDE_HEADERS);
    if let Some(name) = changed.into_iter().find(|name| !may_change(name)) {
        let problem = format!(
            "decoder_header_mutation_rules keep Keyward from changing {name}: the client's own header reaches the service"
        );
        findings.fail(TOPIC, problem, "remove decoder_header_mutation_rules");
    }
}
