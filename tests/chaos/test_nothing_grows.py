"""Thousands of versions pass through one sampler: its memory, slots and files stay bounded."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from rollmesh import types
from services.local.sentinel import members
from tests.chaos.oracles import MAX_LORAS, MAX_VERSIONS, oracles
from tests.fakes import oracle

PUBLISHES = int(os.environ.get("CHAOS_PUBLISHES", "300"))
WARM_UP = 100
NUM_ADAPTERS = 1000
AT_ONCE = 12
"""More than there are slots."""
GROWTH = 24 * 2**20
"""Bytes; 10,000 adapters of 8.7 kB would be 87 MB, and a leak of any copy of each more."""


def resident_bytes(pid: int) -> int:
    """Of a sampler and its engine's processes, without what they share with others."""
    total = 0
    for member in members(pid):
        fields = dict(
            line.split(":", 1) for line in Path(f"/proc/{member}/status").read_text().splitlines()
        )
        total += int(fields["RssAnon"].split()[0]) * 1024
    return total


@pytest.mark.timeout(1800)
async def test_memory_slots_and_files_stay_bounded_over_thousands_of_versions(tmp_path):
    async with oracles(tmp_path, samplers=("sampler-0",)) as mesh:
        (member,) = mesh.fleet.samplers(oracle.BASE_MODEL)
        params = types.SamplingParams(max_tokens=2, temperature=0.0)
        count = iter(range(PUBLISHES))

        async def publish_and_sample() -> None:
            for number in count:
                version, index = divmod(number, NUM_ADAPTERS)
                source = mesh.trainer.source(index, version)
                chunks = mesh.sampling.stream(
                    "red", oracle.BASE_MODEL, source, [1, 2, 3], 1, params
                )
                tokens = [token async for chunk in chunks for token in chunk.token_ids]
                assert tokens == [mesh.trainer.token(index, version)] * 2
                if number % 3 == 0:  # as a job lets go of what it has trained past
                    await mesh.sampling.unload(oracle.BASE_MODEL, source.adapter, version)
                if number == WARM_UP:
                    sizes.append(resident_bytes(mesh.pid("sampler-0")))

        sizes: list[int] = []
        async with asyncio.TaskGroup() as tasks:
            for _ in range(AT_ONCE):
                tasks.create_task(publish_and_sample())
        sizes.append(resident_bytes(mesh.pid("sampler-0")))
        info = await member.port.get_sampler()
        assert len(info.resident) <= MAX_LORAS
        assert len(info.loaded) <= MAX_VERSIONS
        assert len(mesh.files("sampler-0")) <= MAX_VERSIONS
        assert info.num_running == info.num_queued == info.reserved_kv_tokens == 0
        assert mesh.trainer.num_pulls == PUBLISHES
        print(f"\n{PUBLISHES} versions; {sizes[0] / 2**20:.0f} MiB, then {sizes[1] / 2**20:.0f}")
        assert sizes[1] - sizes[0] < GROWTH
