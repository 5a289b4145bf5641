//! The table of RPCs: what each needs, how large its request may be, and how long it may take. An RPC of ours
//! that has no row here is not served; a test holds the table against the descriptors.

use std::time::Duration;

use crate::{access::Permission, pb::envoy_request::MAX_BODY};

/// What a caller must show.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// A key with this permission.
    Needs(Permission),
    /// Any usable key: it asks about itself.
    AnyKey,
    /// A living token, in whatever state its key is.
    Possession,
    /// Nothing, since a proxy asks for the client whose request it holds; or, where the configuration says so, a
    /// key with [`Permission::Check`].
    Proxy,
}

/// Where a call is answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Plane {
    /// From memory, on the thread that serves the connection.
    Checks,
    /// On the runtime for management, which may wait for storage.
    Management,
}

/// How many messages go each way, in the words that metrics have for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// One each way.
    Unary,
    /// One request, many answers.
    ServerStream,
    /// Many each way.
    BidiStream,
}

impl Kind {
    /// The value of `grpc_type`.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Kind::Unary => "unary",
            Kind::ServerStream => "server_stream",
            Kind::BidiStream => "bidi_stream",
        }
    }
}

/// One RPC.
#[derive(Clone, Copy, Debug)]
pub struct Rpc {
    /// Its path without the first slash, as logs name it.
    pub method: &'static str,
    /// What a caller must show.
    pub access: Access,
    /// The largest request, in bytes.
    pub max_request: usize,
    /// The longest that a call may take; `None` for streams.
    pub timeout: Option<Duration>,
    /// Where it is answered.
    pub plane: Plane,
    /// How many messages go each way.
    pub kind: Kind,
}

impl Rpc {
    /// Whether what others have just committed is to be heard before it is judged: where it may change something, and
    /// is judged by what is in memory. Who stops a key for nobody else is judged by the record alone, and waits for
    /// nothing that it can do without. A call for a person is judged by a membership in memory, also if it only reads.
    #[must_use]
    pub fn hears_first(&self, for_person: bool) -> bool {
        let stops = self.restricts() && self.service() == "keyward.v1.KeyService";
        for_person || self.changes() && !stops
    }

    /// Whether it asks many things in one message, and is charged to its caller's limits for each of them.
    #[must_use]
    pub fn is_batch(&self) -> bool {
        self.method == BATCH_CHECK
    }

    /// Whether it takes rights away, whatever its request says: a part of each limit is kept for such calls.
    #[must_use]
    pub fn restricts(&self) -> bool {
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

    /// Whether it may change something.
    #[must_use]
    pub fn changes(&self) -> bool {
        matches!(self.access, Access::Needs(KeysWrite | AccountsWrite) | Access::Possession)
    }

    /// The service's full name.
    #[must_use]
    pub fn service(&self) -> &'static str {
        service(self.method)
    }
}

/// The paths of the calls that an overloaded thread refuses first: a proxy or a backend asks again, or elsewhere.
pub(super) const CHECK_PATHS: [&str; 3] = [
    "/keyward.v1.AuthzService/Check",
    "/keyward.v1.AuthzService/BatchCheck",
    "/envoy.service.auth.v3.Authorization/Check",
];

/// Whether a path, with or without a query, is that of a unary Check.
pub(super) fn is_check(path: &[u8]) -> bool {
    let path = path.split(|byte| *byte == b'?').next().unwrap_or_default();
    CHECK_PATHS.iter().any(|check| check.as_bytes() == path)
}

