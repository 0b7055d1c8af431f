//! Letters to sort, as an environment of Rollmesh: `sort-letters --listen 127.0.0.1:0`.

// tonic's Status is as large as it is.
#![allow(clippy::result_large_err)]

mod health;
mod letters;
mod service;

mod pb {
    tonic::include_proto!("rollmesh.api.environment.v1");
}
mod health_pb {
    tonic::include_proto!("grpc.health.v1");
}

use std::error::Error;
use std::process::ExitCode;
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::signal::unix::{signal, SignalKind};
use tokio::sync::watch;
use tonic::transport::server::TcpIncoming;
use tonic::transport::Server;

const USAGE: &str = "usage: sort-letters [--listen HOST:PORT]\n  port 0: a free one";
/// How long calls have to end when the process is told to.
const DRAIN: Duration = Duration::from_secs(2);

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let options: Vec<String> = std::env::args().skip(1).collect();
    let listen = match options.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [] => "127.0.0.1:0",
        ["--listen", address] => address,
        _ => {
            eprintln!("{USAGE}");
            return ExitCode::from(2);
        }
    };
    match serve(listen).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{listen}: {error}");
            ExitCode::FAILURE
        }
    }
}

async fn serve(listen: &str) -> Result<(), Box<dyn Error + Send + Sync>> {
    let listener = TcpListener::bind(listen).await?;
    let address = listener.local_addr()?;
    let incoming = TcpIncoming::from_listener(listener, true, None)?;
    let mut terminated = signal(SignalKind::terminate())?;
    let mut interrupted = signal(SignalKind::interrupt())?;
    let (serves, serving) = watch::channel(true);
    let (told, mut draining) = watch::channel(false);
    let server = Server::builder()
        // Without pings a client that lost its power would keep its connection for ever.
        .http2_keepalive_interval(Some(Duration::from_secs(20)))
        .http2_keepalive_timeout(Some(Duration::from_secs(5)))
        .add_service(
            pb::environment_service_server::EnvironmentServiceServer::new(service::Letters::new()),
        )
        .add_service(health_pb::health_server::HealthServer::new(
            health::HealthService(serving),
        ))
        .serve_with_incoming_shutdown(incoming, async move {
            tokio::select! {
                _ = terminated.recv() => {}
                _ = interrupted.recv() => {}
            }
            serves.send_replace(false);
            drop(serves); // Ends the streams of those who watch.
            told.send_replace(true);
        });
    println!("listening on {address}");
    tokio::select! {
        ended = server => ended?,
        () = async {
            // It never fails: the sender is dropped only after it has sent.
            let _ = draining.wait_for(|told| *told).await;
            tokio::time::sleep(DRAIN).await;
        } => {}
    }
    Ok(())
}
