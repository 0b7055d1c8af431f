"""A sweep: its spec as a sweep file says it, the jobs that come of it, and what is told of them.

The spec's keys are the fields of SweepSpec in protos/ (a test keeps them equal), plus `jsonl` in
`base`, as in a job file.
"""

from __future__ import annotations

import itertools
import json
import math
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    Field,
    NonNegativeInt,
    PositiveInt,
    ValidationError,
    model_validator,
)

from rollmesh.config import Config, explain, read_yaml
from rollmesh.errors import InvalidRequest
from rollmesh.job import DatasetSpec, JobSpec, JobState, inline_datasets, whole_numbers

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

MAX_JOBS = 256
"""Of one sweep."""
SweepState = Literal["RUNNING", "ENDED", "CANCELLED"]
_Values = Annotated[list[Any], AfterValidator(whole_numbers)]
_Point = Annotated[dict[str, Any], AfterValidator(whole_numbers)]


class SweepParameter(Config):
    """Values of one key of the spec."""

    path: str = Field(min_length=1)
    """Path of the key, e.g. `algorithm.learning_rate.peak`."""
    values: _Values = Field(min_length=1)
    """Its values. They bring no tasks: of a dataset its generator may vary."""


class HalvingSpec(Config):
    """Successive halving: at some steps the jobs are compared, and the losers are cancelled."""

    first_step: PositiveInt
    """The first step at which jobs are compared; the next are factor times as late each."""
    factor: int = Field(default=3, ge=2, le=100)
    """The best 1/factor of the jobs that are left go on, rounded up."""
    metric: Literal["evaluation", "reward"] = "evaluation"
    """What they are compared by: the newest evaluation of evaluation.dataset, whose every_steps has
    to divide first_step, or the mean reward over the steps since the comparison before, which jobs
    with sft have not."""


class SweepSpec(Config):
    """What to try: exactly one of `grid` and `points`."""

    base: JobSpec
    """What all jobs have in common."""
    grid: list[SweepParameter] = []
    """Every combination of these values."""
    points: list[_Point] = []
    """These combinations: values by path."""
    halving: HalvingSpec | None = None
    """Stop losers early. Absent: every job runs to its end."""

    @property
    def num_jobs(self) -> int:
        """How many jobs come of it."""
        if self.points:
            return len(self.points)
        return math.prod(len(parameter.values) for parameter in self.grid)

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if bool(self.grid) == bool(self.points):
            raise ValueError("exactly one of grid and points (not empty) is needed")
        return self


class SweepJob(Config):
    """One job of a sweep."""

    job: str
    """Resource name."""
    values: dict[str, Any]
    """Its values by path."""
    state: JobState
    """Where it is in its life."""
    state_reason: str = ""
    """Why."""
    step: NonNegativeInt = 0
    """Optimizer steps finished."""
    metric: float | None = None
    """What it is compared by; None: nothing yet."""
    rung: NonNegativeInt = 0
    """Comparisons that it has survived."""
    halved: bool = False
    """Whether a comparison ended it."""


class Sweep(Config):
    """A sweep as the coordinator tells it."""

    name: str
    """Resource name."""
    spec: SweepSpec
    """As it was created; datasets hold only their first task."""
    state: SweepState
    """Where it is."""
    create_time: float
    """Unix seconds."""
    jobs: list[SweepJob] = []
    """The best first; empty where sweeps are listed."""


class Variant(Config):
    """One job that comes of a sweep's spec."""

    values: dict[str, Any]
    """What is special about it, by path."""
    spec: JobSpec
    """All of it."""


def load_sweep_file(path: Path) -> SweepSpec:
    """The sweep in the YAML file at `path`, the `jsonl` datasets of its `base` put in as tasks.

    Raises:
        InvalidRequest: as load_job_file; or a job that cannot come of it, as `expand` says.
    """
    spec = SweepSpec.parse(read_yaml(path), source=str(path))
    spec = spec.model_copy(update={"base": inline_datasets(spec.base, path.parent)})
    expand(spec)
    return spec


def expand(spec: SweepSpec) -> list[Variant]:
    """The jobs of a sweep, in the order of their numbers: the last parameter varies fastest.

    Raises:
        InvalidRequest: the field is the parameter, or the key of the job's spec; the message says
            which values of which paths.
    """
    if spec.base.adapter.id:
        raise InvalidRequest(
            f"base.adapter.id: {spec.base.adapter.id!r} cannot be the adapter of several jobs; "
            "without it each has its own, named like the job",
            field="base.adapter.id",
            value=spec.base.adapter.id,
        )
    if spec.num_jobs > MAX_JOBS:
        field = "grid" if spec.grid else "points"
        raise InvalidRequest(
            f"{field}: {spec.num_jobs} jobs would come of it; a sweep has at most {MAX_JOBS}",
            field=field,
            value=spec.num_jobs,
            allowed=f"1 to {MAX_JOBS}",
        )
    points = _combinations(spec.grid) if spec.grid else _listed(spec.points)
    return [_variant(spec, number, point) for number, point in enumerate(points)]


