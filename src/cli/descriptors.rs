//! `keyward descriptors`: what a gateway needs to turn JSON into our calls, from the binary that answers them.

use super::{console::Console, error::CliError};
use crate::pb;

/// Prints the descriptor set, unless a terminal would show it.
pub(super) fn run(console: &mut Console) -> Result<u8, CliError> {
    if console.stdout_is_terminal {
        return Err(CliError::new("the descriptors are binary: keyward descriptors > keyward.pb"));
    }
    console.print_bytes(pb::FILE_DESCRIPTOR_SET)?;
    Ok(0)
}

#[cfg(test)]
mod tests {
    use super::{super::console::CapturedOutput, *};

    #[test]
    fn a_terminal_is_not_shown_what_is_not_text() {
        let (out, err) = (CapturedOutput::default(), CapturedOutput::default());
        let mut console = CapturedOutput::capture_console(&out, &err);
        console.stdout_is_terminal = true;
        assert!(run(&mut console).unwrap_err().to_string().contains("> keyward.pb"));
        assert_eq!(out.text(), "");
    }
}
