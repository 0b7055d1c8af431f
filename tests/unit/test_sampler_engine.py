"""The sampler's core over an engine that does as it is told."""

from __future__ import annotations

import asyncio
import contextlib
import math
from dataclasses import replace
from pathlib import Path

import pytest

from rollmesh.errors import (
    DigestMismatch,
    FailedPrecondition,
    InvalidRequest,
    Overloaded,
    Unavailable,
)
from rollmesh.types import (
    BASE_VERSION,
    HEARTBEAT_S,
    SILENCE_S,
    AdapterSource,
    Continuation,
    LoadTimes,
    PolicySpan,
    PromptLogprobs,
    SamplingParams,
)
from services.sampler.__main__ import EngineDiedError, serve
from services.sampler.config import SamplerConfig
from services.sampler.engine import DEAD_S, Sampler
from services.sampler.policies import REMEMBERED_S
from services.sampler.slots import Slots
from tests.fakes.engines import FakeAdapters, FakeEngine
from tests.fakes.virtual_time import simulate

A = AdapterSource("projects/p/adapters/a", 3, "a" * 64, "trainer:1")
B = AdapterSource("projects/p/adapters/b", 0, "b" * 64, "trainer:1")


def in_virtual_time(test):
    def run(*args, **kwargs):
        simulate(test(*args, **kwargs))

    run.__name__, run.__doc__ = test.__name__, test.__doc__
    return run


def now():
    return asyncio.get_running_loop().time()


@contextlib.asynccontextmanager
async def opened(engine, *, started=True, max_queued=4):
    adapters = FakeAdapters(Path("/"))
    async with Slots(engine, quantum_s=1.0, kv_overcommit=1.0, max_completions=64) as slots:
        sampler = Sampler(
            engine,
            adapters,
            slots,
            instance_id="i",
            base_model="m",
            max_rank=8,
            max_queued=max_queued,
            chunk_tokens=4,
            new_seed=lambda: 1,
            clock=now,
        )
        if started:
            await sampler.start()
            engine.asked.clear()
        yield sampler, adapters


def drawn(
    sampler,
    num_completions=1,
    *,
    source=None,
    prompt=(1, 2),
    continuations=(),
    project="p",
    **params,
):
    return sampler.sample(
        project, source, list(prompt), num_completions, SamplingParams(**params), continuations
    )


async def chunks(sampler, *args, **kwargs):
    return [chunk async for chunk in drawn(sampler, *args, **kwargs) if chunk is not None]


@in_virtual_time
async def test_tokens_are_gathered_into_chunks_and_none_is_lost():
    async with opened(FakeEngine()) as (sampler, _):
        found = await chunks(sampler, 2, max_tokens=10)
    for index in range(2):
        pieces = [chunk for chunk in found if chunk.index == index]
        assert [piece.token_ids for piece in pieces] == [(0, 1, 2, 3), (4, 5, 6, 7), (8, 9)]
        assert [piece.stop_reason for piece in pieces] == [None, None, "length"]
        assert [piece.logprobs[0] for piece in pieces] == [0, -4, -8]
        assert [piece.spans for piece in pieces] == [
            (PolicySpan(count, BASE_VERSION, "", "i"),) for count in (4, 4, 2)
        ]


@in_virtual_time
async def test_tokens_say_which_version_and_sampler_made_them():
    async with opened(FakeEngine(max_loras=1)) as (sampler, _):
        async with asyncio.TaskGroup() as tasks:
            made = {
                source: tasks.create_task(chunks(sampler, source=source, max_tokens=3))
                for source in (A, B)
            }
        for number, source in enumerate((A, B), start=1):
            [chunk] = made[source].result()
            assert chunk.token_ids == (100 * number, 100 * number + 1, 100 * number + 2)
            assert chunk.spans == (PolicySpan(3, source.policy_version, source.digest, "i"),)
            logprobs = await sampler.compute_logprobs("p", source, [1, 2, 3])
            assert math.isnan(logprobs.logprobs[0])
            assert logprobs.logprobs[1:] == (-number, -number)
            assert logprobs.span == PolicySpan(3, source.policy_version, source.digest, "i")


@in_virtual_time
async def test_greedy_completions_are_drawn_once_and_sent_for_each():
    engine = FakeEngine()
    async with opened(engine) as (sampler, _):
        found = await chunks(sampler, 3, max_tokens=2, temperature=0)
    assert [(chunk.index, chunk.token_ids) for chunk in found] == [(i, (0, 1)) for i in range(3)]
    assert [completions for _, _, completions, _, _ in engine.asked] == [(Continuation(0),)]


