//! The list of all settings with their types, defaults, flags and descriptions, derived from the types in `raw.rs`.
//!
//! The reference page, `keyward config show`, type errors and suggestions for misspelled keys all use this list. A field's doc
//! comment is the description of its key. Its `#[schemars(extend(…))]` attributes are:
//!
//! | attribute | meaning |
//! |---|---|
//! | `"default"` | the default value |
//! | `"x-default"` | the default in words, if it is no fixed value |
//! | `"format"` | what a text must be: `address`, `duration`, `file`, `URL` … |
//! | `"x-unit"` | the unit of a number |
//! | `"x-secret"` | `true` if the value may hold a secret |
//! | `"x-flag"` | the id of the flag, if it differs from the name of the key |
//!
//! Without a default attribute, the comment ends in `Default: …` or has a sentence `Without it …`.

use std::sync::LazyLock;

use clap::Args as _;
use schemars::{Schema, generate::SchemaSettings};
use serde_json::Value;

use crate::domain::credential_mask::mask_value;

use super::{raw::RawServerSettings, server::flags::ServeArgs};

/// A key of the file.
#[derive(Clone, Debug)]
pub(crate) struct SettingKey {
    /// The name with the names of its tables, such as `limits.backend` or, in a list of tables, `listener[].name`.
    pub path: String,
    /// The type of the value for people, such as `duration`.
    pub type_label: String,
    /// The value or behavior if the key is not set.
    pub default: DefaultValue,
    /// The meaning, as one paragraph of Markdown.
    pub description: String,
    /// Whether the value may hold a secret.
    pub is_secret: bool,
    /// The flag that overrides the key, with its dashes.
    pub flag: Option<String>,
    /// The environment variable that overrides the key.
    pub env_var: Option<String>,
    /// The clap id of that flag.
    pub(super) arg_id: Option<String>,
    /// The type of the value in TOML.
    pub(super) value_type: ValueType,
}

/// The type of a value in TOML.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ValueType {
    Text,
    /// A whole number within bounds.
    Integer {
        min: i64,
        /// None = the maximum of TOML.
        max: Option<i64>,
    },
    Number,
    Boolean,
    TextList,
    TableList,
}

impl ValueType {
    fn from_schema(shape: &Value) -> ValueType {
        let kind = match &shape["type"] {
            Value::Array(kinds) => kinds.iter().filter_map(Value::as_str).find(|kind| *kind != "null"),
            kind => kind.as_str(),
        };
        match kind {
            Some("integer") => ValueType::Integer {
                min: shape["minimum"].as_i64().unwrap_or(0),
                max: (shape["format"] == "uint32").then_some(i64::from(u32::MAX)),
            },
            Some("number") => ValueType::Number,
            Some("boolean") => ValueType::Boolean,
            Some("array") if non_null_schema(&shape["items"])["properties"].is_object() => {
                ValueType::TableList
            }
            Some("array") => ValueType::TextList,
            _ => ValueType::Text,
        }
    }

    /// The message for a value of another type; None = it has this type. `is_secret` = the message does not show the value.
    pub(super) fn type_error(self, value: &toml::Value, is_secret: bool) -> Option<String> {
        let fits = match (self, value) {
            (ValueType::Text, toml::Value::String(_))
            | (ValueType::Number, toml::Value::Float(_) | toml::Value::Integer(_))
            | (ValueType::Boolean, toml::Value::Boolean(_)) => true,
            (ValueType::Integer { min, max }, toml::Value::Integer(number)) => {
                *number >= min && max.is_none_or(|max| *number <= max)
            }
            (ValueType::TextList, toml::Value::Array(list)) => list.iter().all(toml::Value::is_str),
            (ValueType::TableList, toml::Value::Array(list)) => list.iter().all(toml::Value::is_table),
            _ => false,
        };
        let wanted = match self {
            ValueType::Text => "must be text, in quotes".to_owned(),
            ValueType::Integer { min, max: Some(max) } => {
                format!("must be a whole number from {min} to {max}")
            }
            ValueType::Integer { min, max: None } => {
                format!("must be a whole number of {min} or more")
            }
            ValueType::Number => "must be a number".to_owned(),
            ValueType::Boolean => "must be true or false, without quotes".to_owned(),
            ValueType::TextList => "must be a list of texts, such as [\"one\", \"two\"]".to_owned(),
            ValueType::TableList => "must be a list of tables".to_owned(),
        };
        let shown = match value {
            _ if is_secret => String::new(),
            toml::Value::Array(_) | toml::Value::Table(_) => String::new(),
            toml::Value::String(text) => format!("= {:?} ", mask_value(text)),
            value => format!("= {value} "),
        };
        (!fits).then(|| format!("{shown}{wanted}"))
    }
}

