"""A trainer, a sampler and a reward service in memory, as services/coordinator/ports.py has them.

The trainer keeps the order of ops and its versions, the sampler says whose tokens it draws. Any of
them can be sent away (`away`), which is what a process that died looks like.
"""

from __future__ import annotations

import asyncio
import hashlib
import secrets
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from rollmesh import chat, types
from rollmesh.convert.journal import op_to_bytes
from rollmesh.errors import (
    AlreadyExists,
    CapacityExhausted,
    FailedPrecondition,
    Fenced,
    InvalidRequest,
    MeshError,
    NotFound,
    SequenceGap,
    Unavailable,
)
from tests.fakes.worlds import FakeEnvironments

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping, Sequence

BASE_MODEL = "arith"


def digest_of(adapter: str, policy_version: int) -> str:
    return hashlib.sha256(f"{adapter}@{policy_version}".encode()).hexdigest()


@dataclass
class Away:
    """A peer that may be gone."""

    away: bool = False

    def check_here(self) -> None:
        if self.away:
            raise Unavailable("connection refused")


class FakeTrainer(Away):
    """Its state is a chain of hashes over the ops of an adapter: `chains`.

    Trainers that share `snapshots` can restore what another wrote.
    """

    def __init__(
        self, base_model: str = BASE_MODEL, max_adapters: int = 8, kept_versions: int = 4
    ) -> None:
        super().__init__()
        self.base_model = base_model
        self.max_adapters = max_adapters
        self.kept_versions = kept_versions
        self.draining = False
        self.instance_id = secrets.token_hex(4)
        self.adapters: dict[str, types.TrainerAdapter] = {}
        self.chains: dict[str, str] = {}
        self.answers: dict[str, tuple[int, bytes, types.TrainingResult]] = {}
        self.published: dict[str, set[int]] = {}
        self.export_keys: dict[str, dict[int, str]] = {}  # of published versions
        self.snapshots: dict[str, tuple[types.TrainerAdapter, str]] = {}
        self.deleted: list[tuple[str, int]] = []
        self.num_ops = 0  # that were run, not answered again
        self.creating = asyncio.Event()  # cleared: creations hang
        self.creating.set()
        self.asked = asyncio.Event()  # set: a creation has come here
        self.answering = asyncio.Event()  # cleared: ops run, and their answers are held back
        self.answering.set()
        self.ran = asyncio.Event()  # set: an op has run
        self.refuses: MeshError | None = None  # what it says to creations
        self.refuses_ops: MeshError | None = None  # what it says to ops
        self.refuses_snapshots: MeshError | None = None  # what it says to snapshots
        self.digests: dict[tuple[str, int], str] = {}  # in place of the right ones
        self.torn = False  # exports stop in the middle

    def restart(self) -> None:
        """Another process in its place: all that it held is gone."""
        self.instance_id = secrets.token_hex(4)
        for held in (
            self.adapters,
            self.chains,
            self.answers,
            self.published,
            self.export_keys,
        ):
            held.clear()

    async def get_trainer(self) -> types.TrainerInfo:
        self.check_here()
        return types.TrainerInfo(
            base_model=self.base_model,
            vocab_size=20,
            max_length=64,
            max_rank=32,
            num_adapters=len(self.adapters),
            max_adapters=self.max_adapters,
            target_modules=("q_proj", "v_proj"),
            kept_versions=self.kept_versions,
            instance_id=self.instance_id,
            draining=self.draining,
            held=tuple(types.HeldAdapter(name, held.epoch) for name, held in self.adapters.items()),
        )

    async def create_adapter(
        self,
        name: str,
        lora: types.LoraConfig | None,
        *,
        epoch: int,
        fork_of: types.Snapshot | None = None,
        with_optimizer: bool = False,
    ) -> types.TrainerAdapter:
        await self._begin()
        if fork_of is not None:
            source, chain = self._snapshot(fork_of)
            lora = source.lora
            chain = _hash(chain, f"fork {with_optimizer}".encode())
            self.digests[name, 0] = fork_of.weights_digest
        else:
            chain = _hash("", b"fresh")
        assert lora is not None
        if lora.rank < 1:
            raise InvalidRequest(f"lora.rank: {lora.rank}", field="lora.rank", value=lora.rank)
        lora = replace(lora, alpha=lora.alpha or 2.0 * lora.rank)
        fresh = types.TrainerAdapter(name, lora, 0, 1, has_pending_gradients=False, epoch=epoch)
        return self._take(fresh, chain)

    async def restore_adapter(
        self, name: str, snapshot: types.Snapshot, *, epoch: int
    ) -> types.TrainerAdapter:
        await self._begin()
        written, chain = self._snapshot(snapshot)
        assert written.name == name
        return self._take(replace(written, epoch=epoch), chain)

    async def _begin(self) -> None:
        self.check_here()
        self.asked.set()
        await self.creating.wait()
        if self.refuses is not None:
            raise self.refuses

    def _take(self, adapter: types.TrainerAdapter, chain: str) -> types.TrainerAdapter:
        name = adapter.name
        held = self.adapters.get(name)
        if held is not None and held.epoch >= adapter.epoch:
            return self._held(name, adapter.epoch)
        if held is None and len(self.adapters) >= self.max_adapters:
            raise CapacityExhausted(f"{self.max_adapters} adapters are held", resource=name)
        self._free(name)
        self.adapters[name] = adapter
        self.chains[name] = chain
        return adapter

    def _snapshot(self, snapshot: types.Snapshot) -> tuple[types.TrainerAdapter, str]:
        if snapshot.key not in self.snapshots:
            raise NotFound(f"there is no snapshot {snapshot.key}", resource=snapshot.key)
        return self.snapshots[snapshot.key]

    async def get_adapter(self, name: str) -> types.TrainerAdapter:
        self.check_here()
        if name not in self.adapters:
            raise NotFound(f"{name} is not held here", resource=name)
        return self.adapters[name]

    async def delete_adapter(self, name: str, *, epoch: int) -> None:
        self.check_here()
        held = self.adapters.get(name)
        if held is not None and held.epoch > epoch:
            raise Fenced(f"{name} is held under {held.epoch}", resource=name)
        self.deleted.append((name, epoch))
        self._free(name)

    def _free(self, name: str) -> None:
        for held in (
            self.adapters,
            self.chains,
            self.answers,
            self.published,
            self.export_keys,
        ):
            held.pop(name, None)

    async def forward_backward(
        self,
        adapter: str,
        sequence: int,
        data: Sequence[types.Datum],
        loss_config: types.LossConfig,
        *,
        epoch: int,
    ) -> types.ForwardBackwardResult:
        logprobs = _logprobs(data)
        result = types.ForwardBackwardResult(logprobs, {"loss": 1.0})
        op = types.ForwardBackward(data, loss_config)
        return await self._run(adapter, sequence, op, result, epoch, pending=True)

    async def forward(
        self,
        adapter: str,
        data: Sequence[types.Datum],
        *,
        temperature: float | None = None,
        loss_config: types.LossConfig | None = None,
    ) -> types.ForwardResult:
        await self.get_adapter(adapter)
        logprobs = tuple(logprobs / (temperature or 1.0) for logprobs in _logprobs(data))
        return types.ForwardResult(logprobs, {} if loss_config is None else {"loss": 1.0})

    async def optim_step(
        self, adapter: str, sequence: int, adam: types.AdamConfig, *, epoch: int
    ) -> types.OptimStepResult:
        held = await self.get_adapter(adapter)
        result = types.OptimStepResult(
            held.policy_version + 1, {"learning_rate": adam.learning_rate}
        )
        return await self._run(adapter, sequence, types.OptimStep(adam), result, epoch)

    async def load_snapshot(
        self,
        adapter: str,
        sequence: int,
        snapshot: types.Snapshot,
        *,
        with_optimizer: bool,
        epoch: int,
    ) -> types.LoadResult:
        held = await self.get_adapter(adapter)
        self._snapshot(snapshot)
        op = types.LoadSnapshot(snapshot, with_optimizer)
        return await self._run(
            adapter, sequence, op, types.LoadResult(held.policy_version + 1), epoch
        )

    async def _run(
        self,
        name: str,
        sequence: int,
        op: types.TrainingOp,
        result: Any,
        epoch: int,
        *,
        pending: bool = False,
    ) -> Any:
        self.check_here()
        held = self._held(name, epoch)
        body = repr(op_to_bytes(op)).encode()
        newest, before, answer = self.answers.get(name, (0, b"", None))
        if sequence == newest and before == body:
            return answer
        if sequence == newest:
            raise AlreadyExists(f"sequence {sequence} was another op", resource=name)
        if sequence != held.next_sequence:
            raise SequenceGap(
                f"sequence {sequence}, expected is {held.next_sequence}",
                expected_sequence=held.next_sequence,
            )
        if self.refuses_ops is not None:
            raise self.refuses_ops
        self.num_ops += 1
        self.adapters[name] = replace(
            held,
            policy_version=held.policy_version if pending else result.policy_version,
            next_sequence=sequence + 1,
            has_pending_gradients=pending,
        )
        self.chains[name] = _hash(self.chains[name], body)
        self.answers[name] = sequence, body, result
        self.ran.set()
        await self.answering.wait()
        return result

    async def snapshot_adapter(self, name: str, *, epoch: int) -> types.Snapshot:
        self.check_here()
        held = self._held(name, epoch)
        if self.refuses_snapshots is not None:
            raise self.refuses_snapshots
        key = f"snapshots/{secrets.token_hex(16)}"
        self.snapshots[key] = held, self.chains[name]
        weights_digest = self._digest(name, held.policy_version)
        return types.Snapshot(
            key, self.chains[name], held.next_sequence, held.policy_version, 9, weights_digest
        )

    async def publish_adapter(
        self, name: str, *, epoch: int, with_pending_gradients: bool = False
    ) -> types.PublishedVersion:
        self.check_here()
        held = self._held(name, epoch)
        known = held.policy_version in self.published.get(name, ())
        if held.has_pending_gradients and not (known or with_pending_gradients):
            raise FailedPrecondition(f"gradients of {name} are pending", resource=name)
        self.published.setdefault(name, set()).add(held.policy_version)
        keys = self.export_keys.setdefault(name, {})
        key = keys.setdefault(held.policy_version, f"versions/{secrets.token_hex(16)}")
        return types.PublishedVersion(
            held.policy_version, self._digest(name, held.policy_version), key
        )

    async def export_adapter(
        self, name: str, policy_version: int
    ) -> AsyncIterator[types.AdapterExport | bytes | str]:
        self.check_here()
        if policy_version not in self.published.get(name, ()):
            raise NotFound(f"version {policy_version} of {name} is not kept", resource=name)
        yield types.AdapterExport(name, policy_version, self.base_model, "{}", 6)
        yield b"abc"
        if self.torn:
            return
        yield b"def"
        yield self._digest(name, policy_version)

    def _digest(self, name: str, policy_version: int) -> str:
        return self.digests.get((name, policy_version)) or digest_of(name, policy_version)

    def _held(self, name: str, epoch: int) -> types.TrainerAdapter:
        if name not in self.adapters:
            raise NotFound(f"{name} is not held here", resource=name)
        held = self.adapters[name]
        if held.epoch != epoch:
            raise Fenced(f"{name} is held under {held.epoch}, not {epoch}", resource=name)
        return held


