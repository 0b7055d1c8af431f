"""Following a job and drawing it, without a server."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from rollmesh.cli.follow import LONGEST_DELAY_S, MOST_RETRIES, ConnectionLost, follow
from rollmesh.cli.lines import event_line
from rollmesh.cli.output import one_line
from rollmesh.cli.view import EVALUATIONS_SHOWN, STEPS_SHOWN, JobView, sparkline
from rollmesh.errors import NotFound, Unavailable
from rollmesh.job import (
    EvaluationCompleted,
    JobEvent,
    StateChanged,
    StepCompleted,
    Warned,
)

AWAY = Unavailable("UNAVAILABLE: connection refused")
NAME = "projects/default/jobs/sums"


def event(number, happening=None):
    return JobEvent(number=number, time=1000.0 + number, event=happening or step(number))


def step(number, **metrics):
    phases = {"step": 2.0, "wait": 1.0, "forward_backward": 0.5, "sample": 0.9}
    return StepCompleted(step=number, policy_version=number, metrics=metrics, phases=phases)


def evaluation(number):
    return EvaluationCompleted(step=number, reward_mean=number / 1000, num_tasks=10, duration_s=1)


END = StateChanged(from_state="RUNNING", to_state="SUCCEEDED")


class Jobs:
    """A coordinator with these events, whose connection breaks as each of `breaks` says.

    A break is how many events a call answers before it fails with the error; None: it just ends.
    """

    def __init__(self, events, breaks):
        self.events = events
        self.breaks = iter(breaks)
        self.asked_after = []

    async def watch(self, name, after_event=0):
        assert name == NAME
        self.asked_after.append(after_event)
        count, error = next(self.breaks, (len(self.events), None))
        for event in self.events[after_event : after_event + count]:
            yield event
        if error:
            raise error


class Sleep:
    def __init__(self):
        self.delays = []

    async def __call__(self, delay):
        self.delays.append(delay)


async def followed(jobs, sleep):
    return [item async for item in follow(jobs, NAME, sleep=sleep)]


@pytest.mark.parametrize(
    "breaks",
    [
        pytest.param([], id="never lost"),
        pytest.param([(2, AWAY)], id="lost once"),
        pytest.param([(0, AWAY), (1, AWAY), (0, AWAY), (3, None)], id="again and again"),
        pytest.param([(2, None), (2, None)], id="the stream just ends"),
        pytest.param([(5, AWAY)], id="lost with the last event"),
    ],
)
async def test_every_event_comes_once_and_in_order_however_often_the_connection_is_lost(breaks):
    jobs = Jobs([event(1), event(2), event(3), event(4), event(5, END)], breaks)
    items = await followed(jobs, Sleep())
    events = [item for item in items if isinstance(item, JobEvent)]
    assert events == jobs.events
    assert items[-1] == jobs.events[-1]


async def test_a_coordinator_is_tried_again_ever_later_and_given_up_in_the_end():
    jobs, sleep = Jobs([event(1)], [(1, AWAY)] + [(0, AWAY)] * 1000), Sleep()
    with pytest.raises(Unavailable, match="connection refused"):
        await followed(jobs, sleep)
    assert len(sleep.delays) == MOST_RETRIES
    assert sleep.delays[:4] == [0.5, 1.0, 2.0, 4.0]
    assert max(sleep.delays) == LONGEST_DELAY_S
    assert set(jobs.asked_after[1:]) == {1}


async def test_an_event_makes_the_next_loss_a_first_one():
    jobs, sleep = (
        Jobs([event(1), event(2, END)], [(0, AWAY), (0, AWAY), (1, AWAY), (0, AWAY)]),
        Sleep(),
    )
    await followed(jobs, sleep)
    assert sleep.delays == [0.5, 1.0, 0.5, 1.0]


async def test_only_a_lost_connection_is_tried_again():
    gone = NotFound("there is no such job")
    with pytest.raises(NotFound):
        await followed(Jobs([event(1)], [(1, gone)]), Sleep())


def drawn(view):
    console = Console(file=io.StringIO(), width=110)
    console.print(view)
    return console.file.getvalue()


def view_after(*items):
    view = JobView(NAME, max_steps=1000, state="PENDING")
    for item in items:
        view = view.after(item)
    return view


def test_the_view_shows_the_newest_metrics_and_what_phases_cost():
    shown = drawn(
        view_after(
            event(1, StateChanged(from_state="PENDING", to_state="RUNNING")),
            event(2, step(1, reward_mean=0.25, loss=-0.5, kl_sampler=1e-4, tokens_per_s=100.0)),
            event(3, step(2, reward_mean=0.75, loss=-0.5, kl_sampler=1e-4, tokens_per_s=5432.1)),
        )
    )
    for said in ("RUNNING", "step 2/1000", "0.750", "0.250 … 0.750", "5,432", "1.00e-04"):
        assert said in shown
    wait = next(line for line in shown.splitlines() if " wait " in line)
    assert "1.000 s" in wait
    assert wait.count("█") == 12


def test_the_view_stays_small_however_long_the_job():
    warnings = [
        event(n, Warned(reason="SAMPLER_UNAVAILABLE", message="away")) for n in range(1, 100)
    ]
    steps = [event(n, step(n, reward_mean=0.5)) for n in range(100, 1000)]
    evaluations = [event(n, evaluation(n)) for n in range(1000, 1100)]
    view = view_after(*warnings, *steps, *evaluations)
    assert len(view.steps) == STEPS_SHOWN
    assert len(view.evaluations) == EVALUATIONS_SHOWN
    shown = drawn(view)
    assert len(shown.splitlines()) <= 24
    assert "after step 1000: reward 1.000" in shown
    assert "after step 1099: reward 1.099" in shown
    assert "99 warnings" in shown


def test_a_lost_connection_is_shown_until_the_next_event():
    lost = view_after(event(1), ConnectionLost("UNAVAILABLE: gone", 2.0))
    assert "connection lost (UNAVAILABLE: gone); trying again in 2 s" in drawn(lost)
    assert "connection lost" not in drawn(lost.after(event(2)))


@pytest.mark.parametrize(
    ("values", "bars"),
    [
        pytest.param([0.0, 0.5, 1.0], "▁▅█", id="rises"),
        pytest.param([3.0, 3.0], "▁▁", id="all the same"),
        pytest.param([float("nan"), 1.0, 2.0], " ▁█", id="not a number"),
        pytest.param([float("nan")], " ", id="only that"),
    ],
)
def test_a_sparkline_has_a_bar_for_each_value(values, bars):
    assert sparkline(values) == bars


def test_text_from_elsewhere_cannot_steer_the_terminal_or_break_the_line():
    hostile = Warned(reason="X\x1b[2J", message="one\ntwo\r\x07[red]three")
    line = event_line(event(1, hostile), 10)
    assert line.split(" ", 1)[1] == "warning X [2J: one two  [red]three"
    assert "[red]three" in drawn(view_after(event(1, hostile)))
    assert "\x1b" not in drawn(view_after(event(1, hostile)))
    assert one_line("plain") == "plain"
