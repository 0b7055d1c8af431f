"""HTTP: bodies in, answers out, and which path is which core's."""
