"""Whatever is sent to the gateway is answered as documented, and disturbs nobody else."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING
from urllib.parse import quote

import httpx
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from rollmesh.api.tinker.v1 import tinker_pb2 as pb
from services.gateway.web.endpoints import ENDPOINTS
from tests.contract.gateway_bodies import (
    Names,
    Sent,
    good,
    parts,
    request,
)
from tests.contract.gateway_world import Neighbour, Tenant, World, running_world

if TYPE_CHECKING:
    from collections.abc import Iterator

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "25"))
"""For each endpoint."""
DOCUMENTED = {200, 204, 302, 400, 401, 404, 405, 408, 410, 413, 429}
"""503 is documented too, and means that a part of the mesh is away: none is here."""
KEYLESS = {
    ("GET", "healthz"),
    ("POST", "telemetry"),
    ("GET", "download/{token}/{name}"),
}
PREFIX = "/api/v1/"
OPENAI = [
    ("GET", "/v1/models"),
    ("GET", "/v1/models/{id:path}"),
    ("GET", "/v1/turns/{id}"),
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/completions"),
]
"""Beside those of the SDK. Their errors have OpenAI's form."""
TABLE = sorted([*ENDPOINTS, *OPENAI])
NEIGHBOUR, FUZZER = "neighbour", "fuzzer"


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Iterator[World]:
    with running_world(tmp_path_factory.mktemp("gateway"), NEIGHBOUR, FUZZER) as running:
        yield running


@pytest.fixture(scope="module")
def neighbour(world) -> Iterator[Neighbour]:
    with Neighbour(world.client(NEIGHBOUR)) as working:
        yield working
    # Whatever was sent meanwhile.
    assert working.error is None, working.error
    assert working.num_runs > 0


@pytest.fixture(scope="module")
def own(world) -> Names:
    with world.client(FUZZER) as http:
        return Tenant(http).work()[1]


@pytest.fixture(scope="module")
def http(world) -> Iterator[httpx.Client]:
    with world.client(FUZZER) as client:
        yield client


def send(http: httpx.Client, sent: Sent, key: str | None = None) -> httpx.Response:
    """What is answered; `key`: in place of the client's own."""
    headers = {**sent.headers, **({} if key is None else {"X-API-Key": key})}
    # Joined by hand: httpx would take /v1 as below the prefix.
    url = f"{str(http.base_url).partition('/api/')[0]}/{url_path(sent.path)}"
    request = http.build_request(
        sent.method, url, params=sent.query, content=sent.body, headers=headers
    )
    return http.send(request)


def url_path(path: str) -> str:
    return path[1:] if path.startswith("/") else PREFIX[1:] + path


def said(answer: httpx.Response) -> str:
    """What an error is about."""
    told = answer.json()
    return told["error"]["message"] if "error" in told else told["detail"]


def check(answer: httpx.Response, sent: Sent) -> None:
    """It has a documented status, and an error says what it is about."""
    assert answer.status_code in DOCUMENTED, (sent, answer.status_code, answer.text[:2000])
    if answer.status_code >= 400:
        assert answer.headers["content-type"] == "application/json", sent
        if answer.status_code != 408:
            assert said(answer), sent
    if answer.status_code == 429:
        assert float(answer.headers["retry-after"]) > 0


def test_every_route_of_the_application_is_fuzzed(world, own):
    routes = {
        (method, route.path.removeprefix(PREFIX))
        for route in world.application.routes
        for method in route.methods - {"HEAD"}
    }
    assert routes == set(TABLE) == set(good(own))


@pytest.mark.parametrize("endpoint", TABLE, ids=" ".join)
def test_whatever_comes_is_answered_as_documented(endpoint, world, http, own, neighbour):
    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        # A request says what is wrong with it as it is; to make it smaller takes minutes.
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def run(data: st.DataObject) -> None:
        sent, key = request(data.draw, endpoint, own, neighbour.names)
        answer = send(http, sent, key)
        check(answer, sent)
        if key is not None and endpoint not in KEYLESS:
            # A poll's body is read first, as who asks is asked again while it is held.
            polls = endpoint == ("POST", "retrieve_future")
            allowed = {401, 404, 400, 413} if polls else {401, 404}
            assert answer.status_code in allowed, (sent, answer.status_code)

    run()
    assert neighbour.error is None, neighbour.error


NOTHING_THERE = {
    ("POST", "cancel_future"): b"{}",
    ("POST", "sessions/search"): b'{"sessions":[],"next_cursor":null}',
    ("POST", "retrieve_futures"): b'{"completions":[],"cursor":0}',
}
"""What is said of what is not there, which is no error."""
ELSE_REFUSED = {
    ("POST", "create_custom_loss"),
    ("GET", "training_runs/{run}/checkpoints/{kind}/{name}/external_weights_urls"),
}
"""Refused whosever it is."""
OF_OTHERS = [each for each in TABLE if each not in KEYLESS]


@pytest.mark.parametrize("endpoint", OF_OTHERS, ids=" ".join)
def test_nothing_of_another_project_is_reached_by_its_names(endpoint, http, own, neighbour):
    method, path = endpoint
    theirs, ours = good(neighbour.names)[endpoint], good(own)[endpoint]
    for name, value in parts(neighbour.names).items():
        path = path.replace("{" + name + "}", quote(value, safe=""))
    if endpoint == ("DELETE", "auth/apikey/me"):
        return  # Names nobody's but the caller's own.
    if isinstance(theirs, pb.ForwardBackwardRequest):
        content = theirs.SerializeToString()
    else:
        content = httpx.Request("POST", "http://x", json=theirs or {}).content
    answer = send(http, Sent(method, path, content))
    check(answer, Sent(method, path, content))
    names_them = "{" in endpoint[1] or theirs != ours
    if endpoint in NOTHING_THERE:
        assert answer.status_code == 200
        assert answer.content == NOTHING_THERE[endpoint]
    elif endpoint in ELSE_REFUSED:
        assert answer.status_code == 400
    elif names_them:
        assert answer.status_code in {404, 410}, (answer.status_code, answer.text)
    for value in vars(neighbour.names).values():
        if endpoint[1] in {"sessions", "training_runs", "checkpoints", "sessions/search", "audit"}:
            assert value not in answer.text


@pytest.mark.parametrize("path", ["", "nothing", "asample/", "../healthz", "sessions//finish"])
@pytest.mark.parametrize("method", ["GET", "POST", "PATCH", "OPTIONS"])
def test_a_path_or_method_that_is_not_there_is_told_so(method, path, http):
    answer = http.request(method, path)
    assert answer.status_code in {200, 401, 404, 405, 307}
    if answer.status_code in {404, 405}:
        assert said(answer)


@pytest.mark.parametrize("endpoint", [e for e in TABLE if e not in KEYLESS], ids=" ".join)
@pytest.mark.parametrize("key", [None, "tml-nobody", "sk-other", "Bearer x", "eyJ.e30.x"])
def test_nobody_is_let_in_without_a_key(endpoint, key, world, own):
    method, path = endpoint
    for name, value in parts(own).items():
        path = path.replace("{" + name + "}", quote(value, safe=""))
    headers = {} if key is None else {"X-API-Key": key}
    with httpx.Client(base_url=world.url + PREFIX, headers=headers) as stranger:
        sent = Sent(method, path, b"{}", headers={"content-type": "application/json"})
        answer = send(stranger, sent)
    # A poll's body is read first.
    assert answer.status_code == (400 if endpoint == ("POST", "retrieve_future") else 401)
    assert said(answer)
