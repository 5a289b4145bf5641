//! The terminal: prints to stdout and stderr, asks for confirmation, and shows progress.
//!
//! Client commands print only through this module. Not here: the text itself, which `text_output`, `table` and
//! `json_output` make.

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

/// A call that takes longer than this shows a spinner.
const SPINNER_DELAY: Duration = Duration::from_secs(1);
/// The longest answer to a confirmation prompt.
const MAX_ANSWER_BYTES: u64 = 64;

/// Stdout and stderr with what each can display.
pub(super) struct Console {
    stdout: Box<dyn Write>,
    stderr: Box<dyn Write>,
    pub(super) stdout_is_terminal: bool,
    pub(super) stdout_colors: bool,
    pub(super) stderr_colors: bool,
}

impl Console {
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

    /// Prints to stdout. A reader that closed the pipe (`| head`) is not an error.
    pub(super) fn print(&mut self, text: &str) -> Result<(), CliError> {
        self.print_bytes(text.as_bytes())
    }

    /// Like [`Console::print`], for output that is not text.
    pub(super) fn print_bytes(&mut self, bytes: &[u8]) -> Result<(), CliError> {
        match self.stdout.write_all(bytes).and_then(|()| self.stdout.flush()) {
            Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
                Err(CliError::new(format!("cannot write to stdout: {error}")))
            }
            _ => Ok(()),
        }
    }

    /// Prints to stderr and ignores failures.
    pub(super) fn eprint(&mut self, text: &str) {
        let _ = self.stderr.write_all(text.as_bytes()).and_then(|()| self.stderr.flush());
    }

    /// Prints output that must not get lost, such as a token: a closed pipe is an error.
    pub(super) fn print_required(&mut self, text: &str) -> Result<(), CliError> {
        let written = self.stdout.write_all(text.as_bytes()).and_then(|()| self.stdout.flush());
        written.map_err(|error| CliError::new(format!("cannot write to stdout: {error}")))
    }

    /// Whether [`Console::confirm`] would ask; an error if it would, and there is no terminal.
    pub(super) fn needs_confirmation(&self, yes: bool) -> Result<bool, CliError> {
        if yes {
            Ok(false)
        } else {
            open_terminal().map(|_terminal| true).map_err(|_| CliError::no_terminal())
        }
    }

    /// Asks for confirmation on the process's terminal, even if stdin is a pipe. `yes` skips the question.
    ///
    /// An answer other than yes is an error, and so is a missing terminal: an irreversible command must not run by accident.
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

/// Opens the process's controlling terminal for reading and writing.
fn open_terminal() -> io::Result<File> {
    use rustix::fs::{Mode, OFlags, open};
    Ok(open("/dev/tty", OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC, Mode::empty())?.into())
}

/// Prints a command's result to stdout, escaped. A reader that closed the pipe is not an error, since the command is done.
pub(super) fn print_escaped(text: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    match out.write_all(escape_terminal_lines(text).as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        written => written,
    }
}

/// A buffer that tests use as stdout or stderr.
#[cfg(test)]
#[derive(Clone, Default)]
pub(super) struct CapturedOutput(std::rc::Rc<std::cell::RefCell<Vec<u8>>>);

#[cfg(test)]
impl CapturedOutput {
    pub(super) fn text(&self) -> String {
        String::from_utf8(self.0.borrow().clone()).unwrap()
    }

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

/// Waits for `work`, and shows a spinner on a terminal after [`SPINNER_DELAY`].
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

/// Creates a progress bar for `total` bytes, hidden if stderr is no terminal. The caller sets its message.
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
