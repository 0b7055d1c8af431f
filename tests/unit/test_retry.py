"""Patience with a peer that is away, in virtual time."""

from __future__ import annotations

import asyncio
from itertools import islice

import pytest

from rollmesh.errors import (
    DeadlineExceeded,
    EnvironmentUnavailable,
    InvalidRequest,
    Overloaded,
    Unavailable,
)
from services.coordinator.retry import RETRY_FOR_S, THERE_S, Outage, Patience, backoff
from tests.fakes.virtual_time import simulate


class Peer:
    def __init__(self, *answers, attempt_s=0.0):
        self.answers = list(answers)
        self.attempt_s = attempt_s
        self.warnings = []
        self.problems = {}
        self.patience = Patience("reward", self.warn, self.problems)

    async def warn(self, warned):
        self.warnings.append((warned.reason, warned.message))

    async def ask(self):
        answer = self.answers.pop(0)
        if self.attempt_s:
            await asyncio.sleep(self.attempt_s)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def call(self):
        return self.patience.call(self.ask)


def test_backoff_doubles_up_to_two_seconds():
    assert list(islice(backoff(), 7)) == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.6, 2, 2])


@pytest.mark.parametrize("error", [Unavailable("a"), Overloaded("a"), DeadlineExceeded("a")])
def test_a_call_is_repeated_until_the_peer_is_back_and_each_absence_is_told_once(error):
    async def scenario():
        peer = Peer(error, error, 1, 2, error, 3)
        assert [await peer.call(), await peer.call(), await peer.call()] == [1, 2, 3]
        assert [reason for reason, _ in peer.warnings] == ["REWARD_UNAVAILABLE"] * 2
        assert peer.warnings[0][1].endswith(": a")

    simulate(scenario())


def test_what_a_repetition_cannot_mend_is_raised_at_once():
    async def scenario():
        peer = Peer(InvalidRequest("no"), 1)
        with pytest.raises(InvalidRequest):
            await peer.call()
        assert peer.warnings == []

    simulate(scenario())


def test_patience_ends():
    async def scenario():
        peer = Peer(*[Unavailable("gone")] * 1000)
        with pytest.raises(Unavailable, match="the reward has been away for 120 s: gone"):
            await peer.call()
        assert asyncio.get_running_loop().time() <= RETRY_FOR_S

    simulate(scenario())


def test_patience_counts_from_the_first_failure_however_long_the_attempt_was():
    async def scenario():
        peer = Peer(Overloaded("a"), 1, attempt_s=2 * RETRY_FOR_S)
        assert await peer.call() == 1

    simulate(scenario())


def test_patience_counts_anew_after_an_attempt_that_had_found_the_peer():
    async def scenario():
        peer = Peer(*[Unavailable("it was killed")] * 20, 1, attempt_s=THERE_S + 1)
        assert await peer.call() == 1
        assert len(peer.warnings) == 20, "each of them is an absence of its own"
        assert peer.problems == {}

    simulate(scenario())


@pytest.mark.parametrize(
    ("error", "attempt_s"),
    [
        pytest.param(Unavailable("a"), THERE_S - 1, id="to notice it took so long"),
        pytest.param(Overloaded("a"), THERE_S + 1, id="it waited for room"),
        pytest.param(DeadlineExceeded("a"), THERE_S + 1, id="it waited for an answer"),
    ],
)
def test_patience_ends_where_attempts_only_waited(error, attempt_s):
    async def scenario():
        peer = Peer(*[error] * 20, attempt_s=attempt_s)
        with pytest.raises(Unavailable, match="has been away for 120 s"):
            await peer.call()
        assert len(peer.warnings) == 1
        assert peer.problems == {}

    simulate(scenario())


def test_a_call_that_met_two_peers_away_leaves_no_problem_behind():
    async def scenario():
        peer = Peer(EnvironmentUnavailable("a"), Unavailable("b"), EnvironmentUnavailable("c"), 1)
        assert await peer.call() == 1
        assert [reason for reason, _ in peer.warnings] == [
            "ENVIRONMENT_UNAVAILABLE",
            "REWARD_UNAVAILABLE",
        ]
        assert peer.problems == {}

    simulate(scenario())


def test_a_call_that_is_cancelled_while_it_waits_leaves_no_problem_behind():
    async def scenario():
        peer = Peer(*[Unavailable("a")] * 20)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(5):
                await peer.call()
        assert peer.problems == {}

    simulate(scenario())


def test_of_many_calls_that_fail_in_two_ways_each_peer_is_told_once():
    async def scenario():
        clock = asyncio.get_running_loop().time
        peer = Peer()

        async def call(number):
            async def ask():
                if clock() < 60:
                    raise [EnvironmentUnavailable("a"), Overloaded("b")][number % 2]

            await peer.patience.call(ask)

        async with asyncio.TaskGroup() as tasks:
            for number in range(20):
                tasks.create_task(call(number))
            await asyncio.sleep(30)
            assert set(peer.problems) == {"environment", "reward"}
        assert sorted(reason for reason, _ in peer.warnings) == [
            "ENVIRONMENT_UNAVAILABLE",
            "REWARD_UNAVAILABLE",
        ]
        assert peer.problems == {}

    simulate(scenario())


def test_an_outage_is_told_once_until_nobody_waits_any_more():
    async def scenario():
        peer = Peer()
        outage = Outage("sampler", peer.warn, peer.problems)
        async with outage.noticed() as first:
            async with outage.noticed() as second:
                await first("a")
                await second("b")
                await second("c")
            await first("d")
        async with outage.noticed():
            pass
        assert peer.warnings == [("SAMPLER_UNAVAILABLE", "the job waits for a sampler: a")]
        async with outage.noticed() as third:
            await third("e")
        assert len(peer.warnings) == 2

    simulate(scenario())
