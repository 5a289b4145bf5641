//! Reads the rows of an import's file in batches that fit into one call each. The whole file is never in memory.

use std::io::{self, Read, Seek};

use clap::ValueEnum;
use encoding_rs::{Encoding, ISO_2022_JP, REPLACEMENT};
use prost::Message as _;

use super::{
    column::{ColumnNameArgs, ImportColumn},
    csv_rows::{self, CsvRecord},
    header::{ColumnNameCheck, CsvHeader, check_json_fields},
    json_rows::{JsonFields, JsonLayout, JsonObject},
    precheck::WholeFileSyntax,
    row::{KeyDraft, RowDefaultArgs, RowSkipReason},
    text_reader::{FilePosition, TextReader},
};
use crate::{cli::error::CliError, domain::time::Timestamp, pb};

/// The server's limit of keys in one Import.
pub(super) const MAX_KEYS_PER_CALL: usize = 1_000;
/// The size limit for the keys of one call, below the server's 4 MiB for a request.
const MAX_BATCH_BYTES: usize = 3_500_000;

/// The format of a file's rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum ImportFormat {
    /// Values separated by commas, semicolons, tabs or |, with a header line
    Csv,
    /// JSON objects: one on each line, or in one array
    #[value(alias = "jsonl")]
    Json,
}

#[derive(Clone, Debug)]
pub(super) struct ReadOptions {
    pub(super) format: ImportFormat,
    /// The encoding that the user names; a byte order mark takes precedence.
    pub(super) encoding: Option<&'static Encoding>,
    pub(super) columns: ColumnNameArgs,
    pub(super) defaults: RowDefaultArgs,
    /// Keys that expire before this instant are skipped.
    pub(super) now: Timestamp,
}

#[derive(Debug)]
pub(super) struct ImportRow {
    /// The number of the row's first line, from 1.
    pub(super) line: u64,
    /// The row's text in the file.
    pub(super) raw: String,
    /// The key, or why the row is skipped.
    pub(super) key: Result<pb::ImportKey, RowSkipReason>,
}

/// The rows that one call imports.
#[derive(Debug)]
pub(super) struct ImportBatch {
    pub(super) rows: Vec<ImportRow>,
    /// Where the next batch begins.
    pub(super) end: FilePosition,
}

/// How rows and fields are separated in a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum RowDialect {
    Separated(CsvHeader),
    Json(JsonLayout),
}

pub(super) struct RowSource<R> {
    text: TextReader<R>,
    dialect: RowDialect,
    options: ReadOptions,
    /// A row that did not fit into the previous batch.
    deferred_row: Option<ImportRow>,
    /// The position of the first row of the next batch.
    next_row_start: FilePosition,
}

/// Parses the label of an encoding, as the WHATWG Encoding Standard lists them.
pub(super) fn parse_encoding(label: &str) -> Result<&'static Encoding, String> {
    // ISO-2022-JP is refused, because its characters contain bytes that look like line ends and quotes.
    Encoding::for_label(label.as_bytes())
        .filter(|encoding| *encoding != ISO_2022_JP && *encoding != REPLACEMENT)
        .ok_or_else(|| "write an encoding such as utf-8, utf-16le, windows-1252 or shift_jis".to_owned())
}

impl ReadOptions {
    /// Returns the syntax that the whole file must have, by its beginning.
    pub(super) fn required_syntax(&self, input: impl Read + Seek) -> io::Result<WholeFileSyntax> {
        if self.format == ImportFormat::Csv {
            return Ok(WholeFileSyntax::Rows);
        }
        Ok(match JsonLayout::detect(&mut TextReader::open(input, self.encoding)?)? {
            JsonLayout::Lines => WholeFileSyntax::Rows,
            JsonLayout::Array => WholeFileSyntax::JsonValue,
            JsonLayout::Sequence => WholeFileSyntax::JsonValues,
        })
    }
}

