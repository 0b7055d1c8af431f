"""Whatever happens to samplers, transfers and files, each token is of the policy that it claims."""

from __future__ import annotations

import asyncio
import os
import random
from collections import Counter
from dataclasses import dataclass, field

import pytest

from rollmesh import types
from rollmesh.errors import FailedPrecondition, NotFound, SourceUnavailable
from tests.chaos.oracles import SAMPLERS, Oracles, oracles
from tests.fakes import oracle

SEED = int(os.environ.get("CHAOS_SEED", "20"))
TOKENS = int(os.environ.get("CHAOS_TOKENS", "40000"))
WORKERS = 24
PROMPT_LENGTH = 160
EVERY_TOKENS = 2_500
"""Between two acts of chaos."""
ROUNDS = int(os.environ.get("CHAOS_ROUNDS", "1"))
PATIENT = 2
"""Workers that go on while a sampler is away."""


@dataclass
class Account:
    """What was sampled, and what was refused."""

    tokens: int = 0
    requests: int = 0
    wrong: list[str] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)
    rounds: int = 0
    samplers: set[str] = field(default_factory=set)
    continued: int = 0
    policies: set[tuple[int, int]] = field(default_factory=set)


class Traffic:
    """Workers that sample random policies from a few long prompts that all policies share."""

    def __init__(self, mesh: Oracles, rng: random.Random, account: Account) -> None:
        self._mesh = mesh
        self._rng = rng
        self._account = account
        self.versions = dict.fromkeys(range(oracle.NUM_ADAPTERS), 0)
        stem = [rng.randrange(1, oracle.VOCABULARY) for _ in range(PROMPT_LENGTH)]
        self._prompts = [
            [*stem[: PROMPT_LENGTH - cut], *(rng.randrange(1, oracle.VOCABULARY) for _ in range(8))]
            for cut in (0, 0, 40, 80)
        ]

    async def work(self, number: int) -> None:
        """Sample until there are enough tokens, and kills."""
        while self._account.tokens < TOKENS or self._account.rounds < ROUNDS:
            if number >= PATIENT and len(self._mesh.serving()) < len(SAMPLERS):
                # Two cores: an engine that starts beside a busy one takes minutes.
                await asyncio.sleep(0.1)
            else:
                await self._one()

    async def _one(self) -> None:
        rng, trainer = self._rng, self._mesh.trainer
        index = rng.randrange(oracle.NUM_ADAPTERS)
        version = max(0, self.versions[index] - rng.randrange(2))
        base = rng.random() < 0.05
        source = None if base else trainer.source(index, version)
        token = oracle.BASE_TOKEN if base else trainer.token(index, version)
        life = trainer.lifetimes.get(index, 0)
        params = types.SamplingParams(
            max_tokens=rng.randrange(8, 96), temperature=rng.choice([0.0, 1.0, 1.0])
        )
        project = "blue" if base else source.adapter.split("/")[1]
        try:
            completions = await self._mesh.sampling.sample(
                project,
                oracle.BASE_MODEL,
                source,
                rng.choice(self._prompts),
                rng.randrange(1, 9),
                params,
                lost=self._lost,
            )
        except (FailedPrecondition, NotFound, SourceUnavailable) as error:
            # Its adapter was deleted and made again meanwhile, or its transfers were all spoilt.
            gone = trainer.lifetimes.get(index, 0) != life
            self._account.errors["gone" if gone else f"{type(error).__name__}: {error}"] += 1
            return
        self._account.requests += 1
        self._account.policies.add((index, version))
        for completion in completions:
            self._check(completion, source, token)

    def _check(
        self, completion: types.Completion, source: types.AdapterSource | None, token: int
    ) -> None:
        account = self._account
        account.tokens += len(completion.token_ids)
        expected = (
            (types.BASE_VERSION, "") if source is None else (source.policy_version, source.digest)
        )
        if set(completion.token_ids) != {token}:
            account.wrong.append(f"{source}: {completion.token_ids} are not all {token}")
        if any((span.policy_version, span.digest) != expected for span in completion.spans):
            account.wrong.append(f"{source}: spans {completion.spans}")
        if sum(span.num_tokens for span in completion.spans) != len(completion.token_ids):
            account.wrong.append(f"{source}: spans {completion.spans} over {completion.token_ids}")
        account.samplers |= {span.sampler for span in completion.spans}
        account.continued += len({span.sampler for span in completion.spans}) > 1

    async def _lost(self, reason: str) -> None:
        self._account.errors["(waited for a sampler)"] += 1


