//! `keyward config`: what a server's settings are, where each comes from, and whether a file would be accepted. It
//! speaks to no server and opens no database: it reads what a server would read, with the server's own code.

use std::{
    fmt::Write as _,
    path::{Path, PathBuf},
};

use clap::{Args, Subcommand};
use serde_json::json;

use super::{
    console::Console,
    failure::{Failure, REFUSED},
    table::clean,
};
use crate::config::{
    client::{ClientArgs, ClientSettings, Output},
    document::Document,
    effective::{self, Effective, Origin, Setting, WithSources},
    keys,
    problems::Problem,
    reference,
    server::{ConfigError, ServeArgs, Settings, headline},
};
use crate::domain::text::escape_json;

/// `keyward config ...`.
#[derive(Debug, Args)]
pub(super) struct ConfigArgs {
    #[command(subcommand)]
    command: ConfigCommand,
    /// How to print the answer [default: table]
    #[arg(long, global = true, value_enum, value_name = "FORMAT")]
    output: Option<Output>,
}

#[derive(Debug, Subcommand)]
enum ConfigCommand {
    /// Show every setting in force, and where it comes from; takes what `keyward serve` takes
    #[command(
        after_help = "What is shown can be used as a file again, but for secrets, which are never shown.\n\n\
                            Exit codes: 0 done; 1 a setting is wrong; 2 the file cannot be read."
    )]
    Show(Box<WithSources<ServeArgs>>),
    /// Say whether a server would accept a file, and everything that is wrong with it
    #[command(after_help = "Flags and the environment count, as for `keyward serve`.\n\n\
                            Exit codes: 0 accepted; 1 refused; 2 the file cannot be read.")]
    Check {
        /// The file [default: the one of --config]
        file: Option<PathBuf>,
        #[command(flatten)]
        serve: Box<ServeArgs>,
    },
    /// Print the reference page of all settings, in Markdown
    Reference,
    /// Print a JSON Schema of the file, for editors
    Schema,
}

/// Runs the command; `outer` are flags before its name.
pub(super) fn run(args: ConfigArgs, outer: ClientArgs, console: &mut Console) -> Result<u8, Failure> {
    let output = ClientArgs { output: args.output.or(outer.output), ..ClientArgs::default() };
    let json = ClientSettings::load(output)?.output == Output::Json;
    match args.command {
        ConfigCommand::Show(sources) => {
            let document = read(sources.args.database.config.as_deref())?;
            let in_force = Settings::to_serve(&sources.args, document.as_ref()).map_err(wrong)?;
            let settings = effective::settings(&sources, document.as_ref(), &in_force);
            console.print(&if json { as_json(&settings) } else { as_toml(&settings) })?;
        }
        ConfigCommand::Check { file, serve } => {
            let checked = check(file, *serve)?;
            console.print(&if json { checked.json() } else { checked.words() })?;
            return Ok(if checked.problems.is_empty() { 0 } else { REFUSED });
        }
        ConfigCommand::Reference => console.print(&reference::page())?,
        ConfigCommand::Schema => {
            console.print(&format!("{:#}\n", keys::schema().as_value()))?;
        }
    }
    Ok(0)
}

fn read(path: Option<&Path>) -> Result<Option<Document>, Failure> {
    path.map(|path| Document::read(path).map_err(wrong)).transpose()
}

/// A file that cannot be read is no answer; one that is wrong is.
pub(super) fn wrong(error: ConfigError) -> Failure {
    match error {
        ConfigError::Unreadable { .. } => Failure::usage(error.to_string()),
        ConfigError::Wrong { path, problems } => {
            Failure::refused(headline(path.as_deref())).details(texts(&problems))
        }
    }
}

fn texts(problems: &[Problem]) -> Vec<String> {
    problems.iter().map(ToString::to_string).collect()
}

/// What is to be said of a file.
struct Checked {
    path: String,
    problems: Vec<String>,
    warnings: Vec<String>,
}

fn check(file: Option<PathBuf>, mut serve: ServeArgs) -> Result<Checked, Failure> {
    let Some(path) = file.or(serve.database.config) else {
        return Err(Failure::usage("which file? name it, or set KEYWARD_CONFIG"));
    };
    serve.database.config = Some(path.clone());
    let read = Document::read(&path)
        .and_then(|document| Settings::to_serve(&serve, Some(&document)).map(|_settings| document));
    let path = path.display().to_string();
    match read {
        Err(error @ ConfigError::Unreadable { .. }) => Err(wrong(error)),
        Err(ConfigError::Wrong { problems, .. }) => {
            Ok(Checked { path, problems: texts(&problems), warnings: Vec::new() })
        }
        Ok(document) => Ok(Checked { path, problems: Vec::new(), warnings: effective::advice(&document) }),
    }
}

impl Checked {
    fn words(&self) -> String {
        let said = if self.problems.is_empty() { "accepted" } else { "refused" };
        let mut text = format!("{}: {said}\n", clean(&self.path));
        for (level, lines) in [("", &self.problems), ("warning: ", &self.warnings)] {
            for line in lines {
                // Writing to a String does not fail.
                let _ = writeln!(text, "  {level}{}", clean(line));
            }
        }
        text
    }

    fn json(&self) -> String {
        let accepted = self.problems.is_empty();
        let Checked { path, problems, warnings } = self;
        let all = json!({ "file": path, "accepted": accepted, "problems": problems, "warnings": warnings });
        escape_json(format!("{all:#}\n"))
    }
}

/// As a file that can be used again: what has no value, or must not be shown, stands in a comment.
fn as_toml(settings: &[Setting]) -> String {
    let (mut text, mut table) = (String::new(), "");
    for Setting { key, value, origin } in settings {
        // The path of a file may hold anything.
        let origin = clean(&origin.to_string());
        let (of, name) = key.path.rsplit_once('.').unwrap_or(("", &key.path));
        if of != table {
            table = of;
            // An empty table may turn something on.
            let in_table = settings.iter().filter(|setting| setting.key.path.starts_with(&format!("{of}.")));
            let is_set = in_table.into_iter().any(|setting| !matches!(setting.value, Effective::Words(_)));
            let _ = writeln!(text, "\n{}[{of}]", if is_set { "" } else { "# " });
        }
        let line = match value {
            Effective::Value(value) => format!("{name} = {}", effective::in_one_line(value)),
            Effective::Hidden(shown) => format!("# {name} = {}  (set, from {origin})", clean(shown)),
            Effective::Words(words) => format!("# {name}: {}", clean(words)),
        };
        let _ = writeln!(text, "{line:<48} # {origin}");
    }
    text
}

fn as_json(settings: &[Setting]) -> String {
    let one = |Setting { key, value, origin }: &Setting| {
        let hidden = matches!(value, Effective::Hidden(_));
        let (value, said) = match value {
            Effective::Value(value) => (json!(value), None),
            Effective::Hidden(said) | Effective::Words(said) => (json!(null), Some(said)),
        };
        let origin = match origin {
            Origin::Default => json!({ "kind": "default" }),
            Origin::File { path, line } => json!({ "kind": "file", "file": path, "line": line }),
            Origin::Environment(name) => json!({ "kind": "environment", "name": name }),
            Origin::Flag(name) => json!({ "kind": "flag", "name": name }),
        };
        json!({ "key": key.path, "value": value, "hidden": hidden, "said": said, "origin": origin })
    };
    escape_json(format!("{:#}\n", json!({ "settings": settings.iter().map(one).collect::<Vec<_>>() })))
}
