//! Reads protobuf messages in YAML or JSON, whose field names may be in snake case or camel case.

use std::time::Duration;

use regex::bytes::{Regex, RegexBuilder};
use serde_json::Value;

/// The topic of every finding about Envoy.
pub(super) const TOPIC: &str = "envoy";
/// Endings of message types, as of `@type`.
pub(super) const EXT_AUTHZ_TYPE: &str = ".ext_authz.v3.ExtAuthz";
pub(super) const EXT_AUTHZ_PER_ROUTE_TYPE: &str = ".ext_authz.v3.ExtAuthzPerRoute";
pub(super) const HTTP_CONNECTION_MANAGER_TYPE: &str = ".http_connection_manager.v3.HttpConnectionManager";
/// The maximum size of a compiled pattern in bytes.
const MAX_REGEX_BYTES: usize = 1 << 20;

/// A message in the form of JSON.
pub(super) trait JsonMessage {
    /// A field by its proto name; `failureModeAllow` is the same as `failure_mode_allow`.
    fn field(&self, name: &str) -> Option<&Value>;
    /// Whether a field is true.
    fn is_true(&self, name: &str) -> bool;
    /// The members of a list; empty if there is no list.
    fn list_field(&self, name: &str) -> &[Value];
    /// A text field; empty if it is absent.
    fn text_field(&self, name: &str) -> &str;
}

impl JsonMessage for Value {
    fn field(&self, name: &str) -> Option<&Value> {
        self.get(name).or_else(|| self.get(to_camel_case(name))).filter(|value| !value.is_null())
    }

    fn is_true(&self, name: &str) -> bool {
        self.field(name).is_some_and(|value| *value == true)
    }

    fn list_field(&self, name: &str) -> &[Value] {
        self.field(name).and_then(Value::as_array).map_or(&[], Vec::as_slice)
    }

    fn text_field(&self, name: &str) -> &str {
        self.field(name).and_then(Value::as_str).unwrap_or_default()
    }
}

fn to_camel_case(name: &str) -> String {
    let mut up = false;
    let letters = name.chars().filter_map(|letter| match letter {
        '_' => {
            up = true;
            None
        }
        letter if std::mem::take(&mut up) => Some(letter.to_ascii_uppercase()),
        letter => Some(letter),
    });
    letters.collect()
}

/// Every message whose type ends so, at any depth.
pub(super) fn messages_with_type<'v>(root: &'v Value, ending: &str) -> Vec<&'v Value> {
    all_objects(root).into_iter().filter(|object| object.text_field("@type").ends_with(ending)).collect()
}

/// Every object in a value, itself included.
pub(super) fn all_objects(root: &Value) -> Vec<&Value> {
    let (mut found, mut left) = (Vec::new(), vec![root]);
    while let Some(value) = left.pop() {
        match value {
            Value::Object(fields) => {
                found.push(value);
                left.extend(fields.values());
            }
            Value::Array(members) => left.extend(members),
            _ => {}
        }
    }
    found
}

/// A matcher of header names.
pub(super) enum StringMatcher {
    Exact(String),
    Prefix(String),
    Suffix(String),
    Contains(String),
    /// Must match the whole name.
    Regex(Regex),
    /// A kind that the doctor does not support; it may match any name.
    Unsupported,
}

impl StringMatcher {
    /// Whether the matcher matches a lower-case name, or may match it.
    pub(super) fn may_match(&self, name: &str) -> bool {
        match self {
            StringMatcher::Exact(exact) => exact == name,
            StringMatcher::Prefix(prefix) => name.starts_with(prefix),
            StringMatcher::Suffix(suffix) => name.ends_with(suffix),
            StringMatcher::Contains(part) => name.contains(part),
            StringMatcher::Regex(regex) => regex.is_match(name.as_bytes()),
            StringMatcher::Unsupported => true,
        }
    }

