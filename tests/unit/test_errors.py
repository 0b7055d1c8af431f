"""The catalogue of errors: complete, unambiguous, and in gRPC's vocabulary."""

from __future__ import annotations

import inspect

import grpc
import pytest

from rollmesh import errors
from rollmesh.errors import BY_REASON, InvalidRequest, MeshError

CLASSES = [
    found
    for _, found in inspect.getmembers(errors, inspect.isclass)
    if issubclass(found, MeshError) and found is not MeshError
]


def test_every_error_is_in_the_catalogue_under_a_reason_of_its_own():
    assert set(BY_REASON.values()) == set(CLASSES)
    assert all(error.reason == reason for reason, error in BY_REASON.items())
    assert len({error.reason for error in CLASSES}) == len(CLASSES)


@pytest.mark.parametrize("error", CLASSES)
def test_every_status_is_one_of_grpcs(error):
    assert error.status in grpc.StatusCode.__members__


@pytest.mark.parametrize("error", CLASSES)
def test_only_what_may_pass_by_itself_asks_for_a_retry(error):
    if error.retry_after_s:
        assert error.status in {"RESOURCE_EXHAUSTED", "UNAVAILABLE"}


def test_an_error_carries_its_message_and_its_context_as_text():
    error = InvalidRequest("rank: 0 is too small", field="rank", value=0, allowed=range(1, 3))
    assert str(error) == "rank: 0 is too small"
    assert error.context == {"field": "rank", "value": "0", "allowed": "range(1, 3)"}
