"""ScoreEach: items as they end, parts, judges, and what does not belong on a call."""

from __future__ import annotations

import asyncio

import pytest
from pydantic import Field

from rollmesh.chat import Answer, ItemScore, Question
from rollmesh.config import Config
from rollmesh.errors import FailedPrecondition, InvalidRequest, Overloaded
from rollmesh.types import ScoreBatch, ScoreItem
from services.reward.functions import FUNCTIONS
from services.reward.functions.function import RewardFunction, scored
from services.reward.registry import Registry

JUDGE = {"rubric": "Is it right?", "template": "{rubric} {completion}"}


class Inline:
    """Runs isolated functions where it stands, one at a time; a text with "wait" until told."""

    count = 1

    def __init__(self):
        self.open = asyncio.Event()
        self.most = self.now = 0

    async def score(self, function, parameters, item):
        self.now += 1
        self.most = max(self.most, self.now)
        try:
            if "wait" in item.completion:
                await self.open.wait()
            await asyncio.sleep(0)
        finally:
            self.now -= 1
        chosen = FUNCTIONS[function]
        return scored(chosen.score(item, chosen.parameters.model_validate(parameters)))


class Caller:
    """The other end of a call: says requests as it is told to, and keeps what it hears."""

    def __init__(self, *requests, ends=False):
        self._requests = asyncio.Queue()
        for request in requests:
            self.say(request)
        if ends:
            self.say(None)
        self.scores = {}
        self.questions = asyncio.Queue()
        self.heard = asyncio.Queue()

    def say(self, request):
        self._requests.put_nowait(request)

    async def requests(self):
        while (request := await self._requests.get()) is not None:
            yield request

    async def hear(self, said):
        if isinstance(said, Question):
            self.questions.put_nowait(said)
        else:
            assert isinstance(said, ItemScore)
            assert said.index not in self.scores
            self.scores[said.index] = said
        self.heard.put_nowait(said)


@pytest.fixture
def inline():
    return Inline()


@pytest.fixture
def registry(inline):
    return Registry(FUNCTIONS, inline, max_batches=2)


def batch(function, parameters, *completions, reference="7"):
    return ScoreBatch(function, parameters, [ScoreItem(text, reference) for text in completions])


async def score_each(registry, caller):
    await registry.score_each(caller.requests(), caller.hear)
    return [caller.scores[index] for index in sorted(caller.scores)]


@pytest.mark.parametrize("function", ["exact_match", "math_match"])
@pytest.mark.parametrize("ends", [True, False])
async def test_every_item_is_told_once(registry, function, ends):
    texts = [str(number % 9) for number in range(600 if function == "exact_match" else 20)]
    caller = Caller(batch(function, {}, *texts), ends=ends)
    scores = await score_each(registry, caller)
    assert [score.index for score in scores] == list(range(len(texts)))
    assert [score.reward for score in scores] == [float(text == "7") for text in texts]


async def test_an_item_that_takes_long_holds_up_no_other(registry, inline):
    inline.count = 2
    caller = Caller(batch("math_match", {}, "wait 7", "7", "8"))
    async with asyncio.TaskGroup() as tasks:
        call = tasks.create_task(score_each(registry, caller))
        assert {(await caller.heard.get()).index for _ in range(2)} == {1, 2}
        assert not call.done()
        inline.open.set()
    assert [score.reward for score in call.result()] == [1, 1, 0]


async def test_a_batch_takes_no_more_places_than_there_are(registry, inline):
    inline.count = 2
    await score_each(registry, Caller(batch("math_match", {}, *["7"] * 50)))
    assert inline.most == 2


async def test_questions_are_answered_in_any_order_while_others_wait(registry):
    caller = Caller(batch("llm_judge", JUDGE, "a", "b", "c"))
    async with asyncio.TaskGroup() as tasks:
        call = tasks.create_task(score_each(registry, caller))
        questions = [await caller.questions.get() for _ in range(3)]
        assert sorted(question.number for question in questions) == [1, 2, 3]
        worth = {"a": 1, "b": 2, "c": 3}
        for question in reversed(questions):
            text = question.messages[0].content
            caller.say(Answer(question.number, f"Score: {worth[text[-1]]}"))
    assert [score.reward for score in call.result()] == [0.1, 0.2, 0.3]


