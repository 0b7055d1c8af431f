"""Sampling from a policy that its caller names: the core of SamplingService."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from rollmesh.errors import InvalidRequest, NotFound
from rollmesh.names import parse_adapter, parse_project
from services.coordinator.projects import check_priority

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Sequence

    from rollmesh import types
    from services.coordinator.newest import Publications
    from services.coordinator.ports import Sampling, Training
    from services.coordinator.scheduler import Projects


MAX_COMPLETIONS = 1024


class Policies:
    """Resolves a policy once per call, then asks the fleet."""

    def __init__(
        self,
        training: Training,
        sampling: Sampling,
        publications: Publications,
        projects: Projects,
    ) -> None:
        self._training = training
        self._projects = projects
        self._sampling = sampling
        self._publications = publications

    async def sample(
        self,
        parent: str,
        policy: types.PolicyRef,
        prompt_token_ids: Sequence[int],
        num_completions: int,
        params: types.SamplingParams,
        *,
        continue_on_newest: bool = False,
        priority: str = "",
        told: Callable[[str], None] | None = None,
    ) -> AsyncGenerator[types.CompletionChunk]:
        """Chunks as they come, of one version, or of each newer one that is published meanwhile.

        `priority`: "" is normal. `told` hears under which subject the scheduler has it.

        Raises:
            InvalidRequest: the number of completions; the priority; a version, or no adapter, with
                `continue_on_newest`; what the sampler says of the rest.
            NotFound: no such policy in the project `parent`.
        """
        if not 0 <= num_completions <= MAX_COMPLETIONS:
            raise InvalidRequest(
                f"num_completions: {num_completions} is not in [1, {MAX_COMPLETIONS}]",
                field="num_completions",
                value=num_completions,
                allowed=f"1 to {MAX_COMPLETIONS}",
            )
        if continue_on_newest and policy.policy_version is not None:
            raise InvalidRequest(
                f"policy.policy_version: {policy.policy_version} is not the newest for ever, which "
                "continue_on_newest is to move to",
                field="policy.policy_version",
                value=policy.policy_version,
                allowed="none with continue_on_newest",
            )
        if continue_on_newest and not policy.adapter:
            raise InvalidRequest(
                "continue_on_newest: a base model has no newer version to move to",
                field="continue_on_newest",
                value=True,
                allowed="false without policy.adapter",
            )
        project = parse_project(parent, field="project")
        checked = check_priority(self._projects.of(project), priority)
        newest = self._publications.follow(policy.adapter) if continue_on_newest else None
        project, base_model, source = await self._resolve(parent, policy)
        if newest and source:
            newest.announce(source)
        chunks = self._sampling.stream(
            project,
            base_model,
            source,
            prompt_token_ids,
            num_completions or 1,
            params,
            newest=newest,
            priority=checked,
            told=told,
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
        priority = check_priority(self._projects.of(project), "")
        return await self._sampling.compute_logprobs(
            project, base_model, source, token_ids, priority=priority
        )

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
