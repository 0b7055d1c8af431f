"""Which models there are for a project: base models, its adapters' versions, Tinker's paths."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rollmesh.errors import NotFound, Unavailable
from rollmesh.names import parse_adapter, parse_project
from rollmesh.types import PolicyRef

if TYPE_CHECKING:
    from rollmesh.client import AdapterClient, FleetClient
    from rollmesh.types import Adapter
    from services.gateway.openai.ports import CheckpointPolicy

_ADAPTER = re.compile(r"(projects/[^/]+/adapters/[^/]+)(?:/versions/([0-9]{1,18}))?")
_TINKER = "tinker://"


@dataclass(frozen=True)
class Found:
    """What a model's id means. `id`: the same with a version, where it named the newest.

    `created`: Unix seconds; 0 where nobody says.
    """

    id: str
    base_model: str
    policy: PolicyRef
    owned_by: str
    created: int = 0

    def to_json(self) -> dict[str, Any]:
        """A model object; what is not OpenAI's says which policy it is."""
        adapter = self.policy.adapter
        return {
            "id": self.id,
            "object": "model",
            "created": self.created,
            "owned_by": self.owned_by,
            "parent": self.base_model if adapter else None,
            "policy_version": self.policy.policy_version,
        }


class Models:
    """The models of every project; it keeps nothing.

    Args:
        policy_of: what Tinker's paths mean.
        max_listed: models that a list has at most.
    """

    def __init__(
        self,
        fleet: FleetClient,
        adapters: AdapterClient,
        policy_of: CheckpointPolicy,
        *,
        max_listed: int,
    ) -> None:
        self._fleet = fleet
        self._adapters = adapters
        self._policy_of = policy_of
        self._max_listed = max_listed

    async def listed(self, project: str) -> list[dict[str, Any]]:
        """The base models that samplers serve, then the project's adapters that are published."""
        served, _ = await self._served()
        models = [_base_model(name).to_json() for name in served]
        async for adapter in self._adapters.list(project):
            if len(models) >= self._max_listed:
                break
            if adapter.published_version is not None:
                models.append({**_newest(adapter, project).to_json(), "id": adapter.name})
        return models

    async def find(self, project: str, model: str) -> Found:
        """What `model` means for `project`, now.

        Raises:
            NotFound: nothing. Of what is another project's it is not said that it exists.
            Unavailable: that cannot be said yet.
        """
        if model.startswith(_TINKER):
            base_model, policy = await self._policy_of(project, model)
            return Found(model, base_model, policy, project)
        match = _ADAPTER.fullmatch(model)
        if match:
            return await self._of_adapter(project, match[1], match[2])
        served, all_heard = await self._served()
        if model in served:
            return _base_model(model)
        if not all_heard:
            raise Unavailable(f"{model!r} is not served by any sampler that was heard of yet")
        raise _unknown(model)

    async def _of_adapter(self, project: str, name: str, version: str | None) -> Found:
        owner, _ = parse_adapter(name, field="model")
        if owner != parse_project(project):
            raise _unknown(name)
        adapter = await self._adapters.get(name)
        if adapter.published_version is None:
            raise NotFound(f"model: no version of {name} is published", field="model", value=name)
        if version is None:
            return _newest(adapter, project)
        return _version(adapter, int(version), project)

    async def _served(self) -> tuple[list[str], bool]:
        """By samplers, and whether all of them have said what they serve."""
        members = (await self._fleet.get()).members
        names = [member.base_model for member in members if member.role == "sampler"]
        return sorted({name for name in names if name}), all(names)


def _base_model(name: str) -> Found:
    return Found(name, name, PolicyRef(base_model=name), "rollmesh")


def _newest(adapter: Adapter, project: str) -> Found:
    assert adapter.published_version is not None  # noqa: S101 - our callers have looked
    return _version(adapter, adapter.published_version, project)


def _version(adapter: Adapter, version: int, project: str) -> Found:
    """Whether that version is kept the coordinator says when it is sampled."""
    return Found(
        f"{adapter.name}/versions/{version}",
        adapter.base_model,
        PolicyRef(adapter=adapter.name, policy_version=version),
        project,
        int(adapter.create_time),
    )


def _unknown(model: str) -> NotFound:
    return NotFound(
        f"model: {model!r} does not exist for this key; GET /v1/models lists what does",
        field="model",
        value=model,
    )
