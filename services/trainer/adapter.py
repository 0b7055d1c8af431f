"""One adapter: its state, and the ops that change it, one after the other.

A deterministic state machine: the same ops in the same order give the same bits. An op either does
all of its work or raises and leaves the adapter as it was, and only an op that succeeded uses up
its sequence. Its state is replaced as a whole, on the event loop; all computing is done elsewhere.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from dataclasses import fields, replace
from typing import TYPE_CHECKING, TypeVar, cast

import torch

from rollmesh.errors import (
    AlreadyExists,
    FailedPrecondition,
    Fenced,
    InvalidRequest,
    NonFinite,
    NotFound,
    Overloaded,
    SequenceGap,
)
from rollmesh.telemetry import log_fields, record, span, timed
from rollmesh.types import (
    AdamConfig,
    Datum,
    ForwardBackwardResult,
    LoadResult,
    LoadSnapshot,
    LoraConfig,
    LossConfig,
    OptimStepResult,
    PublishedVersion,
    TrainerAdapter,
)
from services.trainer.checks import (
    check_adam,
    check_batch,
    check_one_temperature,
    check_temperature,
    check_tokens,
)
from services.trainer.export import AdapterVersion, make_version
from services.trainer.optimizer import adam_step

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from torch import Tensor

    from rollmesh.types import ForwardResult, Snapshot, TrainingResult
    from services.trainer.engine import Engine
    from services.trainer.exports import Exports
    from services.trainer.model import Model
    from services.trainer.optimizer import AdamState, AdamStep
    from services.trainer.snapshots import Snapshots
    from services.trainer.state import State
    from services.trainer.uninterrupted import Uninterrupted

log = logging.getLogger(__name__)
T = TypeVar("T")
Result = TypeVar("Result", ForwardBackwardResult, OptimStepResult, LoadResult)


class Adapter:
    """An adapter with the configuration `lora`, whose defaults are filled in, held under `epoch`.

    An op whose caller goes away while it waits for its turn never runs; one that has begun goes to
    its end, so that a retry finds its result. At most `max_queued_ops` wait.
    """

    def __init__(
        self,
        name: str,
        lora: LoraConfig,
        state: State,
        *,
        epoch: int,
        model: Model,
        engine: Engine,
        snapshots: Snapshots,
        exports: Exports,
        uninterrupted: Uninterrupted,
        base_model: str,
        kept_versions: int,
        max_queued_ops: int,
    ) -> None:
        self.name = name
        self.lora = lora
        self.epoch = epoch
        self._state = state
        self._model = model
        self._engine = engine
        self._snapshots = snapshots
        self._exports = exports
        self._uninterrupted = uninterrupted
        self._base_model = base_model
        self._kept_versions = kept_versions
        self._max_queued_ops = max_queued_ops
        self._turn = asyncio.Lock()  # First come, first served.
        self._queued = 0
        self._newest: tuple[bytes, TrainingResult] | None = None
        self._versions: dict[int, AdapterVersion] = {}
        self._gone: type[NotFound | Fenced] | None = None

    @property
    def view(self) -> TrainerAdapter:
        """The adapter as its newest finished op left it."""
        state = self._state
        return TrainerAdapter(
            self.name,
            self.lora,
            policy_version=state.policy_version,
            next_sequence=state.next_sequence,
            has_pending_gradients=state.pending is not None,
            epoch=self.epoch,
        )

    def let_go(self, reason: type[NotFound | Fenced]) -> None:
        """It is no longer held: whatever waits or runs ends with `reason`."""
        self._gone = reason

    async def forward(
        self,
        data: Sequence[Datum],
        temperature: float | None = None,
        config: LossConfig | None = None,
    ) -> ForwardResult:
        """The log-probability of each target, after the ops before it, at `temperature` (None: 1).

        With a config, which has a temperature of its own, also the metrics of its loss.

        Raises:
            NonFinite: a log-probability or loss; the error names the datum.
        """
        asked_at = time.perf_counter()
        model = self._model
        if config is None:
            # Nothing else of it is read, or looked at.
            data = [Datum(datum.token_ids, datum.target_token_ids) for datum in data]
            check_temperature("temperature", temperature)
            check_tokens(data, vocab_size=model.vocab_size, max_length=model.max_length)
        else:
            check_one_temperature(temperature)
            check_batch(data, config, vocab_size=model.vocab_size, max_length=model.max_length)
        await self._acquire_turn()
        weights = self._state.weights
        self._turn.release()
        self._check_held()
        waited_s = time.perf_counter() - asked_at
        with timed("rollmesh.trainer.op", op="forward"):
            found = await self._engine.forward(self.name, weights, data, temperature, config)
        if config is None:
            return found
        return replace(
            found, metrics={**found.metrics, "queued_s": found.metrics["queued_s"] + waited_s}
        )

    async def forward_backward(
        self, epoch: int, sequence: int, data: Sequence[Datum], config: LossConfig
    ) -> ForwardBackwardResult:
        """Add the gradients of the batch's loss to the pending ones.

        Raises:
            NonFinite: a loss, a gradient, or the sum; the pending gradients are as they were.
        """
        asked_at = time.perf_counter()

        async def compute(state: State) -> tuple[ForwardBackwardResult, State]:
            model = self._model
            check_batch(data, config, vocab_size=model.vocab_size, max_length=model.max_length)
            waited_s = time.perf_counter() - asked_at
            with (
                span("trainer.forward_backward", adapter=self.name),
                timed("rollmesh.trainer.op", op="forward_backward"),
            ):
                found = await self._engine.forward_backward(self.name, state.weights, data, config)
                # Not in the engine, which may be full by now, and all of this be for nothing.
                pending = await asyncio.to_thread(_accumulated, state.pending, found.gradients)
            record("rollmesh.trainer.tokens", sum(len(datum.token_ids) for datum in data))
            metrics = {**found.metrics, "queued_s": found.metrics["queued_s"] + waited_s}
            result = ForwardBackwardResult(found.logprobs, metrics)
            return result, replace(state, pending=pending)

        digest = _digest("forward_backward", data, config)
        return await self._once(epoch, sequence, digest, compute)

    async def optim_step(self, epoch: int, sequence: int, config: AdamConfig) -> OptimStepResult:
        """One AdamW step with the pending gradients, which it clears.

        Raises:
            FailedPrecondition: none are pending.
            NonFinite: the gradients' norm or the step's result; all is as it was.
        """
        asked_at = time.perf_counter()

        async def compute(state: State) -> tuple[OptimStepResult, State]:
            check_adam(config)
            if state.pending is None:
                raise FailedPrecondition(
                    f"{self.name} has no pending gradients", resource=self.name
                )
            with (
                span("trainer.optim_step", adapter=self.name),
                timed("rollmesh.trainer.op", op="optim_step"),
            ):
                step, begun_at, ended_at = await self._engine.run(
                    _timed_step, state.weights.parameters(), state.pending, state.adam, config
                )
            version = state.policy_version + 1
            metrics = {
                "grad_norm": step.grad_norm,
                "learning_rate": config.learning_rate,
                "queued_s": begun_at - asked_at,
                "run_s": ended_at - begun_at,
            }
            weights = state.weights.replaced(step.parameters)
            return OptimStepResult(version, metrics), replace(
                state, weights=weights, adam=step.state, pending=None, policy_version=version
            )

        return await self._once(epoch, sequence, _digest("optim_step", (), config), compute)

    async def load_snapshot(
        self, epoch: int, sequence: int, snapshot: Snapshot, *, with_optimizer: bool
    ) -> LoadResult:
        """Replace the weights by a snapshot's, and the optimizer by the snapshot's or a new one.

        Raises:
            FailedPrecondition: gradients are pending; the snapshot is of another shape.
            Else as Snapshots.manifest and Snapshots.read.
        """

        async def compute(state: State) -> tuple[LoadResult, State]:
            if state.pending is not None:
                raise self._pending_gradients()
            with timed("rollmesh.trainer.op", op="load_snapshot"):
                manifest = await self._snapshots.manifest(snapshot)
                check_shape(snapshot, manifest.lora.lora(), self.lora)
                loaded = await self._snapshots.read_to_begin(
                    snapshot, manifest, with_optimizer=with_optimizer
                )
            version = state.policy_version + 1
            return LoadResult(version), replace(
                loaded, policy_version=version, next_sequence=state.next_sequence
            )

        body = _digest("load_snapshot", (), LoadSnapshot(snapshot, with_optimizer))
        return await self._once(epoch, sequence, body, compute)

    async def snapshot(self, epoch: int) -> Snapshot:
        """Write the adapter as its newest finished op left it; ops go on meanwhile.

        Raises:
            Unavailable: the blob store does not take it, or what was published before it.
        """
        self._check_epoch(epoch)

        def take() -> State:
            self._check_epoch(epoch)
            return self._state

        with (
            span("trainer.snapshot", adapter=self.name),
            timed("rollmesh.trainer.op", op="snapshot"),
        ):
            snapshot = await self._snapshots.write(self.name, self.lora, take)
            # A recovery that begins with it publishes nothing again of what was published before.
            await self._exports.written(self.name)
            return snapshot

    async def publish(
        self, epoch: int, *, with_pending_gradients: bool = False
    ) -> PublishedVersion:
        """Make the current weights an exportable version; the one that already is costs nothing.

        It is written to the blob store too, after this returns. It has no pending gradients in it.

        Raises:
            FailedPrecondition: gradients are pending, and are not said to be expected.
            Unavailable: the blob store is behind, or the trainer is going away.
        """

        async def work() -> PublishedVersion:
            self._check_epoch(epoch)
            number = self._state.policy_version
            if number not in self._versions:
                if self._state.pending is not None and not with_pending_gradients:
                    raise self._pending_gradients()
                with (
                    span("trainer.publish", adapter=self.name),
                    timed("rollmesh.trainer.op", op="publish"),
                ):
                    version = await self._engine.run(
                        make_version, self.view, self._state.weights, self._base_model
                    )
                    self._check_held()
                    version = replace(version, export_key=await self._exports.write(version))
                self._check_held()
                versions = {**self._versions, number: version}
                self._versions = dict(list(versions.items())[-self._kept_versions :])
                with log_fields(adapter=self.name, policy_version=number, digest=version.digest):
                    log.info("published")
            version = self._versions[number]
            return PublishedVersion(number, version.digest, version.export_key)

        return await self._in_turn(work)

    def version(self, policy_version: int) -> AdapterVersion:
        """A published version.

        Raises:
            NotFound: it was never published here, or is no longer among the newest.
        """
        versions = self._versions
        if policy_version not in versions:
            raise NotFound(
                f"{self.name} has no published version {policy_version} here",
                resource=self.name,
                value=policy_version,
                allowed=", ".join(map(str, versions)),
            )
        return versions[policy_version]

    async def _once(
        self,
        epoch: int,
        sequence: int,
        digest: bytes,
        compute: Callable[[State], Awaitable[tuple[Result, State]]],
    ) -> Result:
        """The result of the op `sequence`, computed once however often it is asked for."""

        async def work() -> Result:
            self._check_epoch(epoch)
            state = self._state
            stored = self._stored(sequence, digest)
            if stored is not None:
                return cast("Result", stored)
            result, changed = await compute(state)
            self._check_held()
            self._newest = (digest, result)
            self._state = replace(changed, next_sequence=state.next_sequence + 1)
            return result

        return await self._in_turn(work)

    def _stored(self, sequence: int, digest: bytes) -> TrainingResult | None:
        """The result if `sequence` was the newest op; None if it is the next."""
        expected = self._state.next_sequence
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
                    f"sequence {sequence} of {self.name} was another op",
                    resource=self.name,
                    field="sequence",
                    value=sequence,
                    allowed=expected,
                    expected_sequence=expected,
                )
            return stored
        if sequence != expected:
            raise SequenceGap(
                f"sequence {sequence} of {self.name}, expected is {expected}",
                resource=self.name,
                field="sequence",
                value=sequence,
                allowed=expected,
                expected_sequence=expected,
            )
        return None

    async def _in_turn(self, work: Callable[[], Awaitable[T]]) -> T:
        """What `work` returns when the ops before it have ended."""
        await self._acquire_turn()

        async def then_release() -> T:
            try:
                return await work()
            finally:
                self._turn.release()

        return await self._uninterrupted.run(then_release())

    async def _acquire_turn(self) -> None:
        if self._queued >= self._max_queued_ops:
            raise Overloaded(
                f"{self._queued} ops of {self.name} wait, max_queued_ops is {self._max_queued_ops}",
                resource="queued ops",
                value=self._queued,
                allowed=self._max_queued_ops,
            )
        self._queued += 1
        try:
            await self._turn.acquire()
        finally:
            self._queued -= 1

    def _check_epoch(self, epoch: int) -> None:
        self._check_held()
        if epoch != self.epoch:
            raise fenced(self.name, epoch, held=self.epoch)

    def _check_held(self) -> None:
        if self._gone is not None:
            raise self._gone(f"{self.name} was taken from this trainer", resource=self.name)

    def _pending_gradients(self) -> FailedPrecondition:
        return FailedPrecondition(f"{self.name} has pending gradients", resource=self.name)


def fenced(name: str, epoch: int, *, held: int) -> Fenced:
    """The error for a call under another epoch than the one that is held."""
    return Fenced(
        f"{name} is held under epoch {held}, not {epoch}",
        resource=name,
        field="epoch",
        value=epoch,
        allowed=held,
    )


def check_shape(snapshot: Snapshot, found: LoraConfig, wanted: LoraConfig) -> None:
    """Refuse a snapshot of another rank, alpha or target modules; the seed may differ."""
    for field in ("rank", "alpha", "target_modules"):
        is_there, must_be = getattr(found, field), getattr(wanted, field)
        if is_there != must_be:
            raise FailedPrecondition(
                f"{snapshot.key} has the {field} {is_there}, wanted is {must_be}",
                resource=snapshot.key,
                field=f"lora.{field}",
                value=is_there,
                allowed=must_be,
            )


def _timed_step(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    state: AdamState,
    config: AdamConfig,
) -> tuple[AdamStep, float, float]:
    """The step, and when it began and ended, in seconds of time.perf_counter."""
    begun_at = time.perf_counter()
    step = adam_step(parameters, gradients, state, config)
    return step, begun_at, time.perf_counter()


def _accumulated(
    pending: Sequence[Tensor] | None, gradients: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """The sums, contiguous: the order in which a norm adds up depends on the strides."""
    if pending is not None:
        gradients = [a + b for a, b in zip(pending, gradients, strict=True)]
        if not all(bool(torch.isfinite(gradient).all()) for gradient in gradients):
            raise NonFinite(
                "data: their gradients are finite, but not their sum with the pending ones, which "
                "are as they were",
                field="data",
            )
    return tuple(gradient.contiguous() for gradient in gradients)


def _digest(
    op: str, data: Sequence[Datum], config: LossConfig | AdamConfig | LoadSnapshot
) -> bytes:
    """Of an op's body: equal exactly when a retry asks for the same."""
    sha = hashlib.sha256(f"{op} {config} {len(data)}".encode())
    for datum in data:
        for part in fields(Datum):
            values = getattr(datum, part.name)
            sha.update(b"-" if values is None else f"{len(values)}:".encode() + values.tobytes())
    return sha.digest()
