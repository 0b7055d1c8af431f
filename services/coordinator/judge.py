"""What judges say that reward functions ask: policies of the fleet, under the job's own quota."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from rollmesh import types
from rollmesh.chat_template import template_messages
from rollmesh.errors import InvalidRequest, NotFound
from rollmesh.names import parse_adapter, parse_job
from services.coordinator.rollouts import derived_seed

if TYPE_CHECKING:
    from collections.abc import Callable

    from rollmesh.chat import Question
    from rollmesh.job import JobSpec
    from services.coordinator.ports import Sampling, Tokenizer, Training
    from services.coordinator.retry import Outage, Patience


class Judge:
    """Answers the questions of one job's reward function.

    Args:
        spec: of the job.
        job: its resource name.
        training: knows the adapters that judge.
        sampling: draws what they say.
        outage: of the samplers; patience: with the trainer of an adapter.
        load_tokenizer: reads that of a base model; may block.
    """

    def __init__(
        self,
        spec: JobSpec,
        job: str,
        *,
        training: Training,
        sampling: Sampling,
        outage: Outage,
        patience: Patience,
        load_tokenizer: Callable[[str], Tokenizer],
    ) -> None:
        self._spec = spec
        self._job = job
        self._project, _ = parse_job(job)
        self._training = training
        self._sampling = sampling
        self._outage = outage
        self._patience = patience
        self._load_tokenizer = load_tokenizer

    async def answer(self, question: Question) -> str:
        """What the judge says, without special tokens.

        Raises:
            NotFound: the adapter or the version is not the project's.
            InvalidRequest: the question makes no prompt, or one that the samplers refuse.
        """
        policy = policy_of(question, self._project, self._spec.base_model)
        base_model, source = await self._patience.call(lambda: self._training.resolve(policy))
        tokenizer = await asyncio.to_thread(self._load_tokenizer, base_model)
        prompt = tokenizer.render(template_messages(question.messages))
        params = types.SamplingParams(
            max_tokens=question.max_tokens,
            temperature=question.temperature,
            seed=derived_seed(self._spec.seed, "judge", question.number, *prompt),
        )
        try:
            async with self._outage.noticed() as lost:
                (completion,) = await self._sampling.sample(
                    self._project,
                    base_model,
                    source,
                    prompt,
                    1,
                    params,
                    lost=lost,
                    job=self._job,
                    priority=self._spec.priority,
                )
        except InvalidRequest as error:
            raise InvalidRequest(
                f"a judge's prompt of {len(prompt)} tokens: {error}", **error.context
            ) from error
        return tokenizer.decode(completion.token_ids)


def policy_of(question: Question, project: str, base_model: str) -> types.PolicyRef:
    """Who is asked, by a job of `project` on `base_model`.

    Raises:
        NotFound: an adapter of another project: nobody may know whether it is there.
    """
    if question.adapter:
        owner, _ = parse_adapter(question.adapter, field="reward.parameters.adapter")
        if owner != project:
            raise NotFound(
                f"reward.parameters.adapter: there is no {question.adapter}",
                resource=question.adapter,
            )
        return types.PolicyRef(adapter=question.adapter, policy_version=question.policy_version)
    return types.PolicyRef(base_model=question.base_model or base_model)