/// The service's full name in a method's.
#[must_use]
pub fn service(method: &'static str) -> &'static str {
    method.split('/').next().unwrap_or_default()
}

pub(super) const CHECK_BYTES: usize = 16 * 1024;
pub(super) const BATCH_BYTES: usize = 128 * 1024;
/// A request's head, and its body where Envoy sends that along.
const EXT_AUTHZ_BYTES: usize = BATCH_BYTES + MAX_BODY;
const MANAGEMENT_BYTES: usize = 4 * 1024 * 1024;
pub(super) const CHECK_TIMEOUT: Duration = Duration::from_secs(5);
const MANAGEMENT_TIMEOUT: Duration = Duration::from_secs(60);
/// What waits for a change to be in force everywhere ends by itself, with a report.
const PROPAGATION_TIMEOUT: Duration = Duration::from_secs(600);
/// What reads all there is.
const VERIFY_TIMEOUT: Duration = Duration::from_secs(600);

const fn checks(method: &'static str, max_request: usize, timeout: Option<Duration>) -> Rpc {
    let (access, plane) = (Access::Needs(Permission::Check), Plane::Checks);
    Rpc { method, access, max_request, timeout, plane, kind: Kind::Unary }
}

const fn managed(method: &'static str, access: Access) -> Rpc {
    let timeout = Some(MANAGEMENT_TIMEOUT);
    let (max_request, plane) = (MANAGEMENT_BYTES, Plane::Management);
    Rpc { method, access, max_request, timeout, plane, kind: Kind::Unary }
}

/// What may take something away, and then waits until that is in force everywhere.
const fn narrowing(method: &'static str, access: Access) -> Rpc {
    let timeout = Some(PROPAGATION_TIMEOUT);
    Rpc { timeout, ..managed(method, access) }
}

/// Many Checks in one call.
const BATCH_CHECK: &str = "keyward.v1.AuthzService/BatchCheck";
/// The call whose request holds many keys.
pub(super) const IMPORT: &str = "keyward.v1.KeyService/Import";
/// What Envoy asks.
pub const EXT_AUTHZ: &str = "envoy.service.auth.v3.Authorization/Check";

use Access::{AnyKey, Needs, Possession};
use Permission::{AccountsRead, AccountsWrite, AuditRead, KeysRead, KeysWrite};

/// Every RPC but those of health and reflection, the most frequent first.
pub const TABLE: [Rpc; 34] = [
    checks("keyward.v1.AuthzService/Check", CHECK_BYTES, Some(CHECK_TIMEOUT)),
    Rpc { access: Access::Proxy, ..checks(EXT_AUTHZ, EXT_AUTHZ_BYTES, Some(CHECK_TIMEOUT)) },
    checks(BATCH_CHECK, BATCH_BYTES, Some(CHECK_TIMEOUT)),
    Rpc { kind: Kind::BidiStream, ..checks("keyward.v1.AuthzService/StreamCheck", CHECK_BYTES, None) },
    managed("keyward.v1.KeyService/Create", Needs(KeysWrite)),
    managed("keyward.v1.KeyService/Get", Needs(KeysRead)),
    managed("keyward.v1.KeyService/List", Needs(KeysRead)),
    narrowing("keyward.v1.KeyService/Update", Needs(KeysWrite)),
    narrowing("keyward.v1.KeyService/Disable", Needs(KeysWrite)),
    narrowing("keyward.v1.KeyService/Enable", Needs(KeysWrite)),
    narrowing("keyward.v1.KeyService/Revoke", Needs(KeysWrite)),
    narrowing("keyward.v1.KeyService/BulkRevoke", Needs(KeysWrite)),
    narrowing("keyward.v1.KeyService/Rotate", Needs(KeysWrite)),
    narrowing("keyward.v1.KeyService/FinishRotation", Needs(KeysWrite)),
    managed(IMPORT, Needs(KeysWrite)),
    managed("keyward.v1.KeyService/Lookup", Needs(KeysRead)),
    managed("keyward.v1.KeyService/Usage", Needs(KeysRead)),
    Rpc {
        timeout: None,
        kind: Kind::ServerStream,
        ..managed("keyward.v1.KeyService/WatchPropagation", Needs(KeysRead))
    },
    // Their requests are empty, and any token makes them.
    Rpc { max_request: CHECK_BYTES, ..managed("keyward.v1.KeyService/WhoAmI", AnyKey) },
    Rpc { max_request: CHECK_BYTES, ..narrowing("keyward.v1.KeyService/RevokeSelf", Possession) },
    managed("keyward.v1.AccountService/Create", Needs(AccountsWrite)),
    managed("keyward.v1.AccountService/Get", Needs(AccountsRead)),
    managed("keyward.v1.AccountService/List", Needs(AccountsRead)),
    managed("keyward.v1.AccountService/Update", Needs(AccountsWrite)),
    narrowing("keyward.v1.AccountService/Suspend", Needs(AccountsWrite)),
    managed("keyward.v1.AccountService/Resume", Needs(AccountsWrite)),
    narrowing("keyward.v1.AccountService/PutMember", Needs(AccountsWrite)),
    narrowing("keyward.v1.AccountService/RemoveMember", Needs(AccountsWrite)),
    managed("keyward.v1.AccountService/ListMembers", Needs(AccountsRead)),
    narrowing("keyward.v1.AccountService/PutRole", Needs(AccountsWrite)),
    narrowing("keyward.v1.AccountService/DeleteRole", Needs(AccountsWrite)),
    managed("keyward.v1.AccountService/ListRoles", Needs(AccountsRead)),
    managed("keyward.v1.AuditService/List", Needs(AuditRead)),
    Rpc { timeout: Some(VERIFY_TIMEOUT), ..managed("keyward.v1.AuditService/Verify", Needs(AuditRead)) },
];

/// The RPC with this path, `/package.Service/Method`.
#[must_use]
pub fn find(path: &str) -> Option<&'static Rpc> {
    let method = path.strip_prefix('/')?;
    TABLE.iter().find(|rpc| rpc.method == method)
}

