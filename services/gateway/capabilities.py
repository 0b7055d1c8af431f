"""What the mesh serves."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rollmesh.errors import InvalidRequest, Unavailable

if TYPE_CHECKING:
    from collections.abc import Callable

    from rollmesh.types import Fleet
    from services.gateway.config import GatewayConfig
    from services.gateway.ports import Members

_KNOWN_S = 5.0


class Capabilities:
    """The fleet's base models, as they were up to 5 s ago. `clock`: seconds, monotonic."""

    def __init__(self, config: GatewayConfig, fleet: Members, clock: Callable[[], float]) -> None:
        self._config = config
        self._fleet = fleet
        self._clock = clock
        self._known: tuple[float, Fleet] | None = None

    async def tell(self) -> dict[str, Any]:
        """Of get_server_capabilities."""
        fleet = await self._now()
        lengths = {model.name: model.max_context_length for model in self._config.base_models}
        roles = {
            name: {m.role for m in fleet.members if m.base_model == name and m.serving}
            for name in _names(fleet)
        }
        return {
            "supported_models": [
                {
                    "model_name": name,
                    "max_context_length": lengths.get(name),
                    "trainable": "trainer" in served,
                    "sampleable": "sampler" in served,
                }
                for name, served in roles.items()
            ],
            "unembedding": self._config.unembedding,
            "stable_reinforce": self._config.stable_reinforce,
        }

    async def check_base_model(self, name: str) -> None:
        """Refuse a base model that no sampler has.

        Raises:
            InvalidRequest: none has it.
            Unavailable: one that may have it has not answered yet.
        """
        fleet = await self._now()
        samplers = [member for member in fleet.members if member.role == "sampler"]
        if any(member.base_model == name for member in samplers):
            return
        if any(not member.base_model for member in samplers):
            raise Unavailable(f"a sampler that may serve {name!r} is away", resource=name)
        allowed = ", ".join(sorted({member.base_model for member in samplers}))
        raise InvalidRequest(
            f"base_model: {name[:200]!r} is not sampled here; served are {allowed}",
            field="base_model",
            value=name[:200],
            allowed=allowed,
        )

    async def _now(self) -> Fleet:
        now = self._clock()
        if self._known is None or now - self._known[0] > _KNOWN_S:
            self._known = (now, await self._fleet.get())
        return self._known[1]


def _names(fleet: Fleet) -> list[str]:
    return sorted(
        {m.base_model for m in fleet.members if m.base_model and m.role in {"trainer", "sampler"}}
    )
