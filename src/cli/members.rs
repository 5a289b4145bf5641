//! `keyward members`: which users belong to an account, and with what role.

use clap::{Args, Subcommand};

use super::{
    client::{Patience, Session},
    context::Context,
    failure::Failure,
    output,
    paging::PageArgs,
    table::{Record, Rows, shown_value, text},
};
use crate::pb;

/// `keyward members ...`.
#[derive(Debug, Subcommand)]
pub(super) enum MembersCommand {
    /// Make a user a member of an account, or give the member another role
    Put {
        #[command(flatten)]
        one: OneArgs,
        /// A role of the account, or a global one; the user's keys may do here what it grants
        #[arg(long)]
        role: String,
    },
    /// List the members of an account in the order of their users
    List {
        /// The account's id
        #[arg(value_name = "ACCOUNT")]
        account: String,
        #[command(flatten)]
        page: PageArgs,
    },
    /// End a membership: the user's keys stop working in the account, and after the last one for ever
    Remove {
        #[command(flatten)]
        one: OneArgs,
        /// Do not ask first
        #[arg(long, short)]
        yes: bool,
    },
}

/// Which member.
#[derive(Debug, Args)]
pub(super) struct OneArgs {
    /// The account's id
    #[arg(value_name = "ACCOUNT")]
    account: String,
    /// The user's id
    #[arg(value_name = "USER")]
    user: String,
}

impl MembersCommand {
    pub(super) async fn run(self, cx: &mut Context<'_>) -> Result<u8, Failure> {
        if let MembersCommand::Remove { one, yes } = &self {
            let (account, user) = (shown_value(&one.account), shown_value(&one.user));
            let question =
                format!("Remove {user} from {account}? With the last account, the user's keys are revoked.");
            cx.console.confirm(&question, *yes)?;
        }
        let session = cx.session()?;
        match self {
            MembersCommand::Put { one, role } => put(cx, &session, one, role).await,
            MembersCommand::List { account, page } => list(cx, &session, account, &page).await,
            MembersCommand::Remove { one, .. } => remove(cx, &session, one).await,
        }
        .map(|()| 0)
    }
}

async fn put(cx: &mut Context<'_>, session: &Session, one: OneArgs, role: String) -> Result<(), Failure> {
    let question = pb::PutMemberRequest { account: one.account, user: one.user, role };
    let answer = session
        .accounts(Patience::Propagation, question, async |mut client, request| {
            client.put_member(request).await
        })
        .await?;
    cx.show(&answer, |colours| {
        let member = answer.member.as_ref().map_or_else(Record::new, details).show(colours);
        member + "\n" + &output::propagation(answer.revision, answer.propagation.as_ref())
    })
}

async fn list(
    cx: &mut Context<'_>,
    session: &Session,
    account: String,
    page: &PageArgs,
) -> Result<(), Failure> {
    let fetched = page
        .fetch(async |size, page_token| {
            let account = account.clone();
            let question = pb::ListMembersRequest { account, page_size: Some(size), page_token };
            let answer = session
                .accounts(Patience::Short, question, async |mut client, request| {
                    client.list_members(request).await
                })
                .await?;
            Ok((answer.members, answer.next_page_token))
        })
        .await?;
    let note = fetched.note();
    let answer = pb::ListMembersResponse { members: fetched.items, next_page_token: fetched.next };
    cx.show(&answer, |colours| listing(&answer.members, colours))?;
    cx.console.note(&note.unwrap_or_default());
    Ok(())
}

async fn remove(cx: &mut Context<'_>, session: &Session, one: OneArgs) -> Result<(), Failure> {
    let question = pb::RemoveMemberRequest { account: one.account, user: one.user };
    let answer = session
        .accounts(Patience::Propagation, question, async |mut client, request| {
            client.remove_member(request).await
        })
        .await?;
    cx.show(&answer, |_| output::propagation(answer.revision, answer.propagation.as_ref()))
}

fn details(member: &pb::Member) -> Record {
    Record::new()
        .field("account", &member.account)
        .field("user", &member.user)
        .field("role", &member.role)
        .field("revision", member.revision.to_string())
}

fn listing(members: &[pb::Member], colours: bool) -> String {
    let mut rows = Rows::new(&["USER", "ROLE", "REVISION"], colours);
    for member in members {
        rows.row([text(&member.user), text(&member.role), text(member.revision.to_string())]);
    }
    rows.show("No members.")
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
        let MembersCommand::Put { one, role } = read("put acme ada --role admin").unwrap().command else {
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
        assert_eq!(listing(&[member], false), "USER  ROLE   REVISION\nada   owner  0\n");
        assert_eq!(listing(&[], false), "No members.\n");
    }
}
