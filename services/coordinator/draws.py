"""Completions of one job's prompts, each token of which says that the policy asked for drew it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rollmesh.errors import InvalidRequest
from rollmesh.names import parse_job
from rollmesh.types import SamplingParams
from services.coordinator.identity import check_identity

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rollmesh import types
    from rollmesh.job import JobSpec
    from services.coordinator.newest import Newest
    from services.coordinator.ports import Sampling
    from services.coordinator.retry import Outage
    from services.coordinator.versions import Versions


class Draws:
    """Draws for one job; waits while its samplers are away."""

    def __init__(
        self, spec: JobSpec, job: str, *, sampling: Sampling, outage: Outage, versions: Versions
    ) -> None:
        self._spec = spec
        self._job = job
        self._project, _ = parse_job(job)
        self._sampling = sampling
        self._outage = outage
        self._versions = versions

    @property
    def newest(self) -> Newest | None:
        """What completions for training follow; None: they end on what they began with."""
        return self._versions.newest

    @property
    def context_length(self) -> int | None:
        """Tokens of prompt and completion together that every sampler takes; None: not known."""
        return self._sampling.context_length(self._spec.base_model)

    def training_params(self, seed: int) -> types.SamplingParams:
        """How completions are drawn to be trained on."""
        sampling = self._spec.sampling
        return SamplingParams(
            max_tokens=sampling.max_tokens,
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
            stop=tuple(sampling.stop),
            seed=seed,
            logprobs_kind=sampling.logprobs_kind,
        )

    def greedy_params(self) -> types.SamplingParams:
        """How they are drawn to be evaluated."""
        sampling = self._spec.sampling
        return SamplingParams(
            max_tokens=sampling.max_tokens, temperature=0.0, stop=tuple(sampling.stop)
        )

    async def completions(
        self,
        task_id: str,
        source: types.AdapterSource,
        prompt: Sequence[int],
        num_completions: int,
        params: types.SamplingParams,
        newest: Newest | None = None,
    ) -> Sequence[types.Completion]:
        """Completions of `prompt`, every token of which `source` produced.

        Where they follow `newest` it may have been a later version too.

        Raises:
            InvalidRequest: the sampler refuses the prompt of this task.
            InternalError: another policy was sampled.
        """
        try:
            async with self._outage.noticed() as lost:
                completions = await self._sampling.sample(
                    self._project,
                    self._spec.base_model,
                    source,
                    prompt,
                    num_completions,
                    params,
                    lost=lost,
                    newest=newest,
                    job=self._job,
                    priority=self._spec.priority,
                )
        except InvalidRequest as error:
            raise InvalidRequest(
                f"task {task_id!r}, whose prompt has {len(prompt)} tokens: {error}",
                **error.context,
            ) from error
        possible = {source.policy_version: source.digest}
        if newest is not None:
            possible |= self._versions.since(source)
        check_identity(completions, source, num_completions, possible)
        return completions