/// The largest request of a service, in bytes.
#[must_use]
pub fn largest(service: &str) -> usize {
    TABLE.iter().filter(|rpc| rpc.service() == service).map(|rpc| rpc.max_request).max().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use prost::Message as _;
    use std::fmt::Write as _;

    fn described() -> Vec<(String, &'static str)> {
        let set = prost_types::FileDescriptorSet::decode(crate::pb::DESCRIPTORS).unwrap();
        let services = set.file.into_iter().flat_map(|file| {
            let package = file.package().to_owned();
            file.service.into_iter().map(move |service| (package.clone(), service))
        });
        let mut methods: Vec<_> = services
            .flat_map(|(package, service)| {
                let name = format!("{package}.{}", service.name());
                service.method.into_iter().map(move |method| {
                    let kind = match (method.client_streaming(), method.server_streaming()) {
                        (false, false) => Kind::Unary,
                        (false, true) => Kind::ServerStream,
                        (true, true) => Kind::BidiStream,
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
        let mut rows: Vec<_> = TABLE.iter().map(|rpc| (rpc.method.to_owned(), rpc.kind.as_str())).collect();
        rows.sort();
        assert_eq!(rows, described());
    }

    /// Reviewed: a change here is a change of who may do what.
    #[test]
    fn the_permission_table_is_the_reviewed_one() {
        let mut table = String::new();
        for rpc in TABLE {
            let access = match rpc.access {
                Access::Needs(permission) => permission.as_str(),
                Access::AnyKey => "any usable key",
                Access::Possession => "a living token",
                Access::Proxy => "nothing, or keyward:check",
            };
            writeln!(table, "{:<42} {access}", rpc.method).unwrap();
        }
        let reviewed = include_str!("../../tests/snapshots/permissions.txt");
        assert_eq!(
            table, reviewed,
            "review the change, then bring tests/snapshots/permissions.txt up to date"
        );
    }

    #[test]
    fn an_unknown_path_is_no_rpc() {
        for path in ["", "/", "keyward.v1.AuthzService/Check", "/keyward.v1.AuthzService/Check/"] {
            assert!(find(path).is_none(), "{path:?}");
        }
        assert!(find("/keyward.v1.AuthzService/Check").is_some());
    }
}