class Chaos:
    """One act after the other, each after so many more tokens."""

    def __init__(
        self, mesh: Oracles, traffic: Traffic, rng: random.Random, account: Account
    ) -> None:
        self._mesh = mesh
        self._traffic = traffic
        self._rng = rng
        self._account = account

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            for act in (
                self.kill,
                self.publish_two,
                self.spoil,
                self.come_back,
                self.replace_files,
                self.publish_two,
                self.spoil,
                self.recreate,
            ):
                due = self._account.tokens + EVERY_TOKENS
                while self._account.tokens < due:
                    await asyncio.sleep(0.02)
                await act()
            self._account.rounds += 1

    async def publish_two(self) -> None:
        """Two versions of many adapters in quick succession."""
        for index in self._rng.sample(range(oracle.NUM_ADAPTERS), 24):
            self._traffic.versions[index] += 2

    async def spoil(self) -> None:
        """The next transfers are torn, corrupted, slow or of another version."""
        faults = ["torn", "corrupted", "slow", "other version"] * 2
        self._rng.shuffle(faults)
        self._mesh.trainer.faults += faults

    async def replace_files(self) -> None:
        """Files in the samplers' caches come to hold another version's tensors."""
        for sampler in SAMPLERS:
            files = self._mesh.files(sampler)
            for path in self._rng.sample(files, min(6, len(files))):
                other = oracle.export_of(self._rng.randrange(oracle.NUM_ADAPTERS), 5)[1]
                try:
                    path.write_bytes(other)
                except FileNotFoundError:
                    continue  # evicted at this moment

    async def recreate(self) -> None:
        """Adapters are deleted and made again: version 0 of another life."""
        for index in self._rng.sample(range(oracle.NUM_ADAPTERS), 8):
            trainer = self._mesh.trainer
            trainer.lifetimes[index] = trainer.lifetimes.get(index, 0) + 1
            self._traffic.versions[index] = 0
            name = oracle.adapter_name(index)
            await self._mesh.sampling.unload(oracle.BASE_MODEL, name, None)

    async def kill(self) -> None:
        """A sampler dies with all that it was doing, while the other one goes on."""
        await self._mesh.samplers[self._rng.choice(SAMPLERS)].kill_and_restart()

    async def come_back(self) -> None:
        """It serves again."""
        while len(self._mesh.serving()) < len(SAMPLERS):
            await asyncio.sleep(0.1)


@pytest.mark.timeout(900)
async def test_no_token_is_attributed_to_a_policy_that_did_not_draw_it(tmp_path):
    rng = random.Random(SEED)
    account = Account()
    async with oracles(tmp_path) as mesh:
        traffic = Traffic(mesh, rng, account)
        chaos = asyncio.create_task(Chaos(mesh, traffic, rng, account).run())
        try:
            async with asyncio.TaskGroup() as workers:
                for number in range(WORKERS):
                    workers.create_task(traffic.work(number))
        finally:
            chaos.cancel()
            await asyncio.wait([chaos])
    print(
        f"\n{account.tokens} tokens of {len(account.policies)} policies,",
        f"{account.requests} requests;",
        f"{account.continued} completions continued elsewhere; {account.rounds} rounds;",
        f"{mesh.trainer.num_pulls} pulls; {dict(account.errors)}",
    )
    assert not account.wrong, account.wrong[:5]
    assert account.tokens >= TOKENS
    assert account.rounds >= ROUNDS
    # More than the two that there were at the start: the killed ones came back as others.
    assert len(account.samplers) > len(SAMPLERS)
    # A spoilt transfer or a replaced file costs time; only a policy that is gone is refused.
    refused = {
        error: count
        for error, count in account.errors.items()
        if error not in {"gone", "(waited for a sampler)"}
    }
    assert not refused
