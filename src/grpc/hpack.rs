//! Decodes HPACK header blocks (RFC 7541) as far as early load shedding needs: the peer's dynamic table, the path of a
//! call, and the block rewritten without references to that table.
//!
//! HTTP/2 decodes every block that it gets. This copy of the table exists so that a block may be withheld.

use std::collections::VecDeque;

/// Size of the dynamic table that HTTP/2 allows the peer, in bytes: the protocol's default.
const MAX_TABLE_SIZE: usize = 4096;
/// Overhead of an entry in bytes (RFC 7541, section 4.1).
const ENTRY_OVERHEAD: usize = 32;
/// Number of entries in the static table.
const STATIC_ENTRIES: usize = STATIC_NAME_LENGTHS.len();
/// Indexes of `:path` in the static table.
const STATIC_PATH_INDEXES: [usize; 2] = [4, 5];
/// The largest rewritten block, in bytes.
const MAX_REWRITTEN: usize = 64 << 10;

/// Lengths of the names in the static table (RFC 7541, appendix A).
const STATIC_NAME_LENGTHS: [u8; 61] = [
    10, 7, 7, 5, 5, 7, 7, 7, 7, 7, 7, 7, 7, 7, 14, 15, 15, 13, 6, 27, 3, 5, 13, 13, 19, 16, 16, 14, 16, 13,
    12, 6, 4, 4, 6, 7, 4, 4, 8, 17, 13, 8, 19, 13, 4, 8, 12, 18, 19, 5, 7, 7, 11, 6, 10, 25, 17, 10, 4, 3,
    16,
];

/// The block is malformed or too large.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct MalformedBlock;

/// The name of a header field.
#[derive(Clone, PartialEq, Eq)]
enum FieldName {
    /// The name of this entry of the static table.
    Static(usize),
    Literal(Box<[u8]>),
}

impl FieldName {
    fn len(&self) -> usize {
        match self {
            FieldName::Static(at) => usize::from(STATIC_NAME_LENGTHS[at - 1]),
            FieldName::Literal(name) => name.len(),
        }
    }

    fn is_path(&self) -> bool {
        match self {
            FieldName::Static(at) => STATIC_PATH_INDEXES.contains(at),
            FieldName::Literal(name) => **name == *b":path",
        }
    }
}

/// An entry of the dynamic table. It may contain a token, so it is not `Debug`.
#[derive(Clone)]
struct TableEntry {
    name: FieldName,
    value: Box<[u8]>,
}

impl TableEntry {
    fn size(&self) -> usize {
        self.name.len() + self.value.len() + ENTRY_OVERHEAD
    }
}

/// The peer's dynamic table, newest entry first.
pub(super) struct HpackTable {
    entries: VecDeque<TableEntry>,
    size: usize,
    max_size: usize,
}

impl Default for HpackTable {
    fn default() -> Self {
        HpackTable { entries: VecDeque::new(), size: 0, max_size: MAX_TABLE_SIZE }
    }
}

/// What a header block contains.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct BlockSummary {
    /// Whether it changes the dynamic table.
    pub(super) changes_table: bool,
    /// Whether its path was accepted by the predicate.
    pub(super) path_matches: bool,
}

/// Whether a block consists only of one-byte references, and so changes no table.
pub(super) fn is_fully_indexed(block: &[u8]) -> bool {
    block.iter().all(|byte| *byte >= 0x80)
}

impl HpackTable {
    /// Decodes a block and updates the table. `matches` tests the path. `rewritten` receives the block without
    /// references to the dynamic table. Fails if the block is malformed; the table is undefined then.
    pub(super) fn decode_block(
        &mut self,
        block: &[u8],
        matches: impl Fn(&[u8]) -> bool,
        mut rewritten: Option<&mut Vec<u8>>,
    ) -> Result<BlockSummary, MalformedBlock> {
        let (mut rest, mut summary) = (block, BlockSummary::default());
        while let Some(&first) = rest.first() {
            if first & 0xe0 == 0x20 {
                self.resize(read_integer(&mut rest, 5)?)?;
                summary.changes_table = true;
                continue;
            }
            if first & 0x80 != 0 {
                let at = read_integer(&mut rest, 7)?;
                if (1..=STATIC_ENTRIES).contains(&at) {
                    if let Some(out) = rewritten.as_deref_mut() {
                        write_integer(out, 0x80, 7, at);
                    }
                    continue;
                }
                let entry = self.get_entry(at)?;
                summary.path_matches |= entry.name.is_path() && matches(&entry.value);
                if let Some(out) = rewritten.as_deref_mut() {
                    write_literal(out, entry)?;
                }
                continue;
            }
            let inserts = first & 0x40 != 0;
            let entry = self.read_literal(&mut rest, if inserts { 6 } else { 4 })?;
            summary.path_matches |= entry.name.is_path() && matches(&entry.value);
            if let Some(out) = rewritten.as_deref_mut() {
                write_literal(out, &entry)?;
            }
            if inserts {
                summary.changes_table = true;
                self.insert(entry);
            }
        }
        Ok(summary)
    }

