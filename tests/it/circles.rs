//! Checks that no files of the source import each other in a circle, neither directly nor through other files.
//!
//! An import through a re-export counts as an import of the file that defines the item. Unit tests are left out.

use std::collections::{BTreeMap, BTreeSet};

use super::tidy::source;

type ModulePath = Vec<String>;

#[derive(Default)]
struct SourceFile {
    path: String,
    /// Name in this module to the path that it stands for: one entry for each name of each `use`.
    imports: BTreeMap<String, ModulePath>,
    /// Paths that the code names, outside `use` and in it.
    named: Vec<ModulePath>,
}

fn module_path(path: &str) -> ModulePath {
    let path = path.strip_prefix("src/").unwrap().strip_suffix(".rs").unwrap();
    let path = path.strip_suffix("/mod").unwrap_or(path);
    if path == "lib" { Vec::new() } else { path.split('/').map(str::to_owned).collect() }
}

/// Splits code into names, `::` and single other characters; leaves out the contents of string literals.
fn tokens(code: &str) -> Vec<&str> {
    let mut found = Vec::new();
    let mut rest = code;
    while let Some(first) = rest.chars().next() {
        let name = rest.find(|letter: char| !letter.is_alphanumeric() && letter != '_').unwrap_or(rest.len());
        let length = if name > 0 {
            name
        } else if rest.starts_with("::") {
            2
        } else if first == '"' {
            string_length(rest)
        } else {
            first.len_utf8()
        };
        let (token, after) = rest.split_at(length);
        if !first.is_whitespace() {
            found.push(token);
        }
        rest = after;
    }
    found
}

fn string_length(text: &str) -> usize {
    let mut escaped = false;
    for (at, letter) in text.char_indices().skip(1) {
        match letter {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            '"' => return at + 1,
            _ => {}
        }
    }
    text.len()
}

/// Reads one tree of a `use` item, which starts at `tokens[at]`; returns the index after it.
fn read_use(tokens: &[&str], mut at: usize, prefix: &ModulePath, file: &mut SourceFile) -> usize {
    let mut path = prefix.clone();
    loop {
        match tokens[at] {
            "{" => {
                at += 1;
                while tokens[at] != "}" {
                    at = read_use(tokens, at, &path, file);
                    if tokens[at] == "," {
                        at += 1;
                    }
                }
                return at + 1;
            }
            "::" => at += 1,
            "as" => {
                file.named.push(path.clone());
                file.imports.insert(tokens[at + 1].to_owned(), path);
                return at + 2;
            }
            "," | ";" | "}" => {
                if path.last().is_some_and(|last| last == "self") && path.len() > 1 {
                    path.pop();
                }
                file.named.push(path.clone());
                file.imports.insert(path.last().unwrap().clone(), path);
                return at;
            }
            name => {
                path.push(name.to_owned());
                at += 1;
            }
        }
    }
}

fn read_file(path: &str, code: &str) -> SourceFile {
    let mut file = SourceFile { path: path.to_owned(), ..SourceFile::default() };
    let tokens = tokens(code);
    let is_name = |token: &str| token.starts_with(|letter: char| letter.is_alphabetic() || letter == '_');
    let mut at = 0;
    while at < tokens.len() {
        if tokens[at] == "use" && tokens.get(at + 1).is_some_and(|next| is_name(next)) {
            at = read_use(&tokens, at + 1, &Vec::new(), &mut file);
        } else if is_name(tokens[at]) {
            let start = at;
            while tokens.get(at + 1) == Some(&"::") && tokens.get(at + 2).is_some_and(|next| is_name(next)) {
                at += 2;
            }
            if at > start {
                file.named.push(tokens[start..=at].iter().step_by(2).map(|&name| name.to_owned()).collect());
            }
            at += 1;
        } else {
            at += 1;
        }
    }
    file
}

struct SourceTree(BTreeMap<ModulePath, SourceFile>);

impl SourceTree {
    fn read(source: &BTreeMap<String, String>) -> Self {
        Self(source.iter().map(|(path, code)| (module_path(path), read_file(path, code))).collect())
    }

    /// The module that defines the item at `path`, as code in `module` names it. None for other crates, and for modules
    /// themselves.
    fn defining_module(&self, module: &ModulePath, path: &[String], hops: usize) -> Option<ModulePath> {
        let (first, rest) = path.split_first()?;
        let start = match first.as_str() {
            "crate" => Vec::new(),
            "self" => module.clone(),
            "super" => module.split_last()?.1.to_vec(),
            _ => return self.find(module.clone(), path, hops, false),
        };
        self.find(start, rest, hops, true)
    }

    fn find(&self, mut module: ModulePath, path: &[String], hops: usize, known: bool) -> Option<ModulePath> {
        for (at, name) in path.iter().enumerate() {
            if name == "super" {
                module.pop();
                continue;
            }
            module.push(name.clone());
            if self.0.contains_key(&module) {
                continue;
            }
            module.pop();
            let import = self.0.get(&module)?.imports.get(name);
            return match import {
                Some(import) if hops > 0 && import[..] != path[at..] => {
                    let path: Vec<_> = import.iter().chain(&path[at + 1..]).cloned().collect();
                    self.defining_module(&module, &path, hops - 1)
                }
                _ => (known || at > 0).then_some(module),
            };
        }
        None
    }

    fn imports(&self) -> BTreeMap<&str, BTreeSet<&str>> {
        let mut all = BTreeMap::<&str, BTreeSet<&str>>::new();
        for (module, file) in &self.0 {
            let targets = file.named.iter().filter_map(|path| self.defining_module(module, path, 8));
            let targets =
                targets.filter(|target| target != module).map(|target| self.0[&target].path.as_str());
            all.insert(&file.path, targets.collect());
        }
        all
    }
}

fn reachable<'a>(imports: &BTreeMap<&'a str, BTreeSet<&'a str>>, from: &'a str) -> BTreeSet<&'a str> {
    let mut found = BTreeSet::new();
    let mut open = vec![from];
    while let Some(next) = open.pop() {
        open.extend(imports[next].iter().filter(|&&target| found.insert(target)));
    }
    found
}

/// Every import that is part of a circle, as `importer -> imported`.
fn circles(source: &BTreeMap<String, String>) -> Vec<String> {
    let tree = SourceTree::read(source);
    let imports = tree.imports();
    let reach: BTreeMap<_, _> = imports.keys().map(|&path| (path, reachable(&imports, path))).collect();
    let edges = imports.iter().flat_map(|(&from, targets)| targets.iter().map(move |&to| (from, to)));
    edges.filter(|(from, to)| reach[to].contains(from)).map(|(from, to)| format!("{from} -> {to}")).collect()
}

#[test]
fn no_files_import_each_other_in_a_circle() {
    let found = circles(&source());
    assert!(found.is_empty(), "imports that close a circle:\n{}", found.join("\n"));
}

#[test]
fn a_circle_through_a_re_export_is_found() {
    let files = [
        ("src/lib.rs", "pub mod a;"),
        ("src/a.rs", "mod b; mod c; pub use self::c::Thing; use b::Other;"),
        ("src/a/b.rs", "use super::Thing; pub struct Other(\"crate::a::Nothing\");"),
        ("src/a/c.rs", "pub struct Thing; fn f() { crate::a::b::g() }"),
    ];
    let files = files.map(|(path, code)| (path.to_owned(), code.to_owned()));
    assert_eq!(circles(&files.into()), ["src/a/b.rs -> src/a/c.rs", "src/a/c.rs -> src/a/b.rs"]);
}
