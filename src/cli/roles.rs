//! `keyward roles`: manages roles, the named sets of scopes of an account or of all accounts.

mod apply;
mod calls;

use clap::{Args, Subcommand};

use self::calls::{fetch_all_roles, format_role_owner, put_role};
use super::{
    api_client::{ApiClient, DefaultTimeout},
    context::CommandContext,
    error::CliError,
    table::{DetailTable, ListTable, plain_cell, shown_value},
    text_output,
};
use crate::pb;

#[derive(Debug, Subcommand)]
pub(super) enum RolesCommand {
    /// Create a role, or replace the scopes that it grants
    Put {
        #[command(flatten)]
        role: RoleIdArgs,
        /// Scope that the role grants: monitors:read, monitors:*, or all (repeat, or separate by commas)
        #[arg(long = "scope", short, value_name = "SCOPE", value_delimiter = ',', required = true)]
        scopes: Vec<String>,
    },
    /// List the global roles, or the roles of an account and the global ones
    List {
        #[command(flatten)]
        owner: RoleOwnerArgs,
    },
    /// Delete a role that no key and no member uses
    Delete {
        #[command(flatten)]
        role: RoleIdArgs,
        /// Do not ask for confirmation
        #[arg(long, short)]
        yes: bool,
    },
    /// Create or change all roles of a TOML file; repeating it changes nothing
    Apply(apply::RoleApplyArgs),
}

#[derive(Debug, Args)]
pub(super) struct RoleOwnerArgs {
    /// The account that has the role [default: a global role]
    #[arg(long, value_name = "ID")]
    account: Option<String>,
}

#[derive(Debug, Args)]
pub(super) struct RoleIdArgs {
    /// The role's name: 1-64 characters of [a-z0-9_-]
    #[arg(value_name = "NAME")]
    name: String,
    #[command(flatten)]
    owner: RoleOwnerArgs,
}

impl RolesCommand {
    pub(super) async fn run(self, cx: &mut CommandContext<'_>) -> Result<u8, CliError> {
        if let RolesCommand::Delete { role, yes } = &self {
            let owner = format_role_owner(role.owner.account.as_deref().unwrap_or_default());
            cx.console.confirm(
                &format!("Delete role {} ({})?", shown_value(&role.name), shown_value(&owner)),
                *yes,
            )?;
        }
        let session = cx.connect()?;
        match self {
            RolesCommand::Put { role, scopes } => put_and_show_role(cx, &session, role, scopes).await,
            RolesCommand::List { owner } => list_and_show_roles(cx, &session, owner).await,
            RolesCommand::Delete { role, .. } => delete_role(cx, &session, role).await,
            RolesCommand::Apply(args) => args.run(cx, &session).await,
        }
        .map(|()| 0)
    }
}

async fn put_and_show_role(
    cx: &mut CommandContext<'_>,
    session: &ApiClient,
    role: RoleIdArgs,
    scopes: Vec<String>,
) -> Result<(), CliError> {
    let account = role.owner.account.unwrap_or_default();
    let response = put_role(session, pb::PutRoleRequest { account, name: role.name, scopes }).await?;
    cx.print_response(&response, |colors| {
        let role = response.role.as_ref().map_or_else(DetailTable::new, describe_role).render(colors);
        role + "\n" + &text_output::format_propagation(response.revision, response.propagation.as_ref())
    })
}

async fn list_and_show_roles(
    cx: &mut CommandContext<'_>,
    session: &ApiClient,
    owner: RoleOwnerArgs,
) -> Result<(), CliError> {
    let response = fetch_all_roles(session, owner.account.unwrap_or_default()).await?;
    cx.print_response(&response, |colors| render_roles(&response.roles, colors))
}

async fn delete_role(
    cx: &mut CommandContext<'_>,
    session: &ApiClient,
    role: RoleIdArgs,
) -> Result<(), CliError> {
    let request = pb::DeleteRoleRequest { account: role.owner.account.unwrap_or_default(), name: role.name };
    let response = session
        .call_accounts(DefaultTimeout::Propagation, request, async |mut client, request| {
            client.delete_role(request).await
        })
        .await?;
    cx.print_response(&response, |_| {
        text_output::format_propagation(response.revision, response.propagation.as_ref())
    })
}

fn describe_role(role: &pb::Role) -> DetailTable {
    DetailTable::new()
        .field("name", &role.name)
        .field("account", format_role_owner(&role.account))
        .list_field("scopes", &role.scopes)
        .field("revision", role.revision.to_string())
}

fn render_roles(roles: &[pb::Role], colors: bool) -> String {
    let mut rows = ListTable::new(&["NAME", "ACCOUNT", "SCOPES"], colors);
    for role in roles {
        rows.add_row([
            plain_cell(&role.name),
            plain_cell(format_role_owner(&role.account)),
            plain_cell(role.scopes.join(", ")),
        ]);
    }
    rows.render("No roles.")
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Only {
        #[command(subcommand)]
        command: RolesCommand,
    }

    #[test]
    fn a_role_is_never_put_without_scopes() {
        let read = |line: &str| Only::try_parse_from(format!("roles {line}").split_whitespace());
        let RolesCommand::Put { role: one, scopes } =
            read("put ci --scope a:b,c:d -s e:f --account acme").unwrap().command
        else {
            panic!("another command");
        };
        assert_eq!((one.name.as_str(), one.owner.account.as_deref()), ("ci", Some("acme")));
        assert_eq!(scopes, ["a:b", "c:d", "e:f"]);
        for bad in ["put ci", "put --scope a:b", "delete", "apply"] {
            assert_eq!(read(bad).unwrap_err().exit_code(), 2, "{bad}");
        }
    }

    #[test]
    fn a_list_tells_global_roles_from_an_accounts() {
        let role = |account: &str| pb::Role {
            account: account.into(),
            name: "agent".into(),
            scopes: vec!["a:b".into(), "c:*".into()],
            revision: 1,
        };
        assert_eq!(
            render_roles(&[role(""), role("acme")], false),
            "NAME   ACCOUNT  SCOPES\nagent  global   a:b, c:*\nagent  acme     a:b, c:*\n"
        );
    }
}
