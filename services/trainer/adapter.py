"""One adapter: its weights, optimizer state and pending gradients, and the ops that change them.

A deterministic state machine without threads: the same ops in the same order give the same bits.
An op either does all of its work or raises and leaves the adapter as it was (a step that cannot be
taken clears the gradients), and only an op that succeeded uses up its sequence.
"""

from __future__ import annotations

import hashlib
import logging
from dataclasses import fields, replace
from typing import TYPE_CHECKING, TypeVar, cast

from rollmesh.errors import (
    AlreadyExists,
    FailedPrecondition,
    InvalidRequest,
    NonFinite,
    NotFound,
    SequenceGap,
)
from rollmesh.telemetry import log_fields, record, span, timed
from rollmesh.types import (
    AdamConfig,
    Datum,
    ForwardBackwardResult,
    LoraConfig,
    LossConfig,
    OptimStepResult,
    PublishedVersion,
    TrainerAdapter,
)
from services.trainer.checks import check_adam, check_batch, check_tokens
from services.trainer.export import AdapterVersion, make_version
from services.trainer.optimizer import adam_step, fresh_state

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from rollmesh.types import FloatArray
    from services.trainer.model import Model

log = logging.getLogger(__name__)
Result = TypeVar("Result", ForwardBackwardResult, OptimStepResult)


