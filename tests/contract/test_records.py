"""Records and keys over gRPC, with a whole coordinator in this process."""

from __future__ import annotations

import asyncio
import re

import pytest

from rollmesh import types
from rollmesh.errors import Conflict, InvalidRequest, NotFound, Overloaded
from services.coordinator import pruning
from services.coordinator import records as record_core
from tests.contract.test_record_store import num_records
from tests.fakes.coordinator import PROJECT, Fakes, eventually, running_coordinator

OTHER = "projects/q"
KEY = "sessions/a"
MAX = 256 * 1024


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(pruning, "LOOK_EVERY_S", 0.02)


@pytest.fixture
async def mesh(tmp_path):
    async with running_coordinator(tmp_path, Fakes(), max_records=5, max_keys=2) as running:
        yield running


@pytest.fixture
def client(mesh):
    return mesh.client


async def test_a_record_is_written_read_listed_and_deleted(client):
    written = await client.records.put(PROJECT, KEY, b"\0\xff{}", ttl_s=60.0)
    assert (written.key, written.value, written.revision) == (KEY, b"\0\xff{}", 1)
    assert written.expire_time == pytest.approx(written.create_time + 60.0)
    assert await client.records.get(PROJECT, KEY) == written
    other = await client.records.put(PROJECT, "sessions/b", b"")
    assert other.expire_time is None
    assert await client.records.list(PROJECT) == ([written, other], 2)
    assert await client.records.list(PROJECT, "sessions/b") == ([other], 1)
    newest = await client.records.list(PROJECT, "sessions/", page_size=1, newest_first=True)
    assert newest == ([other], 2)
    assert await client.records.list(PROJECT, page_size=1, offset=1) == ([other], 2)
    await client.records.delete(PROJECT, KEY, expected_revision=1)
    await client.records.delete(PROJECT, KEY, expected_revision=1)
    with pytest.raises(NotFound, match=f"{PROJECT} has no record '{KEY}'"):
        await client.records.get(PROJECT, KEY)


async def test_of_clients_that_change_the_same_revision_exactly_one_wins(client):
    for expected in range(4):
        writes = [
            client.records.put(PROJECT, KEY, b"%d" % number, expected_revision=expected)
            for number in range(6)
        ]
        ended = await asyncio.gather(*writes, return_exceptions=True)
        (won,) = [each for each in ended if isinstance(each, types.Record)]
        lost = [each for each in ended if isinstance(each, Conflict)]
        assert len(lost) == 5
        assert {each.context["revision"] for each in lost} == {str(expected + 1)}
        assert won == await client.records.get(PROJECT, KEY)
    with pytest.raises(Conflict, match="has revision 4, and expected was revision 3"):
        await client.records.delete(PROJECT, KEY, expected_revision=3)


async def test_projects_do_not_see_each_others_records(client):
    mine = await client.records.put(PROJECT, KEY, b"mine")
    with pytest.raises(NotFound, match=f"{OTHER} has no record"):
        await client.records.get(OTHER, KEY)
    assert await client.records.list(OTHER) == ([], 0)
    await client.records.delete(OTHER, KEY)
    await client.records.put(OTHER, KEY, b"theirs", expected_revision=0)
    assert await client.records.get(PROJECT, KEY) == mine
    assert await client.records.list(PROJECT) == ([mine], 1)


async def test_a_record_expires_and_leaves_no_row(client, mesh):
    await client.records.put(PROJECT, KEY, b"", ttl_s=0.2)
    await client.records.put(PROJECT, "kept", b"", ttl_s=3600)

    async def gone() -> bool:
        return await num_records(mesh.store) == 1

    await eventually(gone)
    with pytest.raises(NotFound):
        await client.records.get(PROJECT, KEY)
    assert [each.key for each in (await client.records.list(PROJECT))[0]] == ["kept"]


async def test_one_more_than_a_project_may_have_is_refused_and_a_change_is_not(client):
    for number in range(5):
        await client.records.put(PROJECT, f"k{number}", b"")
    with pytest.raises(Overloaded, match=f"{PROJECT} has 5 records, which is max_records"):
        await client.records.put(PROJECT, "k5", b"")
    await client.records.put(PROJECT, "k4", b"changed")
    await client.records.put(OTHER, "k5", b"")


async def test_the_largest_key_and_value_are_taken(client):
    key = "!~" * 120
    record = await client.records.put(PROJECT, key, b"x" * MAX, ttl_s=100 * 365 * 86400.0)
    assert await client.records.get(PROJECT, key) == record
    assert await client.records.list(PROJECT, key) == ([record], 1)


