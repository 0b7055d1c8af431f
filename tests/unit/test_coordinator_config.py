"""The coordinator's configuration: what it fills in, and what it refuses with the key's name."""

from __future__ import annotations

from pathlib import Path

import pytest

from rollmesh.errors import InvalidRequest
from services.coordinator.config import CoordinatorConfig

LEAST = {"trainers": ["t:1"], "samplers": ["s:1"], "reward": "r:1"}


def parse(**values) -> CoordinatorConfig:
    return CoordinatorConfig.parse({**LEAST, **values}, source="file")


@pytest.mark.parametrize(
    ("values", "url"),
    [
        ({}, "sqlite:///.rollmesh/coordinator.sqlite"),
        ({"state_dir": "/var/mesh"}, "sqlite:////var/mesh/coordinator.sqlite"),
        ({"database": "sqlite:///x.sqlite"}, "sqlite:///x.sqlite"),
        ({"database": "postgresql://u@h/d"}, "postgresql://u@h/d"),
    ],
)
def test_where_the_store_is(values, url):
    assert parse(**values).database_url == url


def test_a_tokenizer_lies_where_the_base_models_name_says_unless_told_otherwise():
    config = parse(base_models=[{"name": "arith", "tokenizer": "models/arith"}, {"name": "big"}])
    found = {name: config.tokenizer_of(name) for name in ("arith", "big", "unlisted")}
    assert found == {"arith": "models/arith", "big": "big", "unlisted": "unlisted"}


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("trainer", ["t:1"], "trainer: unknown key; did you mean 'trainers'?"),
        ("trainers", [], "trainers: List should have at least 1 item"),
        ("database", "mysql://u@h/d", "database: needed is sqlite:///FILE or postgresql://"),
        ("database", "sqlite:///", "database: needed is sqlite:///FILE"),
        ("listen", "7400", "listen: '7400' is not host:port"),
        ("trainers", ["t:1", "t"], "trainers[1]: 't' is not host:port"),
        ("samplers", ["s:70000"], "samplers[0]: 's:70000' is not host:port"),
        ("reward", "http://r:1", "reward: 'http://r:1' is not host:port"),
        (
            "telemetry",
            {"otlp_endpoint": "http://c:4317"},
            "telemetry.otlp_endpoint: 'http://c:4317' is not host:port",
        ),
        ("max_running_jobs", 0, "max_running_jobs: Input should be greater than 0"),
        ("base_models", [{"nam": "x"}], "base_models[0].nam: unknown key; did you mean 'name'?"),
    ],
)
def test_a_mistake_is_refused_under_the_name_of_its_key(key, value, says):
    with pytest.raises(InvalidRequest) as refusal:
        parse(**{key: value})
    assert says in str(refusal.value)


def test_state_dir_is_a_folder_of_this_machine():
    assert parse(state_dir="somewhere").state_dir == Path("somewhere")
