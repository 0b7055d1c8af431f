"""docs/rewards.md: every function is there, and each of its examples is worth what it says."""

from __future__ import annotations

import asyncio
import sys

import pytest
import yaml

from rollmesh.chat import Answer, ItemScore
from rollmesh.errors import FailedPrecondition
from rollmesh.job import RewardSpec
from rollmesh.types import ScoreBatch, ScoreItem
from scripts.gen_docs import PAGES, main
from services.reward.config import SandboxConfig
from services.reward.functions import FUNCTIONS
from services.reward.functions.examples import EXAMPLES
from services.reward.registry import Registry
from services.reward.sandbox import sandbox
from services.reward.workers import Workers


@pytest.mark.parametrize("page", PAGES)
def test_a_page_that_is_generated_is_up_to_date(page, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gen_docs", "--check"])
    main()
    assert f"docs/{page} is up to date" in capsys.readouterr().out


def test_every_function_has_an_example():
    assert sorted(EXAMPLES) == sorted(FUNCTIONS)


@pytest.mark.parametrize("name", FUNCTIONS)
async def test_an_example_is_worth_what_it_says(name):
    example = EXAMPLES[name]
    assert name in example.yaml
    assert len(set(example.worth.values())) > 1
    spec = RewardSpec.parse(yaml.safe_load(example.yaml)["reward"], source=name)
    reference = spec.reference.format(**example.fields)
    items = [ScoreItem(completion, reference, "a prompt") for completion in example.worth]
    scores, said = {}, asyncio.Queue()
    said.put_nowait(ScoreBatch(spec.function, spec.parameters, items))

    async def requests():
        while True:
            yield await said.get()

    async def hear(response):
        if isinstance(response, ItemScore):
            scores[response.index] = response.reward
            return
        asked = response.messages[-1].content
        (about,) = [text for text in example.judge if text in asked]
        said.put_nowait(Answer(response.number, example.judge[about]))

    async with Workers(count=1, item_timeout_s=20) as workers, sandbox(SandboxConfig()) as place:
        registry = Registry(FUNCTIONS, workers, max_batches=1, sandbox=place)
        try:
            await registry.score_each(requests(), hear)
        except FailedPrecondition as missing:
            pytest.skip(str(missing))
    found = [scores[index] for index in range(len(items))]
    assert found == pytest.approx(list(example.worth.values()))
