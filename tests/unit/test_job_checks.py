"""What CreateJob says of teachers and completions before anything runs."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest

from rollmesh.errors import InvalidRequest, NotFound
from services.coordinator.checks import Checks
from tests.fakes.job_mesh import TASKS, Letters, spec

MINE, ELSEWHERE = "projects/p/adapters/mine", "projects/p/adapters/elsewhere"
FOREIGN = "projects/q/adapters/foreign"


class Mesh:
    """Serves "tiny", "twin" with the same tokens and "stranger" with others."""

    def __init__(self, *, max_lengths=(), contexts=None):
        self._contexts = contexts or {}
        infos = [SimpleNamespace(max_length=length) for length in max_lengths]
        self._trainers = [SimpleNamespace(info=info) for info in [None, *infos]]

    def trainers(self, base_model):
        assert base_model == "tiny"
        return self._trainers

    def samplers(self, base_model):
        known = [SimpleNamespace(max_length=n) for n in self._contexts.get(base_model, ())]
        return [SimpleNamespace(info=info) for info in [None, *known]]

    def check(self, base_model, *, field, refusal):
        if base_model not in {"tiny", "twin", "stranger"}:
            raise refusal(f"{field}: nobody serves {base_model!r}", field=field)

    async def resolve(self, policy):
        base_models = {MINE: "tiny", ELSEWHERE: "twin", FOREIGN: "tiny"}
        if policy.adapter not in base_models or policy.policy_version == 9:
            raise NotFound(f"there is no {policy}")
        return base_models[policy.adapter], None

    def load_tokenizer(self, base_model):
        words = {"a": 0, "b": 1} if base_model != "stranger" else {"a": 1, "b": 0}
        return SimpleNamespace(vocabulary=words)


def check_teacher(contexts=None, **distillation):
    mesh = Mesh(contexts=contexts)
    checks = Checks(mesh, mesh, mesh, mesh, mesh, mesh.load_tokenizer)
    asyncio.run(checks.teacher("p", spec(distillation=distillation)))


@pytest.mark.parametrize(
    "distillation",
    [
        {},
        {"teacher_base_model": "tiny"},
        {"teacher_base_model": "twin"},
        {"teacher_adapter": MINE},
        {"teacher_adapter": MINE, "teacher_version": 3},
    ],
)
def test_who_reads_the_same_tokens_may_teach(distillation):
    check_teacher(**distillation)


@pytest.mark.parametrize(
    ("distillation", "error", "says"),
    [
        ({"teacher_base_model": "none"}, NotFound, "nobody serves 'none'"),
        ({"teacher_base_model": "stranger"}, InvalidRequest, "different vocabularies"),
        ({"teacher_adapter": ELSEWHERE}, InvalidRequest, "is on 'twin', and the job on 'tiny'"),
        ({"teacher_adapter": FOREIGN}, NotFound, f"there is no {FOREIGN}"),
        ({"teacher_adapter": "projects/p/adapters/none"}, NotFound, "there is no"),
        ({"teacher_adapter": MINE, "teacher_version": 9}, NotFound, "there is no"),
        ({"teacher_adapter": "mine"}, InvalidRequest, "distillation.teacher_adapter"),
    ],
)
def test_who_cannot_teach_is_refused(distillation, error, says):
    with pytest.raises(error, match=says) as caught:
        check_teacher(**distillation)
    if error is InvalidRequest:
        assert caught.value.context["field"].startswith("distillation.teacher_")


@pytest.mark.parametrize(
    "contexts", [{"tiny": [32]}, {"twin": [16]}, {"tiny": [32, 8], "twin": [64, 32]}]
)
def test_a_teacher_that_reads_all_that_is_drawn_or_has_not_said_so_may_teach(contexts):
    check_teacher(contexts, teacher_base_model="twin")


def test_a_teacher_that_reads_less_than_is_drawn_is_refused():
    contexts = {"tiny": [16, 32], "twin": [64, 31]}
    with pytest.raises(InvalidRequest, match="'twin' reads 31 tokens, and 'tiny' draws up to 32"):
        check_teacher(contexts, teacher_base_model="twin")


def check_completions(*max_lengths, completion="{answer}"):
    mesh = Mesh(max_lengths=max_lengths)
    checks = Checks(mesh, mesh, mesh, mesh, mesh, lambda _: Letters())
    asyncio.run(checks.completions(spec(sft={"completion": completion}), TASKS))


def test_completions_have_to_fit_every_trainer_that_is_known():
    # "q0=" and "0.": of 5 tokens 4 are read.
    check_completions()
    check_completions(9, 4)
    with pytest.raises(InvalidRequest, match="task 't0' has 3 tokens of prompt and 2"):
        check_completions(9, 3)


def test_a_completion_that_asks_for_what_a_task_has_not_is_refused():
    with pytest.raises(InvalidRequest, match=r"sft\.completion: task 't0' has no field 'hint'"):
        check_completions(completion="{hint}")


def test_a_job_that_learns_from_rewards_is_asked_nothing():
    asyncio.run(Checks(*[None] * 6).teacher("p", spec()))
    asyncio.run(Checks(*[None] * 6).completions(spec(), TASKS))