/// The value or behavior if a key is not set.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum DefaultValue {
    /// A fixed value.
    Value(Value),
    /// A description, if there is no fixed value.
    Description(String),
    /// The key must be set.
    Required,
}

/// A table of the file with its keys.
#[derive(Clone, Debug)]
pub(crate) struct SettingsTable {
    /// The name: empty = the top level, `listener[]` = each table of a list.
    pub path: String,
    /// The purpose, as one paragraph of Markdown.
    pub description: String,
    /// The keys in the order of the type's fields.
    pub keys: Vec<SettingKey>,
}

/// Every table with its keys; the top level comes first.
pub(crate) fn all_tables() -> &'static [SettingsTable] {
    static TABLES: LazyLock<Vec<SettingsTable>> = LazyLock::new(build_tables);
    &TABLES
}

pub(crate) fn all_keys() -> impl Iterator<Item = &'static SettingKey> {
    all_tables().iter().flat_map(|section| &section.keys)
}

#[must_use]
pub(super) fn find_table(path: &str) -> Option<&'static SettingsTable> {
    all_tables().iter().find(|section| section.path == path)
}

/// The key with this path, with or without the `[]` of lists.
#[must_use]
pub(super) fn find_key_ignoring_lists(path: &str) -> Option<&'static SettingKey> {
    all_keys().find(|key| key.path == path || key.path.replace("[]", "") == path)
}

#[must_use]
pub(crate) fn find_key(path: &str) -> Option<&'static SettingKey> {
    all_keys().find(|key| key.path == path)
}

/// The JSON Schema of the file, for editors.
#[must_use]
pub(crate) fn json_schema() -> Schema {
    let settings =
        SchemaSettings::draft2020_12().for_deserialize().with(|settings| settings.inline_subschemas = true);
    settings.into_generator().into_root_schema_for::<RawServerSettings>()
}

fn build_tables() -> Vec<SettingsTable> {
    let flags = ServeArgs::augment_args(clap::Command::new("serve"));
    let mut sections = Vec::new();
    collect_table("", json_schema().as_value(), &flags, &mut sections);
    sections
}

