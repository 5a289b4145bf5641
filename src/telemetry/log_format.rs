//! Formats log lines, and adds the request id and trace id of the call that logs.
//!
//! The ids come from the task that logs, not from spans, because most calls have none. Values are escaped, so text from
//! a caller can neither control the terminal that shows the log nor start a new line.

use std::{
    error::Error,
    fmt::{self, Write as _},
};

use tracing::{
    Event,
    field::{Field, Visit},
};
use tracing_subscriber::{
    field::RecordFields,
    fmt::{FmtContext, FormatEvent, FormatFields, format::Writer},
    registry::LookupSpan,
};

use crate::{
    domain::text::{EscapingWriter, escape_json},
    trace::{self, TracedCall},
};

/// Formats fields as text, followed by the ids of the call.
pub(super) struct TextFieldsWithRequestId;

impl<'writer> FormatFields<'writer> for TextFieldsWithRequestId {
    fn format_fields<R: RecordFields>(&self, mut writer: Writer<'writer>, fields: R) -> fmt::Result {
        let mut visitor = EscapingVisitor { writer: writer.by_ref(), is_empty: true, result: Ok(()) };
        fields.record(&mut visitor);
        visitor.result?;
        let named = trace::with_current(|call| write_text_ids(call, &mut writer));
        named.unwrap_or(Ok(()))
    }
}

/// Writes fields as tracing-subscriber does, and escapes every value.
struct EscapingVisitor<'w> {
    writer: Writer<'w>,
    is_empty: bool,
    result: fmt::Result,
}

impl EscapingVisitor<'_> {
    fn write_field(&mut self, name: &str, value: fmt::Arguments<'_>) -> fmt::Result {
        if !std::mem::take(&mut self.is_empty) {
            self.writer.write_char(' ')?;
        }
        let name = name.strip_prefix("r#").unwrap_or(name);
        if name != "message" {
            let (italic, dimmed, plain) =
                if self.writer.has_ansi_escapes() { ("\x1b[3m", "\x1b[2m", "\x1b[0m") } else { ("", "", "") };
            write!(self.writer, "{italic}{name}{plain}{dimmed}={plain}")?;
        }
        EscapingWriter(&mut self.writer).write_fmt(value)
    }

    fn record_field(&mut self, name: &str, value: fmt::Arguments<'_>) {
        if self.result.is_ok() {
            self.result = self.write_field(name, value);
        }
    }
}

impl Visit for EscapingVisitor<'_> {
    fn record_str(&mut self, field: &Field, value: &str) {
        match field.name() {
            "message" => self.record_field("message", format_args!("{value}")),
            name => self.record_field(name, format_args!("{value:?}")),
        }
    }

    fn record_error(&mut self, field: &Field, value: &(dyn Error + 'static)) {
        self.record_field(field.name(), format_args!("{value}"));
        let (mut sources, mut next) = (Vec::new(), value.source());
        while let Some(source) = next {
            sources.push(source.to_string());
            next = source.source();
        }
        if !sources.is_empty() {
            self.record_field(&format!("{}.sources", field.name()), format_args!("[{}]", sources.join(", ")));
        }
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.record_field(field.name(), format_args!("{value:?}"));
    }
}

fn write_text_ids(call: &TracedCall, to: &mut impl fmt::Write) -> fmt::Result {
    write!(to, " request_id={}", call.request_id())?;
    match call.trace_id() {
        Some(trace) => write!(to, " trace_id={trace}"),
        None => Ok(()),
    }
}

/// Formats an event as one escaped JSON line, with the ids of the call next to the event's own fields.
pub(super) struct JsonEventWithRequestId<F>(pub(super) F);