def _combinations(grid: Sequence[SweepParameter]) -> list[dict[str, Any]]:
    for index, parameter in enumerate(grid):
        field = f"grid[{index}].path"
        _check_apart(parameter.path, [other.path for other in grid[:index]], field=field)
        seen: set[str] = set()
        for value in parameter.values:
            if _text(value) in seen:
                raise InvalidRequest(
                    f"grid[{index}].values: {_text(value)} is there twice, for {parameter.path}",
                    field=f"grid[{index}].values",
                    value=_text(value),
                )
            seen.add(_text(value))
    paths = [parameter.path for parameter in grid]
    rows = itertools.product(*(parameter.values for parameter in grid))
    return [dict(zip(paths, row, strict=True)) for row in rows]


def _listed(points: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    seen: dict[str, int] = {}
    for index, point in enumerate(points):
        paths = list(point)
        for position, path in enumerate(paths):
            _check_apart(path, paths[:position], field=f"points[{index}]")
        first = seen.setdefault(_text(point), index)
        if first != index:
            raise InvalidRequest(
                f"points[{index}]: the same as points[{first}]: {_text(point)}",
                field=f"points[{index}]",
                value=_text(point),
            )
    return list(points)


def _check_apart(path: str, others: Sequence[str], *, field: str) -> None:
    for other in others:
        if f"{path}.".startswith(f"{other}.") or f"{other}.".startswith(f"{path}."):
            raise InvalidRequest(
                f"{field}: {path!r} and {other!r} set the same key", field=field, value=path
            )


def _variant(spec: SweepSpec, number: int, point: dict[str, Any]) -> Variant:
    told = ", ".join(f"{path}={_text(value)}" for path, value in point.items()) or "no values"
    source = f"job {number} ({told})"
    values = _set_fields(spec.base)
    for path, value in point.items():
        _put(values, path, value)
    try:
        job = JobSpec.model_validate(values)
    except ValidationError as error:
        raise explain(error, JobSpec, source=source) from None
    if job.adapter.id:
        raise InvalidRequest(
            f"{source}: adapter.id: adapters are named like their jobs",
            field="adapter.id",
            value=job.adapter.id,
        )
    _check_datasets(job, spec.base, point, source)
    if spec.halving is not None:
        _check_halving(job, spec.halving, source)
    return Variant(values=point, spec=job)


def _set_fields(model: BaseModel) -> dict[str, Any]:
    """What was set of it. What is no part of a path stays as it is, validated: it may be large."""
    return {name: getattr(model, name) for name in model.model_fields_set}


def _put(values: dict[str, Any], path: str, value: object) -> None:
    *outer, last = path.split(".")
    for depth, key in enumerate(outer):
        inner = values.get(key)
        if isinstance(inner, BaseModel):
            inner = _set_fields(inner)
        elif inner is None:
            inner = {}
        elif not isinstance(inner, dict):
            raise InvalidRequest(
                f"{path}: {'.'.join(outer[: depth + 1])} has no keys: it is {inner!r:.100}",
                field=path,
                value=_text(value),
            )
        values[key] = dict(inner)
        values = values[key]
    values[last] = value


def _datasets(job: JobSpec) -> dict[str, DatasetSpec]:
    """By path."""
    datasets = {"dataset": job.dataset}
    if job.evaluation is not None:
        datasets["evaluation.dataset"] = job.evaluation.dataset
        for index, one in enumerate(job.evaluation.sets):
            datasets[f"evaluation.sets[{index}].dataset"] = one.dataset
    return datasets


def _check_datasets(job: JobSpec, base: JobSpec, point: Mapping[str, Any], source: str) -> None:
    """No path of a file may come of a value: whoever reads it here is not who wrote it.

    No tasks either: values are told with each job, and with each sweep of a list.
    """
    shared = {id(dataset) for dataset in _datasets(base).values()}
    for field, dataset in _datasets(job).items():
        if dataset.jsonl is not None:
            raise InvalidRequest(
                f"{source}: {field}.jsonl: files are read for `base` alone",
                field=f"{field}.jsonl",
                value=dataset.jsonl,
            )
        if dataset.tasks and id(dataset) not in shared:
            raise _tasks_vary(field, point)


def _tasks_vary(field: str, point: Mapping[str, Any]) -> InvalidRequest:
    outer = (path for path in point if f"{field}.".startswith((f"{path}.", f"{path}[")))
    path = next(outer, None) or next(path for path in point if path.startswith(f"{field}."))
    return InvalidRequest(
        f"{path}: it brings tasks to {field}; a dataset may vary by its generator and the "
        "generator's parameters, tasks may not vary",
        field=path,
    )


def _check_halving(job: JobSpec, halving: HalvingSpec, source: str) -> None:
    if halving.metric == "reward":
        if job.reward is None or job.sft is not None:
            raise InvalidRequest(
                f"{source}: halving.metric: 'reward' needs jobs with a reward, and without sft",
                field="halving.metric",
                value="reward",
            )
        return
    every = None if job.evaluation is None else job.evaluation.every_steps
    if every is None or halving.first_step % every:
        raise InvalidRequest(
            f"{source}: halving.first_step: {halving.first_step} needs evaluation.every_steps that "
            f"divides it, found {every or 'none'}; or compare by metric 'reward'",
            field="halving.first_step",
            value=halving.first_step,
        )


def _text(value: object) -> str:
    """Equal for equal values."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)


def describe(values: Mapping[str, Any]) -> dict[str, str]:
    """`values` by path, short, for a person to read."""
    return {
        path: value if isinstance(value, str) else _text(value) for path, value in values.items()
    }
