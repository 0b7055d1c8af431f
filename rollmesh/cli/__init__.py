"""The command line: `rollmesh`, another client of the mesh."""
