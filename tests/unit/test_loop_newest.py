"""A job whose completions under way move on to each newer version, in virtual time."""

from __future__ import annotations

import pytest

from rollmesh.errors import InternalError
from rollmesh.types import AdapterSource, Completion, PolicySpan
from services.coordinator.identity import check_identity
from services.coordinator.versions import Versions
from tests.fakes.job_mesh import Context, JobMesh, held_out, spec
from tests.fakes.virtual_time import simulate


def source(version):
    return AdapterSource("projects/p/adapters/j", version, f"digest-{version}", "trainer")


def moving_mesh(seed, *, max_staleness=2, continuing=True, **values):
    context = Context(
        spec(
            algorithm={"max_staleness": max_staleness},
            sampling={"continue_on_newest": continuing},
            **values,
        )
    )
    mesh = JobMesh(context, seed=seed)
    # So long that versions are published meanwhile.
    mesh.pieces = 4
    mesh.slowness = dict.fromkeys(("forward_backward", "optim_step", "publish", "load"), 0.1)
    mesh.length = lambda: 1
    return mesh


def versions_of(mesh, datum):
    """The versions of a trained rollout's tokens."""
    tokens = datum.target_token_ids.tolist()
    return [mesh.sampled_from[token] for token in tokens if token in mesh.sampled_from]


@pytest.mark.parametrize("max_staleness", [1, 2, 3])
@pytest.mark.parametrize("seed", range(10))
def test_completions_move_and_the_bound_counts_from_their_oldest_token(seed, max_staleness):
    mesh = moving_mesh(seed, max_staleness=max_staleness)
    assert simulate(mesh.run()).kind == "finished"
    assert mesh.version == 6
    assert max(mesh.staleness) <= max_staleness
    rollouts = [versions_of(mesh, datum) for data in mesh.data for datum in data]
    assert len(rollouts) == 6 * 6
    assert all(versions == sorted(versions) for versions in rollouts)
    assert any(len(set(versions)) > 1 for versions in rollouts)
    for step, data in zip(mesh.context.steps, mesh.data, strict=True):
        oldest = min(version for datum in data for version in versions_of(mesh, datum))
        assert step.metrics["staleness_max"] == step.step - 1 - oldest
    # The fake stops when a version is unloaded that a completion draws from.
    assert len(mesh.live) <= max_staleness + 1
    assert mesh.under_way == []


def test_without_it_every_completion_ends_on_the_version_that_it_began_with():
    mesh = moving_mesh(1, continuing=False)
    simulate(mesh.run())
    assert all(len(set(versions_of(mesh, datum))) == 1 for data in mesh.data for datum in data)


def test_an_evaluation_stays_on_its_version():
    mesh = moving_mesh(2, evaluation=held_out(every_steps=1))
    simulate(mesh.run())
    assert [step for step, _ in mesh.evaluation_prompts] == sorted(list(range(7)) * 5)


def test_what_moved_onto_the_trained_version_is_compared():
    mesh = moving_mesh(3)
    mesh.drift = {"s1": 0.5}
    simulate(mesh.run())
    told = [step.metrics.get("logprob_gap_max") for step in mesh.context.steps]
    assert told[0] == 0.5
    assert 0.5 in told[1:]


@pytest.mark.parametrize(
    ("spans", "says"),
    [
        pytest.param([(2, 3, "digest-3")], None, id="all of the first"),
        pytest.param([(1, 3, "digest-3"), (1, 5, "digest-5")], None, id="one left out"),
        pytest.param([(2, 4, "digest-4")], None, id="none of the first"),
        pytest.param([(1, 4, "digest-4"), (1, 3, "digest-3")], "version 3", id="back again"),
        pytest.param([(2, 2, "digest-2")], "version 2", id="before the first"),
        pytest.param([(1, 3, "digest-3"), (1, 6, "digest-6")], "version 6", id="not live yet"),
        pytest.param([(1, 3, "digest-3"), (1, 4, "digest-5")], "'digest-5'", id="other weights"),
        pytest.param([(1, 3, "digest-3"), (1, -1, "")], "version -1", id="the base model"),
    ],
)
def test_tokens_of_versions_that_the_job_did_not_make_live_in_this_order_are_refused(spans, says):
    versions = Versions(before=range(1, 3), continuing=True)
    for version in (3, 4, 5):
        versions.went_live(source(version))
    completion = Completion((7, 8), (-1.0, -1.0), tuple(PolicySpan(*s) for s in spans), "stop")
    possible = {3: "digest-3", **versions.since(source(3))}
    if says is None:
        check_identity([completion], source(3), 1, possible)
        return
    with pytest.raises(InternalError, match=says):
        check_identity([completion], source(3), 1, possible)


@pytest.mark.parametrize(("continuing", "kept"), [(False, [1, 3]), (True, [1, 2, 3])])
def test_what_a_completion_under_way_may_need_stays_live(continuing, kept):
    versions = Versions(before=range(1), continuing=continuing)
    for version in (1, 2, 3):
        versions.went_live(source(version))
    with versions.drawn_from(source(1)), versions.drawn_from(source(1)):
        assert versions.let_go(newest=3) == [each for each in (0, 1, 2) if each not in kept]
        assert versions.let_go(newest=3) == []
    assert versions.let_go(newest=3) == [each for each in kept if each != 3]


def test_only_a_job_that_continues_follows_what_is_newest():
    still, moving = (Versions(before=range(0), continuing=each) for each in (False, True))
    for version in (4, 5):
        still.went_live(source(version))
        moving.went_live(source(version))
    assert still.newest is None
    assert moving.newest.source == source(5)
