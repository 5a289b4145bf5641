//! Parses nginx's configuration into directives, arguments and blocks, with the same rules for words as nginx.
//!
//! The meaning of directives is not known here. The content of a Lua block is skipped.

/// The topic of every finding about nginx.
pub(in crate::doctor) const TOPIC: &str = "nginx";

/// A directive with its arguments and its block.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct NginxDirective {
    /// The name, such as `proxy_pass`.
    pub(super) name: String,
    /// The arguments without quotes and escapes.
    pub(super) arguments: Vec<String>,
    /// The directives in its braces; None = it ends with a semicolon.
    pub(super) block: Option<Vec<NginxDirective>>,
    /// The line of its name, counted from 1.
    pub(super) line: usize,
}

impl NginxDirective {
    /// The argument at an index; empty if there are fewer.
    pub(super) fn argument(&self, at: usize) -> &str {
        self.arguments.get(at).map_or("", String::as_str)
    }

    /// The directives in its braces; empty without braces.
    pub(super) fn children(&self) -> &[NginxDirective] {
        self.block.as_deref().unwrap_or_default()
    }
}

/// Every directive of a block, at any depth.
pub(super) fn flatten(block: &[NginxDirective]) -> Vec<&NginxDirective> {
    block
        .iter()
        .flat_map(|directive| std::iter::once(directive).chain(flatten(directive.children())))
        .collect()
}

/// The maximum nesting of blocks; real configurations nest about five.
const MAX_NESTING_DEPTH: usize = 32;

/// Parses a whole file, whose first line has the number `line`.
///
/// # Errors
/// The line of the first mistake, with the problem.
pub(super) fn parse_directives(text: &str, line: usize) -> Result<Vec<NginxDirective>, String> {
    let mut reader = NginxParser { rest: text, line };
    reader.parse_block(0)
}

enum NginxToken {
    Word(String),
    Semicolon,
    BlockStart,
    BlockEnd,
    EndOfFile,
}

struct NginxParser<'t> {
    rest: &'t str,
    line: usize,
}

