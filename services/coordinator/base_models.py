"""Which base models the mesh knows."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rollmesh.errors import Unavailable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rollmesh.errors import MeshError
    from services.coordinator.fleet.membership import Fleet


class BaseModels:
    """The base models that members serve or once said to serve, and those the operator names."""

    def __init__(self, fleet: Fleet, configured: Sequence[str]) -> None:
        self._fleet = fleet
        self._configured = configured

    def check(self, base_model: str, *, field: str, refusal: type[MeshError]) -> None:
        """Raise `refusal` where nobody serves `base_model`.

        Raises:
            Unavailable: that cannot be said yet, as not every member was heard of.
        """
        served = sorted({*self._configured, *self._fleet.base_models()})
        if base_model in served:
            return
        silent = [
            member.address
            for member in self._fleet.snapshot(0).members
            if member.role in {"trainer", "sampler"} and not member.base_model
        ]
        known = ", ".join(served) or "none"
        if silent:
            raise Unavailable(
                f"{field}: nobody who has answered serves {base_model!r} (served are: {known}), "
                f"but nothing was heard yet of {', '.join(silent)}",
                field=field,
                value=base_model,
            )
        raise refusal(
            f"{field}: nobody serves {base_model!r}; served are: {known}",
            field=field,
            value=base_model,
            allowed=known,
        )
