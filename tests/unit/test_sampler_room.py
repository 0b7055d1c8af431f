"""Who gets room, and in which order."""

from __future__ import annotations

import asyncio

from services.sampler.room import Room


def stay() -> bool:
    """Nobody can be evicted."""
    return False


async def started(coroutine) -> asyncio.Task:
    task = asyncio.ensure_future(coroutine)
    for _ in range(5):
        await asyncio.sleep(0)
    return task


async def test_two_that_need_more_than_they_have_do_not_wait_for_each_other():
    room = Room(max_owners=9, max_bytes=10, evict=stay)
    for owner in "ab":
        await room.take(owner, 5)
    first = await started(room.take("a", 8))
    second = await started(room.take("b", 8))
    await first
    assert not second.done()
    assert not room.take_at_once("c", 0)
    room.free("a")
    await second
    assert not room.take_at_once("c", 3)
    assert room.take_at_once("c", 2)


async def test_what_is_small_does_not_overtake_what_is_large():
    room = Room(max_owners=9, max_bytes=10, evict=stay)
    await room.take("there", 5)
    large = await started(room.take("large", 8))
    assert not room.take_at_once("small", 1)
    small = await started(room.take("small", 1))
    assert not small.done()
    room.free("there")
    await large
    await small
    assert not room.take_at_once("other", 2)
    assert room.take_at_once("other", 1)


async def test_no_more_leave_than_must():
    left = []

    def evict() -> bool:
        left.append(order.pop(0))
        room.leaves(left[-1])
        return True

    order = ["a", "b", "c"]
    room = Room(max_owners=3, max_bytes=10, evict=evict)
    for owner in order:
        await room.take(owner, 3)
    new = await started(room.take("new", 4))
    assert left == ["a"]
    room.free("a")
    await new
    assert left == ["a"]
    assert not room.take_at_once("one more", 0)
    await room.take("new", 4)
    assert left == ["a"]