    fn get_entry(&self, at: usize) -> Result<&TableEntry, MalformedBlock> {
        at.checked_sub(STATIC_ENTRIES + 1).and_then(|at| self.entries.get(at)).ok_or(MalformedBlock)
    }

    fn read_literal(&self, rest: &mut &[u8], prefix: u32) -> Result<TableEntry, MalformedBlock> {
        let name = match read_integer(rest, prefix)? {
            0 => FieldName::Literal(read_string(rest)?),
            at if at <= STATIC_ENTRIES => FieldName::Static(at),
            at => self.get_entry(at)?.name.clone(),
        };
        Ok(TableEntry { name, value: read_string(rest)? })
    }

    fn insert(&mut self, entry: TableEntry) {
        self.size += entry.size();
        self.entries.push_front(entry);
        self.evict();
    }

    fn resize(&mut self, limit: usize) -> Result<(), MalformedBlock> {
        if limit > MAX_TABLE_SIZE {
            return Err(MalformedBlock);
        }
        self.max_size = limit;
        self.evict();
        Ok(())
    }

    fn evict(&mut self) {
        while self.size > self.max_size
            && let Some(oldest) = self.entries.pop_back()
        {
            self.size -= oldest.size();
        }
    }
}

/// Decodes an integer with a prefix of `prefix` bits (RFC 7541, section 5.1).
fn read_integer(rest: &mut &[u8], prefix: u32) -> Result<usize, MalformedBlock> {
    let (first, mut after) = rest.split_first().ok_or(MalformedBlock)?;
    let max_value = (1usize << prefix) - 1;
    let mut value = usize::from(*first) & max_value;
    if value == max_value {
        // Five bytes suffice for any length of a frame.
        for shift in [0, 7, 14, 21, 28] {
            let (byte, next) = after.split_first().ok_or(MalformedBlock)?;
            after = next;
            value += usize::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                break;
            }
            if shift == 28 {
                return Err(MalformedBlock);
            }
        }
    }
    *rest = after;
    Ok(value)
}

fn read_string(rest: &mut &[u8]) -> Result<Box<[u8]>, MalformedBlock> {
    let huffman = *rest.first().ok_or(MalformedBlock)? & 0x80 != 0;
    let length = read_integer(rest, 7)?;
    let (text, after) = rest.split_at_checked(length).ok_or(MalformedBlock)?;
    *rest = after;
    if huffman { huffman::decode(text) } else { Ok(text.into()) }
}

fn write_integer(out: &mut Vec<u8>, flags: u8, prefix: u32, value: usize) {
    let max_value = (1usize << prefix) - 1;
    let byte = |value: usize| u8::try_from(value).unwrap_or(u8::MAX);
    if value < max_value {
        return out.push(flags | byte(value));
    }
    out.push(flags | byte(max_value));
    let mut left = value - max_value;
    while left >= 0x80 {
        out.push(0x80 | byte(left & 0x7f));
        left >>= 7;
    }
    out.push(byte(left));
}

/// Writes a string without Huffman coding.
pub(super) fn write_string(out: &mut Vec<u8>, text: &[u8]) {
    write_integer(out, 0, 7, text.len());
    out.extend(text);
}

/// Writes a literal field that is not inserted into the table.
fn write_literal(out: &mut Vec<u8>, entry: &TableEntry) -> Result<(), MalformedBlock> {
    match &entry.name {
        FieldName::Static(at) => write_integer(out, 0, 4, *at),
        FieldName::Literal(name) => {
            out.push(0);
            write_string(out, name);
        }
    }
    write_string(out, &entry.value);
    if out.len() > MAX_REWRITTEN { Err(MalformedBlock) } else { Ok(()) }
}

/// HPACK's Huffman code (RFC 7541, appendix B). It is canonical: codes of one length are consecutive, in
/// the order of their symbols.
mod huffman {
    use super::MalformedBlock;