@pytest.mark.parametrize(
    ("says", "match", "field"),
    [
        pytest.param([Answer(1, "x")], "before there is a batch", "answer", id="an answer first"),
        pytest.param([], "ended without one", "batch", id="nothing"),
        pytest.param(
            [batch("llm_judge", JUDGE, "a"), batch("llm_judge", JUDGE, "a")],
            "a second one",
            "batch",
            id="two batches",
        ),
        pytest.param(
            [batch("llm_judge", JUDGE, "a"), Answer(2, "x")],
            "2 was not asked",
            "answer.question",
            id="an answer to nothing",
        ),
        pytest.param(
            [batch("llm_judge", JUDGE, "a"), Answer(0, "x")],
            "0 was not asked",
            "answer.question",
            id="the number 0",
        ),
        pytest.param(
            [batch("llm_judge", JUDGE, "a")], "none to question 1", "answer", id="no answer"
        ),
        pytest.param([batch("none", {}, "a")], "no reward function", "function", id="a function"),
        pytest.param([batch("llm_judge", {}, "a")], "rubric", "parameters.rubric", id="parameter"),
        pytest.param([batch("exact_match", {})], "items: 0", "items", id="no items"),
        pytest.param(
            [batch("numeric_match", {}, "7", reference="x")],
            "reference",
            "items[0].reference",
            id="x",
        ),
    ],
)
async def test_what_does_not_belong_is_refused(registry, says, match, field):
    with pytest.raises(InvalidRequest, match=match) as caught:
        await score_each(registry, Caller(*says, ends=True))
    assert caught.value.context["field"] == field


async def test_a_caller_that_has_no_more_to_say_is_told_of_the_question_that_waits(registry):
    caller = Caller(batch("llm_judge", JUDGE, "a", "b"))
    call = asyncio.ensure_future(score_each(registry, caller))
    await caller.questions.get()
    await caller.questions.get()
    caller.say(None)
    with pytest.raises(InvalidRequest, match="none to question 1") as caught:
        await call
    assert caught.value.context["field"] == "answer"


async def test_a_question_is_answered_once(registry):
    caller = Caller(batch("llm_judge", JUDGE, "a", "b"))
    call = asyncio.ensure_future(score_each(registry, caller))
    first = await caller.questions.get()
    await caller.questions.get()
    caller.say(Answer(first.number, "Score: 1"))
    await caller.heard.get()
    caller.say(Answer(first.number, "Score: 2"))
    with pytest.raises(InvalidRequest, match=f"{first.number} was answered before"):
        await call


async def test_a_judge_that_says_no_score_fails_the_batch_by_its_item(registry):
    caller = Caller(batch("llm_judge", JUDGE, "a"))
    call = asyncio.ensure_future(score_each(registry, caller))
    await caller.questions.get()
    caller.say(Answer(1, "no idea"))
    with pytest.raises(FailedPrecondition, match=r"^items\[0\]: the judge gave no score") as caught:
        await call
    assert caught.value.context["field"] == "items[0]"


async def test_score_sends_who_asks_a_judge_to_score_each(registry):
    gate = {"function": "exact_match", "at_least": 1}
    for function, parameters in (
        ("llm_judge", JUDGE),
        ("weighted", {"parts": [gate, {"function": "llm_judge", "parameters": JUDGE}]}),
    ):
        with pytest.raises(FailedPrecondition, match="goes by ScoreEach"):
            await registry.score(function, parameters, [ScoreItem("7", "7")])


async def test_where_there_is_no_sandbox_nothing_is_run():
    registry = Registry(FUNCTIONS, Inline(), max_batches=2, sandbox="bubblewrap needs `bwrap`")
    nested = {"parts": [{"function": "code_tests"}]}
    for function, parameters in (("code_tests", {}), ("weighted", nested)):
        with pytest.raises(FailedPrecondition, match="no sandbox for it: bubblewrap needs `bwrap`"):
            await registry.score(function, parameters, [ScoreItem("x", "assert f()")])
        with pytest.raises(FailedPrecondition, match="no sandbox"):
            await score_each(registry, Caller(batch(function, parameters, "x")))


async def test_a_caller_that_goes_away_gives_its_place_back(registry, inline):
    for _ in range(3):
        caller = Caller(batch("llm_judge", JUDGE, "a"))
        call = asyncio.ensure_future(score_each(registry, caller))
        await caller.questions.get()
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
    assert len(asyncio.all_tasks()) == 1


async def test_a_batch_too_many_is_refused(registry):
    callers = [Caller(batch("llm_judge", JUDGE, "a")) for _ in range(3)]
    calls = [asyncio.ensure_future(score_each(registry, caller)) for caller in callers[:2]]
    for caller in callers[:2]:
        await caller.questions.get()
    with pytest.raises(Overloaded, match="2 batches that ask a judge"):
        await score_each(registry, callers[2])
    # A judge that is slow holds up nobody who asks none.
    assert await registry.score("exact_match", {}, [ScoreItem("7", "7")]) == [1.0]
    for call in calls:
        call.cancel()
    await asyncio.gather(*calls, return_exceptions=True)


WEIGHTED = {
    "parts": [
        {"function": "format_match", "parameters": {"tags": ["a"]}, "name": "form", "at_least": 1},
        {"function": "regex_match", "parameters": {"pattern": "7"}, "weight": 2},
        {"function": "length", "parameters": {"at_most": 4}, "weight": -0.5, "name": "short"},
    ]
}


