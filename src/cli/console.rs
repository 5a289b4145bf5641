//! The terminal: writing to stdout and stderr, asking, and showing that something is under way.
//!
//! The only place of the client commands that prints. What is printed is made by `output` and `json`.

use std::{
    fs::File,
    io::{self, BufRead as _, BufReader, IsTerminal as _, Read as _, Write},
    time::Duration,
};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::{
    error::CliError,
    table::{escape_terminal, escape_terminal_lines},
};
use crate::config::client;

/// A call that takes longer than this shows that it is under way.
const SPINNER_DELAY: Duration = Duration::from_secs(1);
/// The most bytes that are read of an answer to a question.
const MAX_ANSWER_BYTES: u64 = 64;

/// Stdout and stderr, and what they can show.
pub(super) struct Console {
    stdout: Box<dyn Write>,
    stderr: Box<dyn Write>,
    /// Whether a person would see what goes to stdout.
    pub(super) stdout_is_terminal: bool,
    /// Whether stdout takes colours.
    pub(super) stdout_colors: bool,
    /// Whether stderr takes colours.
    pub(super) stderr_colors: bool,
}

impl Console {
    /// The process's own.
    pub(super) fn with_stdio() -> Console {
        let colors = !client::are_colors_disabled();
        Console {
            stdout_is_terminal: io::stdout().is_terminal(),
            stdout_colors: colors && io::stdout().is_terminal(),
            stderr_colors: colors && io::stderr().is_terminal(),
            stdout: Box::new(io::stdout()),
            stderr: Box::new(io::stderr()),
        }
    }

    /// Prints to stdout. A reader that has gone (`| head`) has seen enough: that is no failure.
    pub(super) fn print(&mut self, text: &str) -> Result<(), CliError> {
        self.print_bytes(text.as_bytes())
    }

    /// The same, of what is not text.
    pub(super) fn print_bytes(&mut self, bytes: &[u8]) -> Result<(), CliError> {
        match self.stdout.write_all(bytes).and_then(|()| self.stdout.flush()) {
            Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
                Err(CliError::new(format!("cannot write to stdout: {error}")))
            }
            _ => Ok(()),
        }
    }

    /// Prints to stderr, as far as that is possible.
    pub(super) fn eprint(&mut self, text: &str) {
        let _ = self.stderr.write_all(text.as_bytes()).and_then(|()| self.stderr.flush());
    }

    /// Prints what is lost if nobody reads it, such as a token: a reader that has gone is a failure.
    pub(super) fn print_required(&mut self, text: &str) -> Result<(), CliError> {
        let written = self.stdout.write_all(text.as_bytes()).and_then(|()| self.stdout.flush());
        written.map_err(|error| CliError::new(format!("cannot write to stdout: {error}")))
    }

    /// Whether [`Console::confirm`] would ask.
    ///
    /// # Errors
    /// When it would have to, and there is no terminal.
    pub(super) fn needs_confirmation(&self, yes: bool) -> Result<bool, CliError> {
        if yes {
            Ok(false)
        } else {
            open_terminal().map(|_terminal| true).map_err(|_| CliError::no_terminal())
        }
    }

    /// Asks the person at the process's terminal, also where stdin is a pipe. With `yes` the answer is known.
    ///
    /// # Errors
    /// When the answer is no, or there is no terminal: what cannot be undone is not done by accident.
    pub(super) fn confirm(&mut self, question: &str, yes: bool) -> Result<(), CliError> {
        if !self.needs_confirmation(yes)? {
            return Ok(());
        }
        let answer = open_terminal().and_then(|mut terminal| {
            write!(terminal, "{} [y/N] ", escape_terminal(question))?;
            let mut answer = String::new();
            BufReader::new(terminal).take(MAX_ANSWER_BYTES).read_line(&mut answer)?;
            Ok(answer)
        });
        match answer.map_err(|_| CliError::no_terminal())?.trim().to_ascii_lowercase().as_str() {
            "y" | "yes" => Ok(()),
            _ => Err(CliError::not_confirmed()),
        }
    }
}

/// The process's terminal, to write and to read.
fn open_terminal() -> io::Result<File> {
    use rustix::fs::{Mode, OFlags, open};
    Ok(open("/dev/tty", OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC, Mode::empty())?.into())
}

/// Prints what a command has done. A reader that has gone has seen enough: what was done stays done.
pub(super) fn print_escaped(text: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    match out.write_all(escape_terminal_lines(text).as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        written => written,
    }
}

/// What a test prints to.
#[cfg(test)]
#[derive(Clone, Default)]
pub(super) struct CapturedOutput(std::rc::Rc<std::cell::RefCell<Vec<u8>>>);

#[cfg(test)]
impl CapturedOutput {
    pub(super) fn text(&self) -> String {
        String::from_utf8(self.0.borrow().clone()).unwrap()
    }

    /// A console that prints to `out` and `err`.
    pub(super) fn capture_console(out: &CapturedOutput, err: &CapturedOutput) -> Console {
        Console {
            stdout: Box::new(out.clone()),
            stderr: Box::new(err.clone()),
            stdout_is_terminal: false,
            stdout_colors: false,
            stderr_colors: false,
        }
    }
}

#[cfg(test)]
impl Write for CapturedOutput {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.borrow_mut().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Waits for `work`, and shows a spinner on a terminal when it takes long.
pub(super) async fn with_spinner<T>(work: impl Future<Output = T>) -> T {
    let mut work = std::pin::pin!(work);
    tokio::select! {
        done = &mut work => return done,
        () = tokio::time::sleep(SPINNER_DELAY), if io::stderr().is_terminal() => {}
    }
    let spinner = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
    spinner.set_style(ProgressStyle::default_spinner());
    spinner.set_message("waiting for the server");
    spinner.enable_steady_tick(Duration::from_millis(120));
    let done = work.await;
    spinner.finish_and_clear();
    done
}

/// A bar for work of `total` bytes, on a terminal; what it stands at is shown beside it as its message.
pub(super) fn new_progress_bar(total: u64) -> ProgressBar {
    if !io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let bar = ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::stderr());
    let style = ProgressStyle::with_template("{percent:>3}% {wide_bar} {msg}, {eta} left");
    bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
    bar
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Fails(io::ErrorKind);

    impl Write for Fails {
        fn write(&mut self, _: &[u8]) -> io::Result<usize> {
            Err(self.0.into())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn console(kind: io::ErrorKind) -> Console {
        Console {
            stdout: Box::new(Fails(kind)),
            stderr: Box::new(Fails(kind)),
            stdout_is_terminal: false,
            stdout_colors: false,
            stderr_colors: false,
        }
    }

    #[test]
    fn a_reader_that_has_gone_is_no_failure_but_a_full_disk_is() {
        assert!(console(io::ErrorKind::BrokenPipe).print("x").is_ok());
        assert!(console(io::ErrorKind::StorageFull).print("x").is_err());
        assert!(console(io::ErrorKind::BrokenPipe).print_required("x").is_err(), "nobody has the token");
    }

    #[test]
    fn a_stderr_that_cannot_be_written_stops_nothing() {
        console(io::ErrorKind::BrokenPipe).eprint("x");
    }

    #[test]
    fn yes_is_not_asked_for_again() {
        assert!(console(io::ErrorKind::Other).confirm("Revoke?", true).is_ok());
    }
}
