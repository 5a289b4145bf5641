//! An entry's payload: the record after the change, and beside it how the change came about. And what its readers see of
//! it: which fields changed, without digests.
//!
//! What is beside the record stands inside it, under `via`: whoever does not know that name reads the record and
//! passes over the rest, and the hash covers the whole text. So processes of different versions read and verify each
//! other's entries, and what is new here needs no column.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::{lease::Position, log::Change, time::Revision};

/// Where in the record's JSON it says how the change came about. No record has a field of this name.
const VIA: &str = "via";

/// How a change came about.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Via {
    /// The call's id, as its caller or the gate named it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub request_id: Option<String>,
    /// The address that the call came from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub peer: Option<String>,
    /// The entry before about the same record; 0 = it did not exist. None in entries of before this was kept.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub previous: Option<Revision>,
    /// What was archived, in the entry that says so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub archived: Option<Archived>,
}

impl Via {
    /// Nothing is known.
    pub const NONE: Via = Via { request_id: None, peer: None, previous: None, archived: None };
}

/// Entries that left the log for a file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Archived {
    /// The last of them: the chain goes on from its hash.
    #[serde(flatten)]
    pub upto: Upto,
    /// How many this file took.
    pub entries: u64,
    /// SHA-256 of the file, in hex.
    pub file_sha256: String,
}

/// A place in the chain, as JSON says it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Upto {
    /// The entry's revision.
    pub revision: Revision,
    /// Its hash, in hex.
    pub hash: String,
}

impl From<Position> for Upto {
    fn from(at: Position) -> Self {
        Upto { revision: at.revision, hash: super::token::Hex(&at.hash).to_string() }
    }
}

impl Upto {
    /// The place, if the hash is one.
    #[must_use]
    pub fn position(&self) -> Option<Position> {
        Some(Position { revision: self.revision, hash: super::token::from_hex(&self.hash)? })
    }
}

/// The payload of an entry.
///
/// # Errors
/// When the record cannot be said in JSON: no record is so.
pub fn payload(change: &Change, via: &Via) -> Result<String, serde_json::Error> {
    let mut text = serde_json::to_string(change)?;
    // A change is an object with one field, the record: it ends with the record's brace and its own. Every record has
    // fields, so that another one follows.
    if *via != Via::NONE && text.ends_with("}}") {
        text.truncate(text.len() - 2);
        text.push_str(",\"");
        text.push_str(VIA);
        text.push_str("\":");
        text.push_str(&serde_json::to_string(via)?);
        text.push_str("}}");
    }
    Ok(text)
}

/// A payload, read for people.
#[derive(Clone, Debug, PartialEq)]
pub struct Told {
    /// What kind of change, as [`Change`] names it.
    pub kind: String,
    /// The record, without digests.
    pub record: Map<String, Value>,
    /// How it came about.
    pub via: Via,
}

/// One field that a change changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FieldChange {
    /// Its name.
    pub field: String,
    /// Its value before, as JSON; None = it had none.
    pub before: Option<String>,
    /// Its value after.
    pub after: Option<String>,
}

impl Told {
    /// Reads a payload, also one of a newer version. None = it is none.
    #[must_use]
    pub fn read(payload: &str) -> Option<Told> {
        let Value::Object(kinds) = serde_json::from_str(payload).ok()? else { return None };
        let (kind, Value::Object(mut record)) = kinds.into_iter().next()? else { return None };
        let via = record.remove(VIA).and_then(|via| serde_json::from_value(via).ok()).unwrap_or_default();
        record.values_mut().for_each(without_digests);
        Some(Told { kind, record, via })
    }

    /// The record as JSON under its kind.
    #[must_use]
    pub fn detail(&self) -> String {
        let mut kinds = Map::new();
        kinds.insert(self.kind.clone(), Value::Object(self.record.clone()));
        Value::Object(kinds).to_string()
    }

    /// Whether the record is gone after the change.
    fn ends(&self) -> bool {
        matches!(self.kind.as_str(), "role_deleted" | "member_removed")
    }

    /// What the change changed, given the entry before about the same record; none = the record did not exist.
    #[must_use]
    pub fn changes(&self, before: Option<&Told>) -> Vec<FieldChange> {
        let none = Map::new();
        let before = before.filter(|before| !before.ends()).map_or(&none, |before| &before.record);
        let after = if self.ends() { &none } else { &self.record };
        let mut names: Vec<_> = before.keys().chain(after.keys()).collect();
        names.sort();
        names.dedup();
        let text = |value: Option<&Value>| value.filter(|value| !is_empty(value)).map(Value::to_string);
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

/// What a record says of a field that it has not.
fn is_empty(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Array(items) => items.is_empty(),
        Value::Object(fields) => fields.is_empty(),
        _ => false,
    }
}

fn without_digests(value: &mut Value) {
    match value {
        Value::Object(fields) => {
            fields.remove("digest");
            fields.values_mut().for_each(without_digests);
        }
        Value::Array(items) => items.iter_mut().for_each(without_digests),
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::domain::key::tests::sample;

    fn via() -> Via {
        Via {
            request_id: Some("r-1".to_owned()),
            peer: Some("::1".to_owned()),
            previous: Some(Revision(3)),
            archived: None,
        }
    }

    #[test]
    fn who_does_not_know_how_a_change_came_about_reads_the_record_all_the_same() {
        let change = Change::Key(Arc::new(sample()));
        let text = payload(&change, &via()).unwrap();
        assert_eq!(serde_json::from_str::<Change>(&text).unwrap(), change);
        assert_eq!(Told::read(&text).unwrap().via, via());
        let plain = serde_json::to_string(&change).unwrap();
        assert_eq!(Told::read(&plain).unwrap().via, Via::NONE, "an entry of before");
    }

    #[test]
    fn no_digest_is_told() {
        let text = r#"{"key":{"id":"x","secrets":[{"version":1,"digest":"ab"},{"digest":"cd"}]}}"#;
        assert_eq!(Told::read(text).unwrap().detail(), r#"{"key":{"id":"x","secrets":[{"version":1},{}]}}"#);
    }

    #[test]
    fn a_change_is_told_field_by_field() {
        let told = |text: &str| Told::read(text).unwrap();
        let change = |field: &str, before: Option<&str>, after: Option<&str>| FieldChange {
            field: field.to_owned(),
            before: before.map(str::to_owned),
            after: after.map(str::to_owned),
        };
        let first = told(r#"{"role":{"name":"a","scopes":["x"],"revision":1}}"#);
        let second = told(r#"{"role":{"name":"a","scopes":["x","y"],"revision":2}}"#);
        let gone = told(r#"{"role_deleted":{"name":"a","scopes":["x","y"],"revision":3}}"#);
        assert_eq!(second.changes(Some(&first)), [change("scopes", Some(r#"["x"]"#), Some(r#"["x","y"]"#))]);
        assert_eq!(first.changes(None).len(), 2, "all that it has");
        assert_eq!(gone.changes(Some(&second))[0], change("name", Some(r#""a""#), None));
        assert_eq!(first.changes(Some(&gone)).len(), 2, "made anew");
    }
}
