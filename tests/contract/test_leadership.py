"""Two coordinators on one database, as processes: one leads, the other is there when it ends."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import sys
from pathlib import Path

import pytest
import yaml
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from rollmesh.api.reward.v1.reward_service_pb2_grpc import add_RewardServiceServicer_to_server
from rollmesh.client import Client
from rollmesh.errors import NotLeader, Unavailable
from rollmesh.job import JobSpec, StateChanged, StepCompleted
from rollmesh.rpc.channel import channel
from rollmesh.rpc.server import serving
from services.coordinator.servicers import SERVICES
from services.coordinator.store import LeadershipStore
from services.coordinator.store.database import Database
from services.local.mesh import _reserved_port
from services.local.probes import until_serving
from services.local.processes import processes
from tests.contract.test_coordinator_process import RewardServicer
from tests.fakes.coordinator import PROJECT, eventually, spec_of
from tests.fakes.databases import emptied, postgresql_server

ROOT = Path(__file__).parents[2]
NOBODY = "127.0.0.1:1"
LEASE_S = 2.0
ARITH = {"name": "arith", "path": str(ROOT / "models" / "arith")}


@pytest.fixture(scope="module")
def postgresql():
    with postgresql_server() as server:
        yield server


@pytest.fixture(params=["sqlite", "postgresql"])
async def database(request, tmp_path):
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/store.sqlite"
    return await emptied(request.getfixturevalue("postgresql"), "leadership")


class Coordinator:
    """One process, and what it says."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.said: list[str] = []
        self.address = ""
        self._news = asyncio.Condition()

    async def listen(self) -> None:
        async for line in self.process.stderr:
            record = {"message": line.decode()}
            with contextlib.suppress(ValueError):
                record = json.loads(line)
            if "port" in record:
                self.address = f"127.0.0.1:{record['port']}"
            async with self._news:
                self.said.append(record["message"])
                self._news.notify_all()

    async def until(self, message: str) -> None:
        async with asyncio.timeout(60), self._news:
            await self._news.wait_for(lambda: any(message in each for each in self.said))

    async def ended(self) -> int:
        async with asyncio.timeout(30):
            return await self.process.wait()


class World:
    """Coordinators on one database."""

    def __init__(self, folder: Path, tasks: asyncio.TaskGroup, values: dict[str, object]) -> None:
        self._folder = folder
        self._tasks = tasks
        self._values = values
        self.started: list[Coordinator] = []

    async def start(self) -> Coordinator:
        path = self._folder / f"coordinator-{len(self.started)}.yaml"
        path.write_text(yaml.safe_dump({"listen": "127.0.0.1:0", **self._values}))
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "services.coordinator", "--config", str(path)),
            cwd=ROOT,
            stderr=asyncio.subprocess.PIPE,
        )
        coordinator = Coordinator(process)
        self.started.append(coordinator)
        self._tasks.create_task(coordinator.listen())
        return coordinator

    async def pair(self) -> tuple[Coordinator, Coordinator]:
        """The leader and a follower."""
        leader = await self.start()
        await leader.until("serving")
        follower = await self.start()
        await follower.until(f"follows the leader at {leader.address}")
        return leader, follower


@contextlib.asynccontextmanager
async def world(folder: Path, database: str, **values: object):
    """Nothing of it is left afterwards."""
    values = {
        "state_dir": str(folder),
        "database": database,
        "trainers": [NOBODY],
        "samplers": [NOBODY],
        "reward": NOBODY,
        "leader_lease_s": LEASE_S,
        "drain_s": 1.0,
        **values,
    }
    async with asyncio.TaskGroup() as tasks:
        made = World(folder, tasks, values)
        try:
            yield made
        finally:
            for each in made.started:
                with contextlib.suppress(ProcessLookupError):
                    each.process.kill()
                await each.process.wait()


async def health(address: str, service: str) -> str:
    async with channel(address) as opened:
        stub = health_pb2_grpc.HealthStub(opened)
        answer = await stub.Check(health_pb2.HealthCheckRequest(service=service))
        return health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)


async def adapters(address: str) -> list[str]:
    """Of the project, which asks the store."""
    async with Client(address) as client:
        return [adapter.name async for adapter in client.adapters.list(PROJECT)]


async def test_one_leads_and_the_other_says_who_and_is_there_when_it_is_killed(tmp_path, database):
    async with world(tmp_path, database) as coordinators:
        leader, follower = await coordinators.pair()
        for service in ("", *SERVICES):
            assert await health(leader.address, service) == "SERVING"
            assert await health(follower.address, service) == "NOT_SERVING"
        assert await adapters(leader.address) == []
        with pytest.raises(NotLeader) as refused:
            await adapters(follower.address)
        assert refused.value.context["leader"] == leader.address
        assert refused.value.retry_after_s > 0
        async with channel(follower.address) as opened:
            stub = reflection_pb2_grpc.ServerReflectionStub(opened)
            asked = reflection_pb2.ServerReflectionRequest(list_services="")
            async for answer in stub.ServerReflectionInfo(iter([asked])):
                names = {service.name for service in answer.list_services_response.service}
                assert set(SERVICES) < names
                break
        both = f"{leader.address},{follower.address}"
        async with Client(both) as client:  # which finds the one that serves
            fleet = await client.fleet.get()
            leader.process.kill()
            await follower.until("serving")
            assert await health(follower.address, "") == "SERVING"
            assert await adapters(follower.address) == []

            async def found() -> bool:
                with contextlib.suppress(Unavailable):
                    return len((await client.fleet.get()).members) == len(fleet.members)
                return False

            await eventually(found)


