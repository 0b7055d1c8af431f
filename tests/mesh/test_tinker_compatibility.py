"""The unmodified Tinker SDK against the mesh: every public method, and what came of it."""

from __future__ import annotations

import pytest

from tests.mesh.sdk.__main__ import PAGE
from tests.mesh.sdk.page import failures, page
from tests.mesh.sdk.versions import OLDEST, Unreachable, fetched, newest, run

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(1800)]

DONE: dict[str, dict] = {}


async def test_every_method_of_the_newest_sdk_has_its_effect(mesh, tmp_path):
    done = await run(mesh, newest(), None, tmp_path)
    assert not failures(done), "\n\n".join(failures(done))
    DONE[newest()] = done


async def test_every_method_of_the_oldest_sdk_of_this_wire_has_its_effect(mesh, tmp_path):
    try:
        path = await fetched(OLDEST)
    except Unreachable as error:
        pytest.skip(f"the package index cannot be reached: {error}")
    done = await run(mesh, OLDEST, path, tmp_path)
    assert not failures(done), "\n\n".join(failures(done))
    DONE[OLDEST] = done


async def test_the_page_says_what_was_seen():
    missing = [version for version in (newest(), OLDEST) if version not in DONE]
    if missing:
        pytest.skip(f"there is no full run of the SDKs {', '.join(missing)}")
    told = page([DONE[newest()], DONE[OLDEST]])
    assert PAGE.read_text() == told, "python -m tests.mesh.sdk --write"
