"""Where the secret of a key must not be, with a whole coordinator in this process."""

from __future__ import annotations

import logging

import pytest

from rollmesh.errors import MeshError, NotFound
from tests.fakes.coordinator import PROJECT, Fakes, running_coordinator


async def test_a_secret_is_in_no_file_log_trace_or_error(spans, tmp_path, caplog):
    wrong = "tml-nobody-was-ever-given-this-secret"
    errors: list[MeshError] = []
    with caplog.at_level(logging.DEBUG):
        async with running_coordinator(tmp_path, Fakes()) as mesh:
            key, secret = await mesh.client.keys.create(PROJECT, "note")
            await mesh.client.keys.find(secret)
            await mesh.client.keys.delete(key.name)
            _, kept = await mesh.client.keys.create(PROJECT, "note")
            for unknown in (secret, wrong):
                with pytest.raises(NotFound) as caught:
                    await mesh.client.keys.find(unknown)
                errors.append(caught.value)
    ended = [span.to_json() for span in spans()]
    # Three calls, of which each side has a span.
    assert sum("FindKey" in span for span in ended) == 6
    said = [repr(key), caplog.text, *ended, *(f"{error} {error.context}" for error in errors)]
    files = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert any(key.note.encode() in data for data in files)
    for each in (secret, kept, wrong):
        assert not any(each in text for text in said)
        assert not any(each[4:].encode() in data for data in files)
