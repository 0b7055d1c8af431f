"""The configuration of a mesh on one machine, and what it is completed with."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import yaml

from rollmesh.errors import FailedPrecondition, InvalidRequest, Unavailable
from rollmesh.job import load_job_file
from rollmesh.rpc.server import serving
from services.coordinator.config import CoordinatorConfig
from services.coordinator.datasets import generate
from services.gateway.config import GatewayConfig
from services.local.config import LocalConfig, complete
from services.local.mesh import _alone_in, _reserved_port
from services.local.probes import until_serving
from services.reward.config import RewardConfig

ROOT = Path(__file__).resolve().parents[2]
VALUES = {
    "trainers": [{"base_model": {"name": "arith", "path": "models/arith"}}],
    "samplers": [{"base_model": {"name": "arith", "path": "models/arith"}}] * 2,
}


def changed(path, value):
    """VALUES with `value` at `path`."""
    values = copy.deepcopy({"coordinator": {}, "reward": {}, "gateway": {}, **VALUES})
    *parents, last = path
    part = values
    for key in parents:
        part = part[key]
    part[last] = value
    return values


def test_every_member_gets_its_address_and_the_coordinator_all_of_them(tmp_path):
    config = LocalConfig.parse(VALUES, source="test")
    names = ["coordinator", "trainer-0", "sampler-0", "sampler-1", "reward"]
    assert list(config.members()) == names
    addresses = {name: f"127.0.0.1:{port}" for port, name in enumerate(names, start=1)}
    configs = complete(config, addresses, tmp_path)
    assert {name: member.listen for name, member in configs.items()} == addresses
    coordinator = configs["coordinator"]
    assert coordinator.trainers == ["127.0.0.1:2"]
    assert coordinator.samplers == ["127.0.0.1:3", "127.0.0.1:4"]
    assert coordinator.reward == "127.0.0.1:5"
    assert coordinator.state_dir == tmp_path
    for name in ("coordinator", "trainer-0", "sampler-0", "sampler-1"):
        assert configs[name].blobs == str(tmp_path / "blobs")


def test_an_environment_that_the_mesh_starts_is_one_that_the_reward_service_knows(tmp_path):
    values = {
        **VALUES,
        "reward": {"environments": [{"name": "far", "addresses": ["far:7000"]}]},
        "environments": [
            {"name": "near", "command": ["python", "near.py"], "max_concurrent": 7},
            {"name": "other", "command": ["./other", "--fast"], "remote_name": "its-own"},
        ],
    }
    config = LocalConfig.parse(values, source="test")
    assert list(config.programs()) == ["environment-near", "environment-other"]
    names = [*config.members(), *config.programs()]
    addresses = {name: f"127.0.0.1:{port}" for port, name in enumerate(names, start=1)}
    reward = complete(config, addresses, tmp_path)["reward"]
    text = yaml.safe_dump(reward.model_dump(mode="json", exclude_unset=True))
    assert yaml.safe_load(text)["environments"] == [
        {"name": "far", "addresses": ["far:7000"]},
        {"name": "near", "addresses": [addresses["environment-near"]], "max_concurrent": 7},
        {
            "name": "other",
            "addresses": [addresses["environment-other"]],
            "remote_name": "its-own",
        },
    ]
    assert RewardConfig.parse(yaml.safe_load(text), source="test") == reward


def test_a_gateway_knows_the_tokenizers_of_the_coordinator_unless_it_has_its_own(tmp_path):
    (tmp_path / "here").mkdir()
    known = [{"name": "here", "tokenizer": str(tmp_path / "here")}, {"name": "hub/model"}]
    for own, tokenizer in (([], str(tmp_path / "here")), ([{"name": "here"}], "here")):
        values = {
            **VALUES,
            "coordinator": {"base_models": known},
            "gateway": {"base_models": own},
        }
        config = LocalConfig.parse(values, source="test")
        addresses = dict.fromkeys(config.members(), "127.0.0.1:1")
        assert complete(config, addresses, tmp_path)["gateway"].tokenizer_of("here") == tokenizer


@pytest.mark.parametrize(
    ("listen", "served_at", "reached_at"),
    [
        pytest.param(None, "127.0.0.1:6", "127.0.0.1:6", id="a free port"),
        pytest.param("10.0.0.9:0", "127.0.0.1:6", "127.0.0.1:6", id="a free port, explicitly"),
        pytest.param("127.0.0.1:8000", "127.0.0.1:8000", "127.0.0.1:8000", id="a port"),
        pytest.param("0.0.0.0:8000", "0.0.0.0:8000", "127.0.0.1:8000", id="everywhere"),
        pytest.param("[::]:8000", "[::]:8000", "[::1]:8000", id="everywhere, IPv6"),
    ],
)
def test_a_gateway_is_a_member_that_knows_the_coordinator(tmp_path, listen, served_at, reached_at):
    gateway = {} if listen is None else {"listen": listen}
    config = LocalConfig.parse({**VALUES, "gateway": gateway}, source="test")
    assert list(config.members())[-1] == "gateway"
    free = {name: f"127.0.0.1:{port}" for port, name in enumerate(config.members(), start=1)}
    addresses = {**free, **config.given_addresses()}
    assert addresses["gateway"] == reached_at
    gateway = complete(config, addresses, tmp_path)["gateway"]
    assert (gateway.coordinator, gateway.listen) == ("127.0.0.1:1", served_at)
    text = yaml.safe_dump(gateway.model_dump(mode="json", exclude_unset=True))
    assert GatewayConfig.parse(yaml.safe_load(text), source="test") == gateway


def test_without_its_section_there_is_no_gateway():
    config = LocalConfig.parse(VALUES, source="test")
    assert "gateway" not in config.members()
    assert config.given_addresses() == {}


def test_what_is_written_for_a_service_reads_back_the_same(tmp_path):
    config = LocalConfig.load(ROOT / "examples" / "local.yaml")
    addresses = dict.fromkeys(config.members(), "127.0.0.1:1")
    for name, member in complete(config, addresses, tmp_path).items():
        text = yaml.safe_dump(member.model_dump(mode="json", exclude_unset=True))
        assert type(member).parse(yaml.safe_load(text), source=name) == member


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        pytest.param(
            ("coordinator", "max_running_job"),
            1,
            "coordinator.max_running_job: unknown key; did you mean 'max_running_jobs'?",
            id="typo",
        ),
        pytest.param(
            ("trainers", 0, "num_threads"), 0, "trainers[0].num_threads: ", id="out of range"
        ),
        pytest.param(("samplers",), [], "samplers: ", id="no sampler"),
        pytest.param(("coordinator",), None, "coordinator: ", id="not a section"),
        pytest.param(("gateway", "listen"), "8000", "gateway.listen: ", id="no address"),
        pytest.param(("gateway", "port"), 1, "gateway.port", id="an unknown key"),
        pytest.param(("trainers",), {}, "trainers: ", id="not a list"),
        pytest.param(
            ("environments",),
            [{"name": "game", "command": []}],
            "environments[0].command: ",
            id="no program",
        ),
        pytest.param(
            ("environments",),
            [{"name": "game", "command": ["game"]}] * 2,
            "environments: there are two of the name game",
            id="two of a name",
        ),
        *(
            pytest.param(
                ("environments",),
                [{"name": "game", "command": ["game"], key: value}],
                f"environments: {key!r} is chosen when the mesh starts",
            )
            for key, value in {"addresses": ["127.0.0.1:1"], "tls": {}}.items()
        ),
        *(
            pytest.param(
                path, "127.0.0.1:1", f"{path[0]}: {path[-1]!r} is chosen when the mesh starts"
            )
            for path in (
                ("coordinator", "listen"),
                ("coordinator", "samplers"),
                ("coordinator", "state_dir"),
                ("coordinator", "blobs"),
                ("trainers", 0, "listen"),
                ("trainers", 0, "blobs"),
                ("samplers", 1, "listen"),
                ("reward", "listen"),
                ("gateway", "coordinator"),
            )
        ),
    ],
)
def test_a_wrong_key_is_named_with_its_section(path, value, said):
    with pytest.raises(InvalidRequest) as raised:
        LocalConfig.parse(changed(path, value), source="local.yaml")
    assert str(raised.value).startswith("local.yaml: ")
    assert said in str(raised.value)


async def test_a_reserved_port_serves_one_server_after_another():
    with _reserved_port() as port:
        address = f"127.0.0.1:{port}"
        for _ in range(2):
            async with serving(lambda _: None, services=[], address=address) as running:
                await running.ready()
                await until_serving(address)
                assert running.port == port
                with pytest.raises(Unavailable, match=f"cannot listen at {address}"):
                    async with serving(lambda _: None, services=[], address=address):
                        pass


def test_two_meshes_never_share_a_folder(tmp_path):
    second = _alone_in(tmp_path)
    with _alone_in(tmp_path), pytest.raises(FailedPrecondition, match="another mesh"):
        second.__enter__()
    with _alone_in(tmp_path):
        pass


def test_the_example_job_is_valid_and_its_generators_know_their_parameters():
    spec = load_job_file(ROOT / "examples" / "jobs" / "arithmetic.yaml")
    config = LocalConfig.load(ROOT / "examples" / "local.yaml")
    assert spec.base_model == config.trainers[0].base_model.name
    assert spec.adapter.rank <= config.samplers[0].max_rank
    assert isinstance(config.coordinator, CoordinatorConfig)
    train, held_out = (
        generate(generator.name, generator.parameters, seed=0)
        for generator in (spec.dataset.generator, spec.evaluation.dataset.generator)
    )
    assert train[0].fields.keys() == held_out[0].fields.keys() == {"question", "answer"}
    assert not {task.id for task in train} & {task.id for task in held_out}
