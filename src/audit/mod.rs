//! The audit log as evidence: that it is whole and the tables agree with it, that its head is known outside, and
//! that its oldest part can leave for a file. What an entry is stands in `domain`, where it is kept in `store`, how it is
//! shown in `grpc/audit_service.rs`.

pub(crate) mod archive;
pub(crate) mod head_publisher;
mod key_comparison;
pub(crate) mod maintenance_entry;
mod revision_set;
mod table_comparison;
pub(crate) mod verify;
