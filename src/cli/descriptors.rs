//! `keyward descriptors`: what a gateway needs to turn JSON into our calls, from the binary that answers them.

use super::{console::Console, failure::Failure};
use crate::pb;

/// Prints the descriptor set, unless a terminal would show it.
pub(super) fn run(console: &mut Console) -> Result<u8, Failure> {
    if console.out_is_terminal {
        return Err(Failure::usage("the descriptors are binary: keyward descriptors > keyward.pb"));
    }
    console.print_bytes(pb::DESCRIPTORS)?;
    Ok(0)
}

#[cfg(test)]
mod tests {
    use super::{super::console::Printed, *};

    #[test]
    fn a_terminal_is_not_shown_what_is_not_text() {
        let (out, err) = (Printed::default(), Printed::default());
        let mut console = Printed::console(&out, &err);
        console.out_is_terminal = true;
        assert!(run(&mut console).unwrap_err().to_string().contains("> keyward.pb"));
        assert_eq!(out.text(), "");
    }
}
