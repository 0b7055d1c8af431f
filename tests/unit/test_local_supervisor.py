"""Supervision on real child processes: restarts, giving up, and nothing left behind."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from pathlib import Path

import pytest

from rollmesh.errors import Unavailable
from services.local.processes import processes
from services.local.supervisor import (
    FIRST_DELAY_S,
    LONGEST_DELAY_S,
    MOST_FAILED_STARTS,
    Program,
    Restarts,
    Supervised,
)

ROOT = Path(__file__).resolve().parents[2]
SERVES = """
import subprocess, sys, time
code = "import time; time.sleep(1000)"
child = subprocess.Popen([sys.executable, "-c", code], process_group=0)
print(child.pid, flush=True)
time.sleep(1000)
"""
IGNORES_SIGTERM = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n{SERVES}"
ENDS_WELL = f"import signal, sys; signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))\n{SERVES}"


def program(tmp_path, code, *, stop_s=10.0):
    return Program(
        name="program",
        command=(sys.executable, "-u", "-c", code),
        log=tmp_path / "program.log",
        stop_s=stop_s,
        environment={"GREETING": "hello"},
    )


def grandchildren(log):
    """The process ids that every start of SERVES has written, in order."""
    return [int(line) for line in log.read_text().split() if line.isdigit()] if log.exists() else []


def alive(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


async def until(condition):
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.01)


@contextlib.asynccontextmanager
async def supervised(what, *, starts=1, said=None):
    """`what` kept running; it serves once it has started its own child for the `starts`-th time."""
    counted = iter(range(starts, 1000))

    async def until_serving():
        target = next(counted)
        await until(lambda: len(grandchildren(what.log)) >= target)

    async with processes() as started, asyncio.TaskGroup() as tasks:
        kept = Supervised(
            what,
            started,
            until_serving=until_serving,
            say=(said if said is not None else []).append,
        )
        running = tasks.create_task(kept.keep_running())
        try:
            yield kept
        finally:
            if not running.cancelling():
                running.cancel()
            await asyncio.wait([running])


async def test_a_program_that_is_killed_is_started_again_and_its_children_are_gone(tmp_path):
    what, said = program(tmp_path, SERVES), []
    async with supervised(what, said=said) as kept:
        await kept.serving.wait()
        first = kept.pid
        kept.kill()
        assert not kept.serving.is_set()
        await kept.serving.wait()
        assert kept.pid != first
        assert not alive(first)
        await until(lambda: not alive(grandchildren(what.log)[0]))
    (serving, died, again) = said
    assert serving == again == "program is serving"
    assert died == (
        f"program was killed by SIGKILL; starting it again in {FIRST_DELAY_S:g} s (log: {what.log})"
    )


@pytest.mark.parametrize(
    ("code", "stop_s"),
    [
        pytest.param(ENDS_WELL, 10.0, id="ends when asked"),
        pytest.param(IGNORES_SIGTERM, 0.1, id="is made to"),
    ],
)
async def test_at_the_end_neither_the_program_nor_its_children_are_left(tmp_path, code, stop_s):
    what = program(tmp_path, code, stop_s=stop_s)
    async with supervised(what) as kept:
        await kept.serving.wait()
        pid = kept.pid
        assert alive(pid)
    assert not alive(pid)
    await until(lambda: not alive(grandchildren(what.log)[0]))


async def test_a_program_with_a_wrong_configuration_is_not_started_again(tmp_path):
    what, said = program(tmp_path, "import sys; print('bad key'); sys.exit(2)"), []
    with pytest.raises(ExceptionGroup) as raised:
        async with supervised(what, said=said) as kept:
            await kept.serving.wait()
    (error,) = raised.value.exceptions
    assert isinstance(error, Unavailable)
    assert str(error) == f"program ended with exit status 2: bad key (log: {what.log})"
    assert said == []


async def test_a_program_that_never_serves_is_given_up_with_its_last_words(tmp_path):
    what, said = program(tmp_path, "print('no memory'); raise SystemExit(1)"), []
    with pytest.raises(ExceptionGroup) as raised:
        async with supervised(what, said=said) as kept:
            await kept.serving.wait()
    assert "exit status 1: no memory" in str(raised.value.exceptions[0])
    assert len(said) == MOST_FAILED_STARTS - 1


async def test_output_and_environment_reach_the_program_and_input_is_empty(tmp_path):
    code = "import os, sys; print(repr(sys.stdin.read()), os.environ['GREETING'])"
    what = program(tmp_path, f"{code}; sys.exit(2)")
    with pytest.raises(ExceptionGroup):
        async with supervised(what) as kept:
            await kept.serving.wait()
    assert what.log.read_text() == "'' hello\n"


async def test_when_the_supervisor_is_killed_nothing_it_started_is_left(tmp_path):
    log = tmp_path / "program.log"
    code = f"""
import asyncio, sys
from pathlib import Path
from services.local.processes import processes
async def main():
    async with processes() as started:
        command = [sys.executable, "-u", "-c", {IGNORES_SIGTERM!r}]
        process = await started.start(command, log=Path({str(log)!r}), environment={{}})
        print(process.pid, flush=True)
        await process.wait()
asyncio.run(main())
"""
    supervisor = await asyncio.create_subprocess_exec(
        sys.executable, "-c", code, cwd=ROOT, stdout=asyncio.subprocess.PIPE
    )
    pid = int(await supervisor.stdout.readline())
    await until(lambda: grandchildren(log))
    assert alive(pid)
    supervisor.kill()
    await supervisor.wait()
    await until(lambda: not alive(pid))
    await until(lambda: not alive(grandchildren(log)[0]))


async def test_a_session_that_has_ended_is_not_killed_by_the_sentinel():
    """Its number may belong to somebody else by then."""
    sentinel = await asyncio.create_subprocess_exec(
        *(sys.executable, str(ROOT / "services/local/sentinel.py")), stdin=asyncio.subprocess.PIPE
    )
    victims = [
        await asyncio.create_subprocess_exec("/bin/sleep", "1000", start_new_session=True)
        for _ in range(2)
    ]
    ended, left = (victim.pid for victim in victims)
    await sentinel.communicate(f"+{ended}\n+{left}\n-{ended}\n".encode())
    assert await victims[1].wait() == -signal.SIGKILL
    assert alive(ended)
    os.killpg(ended, signal.SIGKILL)
    await victims[0].wait()


@pytest.mark.parametrize(
    ("deaths", "delays"),
    [
        pytest.param([0, 1, 2, 4, 8], [0.5, 1, 2, 4, 8], id="doubles"),
        pytest.param([0, 1, 2, 4, 8, 16, 26], [0.5, 1, 2, 4, 8, 10, 10], id="has a bound"),
        pytest.param([0, 1, 60, 121], [0.5, 1, 1, 0.5], id="forgets after a minute"),
    ],
)
def test_a_program_that_has_served_is_started_again_ever_later(deaths, delays):
    restarts = Restarts()
    assert [restarts.delay_s(now, served=True) for now in deaths] == delays


def test_no_program_is_started_more_than_ten_times_a_minute():
    restarts, now, starts = Restarts(), 0.0, []
    while now < 600:
        starts.append(now)
        now += restarts.delay_s(now, served=True)
    assert max(sum(a <= b < a + 60 for b in starts) for a in starts) <= 10
    assert LONGEST_DELAY_S < 60


def test_only_failed_starts_in_a_row_are_given_up():
    restarts = Restarts()
    delays = [
        restarts.delay_s(now, served=served)
        for now, served in enumerate([False, False, True, False, False, False])
    ]
    assert [delay is None for delay in delays] == [False] * 5 + [True]
