"""Who asks: a key, and the project that it lets in."""

from __future__ import annotations

from dataclasses import dataclass

from rollmesh.names import adapter_name, checkpoint_name


@dataclass(frozen=True, slots=True)
class Caller:
    """`project`, `key`: resource names. `note`: what the key's maker says it is for."""

    project: str
    key: str
    note: str = ""
    prefix: str = ""

    @property
    def project_id(self) -> str:
        """Id of the project."""
        return self.project.removeprefix("projects/")

    def future(self, future_id: str) -> str:
        """A future of the project."""
        return f"{self.project}/futures/{future_id}"

    def adapter(self, adapter_id: str) -> str:
        """An adapter of the project."""
        return adapter_name(self.project_id, adapter_id)

    def checkpoint(self, adapter_id: str, checkpoint_id: str) -> str:
        """A checkpoint of the project."""
        return checkpoint_name(self.adapter(adapter_id), checkpoint_id)
