//! The servers that a load is measured against, as children of this program: what tonic does when it has nothing to do.
//!
//! They share this program's allocator, which makes them faster than they would be by themselves, and so our ratios
//! smaller: an error to our disadvantage. `benches/goals.rs` is such a program with the system's allocator, as tonic's own
//! examples have it, and has both measured.

use std::io::{self, Write as _};

use clap::ValueEnum;
use tokio::{net::TcpListener, runtime::Builder};
use tonic::{
    Request, Response, Status,
    transport::{Server, server::TcpIncoming},
};

use crate::pb::bench::{
    EchoRequest, EchoResponse, SayHelloRequest, SayHelloResponse,
    baseline_service_server::{BaselineService, BaselineServiceServer},
};

/// What a baseline is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum BaselineKind {
    /// tonic's hello-world as everybody writes it: on the work-stealing runtime
    Hello,
    /// An echo on one thread
    Echo,
}

impl BaselineKind {
    /// The method that is asked.
    pub(super) fn method_path(self) -> &'static str {
        match self {
            BaselineKind::Hello => "/keyward.bench.v1.BaselineService/SayHello",
            BaselineKind::Echo => "/keyward.bench.v1.BaselineService/Echo",
        }
    }

    /// What it is called in tables.
    pub(super) fn label(self) -> &'static str {
        match self {
            BaselineKind::Hello => "tonic hello-world",
            BaselineKind::Echo => "tonic echo, one thread",
        }
    }
}

struct BaselineServer;

#[tonic::async_trait]
impl BaselineService for BaselineServer {
    async fn say_hello(
        &self,
        request: Request<SayHelloRequest>,
    ) -> Result<Response<SayHelloResponse>, Status> {
        let message = format!("Hello {}!", request.into_inner().name);
        Ok(Response::new(SayHelloResponse { message }))
    }

    async fn echo(&self, request: Request<EchoRequest>) -> Result<Response<EchoResponse>, Status> {
        Ok(Response::new(EchoResponse { payload: request.into_inner().payload }))
    }
}

/// Serves a baseline until it is killed. Says on standard output where.
///
/// # Errors
/// When there is no port to be had.
pub(super) fn serve(baseline: BaselineKind) -> anyhow::Result<()> {
    let runtime = match baseline {
        BaselineKind::Hello => Builder::new_multi_thread().enable_all().build()?,
        BaselineKind::Echo => Builder::new_current_thread().enable_all().build()?,
    };
    let served = async {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        print_line(&format!("baseline on {}\n", listener.local_addr()?))?;
        let incoming = TcpIncoming::from(listener).with_nodelay(Some(true));
        let service = BaselineServiceServer::new(BaselineServer);
        Ok(Server::builder().add_service(service).serve_with_incoming(incoming).await?)
    };
    // As `#[tokio::main]` does: the accepting runs beside the workers.
    runtime.block_on(served)
}

fn print_line(line: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(line.as_bytes())?;
    out.flush()
}
