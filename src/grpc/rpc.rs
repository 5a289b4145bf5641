//! Lists the RPCs: the access that each needs, how large its request may be, and how long it may take.
//!
//! Keyward's RPCs without a row are not served; a test compares the table with the descriptors. Health and
//! reflection are not in it.

use std::time::Duration;

use crate::{caller::Permission, pb::envoy_request::MAX_BODY_BYTES};

/// What a caller must prove to make a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AccessRequirement {
    /// A key with this permission.
    RequiresPermission(Permission),
    /// Any usable key: the call is about the key itself.
    AnyUsableKey,
    /// A token that is not superseded, whatever the state of its key.
    TokenPossession,
    /// Nothing, since a proxy asks for the client whose request it holds. If the settings require a
    /// caller, a key with `Permission::Check`.
    Proxy,
}

/// Where a call is executed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExecutionPlane {
    /// In memory, on the thread that serves the connection.
    Checks,
    /// On the management runtime, which may wait for the store.
    Management,
}

/// How many messages go each way, in the vocabulary of gRPC's metrics.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StreamingKind {
    /// One request and one response.
    Unary,
    /// One request and many responses.
    ServerStream,
    /// Many requests and many responses.
    BidiStream,
}

impl StreamingKind {
    /// The value of the metric label `grpc_type`.
    #[must_use]
    pub(super) const fn as_str(self) -> &'static str {
        match self {
            StreamingKind::Unary => "unary",
            StreamingKind::ServerStream => "server_stream",
            StreamingKind::BidiStream => "bidi_stream",
        }
    }
}

/// Access, limits and execution of one RPC.
#[derive(Clone, Copy, Debug)]
pub struct RpcSpec {
    /// The path without the leading slash, as in logs.
    pub method: &'static str,
    /// What a caller must prove to make a call.
    pub access: AccessRequirement,
    /// The largest request message, in bytes.
    pub max_request_bytes: usize,
    /// Time limit of a call; `None` for streams.
    pub timeout: Option<Duration>,
    /// Where the call is executed.
    pub plane: ExecutionPlane,
    /// How many messages go each way.
    pub streaming: StreamingKind,
}

impl RpcSpec {
    /// Whether this replica must catch up before the call is evaluated. True for calls that change something and
    /// depend on state in memory, and for calls on behalf of a person, whose membership is in memory.
    ///
    /// Calls that stop a key depend on its record alone, so they wait for nothing.
    #[must_use]
    pub(super) fn requires_catch_up(&self, for_person: bool) -> bool {
        let stops = self.is_restricting() && self.service_name() == "keyward.v1.KeyService";
        for_person || self.is_mutating() && !stops
    }

    /// Whether one message contains many requests, each charged to the caller's limits.
    #[must_use]
    pub(super) fn is_batch(&self) -> bool {
        self.method == BATCH_CHECK_METHOD
    }

    /// Whether the call always restricts rights. A part of each limit is reserved for such calls.
    #[must_use]
    pub(super) fn is_restricting(&self) -> bool {
        const RESTRICTING: [&str; 7] = [
            "keyward.v1.KeyService/Revoke",
            "keyward.v1.KeyService/BulkRevoke",
            "keyward.v1.KeyService/RevokeSelf",
            "keyward.v1.KeyService/Disable",
            "keyward.v1.KeyService/FinishRotation",
            "keyward.v1.AccountService/Suspend",
            "keyward.v1.AccountService/RemoveMember",
        ];
        RESTRICTING.contains(&self.method)
    }

    /// Whether the call may change something.
    #[must_use]
    pub(super) fn is_mutating(&self) -> bool {
        matches!(
            self.access,
            AccessRequirement::RequiresPermission(KeysWrite | AccountsWrite)
                | AccessRequirement::TokenPossession
        )
    }

    /// Full name of the service.
    #[must_use]
    pub(super) fn service_name(&self) -> &'static str {
        service_name(self.method)
    }
}

/// Paths that an overloaded thread refuses first, since proxies and backends retry them, also on other servers.
pub(super) const CHECK_PATHS: [&str; 3] = [
    "/keyward.v1.AuthzService/Check",
    "/keyward.v1.AuthzService/BatchCheck",
    "/envoy.service.auth.v3.Authorization/Check",
];

/// Whether this path, with or without a query, is that of a unary Check.
pub(super) fn is_check_path(path: &[u8]) -> bool {
    let path = path.split(|byte| *byte == b'?').next().unwrap_or_default();
    CHECK_PATHS.iter().any(|check| check.as_bytes() == path)
}