@in_virtual_time
async def test_greedy_continuations_are_drawn_once_for_each_beginning():
    engine = FakeEngine()
    begun = [Continuation(4, (7, 7)), Continuation(1, (7, 7)), Continuation(2, (7,))]
    async with opened(engine) as (sampler, _):
        found = await chunks(sampler, 5, max_tokens=4, temperature=0, continuations=begun)
        apart = await chunks(sampler, 5, max_tokens=4, continuations=begun)
    assert [completions for _, _, completions, _, _ in engine.asked] == [
        (begun[0], begun[2]),
        tuple(begun),
    ]
    for each in (found, apart):
        assert {chunk.index: chunk.token_ids for chunk in each} == {
            4: (2, 3),
            1: (2, 3),
            2: (1, 2, 3),
        }


@in_virtual_time
async def test_log_probabilities_of_the_prompt_come_once():
    async with opened(FakeEngine()) as (sampler, _):
        for temperature in (0, 1):
            found = await chunks(
                sampler, 3, max_tokens=9, prompt_logprobs=0, temperature=temperature
            )
            prompts = [chunk.prompt_logprobs for chunk in found if chunk.prompt_logprobs]
            assert prompts == [PromptLogprobs((-1.0, -1.0), (), ())]


@in_virtual_time
async def test_each_token_of_a_chunk_comes_with_its_likeliest():
    async with opened(FakeEngine()) as (sampler, _):
        for num_top in (None, 0, 2):
            found = await chunks(sampler, 2, max_tokens=9, top_logprobs=num_top)
            for chunk in found:
                rows = [tuple(range(token, token + (num_top or 0))) for token in chunk.token_ids]
                assert chunk.top_token_ids == (() if num_top is None else tuple(rows))
                values = [tuple(-float(each) for each in row) for row in rows]
                assert chunk.top_logprobs == (() if num_top is None else tuple(values))
            assert max(len(chunk.token_ids) for chunk in found) > 1


@in_virtual_time
async def test_a_mistake_is_refused_before_anything_is_pulled():
    engine = FakeEngine()
    async with opened(engine) as (sampler, adapters):
        adapters.go.clear()
        for call in (
            lambda: drawn(sampler, source=replace(A, digest="x")),
            lambda: drawn(sampler, source=A, max_tokens=0),
            lambda: drawn(sampler, prompt=()),
            lambda: drawn(sampler, continuations=[Continuation(1)]),
            lambda: sampler.sample("p/q", A, [1], 1, SamplingParams()),
        ):
            with pytest.raises(InvalidRequest):
                call()
        with pytest.raises(InvalidRequest):
            await sampler.compute_logprobs("", A, [1, 2])
    assert engine.asked == []


@in_virtual_time
async def test_requests_beyond_the_bound_are_refused_until_one_begins():
    engine = FakeEngine(kv_tokens=50)
    async with opened(engine, max_queued=2) as (sampler, _):
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(chunks(sampler, 4, max_tokens=12))
            await asyncio.sleep(0)
            for project in ("p", "q"):
                tasks.create_task(chunks(sampler, 1, max_tokens=12, project=project))
            await asyncio.sleep(0.001)
            info = await sampler.get_sampler()
            assert (info.num_running, info.num_queued) == (6, 2)
            assert (info.kv_tokens, info.reserved_kv_tokens) == (50, 50)
            with pytest.raises(Overloaded) as caught:
                await chunks(sampler, project="r")
            with pytest.raises(Overloaded, match="of project p"):
                await sampler.compute_logprobs("p", None, [1, 2])
            await sampler.load_adapter(A)
        assert caught.value.context == {"resource": "requests", "project": "r", "limit": "2"}
        info = await sampler.get_sampler()
        assert (info.num_running, info.num_queued, info.reserved_kv_tokens) == (0, 0, 0)
        await chunks(sampler)


