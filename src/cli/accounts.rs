//! `keyward accounts`: the organisations that own keys.

use clap::{Args, Subcommand};

use super::{
    client::{Patience, Session},
    context::Context,
    failure::Failure,
    output,
    paging::PageArgs,
    table::{self, Rows, text},
    values::rfc3339,
};
use crate::pb;

/// `keyward accounts ...`.
#[derive(Debug, Subcommand)]
pub(super) enum AccountsCommand {
    /// Create an account
    Create {
        /// 1-64 characters of [a-z0-9_-]; made up when it is left out
        #[arg(long)]
        id: Option<String>,
        /// Name for people [default: the id]
        #[arg(long)]
        name: Option<String>,
    },
    /// Show one account
    Get(OneArgs),
    /// List accounts in the order of their ids
    List {
        #[command(flatten)]
        page: PageArgs,
    },
    /// Change an account's name
    Update {
        #[command(flatten)]
        one: OneArgs,
        /// The new name
        #[arg(long)]
        name: String,
    },
    /// Refuse every key of an account, until it is resumed
    Suspend {
        #[command(flatten)]
        one: OneArgs,
        /// Do not ask first
        #[arg(long, short)]
        yes: bool,
    },
    /// End what suspend began
    Resume(OneArgs),
}

/// Which account.
#[derive(Debug, Args)]
pub(super) struct OneArgs {
    /// The account's id
    #[arg(value_name = "ID")]
    id: String,
}

impl AccountsCommand {
    pub(super) async fn run(self, cx: &mut Context<'_>) -> Result<u8, Failure> {
        if let AccountsCommand::Suspend { one, yes } = &self {
            cx.console.confirm(&format!("Refuse every key of account {}?", table::clean(&one.id)), *yes)?;
        }
        let session = cx.session()?;
        match self {
            AccountsCommand::Create { id, name } => create(cx, &session, id, name).await,
            AccountsCommand::Get(one) => get(cx, &session, one.id).await,
            AccountsCommand::List { page } => list(cx, &session, &page).await,
            AccountsCommand::Update { one, name } => update(cx, &session, one.id, name).await,
            AccountsCommand::Suspend { one, .. } => suspend(cx, &session, one.id).await,
            AccountsCommand::Resume(one) => resume(cx, &session, one.id).await,
        }
        .map(|()| 0)
    }
}

async fn create(
    cx: &mut Context<'_>,
    session: &Session,
    id: Option<String>,
    name: Option<String>,
) -> Result<(), Failure> {
    let question = pb::CreateAccountRequest {
        id: id.unwrap_or_default(),
        name: name.unwrap_or_default(),
        longest_life: None,
    };
    let answer = session
        .accounts(Patience::Short, question, async |mut client, request| client.create(request).await)
        .await?;
    cx.show(&answer, |colours| details(answer.account.as_ref(), colours))
}

async fn get(cx: &mut Context<'_>, session: &Session, id: String) -> Result<(), Failure> {
    let question = pb::GetAccountRequest { id };
    let answer = session
        .accounts(Patience::Short, question, async |mut client, request| client.get(request).await)
        .await?;
    cx.show(&answer, |colours| details(answer.account.as_ref(), colours))
}

async fn list(cx: &mut Context<'_>, session: &Session, page: &PageArgs) -> Result<(), Failure> {
    let fetched = page
        .fetch(async |size, page_token| {
            let question = pb::ListAccountsRequest { page_size: Some(size), page_token };
            let answer = session
                .accounts(Patience::Short, question, async |mut client, request| client.list(request).await)
                .await?;
            Ok((answer.accounts, answer.next_page_token))
        })
        .await?;
    let note = fetched.note();
    let answer = pb::ListAccountsResponse { accounts: fetched.items, next_page_token: fetched.next };
    cx.show(&answer, |colours| listing(&answer.accounts, colours))?;
    cx.console.note(&note.unwrap_or_default());
    Ok(())
}

async fn update(cx: &mut Context<'_>, session: &Session, id: String, name: String) -> Result<(), Failure> {
    let question =
        pb::UpdateAccountRequest { id, name: Some(name), longest_life: None, no_longest_life: false };
    let answer = session
        .accounts(Patience::Short, question, async |mut client, request| client.update(request).await)
        .await?;
    cx.show(&answer, |colours| details(answer.account.as_ref(), colours))
}

async fn suspend(cx: &mut Context<'_>, session: &Session, id: String) -> Result<(), Failure> {
    let question = pb::SuspendAccountRequest { id };
    let answer = session
        .accounts(Patience::Propagation, question, async |mut client, request| client.suspend(request).await)
        .await?;
    cx.show(&answer, |colours| {
        details(answer.account.as_ref(), colours)
            + "\n"
            + &output::propagation(answer.revision, answer.propagation.as_ref())
    })
}

async fn resume(cx: &mut Context<'_>, session: &Session, id: String) -> Result<(), Failure> {
    let question = pb::ResumeAccountRequest { id };
    let answer = session
        .accounts(Patience::Short, question, async |mut client, request| client.resume(request).await)
        .await?;
    cx.show(&answer, |colours| details(answer.account.as_ref(), colours))
}

fn details(account: Option<&pb::Account>, colours: bool) -> String {
    account.map(|account| output::account(account).show(colours)).unwrap_or_default()
}

fn listing(accounts: &[pb::Account], colours: bool) -> String {
    let mut rows = Rows::new(&["ID", "NAME", "STATE", "CREATED"], colours);
    for account in accounts {
        rows.row([
            text(&account.id),
            text(&account.name),
            output::account_state(account),
            text(account.created_at.as_ref().map(rfc3339).unwrap_or_default()),
        ]);
    }
    rows.show("No accounts.")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_suspended_account_is_seen_in_the_list() {
        let accounts =
            [pb::Account { id: "acme".into(), name: "Acme".into(), suspended: true, ..Default::default() }];
        let text = listing(&accounts, false);
        assert!(
            text.lines().nth(1).is_some_and(|line| line.starts_with("acme") && line.contains("suspended"))
        );
    }
}
