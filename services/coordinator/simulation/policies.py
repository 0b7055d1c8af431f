"""Who gets a place on which sampler: the product's scheduler, and what it is compared with.

The baselines get the model's samplers and trainers for free, and passes that fuse the steps of
several jobs: they differ from the product in the order and the place of requests, in how many jobs
run at once, and, `colocated`, in which machines do what. So they are better here than the systems
that they stand for, whose other costs are not modelled.
"""

from __future__ import annotations

from collections import defaultdict, deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from services.coordinator.scheduler import Assignment, Projects, Scheduler

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from services.coordinator.scheduler import Request, SamplerState


class Policy(Protocol):
    """What the simulator asks of a scheduler; as `scheduler.Scheduler` has it."""

    def job_started(self, job: str) -> None: ...  # noqa: D102
    def job_ended(self, job: str) -> None: ...  # noqa: D102
    def submit(self, request: Request, now: float) -> None: ...  # noqa: D102
    def assign(self, samplers: Sequence[SamplerState], now: float) -> list[Assignment]: ...  # noqa: D102
    def preempt(self, samplers: Sequence[SamplerState], now: float) -> list[int]: ...  # noqa: D102
    def progress(self, request_id: int, *, num_tokens: int, num_finished: int) -> None: ...  # noqa: D102
    def finish(  # noqa: D102
        self, request_id: int, *, completed: bool, now: float, preempted: bool = False
    ) -> None: ...
    def restore_usage(self, project: str, day: int, tokens: int) -> None: ...  # noqa: D102


class Product(Scheduler):
    """The scheduler as it is."""

    def job_started(self, job: str) -> None:
        """It knows jobs by their requests."""

    def job_ended(self, job: str) -> None:
        """As above."""


class _Baseline:
    """No classes, no fairness, no quotas: requests in some order, where the fewest run."""

    def __init__(self, max_running_completions: int) -> None:
        self._bound = max_running_completions
        self._running: dict[int, tuple[Request, str, int]] = {}
        self._load: defaultdict[str, int] = defaultdict(int)

    def job_started(self, job: str) -> None:
        """Nothing, here."""

    def job_ended(self, job: str) -> None:
        """Nothing, here."""

    def preempt(self, samplers: Sequence[SamplerState], now: float) -> list[int]:  # noqa: ARG002
        """Nobody."""
        return []

    def restore_usage(self, project: str, day: int, tokens: int) -> None:
        """It counts none."""

    def progress(self, request_id: int, *, num_tokens: int, num_finished: int) -> None:  # noqa: ARG002
        """Completions of it ended."""
        request, address, left = self._running[request_id]
        self._running[request_id] = request, address, left - num_finished
        self._load[address] -= num_finished

    def finish(
        self,
        request_id: int,
        *,
        completed: bool,  # noqa: ARG002
        now: float,  # noqa: ARG002
        preempted: bool = False,  # noqa: ARG002
    ) -> None:
        """It has its place no more."""
        _, address, left = self._running.pop(request_id)
        self._load[address] -= left

    def _place(self, request: Request, addresses: Iterable[str]) -> Assignment | None:
        address = min(addresses, key=lambda one: (self._load[one], one), default="")
        if not address or self._load[address] >= self._bound:
            return None
        self._running[request.id] = request, address, request.num_completions
        self._load[address] += request.num_completions
        return Assignment(request, address)


class FirstCome(_Baseline):
    """One queue for all, in the order of arrival.

    Work-conserving as the product is; what it lacks is who is entitled to what.
    """

    def __init__(self, max_running_completions: int) -> None:
        super().__init__(max_running_completions)
        self._queue: deque[Request] = deque()

    def submit(self, request: Request, now: float) -> None:  # noqa: ARG002
        """To the end."""
        self._queue.append(request)

    def assign(self, samplers: Sequence[SamplerState], now: float) -> list[Assignment]:  # noqa: ARG002
        """From the beginning."""
        assigned = []
        addresses = [sampler.address for sampler in samplers]
        while self._queue and (placed := self._place(self._queue[0], addresses)):
            self._queue.popleft()
            assigned.append(placed)
        return assigned


