//! Tables of many records, and one record line by line; clean, in colour, as wide as the terminal.
//!
//! Text from the server is escaped (see [`Escaped`]): a key's metadata must not steer the reader's terminal, nor hide or
//! reorder what it shows.

use comfy_table::{Cell, Color, ColumnConstraint, ContentArrangement, Table, presets};

use super::values::rfc3339;
use crate::domain::{credential_mask::mask_value, text::Escaped};

/// Escapes what a terminal would obey, or not show.
pub(super) fn clean(text: &str) -> String {
    Escaped(text).to_string()
}

/// A value that a person gave, for a message: a secret that was given in its place is masked.
pub(super) fn shown_value(value: &str) -> String {
    clean(&mask_value(value))
}

/// The same as [`clean`], of several lines.
pub(super) fn clean_lines(text: &str) -> String {
    text.split('\n').map(clean).collect::<Vec<_>>().join("\n")
}

/// One record, a line for each field that holds something.
pub(super) struct Record {
    rows: Vec<(&'static str, String, Option<Color>)>,
}

impl Record {
    pub(super) fn new() -> Record {
        Record { rows: Vec::new() }
    }

    /// Adds a field, unless it is empty.
    pub(super) fn field(mut self, name: &'static str, value: impl Into<String>) -> Record {
        let value = value.into();
        if !value.is_empty() {
            self.rows.push((name, value, None));
        }
        self
    }

    /// Adds a field in colour.
    pub(super) fn coloured(mut self, name: &'static str, value: String, colour: Option<Color>) -> Record {
        self.rows.push((name, value, colour));
        self
    }

    /// Adds a list, unless it is empty.
    pub(super) fn list(self, name: &'static str, values: &[String]) -> Record {
        self.field(name, values.join(", "))
    }

    /// Adds an instant, or what its absence means.
    pub(super) fn instant(
        self,
        name: &'static str,
        instant: Option<&prost_types::Timestamp>,
        absent: &str,
    ) -> Record {
        self.field(name, instant.map_or_else(|| absent.to_owned(), rfc3339))
    }

    /// Adds another record's fields.
    pub(super) fn and(mut self, other: Record) -> Record {
        self.rows.extend(other.rows);
        self
    }

    /// The record as text.
    pub(super) fn show(&self, colours: bool) -> String {
        let mut table = plain(colours);
        // A terminal that says it has no width is not asked to fit anything.
        if table.width().is_some_and(|width| width >= 60) {
            table.set_content_arrangement(ContentArrangement::Dynamic);
        }
        for (name, value, colour) in &self.rows {
            table.add_row([Cell::new(name), cell(value, colour.filter(|_| colours))]);
        }
        if let Some(names) = table.column_mut(0) {
            names.set_constraint(ColumnConstraint::ContentWidth);
        }
        finish(table)
    }
}

/// Many records, a line each.
pub(super) struct Rows {
    table: Table,
    colours: bool,
    empty: bool,
}

impl Rows {
    pub(super) fn new(header: &[&str], colours: bool) -> Rows {
        let mut table = plain(colours);
        table.set_header(header.iter().copied());
        Rows { table, colours, empty: true }
    }

    /// Adds a record.
    pub(super) fn row(&mut self, cells: impl IntoIterator<Item = (String, Option<Color>)>) {
        let colours = self.colours;
        self.table.add_row(cells.into_iter().map(|(text, colour)| cell(&text, colour.filter(|_| colours))));
        self.empty = false;
    }

    /// The table, or `none` when it is empty. Each record stays on its line, whatever the terminal's width:
    /// broken cells can neither be copied nor found.
    pub(super) fn show(self, none: &str) -> String {
        if self.empty { format!("{none}\n") } else { finish(self.table) }
    }
}

fn plain(colours: bool) -> Table {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_content_arrangement(ContentArrangement::Disabled);
    if colours {
        table.enforce_styling();
        table.style_text_only();
    }
    table
}

fn cell(text: &str, colour: Option<Color>) -> Cell {
    let cell = Cell::new(clean(text));
    match colour {
        Some(colour) => cell.fg(colour),
        None => cell,
    }
}

fn finish(table: Table) -> String {
    // Every line starts with the padding of its first cell.
    let lines = table.lines().map(|line| line.strip_prefix(' ').unwrap_or(&line).trim_end().to_owned());
    lines.fold(String::new(), |text, line| text + &line + "\n")
}

/// A plain cell.
pub(super) fn text(text: impl Into<String>) -> (String, Option<Color>) {
    (text.into(), None)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_without_records_says_so() {
        assert_eq!(Rows::new(&["ID"], false).show("No keys."), "No keys.\n");
        let mut rows = Rows::new(&["ID", "NAME"], false);
        rows.row([text("1"), text("a")]);
        assert_eq!(rows.show("No keys."), "ID  NAME\n1   a\n");
    }

    #[test]
    fn colours_come_only_where_they_are_wanted() {
        let record = Record::new().coloured("state", "active".to_owned(), Some(Color::Green));
        assert_eq!(record.show(false), "state  active\n");
        assert!(record.show(true).contains("\u{1b}["));
    }

    #[test]
    fn what_is_empty_is_left_out() {
        let record = Record::new().field("user", "").list("roles", &[]).instant("expires", None, "");
        assert_eq!(record.field("id", "1").show(false), "id  1\n");
    }
}
