//! `keyward members`: manages which users belong to an account, and with which role.

use clap::{Args, Subcommand};

use super::{
    api_client::{ApiClient, DefaultTimeout},
    context::CommandContext,
    error::CliError,
    paging::PageArgs,
    table::{DetailTable, ListTable, plain_cell, shown_value},
    text_output,
};
use crate::pb;

#[derive(Debug, Subcommand)]
pub(super) enum MembersCommand {
    /// Add a user to an account, or change a member's role
    Put {
        #[command(flatten)]
        member: MemberIdArgs,
        /// A role of the account, or a global one; it limits what the user's keys may do in this account
        #[arg(long)]
        role: String,
    },
    /// List the members of an account in the order of their user ids
    List {
        /// The account's id
        #[arg(value_name = "ACCOUNT")]
        account: String,
        #[command(flatten)]
        page: PageArgs,
    },
    /// Remove a member: the user's keys stop working in the account; with the last membership they are revoked
    Remove {
        #[command(flatten)]
        member: MemberIdArgs,
        /// Do not ask for confirmation
        #[arg(long, short)]
        yes: bool,
    },
}

#[derive(Debug, Args)]
pub(super) struct MemberIdArgs {
    /// The account's id
    #[arg(value_name = "ACCOUNT")]
    account: String,
    /// The user's id
    #[arg(value_name = "USER")]
    user: String,
}

impl MembersCommand {
    pub(super) async fn run(self, cx: &mut CommandContext<'_>) -> Result<u8, CliError> {
        if let MembersCommand::Remove { member, yes } = &self {
            let (account, user) = (shown_value(&member.account), shown_value(&member.user));
            let question = format!(
                "Remove {user} from {account}? With the last membership, the user's keys are revoked."
            );
            cx.console.confirm(&question, *yes)?;
        }
        let session = cx.connect()?;
        match self {
            MembersCommand::Put { member, role } => put_member(cx, &session, member, role).await,
            MembersCommand::List { account, page } => list_members(cx, &session, account, &page).await,
            MembersCommand::Remove { member, .. } => remove_member(cx, &session, member).await,
        }
        .map(|()| 0)
    }
}

async fn put_member(
    cx: &mut CommandContext<'_>,
    session: &ApiClient,
    member: MemberIdArgs,
    role: String,
) -> Result<(), CliError> {
    let request = pb::PutMemberRequest { account: member.account, user: member.user, role };
    let response = session
        .call_accounts(DefaultTimeout::Propagation, request, async |mut client, request| {
            client.put_member(request).await
        })
        .await?;
    cx.print_response(&response, |colors| {
        let member = response.member.as_ref().map_or_else(DetailTable::new, describe_member).render(colors);
        member + "\n" + &text_output::format_propagation(response.revision, response.propagation.as_ref())
    })
}

async fn list_members(
    cx: &mut CommandContext<'_>,
    session: &ApiClient,
    account: String,
    page: &PageArgs,
) -> Result<(), CliError> {
    let fetched = page
        .fetch_pages(async |size, page_token| {
            let account = account.clone();
            let request = pb::ListMembersRequest { account, page_size: Some(size), page_token };
            let response = session
                .call_accounts(DefaultTimeout::Quick, request, async |mut client, request| {
                    client.list_members(request).await
                })
                .await?;
            Ok((response.members, response.next_page_token))
        })
        .await?;
    let note = fetched.truncation_note();
    let response =
        pb::ListMembersResponse { members: fetched.items, next_page_token: fetched.next_page_token };
    cx.print_response(&response, |colors| render_members(&response.members, colors))?;
    cx.console.eprint(&note.unwrap_or_default());
    Ok(())
}

async fn remove_member(
    cx: &mut CommandContext<'_>,
    session: &ApiClient,
    member: MemberIdArgs,
) -> Result<(), CliError> {
    let request = pb::RemoveMemberRequest { account: member.account, user: member.user };
    let response = session
        .call_accounts(DefaultTimeout::Propagation, request, async |mut client, request| {
            client.remove_member(request).await
        })
        .await?;
    cx.print_response(&response, |_| {
        text_output::format_propagation(response.revision, response.propagation.as_ref())
    })
}

fn describe_member(member: &pb::Member) -> DetailTable {
    DetailTable::new()
        .field("account", &member.account)
        .field("user", &member.user)
        .field("role", &member.role)
        .field("revision", member.revision.to_string())
}

fn render_members(members: &[pb::Member], colors: bool) -> String {
    let mut rows = ListTable::new(&["USER", "ROLE", "REVISION"], colors);
    for member in members {
        rows.add_row([
            plain_cell(&member.user),
            plain_cell(&member.role),
            plain_cell(member.revision.to_string()),
        ]);
    }
    rows.render("No members.")
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Only {
        #[command(subcommand)]
        command: MembersCommand,
    }

    #[test]
    fn a_member_is_named_by_account_and_user_and_never_without_a_role() {
        let read = |line: &str| Only::try_parse_from(format!("members {line}").split_whitespace());
        let MembersCommand::Put { member: one, role } = read("put acme ada --role admin").unwrap().command
        else {
            panic!("another command");
        };
        assert_eq!((one.account.as_str(), one.user.as_str(), role.as_str()), ("acme", "ada", "admin"));
        for bad in ["put acme ada", "put acme --role admin", "remove acme", "list"] {
            assert_eq!(read(bad).unwrap_err().exit_code(), 2, "{bad}");
        }
    }

    #[test]
    fn a_list_says_who_has_which_role() {
        let member = pb::Member { user: "ada".into(), role: "owner".into(), ..Default::default() };
        assert_eq!(render_members(&[member], false), "USER  ROLE   REVISION\nada   owner  0\n");
        assert_eq!(render_members(&[], false), "No members.\n");
    }
}
