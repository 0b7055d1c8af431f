"""The loops of examples/tinker, run as they are against a mesh: what they are for comes about."""

from __future__ import annotations

import re

import pytest

from tests.mesh.tinker.conftest import ROOT

pytestmark = pytest.mark.asyncio(loop_scope="session")
EXAMPLES = ROOT / "examples" / "tinker"
MAX_LINES = 100


async def test_the_sft_loop_loses_ever_less_and_keeps_what_it_learned(tinker, tmp_path):
    said = await tinker.run(tmp_path, str(EXAMPLES / "sft.py"), "--steps", "10")
    losses = [float(loss) for loss in re.findall(r"^step.*: loss (.*)$", said, re.MULTILINE)]
    assert len(losses) == 10
    assert losses[-1] < losses[0] / 3
    assert "37+58 = 95\n" in said
    assert re.search(r"^kept as tinker://s[0-9a-f]{16}:train:0/weights/sft$", said, re.MULTILINE)


async def test_the_rl_loop_is_rewarded_ever_more(tinker, tmp_path):
    said = await tinker.run(tmp_path, str(EXAMPLES / "rl.py"), "--steps", "10")
    rewards = [float(reward) for reward in re.findall(r"reward ([0-9.]+), ", said)]
    assert len(rewards) == 10
    # By chance a mean of 512 answers is hardly ever 0.06 off.
    assert sum(rewards[-2:]) / 2 > rewards[0] + 0.2


@pytest.mark.parametrize("name", ["rl.py", "sft.py"])
async def test_a_loop_is_read_at_a_glance(name):
    assert len((EXAMPLES / name).read_text().splitlines()) < MAX_LINES
