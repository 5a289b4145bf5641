//! `keyward completions`: prints a shell's completion script for all commands.

use clap::{Args, Command};
use clap_complete::Shell;

use super::{console::Console, error::CliError};

#[derive(Debug, Args)]
#[command(
    after_help = "Example: keyward completions bash > ~/.local/share/bash-completion/completions/keyward"
)]
pub(super) struct CompletionsArgs {
    /// The shell that runs the script
    shell: Shell,
}

/// Prints the script that completes `command`.
pub(super) fn run(args: CompletionsArgs, command: Command, console: &mut Console) -> Result<u8, CliError> {
    console.print(&generate_script(args.shell, command))?;
    Ok(0)
}

fn generate_script(shell: Shell, mut command: Command) -> String {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut command, "keyward", &mut script);
    String::from_utf8_lossy(&script).into_owned()
}

#[cfg(test)]
mod tests {
    use clap::{CommandFactory as _, ValueEnum as _};

    use super::{super::Cli, *};

    #[test]
    fn every_shell_completes_every_command() {
        for shell in Shell::value_variants() {
            let script = generate_script(*shell, Cli::command());
            assert!(script.contains("finish-rotation") && script.contains("token-file"), "{shell}");
        }
    }
}
