"""The services of the mesh: applications, never packaged, never imported by rollmesh."""
