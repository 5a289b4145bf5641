//! `keyward config`: shows a server's settings with their sources, and validates configuration files.
//!
//! It calls no server and opens no database: it reads the same files as a server, with the server's own code.

use std::{
    fmt::Write as _,
    path::{Path, PathBuf},
};

use clap::{Args, Subcommand};
use serde_json::json;

use super::{
    console::Console,
    error::{CliError, EXIT_REFUSED},
    table::escape_terminal,
};
use crate::config::{
    client::{ClientArgs, ClientSettings, OutputFormat},
    effective::{self, EffectiveSetting, EffectiveValue, SettingOrigin, WithSources},
    error::ConfigProblem,
    file::ConfigFile,
    reference_page, schema,
    server::{ConfigError, ServeArgs, ServerSettings, error_headline},
};
use crate::domain::text::escape_json;

#[derive(Debug, Args)]
pub(super) struct ConfigCommandArgs {
    #[command(subcommand)]
    command: ConfigCommand,
    /// The format of the output [default: table]
    #[arg(long, global = true, value_enum, value_name = "FORMAT")]
    output: Option<OutputFormat>,
}

#[derive(Debug, Subcommand)]
enum ConfigCommand {
    /// Show every setting in force with its source; takes the flags of `keyward serve`
    #[command(
        after_help = "The output is a valid configuration file, except for secrets, which are never shown.\n\n\
                            Exit codes: 0 done; 1 a setting is wrong; 2 the file cannot be read."
    )]
    Show(Box<WithSources<ServeArgs>>),
    /// Check whether a server would accept a file, and list every problem in it
    #[command(after_help = "Flags and the environment apply as for `keyward serve`.\n\n\
                            Exit codes: 0 accepted; 1 refused; 2 the file cannot be read.")]
    Check {
        /// The configuration file [default: the one of --config]
        file: Option<PathBuf>,
        #[command(flatten)]
        serve: Box<ServeArgs>,
    },
    /// Print the reference page of all settings, in Markdown
    Reference,
    /// Print a JSON Schema of the file, for editors
    Schema,
}

/// Runs the command. `outer` has the flags before the command's name.
pub(super) fn run(args: ConfigCommandArgs, outer: ClientArgs, console: &mut Console) -> Result<u8, CliError> {
    let output = ClientArgs { output: args.output.or(outer.output), ..ClientArgs::default() };
    let json = ClientSettings::load(output)?.output == OutputFormat::Json;
    match args.command {
        ConfigCommand::Show(sources) => {
            let document = read_document(sources.args.database.config.as_deref())?;
            let in_force = ServerSettings::resolve_for_serving(&sources.args, document.as_ref())
                .map_err(config_file_error)?;
            let settings = effective::effective_settings(&sources, document.as_ref(), &in_force);
            console.print(&if json { format_json(&settings) } else { format_toml(&settings) })?;
        }
        ConfigCommand::Check { file, serve } => {
            let checked = check_file(file, *serve)?;
            console.print(&if json { checked.to_json() } else { checked.to_text() })?;
            return Ok(if checked.problems.is_empty() { 0 } else { EXIT_REFUSED });
        }
        ConfigCommand::Reference => console.print(&reference_page::render_reference())?,
        ConfigCommand::Schema => {
            console.print(&format!("{:#}\n", schema::json_schema().as_value()))?;
        }
    }
    Ok(0)
}

fn read_document(path: Option<&Path>) -> Result<Option<ConfigFile>, CliError> {
    path.map(|path| ConfigFile::load(path).map_err(config_file_error)).transpose()
}

/// An unreadable file exits as unanswered, an invalid one as refused.
pub(super) fn config_file_error(error: ConfigError) -> CliError {
    match error {
        ConfigError::Unreadable { .. } => CliError::new(error.to_string()),
        ConfigError::Invalid { path, problems } => {
            CliError::refused(error_headline(path.as_deref())).with_details(format_problems(&problems))
        }
    }
}

fn format_problems(problems: &[ConfigProblem]) -> Vec<String> {
    problems.iter().map(ToString::to_string).collect()
}

struct ConfigCheckReport {
    path: String,
    problems: Vec<String>,
    warnings: Vec<String>,
}

