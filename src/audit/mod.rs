//! The audit log as evidence: its verification, the publication of its head, and archives of its oldest part.
//!
//! An entry is defined in `domain`, stored in `store`, and rendered in `grpc/audit_service.rs`.

pub(crate) mod archive;
pub(crate) mod head_publisher;
mod key_comparison;
pub(crate) mod maintenance_entry;
mod revision_set;
mod table_comparison;
pub(crate) mod verify;
