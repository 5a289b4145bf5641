//! Implements server reflection over the built-in descriptors, in both protocol versions.
//!
//! tonic's implementation ends the stream at the first unknown name. The protocol has an error response for that, and
//! clients that ask about several names on one stream need it.

/// Defines the service of one version; the two differ only in their package.
macro_rules! reflection_service {
    ($version:ident) => {
        pub(super) mod $version {
            use std::sync::Arc;

            use futures_util::{StreamExt as _, stream::BoxStream};
            use tonic::{Code, Request, Response, Status, Streaming};
            use tonic_reflection::pb::$version::{
                ErrorResponse, ExtensionNumberResponse, FileDescriptorResponse, ListServiceResponse,
                ServerReflectionRequest, ServerReflectionResponse, ServiceResponse,
                server_reflection_request::MessageRequest,
                server_reflection_response::MessageResponse,
                server_reflection_server::{ServerReflection, ServerReflectionServer},
            };

            use crate::grpc::descriptor_index::{DescriptorIndex, ReflectionError, not_found};

            /// The reflection service of this version.
            #[derive(Debug)]
            pub(in crate::grpc) struct Reflection(Arc<DescriptorIndex>);

            /// Creates the service over these descriptors.
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
                let file_response = |file| {
                    let file_descriptor_proto = vec![file];
                    MessageResponse::FileDescriptorResponse(FileDescriptorResponse { file_descriptor_proto })
                };
                match request {
                    Some(MessageRequest::FileByFilename(name)) => {
                        descriptors.find_file(name).map(file_response)
                    }
                    Some(MessageRequest::FileContainingSymbol(name)) => {
                        descriptors.find_symbol(name).map(file_response)
                    }
                    Some(MessageRequest::FileContainingExtension(extension)) => {
                        Err(not_found("extension of", &extension.containing_type))
                    }
                    Some(MessageRequest::AllExtensionNumbersOfType(name)) => {
                        // grpcurl asks this for each message, and treats an error as a failure.
                        let base_type_name = name.clone();
                        Ok(MessageResponse::AllExtensionNumbersResponse(ExtensionNumberResponse {
                            base_type_name,
                            extension_number: Vec::new(),
                        }))
                    }
                    Some(MessageRequest::ListServices(_)) => {
                        let services = descriptors.service_names().map(str::to_owned);
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
