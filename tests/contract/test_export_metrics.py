"""Metrics at TensorBoard, MLflow and W&B, read back as their own packages wrote them."""

# ruff: noqa: F811 - fixtures of another module

from __future__ import annotations

import asyncio
import importlib
import struct
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

import pytest
from tensorboardX.proto.event_pb2 import Event

from rollmesh.cli.sinks import LAST_EVENT
from rollmesh.cli.sinks.tensorboard import TensorBoard
from rollmesh.job import EvaluationCompleted, StepCompleted, Warned
from tests.contract.test_cli import (  # noqa: F401 - fixtures
    RUNNING,
    SUCCEEDED,
    Ended,
    coordinator,
    job_file,
    rollmesh,
    start,
    until,
)

NAME = "projects/default/jobs/sums"
SINKS = ["tensorboard", "mlflow", "wandb"]


def step(number: int) -> StepCompleted:
    return StepCompleted(
        step=number,
        policy_version=number,
        metrics={"reward_mean": number / 8, "loss": -0.5},
        phases={"wait": 0.25, "step": 1.0},
    )


def evaluation(number: int, name: str = "") -> EvaluationCompleted:
    return EvaluationCompleted(
        step=number, reward_mean=0.5 + number / 8, num_tasks=9, duration_s=1.0, set=name
    )


WARNING = Warned(reason="X", message="nothing to draw")
FIRST = [RUNNING, evaluation(0), step(1), WARNING, step(2)]
SECOND = [step(3), evaluation(3, "hard"), evaluation(3), SUCCEEDED]
HALF = {
    "evaluation/reward_mean": [(0, 0.5)],
    "train/reward_mean": [(1, 0.125), (2, 0.25)],
    "train/loss": [(1, -0.5), (2, -0.5)],
    "phase/wait": [(1, 0.25), (2, 0.25)],
    "phase/step": [(1, 1.0), (2, 1.0)],
}
WHOLE = {
    "evaluation/reward_mean": [(0, 0.5), (3, 0.875)],
    "evaluation/hard/reward_mean": [(3, 0.875)],
    "train/reward_mean": [(1, 0.125), (2, 0.25), (3, 0.375)],
    "train/loss": [(1, -0.5), (2, -0.5), (3, -0.5)],
    "phase/wait": [(1, 0.25), (2, 0.25), (3, 0.25)],
    "phase/step": [(1, 1.0), (2, 1.0), (3, 1.0)],
}