class Adapter:
    """An adapter with the configuration `lora`, whose defaults are filled in.

    Attributes:
        view: what other threads read; an op replaces it as a whole when all else is done.
    """

    def __init__(
        self, name: str, lora: LoraConfig, model: Model, *, base_model: str, kept_versions: int
    ) -> None:
        self.view = TrainerAdapter(
            name, lora, policy_version=0, next_sequence=1, has_pending_gradients=False
        )
        self._model = model
        self._base_model = base_model
        self._kept_versions = kept_versions
        self._weights = model.lora.fresh(
            rank=lora.rank,
            alpha=cast("float", lora.alpha),
            target_modules=lora.target_modules,
            seed=lora.seed,
        )
        self._adam = fresh_state(self._weights.parameters())
        self._pending: list[Tensor] | None = None
        self._newest: tuple[bytes, ForwardBackwardResult | OptimStepResult] | None = None
        self._versions: dict[int, AdapterVersion] = {}

    def forward(self, data: Sequence[Datum]) -> tuple[FloatArray, ...]:
        """Per datum the log-probability of each target, float32 [T]."""
        model = self._model
        check_tokens(data, vocab_size=model.vocab_size, max_length=model.max_length)
        with timed("rollmesh.trainer.op", op="forward"):
            return model.forward(self._weights, data)

    def forward_backward(
        self, sequence: int, data: Sequence[Datum], config: LossConfig
    ) -> ForwardBackwardResult:
        """Add the gradients of the batch's loss to the pending ones.

        Raises:
            NonFinite: a loss or gradient; the pending gradients are as they were.
        """

        def compute() -> tuple[ForwardBackwardResult, TrainerAdapter]:
            model = self._model
            check_batch(data, config, vocab_size=model.vocab_size, max_length=model.max_length)
            with (
                span("trainer.forward_backward", adapter=self.view.name),
                timed("rollmesh.trainer.op", op="forward_backward"),
            ):
                found = model.forward_backward(self._weights, data, config)
            record("rollmesh.trainer.tokens", sum(len(datum.token_ids) for datum in data))
            self._pending = (
                found.gradients
                if self._pending is None
                else [a + b for a, b in zip(self._pending, found.gradients, strict=True)]
            )
            result = ForwardBackwardResult(found.logprobs, found.metrics)
            return result, replace(self.view, has_pending_gradients=True)

        return self._once(sequence, _digest("forward_backward", data, config), compute)

    def optim_step(self, sequence: int, config: AdamConfig) -> OptimStepResult:
        """One AdamW step with the pending gradients, which it clears.

        Raises:
            FailedPrecondition: none are pending.
            NonFinite: the gradients or the step's result; cleared, the weights as they were.
        """

        def compute() -> tuple[OptimStepResult, TrainerAdapter]:
            check_adam(config)
            name = self.view.name
            pending = self._pending
            if pending is None:
                raise FailedPrecondition(f"{name} has no pending gradients", resource=name)
            with (
                span("trainer.optim_step", adapter=name),
                timed("rollmesh.trainer.op", op="optim_step"),
            ):
                try:
                    step = adam_step(self._weights.parameters(), pending, self._adam, config)
                except NonFinite:
                    self._pending = None
                    self.view = replace(self.view, has_pending_gradients=False)
                    raise
            self._weights = self._weights.replaced(step.parameters)
            self._adam = step.state
            self._pending = None
            version = self.view.policy_version + 1
            metrics = {"grad_norm": step.grad_norm, "learning_rate": config.learning_rate}
            view = replace(self.view, policy_version=version, has_pending_gradients=False)
            return OptimStepResult(version, metrics), view

        return self._once(sequence, _digest("optim_step", (), config), compute)

    def publish(self) -> PublishedVersion:
        """Make the current weights an exportable version; the one that already is costs nothing.

        Raises:
            FailedPrecondition: gradients are pending.
        """
        name, number = self.view.name, self.view.policy_version
        if number not in self._versions:
            if self._pending is not None:
                raise FailedPrecondition(f"{name} has pending gradients", resource=name)
            with span("trainer.publish", adapter=name), timed("rollmesh.trainer.op", op="publish"):
                version = make_version(self.view, self._weights, self._base_model)
            versions = {**self._versions, number: version}
            self._versions = dict(list(versions.items())[-self._kept_versions :])
            with log_fields(adapter=name, policy_version=number, digest=version.digest):
                log.info("published")
        return PublishedVersion(number, self._versions[number].digest)

    def version(self, policy_version: int) -> AdapterVersion:
        """A published version.

        Raises:
            NotFound: it was never published here, or is no longer among the newest.
        """
        versions = self._versions
        if policy_version not in versions:
            raise NotFound(
                f"{self.view.name} has no published version {policy_version} here",
                resource=self.view.name,
                value=policy_version,
                allowed=", ".join(map(str, versions)),
            )
        return versions[policy_version]

    def _once(
        self,
        sequence: int,
        digest: bytes,
        compute: Callable[[], tuple[Result, TrainerAdapter]],
    ) -> Result:
        """The result of the op `sequence`, computed once however often it is asked for."""
        name, expected = self.view.name, self.view.next_sequence
        if sequence < 1:
            raise InvalidRequest(
                f"sequence: {sequence}, must be ≥ 1",
                field="sequence",
                value=sequence,
                allowed="≥ 1",
            )
        if self._newest is not None and sequence == expected - 1:
            newest, stored = self._newest
            if digest != newest:
                raise AlreadyExists(
                    f"sequence {sequence} of {name} was another op",
                    resource=name,
                    value=sequence,
                    expected_sequence=expected,
                )
            return cast("Result", stored)
        if sequence != expected:
            raise SequenceGap(
                f"sequence {sequence} of {name}, expected is {expected}",
                resource=name,
                value=sequence,
                expected_sequence=expected,
            )
        result, view = compute()
        self._newest = (digest, result)
        self.view = replace(view, next_sequence=expected + 1)
        return result


def _digest(op: str, data: Sequence[Datum], config: LossConfig | AdamConfig) -> bytes:
    """Of an op's body: equal exactly when a retry asks for the same."""
    sha = hashlib.sha256(f"{op} {config} {len(data)}".encode())
    for datum in data:
        for part in fields(Datum):
            values = getattr(datum, part.name)
            sha.update(b"-" if values is None else f"{len(values)}:".encode() + values.tobytes())
    return sha.digest()
