"""What every gRPC server and channel of the mesh has in common."""