fn check_file(file: Option<PathBuf>, mut serve: ServeArgs) -> Result<ConfigCheckReport, CliError> {
    let Some(path) = file.or(serve.database.config) else {
        return Err(CliError::new("no configuration file is named: give its path, or set KEYWARD_CONFIG"));
    };
    serve.database.config = Some(path.clone());
    let read = ConfigFile::load(&path).and_then(|document| {
        ServerSettings::resolve_for_serving(&serve, Some(&document)).map(|_settings| document)
    });
    let path = path.display().to_string();
    match read {
        Err(error @ ConfigError::Unreadable { .. }) => Err(config_file_error(error)),
        Err(ConfigError::Invalid { problems, .. }) => {
            Ok(ConfigCheckReport { path, problems: format_problems(&problems), warnings: Vec::new() })
        }
        Ok(document) => Ok(ConfigCheckReport {
            path,
            problems: Vec::new(),
            warnings: effective::password_warnings(&document),
        }),
    }
}

impl ConfigCheckReport {
    fn to_text(&self) -> String {
        let verdict = if self.problems.is_empty() { "accepted" } else { "refused" };
        let mut text = format!("{}: {verdict}\n", escape_terminal(&self.path));
        for (level, lines) in [("", &self.problems), ("warning: ", &self.warnings)] {
            for line in lines {
                // Writing to a String cannot fail.
                let _ = writeln!(text, "  {level}{}", escape_terminal(line));
            }
        }
        text
    }

    fn to_json(&self) -> String {
        let accepted = self.problems.is_empty();
        let ConfigCheckReport { path, problems, warnings } = self;
        let all = json!({ "file": path, "accepted": accepted, "problems": problems, "warnings": warnings });
        escape_json(format!("{all:#}\n"))
    }
}

/// Formats the settings as a configuration file. Settings without a value, and secrets, are comments.
fn format_toml(settings: &[EffectiveSetting]) -> String {
    let (mut text, mut table) = (String::new(), "");
    for EffectiveSetting { key, value, origin } in settings {
        // A file's path may contain control characters.
        let origin = escape_terminal(&origin.to_string());
        let (of, name) = key.path.rsplit_once('.').unwrap_or(("", &key.path));
        if of != table {
            table = of;
            // An empty table can enable a feature, so a table without set values is a comment.
            let in_table = settings.iter().filter(|setting| setting.key.path.starts_with(&format!("{of}.")));
            let is_set =
                in_table.into_iter().any(|setting| !matches!(setting.value, EffectiveValue::Description(_)));
            let _ = writeln!(text, "\n{}[{of}]", if is_set { "" } else { "# " });
        }
        let line = match value {
            EffectiveValue::Value(value) => format!("{name} = {}", effective::in_one_line(value)),
            EffectiveValue::Redacted(shown) => {
                format!("# {name} = {}  (set, from {origin})", escape_terminal(shown))
            }
            EffectiveValue::Description(words) => format!("# {name}: {}", escape_terminal(words)),
        };
        let _ = writeln!(text, "{line:<48} # {origin}");
    }
    text
}

fn format_json(settings: &[EffectiveSetting]) -> String {
    let one = |EffectiveSetting { key, value, origin }: &EffectiveSetting| {
        let hidden = matches!(value, EffectiveValue::Redacted(_));
        let (value, text) = match value {
            EffectiveValue::Value(value) => (json!(value), None),
            EffectiveValue::Redacted(text) | EffectiveValue::Description(text) => (json!(null), Some(text)),
        };
        let origin = match origin {
            SettingOrigin::Default => json!({ "kind": "default" }),
            SettingOrigin::File { path, line } => json!({ "kind": "file", "file": path, "line": line }),
            SettingOrigin::Environment(name) => json!({ "kind": "environment", "name": name }),
            SettingOrigin::Flag(name) => json!({ "kind": "flag", "name": name }),
        };
        json!({ "key": key.path, "value": value, "hidden": hidden, "said": text, "origin": origin })
    };
    escape_json(format!("{:#}\n", json!({ "settings": settings.iter().map(one).collect::<Vec<_>>() })))
}
