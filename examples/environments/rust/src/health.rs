//! grpc.health.v1: SERVING until the process is told to end.

use std::pin::Pin;

use tokio::sync::watch;
use tokio_stream::wrappers::WatchStream;
use tokio_stream::{Stream, StreamExt};
use tonic::{Request, Response, Status};

use crate::health_pb::health_check_response::ServingStatus;
use crate::health_pb::health_server::Health;
use crate::health_pb::{HealthCheckRequest, HealthCheckResponse};
use crate::pb::environment_service_server::SERVICE_NAME;

/// Tells whether the process serves, until the sender is dropped.
pub struct HealthService(pub watch::Receiver<bool>);

#[tonic::async_trait]
impl Health for HealthService {
    type WatchStream = Pin<Box<dyn Stream<Item = Result<HealthCheckResponse, Status>> + Send>>;

    async fn check(
        &self,
        request: Request<HealthCheckRequest>,
    ) -> Result<Response<HealthCheckResponse>, Status> {
        match request.get_ref().service.as_str() {
            "" | SERVICE_NAME => Ok(Response::new(response(*self.0.borrow()))),
            _ => Err(Status::not_found("no such service")),
        }
    }

    async fn watch(
        &self,
        request: Request<HealthCheckRequest>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        let known = matches!(request.get_ref().service.as_str(), "" | SERVICE_NAME);
        let changes = WatchStream::new(self.0.clone()).map(move |serving| {
            let unknown = HealthCheckResponse {
                status: ServingStatus::ServiceUnknown.into(),
            };
            Ok(if known { response(serving) } else { unknown })
        });
        Ok(Response::new(Box::pin(changes)))
    }
}

fn response(serving: bool) -> HealthCheckResponse {
    let status = if serving {
        ServingStatus::Serving
    } else {
        ServingStatus::NotServing
    };
    HealthCheckResponse {
        status: status.into(),
    }
}
