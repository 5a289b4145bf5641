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
    failure::Failure,
    table::{clean, clean_lines},
};
use crate::config::client;

/// A call that takes longer than this shows that it is under way.
const PATIENCE: Duration = Duration::from_secs(1);
/// The most bytes that are read of an answer to a question.
const LONGEST_ANSWER: u64 = 64;

/// Stdout and stderr, and what they can show.
pub(super) struct Console {
    out: Box<dyn Write>,
    err: Box<dyn Write>,
    /// Whether a person would see what goes to stdout.
    pub(super) out_is_terminal: bool,
    /// Whether stdout takes colours.
    pub(super) out_colours: bool,
    /// Whether stderr takes colours.
    pub(super) err_colours: bool,
}

impl Console {
    /// The process's own.
    pub(super) fn system() -> Console {
        let colours = !client::colours_forbidden();
        Console {
            out_is_terminal: io::stdout().is_terminal(),
            out_colours: colours && io::stdout().is_terminal(),
            err_colours: colours && io::stderr().is_terminal(),
            out: Box::new(io::stdout()),
            err: Box::new(io::stderr()),
        }
    }

    /// Prints to stdout. A reader that has gone (`| head`) has seen enough: that is no failure.
    pub(super) fn print(&mut self, text: &str) -> Result<(), Failure> {
        self.print_bytes(text.as_bytes())
    }

    /// The same, of what is not text.
    pub(super) fn print_bytes(&mut self, bytes: &[u8]) -> Result<(), Failure> {
        match self.out.write_all(bytes).and_then(|()| self.out.flush()) {
            Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
                Err(Failure::usage(format!("cannot write to stdout: {error}")))
            }
            _ => Ok(()),
        }
    }

    /// Prints to stderr, as far as that is possible.
    pub(super) fn note(&mut self, text: &str) {
        let _ = self.err.write_all(text.as_bytes()).and_then(|()| self.err.flush());
    }

    /// Prints what is lost if nobody reads it, such as a token: a reader that has gone is a failure.
    pub(super) fn deliver(&mut self, text: &str) -> Result<(), Failure> {
        let written = self.out.write_all(text.as_bytes()).and_then(|()| self.out.flush());
        written.map_err(|error| Failure::usage(format!("cannot write to stdout: {error}")))
    }

    /// Whether [`Console::confirm`] would ask.
    ///
    /// # Errors
    /// When it would have to, and there is no terminal.
    pub(super) fn must_ask(&self, yes: bool) -> Result<bool, Failure> {
        if yes { Ok(false) } else { terminal().map(|_terminal| true).map_err(|_| Failure::unconfirmed()) }
    }

    /// Asks the person at the process's terminal, also where stdin is a pipe. With `yes` the answer is known.
    ///
    /// # Errors
    /// When the answer is no, or there is no terminal: what cannot be undone is not done by accident.
    pub(super) fn confirm(&mut self, question: &str, yes: bool) -> Result<(), Failure> {
        if !self.must_ask(yes)? {
            return Ok(());
        }
        let answer = terminal().and_then(|mut terminal| {
            write!(terminal, "{} [y/N] ", clean(question))?;
            let mut answer = String::new();
            BufReader::new(terminal).take(LONGEST_ANSWER).read_line(&mut answer)?;
            Ok(answer)
        });
        match answer.map_err(|_| Failure::unconfirmed())?.trim().to_ascii_lowercase().as_str() {
            "y" | "yes" => Ok(()),
            _ => Err(Failure::declined()),
        }
    }
}

/// The process's terminal, to write and to read.
fn terminal() -> io::Result<File> {
    use rustix::fs::{Mode, OFlags, open};
    Ok(open("/dev/tty", OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC, Mode::empty())?.into())
}

/// Prints what a command has done. A reader that has gone has seen enough: what was done stays done.
pub(super) fn say(text: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    match out.write_all(clean_lines(text).as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        written => written,
    }
}

/// What a test prints to.
#[cfg(test)]
#[derive(Clone, Default)]
pub(super) struct Printed(std::rc::Rc<std::cell::RefCell<Vec<u8>>>);

#[cfg(test)]
impl Printed {
    pub(super) fn text(&self) -> String {
        String::from_utf8(self.0.borrow().clone()).unwrap()
    }

    /// A console that prints to `out` and `err`.
    pub(super) fn console(out: &Printed, err: &Printed) -> Console {
        Console {
            out: Box::new(out.clone()),
            err: Box::new(err.clone()),
            out_is_terminal: false,
            out_colours: false,
            err_colours: false,
        }
    }
}

#[cfg(test)]
impl Write for Printed {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.borrow_mut().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Waits for `work`, and shows a spinner on a terminal when it takes long.
pub(super) async fn watched<T>(work: impl Future<Output = T>) -> T {
    let mut work = std::pin::pin!(work);
    tokio::select! {
        done = &mut work => return done,
        () = tokio::time::sleep(PATIENCE), if io::stderr().is_terminal() => {}
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
pub(super) fn progress(total: u64) -> ProgressBar {
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
            out: Box::new(Fails(kind)),
            err: Box::new(Fails(kind)),
            out_is_terminal: false,
            out_colours: false,
            err_colours: false,
        }
    }

    #[test]
    fn a_reader_that_has_gone_is_no_failure_but_a_full_disk_is() {
        assert!(console(io::ErrorKind::BrokenPipe).print("x").is_ok());
        assert!(console(io::ErrorKind::StorageFull).print("x").is_err());
        assert!(console(io::ErrorKind::BrokenPipe).deliver("x").is_err(), "nobody has the token");
    }

    #[test]
    fn a_stderr_that_cannot_be_written_stops_nothing() {
        console(io::ErrorKind::BrokenPipe).note("x");
    }

    #[test]
    fn yes_is_not_asked_for_again() {
        assert!(console(io::ErrorKind::Other).confirm("Revoke?", true).is_ok());
    }
}