@pytest.mark.parametrize(
    ("combine", "completion", "reward", "rewards"),
    [
        ("sum", "<a>7</a>", 3.0, {"form": 1, "regex_match": 1, "short": 0}),
        ("sum", "<a></a>", 0.875, {"form": 1, "regex_match": 0, "short": 0.25}),
        ("sum", "7", 0.0, {"form": 0}),
        ("product", "<a></a>", 0.0, {"form": 1, "regex_match": 0, "short": 0.25}),
        ("product", "<a></a>7", 0.0, {"form": 0}),
    ],
)
async def test_weighted_adds_up_its_parts_and_tells_them(
    registry, combine, completion, reward, rewards
):
    caller = Caller(batch("weighted", WEIGHTED | {"combine": combine}, completion))
    (score,) = await score_each(registry, caller)
    assert (score.reward, score.rewards) == (reward, rewards)
    assert await registry.score(
        "weighted", WEIGHTED | {"combine": combine}, [ScoreItem(completion)]
    ) == [score.reward]


async def test_a_product_multiplies_each_with_its_weight(registry):
    parts = [
        {"function": "length", "parameters": {"target": 4}, "weight": 3},
        {"function": "length", "parameters": {"target": 2}, "weight": -2, "name": "other"},
    ]
    (reward,) = await registry.score(
        "weighted", {"parts": parts, "combine": "product"}, [ScoreItem("abc")]
    )
    assert reward == 3 * 0.75 * -2 * 0.5


async def test_a_part_is_weighted_itself_and_has_a_reference_of_its_own(registry):
    inner = {"parts": [{"function": "exact_match", "reference": "8"}]}
    parameters = {
        "parts": [
            {"function": "exact_match"},
            {"function": "weighted", "parameters": inner, "weight": 10, "name": "inner"},
        ]
    }
    caller = Caller(batch("weighted", parameters, "7", "8"))
    seven, eight = await score_each(registry, caller)
    assert (seven.reward, eight.reward) == (1, 10)
    assert eight.rewards == {"exact_match": 0, "inner": 1, "inner/exact_match": 1}


async def test_a_gate_that_is_shut_asks_no_judge(registry):
    parameters = {
        "parts": [
            {"function": "exact_match", "at_least": 1},
            {"function": "llm_judge", "parameters": JUDGE, "name": "judge"},
        ]
    }
    caller = Caller(batch("weighted", parameters, "8", "7"))
    call = asyncio.ensure_future(score_each(registry, caller))
    question = await caller.questions.get()
    assert question.messages[0].content.endswith("7")
    caller.say(Answer(question.number, "Score: 5"))
    shut, open_ = await call
    assert (shut.reward, open_.reward) == (0, 1.5)
    assert "exact_match: below its gate" in shut.feedback
    assert open_.rewards == {"exact_match": 1, "judge": 0.5}
    assert caller.questions.empty()


@pytest.mark.parametrize(
    ("parts", "field", "match"),
    [
        ([], "parameters.parts", "at least 1"),
        ([{"function": "x"}], "parameters.parts[0].function", "no reward function 'x'"),
        (
            [{"function": "length", "parameters": {"targt": 1}}],
            "parameters.parts[0].parameters.targt",
            "did you mean 'target'",
        ),
        (
            [{"function": "weighted", "parameters": {"parts": [{"function": "regex_match"}]}}],
            "parameters.parts[0].parameters.parts[0].parameters.pattern",
            "required",
        ),
        (
            [{"function": "regex_match", "parameters": {"pattern": "("}}],
            "parameters.parts[0].parameters.pattern",
            "not a regular expression",
        ),
        (
            [{"function": "numeric_match", "reference": "x"}],
            "parameters.parts[0].reference",
            "not a number",
        ),
        ([{"function": "numeric_match"}], "items[0].reference", "not a number"),
        ([{"function": "length", "weight": float("inf")}], "parameters.parts[0].weight", "finite"),
        ([{"function": "exact_match"}] * 2, "parameters", "is there twice"),
    ],
)
async def test_what_is_wrong_with_a_part_is_told_by_its_place(registry, parts, field, match):
    with pytest.raises(InvalidRequest, match=match) as caught:
        await registry.score("weighted", {"parts": parts}, [ScoreItem("7", "seven")])
    assert caught.value.context["field"] == field


async def test_parts_of_parts_are_bounded(registry):
    parts = {"function": "exact_match"}
    for level in range(3):
        parts = {
            "function": "weighted",
            "name": "x",
            "parameters": {"parts": [parts | {"name": str(n)} for n in range(5)]},
        }
        call = registry.score("weighted", parts["parameters"], [ScoreItem("7", "7")])
        if level < 2:
            await call
        else:
            with pytest.raises(InvalidRequest, match="more than 64 functions"):
                await call


class Shared(Config):
    """Parameters of the function below."""

    limit: int = Field(1, ge=1)


async def test_a_function_of_ones_own_may_be_a_coroutine(inline):
    async def slow(item, parameters, means):
        """A reward."""
        await asyncio.sleep(0)
        return float(len(item.completion) * parameters.limit)

    registry = Registry({"slow": RewardFunction(slow, Shared)}, inline, max_batches=1)
    assert await registry.score("slow", {"limit": 2}, [ScoreItem("ab"), ScoreItem("")]) == [4, 0]