impl RowDialect {
    fn detect<R: Read + Seek>(
        text: &mut TextReader<R>,
        options: &ReadOptions,
    ) -> Result<RowDialect, CliError> {
        if options.format == ImportFormat::Csv {
            return Ok(RowDialect::Separated(CsvHeader::read_from(text, &options.columns)?));
        }
        let layout = JsonLayout::detect(text)?;
        let start = text.position();
        if let Some(JsonObject { fields: Ok(fields), .. }) = layout.next_object(text)? {
            check_json_fields(&fields, &options.columns)?;
        }
        text.seek_to(start)?;
        Ok(RowDialect::Json(layout))
    }
}

impl<R: Read + Seek> RowSource<R> {
    /// Reads the header, if there is one, and seeks to the first row, or to `from`.
    pub(super) fn open(
        input: R,
        options: ReadOptions,
        from: Option<FilePosition>,
    ) -> Result<RowSource<R>, CliError> {
        let is_simple =
            |encoding: &&'static Encoding| encoding.is_single_byte() || encoding.name().starts_with("UTF-");
        if options.format == ImportFormat::Json
            && options.encoding.as_ref().is_some_and(|named| !is_simple(named))
        {
            return Err(CliError::new(
                "JSON must be UTF-8, UTF-16 or in an encoding of one byte per character",
            ));
        }
        let mut text = TextReader::open(input, options.encoding)?;
        let dialect = RowDialect::detect(&mut text, &options)?;
        if let Some(from) = from.filter(|from| from.bytes > text.position().bytes) {
            text.seek_to(from)?;
        }
        let before = text.position();
        Ok(RowSource { text, dialect, options, deferred_row: None, next_row_start: before })
    }

    /// Checks all column names, including those of every JSON object. An unknown name is an error.
    ///
    /// A flag that names no column is an error for CSV. For JSON such flags are returned, because objects may lack fields.
    pub(super) fn check_columns(mut self) -> Result<Vec<String>, CliError> {
        let mut check = ColumnNameCheck::new(&self.options.columns);
        let layout = match &self.dialect {
            RowDialect::Separated(header) => {
                header.columns.iter().for_each(|(name, _)| check.add_name(name));
                return check.require_all_used().map(|()| Vec::new());
            }
            RowDialect::Json(layout) => *layout,
        };
        while let Some(object) = layout.next_object(&mut self.text)? {
            let fields = object.fields.unwrap_or_default();
            fields.0.iter().for_each(|(name, _)| check.add_name(name));
        }
        check.unused_flags()
    }

    pub(super) fn dialect(&self) -> &RowDialect {
        &self.dialect
    }

    /// Reads the next batch; `None` at the end of the file.
    pub(super) fn next_batch(&mut self) -> io::Result<Option<ImportBatch>> {
        let (mut rows, mut bytes) = (Vec::new(), 0);
        while rows.len() < MAX_KEYS_PER_CALL {
            let before = self.next_row_start;
            let Some(row) = self.next_row()? else { break };
            let size = row.raw.len().max(row.key.as_ref().map_or(0, |key| key.encoded_len() + 8));
            if !rows.is_empty() && bytes + size > MAX_BATCH_BYTES {
                self.deferred_row = Some(row);
                return Ok(Some(ImportBatch { rows, end: before }));
            }
            bytes += size;
            self.next_row_start = self.text.position();
            rows.push(row);
        }
        Ok((!rows.is_empty()).then_some(ImportBatch { rows, end: self.next_row_start }))
    }

    fn next_row(&mut self) -> io::Result<Option<ImportRow>> {
        if let Some(row) = self.deferred_row.take() {
            return Ok(Some(row));
        }
        let (line, raw, key) = match &self.dialect {
            RowDialect::Separated(header) => {
                let Some(CsvRecord { line, raw, fields }) =
                    csv_rows::next_record(&mut self.text, header.separator)?
                else {
                    return Ok(None);
                };
                let read = |fields: Vec<String>| read_cells(&fields, &header.columns, &self.options);
                (line, raw, fields.map_err(unreadable_row).and_then(read))
            }
            RowDialect::Json(layout) => {
                let Some(JsonObject { line, raw, fields }) = layout.next_object(&mut self.text)? else {
                    return Ok(None);
                };
                let read = |fields: JsonFields| read_fields(fields, &self.options);
                (line, raw, fields.map_err(unreadable_row).and_then(read))
            }
        };
        Ok(Some(ImportRow { line, raw, key }))
    }
}