    /// Whether the matcher certainly matches a lower-case name.
    pub(super) fn definitely_matches(&self, name: &str) -> bool {
        !matches!(self, StringMatcher::Unsupported) && self.may_match(name)
    }

    /// Parses a `StringMatcher`. Envoy's header names are lower case, so a matcher with other letters that does not ignore
    /// case matches none.
    fn from_json(matcher: &Value) -> StringMatcher {
        let text = |name: &str| match matcher.field(name) {
            Some(Value::String(text)) if matcher.is_true("ignore_case") => Some(text.to_ascii_lowercase()),
            Some(Value::String(text)) => Some(text.clone()),
            _ => None,
        };
        let regex = || full_match_regex(matcher.field("safe_regex")?.text_field("regex"));
        None.or_else(|| text("exact").map(StringMatcher::Exact))
            .or_else(|| text("prefix").map(StringMatcher::Prefix))
            .or_else(|| text("suffix").map(StringMatcher::Suffix))
            .or_else(|| text("contains").map(StringMatcher::Contains))
            .or_else(|| regex().map(StringMatcher::Regex))
            .unwrap_or(StringMatcher::Unsupported)
    }
}

/// Compiles an expression that must match a whole name. None = it is not supported.
pub(super) fn full_match_regex(regex: &str) -> Option<Regex> {
    let whole = format!("^(?:{regex})$");
    // The classes of RE2 are ASCII by default.
    RegexBuilder::new(&whole).unicode(false).size_limit(MAX_REGEX_BYTES).build().ok()
}

/// Parses the patterns of a `ListStringMatcher`.
pub(super) fn string_matchers(list: &Value) -> Vec<StringMatcher> {
    list.list_field("patterns").iter().map(StringMatcher::from_json).collect()
}

/// Parses a duration in the JSON form of protobuf: `0.25s`.
pub(super) fn parse_proto_duration(text: &str) -> Option<Duration> {
    Duration::try_from_secs_f64(text.strip_suffix('s')?.parse().ok()?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_found_by_either_name() {
        let value = serde_json::json!({"failureModeAllow": true, "stat_prefix": "x", "none": null});
        assert!(value.is_true("failure_mode_allow") && value.text_field("stat_prefix") == "x");
        assert!(value.field("none").is_none());
    }

    #[test]
    fn every_kind_of_pattern_is_told_apart() {
        let takes = |matcher: Value, name: &str| StringMatcher::from_json(&matcher).may_match(name);
        for (matcher, taken, left) in [
            (serde_json::json!({"exact": "x-a"}), "x-a", "x-a-b"),
            (serde_json::json!({"exact": "X-A", "ignore_case": true}), "x-a", "x-b"),
            (serde_json::json!({"prefix": "x-k"}), "x-keyward-user", "x.keyward"),
            (serde_json::json!({"suffix": "-user"}), "x-user", "x-users"),
            (serde_json::json!({"contains": "."}), "x.user", "x-user"),
            (
                serde_json::json!({"safe_regex": {"regex": ".*[^a-z0-9:-].*"}}),
                "x.keyward-user",
                "x-keyward-user",
            ),
            (serde_json::json!({"safeRegex": {"regex": "a|b"}}), "b", "bc"),
        ] {
            assert!(takes(matcher.clone(), taken) && !takes(matcher.clone(), left), "{matcher}");
        }
        for matcher in [serde_json::json!({"custom": {}}), serde_json::json!({"safe_regex": {"regex": "("}})]
        {
            assert!(matches!(StringMatcher::from_json(&matcher), StringMatcher::Unsupported), "{matcher}");
        }
    }

    #[test]
    fn durations_are_read() {
        assert_eq!(parse_proto_duration("0.25s"), Some(Duration::from_millis(250)));
        assert_eq!(
            (parse_proto_duration("1"), parse_proto_duration("-1s"), parse_proto_duration("xs")),
            (None, None, None)
        );
    }
}
