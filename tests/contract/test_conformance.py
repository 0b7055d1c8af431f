"""The conformance kit: a good environment passes; for every rule there is one that breaks it."""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import sys
from pathlib import Path

import pytest

from rollmesh.api.environment.v1 import environment_service_pb2 as pb
from rollmesh.environment.conformance import RULES, check
from rollmesh.errors import NotFound, Unavailable
from tests.fakes.environments import LIMIT, Code, Parrot, served

ROOT = Path(__file__).parents[2]
BY_NAME = {rule.name: rule for rule in RULES}
ANSWER_S = 1.5
"""What a hang of a broken one costs here; the good ones answer well before."""


async def report(servicer, *, health="SERVING", num_episodes=LIMIT):
    async with served(servicer, health=health) as port:
        (report,) = await check(
            f"127.0.0.1:{port}",
            environment="parrot",
            answer_s=ANSWER_S,
            num_episodes=num_episodes,
        )
    return report


def outcomes(report):
    return {verdict.rule: (verdict.outcome, verdict.reason) for verdict in report.verdicts}


def depends(rule, other):
    """Whether `rule` makes no sense where `other` fails."""
    needs = BY_NAME[rule].needs
    return other in needs or any(depends(need, other) for need in needs)


# --- a good one ----------------------------------------------------------------------------------


async def test_a_good_environment_passes_every_rule_that_applies():
    found = await report(Parrot())
    assert found.passed
    skipped = {name for name, (outcome, _) in outcomes(found).items() if outcome == "skipped"}
    assert skipped == {"environment-unknown", "offers-no-more"}
    assert [verdict.rule for verdict in found.verdicts] == list(BY_NAME)


class SingleTurns(Parrot):
    def info(self):
        info = super().info()
        info.has_episodes = False
        return info

    async def Episode(self, requests, context):
        await self.refuse(context, Code.UNIMPLEMENTED, "Episode")
        yield


class OnlyEpisodes(Parrot):
    def info(self):
        info = super().info()
        info.has_score = False
        return info

    async def Score(self, request, context):
        await self.refuse(context, Code.UNIMPLEMENTED, "Score")


@pytest.mark.parametrize(
    ("servicer", "first", "reason"),
    [
        (SingleTurns, "begins", "it has no episodes"),
        (OnlyEpisodes, "scores", "it has no Score"),
    ],
)
async def test_what_an_environment_does_not_offer_is_skipped_and_the_rest_passes(
    servicer, first, reason
):
    found = await report(servicer())
    told = outcomes(found)
    assert found.passed
    assert told[first] == ("skipped", reason)
    for name, (outcome, why) in told.items():
        if depends(name, first):
            assert (outcome, why.endswith("is skipped")) == ("skipped", True), name
    assert told["offers-no-more"] == ("passed", "")


async def test_nothing_is_promised_without_limits_and_determinism():
    class Unbounded(Parrot):
        def info(self):
            info = super().info()
            info.ClearField("limits")
            info.deterministic = False
            for split in info.splits:
                split.num_tasks = 0
            return info

    found = outcomes(await report(Unbounded()))
    skipped = {name for name, (outcome, _) in found.items() if outcome == "skipped"}
    assert skipped == {
        "environment-unknown",
        "offers-no-more",
        "tasks-counted",
        "scores-in-order",
        "score-refuses-too-many",
        "keeps-max-turns",
        "deterministic",
        "limit-kept",
    }


async def test_a_limit_beyond_what_is_opened_says_how_to_check_it():
    found = outcomes(await report(Parrot(), num_episodes=LIMIT - 2))
    assert found["limit-kept"] == (
        "skipped",
        f"its limit is {LIMIT}, and {LIMIT - 2} are opened here: --episodes {LIMIT}",
    )


# --- broken ones ---------------------------------------------------------------------------------


def told(**fields):
    """One whose Describe says something else."""

    class Told(Parrot):
        def info(self):
            info = super().info()
            for name, value in fields.items():
                if isinstance(value, list):
                    del getattr(info, name)[:]
                    getattr(info, name).extend(value)
                else:
                    setattr(info, name, value)
            return info

    return Told