impl<S, N, F> FormatEvent<S, N> for JsonEventWithRequestId<F>
where
    S: tracing::Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
    F: FormatEvent<S, N>,
{
    fn format_event(
        &self,
        context: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let names = trace::with_current(|call| {
            let mut names = String::new();
            write_json_ids(call, &mut names).map(|()| names)
        });
        let mut line = String::new();
        self.0.format_event(context, Writer::new(&mut line), event)?;
        let line = escape_json(line);
        // The object is never empty: it has at least a timestamp.
        match (line.trim_end().strip_suffix('}'), names.transpose()?) {
            (Some(open), Some(names)) => writeln!(writer, "{open},{names}}}"),
            _ => writer.write_str(&line),
        }
    }
}

/// Neither id has a character that JSON escapes.
fn write_json_ids(call: &TracedCall, to: &mut impl fmt::Write) -> fmt::Result {
    write!(to, "\"request_id\":\"{}\"", call.request_id())?;
    match call.trace_id() {
        Some(trace) => write!(to, ",\"trace_id\":\"{trace}\""),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io,
        sync::{Arc, Mutex},
    };

    use tracing_subscriber::{Layer as _, layer::SubscriberExt as _};

    use super::*;

    #[derive(Clone, Default)]
    struct SharedBuffer(Arc<Mutex<Vec<u8>>>);

    impl io::Write for SharedBuffer {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[derive(Debug, thiserror::Error)]
    #[error("outer\u{1b}[2J")]
    struct WrappedError(#[source] io::Error);

    const NASTY: &str = "a\u{1b}]0;x\u{7}\u{9b}2J\u{7f}\u{202e}\u{200b}\nb";

    /// The log output of one event.
    fn logged(json: bool, ansi: bool) -> String {
        let sink = SharedBuffer::default();
        let writer = sink.clone();
        let layer = tracing_subscriber::fmt::layer().without_time().with_writer(move || writer.clone());
        let layer = match json {
            true => layer.json().map_event_format(JsonEventWithRequestId).boxed(),
            false => layer.with_ansi(ansi).fmt_fields(TextFieldsWithRequestId).boxed(),
        };
        tracing::subscriber::with_default(tracing_subscriber::registry().with(layer), || {
            let error = WrappedError(io::Error::other(NASTY));
            tracing::warn!(
                debug = ?NASTY, display = %NASTY, plain = NASTY, error = &error as &dyn Error, number = 7,
                "message {NASTY}"
            );
        });
        String::from_utf8(sink.0.lock().unwrap().clone()).unwrap()
    }

    #[test]
    fn no_value_in_the_log_steers_a_terminal_or_begins_a_line() {
        let is_plain =
            |line: &str| line.strip_suffix('\n').is_some_and(|line| !line.chars().any(char::is_control));
        let shown = r"a\u{1b}]0;x\u{7}\u{9b}2J\u{7f}\u{202e}\u{200b}\nb";
        let text = logged(false, false);
        assert!(is_plain(&text), "{text:?}");
        for part in [
            format!("message {shown} debug=\"{shown}\" display={shown} plain=\"{shown}\" "),
            format!(r"error=outer\u{{1b}}[2J error.sources=[{shown}] number=7"),
        ] {
            assert!(text.contains(&part), "{part}\n{text}");
        }
        let json = logged(true, false);
        assert!(is_plain(&json) && !json.contains(['\u{202e}', '\u{200b}']), "{json:?}");
        let line: serde_json::Value = serde_json::from_str(&json).unwrap();
        assert_eq!(line["fields"]["message"], format!("message {NASTY}"));
        assert_eq!(line["fields"]["display"], NASTY);
    }

    #[test]
    fn on_a_terminal_names_are_styled_and_values_still_escaped() {
        let text = logged(false, true);
        assert!(text.contains("\u{1b}[3mnumber\u{1b}[0m\u{1b}[2m=\u{1b}[0m7"), "{text:?}");
        assert!(!text.contains("\u{1b}]0;") && !text.contains(['\u{7}', '\u{9b}', '\u{202e}']), "{text:?}");
    }
}
