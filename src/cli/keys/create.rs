//! `keyward keys create`: creates a key and delivers its token.

use clap::Args;

use super::args::KeyPolicyArgs;
use crate::{
    cli::{
        api_client::DefaultTimeout,
        context::CommandContext,
        error::CliError,
        token_output::{TokenDestination, TokenOutputArgs},
        value_format::{ExpiryArg, duration_to_proto},
    },
    pb,
};

const CREATE_HELP: &str = "\
Without --expires the key never expires. The token is shown only once and stored nowhere. Stdout has the token alone, \
stderr everything else; with --output json it is the field `token` (null with --write-token).

Example: keyward keys create --account acme --environment production --scope monitors:read --expires 90d";

#[derive(Debug, Args)]
#[command(after_help = CREATE_HELP)]
pub(in crate::cli) struct KeyCreateArgs {
    /// The account that owns the key; optional for callers of an account
    #[arg(long, value_name = "ID", conflicts_with = "user")]
    account: Option<String>,
    /// The user that owns the key
    #[arg(long, value_name = "ID")]
    user: Option<String>,
    /// The one environment in which the key works; optional for callers of an account
    #[arg(long, short, value_name = "NAME")]
    environment: Option<String>,
    #[command(flatten)]
    policy: KeyPolicyArgs,
    /// Prefix of the token, instead of the configured one
    #[arg(long)]
    prefix: Option<String>,
    /// Makes the request safe to repeat: it returns the same key instead of creating a second one
    #[arg(long, value_name = "TEXT")]
    idempotency_key: Option<String>,
    #[command(flatten)]
    token_output: TokenOutputArgs,
}

impl KeyCreateArgs {
    pub(super) async fn run(self, cx: &mut CommandContext<'_>) -> Result<u8, CliError> {
        let session = cx.connect()?;
        let destination = TokenDestination::prepare(&self.token_output)?;
        let request = build_request(self.account, self.user, self.environment, self.policy);
        let request =
            pb::CreateKeyRequest { prefix: self.prefix, idempotency_key: self.idempotency_key, ..request };
        let response = session
            .call_keys(DefaultTimeout::Quick, request, async |mut client, request| {
                client.create(request).await
            })
            .await?;
        destination.deliver(cx, response)
    }
}

fn build_request(
    account: Option<String>,
    user: Option<String>,
    environment: Option<String>,
    policy: KeyPolicyArgs,
) -> pb::CreateKeyRequest {
    // A lifetime is sent as a duration, because the server's clock counts, not this machine's.
    let (expires_at, ttl) = match policy.expires {
        None | Some(ExpiryArg::Never) => (None, None),
        Some(ExpiryArg::In(life)) => (None, Some(duration_to_proto(life))),
        Some(ExpiryArg::At(instant)) => (Some(instant), None),
    };
    pb::CreateKeyRequest {
        account: account.unwrap_or_default(),
        user: user.unwrap_or_default(),
        environment: environment.unwrap_or_default(),
        name: policy.name,
        scopes: policy.scopes,
        roles: policy.roles,
        expires_at,
        ttl,
        customers: policy.customers,
        allowed_cidrs: policy.allowed_cidrs,
        rate_limits: policy.rate_limits,
        quota: policy.quota,
        metadata: policy.metadata.into_iter().collect(),
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Only {
        #[command(flatten)]
        args: KeyCreateArgs,
    }

    fn read(line: &str) -> Result<KeyCreateArgs, clap::Error> {
        Only::try_parse_from(format!("create {line}").split_whitespace()).map(|only| only.args)
    }

    fn request(line: &str) -> pb::CreateKeyRequest {
        let args = read(line).unwrap();
        build_request(args.account, args.user, args.environment, args.policy)
    }

    #[test]
    fn flags_become_the_request() {
        let request = request(
            "--account acme --environment production --name ci --scope a:b,c:* --scope d:e --role agent \
             --customer c1,c2 --allow-cidr 10.0.0.0/8 --rate-limit calls=100/1m --rate-limit slow=5/1h \
             --quota 1000/month --metadata team=x --metadata url=a=b,c",
        );
        assert_eq!((request.account.as_str(), request.user.as_str()), ("acme", ""));
        assert_eq!(request.scopes, ["a:b", "c:*", "d:e"]);
        assert_eq!(request.customers, ["c1", "c2"]);
        assert_eq!(request.rate_limits.len(), 2);
        assert_eq!(
            request.quota.map(|quota| (quota.limit, quota.period())),
            Some((1000, pb::QuotaPeriod::Month))
        );
        assert_eq!(request.metadata["url"], "a=b,c", "a note's value is not a list");
    }

    #[test]
    fn a_relative_expiry_is_left_to_the_servers_clock() {
        let of = |expires: &str| {
            let request = request(&format!("--environment dev --scope a:b {expires}"));
            (request.expires_at.map(|at| at.seconds), request.ttl.map(|ttl| ttl.seconds))
        };
        assert_eq!(of("--expires 90d"), (None, Some(90 * 86_400)));
        assert_eq!(of("--expires 1970-01-01T00:01:00Z"), (Some(60), None));
        assert_eq!(of("--expires never"), (None, None));
        assert_eq!(of(""), (None, None));
    }

    #[test]
    fn account_and_environment_may_be_left_to_the_server() {
        let request = request("--scope a:b");
        assert_eq!((request.account.as_str(), request.environment.as_str()), ("", ""));
    }

    #[test]
    fn bad_usage_is_told_before_anything_is_sent() {
        for line in [
            "--environment dev --account a --user u --scope a:b",
            "--environment dev --scope a:b --expires soon",
            "--environment dev --scope a:b --token-only --write-token f",
        ] {
            assert_eq!(read(line).unwrap_err().exit_code(), 2, "{line}");
        }
    }
}