@in_virtual_time
async def test_a_project_whose_trainer_is_away_takes_no_place_of_any_other_request():
    async with opened(FakeEngine(), max_queued=4) as (sampler, adapters):
        await chunks(sampler, source=B, max_tokens=1)
        adapters.go.clear()
        async with asyncio.TaskGroup() as tasks:
            waiting = [tasks.create_task(chunks(sampler, source=A)) for _ in range(2)]
            await asyncio.sleep(0)
            with pytest.raises(Overloaded) as caught:
                async with asyncio.timeout(5):
                    await chunks(sampler, source=A)
            assert caught.value.context == {"resource": "pulls", "project": "p", "limit": "2"}
            other = tasks.create_task(chunks(sampler, source=A, project="q"))
            await asyncio.sleep(0)
            assert (await sampler.get_sampler()).num_queued == 0
            assert len(await chunks(sampler, max_tokens=1)) == 1
            for task in (*waiting, other):
                assert not task.done()
                task.cancel()
            adapters.go.set()
            assert len(await chunks(sampler, source=B, max_tokens=1)) == 1


@in_virtual_time
async def test_a_version_that_is_here_takes_no_place_among_the_pulls():
    async with opened(FakeEngine(), max_queued=1) as (sampler, adapters):
        await chunks(sampler, source=B, max_tokens=1)
        pulling = asyncio.Event()
        hold = adapters.hold

        @contextlib.asynccontextmanager
        async def never_a(source):
            if source == A:
                await pulling.wait()
            async with hold(source) as adapter:
                yield adapter

        adapters.hold = never_a
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(chunks(sampler, source=A))
            await asyncio.sleep(0)
            assert len(await chunks(sampler, source=B, max_tokens=1)) == 1
            with pytest.raises(Overloaded):
                async with asyncio.timeout(5):
                    await chunks(sampler, source=A)
            pulling.set()


@in_virtual_time
async def test_a_completion_that_has_ended_gives_its_memory_back_before_the_others_of_its_request():
    async with opened(FakeEngine(kv_tokens=100)) as (sampler, _):
        begun = [Continuation(0, (1,) * 9), Continuation(1)]
        stream = drawn(sampler, 2, max_tokens=10, continuations=begun)
        assert (await anext(stream)).index == 0
        assert (await sampler.get_sampler()).reserved_kv_tokens == 12
        assert (await anext(stream)).index == 1
        await stream.aclose()


@in_virtual_time
async def test_a_version_is_live_once_it_was_read_back_and_stays_so_without_a_slot():
    engine = FakeEngine(max_loras=1, load_s=0.25)
    async with opened(engine) as (sampler, adapters):
        assert await sampler.load_adapter(A) == LoadTimes(0.5, 0.25)
        async with adapters.hold(B):
            info = await sampler.get_sampler()
            assert (info.loaded, info.resident, info.max_loras) == ((A,), (A,), 1)
        await chunks(sampler, source=B, max_tokens=1)
        info = await sampler.get_sampler()
        assert (info.loaded, info.resident, info.instance_id) == ((A, B), (B,), "i")
        assert (await sampler.load_adapter(A)).load_s == 0
        assert engine.loads == [1, 2]


@in_virtual_time
async def test_a_version_whose_files_were_changed_here_is_pulled_again():
    engine = FakeEngine()
    async with opened(engine) as (sampler, adapters):
        engine.load_errors[1] = DigestMismatch("the file was replaced")
        found = await asyncio.gather(
            *(chunks(sampler, source=A, max_tokens=1) for _ in range(2)), sampler.load_adapter(A)
        )
        assert adapters.discarded == [1]
        assert engine.loads == [1, 2]
        assert found[0][0].token_ids[0] == found[1][0].token_ids[0] == 100 * engine.loads[-1]
        assert not any(adapters.held.values())


@in_virtual_time
async def test_a_version_that_the_engine_cannot_hold_is_pulled_twice_and_refused_for_a_while():
    engine = FakeEngine()
    engine.load_errors = dict.fromkeys(range(20), DigestMismatch("the engine packs it otherwise"))
    async with opened(engine) as (sampler, adapters):

        async def ask():
            results = await asyncio.gather(
                *(chunks(sampler, source=A) for _ in range(2)),
                sampler.load_adapter(A),
                sampler.compute_logprobs("q", A, [1, 2]),
                return_exceptions=True,
            )
            assert {type(each) for each in results} == {FailedPrecondition}
            assert "does not hold what its file says" in str(results[0])
            assert results[0].context == {"resource": A.adapter, "policy_version": "3"}
            assert adapters.here() == (), "it was not pulled once more"
            return len(adapters.discarded), len(engine.loads)

        assert await ask() == (2, 2)
        await asyncio.sleep(REMEMBERED_S - 1)
        assert await ask() == (2, 2)
        assert not any(adapters.held.values())
        # Other weights under the same name are another version.
        engine.load_errors = {}
        other = replace(A, digest="c" * 64)
        assert len(await chunks(sampler, source=other, max_tokens=1)) == 1
        await asyncio.sleep(1)
        assert len(await chunks(sampler, source=A, max_tokens=1)) == 1


