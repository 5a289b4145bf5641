//! `keyward rules`: validates a rules file, and shows which of its rules decides a request.
//!
//! It calls no server: it reads the same files as a server, with the server's own code.

use std::path::PathBuf;

use clap::{Args, Subcommand};

use super::{
    config::config_file_error,
    console::Console,
    error::{CliError, EXIT_REFUSED},
    json_output,
    rules_explain::{self, GatewayDefaults, RulesCheckReport, RulesTestRequest},
};
use crate::{
    config::{
        client::{ClientArgs, ClientSettings, OutputFormat},
        rules::{self, RulesFileError},
        server::{ConfigFileArgs, ServerSettings},
    },
    domain::route::RuleBook,
};

const EXIT_CODES_HELP: &str = "\
Exit codes: 0 a rule decides; 1 the request is denied, because no rule matches, or refused for its spelling; \
2 the file cannot be used.

A proxy's own configuration of a route (Envoy's context_extensions, the query of nginx and Traefik) is not \
known here. If it sets what a request needs, rules do not apply; docs/gateway.md has the precedence.";

#[derive(Debug, Args)]
pub(super) struct RulesArgs {
    #[command(subcommand)]
    command: RulesCommand,
    /// The format of the output [default: table]
    #[arg(long, global = true, value_enum, value_name = "FORMAT")]
    output: Option<OutputFormat>,
}

#[derive(Debug, Subcommand)]
enum RulesCommand {
    /// Check whether a rules file is valid, and list every problem in it
    #[command(after_help = "Exit codes: 0 the file is valid; 2 it cannot be used.")]
    Check(RulesFileArgs),
    /// Show which rule decides a request, and why the rules before it do not match
    #[command(after_help = EXIT_CODES_HELP)]
    Test {
        #[command(flatten)]
        file: RulesFileArgs,
        /// The request's method, such as GET
        method: String,
        /// The request's path, as the proxy forwards it; a query is ignored
        path: String,
        /// The request's host; without it, only rules for every host (*) match
        #[arg(long)]
        host: Option<String>,
    },
}

#[derive(Debug, Args)]
struct RulesFileArgs {
    /// The rules file to read
    file: PathBuf,
    // The server's settings define the environments.
    #[command(flatten)]
    config: ConfigFileArgs,
}

impl RulesFileArgs {
    fn load(&self) -> Result<(RuleBook, GatewayDefaults), CliError> {
        let settings = self.config.load().map_err(|error| config_file_error(error).into_unanswered())?;
        let ServerSettings { key_settings: keys, gateway, .. } = settings;
        let (_, book) = rules::load_rules(&self.file, &keys.environments).map_err(rules_file_error)?;
        Ok((book, GatewayDefaults { environment: gateway.environment, mode: gateway.mode }))
    }
}

fn rules_file_error(error: RulesFileError) -> CliError {
    match error {
        RulesFileError::Unreadable { .. } => CliError::new(error.to_string()),
        RulesFileError::Invalid { path, problems } => {
            let problems = problems.iter().map(ToString::to_string).collect();
            CliError::new(format!("the rules file {path} is not valid")).with_details(problems)
        }
    }
}

