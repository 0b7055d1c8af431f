//! Makes the stubs from the repository's protos.

fn main() -> std::io::Result<()> {
    tonic_build::configure().build_client(false).compile_protos(
        &[
            "../../../protos/rollmesh/api/environment/v1/environment_service.proto",
            "../protos/grpc/health/v1/health.proto",
        ],
        &["../../../protos", "../protos"],
    )
}
