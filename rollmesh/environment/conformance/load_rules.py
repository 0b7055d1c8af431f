"""Rules of many episodes, and of those that break off: nothing is left of them."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import grpc

from rollmesh.api.environment.v1 import environment_service_pb2 as pb
from rollmesh.environment.conformance.episode_rules import tame_actions
from rollmesh.environment.conformance.rules import Broken, Rule, Skipped, rule

if TYPE_CHECKING:
    from rollmesh.environment.conformance.subject import Stream, Subject

RELEASE_S = 2.0
"""Seconds in which broken episodes are freed, and beside that as long as they took to begin."""
_RETRY_S = 0.05
_DEADLINE_S = 0.3
"""Seconds that an episode gets, beside four times what it took to begin as many."""
_NUM_DEADLINES = 16
_ROUNDS = 6
_GROWTH_KB = 1
"""For each episode of a round: a round in which memory grows by no more shows that none leaks."""
_MIN_GROWTH_KB = 1_024
_SPARE = 8
"""Threads and open files that may come and go."""


@rule("begins")
async def concurrent(subject: Subject) -> None:
    """Many episodes at once all begin, and each answers an action.

    1,000, or as many as limits.max_concurrent_episodes says, over one connection: a server whose
    library bounds the streams of a connection has to raise that bound.
    """
    streams = await subject.open_many(subject.room)
    try:
        await _act(subject, streams)
    finally:
        _cancel(streams)


@rule("begins", "concurrent")
async def freed_when_cancelled(subject: Subject) -> None:
    """Episodes that are cancelled in the middle are freed within 2 s: as many can begin again."""
    start = time.monotonic()
    streams = await _open_again(subject, subject.room, subject.answer_s)
    await _act(subject, streams)
    took_s = time.monotonic() - start
    _cancel(streams)
    _cancel(await _open_again(subject, subject.room, RELEASE_S + took_s))


@rule("begins", "concurrent", "freed-when-cancelled")
async def limit_kept(subject: Subject) -> None:
    """One episode more than limits.max_concurrent_episodes is RESOURCE_EXHAUSTED."""
    limit = subject.info.limits.max_concurrent_episodes
    if not limit:
        raise Skipped("it has no max_concurrent_episodes")
    if limit > subject.num_episodes:
        raise Skipped(
            f"its limit is {limit}, and {subject.num_episodes} are opened here: --episodes {limit}"
        )
    streams = await _open_again(subject, limit, subject.answer_s)
    try:
        async with subject.stream() as stream:
            await subject.refused(
                stream.begin(subject.tasks[0].id),
                f"episode number {limit + 1}",
                grpc.StatusCode.RESOURCE_EXHAUSTED,
            )
    finally:
        _cancel(streams)


@rule("begins", "concurrent", "freed-when-cancelled")
async def freed_at_deadline(subject: Subject) -> None:
    """An episode whose deadline passes in the middle is over, and freed within 2 s."""
    start = time.monotonic()
    count = min(subject.room, _NUM_DEADLINES)
    _cancel(await _open_again(subject, count, subject.answer_s))
    deadline_s = _DEADLINE_S + 4 * (time.monotonic() - start)
    streams = await _open_again(subject, count, subject.answer_s, deadline_s=deadline_s)
    for stream in streams:
        try:
            await stream.read(deadline_s)
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.DEADLINE_EXCEEDED:
                raise
        else:
            raise Broken("the stream says more although no action came")
    took_s = time.monotonic() - start
    _cancel(await _open_again(subject, subject.room, RELEASE_S + took_s))


@rule("begins", "concurrent", "freed-when-cancelled", "freed-at-deadline")
async def nothing_leaks(subject: Subject) -> None:
    """After rounds of episodes of all ends, as many can begin again as at first.

    Where the process is known (--pid) its memory stops growing, and its threads and open files are
    as many as before.
    """
    await _round(subject)  # The first one warms it up.
    if subject.pid is None:
        await _round(subject)
        return
    await asyncio.sleep(RELEASE_S)
    before = Usage.of(subject.pid)
    allowed_kb = max(_MIN_GROWTH_KB, _GROWTH_KB * subject.room)
    highest_kb = before.memory_kb
    for _ in range(_ROUNDS):
        await _round(subject)
        now = await _settled(subject.pid, highest_kb + allowed_kb, before)
        if now.memory_kb <= highest_kb + allowed_kb:
            now.compare(before)
            return
        highest_kb = now.memory_kb
    raise Broken(
        f"its memory grew in each of {_ROUNDS} rounds of {subject.room} episodes, from "
        f"{before.memory_kb // 1024} to {highest_kb // 1024} MiB"
    )


@rule("described")
async def alive(subject: Subject) -> None:
    """After all of this the server tells the same of the environment as at first."""
    response = await subject.stub.Describe(pb.DescribeRequest(), timeout=subject.answer_s)
    if subject.info not in response.environments:
        raise Broken("Describe tells something else now")


@dataclass(frozen=True, slots=True)
class Usage:
    """What a process on this machine uses."""

    memory_kb: int
    threads: int
    files: int

    @classmethod
    def of(cls, pid: int) -> Usage:
        """What `pid` uses now.

        Raises:
            Broken: there is no such process, or it is somebody else's.
        """
        try:
            status = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace")
            fields = dict(line.split(":", 1) for line in status.splitlines())
            files = len(list(Path(f"/proc/{pid}/fd").iterdir()))
            return cls(int(fields["VmRSS"].split()[0]), int(fields["Threads"]), files)
        except (OSError, KeyError, ValueError) as error:
            raise Broken(f"what process {pid} uses cannot be read: {error}") from None

    def within(self, memory_kb: int, before: Usage) -> bool:
        """Whether it is as before, but for memory of at most `memory_kb`."""
        return (
            self.memory_kb <= memory_kb
            and self.threads <= before.threads + _SPARE
            and self.files <= before.files + _SPARE
        )

    def compare(self, before: Usage) -> None:
        """Make sure that it has no more threads and files than before, but for a few."""
        for what in ("threads", "files"):
            old, new = getattr(before, what), getattr(self, what)
            if new > old + _SPARE:
                raise Broken(f"it has {new} {what}, before there were {old}")


async def _round(subject: Subject) -> None:
    """As many episodes as may be, of which some end and some break off; then as many again."""
    start = time.monotonic()
    streams = await _open_again(subject, subject.room, subject.answer_s)
    await _act(subject, streams)
    for stream in streams[::2]:
        await stream.half_close()
    took_s = time.monotonic() - start
    _cancel(streams)
    _cancel(await _open_again(subject, subject.room, RELEASE_S + took_s))


async def _settled(pid: int, memory_kb: int, before: Usage) -> Usage:
    """What the process uses, once that is as before, or when it has had time to be."""
    until = time.monotonic() + RELEASE_S
    while True:
        now = Usage.of(pid)
        if now.within(memory_kb, before) or time.monotonic() > until:
            return now
        await asyncio.sleep(_RETRY_S)


async def _act(subject: Subject, streams: list[Stream]) -> None:
    moves = tame_actions(subject, len(streams))
    answers = await asyncio.gather(
        *(stream.act(move) for stream, move in zip(streams, moves, strict=True)),
        return_exceptions=True,
    )
    failures = [answer for answer in answers if isinstance(answer, BaseException)]
    if failures:
        raise Broken(
            f"of {len(streams)} episodes at once {len(failures)} gave no answer to an action: "
            f"{failures[0]}"
        )


async def _open_again(
    subject: Subject, count: int, within_s: float, *, deadline_s: float | None = None
) -> list[Stream]:
    """`count` episodes, tried until those before are freed."""
    until = time.monotonic() + within_s
    while True:
        try:
            return await subject.open_many(count, deadline_s)
        except Broken as broken:
            if time.monotonic() > until:
                raise Broken(f"after {within_s:.1f} s still: {broken}") from None
        await asyncio.sleep(_RETRY_S)


def _cancel(streams: list[Stream]) -> None:
    for stream in streams:
        stream.cancel()


RULES: tuple[Rule, ...] = (
    concurrent,
    freed_when_cancelled,
    limit_kept,
    freed_at_deadline,
    nothing_leaks,
    alive,
)
