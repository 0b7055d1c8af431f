"""Sweep files: which jobs come of them, and what is refused by path and value."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rollmesh import convert
from rollmesh.api.coordinator.v1 import sweep_service_pb2 as pb
from rollmesh.errors import InvalidRequest
from rollmesh.sweep import (
    MAX_JOBS,
    HalvingSpec,
    SweepJob,
    SweepParameter,
    SweepSpec,
    expand,
    load_sweep_file,
)

EXAMPLES = sorted((Path(__file__).parents[2] / "examples" / "sweeps").glob("*.yaml"))
PEAK = "algorithm.learning_rate.peak"
SIZE = "algorithm.group_size"


def base(**changes: object) -> dict:
    return {
        "base_model": "arith",
        "dataset": {"generator": {"name": "arithmetic"}},
        "prompt": {"text": "{question}="},
        "reward": {"function": "exact_match"},
        "stop": {"max_steps": 30},
        **changes,
    }


def sweep(**values: object) -> SweepSpec:
    return SweepSpec.parse({"base": base(), **values}, source="sweep.yaml")


def grid(**values: list) -> list[dict]:
    names = {"peak": PEAK, "size": SIZE}
    return [{"path": names.get(key, key), "values": each} for key, each in values.items()]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        pytest.param(SweepSpec, pb.SweepSpec, id="SweepSpec"),
        pytest.param(SweepParameter, pb.SweepParameter, id="SweepParameter"),
        pytest.param(HalvingSpec, pb.HalvingSpec, id="HalvingSpec"),
        pytest.param(SweepJob, pb.SweepJob, id="SweepJob"),
    ],
)
def test_a_sweep_file_has_the_keys_of_the_protos(model, message):
    assert set(model.model_fields) == set(message.DESCRIPTOR.fields_by_name)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_every_example_makes_its_jobs(path):
    assert len(expand(load_sweep_file(path))) > 1
    assert EXAMPLES


def test_a_grid_makes_every_combination_and_the_last_parameter_varies_fastest():
    variants = expand(sweep(grid=grid(peak=[1e-3, 1e-4], size=[4, 8])))
    assert [variant.values for variant in variants] == [
        {PEAK: 1e-3, SIZE: 4},
        {PEAK: 1e-3, SIZE: 8},
        {PEAK: 1e-4, SIZE: 4},
        {PEAK: 1e-4, SIZE: 8},
    ]
    algorithms = [variant.spec.algorithm for variant in variants]
    assert [(a.learning_rate.peak, a.group_size) for a in algorithms] == [
        (1e-3, 4),
        (1e-3, 8),
        (1e-4, 4),
        (1e-4, 8),
    ]


def test_points_make_exactly_the_listed_jobs_and_leave_all_else_as_it_is():
    spec = sweep(
        base=base(algorithm={"group_size": 4, "learning_rate": {"schedule": "linear"}}),
        points=[{PEAK: 0.5}, {"seed": 3, "reward.parameters.scale": 2}, {}],
    )
    first, second, third = (variant.spec for variant in expand(spec))
    assert first.algorithm.learning_rate.peak == 0.5
    assert first.algorithm.learning_rate.schedule == "linear"
    assert first.algorithm.group_size == 4
    assert second.seed == 3
    assert second.reward.parameters == {"scale": 2}
    assert third == spec.base


def test_a_value_may_be_a_whole_section_and_may_be_of_one_that_the_base_leaves_out():
    spec = sweep(
        points=[
            {"sampling": {"temperature": 0.5}},
            {"evaluation.dataset.generator.name": "arithmetic", "evaluation.every_steps": 2},
        ]
    )
    first, second = (variant.spec for variant in expand(spec))
    assert first.sampling.temperature == 0.5
    assert second.evaluation.every_steps == 2


def test_tasks_are_shared_between_jobs_and_not_copied():
    tasks = {"tasks": [{"fields": {"question": "1"}}]}
    spec = sweep(
        base=base(dataset=tasks, evaluation={"dataset": tasks}),
        grid=grid(seed=[1, 2], **{"evaluation.every_steps": [3]}),
    )
    for variant in expand(spec):
        assert variant.spec.dataset is spec.base.dataset
        assert variant.spec.evaluation.every_steps == 3
        assert variant.spec.evaluation.dataset is spec.base.evaluation.dataset


def test_a_dataset_varies_by_its_generator_beside_tasks_of_the_base():
    tasks = {"dataset": {"tasks": TASKS}, "sets": [{"name": "a", "dataset": {"tasks": TASKS}}]}
    spec = sweep(
        base=base(evaluation=tasks),
        grid=grid(
            **{
                "dataset.generator.parameters.tasks": [1, 2],
                "evaluation.max_tasks": [1, 2],
            }
        ),
    )
    assert len(expand(spec)) == 4


TASKS = [{"fields": {"question": str(number)}} for number in range(2)]
OF_TASKS = {"dataset": {"tasks": TASKS}}
REFUSED = {
    "an unknown key, with the nearest": (
        {"grid": [{"path": "algorithm.learning_rate.peek", "values": [1.0]}]},
        "learning_rate.peek=1): algorithm.learning_rate.peek: unknown key; did you mean 'peak'?",
        "algorithm.learning_rate.peek",
    ),
    "a value of the wrong type": (
        {"grid": grid(size=[4, "many"])},
        'job 1 (algorithm.group_size="many"): algorithm.group_size: Input should be a valid int',
        SIZE,
    ),
    "a boolean for a number": (
        {"grid": grid(size=[True])},
        "algorithm.group_size: Input should be a valid integer",
        SIZE,
    ),
    "a value out of range": (
        {"grid": grid(peak=[-1.0])},
        "algorithm.learning_rate.peak: Input should be greater than 0, found '-1'",
        PEAK,
    ),
    "a combination that no job can be": (
        {"grid": grid(size=[1024], **{"algorithm.groups_per_step": [32, 4096]})},
        "job 1 (algorithm.group_size=1024, algorithm.groups_per_step=4096): algorithm: ",
        "algorithm",
    ),
    "a path through a value": (
        {"grid": [{"path": "seed.x", "values": [1]}], "base": base(seed=7)},
        "seed.x: seed has no keys: it is 7",
        "seed.x",
    ),
    "the same value twice": (
        {"grid": grid(size=[4, 8, 4.0])},
        "grid[0].values: 4 is there twice, for algorithm.group_size",
        "grid[0].values",
    ),
    "the same path twice": (
        {"grid": [*grid(size=[4]), *grid(size=[8])]},
        "grid[1].path: 'algorithm.group_size' and 'algorithm.group_size' set the same key",
        "grid[1].path",
    ),
    "a path within another": (
        {"points": [{"algorithm": {}, SIZE: 4}]},
        "points[0]: 'algorithm.group_size' and 'algorithm' set the same key",
        "points[0]",
    ),
    "the same point twice": (
        {"points": [{SIZE: 4, "seed": 1}, {"seed": 2}, {"seed": 1, SIZE: 4.0}]},
        "points[2]: the same as points[0]",
        "points[2]",
    ),
    "too many jobs": (
        {"grid": grid(seed=list(range(16)), size=list(range(2, 19)))},
        "grid: 272 jobs would come of it; a sweep has at most 256",
        "grid",
    ),
    "one adapter for all": (
        {"grid": grid(seed=[1]), "base": base(adapter={"id": "mine"})},
        "base.adapter.id: 'mine' cannot be the adapter of several jobs",
        "base.adapter.id",
    ),
    "adapters by name": (
        {"grid": [{"path": "adapter.id", "values": ["a", "b"]}]},
        "adapter.id: adapters are named like their jobs",
        "adapter.id",
    ),
    "adapters by name within a section": (
        {"grid": [{"path": "adapter", "values": [{"id": "a"}, {"id": "b"}]}]},
        "adapter.id: adapters are named like their jobs",
        "adapter.id",
    ),
    "a file to read": (
        {"grid": [{"path": "dataset", "values": [{"jsonl": "/etc/passwd"}]}]},
        "dataset.jsonl: files are read for `base` alone",
        "dataset.jsonl",
    ),
    "a comparison by evaluations that are not made": (
        {"grid": grid(seed=[1]), "halving": {"first_step": 3}},
        "halving.first_step: 3 needs evaluation.every_steps that divides it, found none",
        "halving.first_step",
    ),
    "a comparison between evaluations": (
        {
            "grid": grid(**{"evaluation.every_steps": [1, 3, 2]}),
            "base": base(evaluation={"dataset": {"generator": {"name": "arithmetic"}}}),
            "halving": {"first_step": 3},
        },
        "(evaluation.every_steps=2): halving.first_step: 3 needs evaluation.every_steps that div",
        "halving.first_step",
    ),
    "tasks": (
        {
            "grid": [{"path": "dataset.tasks", "values": [TASKS, TASKS[:1]]}],
            "base": base(**OF_TASKS),
        },
        "dataset.tasks: it brings tasks to dataset; a dataset may vary by its generator",
        "dataset.tasks",
    ),
    "a dataset with tasks": (
        {"points": [{"seed": 1, "dataset": {"tasks": TASKS}}]},
        "dataset: it brings tasks to dataset",
        "dataset",
    ),
    "a section with tasks": (
        {"points": [{"evaluation": {"dataset": {"tasks": TASKS}}}]},
        "evaluation: it brings tasks to evaluation.dataset",
        "evaluation",
    ),
    "a further set with tasks": (
        {
            "grid": grid(**{"evaluation.sets": [[{"name": "a", "dataset": {"tasks": TASKS}}]]}),
            "base": base(evaluation=OF_TASKS),
        },
        "evaluation.sets: it brings tasks to evaluation.sets[0].dataset",
        "evaluation.sets",
    ),
    "a comparison by rewards of what samples nothing": (
        {
            "grid": grid(seed=[1]),
            "base": base(sft={"completion": "{answer}"}),
            "halving": {"first_step": 3, "metric": "reward"},
        },
        "halving.metric: 'reward' needs jobs with a reward, and without sft",
        "halving.metric",
    ),
    "a comparison by rewards that there are not": (
        {
            "grid": grid(seed=[1]),
            "base": base(reward=None, sft={"completion": "{answer}"}),
            "halving": {"first_step": 3, "metric": "reward"},
        },
        "halving.metric: 'reward' needs jobs with a reward",
        "halving.metric",
    ),
}


@pytest.mark.parametrize(("values", "message", "field"), REFUSED.values(), ids=REFUSED)
def test_what_no_jobs_can_come_of_is_refused_by_path_and_value(values, message, field):
    with pytest.raises(InvalidRequest) as caught:
        expand(sweep(**values))
    assert message in str(caught.value)
    assert caught.value.context["field"] == field


@pytest.mark.parametrize(
    "values",
    [
        pytest.param({}, id="neither"),
        pytest.param({"grid": grid(seed=[1]), "points": [{"seed": 2}]}, id="both"),
    ],
)
def test_exactly_one_of_grid_and_points_is_needed(values):
    with pytest.raises(InvalidRequest, match="exactly one of grid and points"):
        sweep(**values)


@pytest.mark.parametrize(
    "halving",
    [{"first_step": 0}, {"first_step": 1, "factor": 1}, {"first_step": 1, "factor": 101}, {}],
)
def test_halving_out_of_range_is_refused(halving):
    with pytest.raises(InvalidRequest, match="halving"):
        sweep(grid=grid(seed=[1]), halving=halving)


def test_as_many_jobs_as_a_sweep_may_have_come_of_it():
    assert len(expand(sweep(grid=grid(seed=list(range(MAX_JOBS)))))) == MAX_JOBS


def test_the_files_of_the_base_are_read_and_the_keys_of_the_file_are_closed(tmp_path):
    (tmp_path / "tasks.jsonl").write_text('{"question": "1+1", "answer": 2}\n')
    values = {"base": base(dataset={"jsonl": "tasks.jsonl"}), "grid": grid(seed=[1, 2])}
    file = tmp_path / "sweep.yaml"
    file.write_text(json.dumps(values))
    spec = load_sweep_file(file)
    assert [task.fields for task in spec.base.dataset.tasks] == [{"question": "1+1", "answer": "2"}]

    file.write_text(json.dumps({**values, "girds": []}))
    with pytest.raises(InvalidRequest, match="girds: unknown key; did you mean 'grid'"):
        load_sweep_file(file)


@pytest.mark.parametrize(
    "values",
    [
        {"grid": grid(peak=[1e-3, 1e-4], size=[4, 8])},
        {"points": [{PEAK: 0.5, "seed": 3}, {"sampling": {"stop": ["x"]}}]},
        {"grid": grid(seed=[1]), "halving": {"first_step": 2, "factor": 4, "metric": "reward"}},
        {"grid": grid(seed=[1]), "halving": {"first_step": 2, "metric": "reward"}},
    ],
)
def test_a_spec_that_crosses_the_wire_is_the_same(values):
    spec = sweep(**values)
    assert convert.sweep_spec_from_pb(convert.sweep_spec_to_pb(spec)) == spec


def test_a_halving_that_leaves_its_first_step_out_is_refused_on_the_wire():
    message = convert.sweep_spec_to_pb(sweep(grid=grid(seed=[1])))
    message.halving.SetInParent()
    with pytest.raises(InvalidRequest, match=r"halving\.first_step"):
        convert.sweep_spec_from_pb(message)


def test_numbers_that_are_none_are_refused_on_the_wire():
    message = convert.sweep_spec_to_pb(sweep(grid=grid(seed=[1])))
    message.grid[0].values[0].number_value = float("nan")
    with pytest.raises(InvalidRequest):
        convert.sweep_spec_from_pb(message)