impl NginxParser<'_> {
    fn fail<T>(&self, problem: &str) -> Result<T, String> {
        Err(format!("line {}: {problem}", self.line))
    }

    /// Parses the directives up to the end of their block.
    fn parse_block(&mut self, depth: usize) -> Result<Vec<NginxDirective>, String> {
        if depth > MAX_NESTING_DEPTH {
            return self.fail("blocks nest too deeply");
        }
        let (mut all, mut words, mut line) = (Vec::new(), Vec::<String>::new(), 0);
        loop {
            match self.next_token()? {
                NginxToken::Word(word) => {
                    if words.is_empty() {
                        line = self.line;
                    }
                    words.push(word);
                }
                NginxToken::BlockEnd if words.is_empty() && depth > 0 => return Ok(all),
                NginxToken::EndOfFile if words.is_empty() && depth == 0 => return Ok(all),
                NginxToken::BlockEnd => return self.fail("unexpected \"}\""),
                NginxToken::EndOfFile if words.is_empty() => {
                    return self.fail("the file ends inside a block");
                }
                NginxToken::EndOfFile => return self.fail("the file ends inside a directive"),
                NginxToken::Semicolon | NginxToken::BlockStart if words.is_empty() => {
                    return self.fail("a directive has no name");
                }
                end @ (NginxToken::Semicolon | NginxToken::BlockStart) => {
                    let name = words.remove(0);
                    let block = match end {
                        NginxToken::BlockStart if name.ends_with("_by_lua_block") => {
                            self.skip_block()?;
                            Some(Vec::new())
                        }
                        NginxToken::BlockStart => Some(self.parse_block(depth + 1)?),
                        _ => None,
                    };
                    all.push(NginxDirective { name, arguments: std::mem::take(&mut words), block, line });
                }
            }
        }
    }

    fn next_char(&mut self) -> Option<char> {
        let next = self.rest.chars().next()?;
        self.rest = &self.rest[next.len_utf8()..];
        self.line += usize::from(next == '\n');
        Some(next)
    }

    fn peek_char(&self) -> Option<char> {
        self.rest.chars().next()
    }

    fn next_token(&mut self) -> Result<NginxToken, String> {
        loop {
            match self.peek_char() {
                None => return Ok(NginxToken::EndOfFile),
                Some(' ' | '\t' | '\r' | '\n') => _ = self.next_char(),
                Some('#') => while self.next_char().is_some_and(|next| next != '\n') {},
                Some(';') => return Ok(self.consume(NginxToken::Semicolon)),
                Some('{') => return Ok(self.consume(NginxToken::BlockStart)),
                Some('}') => return Ok(self.consume(NginxToken::BlockEnd)),
                Some(quote @ ('"' | '\'')) => {
                    self.next_char();
                    return self.parse_quoted_word(quote).map(NginxToken::Word);
                }
                Some(_) => return Ok(NginxToken::Word(self.parse_bare_word())),
            }
        }
    }

    fn consume(&mut self, token: NginxToken) -> NginxToken {
        self.next_char();
        token
    }

    /// Parses a quoted word, after its first quote.
    fn parse_quoted_word(&mut self, quote: char) -> Result<String, String> {
        let mut word = String::new();
        loop {
            match self.next_char() {
                None => return self.fail("the file ends inside quotes"),
                Some('\\') => self.parse_escape(&mut word),
                Some(end) if end == quote => break,
                Some(letter) => word.push(letter),
            }
        }
        match self.peek_char() {
            None | Some(' ' | '\t' | '\r' | '\n' | ';' | '{' | ')') => Ok(word),
            Some(letter) => self.fail(&format!("unexpected {letter:?} after a quote")),
        }
    }

    /// Parses an unquoted word. `${name}` is a part of it; any other `{` ends it.
    fn parse_bare_word(&mut self) -> String {
        let (mut word, mut variable) = (String::new(), false);
        while let Some(letter) = self.peek_char() {
            if matches!(letter, ' ' | '\t' | '\r' | '\n' | ';') || letter == '{' && !variable {
                break;
            }
            self.next_char();
            variable = letter == '$';
            if letter == '\\' { self.parse_escape(&mut word) } else { word.push(letter) }
        }
        word
    }

    /// Parses the character after a backslash.
    fn parse_escape(&mut self, word: &mut String) {
        match self.next_char() {
            Some(letter @ ('"' | '\'' | '\\')) => word.push(letter),
            Some('t') => word.push('\t'),
            Some('r') => word.push('\r'),
            Some('n') => word.push('\n'),
            Some(other) => word.extend(['\\', other]),
            None => word.push('\\'),
        }
    }

    /// Skips a Lua block up to its closing brace, ignoring braces in strings and comments.
    fn skip_block(&mut self) -> Result<(), String> {
        let mut depth = 1;
        while depth > 0 {
            match self.next_char() {
                None => return self.fail("the file ends inside a block"),
                Some('{') => depth += 1,
                Some('}') => depth -= 1,
                Some(quote @ ('"' | '\'')) => self.skip_lua_string(quote)?,
                Some('[') => _ = self.skip_long_bracket()?,
                Some('-') if self.peek_char() == Some('-') => {
                    self.next_char();
                    let long = self.peek_char() == Some('[') && {
                        self.next_char();
                        self.skip_long_bracket()?
                    };
                    if !long {
                        self.rest = &self.rest[self.rest.find('\n').unwrap_or(self.rest.len())..];
                    }
                }
                Some(_) => {}
            }
        }
        Ok(())
    }

    /// Skips a Lua string, after its first quote.
    fn skip_lua_string(&mut self, quote: char) -> Result<(), String> {
        loop {
            match self.next_char() {
                None => return self.fail("the file ends inside a string"),
                Some('\\') => _ = self.next_char(),
                Some(end) if end == quote => return Ok(()),
                Some(_) => {}
            }
        }
    }

    /// Skips `[[…]]` or `[==[…]==]`, after the first bracket. Returns false if it is neither.
    fn skip_long_bracket(&mut self) -> Result<bool, String> {
        let level = self.rest.bytes().take_while(|byte| *byte == b'=').count();
        if self.rest.as_bytes().get(level) != Some(&b'[') {
            return Ok(false);
        }
        let end = format!("]{}]", "=".repeat(level));
        let Some(at) = self.rest[level..].find(&end) else {
            return self.fail("the file ends inside a long bracket");
        };
        let skipped = &self.rest[..level + at + end.len()];
        self.line += skipped.matches('\n').count();
        self.rest = &self.rest[skipped.len()..];
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn simple(name: &str, arguments: &[&str]) -> NginxDirective {
        let arguments = arguments.iter().map(|word| (*word).to_owned()).collect();
        NginxDirective { name: name.to_owned(), arguments, block: None, line: 0 }
    }

    /// Directives without their line numbers.
    fn bare(all: Vec<NginxDirective>) -> Vec<NginxDirective> {
        all.into_iter().map(|one| NginxDirective { line: 0, block: one.block.map(bare), ..one }).collect()
    }

    #[test]
    fn words_are_split_as_nginx_splits_them() {
        let text = "a; # b;\n'c d' \"e\\\"f\" g\\ h;\nif ($x = \"y\") { k ${l}m n#o; }\nset $p \"\"; q '#';";
        let block = Some(vec![simple("k", &["${l}m", "n#o"])]);
        let wanted = vec![
            simple("a", &[]),
            simple("c d", &["e\"f", "g\\ h"]),
            NginxDirective { block, ..simple("if", &["($x", "=", "y", ")"]) },
            simple("set", &["$p", ""]),
            simple("q", &["#"]),
        ];
        assert_eq!(parse_directives(text, 1).map(bare), Ok(wanted));
    }

    #[test]
    fn a_line_is_where_a_directive_begins() {
        let read =
            parse_directives("\n\nserver {\n  listen\n  80;\n}\ncontent_by_lua_block { a = { 1 } }\nb;", 1)
                .unwrap();
        let lines: Vec<_> = read.iter().map(|one| (one.name.as_str(), one.line)).collect();
        assert_eq!(lines, [("server", 3), ("content_by_lua_block", 7), ("b", 8)]);
        assert_eq!(read[0].children()[0].line, 4);
    }

    #[test]
    fn a_lua_block_ends_where_lua_ends_it() {
        for lua in [
            "ngx.say(\"}\")",
            "s = '}' .. '\\'}'",
            "-- don't }\nx = {}",
            "--[[ }\n} ]] x = { a = 1 }",
            "--[==[ }]] } ]==]",
            "x = [[ } \" ]] y = [=[ }]] ]=]",
            "t[a[1]] = b[\"}\"] - -1",
            "-- [[ }",
        ] {
            let text = format!("access_by_lua_block {{ {lua}\n }}\nb;");
            let read = parse_directives(&text, 1).unwrap_or_else(|problem| panic!("{lua}: {problem}"));
            let last = read.last().unwrap();
            assert_eq!((read.len(), &*last.name, last.line), (2, "b", text.lines().count()), "{lua}");
        }
        for open in ["a_by_lua_block { \"} ", "a_by_lua_block { [[ } ", "a_by_lua_block { -- }"] {
            assert!(parse_directives(open, 1).unwrap_err().contains("the file ends inside"), "{open}");
        }
    }

    #[test]
    fn a_mistake_is_named_with_its_line() {
        for (text, problem) in [
            ("a", "line 1: the file ends inside a directive"),
            ("a {\nb;", "line 2: the file ends inside a block"),
            ("a;\n}", "line 2: unexpected \"}\""),
            ("a { b }", "line 1: unexpected \"}\""),
            (";", "line 1: a directive has no name"),
            ("a \"b", "line 1: the file ends inside quotes"),
            ("a 'b'c;", "line 1: unexpected 'c' after a quote"),
        ] {
            assert_eq!(parse_directives(text, 1), Err(problem.to_owned()), "{text}");
        }
        assert!(parse_directives(&"a {".repeat(100), 1).unwrap_err().contains("too deeply"));
    }

    fn word() -> impl Strategy<Value = String> {
        prop_oneof!["[a-z_$/.=~^]{1,8}", "[ -~]{0,8}", "[\\\\\"'{};# $\\t\\n]{0,5}", any::<String>()]
    }

    fn tree() -> impl Strategy<Value = Vec<NginxDirective>> {
        let words = || ("[a-z]{1,6}", proptest::collection::vec(word(), 0..3));
        let leaf =
            words().prop_map(|(name, arguments)| NginxDirective { name, arguments, block: None, line: 0 });
        let one = leaf.prop_recursive(3, 12, 3, move |inner| {
            (words(), proptest::collection::vec(inner, 0..3)).prop_map(|((name, arguments), block)| {
                NginxDirective { name, arguments, block: Some(block), line: 0 }
            })
        });
        proptest::collection::vec(one, 0..4)
    }

    /// Formats directives as a file, with every argument in quotes.
    fn written(all: &[NginxDirective]) -> String {
        let quote = |word: &String| format!(" \"{}\"", word.replace('\\', "\\\\").replace('"', "\\\""));
        let one = |directive: &NginxDirective| {
            let head = directive.name.clone() + &directive.arguments.iter().map(quote).collect::<String>();
            match &directive.block {
                Some(block) => format!("{head} {{ # a comment\n{}}}\n", written(block)),
                None => format!("{head};\n"),
            }
        };
        all.iter().map(one).collect()
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_again(all in tree()) {
            prop_assert_eq!(parse_directives(&written(&all), 1).map(bare), Ok(all));
        }

        #[test]
        fn no_text_makes_it_panic(text in "[a-z \\\\\"'{};#$\\n]{0,60}|.{0,60}") {
            let _ = parse_directives(&text, 1);
        }
    }
}
