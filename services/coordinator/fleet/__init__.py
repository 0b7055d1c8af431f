"""Who is in the mesh, and whether they answer."""
