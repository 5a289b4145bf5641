//! Evaluates the caller of a management call again while the call runs.
//!
//! Headers are authenticated before the body arrives; the body, the write queue and other replicas can take seconds. So
//! the caller is evaluated when the handler takes it, and again before a response leaves. Changes are checked once more
//! within their transaction, in `caller/authorization.rs`. The callers of Checks are in `check_session.rs`.

use std::sync::Arc;

use tonic::Code;

use crate::{caller::Caller, engine::Engine, service_error::ServiceError, store::group_commit::CallWrites};

/// An authenticated caller, and the engine that has its current state.
#[derive(Clone, Debug)]
pub(super) struct ManagementSession {
    engine: Arc<Engine>,
    caller: Caller,
}

impl ManagementSession {
    pub(super) fn new(engine: Arc<Engine>, caller: Caller) -> ManagementSession {
        ManagementSession { engine, caller }
    }

    /// The caller as it was when its headers were authenticated.
    pub(super) fn authenticated_caller(&self) -> &Caller {
        &self.caller
    }

    /// The caller with its current rights. Charges nothing. Fails if it has expired or was revoked, disabled,
    /// suspended, removed or restricted below what the call needs.
    pub(super) fn reauthorize(&self) -> Result<Caller, ServiceError> {
        Ok(self.caller.authorize(&self.engine)?.caller)
    }

    /// The error that replaces the response if the caller has lost its rights. A response to a committed change stays,
    /// since the caller was authorized then. So does a fault, which reveals nothing about stored data.
    pub(super) fn refuse_response(&self, code: Option<Code>, writes: CallWrites) -> Option<ServiceError> {
        use Code::{AlreadyExists, FailedPrecondition, InvalidArgument, NotFound, Ok, PermissionDenied};
        let reveals_state = matches!(
            code,
            None | Some(
                Ok | NotFound | AlreadyExists | FailedPrecondition | InvalidArgument | PermissionDenied
            )
        );
        if writes.has_committed || !reveals_state { None } else { self.reauthorize().err() }
    }
}