async def test_pages_of_large_values_are_shorter_and_lose_nothing(client, monkeypatch):
    monkeypatch.setattr(record_core, "MAX_PAGE_BYTES", 2 * MAX)
    for number in range(5):
        await client.records.put(PROJECT, f"k{number}", b"x" * MAX)
    pages, keys = [], []
    while len(keys) < 5:
        records, total = await client.records.list(PROJECT, "k", offset=len(keys))
        assert total == 5
        pages.append(len(records))
        keys += [record.key for record in records]
    assert keys == [f"k{number}" for number in range(5)]
    assert pages == [2, 2, 1]


BAD_KEYS = ["", "x" * 241, "a b", "a\n", "ü", "\x7f", "\0"]


@pytest.mark.parametrize(
    ("call", "field"),
    [
        *((lambda c, k=k: c.records.put(PROJECT, k, b""), "key") for k in BAD_KEYS),
        *((lambda c, k=k: c.records.get(PROJECT, k), "key") for k in BAD_KEYS),
        *((lambda c, k=k: c.records.delete(PROJECT, k), "key") for k in BAD_KEYS),
        *((lambda c, k=k: c.records.list(PROJECT, k), "prefix") for k in BAD_KEYS[1:]),
        (lambda c: c.records.put("p", KEY, b""), "project"),
        (lambda c: c.records.get("projects/P", KEY), "project"),
        (lambda c: c.records.list("projects/p/"), "project"),
        (lambda c: c.records.delete("projects/p/keys/k", KEY), "project"),
        (lambda c: c.records.put(PROJECT, KEY, b"x" * (MAX + 1)), "value"),
        (lambda c: c.records.put(PROJECT, KEY, b"", ttl_s=0), "ttl"),
        (lambda c: c.records.put(PROJECT, KEY, b"", ttl_s=101 * 365 * 86400.0), "ttl"),
        (lambda c: c.records.put(PROJECT, KEY, b"", expected_revision=-1), "expected_revision"),
        (lambda c: c.records.delete(PROJECT, KEY, expected_revision=0), "expected_revision"),
        (lambda c: c.records.list(PROJECT, page_size=1001), "page_size"),
        (lambda c: c.records.list(PROJECT, page_size=-1), "page_size"),
        (lambda c: c.records.list(PROJECT, offset=-1), "offset"),
        (lambda c: c.keys.create("p", ""), "parent"),
        (lambda c: c.keys.list("projects/p/keys"), "parent"),
        (lambda c: c.keys.create(PROJECT, "x" * 201), "note"),
        (lambda c: c.keys.create(PROJECT, "two\nlines"), "note"),
        (lambda c: c.keys.create(PROJECT, "\x1b[31m"), "note"),
        (lambda c: c.keys.delete(PROJECT), "name"),
        (lambda c: c.keys.delete("projects/p/keys/K"), "name"),
    ],
)
async def test_what_can_never_work_is_refused_with_its_field(client, call, field):
    with pytest.raises(InvalidRequest) as caught:
        await call(client)
    assert caught.value.context["field"] == field
    assert await client.records.list(PROJECT) == ([], 0)


async def test_a_key_lets_in_who_has_its_secret_until_it_is_deleted(client):
    key, secret = await client.keys.create(PROJECT, "für Ada")
    assert re.fullmatch(r"tml-[A-Za-z0-9_-]{43}", secret)
    assert re.fullmatch(r"projects/p/keys/key-[0-9a-f]{16}", key.name)
    assert (key.note, key.prefix) == ("für Ada", secret[:8])
    assert await client.keys.find(secret) == key
    second, other_secret = await client.keys.create(PROJECT, "")
    assert second.name != key.name
    assert other_secret != secret
    assert await client.keys.list(PROJECT) == [key, second]
    await client.keys.delete(key.name)
    with pytest.raises(NotFound):
        await client.keys.find(secret)
    with pytest.raises(NotFound, match=key.name):
        await client.keys.delete(key.name)
    assert await client.keys.find(other_secret) == second


async def test_projects_do_not_see_each_others_keys(client):
    mine, secret = await client.keys.create(PROJECT, "")
    theirs, other_secret = await client.keys.create(OTHER, "")
    assert await client.keys.list(PROJECT) == [mine]
    assert await client.keys.list(OTHER) == [theirs]
    with pytest.raises(NotFound):
        await client.keys.delete(mine.name.replace(PROJECT, OTHER))
    assert await client.keys.find(secret) == mine
    assert await client.keys.find(other_secret) == theirs


async def test_one_more_key_than_a_project_may_have_is_refused(client):
    for _ in range(2):
        await client.keys.create(PROJECT, "")
    with pytest.raises(Overloaded, match=f"{PROJECT} has 2 keys, which is max_keys"):
        await client.keys.create(PROJECT, "")
    await client.keys.create(OTHER, "")


@pytest.mark.parametrize("secret", ["", "tml-", "x" * 100_000, "tml-\0", "ü"])
async def test_what_is_no_secret_is_of_no_key(client, secret):
    await client.keys.create(PROJECT, "")
    with pytest.raises(NotFound, match="no key has this secret"):
        await client.keys.find(secret)
