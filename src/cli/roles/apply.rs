//! `keyward roles apply`: creates and changes the server's roles as a TOML file describes them, and reports the changes.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

use clap::Args;
use comfy_table::Color;
use serde::{Deserialize, Serialize, Serializer};

use super::calls::{fetch_all_roles, format_role_owner, put_role};
use crate::{
    cli::{
        api_client::ApiClient,
        context::CommandContext,
        error::CliError,
        json_output::ToJson,
        table::{ListTable, escape_terminal, plain_cell},
        value_format::shown_path,
    },
    config::toml_messages,
    pb,
};

const FILE_FORMAT_HELP: &str = "\
The file holds a table for each role:

  [[role]]
  name = \"agent\"
  scopes = [\"journeys:run\", \"results:read\"]
  account = \"acme\"        # left out: a global role

Roles of the server that the file does not name are not changed.";

#[derive(Debug, Args)]
#[command(after_help = FILE_FORMAT_HELP)]
pub(in crate::cli) struct RoleApplyArgs {
    /// The TOML file with the roles
    #[arg(value_name = "FILE")]
    file: PathBuf,
    /// Report what would change, without changing it
    #[arg(long)]
    dry_run: bool,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RolesFile {
    #[serde(default)]
    role: Vec<DesiredRole>,
}

/// A role as the file describes it.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
struct DesiredRole {
    name: String,
    #[serde(default)]
    account: String,
    scopes: Vec<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum RoleChangeKind {
    Created,
    Changed,
    Unchanged,
}

#[derive(Debug, PartialEq, Eq, Serialize)]
struct RoleChange {
    account: Option<String>,
    name: String,
    change: RoleChangeKind,
    added: Vec<String>,
    removed: Vec<String>,
}

#[derive(Debug, Serialize)]
struct RoleApplyReport {
    dry_run: bool,
    roles: Vec<RoleChange>,
}

impl ToJson for RoleApplyReport {
    fn serialize_json<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.serialize(serializer)
    }
}

impl RoleApplyArgs {
    pub(super) async fn run(self, cx: &mut CommandContext<'_>, session: &ApiClient) -> Result<(), CliError> {
        let desired = read_roles_file(&self.file)?;
        let accounts: BTreeSet<&String> = desired.iter().map(|role| &role.account).collect();
        let mut existing = BTreeMap::new();
        for account in accounts {
            for role in fetch_all_roles(session, account.clone()).await?.roles {
                existing.insert((role.account.clone(), role.name.clone()), role.scopes);
            }
        }
        let mut report = RoleApplyReport { dry_run: self.dry_run, roles: Vec::new() };
        let mut failed = None;
        for role in desired {
            let change = diff_role(&role, existing.get(&(role.account.clone(), role.name.clone())));
            let DesiredRole { name, account, scopes } = role;
            if change.change != RoleChangeKind::Unchanged && !self.dry_run {
                let request = pb::PutRoleRequest { account, name, scopes };
                if let Err(failure) = put_role(session, request).await {
                    failed = Some(failure.with_context(&format!("role {}", change.name)));
                    break;
                }
            }
            report.roles.push(change);
        }
        // The changes that were made are reported even if a later one failed.
        cx.print_response(&report, |colors| render_report(&report, colors))?;
        failed.map_or(Ok(()), Err)
    }
}

fn read_roles_file(path: &Path) -> Result<Vec<DesiredRole>, CliError> {
    let text = fs::read_to_string(path)
        .map_err(|error| CliError::new(format!("cannot read {}: {error}", shown_path(path))))?;
    parse_roles(&text).map_err(|problem| {
        CliError::new(format!("{}: {problem}", shown_path(path))).with_hint("--help shows the file's format")
    })
}

fn parse_roles(text: &str) -> Result<Vec<DesiredRole>, String> {
    let roles: RolesFile = toml::from_str(text).map_err(|error| {
        let line =
            error.span().map_or(1, |span| 1 + text[..span.start.min(text.len())].matches('\n').count());
        format!("line {line}: {}", toml_messages::rephrase_serde_error(error.message()))
    })?;
    if roles.role.is_empty() {
        return Err("the file has no [[role]]".to_owned());
    }
    let mut seen = BTreeSet::new();
    for role in &roles.role {
        if !seen.insert((&role.account, &role.name)) {
            return Err(format!(
                "role {} ({}) is defined twice",
                role.name,
                format_role_owner(&role.account)
            ));
        }
    }
    Ok(roles.role)
}

/// Compares a role with its scopes on the server, if it exists there. People may write `all` for `*`.
fn diff_role(desired: &DesiredRole, existing: Option<&Vec<String>>) -> RoleChange {
    let set = |scopes: &[String]| -> BTreeSet<String> {
        scopes.iter().map(|scope| if scope == "all" { "*".to_owned() } else { scope.clone() }).collect()
    };
    let new = set(&desired.scopes);
    let old = existing.map(|scopes| set(scopes)).unwrap_or_default();
    let added: Vec<String> = new.difference(&old).cloned().collect();
    let removed: Vec<String> = old.difference(&new).cloned().collect();
    let change = match existing {
        None => RoleChangeKind::Created,
        Some(_) if added.is_empty() && removed.is_empty() => RoleChangeKind::Unchanged,
        Some(_) => RoleChangeKind::Changed,
    };
    let account = Some(desired.account.clone()).filter(|account| !account.is_empty());
    RoleChange { account, name: desired.name.clone(), change, added, removed }
}

fn render_report(report: &RoleApplyReport, colors: bool) -> String {
    let mut rows = ListTable::new(&["NAME", "ACCOUNT", "CHANGE", "SCOPES"], colors);
    for change in &report.roles {
        let (word, color) = match (change.change, report.dry_run) {
            (RoleChangeKind::Created, false) => ("created", Some(Color::Green)),
            (RoleChangeKind::Created, true) => ("would be created", Some(Color::Green)),
            (RoleChangeKind::Changed, false) => ("changed", Some(Color::Yellow)),
            (RoleChangeKind::Changed, true) => ("would be changed", Some(Color::Yellow)),
            (RoleChangeKind::Unchanged, _) => ("unchanged", None),
        };
        let added = change.added.iter().map(|scope| format!("+{scope}"));
        let scopes: Vec<String> =
            added.chain(change.removed.iter().map(|scope| format!("-{scope}"))).collect();
        rows.add_row([
            plain_cell(&change.name),
            plain_cell(format_role_owner(change.account.as_deref().unwrap_or_default())),
            (word.to_owned(), color),
            plain_cell(escape_terminal(&scopes.join(" "))),
        ]);
    }
    rows.render("Nothing was changed.")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::scope::Scope;

    fn wanted(scopes: &[&str]) -> DesiredRole {
        let scopes = scopes.iter().map(|scope| (*scope).to_owned()).collect();
        DesiredRole { name: "agent".into(), account: String::new(), scopes }
    }

    fn scopes(scopes: &[&str]) -> Vec<String> {
        scopes.iter().map(|scope| (*scope).to_owned()).collect()
    }

    #[test]
    fn the_shipped_example_holds_roles_that_the_server_takes() {
        let roles = parse_roles(include_str!("../../../deploy/examples/roles.toml")).unwrap();
        let names: Vec<&str> = roles.iter().map(|role| role.name.as_str()).collect();
        assert_eq!(names, ["agent", "read-only", "admin", "owner"]);
        for scope in roles.iter().flat_map(|role| &role.scopes) {
            assert!(Scope::parse_grant(scope).is_ok(), "{scope}");
        }
    }

    #[test]
    fn a_role_that_is_as_the_file_says_is_left_alone_in_whatever_order_it_stands() {
        let there = scopes(&["*", "a:b"]);
        assert_eq!(
            diff_role(&wanted(&["a:b", "all", "a:b"]), Some(&there)).change,
            RoleChangeKind::Unchanged
        );
    }

    #[test]
    fn a_change_says_what_is_gained_and_what_is_lost() {
        let change = diff_role(&wanted(&["a:b", "c:d"]), Some(&scopes(&["a:b", "x:y"])));
        assert_eq!((change.added, change.removed), (scopes(&["c:d"]), scopes(&["x:y"])));
        assert_eq!(change.change, RoleChangeKind::Changed);
        assert_eq!(diff_role(&wanted(&["a:b"]), None).change, RoleChangeKind::Created);
    }

    #[test]
    fn a_mistake_in_the_file_is_told_with_its_line_before_anything_is_sent() {
        for (text, problem) in [
            ("[[role]]\nname = 'a'\nscope = ['a:b']", "line 3: unknown key `scope`"),
            ("[[role]]\nname = 'a'", "the key `scopes` is missing"),
            ("", "no [[role]]"),
            (
                "[[role]]\nname='a'\nscopes=['x:y']\n[[role]]\nname='a'\nscopes=[]",
                "role a (global) is defined twice",
            ),
        ] {
            let error = parse_roles(text).unwrap_err();
            assert!(error.contains(problem), "{error}");
        }
    }

    #[test]
    fn the_report_tells_what_would_be_from_what_was_done() {
        let report = |dry_run| RoleApplyReport { dry_run, roles: vec![diff_role(&wanted(&["a:b"]), None)] };
        assert!(render_report(&report(false), false).contains("agent  global   created  +a:b"));
        assert!(render_report(&report(true), false).contains("would be created"));
    }
}
