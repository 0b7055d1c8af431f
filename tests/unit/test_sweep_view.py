"""A sweep on the screen: what its table says, and that it outlives a lost connection."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from rollmesh.cli import sweep_view
from rollmesh.cli.follow import MOST_RETRIES, ConnectionLost
from rollmesh.cli.sweep_view import follow, picture, watch
from rollmesh.errors import Unavailable
from rollmesh.job import JobSpec
from rollmesh.sweep import Sweep, SweepJob, SweepSpec

BASE = JobSpec.model_validate(
    {
        "base_model": "arith",
        "dataset": {"generator": {"name": "arithmetic"}},
        "prompt": {"text": "{question}="},
        "reward": {"function": "exact_match"},
        "stop": {"max_steps": 30},
    }
)


def sweep(state="RUNNING", step=0, **changes) -> Sweep:
    points = [{"seed": 1, "stop.max_steps": 7}, {"seed": 2}]
    values = {"base": BASE, "points": points, "halving": {"first_step": 3, "metric": "reward"}}
    jobs = [
        SweepJob(
            job=f"projects/p/jobs/s-{number}",
            values=point,
            state="RUNNING",
            step=step,
            **(changes if number == 0 else {}),
        )
        for number, point in enumerate(points)
    ]
    spec = SweepSpec.model_validate(values)
    return Sweep(name="projects/p/sweeps/s", spec=spec, state=state, create_time=1.0, jobs=jobs)


class Client:
    """Answers one thing after the other."""

    def __init__(self, *answers):
        self.answers = list(answers)

    async def get(self, name):
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


class Naps:
    def __init__(self):
        self.seconds = []

    async def __call__(self, seconds):
        self.seconds.append(seconds)


def text_of(renderable) -> list[str]:
    out = io.StringIO()
    Console(file=out, width=200).print(renderable)
    return out.getvalue().splitlines()


def test_the_table_says_what_is_special_about_each_job_and_why_it_is_where_it_is():
    told = sweep(metric=0.123456, rung=2, state_reason="waits\nat step 9")
    title, _, first, second = text_of(picture(told))
    assert title == ("projects/p/sweeps/s  RUNNING  by reward, the best 1/3 go on at step 3, 9, …")
    assert first.split() == [
        *("s-0", "seed=1,", "stop.max_steps=7", "RUNNING", "0/7", "0.1235", "2"),
        *("waits", "at", "step", "9"),
    ]
    assert second.split() == ["s-1", "seed=2", "RUNNING", "0/30", "0"]


async def test_every_change_is_told_once_and_a_lost_connection_is_taken_up_again():
    away = Unavailable("connection refused")
    client = Client(sweep(step=1), sweep(step=1), away, away, sweep(step=2), sweep("ENDED", step=2))
    naps = Naps()
    told = [item async for item in follow(client, sweep(), sleep=naps)]
    assert told == [
        sweep(),
        sweep(step=1),
        ConnectionLost("connection refused", 0.5),
        ConnectionLost("connection refused", 1.0),
        sweep(step=2),
        sweep("ENDED", step=2),
    ]
    assert 0.5 in naps.seconds
    assert not client.answers


async def test_a_coordinator_that_stays_away_ends_it():
    client = Client(*[Unavailable("gone")] * (MOST_RETRIES + 1))
    with pytest.raises(Unavailable, match="gone"):
        _ = [item async for item in follow(client, sweep(), sleep=Naps())]
    assert not client.answers


async def test_on_a_terminal_the_table_is_drawn_anew_until_the_end(monkeypatch):
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=200)
    monkeypatch.setattr(sweep_view, "Console", lambda: console)
    monkeypatch.setattr(sweep_view, "REFRESH_S", 0.0)
    client = Client(sweep(), sweep(step=1), sweep("ENDED", step=2))
    ended = await watch(client, "projects/p/sweeps/s", as_json=False)
    assert ended == sweep("ENDED", step=2)
    for part in ("0/30", "1/30", "2/30", "ENDED"):
        assert part in out.getvalue()
