//! `keyward roles`: named sets of scopes, of one account or global.

mod apply;

use clap::{Args, Subcommand};

use super::{
    client::{Patience, Session},
    context::Context,
    failure::Failure,
    output,
    table::{Record, Rows, shown_value, text},
};
use crate::pb;

/// `keyward roles ...`.
#[derive(Debug, Subcommand)]
pub(super) enum RolesCommand {
    /// Make a role, or change what it grants
    Put {
        #[command(flatten)]
        one: OneArgs,
        /// Scope that the role grants: monitors:read, monitors:*, or all (repeat, or separate by commas); they
        /// replace what it granted before
        #[arg(long = "scope", short, value_name = "SCOPE", value_delimiter = ',', required = true)]
        scopes: Vec<String>,
    },
    /// List the global roles, or those of an account with the global ones
    List {
        #[command(flatten)]
        home: HomeArgs,
    },
    /// Delete a role that no key and no member uses
    Delete {
        #[command(flatten)]
        one: OneArgs,
        /// Do not ask first
        #[arg(long, short)]
        yes: bool,
    },
    /// Make or change all roles of a TOML file; doing it again changes nothing
    Apply(apply::ApplyArgs),
}

/// Whose role.
#[derive(Debug, Args)]
pub(super) struct HomeArgs {
    /// The account whose role it is [default: a global role]
    #[arg(long, value_name = "ID")]
    account: Option<String>,
}

/// Which role.
#[derive(Debug, Args)]
pub(super) struct OneArgs {
    /// The role's name: 1-64 characters of [a-z0-9_-]
    #[arg(value_name = "NAME")]
    name: String,
    #[command(flatten)]
    home: HomeArgs,
}

impl RolesCommand {
    pub(super) async fn run(self, cx: &mut Context<'_>) -> Result<u8, Failure> {
        if let RolesCommand::Delete { one, yes } = &self {
            let home = home(one.home.account.as_deref().unwrap_or_default());
            cx.console.confirm(
                &format!("Delete role {} ({})?", shown_value(&one.name), shown_value(&home)),
                *yes,
            )?;
        }
        let session = cx.session()?;
        match self {
            RolesCommand::Put { one, scopes } => put(cx, &session, one, scopes).await,
            RolesCommand::List { home } => list(cx, &session, home).await,
            RolesCommand::Delete { one, .. } => delete(cx, &session, one).await,
            RolesCommand::Apply(args) => args.run(cx, &session).await,
        }
        .map(|()| 0)
    }
}

async fn put(
    cx: &mut Context<'_>,
    session: &Session,
    one: OneArgs,
    scopes: Vec<String>,
) -> Result<(), Failure> {
    let account = one.home.account.unwrap_or_default();
    let answer = put_role(session, pb::PutRoleRequest { account, name: one.name, scopes }).await?;
    cx.show(&answer, |colours| {
        let role = answer.role.as_ref().map_or_else(Record::new, details).show(colours);
        role + "\n" + &output::propagation(answer.revision, answer.propagation.as_ref())
    })
}

async fn put_role(session: &Session, question: pb::PutRoleRequest) -> Result<pb::PutRoleResponse, Failure> {
    session
        .accounts(Patience::Propagation, question, async |mut client, request| client.put_role(request).await)
        .await
}

/// All roles of an account, page by page.
async fn list_roles(session: &Session, account: String) -> Result<pb::ListRolesResponse, Failure> {
    let mut all = pb::ListRolesResponse::default();
    let mut question = pb::ListRolesRequest { account, ..Default::default() };
    loop {
        let page = session
            .accounts(Patience::Short, question.clone(), async |mut client, request| {
                client.list_roles(request).await
            })
            .await?;
        all.roles.extend(page.roles);
        if page.next_page_token.is_empty() {
            return Ok(all);
        }
        question.page_token = page.next_page_token;
    }
}

async fn list(cx: &mut Context<'_>, session: &Session, home: HomeArgs) -> Result<(), Failure> {
    let answer = list_roles(session, home.account.unwrap_or_default()).await?;
    cx.show(&answer, |colours| listing(&answer.roles, colours))
}

async fn delete(cx: &mut Context<'_>, session: &Session, one: OneArgs) -> Result<(), Failure> {
    let question = pb::DeleteRoleRequest { account: one.home.account.unwrap_or_default(), name: one.name };
    let answer = session
        .accounts(Patience::Propagation, question, async |mut client, request| {
            client.delete_role(request).await
        })
        .await?;
    cx.show(&answer, |_| output::propagation(answer.revision, answer.propagation.as_ref()))
}

/// Where a role holds, for people.
fn home(account: &str) -> String {
    if account.is_empty() { "global".to_owned() } else { account.to_owned() }
}

fn details(role: &pb::Role) -> Record {
    Record::new()
        .field("name", &role.name)
        .field("account", home(&role.account))
        .list("scopes", &role.scopes)
        .field("revision", role.revision.to_string())
}

fn listing(roles: &[pb::Role], colours: bool) -> String {
    let mut rows = Rows::new(&["NAME", "ACCOUNT", "SCOPES"], colours);
    for role in roles {
        rows.row([text(&role.name), text(home(&role.account)), text(role.scopes.join(", "))]);
    }
    rows.show("No roles.")
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
        let RolesCommand::Put { one, scopes } =
            read("put ci --scope a:b,c:d -s e:f --account acme").unwrap().command
        else {
            panic!("another command");
        };
        assert_eq!((one.name.as_str(), one.home.account.as_deref()), ("ci", Some("acme")));
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
            listing(&[role(""), role("acme")], false),
            "NAME   ACCOUNT  SCOPES\nagent  global   a:b, c:*\nagent  acme     a:b, c:*\n"
        );
    }
}
