"""A world for the scheduler, where each running completion gets one token per tick."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from services.coordinator.scheduler import (
    ProjectPolicy,
    Projects,
    Request,
    SamplerState,
    Scheduler,
    prefixes_of,
)

NOON = 86400 * 20_000 + 43200.0
A, B, C = (("projects/p/adapters/" + name, 3) for name in "abc")


def weighted(**weights):
    return {project: ProjectPolicy(weight=weight) for project, weight in weights.items()}


def scheduler_of(*, bound=8, queue=10_000, projects=None, price=1.0):
    return Scheduler(
        max_running_completions=bound,
        max_queued_requests=queue,
        projects=Projects(by_id=projects or {}),
        prompt_token_price=price,
    )


def request_of(number=0, policy=A, *, prompt=8, completions=1, max_tokens=16, **options):
    options = {"project": "p", "base_model": "tiny"} | options
    return Request(
        id=number,
        policy=policy,
        num_prompt_tokens=prompt,
        num_completions=completions,
        max_tokens=max_tokens,
        **options,
    )


def sampler_of(address, loaded=(), **options):
    return SamplerState(address, "tiny", loaded, **options)


def prefixed(prompt, policy=None, project="p"):
    prefixes = prefixes_of(project, policy, prompt)
    return request_of(policy=policy, prompt=len(prompt), prefixes=prefixes)


class World:
    """Samplers that decode, and clients that resubmit what was preempted.

    `order`: who was assigned; `tokens`: what each project got, priced; `left`: tokens to come of
    each completion under way, by request.
    """

    def __init__(self, *, samplers=1, bound=8, queue=10_000, projects=None, price=1.0, loaded=()):
        self.scheduler = scheduler_of(bound=bound, queue=queue, projects=projects, price=price)
        self.bound = bound
        self.price = price
        self.samplers = [sampler_of(f"s{n}", loaded) for n in range(samplers)]
        self.tokens = Counter()
        self.order = []
        self.assigned = Counter()
        self.left = {}
        self.lengths = {}
        self.address = {}
        self.waiting = {}
        self.next_id = 0
        self.now = NOON

    def submit(self, project="p", *, length=10, completions=1, prompt=5, model="tiny", **options):
        options = {
            "policy": None,
            "max_tokens": None,
            "job": f"projects/{project}/jobs/j",
        } | options
        request = request_of(
            self.next_id + 1,
            prompt=prompt,
            completions=completions,
            project=project,
            base_model=model,
            **options,
        )
        return self.put(request, [length] * completions)

    def put(self, request, lengths):
        self.scheduler.submit(request, self.now)
        self.next_id = request.id
        self.lengths[request.id] = lengths
        self.waiting[request.id] = request
        return request

    def withdraw(self, request):
        del self.waiting[request.id]
        self.scheduler.withdraw(request)

    def tick(self):
        self.assign()
        self.decode()

    def assign(self):
        assignments = self.scheduler.assign(self.samplers, self.now)
        for assignment in assignments:
            request = assignment.request
            del self.waiting[request.id]
            self.order.append(request.project)
            self.assigned[request.project] += 1
            self.address[request.id] = assignment.address
            self.left[request] = self.lengths[request.id]
            if not request.resumed:
                self.tokens[request.project] += request.num_prompt_tokens * self.price
        return [assignment.request for assignment in assignments]

    def decode(self):
        self.now += 1
        for request, left in list(self.left.items()):
            ended = left.count(1)
            self.scheduler.progress(request.id, num_tokens=len(left), num_finished=ended)
            self.tokens[request.project] += len(left)
            self.left[request] = [tokens - 1 for tokens in left if tokens > 1]
            if not self.left[request]:
                self.finish(request)

    def finish(self, request, *, completed=True):
        del self.left[request]
        self.scheduler.finish(request.id, completed=completed, now=self.now)

    def named(self):
        """The requests that are to be preempted now."""
        ids = self.scheduler.preempt(self.samplers, self.now)
        return [request for request in self.left if request.id in ids]

    def stop(self, request):
        """It is preempted, and what is left of it is submitted again."""
        left = self.left.pop(request)
        self.scheduler.finish(request.id, completed=False, now=self.now, preempted=True)
        rest = replace(request, id=self.next_id + 1, num_completions=len(left), resumed=True)
        return self.put(rest, left)

    def running(self, address):
        return sum(len(left) for r, left in self.left.items() if self.address[r.id] == address)

    def explain(self, request):
        schedule = self.scheduler.explain(request.project, request.subject, self.now)
        (waiting,) = schedule.waiting
        return waiting