fn unreadable_row(problem: &str) -> RowSkipReason {
    RowSkipReason::Unreadable(problem.to_owned())
}

/// Converts a row of a CSV file. Blank fields beyond the header are allowed, because spreadsheets add them.
fn read_cells(
    cells: &[String],
    columns: &[(String, ImportColumn)],
    options: &ReadOptions,
) -> Result<pb::ImportKey, RowSkipReason> {
    let surplus = cells.get(columns.len()..).unwrap_or_default();
    if cells.len() < columns.len() || surplus.iter().any(|cell| !cell.trim().is_empty()) {
        return Err(format!("has {} fields; the header has {}", cells.len(), columns.len()).into());
    }
    let mut draft = KeyDraft::default();
    for ((name, column), cell) in columns.iter().zip(cells) {
        draft.set_text(*column, cell).map_err(|problem| format!("{name}: {problem}"))?;
    }
    draft.into_key(&options.defaults, options.now)
}

/// Converts an object of a JSON file.
fn read_fields(fields: JsonFields, options: &ReadOptions) -> Result<pb::ImportKey, RowSkipReason> {
    let (mut draft, mut seen) = (KeyDraft::default(), Vec::new());
    for (name, value) in fields.0 {
        let column = options.columns.resolve(&name).ok_or_else(|| {
            format!("unknown field {name:?}; the fields are {}", ImportColumn::list_names())
        })?;
        if !column.may_repeat() && seen.contains(&column) {
            return Err(format!("{name}: is repeated").into());
        }
        seen.push(column);
        draft.set_json(column, value).map_err(|problem| format!("{name}: {problem}"))?;
    }
    draft.into_key(&options.defaults, options.now)
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use super::*;

    const HEX: &str = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08";

    fn open(
        file: &str,
        format: ImportFormat,
        from: Option<FilePosition>,
    ) -> Result<RowSource<Cursor<Vec<u8>>>, String> {
        let options = ReadOptions {
            format,
            encoding: None,
            columns: ColumnNameArgs::default(),
            defaults: RowDefaultArgs::default(),
            now: Timestamp::from_micros(0),
        };
        let input = Cursor::new(file.as_bytes().to_vec());
        RowSource::open(input, options, from).map_err(|failure| failure.to_string())
    }

    fn problem(row: &ImportRow) -> &str {
        match &row.key {
            Err(RowSkipReason::Unreadable(problem)) => problem,
            other => panic!("{other:?}"),
        }
    }

    fn rows(file: &str, format: ImportFormat) -> Vec<ImportRow> {
        open(file, format, None).unwrap().next_batch().unwrap().map(|batch| batch.rows).unwrap_or_default()
    }

    #[test]
    fn a_wrong_row_does_not_stop_the_others() {
        let file = format!("account,sha256\nacme,{HEX}\nacme\nacme,kw_x\n\nacme,{HEX}\n");
        let rows = rows(&file, ImportFormat::Csv);
        let actual: Vec<_> = rows.iter().map(|row| (row.line, row.key.is_ok())).collect();
        assert_eq!(actual, [(2, true), (3, false), (4, false), (6, true)]);
        assert_eq!(problem(&rows[1]), "has 1 fields; the header has 2");
        let error = problem(&rows[2]);
        assert!(error.starts_with("sha256: write the SHA-256") && !error.contains("kw_x"), "{error}");
    }

    #[test]
    fn json_rows_are_rejected_with_what_is_wrong_and_without_their_values() {
        let file = format!(
            "{{\"account\":\"acme\",\"sha256\":\"{HEX}\"}}\n[1]\n{{\"token\":\"kw_x\"}}\n{{\"name\":[\"kw_x\"]}}\n\
             {{\"expiresAt\":\"never\",\"expires_at\":null}}\n"
        );
        let rows = rows(&file, ImportFormat::Json);
        assert!(rows[0].key.is_ok());
        assert_eq!(problem(&rows[1]), "is not a JSON object");
        assert!(problem(&rows[2]).contains("unknown field \"token\"") && !problem(&rows[2]).contains("kw_x"));
        assert_eq!(problem(&rows[3]), "name: write a text");
        assert_eq!(problem(&rows[4]), "expires_at: is repeated");
    }

    #[test]
    fn blank_cells_beyond_the_header_are_no_error_and_others_are() {
        let file = format!("sha256,,\n{HEX},,\n{HEX},,,,\n{HEX},x,\n{HEX},,,x\n{HEX}\n");
        let rows = rows(&file, ImportFormat::Csv);
        assert!(rows[0].key.is_ok() && rows[1].key.is_ok());
        assert_eq!(problem(&rows[2]), "column 2: the header gives this column no name");
        assert_eq!(problem(&rows[3]), "has 4 fields; the header has 3");
        assert_eq!(problem(&rows[4]), "has 1 fields; the header has 3");
    }

    #[test]
    fn an_encoding_has_the_names_that_the_web_gives_it() {
        for (label, name) in
            [("windows-1252", "windows-1252"), ("CP1252", "windows-1252"), ("utf-16", "UTF-16LE")]
        {
            assert_eq!(parse_encoding(label).unwrap().name(), name);
        }
        for bad in ["", "klingon", "iso-2022-jp"] {
            assert!(parse_encoding(bad).unwrap_err().contains("windows-1252"), "{bad}");
        }
    }

    #[test]
    fn reading_continues_where_a_batch_ended_in_every_dialect() {
        let wide = "a:b ".repeat(25_000);
        let table = |separator: char, line_end: &str, before: &str| {
            let row = |n: usize| format!("n{n}{separator}{HEX}{separator}{wide}{line_end}");
            let header = format!("name{separator}sha256{separator}scopes{line_end}");
            before.to_owned() + &header + &(0..100).map(row).collect::<String>()
        };
        let object = |n: usize| format!("{{\"name\":\"n{n}\",\"sha256\":\"{HEX}\",\"scopes\":\"{wide}\"}}");
        let objects = |between: &str| (0..100).map(object).collect::<Vec<_>>().join(between);
        let files = [
            (ImportFormat::Csv, table(',', "\n", "")),
            (ImportFormat::Csv, table(';', "\r\n", "\u{feff}sep=;\r\n")),
            (ImportFormat::Csv, table('\t', "\r", "")),
            (ImportFormat::Json, objects("\n")),
            (ImportFormat::Json, format!("[{}]", objects(","))),
            (ImportFormat::Json, objects("\n").replace('{', "{\n")),
        ];
        for (format, file) in files {
            let names = |from: Option<FilePosition>| {
                let mut source = open(&file, format, from).unwrap();
                let (mut names, mut ends) = (Vec::new(), Vec::new());
                while let Some(batch) = source.next_batch().unwrap() {
                    let size: usize =
                        batch.rows.iter().map(|row| row.key.as_ref().unwrap().encoded_len()).sum();
                    assert!(size <= MAX_BATCH_BYTES, "{size}");
                    names.extend(batch.rows.into_iter().map(|row| row.key.unwrap().name.unwrap()));
                    ends.push((batch.end, names.len()));
                }
                (names, ends)
            };
            let (all, ends) = names(None);
            assert_eq!(all, (0..100).map(|n| format!("n{n}")).collect::<Vec<_>>());
            assert!(ends.len() > 2, "a batch has room for {MAX_BATCH_BYTES} bytes: {ends:?}");
            for (end, count) in ends {
                assert_eq!(names(Some(end)).0, all[count..]);
            }
        }
    }

    #[test]
    fn a_batch_has_as_many_rows_as_a_call_may() {
        let file = format!("sha256\n{}", format!("{HEX}\n").repeat(MAX_KEYS_PER_CALL + 1));
        let mut source = open(&file, ImportFormat::Csv, None).unwrap();
        let sizes: Vec<usize> =
            std::iter::from_fn(|| source.next_batch().unwrap()).map(|batch| batch.rows.len()).collect();
        assert_eq!(sizes, [MAX_KEYS_PER_CALL, 1]);
    }
}