def _logprobs(data: Sequence[types.Datum]) -> tuple[types.FloatArray, ...]:
    return tuple(np.full(len(datum.token_ids), -1.0, np.float32) for datum in data)


def _hash(chain: str, link: bytes) -> str:
    return hashlib.sha256(chain.encode() + link).hexdigest()


class FakeSampler(Away):
    def __init__(self, base_model: str = BASE_MODEL) -> None:
        super().__init__()
        self.base_model = base_model
        self.sampling = asyncio.Event()  # cleared: completions hang after their first token
        self.sampling.set()
        self.instance_id = secrets.token_hex(4)
        self.num_running = 0
        self.num_aborted = 0
        self._changed = asyncio.Condition()
        self.unloaded: list[tuple[str, int | None]] = []
        self.unloading = asyncio.Event()  # cleared: unloading hangs
        self.unloading.set()

    async def get_sampler(self) -> types.SamplerInfo:
        self.check_here()
        return types.SamplerInfo(
            base_model=self.base_model,
            vocab_size=20,
            max_length=64,
            backend="fake",
            num_running=0,
            loaded=(),
            max_rank=32,
            instance_id=self.instance_id,
        )

    async def load_adapter(self, source: types.AdapterSource) -> types.LoadTimes:
        self.check_here()
        return types.LoadTimes(0.0, 0.0)

    async def unload_adapter(self, adapter: str, policy_version: int | None = None) -> None:
        self.check_here()
        await self.unloading.wait()
        self.unloaded.append((adapter, policy_version))

    async def sample(
        self,
        source: types.AdapterSource | None,
        prompt_token_ids: Sequence[int],
        num_completions: int,
        params: types.SamplingParams,
        *,
        project: str,
        continuations: Sequence[types.Continuation] = (),
    ) -> AsyncIterator[types.CompletionChunk]:
        self.check_here()
        if not prompt_token_ids:
            raise InvalidRequest("prompt_token_ids: empty", field="prompt_token_ids")
        await self._count(1)
        done = False
        try:
            asked = continuations or [types.Continuation(n) for n in range(num_completions)]
            span = self._span(source)
            for begun in asked:
                if not begun.token_ids:
                    yield types.CompletionChunk(begun.index, (1,), (-0.5,), (span,))
            await self.sampling.wait()
            for begun in asked:
                yield types.CompletionChunk(begun.index, (2,), (-0.5,), (span,), "stop")
            done = True
        finally:
            self.num_aborted += not done
            await self._count(-1)

    async def until_running(self, count: int) -> None:
        """Return once so many requests are under way."""
        async with asyncio.timeout(20), self._changed:
            await self._changed.wait_for(lambda: self.num_running == count)

    async def _count(self, change: int) -> None:
        async with self._changed:
            self.num_running += change
            self._changed.notify_all()

    async def compute_logprobs(
        self, source: types.AdapterSource | None, token_ids: Sequence[int], *, project: str
    ) -> types.Logprobs:
        self.check_here()
        logprobs = (float("nan"), *(-1.0 for _ in token_ids[1:]))
        return types.Logprobs(logprobs, replace(self._span(source), num_tokens=len(token_ids)))

    def _span(self, source: types.AdapterSource | None) -> types.PolicySpan:
        if source is None:
            return types.PolicySpan(1, types.BASE_VERSION, "", self.instance_id)
        return types.PolicySpan(1, source.policy_version, source.digest, self.instance_id)


