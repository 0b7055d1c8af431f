"""The Tinker wire, pure: what its bodies, ids and arrays are in terms of the mesh, and back."""
