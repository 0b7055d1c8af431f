"""What one sampler draws of a request: of one version of the policy after the other."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rollmesh.errors import Unavailable
from services.coordinator.moving import until_newer, until_preempted
from services.coordinator.placement import Preempted

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable

    from rollmesh import types
    from rollmesh.job import Priority
    from services.coordinator.drawing import Drawing
    from services.coordinator.endurance import Endurance
    from services.coordinator.moving import Place
    from services.coordinator.newest import Newest
    from services.coordinator.placement import Placement
    from services.coordinator.scheduler import Request

BORDER_S = 1.0
"""How long to wait for the end of a chunk before a completion moves to a newer version, or gives up
its place."""


@dataclass(frozen=True, slots=True)
class Asked:
    """Whose tokens a request wants, and of what. `told` hears its subject in the scheduler."""

    project: str
    base_model: str
    fixed: types.AdapterSource | None
    newest: Newest | None
    job: str = ""
    priority: Priority = "normal"
    told: Callable[[str], None] | None = None

    @property
    def source(self) -> types.AdapterSource | None:
        """The version to draw from now."""
        return self.newest.source if self.newest else self.fixed


class Attempts:
    """Calls of samplers, each in its place.

    `locate`: the same version, at the trainer that has its adapter by now.
    """

    def __init__(
        self, placement: Placement, locate: Callable[[types.AdapterSource], types.AdapterSource]
    ) -> None:
        self._placement = placement
        self._locate = locate

    async def attempt(
        self,
        request: Request,
        asked: Asked,
        drawing: Drawing,
        part: range,
        endurance: Endurance,
    ) -> AsyncGenerator[types.CompletionChunk]:
        """The new chunks of `part`, from the sampler whose turn it is to draw for `request`.

        Raises:
            Unavailable: also when the sampler ended before all had come.
            Preempted: its place is wanted for another.
            Refused, Untrue: as Placement and Drawing say.
        """
        border_s = BORDER_S
        async with self._placement.place_for(request, endurance) as place:
            drawing.address = place.sampler.address
            while unfinished := drawing.unfinished(part):
                source = asked.source
                stream = self._stream(place, asked, source, drawing, part, border_s)
                # Where versions come faster than a first chunk, one of them has to be waited for.
                border_s *= 2
                async with contextlib.aclosing(stream) as chunks:
                    async for chunk in chunks:
                        border_s = BORDER_S
                        drawing.take(chunk, part, source)
                        self._placement.progress(
                            request,
                            num_tokens=len(chunk.token_ids),
                            ended=chunk.stop_reason is not None,
                        )
                        yield chunk
                left = drawing.unfinished(part)
                if left and place.preempted:
                    raise Preempted
                if left and asked.source is source:
                    raise Unavailable(
                        f"the sampler at {drawing.address} ended its stream with {len(left)} of "
                        f"{len(unfinished)} completions unfinished"
                    )

    async def _stream(
        self,
        place: Place,
        asked: Asked,
        source: types.AdapterSource | None,
        drawing: Drawing,
        part: range,
        border_s: float,
    ) -> AsyncGenerator[types.CompletionChunk]:
        """One call of the sampler, up to its end or to where it is to stop."""
        stream = place.sampler.port.sample(
            source and self._locate(source),
            drawing.prompt_token_ids,
            drawing.num_completions,
            drawing.params,
            project=asked.project,
            continuations=drawing.continuations(part),
        )
        async with place.closing(stream):
            chunks = until_preempted(stream, place, patience_s=BORDER_S)
            async with contextlib.aclosing(chunks):
                moving = chunks
                if asked.newest and source:
                    moving = until_newer(chunks, asked.newest, source, patience_s=border_s)
                async with contextlib.aclosing(moving):
                    async for chunk in moving:
                        yield chunk
