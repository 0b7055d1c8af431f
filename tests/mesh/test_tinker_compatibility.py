"""The unmodified Tinker SDK against the mesh: every public method, and what came of it."""

from __future__ import annotations

import pytest
import pytest_asyncio

from tests.mesh.sdk.__main__ import PAGE
from tests.mesh.sdk.page import failures, page
from tests.mesh.sdk.versions import OLDEST, Unreachable, newest, run, runs

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(1800)]


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def done(mesh, tmp_path_factory):
    """What came of the exercises, by version; of the newest alone where that is all there is."""
    folder = tmp_path_factory.mktemp("sdk")
    try:
        return {each["version"]: each for each in await runs(mesh, folder)}
    except Unreachable:
        return {newest(): await run(mesh, newest(), None, folder)}


def of_oldest(done):
    if OLDEST not in done:
        pytest.skip(f"the package index, which has tinker {OLDEST}, cannot be reached")
    return done[OLDEST]


async def test_every_method_of_the_newest_sdk_has_its_effect(done):
    assert not failures(done[newest()]), "\n\n".join(failures(done[newest()]))


async def test_every_method_of_the_oldest_sdk_of_this_wire_has_its_effect(done):
    oldest = of_oldest(done)
    assert not failures(oldest), "\n\n".join(failures(oldest))


async def test_the_page_says_what_was_seen(done):
    told = page([done[newest()], of_oldest(done)])
    assert PAGE.read_text() == told, "python -m tests.mesh.sdk --write"
