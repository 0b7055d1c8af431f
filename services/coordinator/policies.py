"""Sampling from a policy that its caller names: the core of SamplingService."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from rollmesh.errors import InvalidRequest, NotFound
from rollmesh.names import parse_adapter, parse_project

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Sequence

    from rollmesh import types
    from services.coordinator.ports import Sampling, Training


MAX_COMPLETIONS = 1024


class Policies:
    """Resolves a policy once per call, then asks the fleet."""

    def __init__(self, training: Training, sampling: Sampling) -> None:
        self._training = training
        self._sampling = sampling

    async def sample(
        self,
        parent: str,
        policy: types.PolicyRef,
        prompt_token_ids: Sequence[int],
        num_completions: int,
        params: types.SamplingParams,
    ) -> AsyncGenerator[types.CompletionChunk]:
        """Chunks as they come, all of one version.

        Raises:
            InvalidRequest: the number of completions; what the sampler says of the rest.
            NotFound: no such policy in the project `parent`.
        """
        if not 0 <= num_completions <= MAX_COMPLETIONS:
            raise InvalidRequest(
                f"num_completions: {num_completions} is not in [1, {MAX_COMPLETIONS}]",
                field="num_completions",
                value=num_completions,
                allowed=f"1 to {MAX_COMPLETIONS}",
            )
        project, base_model, source = await self._resolve(parent, policy)
        chunks = self._sampling.stream(
            project, base_model, source, prompt_token_ids, num_completions or 1, params
        )
        # A caller that leaves in the middle must give its place up then, not at garbage collection.
        async with contextlib.aclosing(chunks):
            async for chunk in chunks:
                yield chunk

    async def compute_logprobs(
        self, parent: str, policy: types.PolicyRef, token_ids: Sequence[int]
    ) -> types.Logprobs:
        """Log-probability of each token given those before it; the first is NaN."""
        project, base_model, source = await self._resolve(parent, policy)
        return await self._sampling.compute_logprobs(project, base_model, source, token_ids)

    async def _resolve(
        self, parent: str, policy: types.PolicyRef
    ) -> tuple[str, str, types.AdapterSource | None]:
        project = parse_project(parent, field="project")
        if policy.adapter:
            owner, _ = parse_adapter(policy.adapter, field="policy.adapter")
            if owner != project:
                # The same answer whether it exists or not: projects cannot see each other.
                raise NotFound(f"there is no {policy.adapter}", resource=policy.adapter)
        return project, *(await self._training.resolve(policy))