@pytest.mark.parametrize("first", ["is given up", "pulls for long"])
def test_two_wrong_copies_are_enough_whoever_had_the_first(first):
    async def test():
        engine = FakeEngine()
        engine.load_errors = dict.fromkeys(range(20), DigestMismatch("wrong"))
        async with opened(engine) as (sampler, adapters):
            discard = adapters.discard

            def discard_and_stop(adapter):
                discard(adapter)
                adapters.go.clear()

            adapters.discard = discard_and_stop
            asking = asyncio.ensure_future(chunks(sampler, source=A))
            await asyncio.sleep(1)
            assert engine.loads == [1], "the second pull waits"
            if first == "is given up":
                asking.cancel()
            else:
                await asyncio.sleep(REMEMBERED_S)
            adapters.go.set()
            for request in (asking, chunks(sampler, source=A)):
                with pytest.raises((FailedPrecondition, asyncio.CancelledError)):
                    async with asyncio.timeout(5):
                        await request
            assert engine.loads == [1, 2]

    simulate(test())


@in_virtual_time
async def test_files_that_change_now_and_then_are_pulled_again_each_time():
    engine = FakeEngine(max_loras=1)
    async with opened(engine) as (sampler, adapters):
        for _ in range(3):
            old = adapters.loaded(A).number
            engine.load_errors = {old: DigestMismatch("the file was replaced")}
            assert len(await chunks(sampler, source=A, max_tokens=1)) == 1
            assert adapters.loaded(A).number != old
            await chunks(sampler, source=B, max_tokens=1)  # It takes the slot.


@in_virtual_time
@pytest.mark.long
async def test_of_versions_that_were_wrong_only_the_last_few_hundred_are_remembered():
    engine = FakeEngine()
    engine.load_errors = dict.fromkeys(range(2000), DigestMismatch("wrong"))
    async with opened(engine) as (sampler, _):
        for version in range(300):
            with pytest.raises(FailedPrecondition):
                await chunks(sampler, source=replace(A, policy_version=version))
        num_loads = len(engine.loads)
        for version, more in ((299, 0), (0, 2)):
            with pytest.raises(FailedPrecondition):
                await chunks(sampler, source=replace(A, policy_version=version))
            assert len(engine.loads) == num_loads + more


@in_virtual_time
async def test_a_request_that_waits_gives_signs_of_life():
    engine = FakeEngine()
    async with opened(engine) as (sampler, adapters):
        adapters.go.clear()
        stream = drawn(sampler, source=A, max_tokens=1)
        for beat in range(1, 20):
            assert await anext(stream) is None
            assert now() == pytest.approx(0.02 + beat * HEARTBEAT_S)
        adapters.go.set()
        assert (await anext(stream)).token_ids == (100,)


@in_virtual_time
async def test_a_stream_that_flows_has_no_signs_of_life_in_it():
    async with opened(FakeEngine(step_s=HEARTBEAT_S / 5)) as (sampler, _):
        found = [chunk async for chunk in drawn(sampler, max_tokens=100)]
    assert len(found) == 25
    assert None not in found


@in_virtual_time
async def test_a_silent_engine_looks_silent_within_two_seconds():
    engine = FakeEngine()
    async with opened(engine) as (sampler, _):
        engine.go.clear()
        stream = drawn(sampler, max_tokens=1)
        assert await anext(stream) is None
        waiting = asyncio.ensure_future(anext(stream))
        silent_since = now()
        last = silent_since
        while now() < silent_since + 10:
            await asyncio.sleep(0.05)
            engine.silence_s = now() - silent_since
            if waiting.done():
                last = now()
                waiting = asyncio.ensure_future(anext(stream))
        # Whoever reads the stream waits for SILENCE_S, and one tick more.
        assert last + SILENCE_S + HEARTBEAT_S < silent_since + 2.05
        for call in (chunks, lambda s: s.compute_logprobs("p", None, [1, 2]), Sampler.get_sampler):
            with pytest.raises(Unavailable, match="silent for 10"):
                async with asyncio.timeout(5):
                    await call(sampler)
        engine.silence_s = 0.0
        assert await waiting is None, "it was only slow"
        engine.go.set()
        assert (await anext(stream)).token_ids == (0,)


