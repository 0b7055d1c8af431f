"""Leases over gRPC, and which versions a client finds, with a whole coordinator in this process."""

from __future__ import annotations

import pytest

from rollmesh import types
from rollmesh.errors import AlreadyExists, InvalidRequest, NotFound, Overloaded
from services.coordinator import retention
from services.coordinator.play import playing
from tests.fakes.coordinator import PROJECT, Fakes, eventually, running_coordinator, spec_of
from tests.fakes.mesh import BASE_MODEL, digest_of
from tests.fakes.training import ADAM, DATUM, LOSS

A = f"{PROJECT}/adapters/a"
LORA = types.LoraConfig(rank=4)
POLICY = types.PolicyRef(adapter=A)
AT_ONCE = {"version_retention_s": 0.0}


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(retention, "LOOK_EVERY_S", 0.02)


@pytest.fixture
def fakes():
    return Fakes()


@pytest.fixture
async def mesh(tmp_path, fakes):
    """Whose superseded versions go at once."""
    async with running_coordinator(tmp_path, fakes, max_leases=3, **AT_ONCE) as running:
        await running.until_served()
        await running.client.adapters.create(A, BASE_MODEL, LORA)
        await running.client.adapters.publish(A)
        yield running


@pytest.fixture
def client(mesh):
    return mesh.client


def version(number: int) -> types.PolicyRef:
    return types.PolicyRef(adapter=A, policy_version=number)


async def publish_next(client, adapter=A) -> int:
    held = await client.adapters.get(adapter)
    await client.training.forward_backward(adapter, held.next_sequence, [DATUM], LOSS)
    await client.training.optim_step(adapter, held.next_sequence + 1, ADAM)
    return (await client.adapters.publish(adapter)).policy_version


async def until_let_go(client, policy) -> str:
    """Return once the version is not found; what is said then."""
    said = ""

    async def gone() -> bool:
        nonlocal said
        try:
            await client.sampling.compute_logprobs(PROJECT, policy, [1, 2])
        except NotFound as error:
            said = str(error)
        return bool(said)

    await eventually(gone)
    return said


async def test_a_leased_version_outlives_twenty_publishes_and_the_others_do_not(client, fakes):
    lease = await client.sampling.create_lease(PROJECT, POLICY)
    assert (lease.adapter, lease.policy_version, lease.digest) == (A, 0, digest_of(A, 0))
    assert lease.name.startswith(f"{PROJECT}/leases/")
    for _ in range(20):
        await publish_next(client)
    for number in range(1, 20):
        said = await until_let_go(client, version(number))
    assert said == (
        f"version 19 of {A} is no longer kept, or was not published; the newest is 20, and what is "
        "superseded is kept for as long as somebody has a lease on it (CreateLease)"
    )
    (completion,) = await client.sampling.sample(PROJECT, version(0), [1])
    assert {span.policy_version for span in completion.spans} == {0}
    assert {(A, number) for number in range(1, 20)} == set(fakes.sampler.unloaded)
    await client.sampling.delete_lease(lease.name)
    await client.sampling.delete_lease(lease.name)
    await until_let_go(client, version(0))
    with pytest.raises(NotFound, match=lease.name):
        await client.sampling.renew_lease(lease.name)


async def test_a_version_can_be_sampled_for_a_while_after_it_was_superseded(tmp_path, fakes):
    async with running_coordinator(tmp_path, fakes) as mesh:
        await mesh.until_served()
        await mesh.client.adapters.create(A, BASE_MODEL, LORA)
        await mesh.client.adapters.publish(A)
        await publish_next(mesh.client)
        await mesh.client.adapters.create(f"{A}2", BASE_MODEL, LORA)
        assert await mesh.client.sampling.sample(PROJECT, version(0), [1])
    async with running_coordinator(tmp_path, fakes, **AT_ONCE) as mesh:
        await mesh.until_served()
        await until_let_go(mesh.client, version(0))