/// Full name of the service, from the full name of a method.
#[must_use]
pub(super) fn service_name(method: &'static str) -> &'static str {
    method.split('/').next().unwrap_or_default()
}

pub(super) const MAX_CHECK_REQUEST: usize = 16 * 1024;
pub(super) const MAX_BATCH_REQUEST: usize = 128 * 1024;
/// A request's head, and its body if Envoy sends it.
const MAX_EXT_AUTHZ_REQUEST: usize = MAX_BATCH_REQUEST + MAX_BODY_BYTES;
const MAX_MANAGEMENT_REQUEST: usize = 4 * 1024 * 1024;
pub(super) const CHECK_TIMEOUT: Duration = Duration::from_secs(5);
const MANAGEMENT_TIMEOUT: Duration = Duration::from_secs(60);
/// Calls that wait for propagation end by themselves, with a report.
const PROPAGATION_TIMEOUT: Duration = Duration::from_secs(600);
/// Verification reads the whole log.
const VERIFY_TIMEOUT: Duration = Duration::from_secs(600);

const fn check_rpc(method: &'static str, max_request: usize, timeout: Option<Duration>) -> RpcSpec {
    let (access, plane) = (AccessRequirement::RequiresPermission(Permission::Check), ExecutionPlane::Checks);
    RpcSpec {
        method,
        access,
        max_request_bytes: max_request,
        timeout,
        plane,
        streaming: StreamingKind::Unary,
    }
}

const fn management_rpc(method: &'static str, access: AccessRequirement) -> RpcSpec {
    let timeout = Some(MANAGEMENT_TIMEOUT);
    let (max_request, plane) = (MAX_MANAGEMENT_REQUEST, ExecutionPlane::Management);
    RpcSpec {
        method,
        access,
        max_request_bytes: max_request,
        timeout,
        plane,
        streaming: StreamingKind::Unary,
    }
}

/// A call that may restrict rights, and then waits for propagation.
const fn propagating_rpc(method: &'static str, access: AccessRequirement) -> RpcSpec {
    let timeout = Some(PROPAGATION_TIMEOUT);
    RpcSpec { timeout, ..management_rpc(method, access) }
}

const BATCH_CHECK_METHOD: &str = "keyward.v1.AuthzService/BatchCheck";
pub(super) const IMPORT_METHOD: &str = "keyward.v1.KeyService/Import";
pub(super) const EXT_AUTHZ_METHOD: &str = "envoy.service.auth.v3.Authorization/Check";

use AccessRequirement::{AnyUsableKey, RequiresPermission, TokenPossession};
use Permission::{AccountsRead, AccountsWrite, AuditRead, KeysRead, KeysWrite};

/// Every RPC except health and reflection, the most frequent first.
pub const RPC_TABLE: [RpcSpec; 34] = [
    check_rpc("keyward.v1.AuthzService/Check", MAX_CHECK_REQUEST, Some(CHECK_TIMEOUT)),
    RpcSpec {
        access: AccessRequirement::Proxy,
        ..check_rpc(EXT_AUTHZ_METHOD, MAX_EXT_AUTHZ_REQUEST, Some(CHECK_TIMEOUT))
    },
    check_rpc(BATCH_CHECK_METHOD, MAX_BATCH_REQUEST, Some(CHECK_TIMEOUT)),
    RpcSpec {
        streaming: StreamingKind::BidiStream,
        ..check_rpc("keyward.v1.AuthzService/StreamCheck", MAX_CHECK_REQUEST, None)
    },
    management_rpc("keyward.v1.KeyService/Create", RequiresPermission(KeysWrite)),
    management_rpc("keyward.v1.KeyService/Get", RequiresPermission(KeysRead)),
    management_rpc("keyward.v1.KeyService/List", RequiresPermission(KeysRead)),
    propagating_rpc("keyward.v1.KeyService/Update", RequiresPermission(KeysWrite)),
    propagating_rpc("keyward.v1.KeyService/Disable", RequiresPermission(KeysWrite)),
    propagating_rpc("keyward.v1.KeyService/Enable", RequiresPermission(KeysWrite)),
    propagating_rpc("keyward.v1.KeyService/Revoke", RequiresPermission(KeysWrite)),
    propagating_rpc("keyward.v1.KeyService/BulkRevoke", RequiresPermission(KeysWrite)),
    propagating_rpc("keyward.v1.KeyService/Rotate", RequiresPermission(KeysWrite)),
    propagating_rpc("keyward.v1.KeyService/FinishRotation", RequiresPermission(KeysWrite)),
    management_rpc(IMPORT_METHOD, RequiresPermission(KeysWrite)),
    management_rpc("keyward.v1.KeyService/Lookup", RequiresPermission(KeysRead)),
    management_rpc("keyward.v1.KeyService/Usage", RequiresPermission(KeysRead)),
    RpcSpec {
        timeout: None,
        streaming: StreamingKind::ServerStream,
        ..management_rpc("keyward.v1.KeyService/WatchPropagation", RequiresPermission(KeysRead))
    },
    // Their requests are empty, and any token may call them.
    RpcSpec {
        max_request_bytes: MAX_CHECK_REQUEST,
        ..management_rpc("keyward.v1.KeyService/WhoAmI", AnyUsableKey)
    },
    RpcSpec {
        max_request_bytes: MAX_CHECK_REQUEST,
        ..propagating_rpc("keyward.v1.KeyService/RevokeSelf", TokenPossession)
    },
    management_rpc("keyward.v1.AccountService/Create", RequiresPermission(AccountsWrite)),
    management_rpc("keyward.v1.AccountService/Get", RequiresPermission(AccountsRead)),
    management_rpc("keyward.v1.AccountService/List", RequiresPermission(AccountsRead)),
    management_rpc("keyward.v1.AccountService/Update", RequiresPermission(AccountsWrite)),
    propagating_rpc("keyward.v1.AccountService/Suspend", RequiresPermission(AccountsWrite)),
    management_rpc("keyward.v1.AccountService/Resume", RequiresPermission(AccountsWrite)),
    propagating_rpc("keyward.v1.AccountService/PutMember", RequiresPermission(AccountsWrite)),
    propagating_rpc("keyward.v1.AccountService/RemoveMember", RequiresPermission(AccountsWrite)),
    management_rpc("keyward.v1.AccountService/ListMembers", RequiresPermission(AccountsRead)),
    propagating_rpc("keyward.v1.AccountService/PutRole", RequiresPermission(AccountsWrite)),
    propagating_rpc("keyward.v1.AccountService/DeleteRole", RequiresPermission(AccountsWrite)),
    management_rpc("keyward.v1.AccountService/ListRoles", RequiresPermission(AccountsRead)),
    management_rpc("keyward.v1.AuditService/List", RequiresPermission(AuditRead)),
    RpcSpec {
        timeout: Some(VERIFY_TIMEOUT),
        ..management_rpc("keyward.v1.AuditService/Verify", RequiresPermission(AuditRead))
    },
];

/// The largest request message of a service, in bytes.
#[must_use]
pub(super) fn max_request_of_service(service: &str) -> usize {
    RPC_TABLE
        .iter()
        .filter(|rpc| rpc.service_name() == service)
        .map(|rpc| rpc.max_request_bytes)
        .max()
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use prost::Message as _;
    use std::fmt::Write as _;

    fn described() -> Vec<(String, &'static str)> {
        let set = prost_types::FileDescriptorSet::decode(crate::pb::FILE_DESCRIPTOR_SET).unwrap();
        let services = set.file.into_iter().flat_map(|file| {
            let package = file.package().to_owned();
            file.service.into_iter().map(move |service| (package.clone(), service))
        });
        let mut methods: Vec<_> = services
            .flat_map(|(package, service)| {
                let name = format!("{package}.{}", service.name());
                service.method.into_iter().map(move |method| {
                    let kind = match (method.client_streaming(), method.server_streaming()) {
                        (false, false) => StreamingKind::Unary,
                        (false, true) => StreamingKind::ServerStream,
                        (true, true) => StreamingKind::BidiStream,
                        (true, false) => panic!("{}: a kind that there was none of", method.name()),
                    };
                    (format!("{name}/{}", method.name()), kind.as_str())
                })
            })
            .collect();
        methods.sort();
        methods
    }

    #[test]
    fn every_rpc_has_a_row_of_its_kind_and_every_row_an_rpc() {
        let mut rows: Vec<_> =
            RPC_TABLE.iter().map(|rpc| (rpc.method.to_owned(), rpc.streaming.as_str())).collect();
        rows.sort();
        assert_eq!(rows, described());
    }

    /// Reviewed by hand: a change here changes access rights.
    #[test]
    fn the_permission_table_is_the_reviewed_one() {
        let mut table = String::new();
        for rpc in RPC_TABLE {
            let access = match rpc.access {
                AccessRequirement::RequiresPermission(permission) => permission.as_str(),
                AccessRequirement::AnyUsableKey => "any usable key",
                AccessRequirement::TokenPossession => "a living token",
                AccessRequirement::Proxy => "nothing, or keyward:check",
            };
            writeln!(table, "{:<42} {access}", rpc.method).unwrap();
        }
        let reviewed = include_str!("../../tests/snapshots/permissions.txt");
        assert_eq!(
            table, reviewed,
            "review the change, then bring tests/snapshots/permissions.txt up to date"
        );
    }
}
