//! Ways in which Envoy itself gives a service identity headers that Keyward did not set: its own configuration, and
//! trailers, which no filter asks Keyward about.

use serde_json::Value;

use crate::domain::header_name;

use super::{
    ABOUT, Findings,
    reading::{Object as _, objects},
};

/// Looks at everything in the bootstrap.
pub(super) fn examine(root: &Value, findings: &mut Findings) {
    let resources = root.at("static_resources").unwrap_or(&Value::Null);
    if resources.list("listeners").iter().any(has_trailers) {
        let problem = "a listener lets trailers of HTTP/1 in (enable_trailers): Keyward sees none, and a service over HTTP/2 may take one for x-keyward-user";
        findings.warn(ABOUT, problem, "take enable_trailers away");
    }
    for cluster in resources.list("clusters").iter().filter(|cluster| has_trailers(cluster)) {
        let problem = format!(
            "cluster {} passes trailers on (enable_trailers): Keyward sees none, and PHP takes a trailer X-Keyward-User for the header",
            cluster.text("name")
        );
        findings.fail(ABOUT, problem, "take enable_trailers away");
    }
    for object in objects(root) {
        for added in object.list("request_headers_to_add") {
            set(added.at("header"), "request_headers_to_add", findings);
        }
        for mutation in object.list("request_mutations") {
            let header = mutation.at("append").and_then(|append| append.at("header"));
            set(header, "request_mutations", findings);
        }
    }
}

fn has_trailers(resource: &Value) -> bool {
    objects(resource).iter().any(|object| object.is_true("enable_trailers"))
}

/// A header that Envoy sets.
fn set(header: Option<&Value>, setting: &str, findings: &mut Findings) {
    let Some(header) = header.filter(|header| header_name::has_prefix(header.text("key").as_bytes())) else {
        return;
    };
    let name = header.text("key");
    if header.text("value").contains('%') {
        let problem = format!(
            "{setting} sets {name} from the request: a client can make up what the service takes for Keyward's answer"
        );
        findings.fail(ABOUT, problem, format!("take {name} out of {setting}"));
    } else {
        let problem = format!("{setting} sets {name}: the service takes it for Keyward's answer");
        findings.warn(ABOUT, problem, format!("take {name} out of {setting}"));
    }
}
