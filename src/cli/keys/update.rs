//! `keyward keys update`: changes a key's fields. The given flags are the update mask.
//!
//! The server takes no expected revision with an update. So a change of single scopes is read back after a delay, and
//! repeated if a concurrent writer, which had read the scopes before it, has overwritten it.

use std::time::Duration;

use clap::{Args, ValueEnum};

use super::{
    args::{KeyIdArgs, KeyPolicyArgs},
    state_change,
};
use crate::{
    cli::{
        api_client::{ApiClient, DefaultTimeout},
        context::CommandContext,
        error::CliError,
        table::escape_terminal,
    },
    clock::{Clock, SystemClock, SystemEntropy, random_bytes},
    pb,
};

/// A field that `--clear` can empty.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum ClearableField {
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

impl ClearableField {
    /// Returns the field's path in the update mask.
    fn mask_path(self) -> &'static str {
        match self {
            ClearableField::Name => "name",
            ClearableField::Scopes => "scopes",
            ClearableField::Roles => "roles",
            ClearableField::ExpiresAt => "expires_at",
            ClearableField::Customers => "customers",
            ClearableField::AllowedCidrs => "allowed_cidrs",
            ClearableField::RateLimits => "rate_limits",
            ClearableField::Quota => "quota",
            ClearableField::Metadata => "metadata",
        }
    }
}

/// Flags that add and remove single scopes.
#[derive(Debug, Default, Args)]
struct ScopeChangeArgs {
    /// Scope to add to those that the key has (repeat, or separate by commas)
    #[arg(long = "add-scope", value_name = "SCOPE", value_delimiter = ',', conflicts_with = "scopes")]
    add: Vec<String>,
    /// Scope to remove from those that the key has (repeat, or separate by commas)
    #[arg(long = "remove-scope", value_name = "SCOPE", value_delimiter = ',', conflicts_with = "scopes")]
    remove: Vec<String>,
}

impl ScopeChangeArgs {
    fn has_changes(&self) -> bool {
        !self.add.is_empty() || !self.remove.is_empty()
    }

    /// Whether these scopes already include the change.
    fn is_applied_to(&self, scopes: &[String]) -> bool {
        self.add.iter().all(|scope| scopes.contains(scope))
            && !self.remove.iter().any(|scope| scopes.contains(scope))
    }

    fn apply_to(&self, scopes: &[String]) -> Vec<String> {
        let mut scopes = scopes.to_vec();
        for scope in &self.add {
            if !scopes.contains(scope) {
                scopes.push(scope.clone());
            }
        }
        scopes.retain(|scope| !self.remove.contains(scope));
        scopes
    }

    /// Like [`Self::apply_to`], but refuses a change that has no effect.
    fn apply_checked(&self, key: &pb::Key) -> Result<Vec<String>, CliError> {
        if let Some(both) = self.add.iter().find(|scope| self.remove.contains(scope)) {
            return Err(CliError::new(format!("{both} is both added and removed")));
        }
        if let Some(missing) = self.remove.iter().find(|scope| !key.scopes.contains(scope)) {
            let has = if key.scopes.is_empty() { "none".to_owned() } else { key.scopes.join(", ") };
            return Err(CliError::refused(format!("the key has no scope {missing} to remove; it has {has}")));
        }
        let scopes = self.apply_to(&key.scopes);
        if scopes == key.scopes {
            return Err(CliError::refused("the key already has these scopes; nothing was changed"));
        }
        Ok(scopes)
    }
}

