//! The context of a client command: its settings, the console and the connection to the server.

use std::path::Path;

use zeroize::Zeroizing;

use super::{
    api_client::ApiClient,
    console::Console,
    error::CliError,
    json_output::{self, ToJson},
    token_io,
};
use crate::config::client::{ClientSettings, OutputFormat};

pub(super) struct CommandContext<'a> {
    settings: ClientSettings,
    pub(super) console: &'a mut Console,
}

impl<'a> CommandContext<'a> {
    pub(super) fn new(settings: ClientSettings, console: &'a mut Console) -> CommandContext<'a> {
        CommandContext { settings, console }
    }

    /// Creates a client with the caller's token. Warns if other users can read the token's file.
    pub(super) fn connect(&mut self) -> Result<ApiClient, CliError> {
        if let Some(file) = self.settings.token_file.clone() {
            self.warn_if_readable_by_others(&file);
        }
        ApiClient::from_settings(&self.settings)
    }

    pub(super) fn warn_if_readable_by_others(&mut self, file: &Path) {
        if let Some(warning) = token_io::permission_warning(file) {
            self.console.eprint(&warning);
        }
    }

    /// Whether the caller's own token comes from stdin, so that stdin cannot hold anything else.
    pub(super) fn is_stdin_used_for_token(&self) -> bool {
        self.settings.token_file.as_deref().is_some_and(token_io::is_stdin)
    }

    pub(super) fn is_json_output(&self) -> bool {
        self.settings.output == OutputFormat::Json
    }

    /// Prints a response with a token as JSON; a closed pipe is an error.
    pub(super) fn print_required_json(&mut self, response: &impl ToJson) -> Result<(), CliError> {
        self.console.print_required(&Zeroizing::new(json_output::to_json_object(response)))
    }

    /// Prints a response: as JSON, or as `render_text` renders it. The argument of `render_text` is whether to use colors.
    pub(super) fn print_response(
        &mut self,
        response: &impl ToJson,
        render_text: impl FnOnce(bool) -> String,
    ) -> Result<(), CliError> {
        // Some responses hold a token.
        let text = Zeroizing::new(if self.is_json_output() {
            json_output::to_json_object(response)
        } else {
            render_text(self.console.stdout_colors)
        });
        self.console.print(&text)
    }
}