class StaticPartition(_Baseline):
    """Each of at most `lanes` jobs at once has samplers of its own.

    The next job gets those of whoever ends. Idealised: the split is as even as the number of jobs
    allows, and takes no time.
    """

    def __init__(self, max_running_completions: int, lanes: int) -> None:
        super().__init__(max_running_completions)
        self._lanes = list(range(lanes))
        self._num_lanes = lanes
        self._lane_of: dict[str, int] = {}
        self._queues: defaultdict[str, deque[Request]] = defaultdict(deque)

    def job_started(self, job: str) -> None:
        """It gets a lane."""
        self._lane_of[job] = self._lanes.pop()

    def job_ended(self, job: str) -> None:
        """And gives it back."""
        self._lanes.append(self._lane_of.pop(job))

    def submit(self, request: Request, now: float) -> None:  # noqa: ARG002
        """To the end of its job's."""
        self._queues[request.job].append(request)

    def assign(self, samplers: Sequence[SamplerState], now: float) -> list[Assignment]:  # noqa: ARG002
        """Of each job on its own samplers."""
        assigned = []
        for job, queue in self._queues.items():
            if queue:
                own = [one.address for one in samplers[self._lane_of[job] :: self._num_lanes]]
                while queue and (placed := self._place(queue[0], own)):
                    queue.popleft()
                    assigned.append(placed)
        return assigned


class Turns(_Baseline):
    """Jobs take turns on the whole fleet; a turn is all that the job has waiting when it begins.

    The next turn begins when at most `tail` of the turn's completions are not ended. With none it
    is round robin per job as open-rl does, which drains one tenant's whole queue per turn. With a
    part it is phase-level round robin as RollMux describes (arXiv:2512.11306), whose long tails
    move to a few workers so that the next phase begins on the others: here the tail stays where it
    is, at no cost, and context switches are free.
    """

    def __init__(self, max_running_completions: int, tail: float) -> None:
        super().__init__(max_running_completions)
        self._tail = tail
        self._queues: dict[str, deque[Request]] = {}
        self._turn: deque[Request] = deque()
        self._of_turn: set[int] = set()
        self._size = 0
        self._left = 0

    def submit(self, request: Request, now: float) -> None:  # noqa: ARG002
        """To the end of its job's."""
        self._queues.setdefault(request.job, deque()).append(request)

    def progress(self, request_id: int, *, num_tokens: int, num_finished: int) -> None:
        """Completions of it ended."""
        super().progress(request_id, num_tokens=num_tokens, num_finished=num_finished)
        if request_id in self._of_turn:
            self._left -= num_finished

    def finish(
        self, request_id: int, *, completed: bool, now: float, preempted: bool = False
    ) -> None:
        """It has its place no more."""
        if request_id in self._of_turn:
            self._left -= self._running[request_id][2]
        super().finish(request_id, completed=completed, now=now, preempted=preempted)

    def assign(self, samplers: Sequence[SamplerState], now: float) -> list[Assignment]:  # noqa: ARG002
        """Of the turn, and of the next if it may begin."""
        assigned = []
        addresses = [sampler.address for sampler in samplers]
        while True:
            while self._turn and (placed := self._place(self._turn[0], addresses)):
                self._turn.popleft()
                assigned.append(placed)
            if self._turn or self._left > self._tail * self._size or not self._queues:
                return assigned
            job = next(iter(self._queues))
            self._turn = self._queues.pop(job)
            self._of_turn = {request.id for request in self._turn}
            self._left = self._size = sum(request.num_completions for request in self._turn)


@dataclass(frozen=True, slots=True)
class Setting:
    """A policy, how many jobs it lets run, and whether every machine both samples and trains."""

    new: Callable[[], Policy]
    max_running_jobs: int
    colocated: bool = False


POLICIES = ("rollmesh", "one_at_a_time", "colocated", "static", "fcfs", "round_robin", "phases")


def setting(
    name: str, *, bound: int, num_jobs: int, num_samplers: int, projects: Projects
) -> Setting:
    """One of POLICIES. `bound`: completions on one sampler at once.

    `one_at_a_time`: the whole fleet to one job, then to the next, with samplers and trainers of
    its own kind waiting for each other: disaggregated, as most trainers are run. `colocated`: the
    same, but all machines sample and then all train the step together, each its part of the tokens;
    what it takes to change between the two, and to train together, is not modelled.
    """

    def product() -> Policy:
        return Product(
            max_running_completions=bound,
            max_queued_requests=1_000_000,
            projects=projects,
            prompt_token_price=0.25,
        )

    lanes = min(num_jobs, num_samplers)
    return {
        "rollmesh": Setting(product, num_jobs),
        "one_at_a_time": Setting(lambda: FirstCome(bound), 1),
        "colocated": Setting(lambda: FirstCome(bound), 1, colocated=True),
        "static": Setting(lambda: StaticPartition(bound, lanes), lanes),
        "fcfs": Setting(lambda: FirstCome(bound), num_jobs),
        "round_robin": Setting(lambda: Turns(bound, 0.0), num_jobs),
        "phases": Setting(lambda: Turns(bound, 0.2), num_jobs),
    }[name]
