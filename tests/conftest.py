"""What holds for every test."""

from __future__ import annotations

import os

from hypothesis import settings

# An example may take long on a busy machine; that says nothing about the code. The same examples
# each time, so that a change is to blame for what fails; FUZZ_EXAMPLES looks for new ones.
settings.register_profile("rollmesh", deadline=None, derandomize="FUZZ_EXAMPLES" not in os.environ)
settings.load_profile("rollmesh")