#[derive(Debug, Args)]
#[command(
    after_help = "A flag replaces the whole field: with --scope a:b the key has only that scope, and --metadata replaces \
    all metadata; stderr shows the scopes that --scope removed. --add-scope and --remove-scope read the key's \
    scopes, write all of them, read them back, and repeat the change if another writer has overwritten it. \
    Exit code 1: it was overwritten each time. A warning names the writer whose change this one may have overwritten, if \
    the token may read the audit log. Fields without a flag are not changed."
)]
pub(in crate::cli) struct KeyUpdateArgs {
    #[command(flatten)]
    key: KeyIdArgs,
    #[command(flatten)]
    policy: KeyPolicyArgs,
    #[command(flatten)]
    scope_changes: ScopeChangeArgs,
    /// Empty this field (repeat, or separate by commas); clearing a restriction widens what the key may do
    #[arg(long, value_name = "FIELD", value_enum, value_delimiter = ',')]
    clear: Vec<ClearableField>,
}

impl KeyUpdateArgs {
    pub(super) async fn run(self, cx: &mut CommandContext<'_>) -> Result<u8, CliError> {
        let mut request = build_request(&self, &SystemClock)?;
        let session = cx.connect()?;
        let before = match (self.scope_changes.has_changes(), self.policy.scopes.is_empty()) {
            (true, _) => Some(read_key(&session, &self.key.id).await?),
            // Only for the note about replaced scopes, so a failure is ignored: a caller may write keys but not read them.
            (false, false) => read_key(&session, &self.key.id).await.ok(),
            (false, true) => None,
        };
        if let (true, Some(before), Some(key)) = (self.scope_changes.has_changes(), &before, &mut request.key)
        {
            key.scopes = self.scope_changes.apply_checked(before)?;
        }
        let mut response = call_update(&session, request).await?;
        // Right after the update, so that it finds only changes between the reading of the key and the update.
        let between = match &before {
            Some(before) => find_concurrent_change(&session, before, response.revision).await,
            None => None,
        };
        if self.scope_changes.has_changes() {
            let keep = async || {
                wait_for_other_writers().await;
                read_key(&session, &self.key.id).await
            };
            let again = async |request| call_update(&session, request).await;
            response = reapply_until_kept(&self.scope_changes, response, keep, again).await?;
        }
        cx.print_response(&response, |colors| {
            state_change::render_changed_key(
                response.key.as_ref(),
                response.revision,
                response.propagation.as_ref(),
                colors,
            )
        })?;
        if let (Some(before), Some(after)) = (&before, &response.key) {
            cx.console.eprint(&describe_scope_diff(&before.scopes, &after.scopes));
            between.into_iter().for_each(|between| cx.console.eprint(&between));
        }
        Ok(0)
    }
}

/// A change of scopes is read back after one to two times this delay, when writers that had read the old scopes have
/// written theirs.
const READ_BACK_DELAY: Duration = Duration::from_millis(400);
/// The limit of attempts to change scopes.
const MAX_ATTEMPTS: u32 = 10;

/// Waits until concurrent writers have written. The delay is random, so that concurrent updates do not wait in lockstep.
async fn wait_for_other_writers() {
    let [share] = random_bytes::<1>(&SystemEntropy).unwrap_or([128]);
    tokio::time::sleep(READ_BACK_DELAY + READ_BACK_DELAY * u32::from(share) / 256).await;
}

async fn call_update(
    session: &ApiClient,
    request: pb::UpdateKeyRequest,
) -> Result<pb::UpdateKeyResponse, CliError> {
    session
        .call_keys(DefaultTimeout::Propagation, request, async |mut client, request| {
            client.update(request).await
        })
        .await
}

