"""`rollmesh project key`, against a whole coordinator."""

from __future__ import annotations

import pytest

from rollmesh.errors import NotFound
from tests.contract.test_cli import rollmesh, start
from tests.fakes.coordinator import Fakes, running_coordinator

__all__ = ["rollmesh", "start"]

KEY = ("project", "key")


@pytest.fixture
async def client(tmp_path, monkeypatch):
    async with running_coordinator(tmp_path, Fakes(), max_keys=2) as mesh:
        monkeypatch.setenv("ROLLMESH_ADDRESS", f"127.0.0.1:{mesh.port}")
        yield mesh.client


@pytest.mark.parametrize("project", ["team", "projects/team"])
async def test_a_key_is_made_and_its_secret_shown_this_once(client, rollmesh, project):
    made = await rollmesh(*KEY, "create", project, "--note", "for Ada", "--json")
    assert made.status == 0
    assert len(made.lines) == 1
    key = await client.keys.find(made.json["secret"])
    assert made.json["key"] == {
        "name": key.name,
        "note": "for Ada",
        "prefix": made.json["secret"][:8],
        "create_time": key.create_time,
    }
    assert key.name.startswith("projects/team/keys/")
    listed = await rollmesh(*KEY, "list", project, "--json")
    assert listed.json == {"keys": [made.json["key"]]}
    assert made.json["secret"] not in listed.stdout


async def test_a_person_sees_the_secret_on_a_line_of_its_own(client, rollmesh, monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    made = await rollmesh(*KEY, "create", "team", "--note", "laptop")
    secret = made.lines[-1]
    key = await client.keys.find(secret)
    monkeypatch.setenv("COLUMNS", "120")
    listed = await rollmesh(*KEY, "list", "team")
    assert secret not in listed.stdout
    for shown in (key.name, f"{secret[:8]}…", "laptop"):
        assert shown in listed.stdout
    assert (await rollmesh(*KEY, "list", "other")).lines == ["NAME  SECRET  CREATED  NOTE"]


async def test_a_key_that_is_deleted_lets_nobody_in(client, rollmesh):
    key, secret = await client.keys.create("projects/team")
    ended = await rollmesh(*KEY, "delete", key.name, "--json")
    assert (ended.status, ended.json) == (0, {"deleted": key.name})
    with pytest.raises(NotFound):
        await client.keys.find(secret)
    again = await rollmesh(*KEY, "delete", key.name)
    assert (again.status, again.stderr) == (1, f"error: there is no {key.name}\n")


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        (("create", "Team"), "project"),
        (("create", "projects/team/keys/k"), "project"),
        (("list", "projects/"), "project"),
        (("create", "team", "--note", "x" * 201), "note"),
        (("delete", "team"), "name"),
        (("delete", "projects/team"), "name"),
    ],
)
async def test_what_is_no_name_or_note_is_refused(client, rollmesh, arguments, field):
    ended = await rollmesh(*KEY, *arguments)
    assert ended.status == 2
    assert ended.stderr.startswith(f"error: {field}: ")
    assert ended.stdout == ""


async def test_a_third_key_where_two_may_be_is_refused(client, rollmesh):
    for _ in range(2):
        assert (await rollmesh(*KEY, "create", "team")).status == 0
    ended = await rollmesh(*KEY, "create", "team")
    assert ended.status == 1
    assert "projects/team has 2 keys, which is max_keys" in ended.stderr
