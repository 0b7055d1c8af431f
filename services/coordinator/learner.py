"""The training side of one job: its ops in their sequence, and its versions on the samplers.

Step s (from 0) takes policy_version s to s + 1 with sequences 2s + 1 (ForwardBackward) and 2s + 2
(OptimStep). A job that was interrupted is found by these numbers, wherever it was.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, TypeVar

from rollmesh import types
from rollmesh.errors import (
    CapacityExhausted,
    FailedPrecondition,
    InternalError,
    NotFound,
    SequenceGap,
)
from services.coordinator.learning_rate import learning_rate

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, Sequence

    from rollmesh.job import JobSpec
    from rollmesh.types import FloatArray
    from services.coordinator.metrics import Phases
    from services.coordinator.ports import JobContext, Sampling, Training
    from services.coordinator.retry import Patience
    from services.coordinator.versions import Versions

Result = TypeVar("Result")
Progress = Literal["clean", "gradients_pending", "stepped"]


def loss_of(spec: JobSpec) -> types.LossConfig:
    """What the job's ForwardBackward minimises."""
    algorithm, sampling = spec.algorithm, spec.sampling
    kl_coefficient = algorithm.kl_coefficient or None
    if spec.sft is not None:
        return types.LossConfig("cross_entropy", kl_coefficient=kl_coefficient)
    return types.LossConfig(
        algorithm.loss,
        kl_coefficient=kl_coefficient,
        clip_low_threshold=algorithm.clip_low_threshold,
        clip_high_threshold=algorithm.clip_high_threshold,
        max_importance_ratio=algorithm.max_importance_ratio,
        # That of what the samplers' log-probabilities are of.
        temperature=sampling.temperature if sampling.logprobs_kind == "sampled" else None,
    )


class Learner:
    """Trains and publishes one job's adapter. Every method waits while the trainer is away."""

    def __init__(
        self,
        context: JobContext,
        *,
        training: Training,
        sampling: Sampling,
        patience: Patience,
        versions: Versions,
    ) -> None:
        self._job = context.name
        self._adapter = context.adapter
        self._spec = context.spec
        self._training = training
        self._sampling = sampling
        self._patience = patience
        self._versions = versions
        self._loss = loss_of(context.spec)

    async def progress(self, step: int) -> Progress:
        """What was trained of step `step`, the first one that is not recorded as finished.

        Raises:
            FailedPrecondition: the adapter is neither before, in nor after that step.
        """
        try:
            adapter = await self._patience.call(lambda: self._training.get_adapter(self._adapter))
        except NotFound as error:
            raise self._gone(error) from error
        match adapter.policy_version - step, adapter.next_sequence - 2 * step:
            case 0, 1:
                return "clean"
            case 0, 2:
                return "gradients_pending"
            case 1, 3:
                return "stepped"
        raise FailedPrecondition(
            f"{self._adapter} is not where the job left it: after {step} steps it should be at "
            f"version {step} with next sequence {2 * step + 1}, and is at version "
            f"{adapter.policy_version} with next sequence {adapter.next_sequence}",
            resource=self._adapter,
        )

    async def forward(self, step: int, data: Sequence[types.Datum]) -> tuple[FloatArray, ...]:
        """Per datum the targets' log-probabilities before step `step`, of the job's kind.

        Raises:
            CapacityExhausted: the batch is too large for one message, or for the trainer.
        """
        result = await self._on_batch(
            step,
            data,
            lambda: self._training.forward(self._adapter, data, temperature=self._loss.temperature),
        )
        return result.logprobs

    async def forward_backward(
        self, step: int, data: Sequence[types.Datum]
    ) -> types.ForwardBackwardResult:
        """The gradients of step `step`.

        Raises:
            CapacityExhausted: the batch is too large for one message, or for the trainer.
        """
        return await self._on_batch(
            step,
            data,
            lambda: self._training.forward_backward(
                self._adapter, 2 * step + 1, data, self._loss, job=self._job
            ),
        )

    async def _on_batch(
        self, step: int, data: Sequence[types.Datum], attempt: Callable[[], Awaitable[Result]]
    ) -> Result:
        try:
            return await self._op(attempt)
        except CapacityExhausted as error:
            raise CapacityExhausted(
                f"step {step + 1}: its {len(data)} rollouts are too much for one call of the "
                f"trainer ({error}); algorithm.groups_per_step, algorithm.group_size or "
                "sampling.max_tokens must be smaller",
                **error.context,
            ) from error

    async def optim_step(self, step: int) -> Mapping[str, float]:
        """The optimizer's part of step `step`; its metrics."""
        algorithm = self._spec.algorithm
        adam = types.AdamConfig(
            learning_rate=learning_rate(
                algorithm.learning_rate, step, max_steps=self._spec.stop.max_steps
            ),
            beta1=algorithm.beta1,
            beta2=algorithm.beta2,
            epsilon=algorithm.epsilon,
            weight_decay=algorithm.weight_decay,
            max_grad_norm=algorithm.max_grad_norm,
        )
        result = await self._op(
            lambda: self._training.optim_step(self._adapter, 2 * step + 2, adam, job=self._job)
        )
        return {**result.metrics, "learning_rate": adam.learning_rate}

    async def go_live(self, version: int, phases: Phases) -> types.AdapterSource:
        """Publish the current weights, `version`, and load them on samplers if any are needed."""
        with phases.phase("publish"):
            published = await self._op(lambda: self._training.publish_adapter(self._adapter))
            if published.policy_version != version:
                raise InternalError(
                    f"version {version} of {self._adapter} was to be published, the trainer "
                    f"published {published.policy_version}",
                    resource=self._adapter,
                )
            policy = types.PolicyRef(adapter=self._adapter, policy_version=version)
            base_model, source = await self._op(lambda: self._training.resolve(policy))
            assert source is not None  # noqa: S101 - the reference names an adapter
        if self._spec.needs_sampler:
            with phases.phase("load"):
                await self._sampling.load(base_model, source)
        self._versions.went_live(source)
        return source

    async def retire(self, *, newest: int) -> None:
        """Unload the versions before `newest` that nobody needs."""
        for version in self._versions.let_go(newest=newest):
            await self._sampling.unload(self._spec.base_model, self._adapter, version)

    async def _op(self, attempt: Callable[[], Awaitable[Result]]) -> Result:
        try:
            return await self._patience.call(attempt)
        except (NotFound, SequenceGap) as error:
            raise self._gone(error) from error

    def _gone(self, error: Exception) -> FailedPrecondition:
        return FailedPrecondition(
            f"{self._adapter} is not where the job left it: {error}", resource=self._adapter
        )