/// Reads the key until it has the change of scopes, and repeats the change if it is missing. Returns the last response.
async fn reapply_until_kept(
    change: &ScopeChangeArgs,
    mut response: pb::UpdateKeyResponse,
    mut read_later: impl AsyncFnMut() -> Result<pb::Key, CliError>,
    mut update: impl AsyncFnMut(pb::UpdateKeyRequest) -> Result<pb::UpdateKeyResponse, CliError>,
) -> Result<pb::UpdateKeyResponse, CliError> {
    for attempt in 1..=MAX_ATTEMPTS {
        let key = read_later()
            .await
            .map_err(|failure| failure.with_context("the scopes were changed; reading them back failed"))?;
        if change.is_applied_to(&key.scopes) {
            return Ok(response);
        }
        if attempt < MAX_ATTEMPTS {
            // Only the scopes, so that the repeated update does not overwrite later changes of other fields.
            let paths = vec![ClearableField::Scopes.mask_path().to_owned()];
            let key = pb::Key { scopes: change.apply_to(&key.scopes), id: key.id, ..Default::default() };
            let request =
                pb::UpdateKeyRequest { key: Some(key), update_mask: Some(prost_types::FieldMask { paths }) };
            response = update(request).await.map_err(|failure| {
                failure.with_context("another change overwrote this one; repeating it failed")
            })?;
        }
    }
    let lost = format!("other changes of this key overwrote this change of its scopes {MAX_ATTEMPTS} times");
    Err(CliError::refused(lost)
        .with_hint("check the key, and repeat the command when nothing else changes it"))
}

async fn read_key(session: &ApiClient, id: &str) -> Result<pb::Key, CliError> {
    let request = pb::GetKeyRequest { id: id.to_owned() };
    let response = session
        .call_keys(DefaultTimeout::Quick, request, async |mut client, request| client.get(request).await)
        .await?;
    response.key.ok_or_else(|| CliError::new("the server's response has no key"))
}

/// Describes the scopes that a key lost and gained.
fn describe_scope_diff(before: &[String], after: &[String]) -> String {
    let only = |these: &[String], those: &[String]| {
        let only: Vec<_> =
            these.iter().filter(|scope| !those.contains(scope)).map(|scope| escape_terminal(scope)).collect();
        if only.is_empty() { "none".to_owned() } else { only.join(", ") }
    };
    if before == after {
        return String::new();
    }
    format!("Scopes removed: {}; added: {}.\n", only(before, after), only(after, before))
}

/// Returns a warning if another caller changed the key after it was read and before `revision`. The audit log shows such
/// changes, if the caller may read it.
async fn find_concurrent_change(session: &ApiClient, before: &pb::Key, revision: u64) -> Option<String> {
    let request = pb::ListAuditEntriesRequest {
        key_id: before.id.clone(),
        oldest_first: true,
        after_revision: before.revision,
        page_size: Some(2),
        ..Default::default()
    };
    let response = session
        .call_audit(DefaultTimeout::Quick, request, async |mut client, request| client.list(request).await)
        .await
        .ok()?;
    format_overwrite_warning(&response.entries, revision)
}

/// Formats a warning about the key's first entry before `revision`.
fn format_overwrite_warning(entries: &[pb::AuditEntry], revision: u64) -> Option<String> {
    let other = entries.iter().find(|entry| entry.revision < revision)?;
    Some(format!(
        "warning: {} changed this key meanwhile (revision {}, {}): its change of the scopes may be overwritten. Check \
         the key\n",
        escape_terminal(&other.actor),
        other.revision,
        escape_terminal(&other.action)
    ))
}

fn build_request(args: &KeyUpdateArgs, clock: &dyn Clock) -> Result<pb::UpdateKeyRequest, CliError> {
    let mut given = given_fields(&args.policy);
    if args.scope_changes.has_changes() {
        given.push(ClearableField::Scopes);
    }
    if let Some(both) = args.clear.iter().find(|field| given.contains(field)) {
        return Err(CliError::new(format!("{} is both cleared and set", both.mask_path())));
    }
    let mut paths: Vec<String> =
        given.iter().chain(&args.clear).map(|field| field.mask_path().to_owned()).collect();
    paths.sort();
    paths.dedup();
    if paths.is_empty() {
        return Err(
            CliError::new("nothing to change").with_hint("use a flag such as --name, or --clear FIELD")
        );
    }
    let policy = &args.policy;
    let key = pb::Key {
        id: args.key.id.clone(),
        name: policy.name.clone().unwrap_or_default(),
        scopes: policy.scopes.clone(),
        roles: policy.roles.clone(),
        expires_at: policy.expires.and_then(|expiry| expiry.resolve(clock)),
        customers: policy.customers.clone(),
        allowed_cidrs: policy.allowed_cidrs.clone(),
        rate_limits: policy.rate_limits.clone(),
        quota: policy.quota,
        metadata: policy.metadata.iter().cloned().collect(),
        ..Default::default()
    };
    Ok(pb::UpdateKeyRequest { key: Some(key), update_mask: Some(prost_types::FieldMask { paths }) })
}

