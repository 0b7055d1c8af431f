"""Batches: what is refused and how, who waits for whom, and who is to blame when scoring hangs."""

from __future__ import annotations

import asyncio
import json

import pytest

from rollmesh.errors import InvalidRequest, Overloaded
from rollmesh.types import ScoreItem
from services.reward.functions import FUNCTIONS
from services.reward.functions.function import scored
from services.reward.registry import MAX_ITEMS, Registry
from services.reward.workers import Stuck


class Inline:
    """Runs isolated functions where it stands; gets stuck on every text with "hang" in it."""

    count = 1

    def __init__(self):
        self.open = asyncio.Event()
        self.open.set()

    async def score(self, function, parameters, item):
        await self.open.wait()
        if "hang" in item.completion or "hang" in item.reference:
            raise Stuck("it takes more than 1 s of processor time")
        chosen = FUNCTIONS[function]
        return scored(chosen.score(item, chosen.parameters.model_validate(parameters)))


@pytest.fixture
def inline():
    return Inline()


@pytest.fixture
def registry(inline):
    return Registry(FUNCTIONS, inline, max_batches=2)


async def test_rewards_come_in_the_order_of_the_items(registry):
    items = [ScoreItem(str(n), str(n % 3)) for n in range(6)]
    assert await registry.score("exact_match", {}, items) == [1, 1, 1, 0, 0, 0]
    assert await registry.score("math_match", {}, items) == [1, 1, 1, 0, 0, 0]


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("exact_mach", "did you mean 'exact_match'?"),
        ("numeric", "did you mean 'numeric_match'?"),
        (
            "",
            "There are code_tests, exact_match, format_match, json_schema, length, llm_judge, math",
        ),
    ],
)
async def test_an_unknown_function_is_refused_with_those_that_exist(registry, name, hint):
    with pytest.raises(InvalidRequest) as caught:
        await registry.score(name, {}, [ScoreItem("x")])
    assert hint in str(caught.value)
    assert caught.value.context["field"] == "function"
    assert caught.value.context["allowed"] == ", ".join(sorted(FUNCTIONS))


@pytest.mark.parametrize(
    ("function", "parameters", "field", "message"),
    [
        pytest.param(
            "regex_match",
            {"pattern": "a", "patern": "b"},
            "parameters.patern",
            "did you mean 'pattern'?",
            id="unknown, with the nearest",
        ),
        pytest.param("regex_match", {}, "parameters.pattern", "required", id="missing"),
        pytest.param(
            "numeric_match", {"tolerance": -1}, "parameters.tolerance", "equal to 0", id="range"
        ),
        pytest.param(
            "numeric_match",
            {"where": "first"},
            "parameters.where",
            "'last' or 'whole'",
            id="choice",
        ),
        pytest.param("length", {}, "parameters", "exactly one of", id="too few"),
        pytest.param("length", {"target": 1, "at_most": 1}, "parameters", "exactly one", id="many"),
        pytest.param("length", {"target": 0}, "parameters.target", "greater than 0", id="zero"),
        pytest.param("math_match", {"x": 1}, "parameters.x", "no parameters", id="takes none"),
        pytest.param(
            "regex_match", {"pattern": "("}, "parameters.pattern", "not a regular", id="("
        ),
    ],
)
async def test_wrong_parameters_are_refused_by_name(registry, function, parameters, field, message):
    with pytest.raises(InvalidRequest) as caught:
        await registry.score(function, parameters, [ScoreItem("x")])
    assert caught.value.context["field"] == field
    assert message in str(caught.value)


@pytest.mark.parametrize("function", ["numeric_match", "math_match"])
async def test_a_bad_item_is_named_by_its_index(registry, function):
    items = [ScoreItem("7", "7"), ScoreItem("7", "seven")]
    with pytest.raises(InvalidRequest, match=r"^items\[1\]\.reference: 'seven'") as caught:
        await registry.score(function, {}, items)
    assert caught.value.context["field"] == "items[1].reference"
    assert caught.value.context["value"] == "seven"


@pytest.mark.parametrize(
    ("count", "fits"), [(0, False), (1, True), (MAX_ITEMS, True), (4097, False)]
)
async def test_a_batch_has_1_to_4096_items(registry, count, fits):
    items = [ScoreItem("7", "7")] * count
    if fits:
        assert await registry.score("exact_match", {}, items) == [1.0] * count
    else:
        with pytest.raises(InvalidRequest, match=f"items: {count} of them"):
            await registry.score("exact_match", {}, items)


async def test_a_completion_that_hangs_gets_its_functions_reward_and_no_more(registry):
    items = [ScoreItem("7", "7"), ScoreItem("hang", "7"), ScoreItem("7", "7")]
    assert await registry.score("math_match", {}, items) == [1, 0, 1]


@pytest.mark.parametrize(
    ("function", "parameters", "item"),
    [
        pytest.param("math_match", {}, ScoreItem("7", "hang"), id="by the reference"),
        pytest.param("regex_match", {"pattern": "a"}, ScoreItem("hang"), id="by the pattern"),
    ],
)
async def test_a_batch_that_hangs_by_its_caller_is_refused(registry, function, parameters, item):
    with pytest.raises(InvalidRequest, match=r"^items\[1\]: .*processor time") as caught:
        await registry.score(function, parameters, [ScoreItem("7", "7"), item])
    assert caught.value.context["field"] == "items[1]"


async def test_a_batch_too_many_is_refused_and_others_are_not(registry, inline):
    inline.open.clear()
    batch = ("math_match", {}, [ScoreItem("7", "7")])
    async with asyncio.TaskGroup() as tasks:
        waiting = [tasks.create_task(registry.score(*batch)) for _ in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(Overloaded) as caught:
            await registry.score(*batch)
        assert caught.value.context["allowed"] == "2"
        inline.open.set()
    assert [task.result() for task in waiting] == [[1.0], [1.0]]
    assert await registry.score(*batch) == [1.0]


async def test_a_cancelled_batch_gives_its_place_back(registry, inline):
    inline.open.clear()
    for _ in range(5):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0):
                await registry.score("math_match", {}, [ScoreItem("7", "7")])


def test_functions_are_listed_by_name_with_schemas(registry):
    infos = registry.list_functions()
    assert [info.name for info in infos] == sorted(FUNCTIONS)
    schemas = {info.name: json.loads(info.parameters_schema_json) for info in infos}
    assert schemas["regex_match"]["required"] == ["pattern"]
    assert schemas["exact_match"]["properties"]["strip"]["default"] is True
