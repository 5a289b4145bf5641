//! What every client command works with: the settings, the terminal and the way to the server.

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

    /// Reads the caller's token and makes ready to connect.
    pub(super) fn session(&self) -> Result<Session, Failure> {
        Session::open(&self.settings)
    }

    /// Whether the caller's own token comes from stdin, so that nothing else can.
    pub(super) fn stdin_is_taken(&self) -> bool {
        self.settings.token_file.as_deref().is_some_and(token::is_stdin)
    }

    /// Whether answers are for programs.
    pub(super) fn json(&self) -> bool {
        self.settings.output == Output::Json
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