class FakeReward(Away):
    """Knows `even`: whether a completion has an even length; parameter `bonus`."""

    environments: FakeEnvironments

    def __init__(self) -> None:
        super().__init__()
        self.environments = FakeEnvironments()

    async def list_environments(self) -> list[chat.EnvironmentStatus]:
        self.check_here()
        return await self.environments.list_environments()

    async def score_each(
        self,
        function: str,
        parameters: Mapping[str, Any],
        items: Sequence[types.ScoreItem],
        *,
        judge: Any = None,
    ) -> list[chat.ItemScore]:
        self.check_here()
        if function != "even":
            raise InvalidRequest(
                f"function: no reward function {function!r}; there are even",
                field="function",
                value=function,
                allowed="even",
            )
        for name in parameters:
            if name != "bonus":
                raise InvalidRequest(f"parameters.{name}: unknown key", field=f"parameters.{name}")
        return [chat.ItemScore(index, float(index % 2)) for index, _ in enumerate(items)]


class FakeTokenizer:
    """One token a character, within the vocabulary of the fake sampler."""

    def render(self, messages: Sequence[Mapping[str, Any]], tools: Any = None) -> list[int]:
        return self.encode("".join(message["content"] for message in messages))

    def follow(
        self, observation: Sequence[Mapping[str, Any]], last_token: int | None, tools: Any = None
    ) -> list[int]:
        return self.render(observation)

    @property
    def special_tokens(self) -> list[str]:
        return []

    def encode(self, text: str) -> list[int]:
        return [ord(character) % 20 for character in text]

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return "".join(chr(97 + token) for token in token_ids)

    def answer(self, messages: Sequence[Mapping[str, Any]], text: str) -> list[int]:
        return self.ending(text)

    def ending(self, text: str) -> list[int]:
        return [*self.encode(text), 0]

    @property
    def vocabulary(self) -> dict[str, int]:
        return {chr(97 + token): token for token in range(20)}
