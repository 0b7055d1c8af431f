"""A trainer, a sampler and a reward service in memory, as services/coordinator/ports.py has them.

The trainer keeps the order of ops and its versions, the sampler says whose tokens it draws. Any of
them can be sent away (`away`), which is what a process that died looks like.
"""

from __future__ import annotations

import asyncio
import hashlib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from rollmesh import types
from rollmesh.errors import (
    AlreadyExists,
    CapacityExhausted,
    FailedPrecondition,
    InvalidRequest,
    NotFound,
    SequenceGap,
    Unavailable,
)

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
    def __init__(
        self, base_model: str = BASE_MODEL, max_adapters: int = 8, kept_versions: int = 4
    ) -> None:
        super().__init__()
        self.base_model = base_model
        self.max_adapters = max_adapters
        self.kept_versions = kept_versions
        self.adapters: dict[str, types.TrainerAdapter] = {}
        self.published: dict[str, set[int]] = {}
        self.creating = asyncio.Event()  # cleared: creations hang
        self.creating.set()
        self.asked = asyncio.Event()  # set: a creation has come here
        self.refuses: InvalidRequest | None = None  # what it says to creations
        self.digests: dict[tuple[str, int], str] = {}  # in place of the right ones
        self.torn = False  # exports stop in the middle

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
        )

    async def create_adapter(self, name: str, lora: types.LoraConfig) -> types.TrainerAdapter:
        self.check_here()
        self.asked.set()
        await self.creating.wait()
        if self.refuses is not None:
            raise self.refuses
        if lora.rank < 1:
            raise InvalidRequest(f"lora.rank: {lora.rank}", field="lora.rank", value=lora.rank)
        lora = replace(lora, alpha=lora.alpha or 2.0 * lora.rank)
        held = self.adapters.get(name)
        if held is not None:
            if held.lora != lora:
                raise AlreadyExists(f"{name} is another adapter here", resource=name)
            return held
        if len(self.adapters) >= self.max_adapters:
            raise CapacityExhausted(f"{self.max_adapters} adapters are held", resource=name)
        self.adapters[name] = types.TrainerAdapter(name, lora, 0, 1, has_pending_gradients=False)
        return self.adapters[name]

    async def get_adapter(self, name: str) -> types.TrainerAdapter:
        self.check_here()
        if name not in self.adapters:
            raise NotFound(f"{name} is not held here", resource=name)
        return self.adapters[name]

    async def delete_adapter(self, name: str) -> None:
        self.check_here()
        self.adapters.pop(name, None)
        self.published.pop(name, None)

    async def forward_backward(
        self,
        adapter: str,
        sequence: int,
        data: Sequence[types.Datum],
        loss_config: types.LossConfig,
    ) -> types.ForwardBackwardResult:
        held = await self._next(adapter, sequence)
        self.adapters[adapter] = replace(
            held, next_sequence=sequence + 1, has_pending_gradients=True
        )
        return types.ForwardBackwardResult(await self.forward(adapter, data), {"loss": 1.0})

    async def forward(
        self, adapter: str, data: Sequence[types.Datum]
    ) -> tuple[types.FloatArray, ...]:
        await self.get_adapter(adapter)
        return tuple(np.full(len(datum.token_ids), -1.0, np.float32) for datum in data)

    async def optim_step(
        self,
        adapter: str,
        sequence: int,
        adam: types.AdamConfig,
    ) -> types.OptimStepResult:
        held = await self._next(adapter, sequence)
        version = held.policy_version + 1
        self.adapters[adapter] = replace(
            held,
            policy_version=version,
            next_sequence=sequence + 1,
            has_pending_gradients=False,
        )
        return types.OptimStepResult(version, {"learning_rate": adam.learning_rate})

    async def publish_adapter(self, name: str) -> types.PublishedVersion:
        held = await self.get_adapter(name)
        if held.has_pending_gradients:
            raise FailedPrecondition(f"gradients of {name} are pending", resource=name)
        self.published.setdefault(name, set()).add(held.policy_version)
        return types.PublishedVersion(held.policy_version, self._digest(name, held.policy_version))

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

    async def _next(self, adapter: str, sequence: int) -> types.TrainerAdapter:
        held = await self.get_adapter(adapter)
        if sequence != held.next_sequence:
            raise SequenceGap(
                f"sequence {sequence}, expected is {held.next_sequence}",
                expected_sequence=held.next_sequence,
            )
        return held


class FakeSampler(Away):
    def __init__(self, base_model: str = BASE_MODEL) -> None:
        super().__init__()
        self.base_model = base_model
        self.sampling = asyncio.Event()  # cleared: completions hang after their first token
        self.sampling.set()
        self.num_running = 0
        self.num_aborted = 0
        self._changed = asyncio.Condition()
        self.unloaded: list[tuple[str, int | None]] = []

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
        )

    async def load_adapter(self, source: types.AdapterSource) -> types.LoadTimes:
        self.check_here()
        return types.LoadTimes(0.0, 0.0)

    async def unload_adapter(self, adapter: str, policy_version: int | None = None) -> None:
        self.check_here()
        self.unloaded.append((adapter, policy_version))

    async def sample(
        self,
        source: types.AdapterSource | None,
        prompt_token_ids: Sequence[int],
        num_completions: int,
        params: types.SamplingParams,
    ) -> AsyncIterator[types.CompletionChunk]:
        self.check_here()
        if not prompt_token_ids:
            raise InvalidRequest("prompt_token_ids: empty", field="prompt_token_ids")
        await self._count(1)
        done = False
        try:
            for index in range(num_completions):
                yield types.CompletionChunk(index, (1,), (-0.5,), (_span(source),))
            await self.sampling.wait()
            for index in range(num_completions):
                yield types.CompletionChunk(index, (2,), (-0.5,), (_span(source),), "stop")
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
        self, source: types.AdapterSource | None, token_ids: Sequence[int]
    ) -> types.Logprobs:
        self.check_here()
        logprobs = (float("nan"), *(-1.0 for _ in token_ids[1:]))
        return types.Logprobs(logprobs, replace(_span(source), num_tokens=len(token_ids)))


def _span(source: types.AdapterSource | None) -> types.PolicySpan:
    if source is None:
        return types.PolicySpan(1, types.BASE_VERSION, "")
    return types.PolicySpan(1, source.policy_version, source.digest)


class FakeReward(Away):
    """Knows `even`: whether a completion has an even length; parameter `bonus`."""

    async def list_functions(self) -> list[types.RewardFunctionInfo]:
        self.check_here()
        return [types.RewardFunctionInfo("even", "Rewards an even length.", "{}")]

    async def score(
        self, function: str, parameters: Mapping[str, Any], items: Sequence[types.ScoreItem]
    ) -> list[float]:
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
        return [float(index % 2) for index, _ in enumerate(items)]


class FakeTokenizer:
    """One token a character, within the vocabulary of the fake sampler."""

    def render(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        return self.encode("".join(message["content"] for message in messages))

    def encode(self, text: str) -> list[int]:
        return [ord(character) % 20 for character in text]

    def decode(self, token_ids: Sequence[int]) -> str:
        return "".join(chr(97 + token) for token in token_ids)