async def test_a_leader_that_ends_well_is_succeeded_without_waiting_for_its_lease(
    tmp_path, database
):
    async with world(tmp_path, database, leader_lease_s=600.0) as coordinators:
        leader, follower = await coordinators.pair()
        leader.process.terminate()
        assert await leader.ended() == 0
        await follower.until("serving")
        follower.process.terminate()
        assert await follower.ended() == 0


async def test_a_follower_ends_well_too(tmp_path, database):
    async with world(tmp_path, database) as coordinators:
        leader, follower = await coordinators.pair()
        follower.process.terminate()
        assert await follower.ended() == 0
        assert await health(leader.address, "") == "SERVING"


async def test_a_leader_that_stalls_is_succeeded_and_ends_when_it_wakes_with_nothing_written(
    tmp_path, database
):
    async with (
        serving(
            lambda server: add_RewardServiceServicer_to_server(RewardServicer(), server),
            services=[],
        ) as reward,
        world(
            tmp_path,
            database,
            reward=f"127.0.0.1:{reward.port}",
            base_models=[{"name": "arith", "tokenizer": ARITH["path"]}],
        ) as coordinators,
    ):
        leader, follower = await coordinators.pair()
        async with Client(leader.address) as client:
            await client.jobs.create(PROJECT, spec_of(), "early")
            leader.process.send_signal(signal.SIGSTOP)
            # It is in the socket of the one that sleeps, and the first thing that it reads.
            writing = asyncio.create_task(client.jobs.create(PROJECT, spec_of(), "late"))
            await follower.until("serving")
            leader.process.send_signal(signal.SIGCONT)
            assert await leader.ended() == 1
            with pytest.raises(Unavailable):
                await writing
        assert any("leads no more: another coordinator leads" in each for each in leader.said)
        async with Client(follower.address) as client:
            names = [job.name async for job in client.jobs.list(PROJECT)]
            assert names == [f"{PROJECT}/jobs/early"]
        row = await read(database)
        assert (row.epoch, row.address) == (2, follower.address)


async def read(url: str):
    database = Database(url)
    try:
        return await LeadershipStore(database).read()
    finally:
        await database.close()


def spec(**changes: object) -> JobSpec:
    values = yaml.safe_load((ROOT / "examples" / "jobs" / "arithmetic.yaml").read_text())
    values |= {"stop": {"max_steps": 12}, "evaluation": None, **changes}
    values["algorithm"] |= {"groups_per_step": 4, "group_size": 2}
    return JobSpec.parse({key: value for key, value in values.items() if value}, source="test")


@contextlib.asynccontextmanager
async def fleet(folder: Path):
    """A real trainer, sampler and reward service: what coordinators are told of them."""
    with contextlib.ExitStack() as ports:
        names = ("trainer", "sampler", "reward")
        at = {name: f"127.0.0.1:{ports.enter_context(_reserved_port())}" for name in names}
        blobs = str(folder / "blobs")
        configs: dict[str, dict[str, object]] = {
            "trainer": {"base_model": ARITH, "num_threads": 1, "blobs": blobs},
            "sampler": {
                "base_model": ARITH,
                "backend": "transformers",
                "num_threads": 1,
                "max_rank": 16,
                "blobs": blobs,
            },
            "reward": {"num_workers": 1},
        }
        async with processes() as started:
            running = []
            for name, values in configs.items():
                path = folder / f"{name}.yaml"
                path.write_text(yaml.safe_dump({**values, "listen": at[name], "drain_s": 0.5}))
                command = (sys.executable, "-m", f"services.{name}", "--config", str(path))
                environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
                log = folder / f"{name}.log"
                running.append(await started.start(command, log=log, environment=environment))
            try:
                async with asyncio.timeout(180):
                    for address in at.values():
                        await until_serving(address)
                yield {
                    "trainers": [at["trainer"]],
                    "samplers": [at["sampler"]],
                    "reward": at["reward"],
                    "blobs": blobs,
                    "base_models": [{"name": "arith", "tokenizer": ARITH["path"]}],
                }
            finally:
                for process in running:
                    await started.end(process, within_s=10.0)


async def test_a_job_is_finished_by_the_successor_with_each_step_done_once(tmp_path, database):
    async with (
        fleet(tmp_path) as members,
        world(tmp_path, database, **members) as coordinators,
    ):
        leader, follower = await coordinators.pair()
        async with Client(leader.address) as client:
            job = await client.jobs.create(PROJECT, spec(), "j")
            async with asyncio.timeout(120):
                async for event in client.jobs.watch(job.name):
                    if isinstance(event.event, StepCompleted) and event.event.step == 3:
                        break
        leader.process.send_signal(signal.SIGSTOP)
        await follower.until("serving")
        leader.process.send_signal(signal.SIGCONT)
        assert await leader.ended() == 1
        async with Client(follower.address) as client, asyncio.timeout(240):
            events = [event async for event in client.jobs.watch(job.name)]
        assert [event.number for event in events] == list(range(1, len(events) + 1))
        steps = [event.event for event in events if isinstance(event.event, StepCompleted)]
        assert [(step.step, step.policy_version) for step in steps] == [
            (number, number) for number in range(1, 13)
        ]
        assert isinstance(events[-1].event, StateChanged)
        assert events[-1].event.to_state == "SUCCEEDED"
