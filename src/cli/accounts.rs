//! `keyward accounts`: the organisations that own keys.

use clap::{Args, Subcommand};

use super::{
    client::{Patience, Session},
    context::Context,
    failure::Failure,
    output,
    paging::PageArgs,
    table::{Rows, shown_value, text},
    values::{Life, rfc3339},
};
use crate::pb;

/// `keyward accounts ...`.
#[derive(Debug, Subcommand)]
pub(super) enum AccountsCommand {
    /// Create an account
    Create {
        /// 1-64 characters of [A-Za-z0-9_-]; generated when it is left out
        #[arg(long)]
        id: Option<String>,
        /// Name for people [default: the id]
        #[arg(long)]
        name: Option<String>,
        /// The longest that its keys may live: a duration (90d, 1y), or never for no limit [default: never]
        #[arg(long, value_name = "DURATION", value_parser = Life::parse)]
        longest_life: Option<Life>,
    },
    /// Show one account
    Get(OneArgs),
    /// List accounts in the order of their ids
    List {
        #[command(flatten)]
        page: PageArgs,
    },
    /// Change an account's name, or how long its keys may live
    Update {
        #[command(flatten)]
        one: OneArgs,
        #[command(flatten)]
        change: ChangeArgs,
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

/// What of an account to change.
#[derive(Debug, Args)]
#[group(required = true, multiple = true)]
pub(super) struct ChangeArgs {
    /// The new name
    #[arg(long)]
    name: Option<String>,
    /// The longest that keys may live which are made, or given another expiry, from now on: a duration (90d,
    /// 1y), or never for no limit
    #[arg(long, value_name = "DURATION", value_parser = Life::parse)]
    longest_life: Option<Life>,
}

impl AccountsCommand {
    pub(super) async fn run(self, cx: &mut Context<'_>) -> Result<u8, Failure> {
        if let AccountsCommand::Suspend { one, yes } = &self {
            cx.console.confirm(&format!("Refuse every key of account {}?", shown_value(&one.id)), *yes)?;
        }
        let session = cx.session()?;
        match self {
            AccountsCommand::Create { id, name, longest_life } => {
                let question = pb::CreateAccountRequest {
                    id: id.unwrap_or_default(),
                    name: name.unwrap_or_default(),
                    longest_life: longest_life.and_then(Life::at_most),
                };
                create(cx, &session, question).await
            }
            AccountsCommand::Get(one) => get(cx, &session, one.id).await,
            AccountsCommand::List { page } => list(cx, &session, &page).await,
            AccountsCommand::Update { one, change } => update(cx, &session, change.request(one.id)).await,
            AccountsCommand::Suspend { one, .. } => suspend(cx, &session, one.id).await,
            AccountsCommand::Resume(one) => resume(cx, &session, one.id).await,
        }
        .map(|()| 0)
    }
}

impl ChangeArgs {
    fn request(self, id: String) -> pb::UpdateAccountRequest {
        pb::UpdateAccountRequest {
            id,
            name: self.name,
            longest_life: self.longest_life.and_then(Life::at_most),
            no_longest_life: self.longest_life == Some(Life::ForEver),
        }
    }
}

async fn create(
    cx: &mut Context<'_>,
    session: &Session,
    question: pb::CreateAccountRequest,
) -> Result<(), Failure> {
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

async fn update(
    cx: &mut Context<'_>,
    session: &Session,
    question: pb::UpdateAccountRequest,
) -> Result<(), Failure> {
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
    let mut rows = Rows::new(&["ID", "NAME", "STATE", "LONGEST LIFE", "CREATED"], colours);
    for account in accounts {
        rows.row([
            text(&account.id),
            text(&account.name),
            output::account_state(account),
            text(output::longest_life(account)),
            text(account.created_at.as_ref().map(rfc3339).unwrap_or_default()),
        ]);
    }
    rows.show("No accounts.")
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Only {
        #[command(flatten)]
        change: ChangeArgs,
    }

    #[test]
    fn a_longest_life_is_set_taken_away_or_left_as_it_is() {
        let asked = |line: &str| {
            let only = Only::try_parse_from(format!("update {line}").split_whitespace()).unwrap();
            let request = only.change.request("acme".into());
            (request.longest_life.map(|life| life.seconds), request.no_longest_life, request.name)
        };
        assert_eq!(asked("--longest-life 90d"), (Some(90 * 86_400), false, None));
        assert_eq!(asked("--longest-life never"), (None, true, None));
        assert_eq!(asked("--name Acme"), (None, false, Some("Acme".to_owned())));
        assert!(Only::try_parse_from(["update"]).is_err(), "an update changes something");
    }

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
