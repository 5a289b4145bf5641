//! Ways in which Envoy itself gives a service identity headers that Keyward did not set: its own configuration, and
//! trailers, which no filter asks Keyward about.

use serde_json::Value;

use crate::domain::header_name;

use super::message::{JsonMessage as _, TOPIC, all_objects};
use crate::doctor::report::DoctorReport;

/// Looks at everything in the bootstrap.
pub(super) fn check_identity_headers(root: &Value, findings: &mut DoctorReport) {
    let resources = root.field("static_resources").unwrap_or(&Value::Null);
    if resources.list_field("listeners").iter().any(enables_trailers) {
        let problem = "a listener lets trailers of HTTP/1 in (enable_trailers): Keyward sees none, and a service over HTTP/2 may take one for x-keyward-user";
        findings.warn(TOPIC, problem, "take enable_trailers away");
    }
    for cluster in resources.list_field("clusters").iter().filter(|cluster| enables_trailers(cluster)) {
        let problem = format!(
            "cluster {} passes trailers on (enable_trailers): Keyward sees none, and PHP takes a trailer X-Keyward-User for the header",
            cluster.text_field("name")
        );
        findings.fail(TOPIC, problem, "take enable_trailers away");
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

/// A header that Envoy sets.
fn check_added_header(header: Option<&Value>, setting: &str, findings: &mut DoctorReport) {
    let Some(header) =
        header.filter(|header| header_name::has_keyward_prefix(header.text_field("key").as_bytes()))
    else {
        return;
    };
    let name = header.text_field("key");
    if header.text_field("value").contains('%') {
        let problem = format!(
            "{setting} sets {name} from the request: a client can make up what the service takes for Keyward's answer"
        );
        findings.fail(TOPIC, problem, format!("take {name} out of {setting}"));
    } else {
        let problem = format!("{setting} sets {name}: the service takes it for Keyward's answer");
        findings.warn(TOPIC, problem, format!("take {name} out of {setting}"));
    }
}