/// Runs the command. `outer` has the flags before the command's name.
pub(super) fn run(args: RulesArgs, outer: ClientArgs, console: &mut Console) -> Result<u8, CliError> {
    let RulesArgs { command, output } = args;
    let args = ClientArgs { output: output.or(outer.output), ..ClientArgs::default() };
    let json = ClientSettings::load(args)?.output == OutputFormat::Json;
    let colors = console.stdout_colors;
    match command {
        RulesCommand::Check(file) => {
            let (book, defaults) = file.load()?;
            let checked = RulesCheckReport::new(&file.file.display().to_string(), &book, &defaults);
            console.print(&if json { json_output::to_json_object(&checked) } else { checked.to_text() })?;
            Ok(0)
        }
        RulesCommand::Test { file, method, path, host } => {
            let (book, defaults) = file.load()?;
            let request = RulesTestRequest { method: &method, path: &path, host: host.as_deref() };
            let verdict = rules_explain::explain(&book, &defaults, &request);
            console.print(&if json {
                json_output::to_json_object(&verdict)
            } else {
                verdict.to_text(colors)
            })?;
            Ok(if verdict.is_decided() { 0 } else { EXIT_REFUSED })
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;
    use crate::cli::{Cli, CliCommand, console::CapturedOutput};

    const RULES: &str = r#"
[defaults]
hosts = ["*"]
environment = "production"

[[rule]]
methods = ["GET"]
path = "/monitors/{id}"
scope = "monitors:read"
"#;

    /// What `keyward rules` with these arguments answers, on stdout, and its exit code; `FILE` is the rules.
    fn rules(rules: &str, line: &str) -> (Result<u8, CliError>, String) {
        let folder = tempfile::tempdir().unwrap();
        let (file, config) = (folder.path().join("rules.toml"), folder.path().join("keyward.toml"));
        std::fs::write(&file, rules).unwrap();
        std::fs::write(&config, "environments = [{ name = 'moon', tag = 'm' }]").unwrap();
        let words = line.split_whitespace().map(|word| match word {
            "FILE" => file.to_str().unwrap().to_owned(),
            "CONFIG" => config.to_str().unwrap().to_owned(),
            word => word.to_owned(),
        });
        let cli = Cli::try_parse_from(["keyward".to_owned()].into_iter().chain(words)).unwrap();
        let CliCommand::Rules(args) = cli.command else { panic!("{line}") };
        let (out, err) = (CapturedOutput::default(), CapturedOutput::default());
        let ended = run(args, cli.client, &mut CapturedOutput::capture_console(&out, &err));
        (ended, out.text())
    }

    #[test]
    fn a_rule_that_decides_is_told_and_the_exit_code_is_0() {
        let (ended, out) = rules(RULES, "rules test FILE GET /monitors/7?x=1");
        assert_eq!(ended.unwrap(), 0);
        assert!(out.starts_with("verdict      the rule in line 6 decides\n"), "{out}");
    }

    #[test]
    fn what_no_rule_is_for_is_denied_and_the_exit_code_is_1() {
        let (ended, out) = rules(RULES, "rules test FILE POST /monitors/7");
        assert_eq!(ended.unwrap(), 1);
        assert!(out.contains("denied with 403") && out.contains("another method"), "{out}");
        let (ended, out) = rules(RULES, "rules test FILE GET /monitors//7");
        assert_eq!(ended.unwrap(), 1);
        assert!(out.contains("refused with 400") && out.contains("'//'"), "{out}");
    }

    #[test]
    fn json_is_one_object_wherever_the_flag_stands() {
        for line in ["--output json rules test FILE GET /", "rules --output json test FILE GET /"] {
            let (ended, out) = rules(RULES, line);
            let value: serde_json::Value = serde_json::from_str(&out).unwrap();
            assert_eq!((value["outcome"].as_str(), ended.unwrap()), (Some("denied"), 1), "{line}");
        }
        let (_, out) = rules(RULES, "rules check FILE --output json");
        assert_eq!(serde_json::from_str::<serde_json::Value>(&out).unwrap()["rules"], 1);
    }

    #[test]
    fn a_file_that_cannot_be_used_says_every_problem_and_the_exit_code_is_2() {
        let wrong = "[[rule]]\npath = 'a'\nhosts = ['*']\nmethods = ['get']\npublic = true\n";
        for line in ["rules check FILE", "rules test FILE GET /"] {
            let failure = rules(wrong, line).0.unwrap_err();
            let text = failure.to_string();
            assert!(text.contains("\n  line 2: path ") && text.contains("\n  line 4: methods "), "{text}");
            assert_eq!(failure.exit_code(), 2);
        }
        let failure = rules("", "rules check FILE.not").0.unwrap_err();
        assert!(failure.to_string().contains("cannot be read"), "{failure}");
        assert_eq!(failure.exit_code(), 2);
    }

    #[test]
    fn wrong_settings_are_reported_line_by_line_and_the_exit_code_is_2() {
        let folder = tempfile::tempdir().unwrap();
        let (file, config) = (folder.path().join("rules.toml"), folder.path().join("keyward.toml"));
        std::fs::write(&file, RULES).unwrap();
        std::fs::write(&config, "lease = '0s'\nlisen = 'x'").unwrap();
        let words =
            ["keyward", "rules", "check", file.to_str().unwrap(), "--config", config.to_str().unwrap()];
        let CliCommand::Rules(args) = Cli::try_parse_from(words).unwrap().command else {
            panic!("another command")
        };
        let (out, err) = (CapturedOutput::default(), CapturedOutput::default());
        let failure =
            run(args, ClientArgs::default(), &mut CapturedOutput::capture_console(&out, &err)).unwrap_err();
        let text = failure.to_string();
        assert!(
            text.contains("\n  line 1, column 1: lease") && text.contains("\n  line 2, column 1: unknown"),
            "{text}"
        );
        assert_eq!(failure.exit_code(), 2);
    }

    #[test]
    fn environments_are_those_of_the_servers_settings() {
        let moon = RULES.replace("production", "moon");
        assert!(rules(&moon, "rules check FILE").0.unwrap_err().to_string().contains("line 4"));
        let (ended, out) = rules(&moon, "rules check FILE --config CONFIG");
        assert_eq!(ended.unwrap(), 0);
        assert!(out.ends_with("rules.toml: 1 rule, no problems.\n"), "{out}");
    }
}