class TellsOtherwise(Parrot):
    """Each Describe tells another version."""

    def __init__(self):
        super().__init__()
        self.versions = itertools.count()

    def info(self):
        info = super().info()
        info.version = str(next(self.versions))
        return info


class TwoOfAnyName(Parrot):
    def infos(self):
        other = self.info()
        other.name = "other"
        return [self.info(), other]


class ScoresYetDoesNotSay(Parrot):
    def info(self):
        info = super().info()
        info.has_score = False
        return info


class ListsNothing(Parrot):
    async def ListTasks(self, request, context):
        if request.split == "heldout":
            return pb.ListTasksResponse()
        return await super().ListTasks(request, context)


class OtherSplit(Parrot):
    def tasks(self, split):
        tasks = super().tasks(split)
        tasks[1].split = "elsewhere"
        return tasks


class IgnoresPageSize(Parrot):
    async def ListTasks(self, request, context):
        request.page_size = 0
        return await super().ListTasks(request, context)


class TakesAnyToken(Parrot):
    async def ListTasks(self, request, context):
        if not request.page_token.isdigit():
            request.page_token = ""
        return await super().ListTasks(request, context)


class Shuffles(Parrot):
    def tasks(self, split):
        tasks = super().tasks(split)
        tasks[0].fields["now"] = str(random.random())
        return tasks


class OneIdTwice(Parrot):
    def tasks(self, split):
        tasks = super().tasks(split)
        tasks[0].id = "the same"
        return tasks


class LongId(Parrot):
    def tasks(self, split):
        tasks = super().tasks(split)
        tasks[-1].id = split * 100
        return tasks


class GetsLess(Parrot):
    async def GetTask(self, request, context):
        response = await super().GetTask(request, context)
        response.task.ClearField("fields")
        return response


class CrashesAtUnknownTasks(Parrot):
    async def GetTask(self, request, context):
        if request.task_id not in {
            task.id for name in ("train", "heldout") for task in self.tasks(name)
        }:
            raise KeyError(request.task_id)
        return await super().GetTask(request, context)


class AnySplit(Parrot):
    async def ListTasks(self, request, context):
        if request.split in {"train", "heldout"}:
            return await super().ListTasks(request, context)
        return pb.ListTasksResponse()


def scoring(change):
    """One that says something else of an item."""

    class Scoring(Parrot):
        def worth(self, item):
            return change(super().worth(item), item)

    return Scoring


class LosesAScore(Parrot):
    async def Score(self, request, context):
        response = await super().Score(request, context)
        if len(response.scored) > 1:
            del response.scored[-1]
        return response


def crashes_at_nothing(scored, item):
    if not item.messages[-1].content:
        raise ValueError("nothing")
    return scored


class SortsScores(Parrot):
    async def Score(self, request, context):
        response = await super().Score(request, context)
        scored = sorted(response.scored, key=lambda each: each.reward)
        return pb.ScoreResponse(scored=scored)


class ScoresRelativeToTheBatch(Parrot):
    async def Score(self, request, context):
        response = await super().Score(request, context)
        highest = max(each.reward for each in response.scored) or 1
        return pb.ScoreResponse(
            scored=[pb.Scored(reward=each.reward / highest) for each in response.scored]
        )


class OneBatchAtATime(Parrot):
    def __init__(self):
        super().__init__()
        self.scoring = 0

    async def Score(self, request, context):
        self.scoring += 1
        try:
            await asyncio.sleep(0.05)
            if self.scoring > 1:
                await self.refuse(context, Code.UNAVAILABLE, "busy")
            return await super().Score(request, context)
        finally:
            self.scoring -= 1


def score_takes(condition):
    """One that scores what it is to refuse, where `condition` holds of the request."""

    class Takes(Parrot):
        async def Score(self, request, context):
            if condition(request):
                return pb.ScoreResponse(scored=[pb.Scored() for _ in request.items])
            return await super().Score(request, context)

    return Takes