/// Returns the fields that the flags set.
fn given_fields(policy: &KeyPolicyArgs) -> Vec<ClearableField> {
    let KeyPolicyArgs {
        name,
        scopes,
        roles,
        expires,
        customers,
        allowed_cidrs,
        rate_limits,
        quota,
        metadata,
    } = policy;
    [
        (name.is_some(), ClearableField::Name),
        (!scopes.is_empty(), ClearableField::Scopes),
        (!roles.is_empty(), ClearableField::Roles),
        (expires.is_some(), ClearableField::ExpiresAt),
        (!customers.is_empty(), ClearableField::Customers),
        (!allowed_cidrs.is_empty(), ClearableField::AllowedCidrs),
        (!rate_limits.is_empty(), ClearableField::RateLimits),
        (quota.is_some(), ClearableField::Quota),
        (!metadata.is_empty(), ClearableField::Metadata),
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
        args: KeyUpdateArgs,
    }

    fn parse_update(line: &str) -> Result<(pb::Key, Vec<String>), String> {
        let only = Only::try_parse_from(format!("update 0197 {line}").split_whitespace())
            .map_err(|e| e.to_string())?;
        let clock = ManualClock::new(Timestamp::from_micros(0));
        let request = build_request(&only.args, &clock).map_err(|e| e.to_string())?;
        Ok((request.key.unwrap(), request.update_mask.unwrap().paths))
    }

    #[test]
    fn the_flags_that_are_given_are_the_mask() {
        let (key, paths) = parse_update("--name new --scope a:b,c:d --expires 1d --quota 5/day").unwrap();
        assert_eq!(paths, ["expires_at", "name", "quota", "scopes"]);
        assert_eq!((key.id.as_str(), key.name.as_str()), ("0197", "new"));
        assert_eq!(key.expires_at.map(|at| at.seconds), Some(86_400));
    }

    #[test]
    fn every_field_can_be_cleared() {
        let all = "name,scopes,roles,expires-at,customers,allowed-cidrs,rate-limits,quota,metadata";
        let (key, paths) = parse_update(&format!("--clear {all}")).unwrap();
        assert_eq!(paths.len(), 9);
        assert_eq!(key, pb::Key { id: "0197".into(), ..Default::default() });
    }

    fn scopes(list: &[&str]) -> Vec<String> {
        list.iter().map(|scope| (*scope).to_owned()).collect()
    }

    #[test]
    fn scopes_are_added_and_removed_beside_those_that_the_key_has() {
        let apply = |add: &[&str], remove: &[&str]| {
            let args = ScopeChangeArgs { add: scopes(add), remove: scopes(remove) };
            let key = pb::Key { scopes: scopes(&["a:b", "c:d"]), ..Default::default() };
            args.apply_checked(&key).map_err(|failure| failure.to_string())
        };
        assert_eq!(apply(&["e:f"], &["a:b"]), Ok(scopes(&["c:d", "e:f"])));
        assert_eq!(apply(&["a:b", "e:f"], &[]), Ok(scopes(&["a:b", "c:d", "e:f"])));
        assert_eq!(apply(&[], &["a:b", "c:d"]), Ok(vec![]));
        assert!(apply(&[], &["x:y"]).unwrap_err().contains("no scope x:y to remove; it has a:b, c:d"));
        assert!(apply(&["a:b"], &["a:b"]).unwrap_err().contains("both added and removed"));
        assert!(apply(&["a:b"], &[]).unwrap_err().contains("nothing was changed"));
        for bad in ["--scope a:b --add-scope c:d", "--clear scopes --remove-scope a:b"] {
            assert!(parse_update(bad).is_err(), "{bad}");
        }
        assert_eq!(parse_update("--add-scope a:b").unwrap().1, ["scopes"]);
    }

    /// Adds `s:1` and removes `a:b` while other writers replace the scopes: each element has the scopes at one read-back.
    /// Returns the result and the number of updates.
    async fn kept(overwritten_with: &[&[&str]]) -> (Result<Vec<String>, String>, usize) {
        let change = ScopeChangeArgs { add: scopes(&["s:1"]), remove: scopes(&["a:b"]) };
        let stored = std::cell::RefCell::new(scopes(&["s:1"]));
        let (mut others, writes) = (overwritten_with.iter(), std::cell::Cell::new(0));
        let ended = reapply_until_kept(
            &change,
            pb::UpdateKeyResponse::default(),
            async || {
                others.next().into_iter().for_each(|other| *stored.borrow_mut() = scopes(other));
                Ok(pb::Key { scopes: stored.borrow().clone(), ..Default::default() })
            },
            async |request| {
                assert_eq!(request.update_mask.unwrap().paths, ["scopes"]);
                *stored.borrow_mut() = request.key.unwrap().scopes;
                writes.set(writes.get() + 1);
                Ok(pb::UpdateKeyResponse::default())
            },
        )
        .await;
        let ended = ended.map(|_| stored.borrow().clone());
        (ended.map_err(|failure| format!("{} {failure}", failure.exit_code())), writes.get())
    }

    #[tokio::test]
    async fn a_change_of_scopes_that_somebody_overwrites_is_made_again_beside_theirs_or_fails() {
        assert_eq!(kept(&[]).await, (Ok(scopes(&["s:1"])), 0));
        assert_eq!(kept(&[&["a:b", "s:2"]]).await, (Ok(scopes(&["s:2", "s:1"])), 1));
        assert_eq!(kept(&[&["s:2"], &["a:b", "s:1", "s:3"]]).await, (Ok(scopes(&["s:1", "s:3"])), 2));
        let always = [&["s:2"][..]; 20];
        let (lost, writes) = kept(&always).await;
        assert!(lost.unwrap_err().starts_with("1 error: other changes of this key"));
        assert_eq!(writes, 9);
    }

    #[test]
    fn what_a_list_of_scopes_replaces_is_said() {
        let shown = describe_scope_diff(&scopes(&["a:b", "c:d"]), &scopes(&["c:d", "e:f"]));
        assert_eq!(shown, "Scopes removed: a:b; added: e:f.\n");
        assert_eq!(describe_scope_diff(&scopes(&["a:b"]), &scopes(&["a:b"])), "");
        assert_eq!(describe_scope_diff(&scopes(&["a:b"]), &[]), "Scopes removed: a:b; added: none.\n");
    }

    #[test]
    fn a_change_of_somebody_else_between_reading_and_writing_is_warned_of() {
        let entry = |revision, actor: &str| pb::AuditEntry {
            revision,
            actor: actor.to_owned(),
            action: "key.updated".to_owned(),
            ..Default::default()
        };
        assert_eq!(format_overwrite_warning(&[entry(9, "us")], 9), None);
        let warning = format_overwrite_warning(&[entry(8, "0197-other"), entry(9, "us")], 9).unwrap();
        assert!(
            warning.contains("0197-other changed this key meanwhile (revision 8, key.updated)"),
            "{warning}"
        );
    }

    #[test]
    fn never_clears_the_expiry() {
        let (key, paths) = parse_update("--expires never").unwrap();
        assert_eq!((paths, key.expires_at), (vec!["expires_at".to_owned()], None));
    }

    #[test]
    fn a_field_is_not_both_cleared_and_given() {
        assert!(parse_update("--clear name --name x").unwrap_err().contains("name is both cleared and set"));
        assert!(parse_update("").unwrap_err().contains("nothing to change"));
        assert!(parse_update("--clear id").unwrap_err().contains("possible values"));
    }
}
