//! `keyward keys update`: the flags that are given are the update mask.

use clap::{Args, ValueEnum};

use super::{OneArgs, change, policy::PolicyArgs};
use crate::{
    cli::{client::Patience, context::Context, failure::Failure},
    clock::{Clock, SystemClock},
    pb,
};

/// A field that can be emptied.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Field {
    Name,
    Scopes,
    Roles,
    ExpiresAt,
    Customers,
    AllowedCidrs,
    RateLimits,
    Quota,
    Metadata,
}

impl Field {
    /// Its path in the update mask.
    fn path(self) -> &'static str {
        match self {
            Field::Name => "name",
            Field::Scopes => "scopes",
            Field::Roles => "roles",
            Field::ExpiresAt => "expires_at",
            Field::Customers => "customers",
            Field::AllowedCidrs => "allowed_cidrs",
            Field::RateLimits => "rate_limits",
            Field::Quota => "quota",
            Field::Metadata => "metadata",
        }
    }
}

/// Flags of `keyward keys update`.
#[derive(Debug, Args)]
#[command(
    after_help = "A flag replaces the whole field: --scope a:b leaves the key with that scope alone, and \
    --metadata with those notes alone. What no flag names stays as it is."
)]
pub(in crate::cli) struct UpdateArgs {
    #[command(flatten)]
    one: OneArgs,
    #[command(flatten)]
    policy: PolicyArgs,
    /// Empty this field (repeat, or separate by commas); taking a restriction away widens what the key may do
    #[arg(long, value_name = "FIELD", value_enum, value_delimiter = ',')]
    clear: Vec<Field>,
}

impl UpdateArgs {
    pub(super) async fn run(self, cx: &mut Context<'_>) -> Result<u8, Failure> {
        let question = request(self, &SystemClock)?;
        let answer = cx
            .session()?
            .keys(Patience::Propagation, question, async |mut client, request| client.update(request).await)
            .await?;
        cx.show(&answer, |colours| {
            change::changed(answer.key.as_ref(), answer.revision, answer.propagation.as_ref(), colours)
        })?;
        Ok(0)
    }
}

fn request(args: UpdateArgs, clock: &dyn Clock) -> Result<pb::UpdateKeyRequest, Failure> {
    let given = given(&args.policy);
    if let Some(both) = args.clear.iter().find(|field| given.contains(field)) {
        return Err(Failure::usage(format!("{} is both cleared and given a value", both.path())));
    }
    let mut paths: Vec<String> =
        given.iter().chain(&args.clear).map(|field| field.path().to_owned()).collect();
    paths.sort();
    paths.dedup();
    if paths.is_empty() {
        return Err(
            Failure::usage("nothing to change").hint("name what to change, such as --name, or --clear FIELD")
        );
    }
    let policy = args.policy;
    let key = pb::Key {
        id: args.one.id,
        name: policy.name.unwrap_or_default(),
        scopes: policy.scopes,
        roles: policy.roles,
        expires_at: policy.expires.and_then(|expiry| expiry.resolve(clock)),
        customers: policy.customers,
        allowed_cidrs: policy.allowed_cidrs,
        rate_limits: policy.rate_limits,
        quota: policy.quota,
        metadata: policy.metadata.into_iter().collect(),
        ..Default::default()
    };
    Ok(pb::UpdateKeyRequest { key: Some(key), update_mask: Some(prost_types::FieldMask { paths }) })
}

/// The fields that flags give a value.
fn given(policy: &PolicyArgs) -> Vec<Field> {
    let PolicyArgs { name, scopes, roles, expires, customers, allowed_cidrs, rate_limits, quota, metadata } =
        policy;
    [
        (name.is_some(), Field::Name),
        (!scopes.is_empty(), Field::Scopes),
        (!roles.is_empty(), Field::Roles),
        (expires.is_some(), Field::ExpiresAt),
        (!customers.is_empty(), Field::Customers),
        (!allowed_cidrs.is_empty(), Field::AllowedCidrs),
        (!rate_limits.is_empty(), Field::RateLimits),
        (quota.is_some(), Field::Quota),
        (!metadata.is_empty(), Field::Metadata),
    ]
    .into_iter()
    .filter_map(|(given, field)| given.then_some(field))
    .collect()
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::{clock::ManualClock, domain::time::Timestamp};

    #[derive(Debug, Parser)]
    struct Only {
        #[command(flatten)]
        args: UpdateArgs,
    }

    fn asked(line: &str) -> Result<(pb::Key, Vec<String>), String> {
        let only = Only::try_parse_from(format!("update 0197 {line}").split_whitespace())
            .map_err(|e| e.to_string())?;
        let clock = ManualClock::at(Timestamp::from_micros(0));
        let request = request(only.args, &clock).map_err(|e| e.to_string())?;
        Ok((request.key.unwrap(), request.update_mask.unwrap().paths))
    }

    #[test]
    fn the_flags_that_are_given_are_the_mask() {
        let (key, paths) = asked("--name new --scope a:b,c:d --expires 1d --quota 5/day").unwrap();
        assert_eq!(paths, ["expires_at", "name", "quota", "scopes"]);
        assert_eq!((key.id.as_str(), key.name.as_str()), ("0197", "new"));
        assert_eq!(key.expires_at.map(|at| at.seconds), Some(86_400));
    }

    #[test]
    fn every_field_can_be_cleared() {
        let all = "name,scopes,roles,expires-at,customers,allowed-cidrs,rate-limits,quota,metadata";
        let (key, paths) = asked(&format!("--clear {all}")).unwrap();
        assert_eq!(paths.len(), 9);
        assert_eq!(key, pb::Key { id: "0197".into(), ..Default::default() });
    }

    #[test]
    fn never_clears_the_expiry() {
        let (key, paths) = asked("--expires never").unwrap();
        assert_eq!((paths, key.expires_at), (vec!["expires_at".to_owned()], None));
    }

    #[test]
    fn a_field_is_not_both_cleared_and_given() {
        assert!(asked("--clear name --name x").unwrap_err().contains("name is both cleared and given"));
        assert!(asked("").unwrap_err().contains("nothing to change"));
        assert!(asked("--clear id").unwrap_err().contains("possible values"));
    }
}