@pytest.fixture
def target(request, tmp_path, monkeypatch):
    """The command line's option for the sink, and what reads its points back by name."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    # This process may have imported what W&B advertises its other products for.
    monkeypatch.setenv("WANDB_DISABLE_WEAVE", "true")
    match request.param:
        case "tensorboard":
            return ("--tensorboard", str(tmp_path)), lambda: of_tensorboard(tmp_path)
        case "mlflow":
            uri = f"sqlite:///{tmp_path}/mlflow.db"
            return ("--mlflow", uri), lambda: of_mlflow(uri)
        case "wandb":
            return ("--wandb", "sums"), lambda: of_wandb(tmp_path)


def records(path: Path):
    """The bodies in a TFRecord file."""
    data = path.read_bytes()
    while data:
        (length,) = struct.unpack_from("<Q", data)
        yield data[12 : 12 + length]
        data = data[16 + length :]


def of_tensorboard(folder: Path) -> dict[str, list[tuple[int, float]]]:
    points = defaultdict(list)
    files = sorted(folder.glob("default/sums-*/events.*"), key=lambda path: path.stat().st_mtime_ns)
    for record in [record for path in files for record in records(path)]:
        event = Event.FromString(record)
        for value in event.summary.value:
            if value.HasField("simple_value") and value.tag != LAST_EVENT:
                points[value.tag].append((event.step, pytest.approx(value.simple_value)))
    return dict(points)


def of_mlflow(uri: str) -> dict[str, list[tuple[int, float]]]:
    client = importlib.import_module("mlflow").MlflowClient(tracking_uri=uri)
    (experiment,) = client.search_experiments(filter_string="name = 'rollmesh/default'")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.data.params["algorithm.group_size"] == "4"
    assert "dataset.tasks" not in " ".join(run.data.params)
    history = {name: client.get_metric_history(run.info.run_id, name) for name in run.data.metrics}
    return {
        name: sorted((metric.step, metric.value) for metric in metrics)
        for name, metrics in history.items()
    }


def of_wandb(folder: Path) -> dict[str, list[tuple[int, float]]]:
    pb = importlib.import_module("wandb.proto.wandb_internal_pb2")
    points, ids, steps = defaultdict(list), set(), []
    for path in sorted((folder / "wandb").glob("offline-run-*/run-*.wandb")):
        for record in whole(path, pb):
            match record.WhichOneof("record_type"):
                case "run":
                    ids.add(record.run.run_id)
                case "history":
                    items = record.history.item
                    row = {item.key or item.nested_key[0]: item.value_json for item in items}
                    steps.append(record.history.step.num)
                    for name, value in row.items():
                        if name.split("/")[0] in {"train", "phase", "evaluation"}:
                            points[name].append((int(row["job/step"]), float(value)))
    assert len(ids) == 1
    assert steps == sorted(set(steps))
    return dict(points)


def whole(path: Path, pb):
    """The records of a run that has ended; its own process writes them and outlives the command."""
    give_up_at = time.monotonic() + 60
    while time.monotonic() < give_up_at:
        found = [pb.Record.FromString(body) for body in leveldb(path)]
        if any(record.HasField("exit") for record in found):
            return found
        time.sleep(0.05)
    raise AssertionError(f"{path} has no end")


def leveldb(path: Path):
    """The records in a log of 32 KiB blocks behind a header of 7 bytes."""
    data, at, body = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if at % 32768 > 32768 - 7:
            at += -at % 32768
        length, kind = struct.unpack_from("<HB", data, at + 4)
        if not kind:
            break
        body += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in {1, 4}:  # whole, or the last part
            yield body
            body = b""


@pytest.fixture
async def job(coordinator, rollmesh, job_file):
    path = Path(job_file)
    path.write_text(f"{path.read_text()}algorithm: {{group_size: 4}}\n")
    await rollmesh("job", "create", job_file, "--id", "sums")

    async def tell(*happenings):
        await coordinator.tell(NAME, *happenings)
        last = len(coordinator.events[NAME])
        coordinator.jobs[NAME] = coordinator.jobs[NAME].model_copy(update={"last_event": last})

    coordinator.tell_job = tell
    await tell(*FIRST)
    return coordinator


@pytest.mark.parametrize("target", SINKS, indirect=True)
async def test_what_was_exported_is_not_exported_again(job, rollmesh, target):
    option, read = target
    ended = await rollmesh("job", "export-metrics", "sums", *option)
    assert (ended.status, ended.stderr) == (0, "")
    assert "up to event 6: " in ended.stdout
    assert read() == HALF

    await rollmesh("job", "export-metrics", "sums", *option)
    assert read() == HALF

    await job.tell_job(*SECOND)
    ended = await rollmesh("job", "export-metrics", "sums", *option, "--follow")
    assert "up to event 10: " in ended.stdout
    assert read() == WHOLE
    # What it has not is all that is asked for.
    assert job.watched_after[-1] == 6

    # The job has ended: nothing is waited for.
    assert (await rollmesh("job", "export-metrics", "sums", *option, "--follow")).status == 0
    assert read() == WHOLE


@pytest.mark.parametrize("target", ["tensorboard"], indirect=True)
async def test_to_follow_a_job_writes_each_event_as_it_comes(
    job,
    rollmesh,
    start,
    target,
):
    option, read = target
    ended = Ended()
    async with asyncio.TaskGroup() as tasks:
        arguments = ("job", "export-metrics", "sums", *option, "--follow")
        following = tasks.create_task(start(ended, *arguments))
        try:
            await until(lambda: read() == HALF)
            await job.tell_job(*SECOND[:-1])
            await until(lambda: read() == WHOLE)
            assert not following.done()
        finally:
            await job.tell_job(SUCCEEDED)
    assert ended.status == 0


async def test_sinks_that_are_not_equally_far_each_get_what_they_lack(
    job,
    rollmesh,
    tmp_path,
):
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    await rollmesh("job", "export-metrics", "sums", "--tensorboard", str(tmp_path))
    await job.tell_job(*SECOND)
    both = ("--mlflow", uri, "--tensorboard", str(tmp_path))
    await rollmesh("job", "export-metrics", "sums", *both)
    assert of_mlflow(uri) == WHOLE
    assert of_tensorboard(tmp_path) == WHOLE


async def test_a_torn_record_is_written_again_and_whole_ones_are_not(
    job,
    rollmesh,
    tmp_path,
):
    await rollmesh("job", "export-metrics", "sums", "--tensorboard", str(tmp_path))
    (path,) = tmp_path.glob("default/sums-*/events.*")
    path.write_bytes(path.read_bytes()[:-5])

    sink = TensorBoard(tmp_path, job.jobs[NAME])

    # Step 2 was event 6; what is known whole ends with step 1, event 4.
    assert sink.last_event == 4
    sink.close()


async def test_a_job_of_the_same_name_on_another_mesh_is_another_run(
    job,
    rollmesh,
    tmp_path,
):
    await rollmesh("job", "export-metrics", "sums", "--tensorboard", str(tmp_path))
    job.jobs[NAME] = job.jobs[NAME].model_copy(update={"create_time": 2000.0})
    await rollmesh("job", "export-metrics", "sums", "--tensorboard", str(tmp_path))
    assert len(list(tmp_path.glob("default/sums-*"))) == 2


async def test_a_sink_is_needed(job, rollmesh):
    ended = await rollmesh("job", "export-metrics", "sums")
    assert ended.status == 2
    assert "at least one of --tensorboard, --mlflow and --wandb" in ended.stderr


@pytest.mark.parametrize(
    ("option", "module"),
    [("--tensorboard", "tensorboardX"), ("--mlflow", "mlflow"), ("--wandb", "wandb")],
)
async def test_a_missing_package_is_named_with_its_extra(
    job,
    rollmesh,
    monkeypatch,
    tmp_path,
    option,
    module,
):
    imported = importlib.import_module

    def without(name, *arguments):
        if name.split(".")[0] == module:
            raise ModuleNotFoundError(name=module)
        return imported(name, *arguments)

    monkeypatch.setattr(importlib, "import_module", without)
    ended = await rollmesh("job", "export-metrics", "sums", option, str(tmp_path))
    assert ended.status == 1
    assert f"{option} needs the package {module}: pip install 'rollmesh[metrics]'" in ended.stderr


async def test_a_server_that_refuses_is_one_line(job, rollmesh):
    ended = await rollmesh("job", "export-metrics", "sums", "--mlflow", "nonsense://x")
    assert ended.status == 1
    assert ended.stderr.startswith("error: --mlflow: ")
    assert "Traceback" not in ended.stderr


def test_the_command_line_imports_none_of_their_packages():
    code = (
        "import sys, rollmesh.cli.__main__, rollmesh.cli.export_metrics\n"
        "from rollmesh.cli.sinks import mlflow, tensorboard, wandb\n"
        "sys.exit(bool({'tensorboardX', 'mlflow', 'wandb'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False)  # noqa: S603
    assert done.returncode == 0