@in_virtual_time
async def test_an_engine_that_is_silent_for_long_is_dead():
    engine = FakeEngine()
    async with opened(engine) as (sampler, _):
        failure = asyncio.ensure_future(sampler.failure())
        for silence_s in (0.0, 30.0, DEAD_S - 1):
            engine.silence_s = silence_s
            await asyncio.sleep(5)
            assert not failure.done()
        engine.silence_s = DEAD_S
        async with asyncio.timeout(5):
            assert "silent for 60 s" in await failure


@pytest.mark.parametrize("phase", ["pull", "slot", "memory", "drawing"])
@pytest.mark.parametrize("how", ["close", "cancel", "deadline"])
def test_a_request_given_up_frees_its_place_at_once(phase, how):
    async def test():
        engine = FakeEngine(max_loras=1, kv_tokens=10)
        async with opened(engine) as (sampler, adapters), contextlib.AsyncExitStack() as others:
            if phase == "pull":
                adapters.go.clear()
            elif phase != "drawing":
                # Another one has the slot, or all of the memory.
                source, size = (B, 9) if phase == "slot" else (None, 700)
                other = await others.enter_async_context(
                    contextlib.aclosing(drawn(sampler, source=source, max_tokens=size))
                )
                await anext(other)
                engine.go.clear()
            before = len(engine.sequences)
            stream = drawn(sampler, source=A, max_tokens=7)
            reading = asyncio.ensure_future(_read(stream))
            await asyncio.sleep(0.06)
            assert len(engine.sequences) == before + (phase == "drawing")
            num_others = 1 if phase in {"slot", "memory"} else 0
            info = await sampler.get_sampler()
            queued = phase in {"slot", "memory"}
            assert (info.num_running, info.num_queued) == (num_others + 1, queued)
            given_up_at = now()
            if how == "deadline":
                with pytest.raises(TimeoutError):
                    async with asyncio.timeout(0.01):
                        await reading
            else:
                reading.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await reading
            if how == "close":
                await stream.aclose()
            assert now() <= given_up_at + 0.02
            assert len(engine.sequences) == before
            info = await sampler.get_sampler()
            assert (info.num_running, info.num_queued) == (num_others, 0)
            assert adapters.held.get(adapters.loaded(A).number, 0) == 0
            engine.go.set()

    simulate(test())


async def _read(stream):
    async for _ in stream:
        pass


@in_virtual_time
async def test_closing_the_stream_between_two_chunks_ends_the_work():
    engine = FakeEngine()
    async with opened(engine) as (sampler, _):
        stream = drawn(sampler, max_tokens=40)
        await anext(stream)
        assert len(engine.sequences) == 1
        await stream.aclose()
        assert engine.sequences == []
        assert (await sampler.get_sampler()).num_running == 0


@in_virtual_time
async def test_a_slow_reader_holds_the_stream_up_and_not_the_memory():
    engine = FakeEngine()
    async with opened(engine) as (sampler, _):
        stream = drawn(sampler, max_tokens=900)
        first = await anext(stream)
        await asyncio.sleep(100)
        assert engine.num_tokens >= 900
        assert engine.num_taken < 300
        rest = [chunk async for chunk in stream]
    tokens = [token for chunk in [first, *rest] for token in chunk.token_ids]
    assert tokens == list(range(900))
    assert None not in rest


@in_virtual_time
async def test_before_its_start_a_sampler_is_unavailable():
    async with opened(FakeEngine(), started=False) as (sampler, _):
        for call in (
            chunks,
            Sampler.get_sampler,
            lambda s: s.compute_logprobs("p", None, [1, 2]),
            lambda s: s.load_adapter(A),
        ):
            with pytest.raises(Unavailable):
                await call(sampler)


class NeverStarts(FakeEngine):
    async def start(self):
        raise OSError("no such model")


@pytest.mark.parametrize(("kind", "message"), [(FakeEngine, "told to"), (NeverStarts, "no such")])
async def test_the_service_ends_with_an_error_when_its_engine_does(tmp_path, kind, message):
    engine = kind()
    config = SamplerConfig.model_validate(
        {
            "listen": "127.0.0.1:0",
            "base_model": {"name": "m", "path": "/m"},
            "cache_dir": str(tmp_path),
        }
    )
    engine.dies.set()
    with pytest.raises(ExceptionGroup) as caught:
        await serve(config, engine)
    [error] = caught.value.exceptions
    assert isinstance(error, EngineDiedError)
    assert message in str(error)
    assert engine.stopped
    assert not list(tmp_path.iterdir())
