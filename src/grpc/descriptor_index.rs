//! Indexes the built-in protobuf descriptors by file and symbol, for server reflection.
//! The protocol belongs in `reflection.rs`.

use std::{collections::HashMap, sync::Arc};

use bytes::Bytes;
use prost::Message as _;
use prost_types::{DescriptorProto, EnumDescriptorProto, FileDescriptorProto};
use tonic::Code;

use crate::pb;

/// A `FileDescriptorSet` whose files stay encoded: decoding would drop unknown options.
#[derive(Clone, PartialEq, prost::Message)]
struct EncodedFileSet {
    #[prost(bytes = "bytes", repeated, tag = "1")]
    file: Vec<Bytes>,
}

/// Files by name and by symbol. Both protocol versions share it.
#[derive(Debug, Default)]
pub(super) struct DescriptorIndex {
    files: HashMap<String, Bytes>,
    /// The file that declares each symbol.
    symbols: HashMap<String, Bytes>,
    services: Vec<String>,
}

impl DescriptorIndex {
    /// Returns the encoded file of this name.
    pub(super) fn find_file(&self, name: &str) -> Result<Vec<u8>, ReflectionError> {
        self.files.get(name).map(|file| file.to_vec()).ok_or_else(|| not_found("file", name))
    }

    /// Returns the encoded file that declares this symbol.
    pub(super) fn find_symbol(&self, name: &str) -> Result<Vec<u8>, ReflectionError> {
        self.symbols.get(name).map(|file| file.to_vec()).ok_or_else(|| not_found("symbol", name))
    }

    /// Full names of the services.
    pub(super) fn service_names(&self) -> impl Iterator<Item = &str> {
        self.services.iter().map(String::as_str)
    }

    /// Indexes everything that is served, and the error details that clients such as grpcurl display. Fails if a
    /// descriptor cannot be decoded, which is a build error.
    pub(super) fn from_built_in() -> Result<Arc<DescriptorIndex>, prost::DecodeError> {
        let mut descriptors = DescriptorIndex::default();
        for set in [
            pb::FILE_DESCRIPTOR_SET,
            tonic_health::pb::FILE_DESCRIPTOR_SET,
            tonic_types::pb::FILE_DESCRIPTOR_SET,
            tonic_reflection::pb::v1::FILE_DESCRIPTOR_SET,
            tonic_reflection::pb::v1alpha::FILE_DESCRIPTOR_SET,
        ] {
            for file in EncodedFileSet::decode(set)?.file {
                descriptors.add_file(file)?;
            }
        }
        Ok(Arc::new(descriptors))
    }

    /// Adds a file, unless a file of this name exists.
    fn add_file(&mut self, encoded: Bytes) -> Result<(), prost::DecodeError> {
        let file = FileDescriptorProto::decode(encoded.clone())?;
        if self.files.insert(file.name().to_owned(), encoded.clone()).is_some() {
            return Ok(());
        }
        let package = file.package();
        for message in &file.message_type {
            self.add_message(package, message, &encoded);
        }
        for values in &file.enum_type {
            self.add_enum(package, values, &encoded);
        }
        for service in &file.service {
            let name = self.add_symbol(package, service.name(), &encoded);
            for method in &service.method {
                self.add_symbol(&name, method.name(), &encoded);
            }
            self.services.push(name);
        }
        Ok(())
    }

    fn add_message(&mut self, scope: &str, message: &DescriptorProto, file: &Bytes) {
        let name = self.add_symbol(scope, message.name(), file);
        for field in &message.field {
            self.add_symbol(&name, field.name(), file);
        }
        for one_of in &message.oneof_decl {
            self.add_symbol(&name, one_of.name(), file);
        }
        for values in &message.enum_type {
            self.add_enum(&name, values, file);
        }
        for nested in &message.nested_type {
            self.add_message(&name, nested, file);
        }
    }

    fn add_enum(&mut self, scope: &str, values: &EnumDescriptorProto, file: &Bytes) {
        let name = self.add_symbol(scope, values.name(), file);
        for value in &values.value {
            self.add_symbol(&name, value.name(), file);
        }
    }

    fn add_symbol(&mut self, scope: &str, name: &str, file: &Bytes) -> String {
        let full = if scope.is_empty() { name.to_owned() } else { format!("{scope}.{name}") };
        self.symbols.insert(full.clone(), file.clone());
        full
    }
}

/// Why a request failed: a code and a message.
pub(super) type ReflectionError = (Code, String);

pub(super) fn not_found(what: &str, name: &str) -> ReflectionError {
    // The client controls the length of the name.
    let shown: String = name.chars().take(200).collect();
    (Code::NotFound, format!("{what} \"{shown}\" not found; list_services shows the services"))
}