/// Adds a table, then the tables inside it.
fn collect_table(path: &str, schema: &Value, flags: &clap::Command, into: &mut Vec<SettingsTable>) {
    let at = into.len();
    into.push(SettingsTable {
        path: path.to_owned(),
        description: description_text(schema),
        keys: Vec::new(),
    });
    let required: Vec<&str> =
        schema["required"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
    let mut tables = Vec::new();
    for (name, schema) in schema["properties"].as_object().into_iter().flatten() {
        let path = if path.is_empty() { name.clone() } else { format!("{path}.{name}") };
        let shape = non_null_schema(schema);
        if shape["properties"].is_object() {
            tables.push((path, with_field_description(schema, shape)));
            continue;
        }
        into[at].keys.push(build_key(&path, schema, required.contains(&name.as_str()), flags));
        let items = non_null_schema(&shape["items"]);
        if items["properties"].is_object() {
            tables.push((format!("{path}[]"), with_field_description(schema, items)));
        }
    }
    for (path, schema) in tables {
        collect_table(&path, &schema, flags, into);
    }
}

/// The schema of a table with the description of its field, which takes precedence over that of its type.
fn with_field_description(field: &Value, table: &Value) -> Value {
    let mut schema = table.clone();
    if let Some(description) = field.get("description") {
        schema["description"] = description.clone();
    }
    schema
}

/// The schema of the value of an optional field.
fn non_null_schema(schema: &Value) -> &Value {
    let ways = schema["anyOf"].as_array().into_iter().flatten();
    ways.into_iter().find(|way| way["type"] != "null").unwrap_or(schema)
}

fn build_key(path: &str, schema: &Value, required: bool, flags: &clap::Command) -> SettingKey {
    let shape = non_null_schema(schema);
    let (description, default_words) = split_description(schema);
    let default = match (schema.get("default"), schema["x-default"].as_str()) {
        (_, Some(words)) => DefaultValue::Description(words.to_owned()),
        (Some(value), None) => DefaultValue::Value(value.clone()),
        (None, None) if required => DefaultValue::Required,
        (None, None) => DefaultValue::Description(default_words.unwrap_or_else(|| "none".to_owned())),
    };
    let name = schema["x-flag"].as_str().map_or_else(|| path.replace('.', "_"), str::to_owned);
    let argument = flags.get_arguments().find(|argument| argument.get_id() == name.as_str());
    let flag = argument.and_then(|argument| argument.get_long());
    let variable = argument.and_then(|argument| argument.get_env());
    SettingKey {
        path: path.to_owned(),
        value_type: ValueType::from_schema(shape),
        type_label: describe_type(schema, shape),
        default,
        description,
        is_secret: schema["x-secret"] == true,
        flag: flag.map(|flag| format!("--{flag}")),
        env_var: variable.map(|variable| variable.to_string_lossy().into_owned()),
        arg_id: argument.map(|_| name),
    }
}

/// The type of a value for people.
fn describe_type(field: &Value, shape: &Value) -> String {
    let words = |schema: &Value| {
        schema["enum"].as_array().cloned().or_else(|| {
            let ways = schema["oneOf"].as_array()?;
            ways.iter().map(|way| way.get("const").cloned()).collect()
        })
    };
    if let Some(words) = words(shape) {
        let words = words.iter().filter_map(Value::as_str).map(|word| format!("`{word}`"));
        return words.collect::<Vec<_>>().join(", ");
    }
    let unit = field["x-unit"].as_str().map(|unit| format!(", {unit}")).unwrap_or_default();
    let kind = match &shape["type"] {
        Value::Array(kinds) => kinds.iter().filter_map(Value::as_str).find(|kind| *kind != "null"),
        kind => kind.as_str(),
    };
    match kind {
        Some("string") => field["format"].as_str().map_or_else(|| "text".to_owned(), str::to_owned) + &unit,
        Some("array") => {
            let items = non_null_schema(&shape["items"]);
            if items["properties"].is_object() {
                "list of tables".to_owned()
            } else {
                format!("list of {}", describe_item_type(items))
            }
        }
        Some(kind) => format!("{kind}{unit}"),
        None => "value".to_owned(),
    }
}

fn describe_item_type(items: &Value) -> String {
    describe_type(items, items)
}

/// Splits a key's doc comment into its meaning and the default after `Default: `.
fn split_description(schema: &Value) -> (String, Option<String>) {
    let whole = description_text(schema);
    match whole.split_once(" Default: ") {
        Some((meaning, default)) => (meaning.to_owned(), Some(default.trim_end_matches('.').to_owned())),
        None => (whole, None),
    }
}

/// A doc comment as one paragraph.
fn description_text(schema: &Value) -> String {
    schema["description"].as_str().unwrap_or_default().split_whitespace().collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_key_says_what_it_means_and_what_holds_without_it() {
        let mut wrong = Vec::new();
        for key in all_keys() {
            let said = key.default != DefaultValue::Description("none".to_owned())
                || key.description.contains("Without it");
            for (good, problem) in [
                (key.description.len() > 10, "its field has no doc comment"),
                (said, "its default is missing"),
                (key.type_label != "value", "its type is unknown"),
            ] {
                wrong.extend((!good).then(|| format!("{}: {problem}", key.path)));
            }
        }
        assert!(wrong.is_empty(), "{wrong:#?}");
        for section in all_tables().iter().skip(1) {
            assert!(section.description.len() > 10, "[{}]: its description is missing", section.path);
        }
    }

    #[test]
    fn a_key_knows_its_flag_and_variable() {
        let url = find_key("limits.url").unwrap();
        assert_eq!(
            (url.flag.as_deref(), url.env_var.as_deref()),
            (Some("--limits-url"), Some("KEYWARD_LIMITS_URL"))
        );
        assert!(url.is_secret);
        assert_eq!(find_key("retention_days").unwrap().flag, None);
        assert_eq!(find_key("threads").unwrap().type_label, "integer");
    }

    #[test]
    fn a_key_of_a_list_of_tables_is_known_by_its_table() {
        assert_eq!(find_key("environments").unwrap().type_label, "list of tables");
        assert_eq!(find_key("environments[].tag").unwrap().type_label, "text");
    }

    #[test]
    fn every_flag_of_the_server_belongs_to_a_key_or_is_named_here() {
        const ALONE: [&str; 6] =
            ["config", "log", "log_format", "otel_endpoint", "otel_service_name", "require_revision"];
        let flags = ServeArgs::augment_args(clap::Command::new("serve"));
        for argument in flags.get_arguments() {
            let id = argument.get_id().as_str();
            let known = all_keys().any(|key| key.arg_id.as_deref() == Some(id));
            assert!(known != ALONE.contains(&id), "{id}");
        }
    }
}