async def test_a_lease_that_is_not_renewed_expires_and_one_that_is_does_not(client):
    short = await client.sampling.create_lease(PROJECT, POLICY, ttl_s=0.3)
    await publish_next(client)
    long = await client.sampling.create_lease(PROJECT, POLICY, ttl_s=0.3)
    renewed = await client.sampling.renew_lease(long.name, ttl_s=3600)
    assert renewed.expire_time > long.expire_time + 3000
    assert (renewed.policy_version, renewed.digest) == (1, digest_of(A, 1))
    await publish_next(client)
    await until_let_go(client, version(0))
    with pytest.raises(NotFound, match="expired"):
        await client.sampling.renew_lease(short.name)
    assert await client.sampling.sample(PROJECT, version(1), [1])


async def test_without_a_ttl_it_lasts_five_minutes(client):
    lease = await client.sampling.create_lease(PROJECT, POLICY)
    longer = await client.sampling.create_lease(PROJECT, POLICY, ttl_s=600)
    assert 290 < longer.expire_time - lease.expire_time < 310
    again = await client.sampling.renew_lease(longer.name)
    assert 290 < longer.expire_time - again.expire_time < 310


async def test_a_restart_of_the_coordinator_keeps_leases(tmp_path, fakes):
    async with running_coordinator(tmp_path, fakes) as mesh:
        await mesh.until_served()
        await mesh.client.adapters.create(A, BASE_MODEL, LORA)
        await mesh.client.adapters.publish(A)
        lease = await mesh.client.sampling.create_lease(PROJECT, POLICY, request_id="r")
        for _ in range(2):
            await publish_next(mesh.client)
    async with running_coordinator(tmp_path, fakes, **AT_ONCE) as mesh:
        await mesh.until_served()
        await until_let_go(mesh.client, version(1))
        assert await mesh.client.sampling.sample(PROJECT, version(0), [1])
        assert await mesh.client.sampling.create_lease(PROJECT, POLICY, request_id="r") == lease
        await mesh.client.sampling.renew_lease(lease.name)


async def test_the_same_request_is_one_lease_and_no_request_id_is_another_each_time(client):
    first = await client.sampling.create_lease(PROJECT, POLICY, request_id="r")
    assert await client.sampling.create_lease(PROJECT, POLICY, request_id="r") == first
    with pytest.raises(AlreadyExists, match="request_id"):
        await client.sampling.create_lease(PROJECT, version(0), request_id="r")
    names = {(await client.sampling.create_lease(PROJECT, POLICY)).name for _ in range(2)}
    assert len(names | {first.name}) == 3


async def test_a_project_that_has_too_many_leases_is_told_so_until_one_ends(client):
    leases = [await client.sampling.create_lease(PROJECT, POLICY) for _ in range(3)]
    with pytest.raises(Overloaded, match="max_leases") as refusal:
        await client.sampling.create_lease(PROJECT, POLICY)
    assert refusal.value.context["allowed"] == "3"
    await client.sampling.renew_lease(leases[0].name)
    await client.sampling.delete_lease(leases[0].name)
    await client.sampling.create_lease(PROJECT, POLICY)


async def test_the_teacher_of_a_job_is_kept_while_it_runs_whatever_else_the_project_holds(
    tmp_path, fakes
):
    async with running_coordinator(
        tmp_path,
        fakes,
        max_leases=1,
        play=playing,
        **AT_ONCE,
    ) as mesh:
        await mesh.until_served()
        client, other = mesh.client, f"{PROJECT}/adapters/other"
        for adapter in (A, other):
            await client.adapters.create(adapter, BASE_MODEL, LORA)
            await client.adapters.publish(adapter)
        await client.sampling.create_lease(PROJECT, types.PolicyRef(adapter=other))
        spec = spec_of(
            distillation={"teacher_adapter": A},
            reward=None,
            algorithm={"group_size": 2, "groups_per_step": 1},
            stop={"max_steps": 100_000},
        )
        job = await client.jobs.create(PROJECT, spec, "j")
        refused = spec.model_copy(update={"base_model": "none"})
        with pytest.raises(NotFound, match="none"):
            await client.jobs.create(PROJECT, refused, "k")
        await mesh.until_step("j", 1)
        for _ in range(2):
            await publish_next(client)
        await until_let_go(client, version(1))
        await client.sampling.compute_logprobs(PROJECT, version(0), [1, 2])
        assert "kl_teacher" in (await client.jobs.get(job.name)).metrics
        await client.jobs.cancel(job.name)
        await until_let_go(client, version(0))


