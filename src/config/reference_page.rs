//! The reference page of the settings, made from [`keys`]: `docs/configuration.md`.

use std::fmt::Write as _;

use super::schema::{self, DefaultValue, SettingKey, SettingsTable};

const PREAMBLE: &str = "\
# Configuration
<!-- Made by `keyward config reference`. Change the comments of the settings in src/config, not this page. -->

`keyward serve --config FILE` reads one TOML file. A flag beats an environment variable, which beats the file, which
beats the default. The file is optional, and so is every key unless it says otherwise. An empty environment variable counts
as absent. A truth value in the environment is `1`, `true`, `yes`, `on` or `0`, `false`, `no`, `off`.

What a server cannot use stops its start before anything is opened: unknown keys, wrong values, plaintext beyond this machine,
files that cannot be read or do not fit together, folders that do not exist, host names without an address. `keyward config check`,
`keyward config show` and `keyward serve` judge alike and report every problem at once, each with its line, variable or flag.
What only an open database or socket shows, such as an address in use, `serve` reports alone. Commands that only open the
database judge the values, and need none of the server's files.

```sh
keyward config check keyward.toml   # would it be accepted? exit code 0 yes, 1 no, 2 it cannot be read
keyward config show                 # every setting in force and where it comes from; takes the flags of serve
keyward config schema               # a JSON Schema of the file, for editors
```

A *duration* is whole numbers with units, longest first: `500ms`, `20s`, `1h30m`, `90d`. An *address* is `host:port`. A
*file* is a path from the working directory. A secret never stands in the arguments, which other processes can read, and
better not in the file: keep a password in its own file or an environment variable. In a URL it is percent-encoded: `#`
is `%23`, `/` is `%2F`, `?` is `%3F`, `@` is `%40`. A URL that can be read in more than one way is refused, and nothing of it
is looked up or shown. `keyward config show` shows no secret, only that one is set and by what.

Not in the file: `--config` (`KEYWARD_CONFIG`), `--log` (`KEYWARD_LOG`, default `info`), `--log-format`
(`KEYWARD_LOG_FORMAT`, default `text`), `--require-revision` (`KEYWARD_REQUIRE_REVISION`, for the start on a restored
backup). `OTEL_EXPORTER_OTLP_ENDPOINT` and `OTEL_SERVICE_NAME` count where nothing else says.
";

/// The page.
#[must_use]
pub(crate) fn render_reference() -> String {
    schema::all_tables().iter().fold(PREAMBLE.to_owned(), |mut page, section| {
        write_table(&mut page, section);
        page
    })
}

fn write_table(page: &mut String, section: &SettingsTable) {
    let title = match section.path.strip_suffix("[]") {
        _ if section.path.is_empty() => "The file".to_owned(),
        Some(list) => format!("`[[{list}]]`", list = list.replace("[]", "")),
        None => format!("`[{path}]`", path = section.path.replace("[]", "")),
    };
    // Writing to a String does not fail.
    let _ = writeln!(page, "\n## {title}\n{}\n", section.description);
    let _ = writeln!(page, "| Key | Type | Default | Meaning | Flag, environment |\n|---|---|---|---|---|");
    for key in &section.keys {
        let name = key.path.rsplit('.').next().unwrap_or_default();
        let row = [
            format!("`{name}`"),
            key.type_label.clone(),
            default_cell(key),
            key.description.clone(),
            override_cell(key),
        ];
        let _ = writeln!(page, "| {} |", row.map(|cell| cell.replace('|', "\\|")).join(" | "));
    }
}

fn default_cell(key: &SettingKey) -> String {
    match &key.default {
        DefaultValue::Value(value) => match toml::Value::try_from(value) {
            Ok(value) => format!("`{value}`"),
            Err(_) => format!("`{value}`"),
        },
        DefaultValue::Description(words) => words.clone(),
        DefaultValue::Required => "must be set".to_owned(),
    }
}

fn override_cell(key: &SettingKey) -> String {
    let names = [&key.flag, &key.env_var];
    names.into_iter().flatten().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_in_the_repository_is_the_one_that_is_made() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/configuration.md");
        let kept = std::fs::read_to_string(path).unwrap_or_default();
        assert!(kept == render_reference(), "out of date: keyward config reference >docs/configuration.md");
    }

    #[test]
    fn every_table_has_a_heading_and_every_key_a_row() {
        let page = render_reference();
        for said in [
            "## `[limits]`",
            "## `[[environments]]`",
            "| `on_backend_failure` | ",
            "`--limits-url`, `KEYWARD_LIMITS_URL`",
        ] {
            assert!(page.contains(said), "{said}");
        }
    }
}