class LooksTasksUp(Parrot):
    def worth(self, item):
        known = {task.id for name in ("train", "heldout") for task in self.tasks(name)}
        return {task: super(LooksTasksUp, self).worth(item) for task in known}[item.task.id]


class TakesGarbage(Parrot):
    def __init__(self, method):
        super().__init__()
        self.tolerant = method


class SeesNothing(Parrot):
    async def played(self, start, requests, context):
        async for response in super().played(start, requests, context):
            del response.observation[:]
            response.reward = 0.25
            yield response


def answering(change):
    """One that answers actions otherwise: `change(response, action, turn)`."""

    class Answering(Parrot):
        def answer(self, action, turn, seed):
            return change(super().answer(action, turn, seed), action, turn)

    return Answering


def with_role(role, call=""):
    def change(response, action, turn):
        message = pb.Message(role=role, content="x", tool_call_id=call)
        return pb.EpisodeResponse(observation=[message], reward=response.reward)

    return change


def with_nan(response, action, turn):
    response.reward = float("nan")
    return response


def crashes_at_bad_arguments(response, action, turn):
    for call in action.tool_calls:
        if not call.arguments_json.startswith("{"):
            raise ValueError(call.arguments_json)
    return response


class StaysOpenWhenDone(Parrot):
    async def played(self, start, requests, context):
        async for response in super().played(start, requests, context):
            yield response
        if response.done and response not in self.last():
            await asyncio.Event().wait()


class SaysMoreWhenDone(Parrot):
    async def played(self, start, requests, context):
        async for response in super().played(start, requests, context):
            yield response
            if response.done and response not in self.last():
                yield response


class GoesOnForEver(Parrot):
    async def played(self, start, requests, context):
        yield pb.EpisodeResponse(observation=[pb.Message(role="user", content="say a")])
        found = 0
        async for request in requests:
            await self.check_action(request, context)
            response = self.answer(request.action, 0, start.seed)
            found += "a" in request.action.content
            response.done = found == 2
            yield response
            if response.done:
                return


def ending(*responses, hang=False):
    """One that says something else after the client's last word."""

    class Ending(Parrot):
        def last(self):
            return list(responses)

        async def played(self, start, requests, context):
            is_done = False
            async for response in super().played(start, requests, context):
                is_done = response.done
                yield response
            if hang and not is_done:
                await asyncio.Event().wait()

    return Ending


class HangsWithoutStart(Parrot):
    async def Episode(self, requests, context):
        first = await anext(requests, None)
        if first is None:
            await asyncio.Event().wait()

        async def again():
            yield first
            async for request in requests:
                yield request

        async for response in super().Episode(again(), context):
            yield response


class NeverTheSame(Parrot):
    count = itertools.count()

    def answer(self, action, turn, seed):
        return super().answer(action, turn, next(self.count))


class TakesActionFirst(Parrot):
    async def Episode(self, requests, context):
        first = await anext(requests, None)
        if first is None:
            return
        if first.HasField("action"):
            first = pb.EpisodeRequest(start=pb.Start(task_id="train/0"))

        async def again():
            yield first
            async for request in requests:
                yield request

        async for response in super().Episode(again(), context):
            yield response


def taking(condition):
    """One that takes a request for an action which it is to refuse."""

    class Taking(Parrot):
        async def check_action(self, request, context):
            if not condition(request):
                await super().check_action(request, context)

    return Taking


class AnyTask(Parrot):
    async def Episode(self, requests, context):
        async def known():
            async for request in requests:
                if request.HasField("start"):
                    request.start.task_id = "train/0"
                yield request

        async for response in super().Episode(known(), context):
            yield response


class StallsBesideOthers(Parrot):
    async def played(self, start, requests, context):
        if self.playing > LIMIT // 2:
            await asyncio.Event().wait()
        async for response in super().played(start, requests, context):
            yield response


class NoLimit(Parrot):
    async def Episode(self, requests, context):
        self.playing = 0
        async for response in super().Episode(requests, context):
            yield response


