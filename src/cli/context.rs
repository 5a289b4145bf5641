//! What every client command works with: the settings, the terminal and the way to the server.

use std::path::Path;

use zeroize::Zeroizing;

use super::{
    client::Session,
    console::Console,
    failure::Failure,
    json::{self, Json},
    token,
};
use crate::config::client::{ClientSettings, Output};

/// The settings and the terminal of one command.
pub(super) struct Context<'a> {
    settings: ClientSettings,
    pub(super) console: &'a mut Console,
}

impl<'a> Context<'a> {
    pub(super) fn new(settings: ClientSettings, console: &'a mut Console) -> Context<'a> {
        Context { settings, console }
    }

    /// Reads the caller's token and makes ready to connect. Warns if others can read the token's file.
    pub(super) fn session(&mut self) -> Result<Session, Failure> {
        if let Some(file) = self.settings.token_file.clone() {
            self.warn_of_readers(&file);
        }
        Session::open(&self.settings)
    }

    /// Warns if others than its owner can read a token's file.
    pub(super) fn warn_of_readers(&mut self, file: &Path) {
        if let Some(warning) = token::readers_warning(file) {
            self.console.note(&warning);
        }
    }

    /// Whether the caller's own token comes from stdin, so that nothing else can.
    pub(super) fn stdin_is_taken(&self) -> bool {
        self.settings.token_file.as_deref().is_some_and(token::is_stdin)
    }

    /// Whether answers are for programs.
    pub(super) fn json(&self) -> bool {
        self.settings.output == Output::Json
    }

    /// Prints an answer that holds a token, for programs: nobody reading it is a failure.
    pub(super) fn deliver_json(&mut self, answer: &impl Json) -> Result<(), Failure> {
        self.console.deliver(&Zeroizing::new(json::object(answer)))
    }

    /// Prints an answer: as it is for programs, or as `people` words it, who is told whether colours are
    /// wanted.
    pub(super) fn show(
        &mut self,
        answer: &impl Json,
        people: impl FnOnce(bool) -> String,
    ) -> Result<(), Failure> {
        // Some answers hold a token.
        let text =
            Zeroizing::new(if self.json() { json::object(answer) } else { people(self.console.out_colours) });
        self.console.print(&text)
    }
}
