//! Server reflection over the built-in descriptors, in both versions that clients speak.
//!
//! tonic's own ends the stream at the first name that it does not know. The protocol has an answer for that, and clients
//! that ask about several names over one stream need it.

use std::{collections::HashMap, sync::Arc};

use bytes::Bytes;
use futures_util::{StreamExt as _, stream::BoxStream};
use prost::Message as _;
use prost_types::{DescriptorProto, EnumDescriptorProto, FileDescriptorProto};
use tonic::{Code, Request, Response, Status, Streaming};

use crate::pb;

/// An encoded `google.protobuf.FileDescriptorSet`, whose files stay encoded: options of others would be lost otherwise.
#[derive(Clone, PartialEq, prost::Message)]
struct EncodedFileSet {
    #[prost(bytes = "bytes", repeated, tag = "1")]
    file: Vec<Bytes>,
}

/// What there is to know, by name. Shared by both versions.
#[derive(Debug, Default)]
pub(super) struct DescriptorIndex {
    files: HashMap<String, Bytes>,
    /// The file of each symbol.
    symbols: HashMap<String, Bytes>,
    services: Vec<String>,
}

impl DescriptorIndex {
    /// Everything that is served, and the details of errors, so that grpcurl can show them.
    ///
    /// # Errors
    /// When the built-in descriptors cannot be read: a fault of the build.
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

    /// Adds a file, unless one with its name is there.
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

/// What a request cannot be answered with: a code, and a message for people.
type ReflectionError = (Code, String);

fn not_found(what: &str, name: &str) -> ReflectionError {
    // Clients choose how long a name is.
    let shown: String = name.chars().take(200).collect();
    (Code::NotFound, format!("there is no {what} \"{shown}\"; list_services shows what there is"))
}

/// The service of one version; the two differ in their package alone.
macro_rules! reflection_service {
    ($version:ident) => {
        pub(super) mod $version {
            use tonic_reflection::pb::$version::{
                ErrorResponse, ExtensionNumberResponse, FileDescriptorResponse, ListServiceResponse,
                ServerReflectionRequest, ServerReflectionResponse, ServiceResponse,
                server_reflection_request::MessageRequest,
                server_reflection_response::MessageResponse,
                server_reflection_server::{ServerReflection, ServerReflectionServer},
            };

            use super::*;

            /// Answers from the descriptors.
            #[derive(Debug)]
            pub(in crate::grpc) struct Reflection(Arc<DescriptorIndex>);

            /// The service over these descriptors.
            pub(in crate::grpc) fn server(
                descriptors: Arc<DescriptorIndex>,
            ) -> ServerReflectionServer<Reflection> {
                ServerReflectionServer::new(Reflection(descriptors))
            }

            #[tonic::async_trait]
            impl ServerReflection for Reflection {
                type ServerReflectionInfoStream =
                    BoxStream<'static, Result<ServerReflectionResponse, Status>>;

                async fn server_reflection_info(
                    &self,
                    requests: Request<Streaming<ServerReflectionRequest>>,
                ) -> Result<Response<Self::ServerReflectionInfoStream>, Status> {
                    let descriptors = self.0.clone();
                    let answers =
                        requests.into_inner().map(move |request| Ok(answer(&descriptors, request?)));
                    Ok(Response::new(answers.boxed()))
                }
            }

            fn answer(
                descriptors: &DescriptorIndex,
                request: ServerReflectionRequest,
            ) -> ServerReflectionResponse {
                let found = find(descriptors, request.message_request.as_ref());
                let response = found.unwrap_or_else(|(code, error_message)| {
                    MessageResponse::ErrorResponse(ErrorResponse { error_code: code.into(), error_message })
                });
                ServerReflectionResponse {
                    valid_host: request.host.clone(),
                    original_request: Some(request),
                    message_response: Some(response),
                }
            }

            fn find(
                descriptors: &DescriptorIndex,
                request: Option<&MessageRequest>,
            ) -> Result<MessageResponse, ReflectionError> {
                let file = |found: Option<&Bytes>, what: &str, name: &str| {
                    let file = found.ok_or_else(|| not_found(what, name))?;
                    let file_descriptor_proto = vec![file.to_vec()];
                    Ok(MessageResponse::FileDescriptorResponse(FileDescriptorResponse {
                        file_descriptor_proto,
                    }))
                };
                match request {
                    Some(MessageRequest::FileByFilename(name)) => {
                        file(descriptors.files.get(name), "file", name)
                    }
                    Some(MessageRequest::FileContainingSymbol(name)) => {
                        file(descriptors.symbols.get(name), "symbol", name)
                    }
                    Some(MessageRequest::FileContainingExtension(extension)) => {
                        Err(not_found("extension of", &extension.containing_type))
                    }
                    Some(MessageRequest::AllExtensionNumbersOfType(name)) => {
                        // grpcurl asks about each message, and takes a refusal for a failure.
                        let base_type_name = name.clone();
                        Ok(MessageResponse::AllExtensionNumbersResponse(ExtensionNumberResponse {
                            base_type_name,
                            extension_number: Vec::new(),
                        }))
                    }
                    Some(MessageRequest::ListServices(_)) => {
                        let services = descriptors.services.iter().cloned();
                        let service = services.map(|name| ServiceResponse { name }).collect();
                        Ok(MessageResponse::ListServicesResponse(ListServiceResponse { service }))
                    }
                    None => Err((Code::InvalidArgument, "message_request is required".to_owned())),
                }
            }
        }
    };
}

reflection_service!(v1);
reflection_service!(v1alpha);