def leaking(condition):
    """One that counts an episode for ever which breaks off while `condition` holds."""

    class Leaking(Parrot):
        async def played(self, start, requests, context):
            whole = False
            try:
                async for response in super().played(start, requests, context):
                    yield response
                whole = True
            finally:
                if not whole and condition(self, context):
                    self.playing += 1

    return Leaking


class ForgetsItself(Parrot):
    """Tells another version once it had many episodes."""

    def __init__(self):
        super().__init__()
        self.most = 0

    def info(self):
        info = super().info()
        info.version = "2" if self.most == LIMIT else "1"
        return info

    async def played(self, start, requests, context):
        self.most = max(self.most, self.playing)
        async for response in super().played(start, requests, context):
            yield response


TOOL = pb.Tool(name="say")
KIND = pb.OBSERVATION_KIND_TEXT
DONE = pb.EpisodeResponse(done=True)
NAN = float("nan")

BROKEN = [
    ("described", told(version="")),
    ("described", told(splits=[])),
    ("described", told(splits=[pb.Split(name="train"), pb.Split(name="train")])),
    ("described", told(splits=[pb.Split(name="Train")])),
    ("described", told(observation_kinds=[])),
    ("described", told(has_score=False, has_episodes=False)),
    ("described", TellsOtherwise),
    ("tools-described", told(tools=[TOOL, TOOL])),
    ("tools-described", told(tools=[pb.Tool(name="two words")])),
    ("tools-described", told(tools=[pb.Tool(name="say", parameters_schema_json="{")])),
    ("tools-described", told(tools=[pb.Tool(name="say", parameters_schema_json='{"type": 3}')])),
    ("tools-described", told(tools=[pb.Tool(name="say", parameters_schema_json="[]")])),
    (
        "tools-described",
        told(tools=[pb.Tool(name="say", parameters_schema_json='{"type": "array"}')]),
    ),
    ("environment-unknown", TwoOfAnyName),
    ("offers-no-more", ScoresYetDoesNotSay),
    ("tasks-listed", ListsNothing),
    ("tasks-listed", OtherSplit),
    ("tasks-stable", Shuffles),
    ("tasks-paged", IgnoresPageSize),
    ("tasks-paged", TakesAnyToken),
    ("task-ids", OneIdTwice),
    ("task-ids", LongId),
    ("tasks-counted", told(splits=[pb.Split(name="train", num_tasks=8)])),
    ("tasks-counted", told(splits=[pb.Split(name="train", num_tasks=6)])),
    ("task-got", GetsLess),
    ("task-unknown", CrashesAtUnknownTasks),
    ("split-unknown", AnySplit),
    ("scores", scoring(lambda scored, item: pb.Scored(reward=NAN))),
    ("scores", scoring(lambda scored, item: pb.Scored(rewards={"part": NAN}))),
    ("scores", scoring(lambda scored, item: pb.Scored(failure="no"))),
    ("scores", LosesAScore),
    ("scores-any-answer", scoring(crashes_at_nothing)),
    ("scores-in-order", SortsScores),
    ("scores-in-order", ScoresRelativeToTheBatch),
    ("scores-at-once", OneBatchAtATime),
    ("score-refuses-nothing", score_takes(lambda request: not request.items)),
    ("score-refuses-too-many", score_takes(lambda request: len(request.items) > 20)),
    (
        "score-refuses-no-answer",
        score_takes(lambda request: request.items and not request.items[0].messages),
    ),
    ("scores-foreign-tasks", LooksTasksUp),
    ("score-malformed", lambda: TakesGarbage("Score")),
    ("begins", SeesNothing),
    ("observes", answering(with_role("assistant"))),
    ("observes", answering(with_role("tool", "call_99"))),
    ("observes", answering(with_nan)),
    ("survives-any-action", answering(crashes_at_bad_arguments)),
    ("ends-when-done", StaysOpenWhenDone),
    ("ends-when-done", SaysMoreWhenDone),
    ("keeps-max-turns", GoesOnForEver),
    ("half-closes", ending(pb.EpisodeResponse(reward=1))),
    ("half-closes", ending(DONE, DONE)),
    ("half-closes", ending(hang=True)),
    ("half-closes-at-once", HangsWithoutStart),
    ("deterministic", NeverTheSame),
    ("refuses-action-first", TakesActionFirst),
    ("refuses-second-start", taking(lambda request: request.HasField("start"))),
    ("refuses-wrong-role", taking(lambda request: request.action.role == "user")),
    ("refuses-wrong-role", taking(lambda request: not request.WhichOneof("request"))),
    ("refuses-unknown-task", AnyTask),
    ("episode-malformed", lambda: TakesGarbage("Episode")),
    ("concurrent", StallsBesideOthers),
    ("freed-when-cancelled", leaking(lambda parrot, _: parrot.playing > LIMIT // 2)),
    ("limit-kept", NoLimit),
    ("freed-at-deadline", leaking(lambda _, context: context.time_remaining() is not None)),
    ("alive", ForgetsItself),
]


def name_of(value):
    return value if isinstance(value, str) else getattr(value, "__name__", "")


@pytest.mark.parametrize(("rule", "make"), BROKEN, ids=name_of)
async def test_a_broken_environment_fails_its_rule_and_no_other(rule, make):
    found = outcomes(await report(make()))
    assert found[rule][0] == "failed"
    assert found[rule][1]
    failed = {name for name, (outcome, _) in found.items() if outcome == "failed"}
    assert failed == {rule}, found
    for name, (outcome, reason) in found.items():
        if depends(name, rule):
            assert outcome == "skipped", (name, reason)


@pytest.mark.parametrize("health", [None, "NOT_SERVING"])
async def test_a_server_that_does_not_say_serving_fails_that_rule_and_no_other(health):
    found = outcomes(await report(Parrot(), health=health))
    assert {name for name, (outcome, _) in found.items() if outcome == "failed"} == {"health"}


def test_every_rule_has_an_environment_that_breaks_it():
    elsewhere = {"health", "nothing-leaks"}
    assert {rule for rule, _ in BROKEN} | elsewhere == set(BY_NAME)


# --- leaks, seen in the process ------------------------------------------------------------------


@pytest.mark.parametrize("what", ["nothing", "memory", "files"])
async def test_what_a_process_leaks_is_seen(what):
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "tests.fakes.leaking_environment",
        what,
        stdout=asyncio.subprocess.PIPE,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    try:
        port = int(await process.stdout.readline())
        (found,) = await check(
            f"127.0.0.1:{port}", answer_s=10, num_episodes=LIMIT, pid=process.pid
        )
    finally:
        process.kill()
        await process.wait()
    failed = [verdict.rule for verdict in found.verdicts if verdict.outcome == "failed"]
    assert failed == ([] if what == "nothing" else ["nothing-leaks"])


# --- the server itself ---------------------------------------------------------------------------


async def test_a_server_that_is_not_there_or_has_no_such_environment_is_an_error():
    async with served(Parrot()) as port:
        with pytest.raises(NotFound, match="it has parrot"):
            await check(f"127.0.0.1:{port}", environment="other")
    with pytest.raises(Unavailable, match="Describe"):
        await check(f"127.0.0.1:{port}", answer_s=0.5)


async def test_all_environments_of_a_server_are_checked_and_each_verdict_is_told():
    told = []
    async with served(TwoOfAnyName()) as port:
        reports = await check(
            f"127.0.0.1:{port}",
            num_episodes=LIMIT,
            tell=lambda name, verdict: told.append((name, verdict)),
        )
    assert [each.environment for each in reports] == ["parrot", "other"]
    assert told == [(each.environment, v) for each in reports for v in each.verdicts]


def test_the_text_of_each_rule_is_a_sentence():
    for rule in RULES:
        assert rule.text.endswith(".")
        assert "\n" not in rule.text
        assert set(rule.needs) <= set(BY_NAME)
