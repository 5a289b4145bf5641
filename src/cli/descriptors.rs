//! `keyward descriptors`: prints the protobuf descriptor set that a gateway needs to transcode JSON into calls.

use super::{console::Console, error::CliError};
use crate::pb;

/// Prints the binary descriptor set, unless stdout is a terminal.
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
