"""What holds for every test."""

from __future__ import annotations

from hypothesis import settings

# An example may take long on a busy machine; that says nothing about the code.
settings.register_profile("rollmesh", deadline=None)
settings.load_profile("rollmesh")
