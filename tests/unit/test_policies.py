"""Sampling from a policy by its name."""

from __future__ import annotations

import contextlib

import pytest

from rollmesh.errors import InvalidRequest
from rollmesh.types import AdapterSource, CompletionChunk, PolicyRef, PolicySpan, SamplingParams
from services.coordinator.newest import Publications
from services.coordinator.policies import Policies
from services.coordinator.scheduler import ProjectPolicy, Projects

ADAPTER = "projects/p/adapters/a"
PROJECTS = Projects(
    by_id={"fast": ProjectPolicy(max_priority=1), "slow": ProjectPolicy(max_priority=-1)}
)


class Endless:
    """Knows every base model and adapter, and draws from it until it is left."""

    left = False
    newest = None
    priority = ""

    async def resolve(self, policy):
        if policy.adapter:
            return "tiny", AdapterSource(policy.adapter, policy.policy_version or 7, "d")
        return policy.base_model, None

    async def compute_logprobs(self, *asked, priority="normal"):
        self.priority = priority

    async def stream(self, *asked, newest, priority, told):
        self.newest = newest
        self.priority = priority
        try:
            while True:
                yield CompletionChunk(0, (1,), (-1.0,), (PolicySpan(1, -1, ""),), None)
        finally:
            self.left = True


@pytest.fixture
def mesh():
    return Endless()


@pytest.fixture
def publications():
    return Publications()


@pytest.fixture
def begin(mesh, publications):
    policies = Policies(mesh, mesh, publications, PROJECTS)

    def begin(policy, project="p", **options):
        return policies.sample(f"projects/{project}", policy, [1], 1, SamplingParams(), **options)

    return begin


async def test_a_caller_that_leaves_in_the_middle_has_left_the_fleet_too(mesh, begin):
    async with contextlib.aclosing(begin(PolicyRef(base_model="tiny"))) as chunks:
        await anext(chunks)
        assert not mesh.left
    assert mesh.left


async def test_a_caller_that_continues_on_newest_hears_of_what_is_published(
    mesh, begin, publications
):
    chunks = begin(PolicyRef(adapter=ADAPTER), continue_on_newest=True)
    async with contextlib.aclosing(chunks):
        await anext(chunks)
        assert mesh.newest.source.policy_version == 7
        publications.announce(AdapterSource(ADAPTER, 8, "d8"))
        assert mesh.newest.source.digest == "d8"


async def test_a_version_that_is_published_while_it_is_resolved_is_heard_of(
    mesh, begin, publications
):
    resolve = mesh.resolve

    async def and_publish(policy):
        resolved = await resolve(policy)
        publications.announce(AdapterSource(ADAPTER, 8, "d8"))
        return resolved

    mesh.resolve = and_publish
    chunks = begin(PolicyRef(adapter=ADAPTER), continue_on_newest=True)
    async with contextlib.aclosing(chunks):
        await anext(chunks)
        assert mesh.newest.source.digest == "d8"


async def test_an_adapter_that_is_deleted_while_it_is_resolved_is_not_taken_for_the_next_one(
    mesh, begin, publications
):
    resolve = mesh.resolve

    async def and_make_anew(policy):
        resolved = await resolve(policy)
        publications.forget(ADAPTER)
        return resolved

    mesh.resolve = and_make_anew
    chunks = begin(PolicyRef(adapter=ADAPTER), continue_on_newest=True)
    async with contextlib.aclosing(chunks):
        await anext(chunks)
        later = publications.follow(ADAPTER)
        publications.announce(AdapterSource(ADAPTER, 0, "new"))
        assert later.source.digest == "new"
        assert mesh.newest.source.digest == "d"


async def test_a_base_model_has_nothing_newer_to_continue_on(begin):
    with pytest.raises(InvalidRequest) as caught:
        await anext(begin(PolicyRef(base_model="tiny"), continue_on_newest=True))
    assert caught.value.context["field"] == "continue_on_newest"


@pytest.mark.parametrize("policy", [PolicyRef(adapter=ADAPTER), PolicyRef(base_model="tiny")])
async def test_other_callers_stay_with_their_version(mesh, begin, policy):
    async with contextlib.aclosing(begin(policy)) as chunks:
        await anext(chunks)
        assert mesh.newest is None


@pytest.mark.parametrize("version", [0, 3])
async def test_who_names_a_version_cannot_continue_on_newest(begin, version):
    policy = PolicyRef(adapter=ADAPTER, policy_version=version)
    with pytest.raises(InvalidRequest) as caught:
        await anext(begin(policy, continue_on_newest=True))
    assert caught.value.context["field"] == "policy.policy_version"
    async with contextlib.aclosing(begin(policy)) as chunks:
        await anext(chunks)


@pytest.mark.parametrize(
    ("project", "asked", "given"),
    [
        ("p", "", "normal"),
        ("p", "normal", "normal"),
        ("p", "low", "low"),
        ("fast", "high", "high"),
        ("fast", "", "normal"),
        ("slow", "low", "low"),
        pytest.param("slow", "normal", "low", id="what clients say who say nothing"),
    ],
)
async def test_a_call_has_the_class_that_it_asks_for(mesh, begin, project, asked, given):
    chunks = begin(PolicyRef(base_model="tiny"), project, priority=asked)
    async with contextlib.aclosing(chunks):
        await anext(chunks)
    assert mesh.priority == given


@pytest.mark.parametrize(
    ("project", "asked", "allowed"),
    [
        ("p", "high", "low, normal"),
        ("slow", "high", "low"),
        ("fast", "HIGH", "low, normal, high"),
        ("fast", "urgent", "low, normal, high"),
    ],
)
async def test_a_class_that_there_is_not_or_not_for_the_project_is_refused(
    begin, project, asked, allowed
):
    with pytest.raises(InvalidRequest) as caught:
        await anext(begin(PolicyRef(base_model="tiny"), project, priority=asked))
    assert caught.value.context == {"field": "priority", "value": asked, "allowed": allowed}


@pytest.mark.parametrize(("project", "given"), [("p", "normal"), ("slow", "low")])
async def test_logprobs_have_the_class_of_who_says_nothing(mesh, publications, project, given):
    policies = Policies(mesh, mesh, publications, PROJECTS)
    await policies.compute_logprobs(f"projects/{project}", PolicyRef(base_model="tiny"), [1, 2])
    assert mesh.priority == given
