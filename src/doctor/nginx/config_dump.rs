//! Parses the output of `nginx -T`: every file of a configuration, each after a line with its name. Includes are expanded, so
//! that each directive is in the block where it applies.

use super::syntax::{self, NginxDirective};

/// Begins the line before each file, which ends with the name and a colon.
const FILE_HEADER_PREFIX: &str = "# configuration file ";

struct DumpedFile {
    name: String,
    directives: Vec<NginxDirective>,
}

/// Parses one file or the output of `nginx -T`. Includes of missing files are kept.
///
/// # Errors
/// The line of the first mistake, with the problem.
pub(super) fn parse_dump(text: &str) -> Result<Vec<NginxDirective>, String> {
    let mut parts: Vec<(Option<&str>, String, usize)> = vec![(None, String::new(), 1)];
    for (at, line) in text.lines().enumerate() {
        match line.strip_prefix(FILE_HEADER_PREFIX).and_then(|rest| rest.strip_suffix(':')) {
            Some(name) => parts.push((Some(name), String::new(), at + 2)),
            None => {
                let (_, part, _) = parts.last_mut().expect("the first part");
                part.push_str(line);
                part.push('\n');
            }
        }
    }
    let before = parts.remove(0).1;
    let of_a_dump = |line: &str| line.is_empty() || line.starts_with("nginx: ");
    if parts.is_empty() || !before.lines().all(|line| of_a_dump(line.trim())) {
        return syntax::parse_directives(text, 1);
    }
    let mut files = Vec::new();
    for (name, text, line) in parts {
        files.push(DumpedFile {
            name: name.unwrap_or_default().to_owned(),
            directives: syntax::parse_directives(text.trim_end(), line)?,
        });
    }
    let root = &files[0];
    Ok(expand_includes(&root.directives, &files, &mut vec![&*root.name]))
}

/// Expands the includes of a block. `inside` are the files around it, which are not included again.
fn expand_includes<'f>(
    block: &[NginxDirective],
    files: &'f [DumpedFile],
    inside: &mut Vec<&'f str>,
) -> Vec<NginxDirective> {
    let mut all = Vec::new();
    for directive in block {
        if directive.name == "include" {
            let pattern = resolve_include_path(directive.argument(0), &files[0].name);
            let found: Vec<_> = files
                .iter()
                .filter(|file| matches_glob(&pattern, &file.name) && !inside.contains(&&*file.name))
                .collect();
            // A pattern may match no file, but a named file must exist.
            if found.is_empty() && !pattern.contains('*') {
                all.push(directive.clone());
            }
            for file in found {
                inside.push(&file.name);
                all.extend(expand_includes(&file.directives, files, inside));
                inside.pop();
            }
        } else {
            let block = directive.block.as_ref().map(|block| expand_includes(block, files, inside));
            all.push(NginxDirective { block, ..directive.clone() });
        }
    }
    all
}

/// Resolves a path as nginx does: relative to the folder of its first file.
fn resolve_include_path(path: &str, root: &str) -> String {
    match root.rsplit_once('/') {
        Some((folder, _)) if !path.starts_with('/') => format!("{folder}/{path}"),
        _ => path.to_owned(),
    }
}

/// Whether a pattern of `include` matches a name: `*` and `?` match anything but `/`.
fn matches_glob(pattern: &str, name: &str) -> bool {
    let mut letters = name.char_indices();
    match pattern.chars().next() {
        None => name.is_empty(),
        Some('*') => {
            let rest = &pattern[1..];
            let end = name.find('/').unwrap_or(name.len());
            let mut places = name.char_indices().map(|(at, _)| at).chain([name.len()]);
            places.any(|at| at <= end && matches_glob(rest, &name[at..]))
        }
        Some(wanted) => {
            let Some((_, letter)) = letters.next() else { return false };
            (wanted == letter || wanted == '?' && letter != '/')
                && matches_glob(&pattern[wanted.len_utf8()..], letters.as_str())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(all: &[NginxDirective]) -> Vec<String> {
        let one = |directive: &NginxDirective| {
            let inside = names(directive.children()).join(" ");
            let block = if directive.block.is_some() { format!("{{{inside}}}") } else { String::new() };
            format!("{}{}{block}", directive.name, directive.line)
        };
        all.iter().map(one).collect()
    }

    #[test]
    fn what_nginx_dumps_is_read_with_every_file_in_its_place() {
        let dump = "nginx: the configuration file /n/n.conf syntax is ok\n# configuration file /n/n.conf:\n\
                    http { include conf.d/*.conf; include none/*.conf; include gone; include x.t; }\n\
                    # configuration file /n/conf.d/b.conf:\nb;\n\n# configuration file /n/conf.d/c.conf:\n\n\
                    c { include x.t; }\n# configuration file /n/x.t:\nx; include x.t;";
        assert_eq!(names(&parse_dump(dump).unwrap()), ["http3{b5 c9{x11 include11} include3 x11 include11}"]);
        // One file with such a comment is one file.
        assert_eq!(names(&parse_dump("a;\n# configuration file b:\nb;").unwrap()), ["a1", "b3"]);
        let wrong = "# configuration file /n/n.conf:\na;\n# configuration file /n/b:\n\nb";
        assert_eq!(parse_dump(wrong), Err("line 5: the file ends inside a directive".to_owned()));
    }

    #[test]
    fn a_star_stays_in_its_folder() {
        for (pattern, name, right) in [
            ("/a/*.conf", "/a/b.conf", true),
            ("/a/*.conf", "/a/.conf", true),
            ("/a/*.conf", "/a/b/c.conf", false),
            ("/a/*/*", "/a/b/c", true),
            ("/a/?", "/a/b", true),
            ("/a?b", "/a/b", false),
            ("/a", "/ab", false),
            ("*\u{e9}*", "a\u{e9}b", true),
        ] {
            assert_eq!(matches_glob(pattern, name), right, "{pattern} {name}");
        }
    }
}