    /// Number of codes by length in bits.
    const CODES_PER_LENGTH: [u8; 31] = [
        0, 0, 0, 0, 0, 10, 26, 32, 6, 0, 5, 3, 2, 6, 2, 3, 0, 0, 0, 3, 8, 13, 26, 29, 12, 4, 15, 19, 29, 0, 4,
    ];
    /// The symbols in the order of their codes, without the end-of-string symbol, which never occurs in a string.
    const SYMBOLS: [u8; 256] = [
        48, 49, 50, 97, 99, 101, 105, 111, 115, 116, 32, 37, 45, 46, 47, 51, 52, 53, 54, 55, 56, 57, 61, 65,
        95, 98, 100, 102, 103, 104, 108, 109, 110, 112, 114, 117, 58, 66, 67, 68, 69, 70, 71, 72, 73, 74, 75,
        76, 77, 78, 79, 80, 81, 82, 83, 84, 85, 86, 87, 89, 106, 107, 113, 118, 119, 120, 121, 122, 38, 42,
        44, 59, 88, 90, 33, 34, 40, 41, 63, 39, 43, 124, 35, 62, 0, 36, 64, 91, 93, 126, 94, 125, 60, 96,
        123, 92, 195, 208, 128, 130, 131, 162, 184, 194, 224, 226, 153, 161, 167, 172, 176, 177, 179, 209,
        216, 217, 227, 229, 230, 129, 132, 133, 134, 136, 146, 154, 156, 160, 163, 164, 169, 170, 173, 178,
        181, 185, 186, 187, 189, 190, 196, 198, 228, 232, 233, 1, 135, 137, 138, 139, 140, 141, 143, 147,
        149, 150, 151, 152, 155, 157, 158, 165, 166, 168, 174, 175, 180, 182, 183, 188, 191, 197, 231, 239,
        9, 142, 144, 145, 148, 159, 171, 206, 215, 225, 236, 237, 199, 207, 234, 235, 192, 193, 200, 201,
        202, 205, 210, 213, 218, 219, 238, 240, 242, 243, 255, 203, 204, 211, 212, 214, 221, 222, 223, 241,
        244, 245, 246, 247, 248, 250, 251, 252, 253, 254, 2, 3, 4, 5, 6, 7, 8, 11, 12, 14, 15, 16, 17, 18,
        19, 20, 21, 23, 24, 25, 26, 27, 28, 29, 30, 31, 127, 220, 249, 10, 13, 22,
    ];

    /// Decodes a string. Fails on the end-of-string code, and on padding other than up to seven ones.
    pub(super) fn decode(text: &[u8]) -> Result<Box<[u8]>, MalformedBlock> {
        let mut out = Vec::with_capacity(text.len() * 8 / 5);
        let mut code = PartialCode::default();
        for byte in text {
            for bit in (0..8).rev() {
                if let Some(at) = code.push_bit(u32::from(byte >> bit) & 1)? {
                    out.push(*SYMBOLS.get(at).ok_or(MalformedBlock)?);
                    code = PartialCode::default();
                }
            }
        }
        let padding = code.length < 8 && code.bits == (1 << code.length) - 1;
        if padding { Ok(out.into()) } else { Err(MalformedBlock) }
    }

    /// A code whose first bits are known.
    #[derive(Default)]
    struct PartialCode {
        length: usize,
        bits: u32,
        /// The first code of this length, and the index of its symbol.
        first_code: u32,
        symbol_index: u32,
    }

