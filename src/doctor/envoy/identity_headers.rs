//! Checks that Envoy itself passes no identity headers to a service that Keyward did not set, neither from its own
//! configuration nor as trailers, which Keyward never sees.

use serde_json::Value;

use crate::domain::header_name;

use super::message::{JsonMessage as _, TOPIC, all_objects};
use crate::doctor::report::DoctorReport;

/// Checks every listener, cluster and header mutation of the bootstrap.
pub(super) fn check_identity_headers(root: &Value, findings: &mut DoctorReport) {
    let resources = root.field("static_resources").unwrap_or(&Value::Null);
    if resources.list_field("listeners").iter().any(enables_trailers) {
        let problem = "a listener accepts trailers of HTTP/1 (enable_trailers): Keyward sees none, and a service over HTTP/2 may read one as x-keyward-user";
        findings.warn(TOPIC, problem, "remove enable_trailers");
    }
    for cluster in resources.list_field("clusters").iter().filter(|cluster| enables_trailers(cluster)) {
        let problem = format!(
            "cluster {} forwards trailers (enable_trailers): Keyward sees none, and PHP reads a trailer X-Keyward-User as the header",
            cluster.text_field("name")
        );
        findings.fail(TOPIC, problem, "remove enable_trailers");
    }
    for object in all_objects(root) {
        for added in object.list_field("request_headers_to_add") {
            check_added_header(added.field("header"), "request_headers_to_add", findings);
        }
        for mutation in object.list_field("request_mutations") {
            let header = mutation.field("append").and_then(|append| append.field("header"));
            check_added_header(header, "request_mutations", findings);
        }
    }
}

fn enables_trailers(resource: &Value) -> bool {
    all_objects(resource).iter().any(|object| object.is_true("enable_trailers"))
}

/// Checks a header that Envoy adds.
fn check_added_header(header: Option<&Value>, setting: &str, findings: &mut DoctorReport) {
    let Some(header) =
        header.filter(|header| header_name::has_keyward_prefix(header.text_field("key").as_bytes()))
    else {
        return;
    };
    let name = header.text_field("key");
    if header.text_field("value").contains('%') {
        let problem = format!(
            "{setting} sets {name} from the request: a client can forge what the service reads as Keyward's answer"
        );
        findings.fail(TOPIC, problem, format!("remove {name} from {setting}"));
    } else {
        let problem = format!("{setting} sets {name}: the service reads it as Keyward's answer");
        findings.warn(TOPIC, problem, format!("remove {name} from {setting}"));
    }
}
