//! Log lines name the call that they are about: its request id, and its trace where it has one. The names come from
//! the task that logs, not from spans: most calls have none.

use std::fmt;

use tracing::Event;
use tracing_subscriber::{
    field::RecordFields,
    fmt::{
        FmtContext, FormatEvent, FormatFields,
        format::{DefaultFields, Writer},
    },
    registry::LookupSpan,
};

use crate::trace::{self, Call};

/// Fields as people read them, the call's names last.
#[derive(Default)]
pub(super) struct NamingText(DefaultFields);

impl<'writer> FormatFields<'writer> for NamingText {
    fn format_fields<R: RecordFields>(&self, mut writer: Writer<'writer>, fields: R) -> fmt::Result {
        self.0.format_fields(writer.by_ref(), fields)?;
        let named = trace::current(|call| text(call, &mut writer));
        named.unwrap_or(Ok(()))
    }
}

fn text(call: &Call, to: &mut impl fmt::Write) -> fmt::Result {
    write!(to, " request_id={}", call.request_id())?;
    match call.trace() {
        Some(trace) => write!(to, " trace_id={trace}"),
        None => Ok(()),
    }
}

/// A line of JSON, with the call's names beside the event's own fields.
pub(super) struct NamingJson<F>(pub(super) F);

impl<S, N, F> FormatEvent<S, N> for NamingJson<F>
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
        let names = trace::current(|call| {
            let mut names = String::new();
            json(call, &mut names).map(|()| names)
        });
        let Some(names) = names.transpose()? else {
            return self.0.format_event(context, writer, event);
        };
        let mut line = String::new();
        self.0.format_event(context, Writer::new(&mut line), event)?;
        // An object is never empty: it has a time at least.
        match line.trim_end().strip_suffix('}') {
            Some(open) => writeln!(writer, "{open},{names}}}"),
            None => writer.write_str(&line),
        }
    }
}

/// Neither has a character that JSON would escape.
fn json(call: &Call, to: &mut impl fmt::Write) -> fmt::Result {
    write!(to, "\"request_id\":\"{}\"", call.request_id())?;
    match call.trace() {
        Some(trace) => write!(to, ",\"trace_id\":\"{trace}\""),
        None => Ok(()),
    }
}