    impl PartialCode {
        /// Adds a bit. Returns the index of the symbol if the code is complete.
        fn push_bit(&mut self, bit: u32) -> Result<Option<usize>, MalformedBlock> {
            let shorter = u32::from(CODES_PER_LENGTH[self.length]);
            self.first_code = (self.first_code + shorter) << 1;
            self.symbol_index += shorter;
            self.length += 1;
            self.bits = self.bits << 1 | bit;
            let count = *CODES_PER_LENGTH.get(self.length).ok_or(MalformedBlock)?;
            let at = self.bits.checked_sub(self.first_code).filter(|at| *at < u32::from(count));
            Ok(at.and_then(|at| usize::try_from(self.symbol_index + at).ok()))
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn hex(text: &str) -> Vec<u8> {
        let digits: Vec<_> = text.bytes().filter(u8::is_ascii_hexdigit).collect();
        let byte = |pair: &[u8]| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap();
        digits.chunks(2).map(byte).collect()
    }

    /// The table's entries as RFC 7541 writes them.
    fn entries(table: &HpackTable) -> Vec<(usize, String)> {
        let text = |entry: &TableEntry| (entry.size(), String::from_utf8(entry.value.to_vec()).unwrap());
        table.entries.iter().map(text).collect()
    }

    #[test]
    fn requests_of_the_standard_fill_the_table_as_it_says() {
        // RFC 7541, appendix C.4: requests with Huffman's code.
        let mut table = HpackTable::default();
        for (block, size, newest) in [
            ("8286 8441 8cf1 e3c2 e5f2 3a6b a0ab 90f4 ff", 57, "www.example.com"),
            ("8286 84be 5886 a8eb 1064 9cbf", 110, "no-cache"),
            ("8287 85bf 4088 25a8 49e9 5ba9 7d7f 8925 a849 e95b b8e8 b4bf", 164, "custom-value"),
        ] {
            let summary = table.decode_block(&hex(block), |_| true, None).unwrap();
            assert!(summary.changes_table && !summary.path_matches, "the path is in the static table");
            assert_eq!((table.size, entries(&table)[0].1.as_str()), (size, newest));
        }
        let sizes: Vec<_> = entries(&table).into_iter().map(|(size, _)| size).collect();
        assert_eq!(sizes, [54, 53, 57]);
    }

    #[test]
    fn old_entries_leave_as_the_standard_says() {
        // RFC 7541, appendix C.6: responses, with a table of 256 bytes.
        let mut table = HpackTable::default();
        table.resize(256).unwrap();
        for (block, size) in [
            (
                "4882 6402 5885 aec3 771a 4b61 96d0 7abe 9410 54d4 44a8 2005 9504 0b81 66e0 82a6 2d1b ff6e 919d 29ad \
                 1718 63c7 8f0b 97c8 e9ae 82ae 43d3",
                222,
            ),
            ("4883 640e ffc1 c0bf", 222),
            (
                "88c1 6196 d07a be94 1054 d444 a820 0595 040b 8166 e084 a62d 1bff c05a 839b d9ab 77ad 94e7 821d d7f2 \
                 e6c7 b335 dfdf cd5b 3960 d5af 2708 7f36 72c1 ab27 0fb5 291f 9587 3160 65c0 03ed 4ee5 b106 3d50 07",
                215,
            ),
        ] {
            table.decode_block(&hex(block), |_| false, None).unwrap();
            assert_eq!(table.size, size, "{block}");
        }
        assert_eq!(entries(&table).len(), 3);
        assert_eq!(entries(&table)[0].1, "foo=ASDJKHQKBZXOQWEOPIUAXQWEOIU; max-age=3600; version=1");
    }

    #[test]
    fn a_rewritten_block_refers_to_no_table() {
        let mut table = HpackTable::default();
        let first = [&[0x83, 0x86, 0x44, 2][..], b"/p", &[0x40, 3], b"x-a", &[1], b"1"].concat();
        table.decode_block(&first, |_| false, None).unwrap();
        let mut out = Vec::new();
        // Both entries by reference, and the name of one.
        let again = [&[0x83, 0x86, 0xbf, 0xbe, 0x0f, 0x2f, 1][..], b"2"].concat();
        let summary = table.decode_block(&again, |path| path == b"/p", Some(&mut out)).unwrap();
        assert_eq!(summary, BlockSummary { changes_table: false, path_matches: true });
        let plain =
            [&[0x83, 0x86, 0x04, 2][..], b"/p", &[0, 3], b"x-a", &[1], b"1", &[0, 3], b"x-a", &[1], b"2"];
        assert_eq!(out, plain.concat());
    }

    #[test]
    fn blocks_that_no_encoder_writes_are_malformed() {
        for block in [
            "80",
            "be",
            "ff",
            "ffffffffffffff",
            "40",
            "4003 7878",
            "0085 ffffffffff 0161",
            "3fe2ff03",
            "0081 00 00",
        ] {
            let read = HpackTable::default().decode_block(&hex(block), |_| false, None);
            assert_eq!(read, Err(MalformedBlock), "{block}");
        }
    }

    #[test]
    fn references_to_a_large_entry_are_not_written_out_without_end() {
        let mut table = HpackTable::default();
        let entry = [&[0x40, 1][..], b"a", &[0x7f, 0x81, 0x1e], &vec![b'x'; 4000 - 32]].concat();
        assert!(table.decode_block(&entry, |_| false, None).is_ok());
        let mut out = Vec::new();
        assert_eq!(table.decode_block(&[0xbe; 16_000], |_| false, Some(&mut out)), Err(MalformedBlock));
        assert!(out.len() < MAX_REWRITTEN + MAX_TABLE_SIZE);
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_or_malformed(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let (mut table, mut out) = (HpackTable::default(), Vec::new());
            let _ = table.decode_block(&bytes, |_| false, Some(&mut out));
            prop_assert!(table.size <= MAX_TABLE_SIZE);
        }

        #[test]
        fn integers_come_back_as_they_were(value in 0usize..(1 << 24), prefix in 4u32..8) {
            let mut out = Vec::new();
            write_integer(&mut out, 0, prefix, value);
            let mut rest = &out[..];
            prop_assert_eq!(read_integer(&mut rest, prefix), Ok(value));
            prop_assert!(rest.is_empty());
        }
    }
}
