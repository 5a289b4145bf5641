//! Renders many records as a table, or one record as a list of fields, with colors and the terminal's width.
//!
//! Text from the server is escaped (see [`EscapedText`]): a key's metadata must not control the reader's terminal, nor
//! hide or reorder what it shows.

use comfy_table::{Cell, Color, ColumnConstraint, ContentArrangement, Table, presets};

use super::value_format::format_rfc3339;
use crate::domain::{credential_mask::mask_value, text::EscapedText};

/// Escapes characters that control a terminal or are invisible.
pub(super) fn escape_terminal(text: &str) -> String {
    EscapedText(text).to_string()
}

/// Formats a user's value for a message. A secret that was given by mistake is masked.
pub(super) fn shown_value(value: &str) -> String {
    escape_terminal(&mask_value(value))
}

/// Like [`escape_terminal`], but keeps line breaks.
pub(super) fn escape_terminal_lines(text: &str) -> String {
    text.split('\n').map(escape_terminal).collect::<Vec<_>>().join("\n")
}

/// One record, with a line for each field that is not empty.
pub(super) struct DetailTable {
    rows: Vec<(&'static str, String, Option<Color>)>,
}

impl DetailTable {
    pub(super) fn new() -> DetailTable {
        DetailTable { rows: Vec::new() }
    }

    /// Adds a field, unless it is empty.
    pub(super) fn field(mut self, name: &'static str, value: impl Into<String>) -> DetailTable {
        let value = value.into();
        if !value.is_empty() {
            self.rows.push((name, value, None));
        }
        self
    }

    pub(super) fn colored_field(
        mut self,
        name: &'static str,
        value: String,
        color: Option<Color>,
    ) -> DetailTable {
        self.rows.push((name, value, color));
        self
    }

    /// Adds a list, unless it is empty.
    pub(super) fn list_field(self, name: &'static str, values: &[String]) -> DetailTable {
        self.field(name, values.join(", "))
    }

    /// Adds an instant, or `absent` if it is missing.
    pub(super) fn instant_field(
        self,
        name: &'static str,
        instant: Option<&prost_types::Timestamp>,
        absent: &str,
    ) -> DetailTable {
        self.field(name, instant.map_or_else(|| absent.to_owned(), format_rfc3339))
    }

    pub(super) fn merge(mut self, other: DetailTable) -> DetailTable {
        self.rows.extend(other.rows);
        self
    }

    pub(super) fn render(&self, colors: bool) -> String {
        let mut table = new_plain_table(colors);
        // Some terminals report a width of 0; wrapping to less than 60 columns would be unreadable.
        if table.width().is_some_and(|width| width >= 60) {
            table.set_content_arrangement(ContentArrangement::Dynamic);
        }
        for (name, value, color) in &self.rows {
            table.add_row([Cell::new(name), new_cell(value, color.filter(|_| colors))]);
        }
        if let Some(names) = table.column_mut(0) {
            names.set_constraint(ColumnConstraint::ContentWidth);
        }
        render_table(table)
    }
}

/// Many records, one line for each.
pub(super) struct ListTable {
    table: Table,
    colors: bool,
    is_empty: bool,
}

impl ListTable {
    pub(super) fn new(header: &[&str], colors: bool) -> ListTable {
        let mut table = new_plain_table(colors);
        table.set_header(header.iter().copied());
        ListTable { table, colors, is_empty: true }
    }

    pub(super) fn add_row(&mut self, cells: impl IntoIterator<Item = (String, Option<Color>)>) {
        let colors = self.colors;
        self.table.add_row(cells.into_iter().map(|(text, color)| new_cell(&text, color.filter(|_| colors))));
        self.is_empty = false;
    }

    /// Renders the table, or `none` if it is empty. Rows are never wrapped, so that cells can be copied and searched.
    pub(super) fn render(self, none: &str) -> String {
        if self.is_empty { format!("{none}\n") } else { render_table(self.table) }
    }
}

fn new_plain_table(colors: bool) -> Table {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_content_arrangement(ContentArrangement::Disabled);
    if colors {
        table.enforce_styling();
        table.style_text_only();
    }
    table
}

fn new_cell(text: &str, color: Option<Color>) -> Cell {
    let cell = Cell::new(escape_terminal(text));
    match color {
        Some(color) => cell.fg(color),
        None => cell,
    }
}

fn render_table(table: Table) -> String {
    // Each line starts with the padding of its first cell.
    let lines = table.lines().map(|line| line.strip_prefix(' ').unwrap_or(&line).trim_end().to_owned());
    lines.fold(String::new(), |text, line| text + &line + "\n")
}

pub(super) fn plain_cell(text: impl Into<String>) -> (String, Option<Color>) {
    (text.into(), None)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_without_records_says_so() {
        assert_eq!(ListTable::new(&["ID"], false).render("No keys."), "No keys.\n");
        let mut rows = ListTable::new(&["ID", "NAME"], false);
        rows.add_row([plain_cell("1"), plain_cell("a")]);
        assert_eq!(rows.render("No keys."), "ID  NAME\n1   a\n");
    }

    #[test]
    fn colours_come_only_where_they_are_wanted() {
        let record = DetailTable::new().colored_field("state", "active".to_owned(), Some(Color::Green));
        assert_eq!(record.render(false), "state  active\n");
        assert!(record.render(true).contains("\u{1b}["));
    }

    #[test]
    fn what_is_empty_is_left_out() {
        let record =
            DetailTable::new().field("user", "").list_field("roles", &[]).instant_field("expires", None, "");
        assert_eq!(record.field("id", "1").render(false), "id  1\n");
    }
}
