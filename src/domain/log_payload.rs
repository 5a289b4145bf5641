//! Encodes the payload of a log entry, and decodes it without digests for readers. The payload is the record after the
//! change, plus the change's origin.
//!
//! The origin is a field of the record, named `via`. A reader that does not know the field ignores it, and the hash
//! covers the whole text. So different versions read and verify each other's entries without a new column.

use serde_json::{Map, Value};

use super::log::RecordChange;

pub use super::{
    change_origin::{ArchivedRange, ChangeOrigin},
    log_position::HexPosition,
};

/// The field of the record's JSON that holds the origin. No record has a field of this name.
const ORIGIN_FIELD: &str = "via";

/// Encodes the payload of an entry.
///
/// # Errors
/// Never in practice: every record has a JSON form.
pub fn encode_payload(change: &RecordChange, via: &ChangeOrigin) -> Result<String, serde_json::Error> {
    let mut text = serde_json::to_string(change)?;
    // A change is an object with one field, the record, so its text ends with two braces. Every record has fields, so
    // another field can follow after a comma.
    if *via != ChangeOrigin::UNKNOWN && text.ends_with("}}") {
        text.truncate(text.len() - 2);
        text.push_str(",\"");
        text.push_str(ORIGIN_FIELD);
        text.push_str("\":");
        text.push_str(&serde_json::to_string(via)?);
        text.push_str("}}");
    }
    Ok(text)
}

/// A payload for display.
#[derive(Clone, Debug, PartialEq)]
pub struct RedactedPayload {
    /// The kind of the change, as [`RecordChange`] serializes it.
    pub kind: String,
    /// The record's fields, without digests.
    pub record: Map<String, Value>,
    /// The circumstances of the change.
    pub origin: ChangeOrigin,
}

/// A field whose value differs after a change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FieldChange {
    /// The name of the field.
    pub field: String,
    /// The old value as JSON; None = the field had no value.
    pub before: Option<String>,
    /// The new value as JSON; None = the field has no value.
    pub after: Option<String>,
}

impl RedactedPayload {
    /// Parses a payload, also of a newer version. None = the text is no payload.
    #[must_use]
    pub fn parse(payload: &str) -> Option<RedactedPayload> {
        let Value::Object(kinds) = serde_json::from_str(payload).ok()? else { return None };
        let (kind, Value::Object(mut record)) = kinds.into_iter().next()? else { return None };
        let via =
            record.remove(ORIGIN_FIELD).and_then(|via| serde_json::from_value(via).ok()).unwrap_or_default();
        record.values_mut().for_each(remove_digests);
        Some(RedactedPayload { kind, record, origin: via })
    }

    /// The record as JSON under its kind.
    #[must_use]
    pub fn to_json(&self) -> String {
        let mut kinds = Map::new();
        kinds.insert(self.kind.clone(), Value::Object(self.record.clone()));
        Value::Object(kinds).to_string()
    }

    /// Whether the record is gone after the change.
    fn removes_record(&self) -> bool {
        matches!(self.kind.as_str(), "role_deleted" | "member_removed")
    }

    /// Compares with the previous entry of the same record; None = the record did not exist.
    #[must_use]
    pub fn changes_since(&self, before: Option<&RedactedPayload>) -> Vec<FieldChange> {
        let none = Map::new();
        let before = before.filter(|before| !before.removes_record()).map_or(&none, |before| &before.record);
        let after = if self.removes_record() { &none } else { &self.record };
        let mut names: Vec<_> = before.keys().chain(after.keys()).collect();
        names.sort();
        names.dedup();
        let text = |value: Option<&Value>| value.filter(|value| !is_empty_value(value)).map(Value::to_string);
        names
            .into_iter()
            .filter(|name| name.as_str() != "revision")
            .map(|name| FieldChange {
                field: name.clone(),
                before: text(before.get(name)),
                after: text(after.get(name)),
            })
            .filter(|change| change.before != change.after)
            .collect()
    }
}

/// Whether a value is the same as no value.
fn is_empty_value(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Array(items) => items.is_empty(),
        Value::Object(fields) => fields.is_empty(),
        _ => false,
    }
}

fn remove_digests(value: &mut Value) {
    match value {
        Value::Object(fields) => {
            fields.remove("digest");
            fields.values_mut().for_each(remove_digests);
        }
        Value::Array(items) => items.iter_mut().for_each(remove_digests),
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::domain::{key::tests::sample_key, time::Revision};

    fn via() -> ChangeOrigin {
        ChangeOrigin {
            request_id: Some("r-1".to_owned()),
            peer: Some("::1".to_owned()),
            previous: Some(Revision(3)),
            archived: None,
        }
    }

    #[test]
    fn who_does_not_know_how_a_change_came_about_reads_the_record_all_the_same() {
        let change = RecordChange::Key(Arc::new(sample_key()));
        let text = encode_payload(&change, &via()).unwrap();
        assert_eq!(serde_json::from_str::<RecordChange>(&text).unwrap(), change);
        assert_eq!(RedactedPayload::parse(&text).unwrap().origin, via());
        let plain = serde_json::to_string(&change).unwrap();
        assert_eq!(
            RedactedPayload::parse(&plain).unwrap().origin,
            ChangeOrigin::UNKNOWN,
            "an entry of before"
        );
    }

    #[test]
    fn no_digest_is_told() {
        let text = r#"{"key":{"id":"x","secrets":[{"version":1,"digest":"ab"},{"digest":"cd"}]}}"#;
        assert_eq!(
            RedactedPayload::parse(text).unwrap().to_json(),
            r#"{"key":{"id":"x","secrets":[{"version":1},{}]}}"#
        );
    }

    #[test]
    fn a_change_is_told_field_by_field() {
        let parse = |text: &str| RedactedPayload::parse(text).unwrap();
        let change = |field: &str, before: Option<&str>, after: Option<&str>| FieldChange {
            field: field.to_owned(),
            before: before.map(str::to_owned),
            after: after.map(str::to_owned),
        };
        let first = parse(r#"{"role":{"name":"a","scopes":["x"],"revision":1}}"#);
        let second = parse(r#"{"role":{"name":"a","scopes":["x","y"],"revision":2}}"#);
        let gone = parse(r#"{"role_deleted":{"name":"a","scopes":["x","y"],"revision":3}}"#);
        assert_eq!(
            second.changes_since(Some(&first)),
            [change("scopes", Some(r#"["x"]"#), Some(r#"["x","y"]"#))]
        );
        assert_eq!(first.changes_since(None).len(), 2, "all that it has");
        assert_eq!(gone.changes_since(Some(&second))[0], change("name", Some(r#""a""#), None));
        assert_eq!(first.changes_since(Some(&gone)).len(), 2, "made anew");
    }
}
