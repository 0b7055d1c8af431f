"""Samplers that are lost in the middle: what had come is kept, in virtual time.

Tokens of the fakes are a function of seed, index and place, so what two samplers drew together has
to equal what one would have drawn.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from dataclasses import replace

import pytest

from rollmesh.errors import (
    DigestMismatch,
    InternalError,
    NotFound,
    Overloaded,
    SourceUnavailable,
    Unavailable,
)
from rollmesh.types import SILENCE_S, Continuation, SamplingParams, join_chunks
from services.coordinator.endurance import ATTEMPTS, REFUSALS
from services.coordinator.placement import FULL_FOR_S
from services.coordinator.retry import RETRY_FOR_S
from tests.fakes.fleet import PARAMS, SOURCE, SamplingWorld, at
from tests.fakes.samplers import FakeSampler, drawn
from tests.fakes.virtual_time import simulate


async def draw(world, through, count=2, params=PARAMS):
    """Completions by either way."""
    if through == "sample":
        return await world.sample(count, params)
    return joined(await world.collected(count, params=params), count)


def joined(chunks, count):
    return [join_chunks([c for c in chunks if c.index == index]) for index in range(count)]


def samplers_of(completion):
    return [(span.sampler, span.num_tokens) for span in completion.spans]


@pytest.mark.parametrize("through", ["sample", "stream"])
@pytest.mark.parametrize("loss", ["die", "stall"])
@pytest.mark.parametrize("after_s", [0.5, 1.5, 2.5, 3.5, 4.5])
def test_a_completion_goes_on_elsewhere_as_if_nothing_had_happened(through, loss, after_s):
    async def scenario():
        first, second = FakeSampler(), FakeSampler()
        world = SamplingWorld(first, second)
        async with world.running() as tasks:
            tasks.create_task(at(after_s, first.die if loss == "die" else first.stall))
            completions = await draw(world, through)
            clock = asyncio.get_running_loop().time()
            assert [c.token_ids for c in completions] == [drawn(7, 0), drawn(7, 1)]
            had = int(after_s)
            expected = [("s0-1", had)] * (had > 0) + [("s1-1", 5 - had)]
            assert [samplers_of(c) for c in completions] == [expected, expected]
            assert (first.begun, second.begun) == (1, 1)
            assert clock <= 6 + (0 if loss == "die" else SILENCE_S) + 0.2

    simulate(scenario())


def test_only_what_is_unfinished_is_drawn_on_with_what_it_has_and_the_parameters_of_the_whole():
    async def scenario():
        first, second = FakeSampler(), FakeSampler()
        first.lengths = second.lengths = {0: 2}
        world = SamplingWorld(first, second)
        params = SamplingParams(max_tokens=5, prompt_logprobs=0)
        async with world.running() as tasks:
            tasks.create_task(at(3.5, first.die))
            completions = await world.sample(3, params)
        assert [c.token_ids for c in completions] == [drawn(1234, 0, 2), *drawn_of(1234, 1, 2)]
        asked = replace(params, seed=1234)
        assert first.asked == [(SOURCE, "p", asked, ())]
        rest = tuple(Continuation(index, drawn(1234, index)[:3]) for index in (1, 2))
        assert second.asked == [(SOURCE, "p", replace(asked, prompt_logprobs=None), rest)]
        assert [c.prompt_logprobs is not None for c in completions] == [True, False, False]

    simulate(scenario())


def drawn_of(seed, *indices):
    return [drawn(seed, index) for index in indices]


@pytest.mark.parametrize("through", ["sample", "stream"])
def test_the_likeliest_tokens_of_a_lost_sampler_are_kept(through):
    async def scenario():
        first, second = FakeSampler(), FakeSampler()
        world = SamplingWorld(first, second)
        params = replace(PARAMS, top_logprobs=2)
        async with world.running() as tasks:
            tasks.create_task(at(2.5, first.die))
            completions = await draw(world, through, params=params)
        assert len({span.sampler for c in completions for span in c.spans}) == 2
        for completion in completions:
            rows = tuple((token, token + 1) for token in completion.token_ids)
            assert completion.top_token_ids == rows
            assert completion.top_logprobs == tuple((-float(a), -float(b)) for a, b in rows)

    simulate(scenario())


@pytest.mark.parametrize(
    "lie",
    [
        {"top_token_ids": (), "top_logprobs": ()},
        {"top_logprobs": ()},
        {"top_token_ids": ((1,),)},
    ],
)
def test_a_sampler_that_leaves_out_the_likeliest_is_not_believed(lie):
    async def scenario():
        first, second = FakeSampler(), FakeSampler()
        first.lie = lambda chunk: replace(chunk, **lie)
        world = SamplingWorld(first, second)
        async with world.running():
            completions = await draw(world, "sample", params=replace(PARAMS, top_logprobs=2))
        assert {span.sampler for c in completions for span in c.spans} == {second.instance_id}
        assert {len(c.top_token_ids) for c in completions} == {5}

    simulate(scenario())


def test_prompt_logprobs_that_did_not_come_are_asked_for_again():
    async def scenario():
        first, second = FakeSampler(), FakeSampler()
        world = SamplingWorld(first, second)
        async with world.running() as tasks:
            tasks.create_task(at(0.5, first.die))
            (completion,) = await world.sample(1, SamplingParams(seed=1, prompt_logprobs=0))
            assert completion.prompt_logprobs is not None
            assert second.asked[0][2].prompt_logprobs == 0

    simulate(scenario())


def test_a_completion_that_was_drawn_to_its_end_which_did_not_arrive_is_asked_for_its_end():
    async def scenario():
        first, second = FakeSampler(), FakeSampler()
        first.lie = lambda chunk: replace(chunk, stop_reason=None)
        world = SamplingWorld(first, second)
        async with world.running():
            (completion,) = await world.sample(1)
            assert completion.token_ids == drawn(7, 0)
            assert completion.stop_reason == "length"
            assert samplers_of(completion) == [("s0-1", 5)]
            assert second.asked[0][3] == (Continuation(0, drawn(7, 0)),)

    simulate(scenario())


@pytest.mark.parametrize("through", ["sample", "stream"])
def test_a_stream_that_ends_early_is_drawn_on(through):
    async def scenario():
        sampler = FakeSampler()
        sampler.torn_streams = 1
        world = SamplingWorld(sampler)
        async with world.running():
            assert [c.token_ids for c in await draw(world, through)] == drawn_of(7, 0, 1)
        assert sampler.asked[1][3] == tuple(Continuation(n, drawn(7, n)[:4]) for n in (0, 1))

    simulate(scenario())


@pytest.mark.parametrize("through", ["sample", "stream"])
def test_a_completion_survives_both_samplers_in_turn(through):
    async def scenario():
        first, second = FakeSampler(num_tokens=9), FakeSampler(num_tokens=9)
        world = SamplingWorld(first, second)
        async with world.running() as tasks:
            tasks.create_task(at(2.5, first.die))
            tasks.create_task(at(4.0, first.revive))
            tasks.create_task(at(5.8, second.die))
            (completion,) = await draw(world, through, 1)
            assert completion.token_ids == drawn(7, 0, 9)
            assert [name for name, _ in samplers_of(completion)] == ["s0-1", "s1-1", "s0-2"]

    simulate(scenario())


@pytest.mark.parametrize("through", ["sample", "stream"])
@pytest.mark.parametrize("loss", ["dies", "has an internal error"])
def test_a_sampler_that_flaps_and_gets_a_chunk_out_each_time_is_enough(through, loss):
    async def scenario():
        sampler = FakeSampler(num_tokens=20)
        world = SamplingWorld(sampler)

        async def flap():
            while True:
                await asyncio.sleep(2.3)
                if loss == "dies":
                    sampler.die()
                    await asyncio.sleep(1)
                    sampler.revive()
                else:
                    sampler.faults.append(InternalError("a bug"))

        async with world.running() as tasks:
            flapping = tasks.create_task(flap())
            completions = await draw(world, through)
            flapping.cancel()
        assert [c.token_ids for c in completions] == [drawn(7, 0, 20), drawn(7, 1, 20)]
        assert sampler.begun > 2 * ATTEMPTS, "it was lost more often than without progress"

    simulate(scenario())


@pytest.mark.parametrize("seed", range(20))
def test_no_request_fails_or_differs_however_often_samplers_die_or_stall(seed):
    async def scenario():
        rng = random.Random(seed)
        world = SamplingWorld(*(FakeSampler() for _ in range(3)), bound=4)

        async def havoc():
            while True:
                await asyncio.sleep(rng.expovariate(1 / 3))
                sampler = rng.choice(world.samplers)
                if sampler.alive and not sampler.stalled:
                    rng.choice([sampler.die, sampler.stall])()
                else:
                    sampler.revive()

        async with world.running() as tasks:
            havoc_task = tasks.create_task(havoc())
            async with asyncio.TaskGroup() as requests:
                counts = [rng.randint(1, 6) for _ in range(20)]
                asked = [requests.create_task(world.sample(count)) for count in counts]
            havoc_task.cancel()
        for count, completions in zip(counts, asked, strict=True):
            assert [c.token_ids for c in completions.result()] == drawn_of(7, *range(count))

    simulate(scenario())


def test_an_interactive_caller_waits_for_the_fleet_but_not_for_ever():
    async def scenario():
        sampler = FakeSampler()
        world = SamplingWorld(sampler)
        async with world.running() as tasks:
            tasks.create_task(at(2.5, sampler.die))
            tasks.create_task(at(60, sampler.revive))
            (completion,) = await draw(world, "stream", 1)
            assert samplers_of(completion) == [("s0-1", 2), ("s0-2", 3)]
            sampler.num_tokens = 1000
            tasks.create_task(at(100, sampler.die))
            with pytest.raises(Unavailable, match=r"for 120 s no sampler of 'tiny' has served"):
                await world.collected()
            assert asyncio.get_running_loop().time() == pytest.approx(100 + RETRY_FOR_S, abs=1)

    simulate(scenario())


def test_the_wait_for_the_fleet_begins_anew_each_time_that_it_is_lost():
    async def scenario():
        sampler = FakeSampler(num_tokens=3)
        world = SamplingWorld(sampler)
        async with world.running() as tasks:
            for number in range(3):
                tasks.create_task(at(1.5 + 100 * number, sampler.die))
                tasks.create_task(at(99.9 + 100 * number, sampler.revive))
            assert [c.token_ids for c in await draw(world, "stream")] == [
                drawn(7, 0, 3),
                drawn(7, 1, 3),
            ]

    simulate(scenario())


@pytest.mark.parametrize("error", [Unavailable("gone"), SourceUnavailable("t is away")])
def test_an_interactive_caller_is_told_after_a_few_attempts_in_a_row_without_a_token(error):
    async def scenario():
        sampler = FakeSampler()
        world = SamplingWorld(sampler)
        async with world.running() as tasks:
            tasks.create_task(at(2.5, lambda: sampler.faults.extend([error] * 99)))
            with pytest.raises(type(error), match=str(error)):
                await world.collected(1)
            assert sampler.begun == ATTEMPTS

    simulate(scenario())


@pytest.mark.parametrize("through", ["sample", "stream"])
def test_what_one_sampler_cannot_have_right_another_is_asked_for(through):
    async def scenario():
        first, second = FakeSampler(), FakeSampler()
        first.faults = [DigestMismatch("the engine loaded something else")] * 9
        world = SamplingWorld(first, second)
        async with world.running():
            assert [c.token_ids for c in await draw(world, through)] == drawn_of(7, 0, 1)
            assert (first.begun, second.begun) == (1, 1)
            assert world.serving == ["s0", "s1"]

    simulate(scenario())


def span_of(**changes):
    return lambda chunk: replace(chunk, spans=(replace(chunk.spans[0], **changes),))


LIES = {
    "version 2": span_of(policy_version=2),
    "digest 'other'": span_of(digest="other"),
    "spans over 2 tokens": span_of(num_tokens=2),
    "spans over 0 tokens": lambda chunk: replace(chunk, spans=()),
    "0 logprobs": lambda chunk: replace(chunk, logprobs=()),
    "0 tokens came from": lambda chunk: replace(
        chunk, spans=(*chunk.spans, replace(chunk.spans[0], num_tokens=0))
    ),
    "completion 9, which was not": lambda chunk: replace(chunk, index=9),
    "completion 1, which was not": lambda chunk: replace(chunk, index=1, stop_reason="stop"),
}


@pytest.mark.parametrize("through", ["sample", "stream"])
@pytest.mark.parametrize("told", LIES)
def test_what_was_not_asked_for_is_dropped_and_its_sampler_kept_out_as_long_as_it_lives(
    told, through
):
    async def scenario():
        liar, honest = FakeSampler(), FakeSampler()
        world = SamplingWorld(liar, honest)
        async with world.running() as tasks:
            tasks.create_task(at(2.5, lambda: setattr(liar, "lie", LIES[told])))
            completions = await draw(world, through)
            assert completions[0].token_ids == drawn(7, 0)
            if "completion 1" not in told:  # That one was ended by the liar's word.
                assert completions[1].token_ids == drawn(7, 1)
            assert {s.sampler for c in completions for s in c.spans} == {
                "s0-1",
                "s1-1",
            }
            assert {(s.policy_version, s.digest) for c in completions for s in c.spans} == {
                (SOURCE.policy_version, SOURCE.digest)
            }
            await asyncio.sleep(100)
            assert world.serving == ["s1"]
            assert world.problem("s0").startswith("quarantined: ")
            assert told in world.problem("s0")
            liar.revive()
            await asyncio.sleep(1)
            assert world.serving == ["s0", "s1"]

    simulate(scenario())


def test_logprobs_of_another_version_are_not_believed_either():
    async def scenario():
        liar, honest = FakeSampler(), FakeSampler()
        liar._span = lambda source, n: honest._span(replace(source, policy_version=2), n)
        world = SamplingWorld(liar, honest)
        async with world.running():
            found = await world.sampling.compute_logprobs("p", "tiny", SOURCE, [1, 2])
            assert found.span.policy_version == 3
            assert world.serving == ["s1"]

    simulate(scenario())


def test_logprobs_are_asked_for_elsewhere_when_their_sampler_stalls():
    async def scenario():
        first, second = FakeSampler(), FakeSampler()
        world = SamplingWorld(first, second)
        async with world.running() as tasks:
            tasks.create_task(at(0.2, first.stall))
            found = await world.sampling.compute_logprobs("p", "tiny", SOURCE, [1, 2])
            assert found.span.sampler == "s1-1"
            assert asyncio.get_running_loop().time() < 0.2 + 2 + 1.2, "lost within 2 s, then 1 s"

    simulate(scenario())


def test_logprobs_that_lost_their_sampler_are_not_refused_by_a_full_queue():
    async def scenario():
        sampler = FakeSampler()
        sampler.faults = [Unavailable("gone")]
        world = SamplingWorld(sampler, bound=1, queue=1)
        async with world.running() as tasks:
            call = tasks.create_task(world.sampling.compute_logprobs("p", "tiny", SOURCE, [1, 2]))
            await asyncio.sleep(0.5)
            first = tasks.create_task(world.collected(1))
            await asyncio.sleep(0.55)
            second = tasks.create_task(world.collected(1))
            assert (await call).logprobs == (1.0, 2.0)
            assert (first.done(), second.done()) == (True, False)
            await second

    simulate(scenario())


def test_a_sampler_without_room_is_no_failure_and_another_one_is_asked():
    async def scenario():
        first, second = FakeSampler(), FakeSampler()
        first.refusals = 1
        world = SamplingWorld(first, second)
        async with world.running():
            completions = await draw(world, "stream")
            assert [samplers_of(c) for c in completions] == [[("s1-1", 5)]] * 2
            assert asyncio.get_running_loop().time() == 5
            assert world.serving == ["s0", "s1"]

    simulate(scenario())


def test_where_no_sampler_has_room_requests_wait_and_keep_their_order():
    async def scenario():
        sampler = FakeSampler(num_tokens=1)
        sampler.refusals = REFUSALS - 1
        world = SamplingWorld(sampler, bound=1, queue=3)
        ended = []

        async def draw_one(name):
            await world.collected(1)
            ended.append(name)

        async with world.running() as tasks:
            for name in "abc":
                tasks.create_task(draw_one(name))
                await asyncio.sleep(0)
            await asyncio.sleep(0.5)
            with pytest.raises(Overloaded):
                await world.collected(1)
        assert ended == ["a", "b", "c"]
        assert asyncio.get_running_loop().time() == (REFUSALS - 1) * FULL_FOR_S + 3
        assert world.losses == []

    simulate(scenario())


@pytest.mark.parametrize("of", ["sample", "stream", "logprobs"])
def test_a_sampler_without_room_is_asked_soon_again_by_an_interactive_caller_only_so_often(of):
    async def scenario():
        sampler = FakeSampler(num_tokens=1)
        sampler.refusals = REFUSALS
        sampler.refusal = Overloaded("the queue is full")
        sampler.refusal.retry_after_s = 1000.0
        world = SamplingWorld(sampler)
        calls = {
            "sample": world.sample,
            "stream": world.collected,
            "logprobs": lambda: world.sampling.compute_logprobs("p", "tiny", SOURCE, [1, 2]),
        }
        async with world.running():
            if of == "sample":
                assert len(await world.sample()) == 2
                assert world.losses == []
            else:
                with pytest.raises(Overloaded, match="the queue is full"):
                    await calls[of]()
                assert sampler.begun == 0
            assert sampler.refusals == 0
            assert asyncio.get_running_loop().time() <= REFUSALS * FULL_FOR_S + 1

    simulate(scenario())


@pytest.mark.parametrize("through", ["sample", "stream"])
def test_a_version_that_its_trainer_has_not_yet_again_is_waited_for(through):
    async def scenario():
        sampler = FakeSampler()
        sampler.faults = [NotFound("version 3 is not published")] * (ATTEMPTS - 1)
        world = SamplingWorld(sampler)
        async with world.running():
            assert [c.token_ids for c in await draw(world, through)] == drawn_of(7, 0, 1)
            assert world.serving == ["s0"]
            sampler.faults = [NotFound("version 3 is not published")] * 1000
            start = asyncio.get_running_loop().time()
            with pytest.raises(SourceUnavailable, match="version 3 is not published"):
                await draw(world, through)
            took_s = asyncio.get_running_loop().time() - start
            if through == "sample":
                assert took_s == pytest.approx(RETRY_FOR_S, abs=5)
            else:
                assert sampler.begun == 2 * ATTEMPTS

    simulate(scenario())


@pytest.mark.parametrize("after_s", [None, 1.5])
def test_a_sampler_that_changed_meanwhile_is_not_put_out_for_what_the_one_before_sent(after_s):
    async def scenario():
        liar = FakeSampler()
        world = SamplingWorld(liar)

        def lie(chunk):
            # The poll has heard of another process by the time that the lie is seen.
            if after_s:
                liar.num_starts = 2
                world.fleet.samplers("tiny")[0].info = replace(
                    world.fleet.samplers("tiny")[0].info, instance_id=liar.instance_id
                )
                liar.lie = lambda chunk: chunk
            return replace(chunk, spans=())

        async with world.running() as tasks:
            tasks.create_task(at(0.1, lambda: setattr(liar, "lie", lie)))
            call = tasks.create_task(world.sample(1))
            await asyncio.sleep(20)
            assert call.done() == bool(after_s)
            assert world.serving == (["s0"] if after_s else [])
            if not after_s:
                liar.lie = lambda chunk: chunk
                liar.revive()

    simulate(scenario())


def test_what_has_begun_goes_before_what_waits_and_no_full_queue_refuses_it():
    async def scenario():
        sampler = FakeSampler()
        world = SamplingWorld(sampler, bound=1, queue=1)
        async with world.running() as tasks:
            begun = tasks.create_task(world.collected(1))
            await asyncio.sleep(1.5)
            waits = tasks.create_task(world.collected(1))
            await asyncio.sleep(1)
            sampler.die()
            await asyncio.sleep(1)
            sampler.revive()
            await begun
            assert not waits.done()
            assert [asked[3] != () for asked in sampler.asked] == [False, True, False]
            await waits

    simulate(scenario())


@pytest.mark.parametrize("after_s", [2.55, 2.7, 4.2])
@pytest.mark.parametrize("through", ["sample", "stream"])
def test_cancelling_in_the_middle_of_a_fail_over_leaves_nothing_behind(after_s, through):
    async def scenario():
        first, second = FakeSampler(), FakeSampler()
        world = SamplingWorld(first, second)
        async with world.running() as tasks:
            tasks.create_task(at(2.5, first.die))
            call = tasks.create_task(draw(world, through))
            await asyncio.sleep(after_s)
            call.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await call
            assert second.aborted == second.begun

    simulate(scenario())
