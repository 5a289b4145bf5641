//! `keyward keys list`: lists the keys that match a filter.

use clap::{Args, ValueEnum};

use crate::{
    cli::{
        api_client::DefaultTimeout,
        context::CommandContext,
        error::CliError,
        paging::PageArgs,
        table::{ListTable, plain_cell},
        text_output,
        value_format::{FutureInstantArg, PastInstantArg, format_rfc3339},
    },
    clock::{Clock, SystemClock},
    pb,
};

/// A key's state, as a filter.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum KeyStateArg {
    Active,
    Disabled,
    Expired,
    Revoked,
}

impl From<KeyStateArg> for pb::KeyState {
    fn from(state: KeyStateArg) -> pb::KeyState {
        match state {
            KeyStateArg::Active => pb::KeyState::Active,
            KeyStateArg::Disabled => pb::KeyState::Disabled,
            KeyStateArg::Expired => pb::KeyState::Expired,
            KeyStateArg::Revoked => pb::KeyState::Revoked,
        }
    }
}

#[derive(Debug, Args)]
pub(in crate::cli) struct KeyListArgs {
    /// Service keys of this account; optional for callers of an account
    #[arg(long, value_name = "ID", conflicts_with = "user")]
    account: Option<String>,
    /// User keys of this user
    #[arg(long, value_name = "ID")]
    user: Option<String>,
    /// Only keys of this environment
    #[arg(long, short, value_name = "NAME")]
    environment: Option<String>,
    /// Only keys in this state (repeat, or separate by commas) [default: all; with --unused-since or --expires-before:
    /// all except revoked keys]
    #[arg(long = "state", value_enum, value_name = "STATE", value_delimiter = ',')]
    states: Vec<KeyStateArg>,
    /// Only keys whose name starts with this text
    #[arg(long, value_name = "TEXT")]
    name_prefix: Option<String>,
    /// Only keys created before then and not used since then: a duration ago (30d) or an instant (RFC 3339)
    #[arg(long, value_name = "WHEN", value_parser = PastInstantArg::parse)]
    unused_since: Option<PastInstantArg>,
    /// Only keys that expire before then: a duration from now (2w) or an instant (RFC 3339)
    #[arg(long, value_name = "WHEN", value_parser = FutureInstantArg::parse)]
    expires_before: Option<FutureInstantArg>,
    /// Only keys created before then: a duration ago (90d) or an instant (RFC 3339)
    #[arg(long, value_name = "WHEN", value_parser = PastInstantArg::parse)]
    created_before: Option<PastInstantArg>,
    #[command(flatten)]
    page: PageArgs,
}

impl KeyListArgs {
    pub(super) async fn run(self, cx: &mut CommandContext<'_>) -> Result<u8, CliError> {
        let session = cx.connect()?;
        let request = self.build_request(&SystemClock);
        let fetched = self
            .page
            .fetch_pages(async |size, page_token| {
                let request = pb::ListKeysRequest { page_size: Some(size), page_token, ..request.clone() };
                let response = session
                    .call_keys(DefaultTimeout::Quick, request, async |mut client, request| {
                        client.list(request).await
                    })
                    .await?;
                Ok((response.keys, response.next_page_token))
            })
            .await?;
        let note = fetched.truncation_note();
        let response = pb::ListKeysResponse { keys: fetched.items, next_page_token: fetched.next_page_token };
        cx.print_response(&response, |colors| render_keys(&response.keys, colors))?;
        cx.console.eprint(&note.unwrap_or_default());
        Ok(0)
    }

    fn build_request(&self, clock: &dyn Clock) -> pb::ListKeysRequest {
        pb::ListKeysRequest {
            account: self.account.clone().unwrap_or_default(),
            user: self.user.clone().unwrap_or_default(),
            environment: self.environment.clone().unwrap_or_default(),
            states: self.states.iter().map(|state| pb::KeyState::from(*state).into()).collect(),
            name_prefix: self.name_prefix.clone().unwrap_or_default(),
            unused_since: self.unused_since.map(|past| past.resolve(clock)),
            expires_before: self.expires_before.map(|future| future.resolve(clock)),
            created_before: self.created_before.map(|past| past.resolve(clock)),
            ..Default::default()
        }
    }
}

fn render_keys(keys: &[pb::Key], colors: bool) -> String {
    let header = ["ID", "NAME", "OWNER", "ENVIRONMENT", "STATE", "HINT", "GRANTS", "EXPIRES", "LAST USED"];
    let mut rows = ListTable::new(&header, colors);
    for key in keys {
        rows.add_row([
            plain_cell(&key.id),
            plain_cell(&key.name),
            plain_cell(text_output::format_key_owner(key)),
            plain_cell(&key.environment),
            text_output::format_key_state(key),
            plain_cell(&key.hint),
            plain_cell(format_grants(key)),
            plain_cell(key.expires_at.as_ref().map_or_else(|| "never".to_owned(), format_rfc3339)),
            plain_cell(key.last_used_at.as_ref().map_or_else(|| "never".to_owned(), format_rfc3339)),
        ]);
    }
    rows.render("No keys.")
}

/// Formats the first grants; a key may have 256, too many for a row.
fn format_grants(key: &pb::Key) -> String {
    let roles = key.roles.iter().map(|role| format!("role {role}"));
    let all: Vec<String> = key.scopes.iter().cloned().chain(roles).collect();
    match all.len() {
        0..=3 => all.join(", "),
        more => format!("{}, and {} more", all[..2].join(", "), more - 2),
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::{clock::ManualClock, domain::time::Timestamp};

    #[derive(Debug, Parser)]
    struct Only {
        #[command(flatten)]
        args: KeyListArgs,
    }

    #[test]
    fn filters_become_the_request() {
        let line = "list --account acme --environment dev --state active,revoked --name-prefix ci \
                    --unused-since 1d --expires-before 1d --created-before 2d";
        let args = Only::try_parse_from(line.split_whitespace()).unwrap().args;
        let request = args.build_request(&ManualClock::new(Timestamp::from_micros(100_000_000_000)));
        assert_eq!((request.account.as_str(), request.environment.as_str()), ("acme", "dev"));
        assert_eq!(request.states, [pb::KeyState::Active as i32, pb::KeyState::Revoked as i32]);
        assert_eq!(request.unused_since.map(|at| at.seconds), Some(100_000 - 86_400));
        assert_eq!(request.expires_before.map(|at| at.seconds), Some(100_000 + 86_400));
        assert_eq!(request.created_before.map(|at| at.seconds), Some(100_000 - 2 * 86_400));
    }

    #[test]
    fn many_grants_are_counted_not_listed() {
        let key = |scopes: &[&str]| pb::Key {
            scopes: scopes.iter().map(|scope| (*scope).to_owned()).collect(),
            roles: vec!["agent".into()],
            ..Default::default()
        };
        assert_eq!(format_grants(&key(&["a", "b"])), "a, b, role agent");
        assert_eq!(format_grants(&key(&["a", "b", "c"])), "a, b, and 2 more");
    }

    #[test]
    fn a_list_shows_a_key_on_one_line_off_the_terminal() {
        let key =
            pb::Key { id: "0197".into(), user: "ada".into(), name: "x".repeat(200), ..Default::default() };
        let text = render_keys(&[key], false);
        assert_eq!(text.lines().count(), 2, "{text}");
        assert!(text.contains("user ada"), "{text}");
    }
}
