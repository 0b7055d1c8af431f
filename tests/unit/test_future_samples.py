"""Futures of sampling in memory: bounded, kept for a while, the oldest let go of first."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from rollmesh.errors import (
    InvalidRequest,
    MeshError,
    NotFound,
    Overloaded,
    QuotaExceeded,
    Unavailable,
)
from services.coordinator import future_samples
from services.coordinator.future_samples import (
    FRESH_S,
    OVERHEAD_BYTES,
    SampleBounds,
    Samples,
    topic_of,
)
from services.coordinator.future_work import Waits, Work
from services.coordinator.store import Changes

BOUNDS = {
    "max_begun": 1000,
    "max_of_project": 1000,
    "max_of_all": 1000,
    "project_bytes": 2**20,
    "all_bytes": 2**20,
    "retention_s": 100.0,
}


class Works:
    """Answers as many bytes as asked for; `errors` are raised before, one for each attempt."""

    def __init__(self):
        self.going = asyncio.Event()  # cleared: draws hang
        self.going.set()
        self.num_drawing = 0
        self.errors: list[BaseException] = []

    async def sample(self, future, body, told):
        if self.errors:
            raise self.errors.pop(0)
        self.num_drawing += 1
        try:
            told(f"request of {future}")
            await self.going.wait()
            return bytes(int(body))
        finally:
            self.num_drawing -= 1

    def failure(self, error: MeshError):
        return error.reason.encode()


class World:
    def __init__(self, **bounds):
        self.now = 1000.0
        self.works = Works()
        self.changes = Changes()
        self.samples = Samples(
            self.works,
            lambda project, subject: None,
            changes=self.changes,
            waits=Waits(lambda: self.now),
            bounds=SampleBounds(**{**BOUNDS, **bounds}),
            clock=lambda: self.now,
        )

    def create(self, name, size=0, *, project="p", group="g"):
        self.samples.create(name, project, group, Work(b"%d" % size, samples=True))

    async def done(self, *names):
        async with asyncio.timeout(20):
            for name in names:
                while True:
                    changed = self.changes.next(name)
                    if self.samples.state(name).result is not None:
                        break
                    await changed.wait()

    async def draw(self, *names, size=0, project="p"):
        """One after the other."""
        for name in names:
            self.create(name, size, project=project)
            await self.done(name)

    def kept(self, *names):
        return [name for name in names if self.samples.has(name)]


@pytest.fixture
def world():
    """Makes worlds whose samples run."""

    @contextlib.asynccontextmanager
    async def running(**bounds):
        made = World(**bounds)
        task = asyncio.ensure_future(made.samples.run())
        await asyncio.sleep(0)
        try:
            yield made
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        assert made.works.num_drawing == 0

    return running


async def test_results_go_when_they_are_old(world):
    async with world() as mesh:
        await mesh.draw("a")
        mesh.now += 60
        await mesh.draw("b")
        mesh.now += 40
        assert mesh.kept("a", "b") == ["a", "b"]
        mesh.now += 1
        assert mesh.kept("a", "b") == ["b"]
        assert [name for _, name, _ in mesh.samples.done_since("p", "g", 0)] == ["b"]
        with pytest.raises(NotFound):
            mesh.samples.state("a")


async def test_over_the_bytes_of_all_the_oldest_results_go_first(world):
    size = 1000
    async with world(all_bytes=3 * (size + OVERHEAD_BYTES)) as mesh:
        await mesh.draw("a", "b", size=size)
        await mesh.draw("c", size=size, project="other")
        assert mesh.kept(*"abc") == [*"abc"]
        await mesh.draw("d", size=size, project="other")
        assert mesh.kept(*"abcd") == [*"bcd"]


async def test_over_the_bytes_of_a_project_only_its_own_results_go(world):
    size = 1000
    async with world(project_bytes=2 * (size + OVERHEAD_BYTES)) as mesh:
        await mesh.draw("other", size=size, project="other")
        await mesh.draw("a", "b", "c", size=size)
        assert mesh.kept("other", *"abc") == ["other", "b", "c"]


async def test_what_is_not_done_takes_half_of_the_bytes_at_most(world):
    size = OVERHEAD_BYTES + 1
    async with world(project_bytes=4 * size, all_bytes=6 * size) as mesh:
        mesh.works.going.clear()
        mesh.create("a")
        mesh.create("b")
        with pytest.raises(Overloaded, match="max_project_sampling_bytes"):
            mesh.create("c")
        mesh.create("c", project="other")
        with pytest.raises(Overloaded, match="max_sampling_bytes"):
            mesh.create("d", project="other")
        mesh.samples.cancel("a")
        mesh.create("d")
        assert mesh.kept(*"abcd") == [*"abcd"]


@pytest.mark.parametrize("bound", ["project_bytes", "all_bytes"])
async def test_a_result_that_has_just_come_is_there_whatever_else_is_under_way(world, bound):
    room = 16 * OVERHEAD_BYTES + 100
    async with world(**{bound: room}) as mesh:
        mesh.works.going.clear()
        mesh.create("first", size=room // 3)
        for index in range(7):
            mesh.create(f"{index}")  # half of the room, with the first
        changed = mesh.changes.next("first")
        mesh.works.going.set()
        await changed.wait()
        assert mesh.samples.has("first")


@pytest.mark.parametrize("gone_by", ["being read", "age"])
async def test_no_request_takes_the_room_of_a_result_that_is_waited_for(world, gone_by):
    async with world(project_bytes=4 * OVERHEAD_BYTES) as mesh:
        changed = mesh.changes.next("a")
        mesh.create("a", size=2 * OVERHEAD_BYTES)
        await changed.wait()
        with pytest.raises(Overloaded):
            mesh.create("b")
        if gone_by == "age":
            mesh.now += FRESH_S + 1
        else:
            mesh.samples.state("a")
        mesh.create("b")
        assert mesh.kept(*"ab") == ["b"]


@pytest.mark.parametrize("bound", ["max_of_project", "max_of_all"])
async def test_what_is_not_done_is_bounded_by_number(world, bound):
    async with world(**{bound: 2}) as mesh:
        mesh.works.going.clear()
        mesh.create("a")
        mesh.create("b")
        with pytest.raises(Overloaded) as caught:
            mesh.create("c")
        assert caught.value.context["allowed"] == "2"
        mesh.create("b")  # a repeat
        mesh.works.going.set()
        await mesh.done("a")
        mesh.create("c")


async def test_beyond_those_that_may_be_begun_they_are_in_line(world):
    async with world(max_begun=1) as mesh:
        mesh.works.going.clear()
        for name in "abc":
            mesh.create(name)
        mesh.create("other", project="other")
        await asyncio.sleep(0)
        assert mesh.works.num_drawing == 2
        waiting = {name: mesh.samples.state(name).waiting for name in "abc"}
        assert waiting["a"] is None
        assert [(waiting[name].rule, waiting[name].position) for name in "bc"] == [
            ("ORDER", 1),
            ("ORDER", 2),
        ]
        mesh.samples.cancel("b")
        mesh.works.going.set()
        await mesh.done("a", "c", "other")
        assert mesh.samples.state("b").result == b"CANCELLED"


async def test_nothing_is_left_of_what_is_gone(world):
    async with world() as mesh:
        await mesh.draw("a", "b", project="x", size=5)
        mesh.create("c", project="y")
        mesh.samples.cancel("c")
        mesh.now += 1000
        assert not mesh.kept(*"abc")
        held = vars(mesh.samples).items()
        assert [name for name, kept in held if hasattr(kept, "__len__") and len(kept)] == []


async def test_a_cursor_goes_on_from_where_it_was(world, monkeypatch):
    monkeypatch.setattr(future_samples, "MAX_DONE", 2)
    async with world() as mesh:
        await mesh.draw(*"abcde")
        told, cursor = [], 0
        while found := mesh.samples.done_since("p", "g", cursor):
            told.append("".join(name for _, name, _ in found))
            cursor = found[-1][0]
        assert told == ["ab", "cd", "e"]


async def test_who_waits_for_a_group_is_woken(world):
    async with world() as mesh:
        woken = mesh.changes.next(topic_of("p", "g"))
        await mesh.draw("a")
        assert woken.is_set()


@pytest.mark.parametrize("error", [Unavailable("away"), Overloaded("full")])
async def test_what_passes_is_waited_for(world, error):
    async with world() as mesh:
        error.retry_after_s = 0.0
        mesh.works.errors = [error, error]
        await mesh.draw("a")
        assert mesh.samples.state("a").result == b""


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (InvalidRequest("no"), b"INVALID_REQUEST"),
        (QuotaExceeded("used up"), b"QUOTA_EXCEEDED"),
        (ZeroDivisionError(), b"INTERNAL"),
    ],
)
async def test_what_does_not_pass_is_the_failure(world, error, reason):
    async with world() as mesh:
        mesh.works.errors = [error]
        await mesh.draw("a")
        assert mesh.samples.state("a").result == reason
        assert mesh.samples.done_since("p", "g", 0)[0][2] is True


async def test_cancelling_ends_the_draw_and_what_is_done_stays(world):
    async with world() as mesh:
        await mesh.draw("done")
        mesh.works.going.clear()
        mesh.create("a")
        await asyncio.sleep(0)
        assert mesh.works.num_drawing == 1
        mesh.samples.cancel("a")
        mesh.samples.cancel("done")
        await asyncio.sleep(0)
        assert mesh.works.num_drawing == 0
        assert mesh.samples.state("a").result == b"CANCELLED"
        assert mesh.samples.state("done").result == b""


async def test_nothing_is_begun_before_and_after_its_life():
    mesh = World()
    with pytest.raises(Unavailable):
        mesh.create("a")
    assert not mesh.kept("a")