@pytest.mark.parametrize(
    ("project", "policy", "ttl_s", "error", "says"),
    [
        pytest.param(PROJECT, POLICY, 0, InvalidRequest, "ttl", id="no time"),
        pytest.param(PROJECT, POLICY, -1, InvalidRequest, "ttl", id="time before"),
        pytest.param(PROJECT, POLICY, 3601, InvalidRequest, "an hour", id="too long"),
        pytest.param("p", POLICY, 1, InvalidRequest, "project", id="project's name"),
        pytest.param(PROJECT, types.PolicyRef(), 1, InvalidRequest, "policy.adapter", id="nothing"),
        pytest.param(
            PROJECT,
            types.PolicyRef(base_model=BASE_MODEL),
            1,
            InvalidRequest,
            "policy.adapter",
            id="base model",
        ),
        pytest.param(
            PROJECT,
            types.PolicyRef(adapter=A, base_model="big"),
            1,
            InvalidRequest,
            "policy.base_model",
            id="another base model",
        ),
        pytest.param(PROJECT, version(7), 1, NotFound, "newest is 0", id="unpublished version"),
        pytest.param(
            PROJECT, types.PolicyRef(adapter=f"{A}x"), 1, NotFound, f"{A}x", id="no such adapter"
        ),
        pytest.param(
            "projects/other", POLICY, 1, NotFound, f"there is no {A}", id="another's adapter"
        ),
    ],
)
async def test_what_cannot_be_leased_is_refused(client, project, policy, ttl_s, error, says):
    with pytest.raises(error, match=says):
        await client.sampling.create_lease(project, policy, ttl_s=ttl_s)


@pytest.mark.parametrize("name", ["", "x", f"{PROJECT}/adapters/a", f"{PROJECT}/leases/A"])
async def test_what_is_no_leases_name_is_refused(client, name):
    for call in (client.sampling.renew_lease(name), client.sampling.delete_lease(name)):
        with pytest.raises(InvalidRequest, match="leases"):
            await call


async def test_a_lease_is_renewed_for_a_time_in_range(client):
    lease = await client.sampling.create_lease(PROJECT, POLICY)
    with pytest.raises(InvalidRequest, match="ttl"):
        await client.sampling.renew_lease(lease.name, ttl_s=4000)
    with pytest.raises(NotFound, match="projects/other/leases"):
        await client.sampling.renew_lease(lease.name.replace(PROJECT, "projects/other"))


async def test_a_deleted_adapters_leases_and_versions_end_at_once(client, fakes):
    lease = await client.sampling.create_lease(PROJECT, POLICY)
    await client.adapters.delete(A)
    with pytest.raises(NotFound, match=lease.name):
        await client.sampling.renew_lease(lease.name)
    with pytest.raises(NotFound, match=A):
        await client.sampling.sample(PROJECT, version(0), [1])
    assert fakes.sampler.unloaded == [(A, None)]
    await client.adapters.create(A, BASE_MODEL, LORA)
    await client.adapters.publish(A)
    assert (await client.sampling.create_lease(PROJECT, POLICY)).name != lease.name


async def test_a_sampler_that_does_not_unload_holds_nothing_up(client, fakes, monkeypatch):
    monkeypatch.setattr(retention, "UNLOAD_S", 0.1)
    fakes.sampler.unloading.clear()
    await publish_next(client)
    await until_let_go(client, version(0))
    await publish_next(client)
    await until_let_go(client, version(1))
    fakes.sampler.unloading.set()
    await publish_next(client)
    await until_let_go(client, version(2))

    async def told() -> bool:
        return (A, 2) in fakes.sampler.unloaded

    await eventually(told)


async def test_completions_that_follow_the_newest_hear_of_what_is_published(client, fakes):
    fakes.sampler.sampling.clear()

    async def left() -> bool:
        return fakes.sampler.num_aborted == 1

    stream = client.sampling.stream(PROJECT, POLICY, [1], 1, continue_on_newest=True)
    spans = []
    async for chunk in stream:
        spans += chunk.spans
        if len(spans) == 1:
            await publish_next(client)
            await eventually(left)
            fakes.sampler.sampling.set()
    assert [span.policy_version for span in spans] == [0, 1]
    assert spans[1].digest == digest_of(A, 1)
