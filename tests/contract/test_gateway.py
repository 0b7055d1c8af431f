"""The gateway over HTTP, with a whole coordinator in this process: the rules of the Tinker wire."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import inspect
import json
import re
import sqlite3
import threading
import time
from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np
import pytest
import tinker
import zstandard

from rollmesh import types
from rollmesh.api.tinker.v1 import tinker_pb2
from rollmesh.errors import Unavailable
from services.gateway import aside
from services.gateway.app import PREFIX
from services.gateway.callers import Caller
from services.gateway.config import GatewayConfig
from services.gateway.gateway import gateway
from services.gateway.named import BELIEVED_S
from services.gateway.ports import Mesh
from services.gateway.training import Training
from services.gateway.web.endpoints import ENDPOINTS
from tests.fakes.coordinator import Fakes
from tests.fakes.gateway_world import PROTOBUF, batch, gateway_at, gateway_world

# The SDK does not close what it opens.
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")
OPEN = {"healthz", "telemetry", "download/{token}/{name}"}
"""Endpoints that need no key."""


@pytest.fixture
async def world(tmp_path):
    async with gateway_world(tmp_path, max_body_bytes=100_000) as running:
        yield running


@pytest.fixture
def caller(world):
    return world.caller()


def routes():
    """The endpoints as patterns: method, and what a path must match."""
    return [
        (method, re.compile(re.sub(r"\\{\w+\\}", "[^/]+", re.escape(path))))
        for method, path in ENDPOINTS
    ]


def test_every_path_that_the_sdk_names_is_served():
    package = Path(inspect.getfile(tinker)).parent
    named = set()
    for file in package.rglob("*.py"):
        if not file.name.endswith("_test.py"):
            named |= set(re.findall(r'["\']/api/v1/([^"\']*)["\']', file.read_text()))
    assert len(named) > 35
    missing = []
    for path in named:
        # {training_run_id} stands for one part, {checkpoint_id} for a kind and a name.
        concrete = re.sub(r"\{[^}]*checkpoint_id[^}]*\}", "weights/x", path)
        concrete = re.sub(r"\{[^}]*\}", "x", concrete)
        if not any(pattern.fullmatch(concrete) for _, pattern in routes()):
            missing.append(path)
    assert missing == []


@pytest.mark.parametrize(("method", "path"), list(ENDPOINTS))
async def test_nobody_gets_in_without_a_key(world, method, path):
    concrete = re.sub(r"\{\w+\}", "x", path)
    for headers in ({}, {"x-api-key": "tml-nobody"}, {"x-api-key": "eyJ.x.y"}):
        response = await world.http.request(
            method, world.urls[0] + PREFIX + concrete, headers=headers
        )
        if path in OPEN:
            assert response.status_code in {200, 404}
        else:
            # A poll without a request is nothing, whoever asks.
            assert response.status_code in ({400} if path == "retrieve_future" else {401})
        assert response.json()


async def test_a_key_that_is_deleted_lets_nobody_in(world, caller):
    assert (await caller.send("GET", "sessions")).status_code == 200
    assert (await caller.send("DELETE", "auth/apikey/me")).status_code == 204
    response = await caller.send("GET", "sessions")
    assert response.status_code == 401
    assert "detail" in response.json()


async def test_requests_run_in_the_order_of_their_numbers_in_whichever_they_come(world, caller):
    model = await caller.model()
    adam = {"learning_rate": 0.1}
    tickets = [
        await caller.post("forward_backward", batch(model, 2)),
        await caller.post("optim_step", {"model_id": model, "seq_id": 4, "adam_params": adam}),
        await caller.post("forward_backward", batch(model, 3)),
    ]
    assert world.fakes.trainer.num_ops == 0
    tickets.append(await caller.post("forward_backward", batch(model, 1)))
    for index in (0, 2, 3):
        output = await caller.trained(tickets[index])
        assert "loss:sum" in output.metrics
        assert output.loss_fn_outputs[0].num_datums == 1
    assert (await caller.result(tickets[1]))["type"] == "optim_step"
    assert world.fakes.trainer.num_ops == 4


async def test_a_repeat_answers_the_same_ticket_and_runs_once(world, caller):
    model = await caller.model()
    first = await caller.post("forward_backward", batch(model, 1))
    assert await caller.post("forward_backward", batch(model, 1)) == first
    await caller.trained(first)
    assert await caller.post("forward_backward", batch(model, 1)) == first
    # A result is there for as often as it is asked for.
    assert await caller.trained(first) == await caller.trained(first)
    assert world.fakes.trainer.num_ops == 1
    other = await caller.send(
        "POST", "forward_backward", content=batch(model, 1, (4, 5)), headers=PROTOBUF
    )
    assert other.status_code == 400


@pytest.mark.parametrize(
    ("path", "body", "said"),
    [
        ("forward_backward", lambda model: batch(model, 1, loss="nope"), "nope"),
        ("forward_backward", lambda model: batch(model, 1, loss="ppo"), "missing"),
        (
            "optim_step",
            lambda m: {"model_id": m, "seq_id": 1, "adam_params": {"beta1": "x"}},
            "beta1",
        ),
        (
            "optim_step",
            lambda m: {"model_id": m, "seq_id": 1, "optimizer_params": {"type": "dimuon"}},
            "adamw",
        ),
        ("save_weights", lambda m: {"model_id": m, "seq_id": 1, "path": "a/b"}, "a/b"),
        (
            "save_weights",
            lambda m: {"model_id": m, "seq_id": 1, "path": "a", "ttl_seconds": 1},
            "ttl",
        ),
        (
            "load_weights",
            lambda m: {
                "model_id": m,
                "seq_id": 1,
                "optimizer": True,
                "path": f"tinker://{m}/weights/none",
            },
            "no checkpoint",
        ),
        ("load_weights", lambda m: {"model_id": m, "seq_id": 1, "path": "x"}, "optimizer"),
        (
            "save_weights_external",
            lambda m: {"model_id": m, "seq_id": 1, "path": "x", "age_encryption_recipients": ["x"]},
            "recipients",
        ),
    ],
)
async def test_what_is_wrong_with_a_request_fails_at_its_place_and_the_next_runs(
    caller, path, body, said
):
    model = await caller.model()
    ticket = await caller.post(path, body(model))
    failed = await caller.result(ticket)
    assert failed["category"] == "user"
    assert said in failed["error"]
    assert (await caller.trained(await caller.post("forward_backward", batch(model, 2)))).metrics


@pytest.mark.parametrize("encoding", ["identity", "zstd", "gzip"])
async def test_a_batch_that_is_too_large_fails_at_its_place_and_the_next_runs(caller, encoding):
    model = await caller.model()
    body = batch(model, 1, [5] * 20_000)
    packed = {
        "identity": lambda data: data,
        "zstd": zstandard.ZstdCompressor().compress,
        "gzip": gzip.compress,
    }[encoding](body)
    headers = {**PROTOBUF, "content-encoding": encoding}
    response = await caller.send("POST", "forward_backward", content=packed, headers=headers)
    failed = await caller.result(response.json())
    assert "larger than 100000 bytes" in failed["error"]
    small = batch(model, 2)
    response = await caller.send(
        "POST",
        "forward_backward",
        content=zstandard.ZstdCompressor().compress(small),
        headers={**PROTOBUF, "content-encoding": "zstd"},
    )
    assert (await caller.trained(response.json())).metrics


async def test_other_bodies_that_are_too_large_are_refused(caller):
    response = await caller.send("POST", "asample", content=b" " * 200_000)
    assert response.status_code == 413
    assert "detail" in response.json()


async def test_what_is_read_before_anybody_is_known_is_small(world):
    nobody = world.caller()
    nobody.key = ""
    body = {"request_id": "x", "retrieved": "x" * 70_000}
    response = await nobody.send("POST", "retrieve_future", json=body)
    assert response.status_code == 413


async def test_nothing_of_one_project_is_there_for_another(world, caller):
    stranger = world.caller("q")
    session = await caller.session()
    model = await caller.model(session)
    await caller.step(model, 1)
    ticket = await caller.post("save_weights", {"model_id": model, "seq_id": 3, "path": "a"})
    path = (await caller.result(ticket))["path"]
    sampler = await caller.post(
        "create_sampling_session",
        {"session_id": session, "sampling_session_seq_id": 0, "model_path": path},
    )
    sampler_id = sampler["sampling_session_id"]

    async def status(method, url, **options):
        return (await stranger.send(method, url, **options)).status_code

    assert (await stranger.poll(ticket)).status_code == 410
    assert await status("GET", f"sessions/{session}") == 404
    assert await status("POST", "session_heartbeat", json={"session_id": session}) == 410
    assert await status("GET", f"samplers/{sampler_id}") == 404
    assert await status("GET", f"training_runs/{model}") == 404
    assert await status("GET", f"training_runs/{model}/checkpoints") == 404
    assert await status("DELETE", f"training_runs/{model}/checkpoints/weights/a") == 404
    assert await status("POST", "weights_info", json={"tinker_path": path}) == 404
    assert await status("POST", "copy_weights", json={"source_path": path}) == 404
    assert await status("POST", "get_info", json={"model_id": model}) == 404
    assert (
        await status("POST", "optim_step", json={"model_id": model, "seq_id": 4, "adam_params": {}})
        == 404
    )
    assert await status("POST", "forward_backward", content=batch(model, 4)) == 404
    own = {"session_id": await stranger.session(), "sampling_session_seq_id": 0}
    assert await status("POST", "create_sampling_session", json={**own, "model_path": path}) == 404
    load = {"session_id": own["session_id"], "model_seq_id": 0, "path": path, "optimizer": True}
    assert await status("POST", "load_weights", json=load) == 404
    sample = {
        "sampling_session_id": sampler_id,
        "seq_id": 0,
        "prompt": {"chunks": [{"tokens": [1]}]},
        "sampling_params": {},
    }
    assert await status("POST", "asample", json=sample) == 404
    for listing, field in (
        ("training_runs", "training_runs"),
        ("checkpoints", "checkpoints"),
    ):
        assert (await stranger.get(listing))[field] == []
    assert (await stranger.get("sessions"))["sessions"] == [own["session_id"]]
    found = await stranger.post("sessions/search", {"owner": {"type": "accessible"}})
    assert [each["session_id"] for each in found["sessions"]] == [own["session_id"]]


async def test_a_poll_is_held_until_there_is_something_to_say(world, caller):
    model = await caller.model()
    world.fakes.trainer.answering.clear()
    ticket = await caller.post("forward_backward", batch(model, 1))
    async with asyncio.TaskGroup() as tasks:
        poll = tasks.create_task(caller.poll(ticket))
        await world.fakes.trainer.ran.wait()
        assert not poll.done()
        world.fakes.trainer.answering.set()
    assert poll.result().status_code == 200


async def test_a_gateway_that_ends_holds_nobody(world, caller):
    model = await caller.model()
    # Number 1 never comes.
    ticket = await caller.post("forward_backward", batch(model, 2))
    async with asyncio.timeout(20), asyncio.TaskGroup() as tasks:
        poll = tasks.create_task(caller.poll(ticket))
        await asyncio.sleep(0)
        world.ending.set()
    assert poll.result().status_code == 408
    assert poll.result().json() == {
        "type": "try_again",
        "request_id": ticket["request_id"],
        "queue_state": "active",
    }


async def test_any_gateway_answers_for_the_tickets_of_another(tmp_path):
    async with gateway_world(tmp_path, num_gateways=2) as world:
        first, second = world.caller(), world.caller(gateway=1)
        model = await first.model()
        ticket = await second.post("forward_backward", batch(model, 1))
        assert await first.post("forward_backward", batch(model, 1)) == ticket
        assert (await first.trained(ticket)).metrics
        await first.step(model, 2)
        saved = await first.post(
            "save_weights_for_sampler", {"model_id": model, "seq_id": 4, "kind": "snapshot"}
        )
        sampler = (await second.result(saved))["sampling_session_id"]
        assert (await first.get(f"samplers/{sampler}"))["base_model"] == "arith"
        # What one signed, the other believes.
        token = (await first.post("auth/token", {}))["jwt"]
        second.key = token
        assert (await second.get("auth/apikey/me"))["details"]["org_details"]["name"] == "p"


async def test_results_outlive_the_coordinator_and_samples_are_drawn_anew(tmp_path):
    fakes = Fakes()
    async with gateway_world(tmp_path, fakes) as world:
        caller = world.caller()
        model = await caller.model()
        trained = await caller.post("forward_backward", batch(model, 1))
        before = await caller.trained(trained)
        sampler, sampled = await sample(caller)
        await caller.result(sampled)
    async with gateway_world(tmp_path, fakes) as world:
        again = world.caller()
        again.key = caller.key
        assert await again.trained(trained) == before
        # The SDK, upon this status, asks for another sample.
        assert (await again.poll(sampled)).status_code == 410
        _, sampled = await sample(again, sampler, seq=1)
        assert await again.result(sampled)


async def sample(caller, sampler=None, *, seq=0, **changes):
    """A sample of the base model: the sampling session and the ticket."""
    if sampler is None:
        body = {
            "session_id": await caller.session(),
            "sampling_session_seq_id": 0,
            "base_model": "arith",
        }
        sampler = (await caller.post("create_sampling_session", body))["sampling_session_id"]
    body = {
        "sampling_session_id": sampler,
        "seq_id": seq,
        "num_samples": 2,
        "prompt": {"chunks": [{"type": "encoded_text", "tokens": [1, 2]}]},
        "sampling_params": {"max_tokens": 3},
        **changes,
    }
    return sampler, await caller.post("asample", body)


async def test_a_sample_has_an_id_of_its_own_for_each_of_its_sequences(caller):
    sampler, ticket = await sample(caller, seq=3 * 10**9 + 5)
    response = tinker_pb2.SampleResponse.FromString(await caller.result(ticket))
    assert len(response.sequences) == len(ticket["sample_sequence_ids"]) == 2
    _, other = await sample(caller, sampler, seq=3 * 10**9 + 6)
    assert len({*ticket["sample_sequence_ids"], *other["sample_sequence_ids"]}) == 4
    assert (await sample(caller, sampler, seq=3 * 10**9 + 5))[1] == ticket


async def test_all_samples_of_one_client_can_be_waited_for_at_once(caller):
    sampler, first = await sample(caller)
    _, second = await sample(caller, sampler, seq=1)
    _, foreign = await sample(caller, sampler, seq=10**9)
    for ticket in (first, second, foreign):
        await caller.result(ticket)
    target = {"type": "sampling_session", "sampling_session_id": sampler, "cloned_sampler_id": 0}
    body = {"target": target, "prev_cursor": 0, "retrieved_request_ids": []}
    done = await caller.post("retrieve_futures", body)
    assert {each["request_id"] for each in done["completions"]} == {
        first["request_id"],
        second["request_id"],
    }
    body = {**body, "prev_cursor": done["cursor"], "timeout": 0}
    assert (await caller.post("retrieve_futures", body))["completions"] == []


async def test_clients_of_a_sampling_session_are_counted(caller):
    sampler, _ = await sample(caller)
    counted = [
        await caller.post("join_sampling_session", {"sampling_session_id": sampler})
        for _ in range(3)
    ]
    assert [each["client_counter"] for each in counted] == [1, 2, 3]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_samples": 0}, "num_samples"),
        ({"prompt": {"chunks": []}}, "prompt"),
        ({"prompt": {"chunks": [{"type": "image", "data": ""}]}}, "text"),
        ({"seq_id": -1}, "seq_id"),
        ({"seq_id": 2**63}, "seq_id"),
        ({"sampling_params": {"temperature": "x"}}, "temperature"),
        ({"topk_prompt_logprobs": 21}, "topk_prompt_logprobs"),
        ({"prompt_alt_tokens_k": 1}, "prompt_alt_tokens_k"),
    ],
)
async def test_a_sample_that_cannot_be_is_refused_at_once(caller, changes, said):
    sampler, _ = await sample(caller)
    body = {
        "sampling_session_id": sampler,
        "seq_id": 1,
        "prompt": {"chunks": [{"tokens": [1]}]},
        "sampling_params": {},
        **changes,
    }
    response = await caller.send("POST", "asample", json=body)
    assert response.status_code == 400
    assert said in response.json()["detail"]


async def save(caller, model, seq, name, **options):
    body = {"model_id": model, "seq_id": seq, "path": name, **options}
    return await caller.result(await caller.post("save_weights", body))


async def names(caller, model):
    listed = await caller.get(f"training_runs/{model}/checkpoints")
    return [each["checkpoint_id"] for each in listed["checkpoints"]]


async def test_a_name_is_overwritten_only_where_that_is_asked_for(world, caller):
    model = await caller.model()
    path = (await save(caller, model, 1, "a"))["path"]
    assert path == f"tinker://{model}/weights/a"
    first = await caller.get(f"training_runs/{model}")
    failed = await save(caller, model, 2, "a")
    assert failed["category"] == "user"
    assert "overwrite" in failed["error"]
    await caller.step(model, 3)
    assert (await save(caller, model, 5, "a", overwrite=True))["path"] == path
    second = await caller.get(f"training_runs/{model}")
    assert second["last_checkpoint"]["time"] > first["last_checkpoint"]["time"]
    assert await names(caller, model) == ["weights/a"]
    # What was overwritten takes no room.
    adapter = f"projects/p/adapters/{model.replace(':train:', '-')}"
    kept = [each async for each in world.coordinator.client.checkpoints.list(adapter)]
    assert len(kept) == 1
    # And a name is free again when its checkpoint is deleted.
    response = await caller.send("DELETE", f"training_runs/{model}/checkpoints/weights/a")
    assert response.status_code == 204
    assert await names(caller, model) == []
    assert (await save(caller, model, 6, "a"))["path"] == path


async def test_a_save_under_way_elsewhere_has_its_name_before_its_future_is_there(world, caller):
    model = await caller.model()
    adapter = f"projects/p/adapters/{model.replace(':train:', '-')}"
    # As another gateway writes it down, which has not come to make the future yet.
    entry = {
        "seq": 1,
        "ttl": None,
        "user_metadata": None,
        "checkpoint": f"{adapter}/checkpoints/w-1",
        "time": time.time(),
    }
    await world.coordinator.client.records.put(
        "projects/p",
        f"checkpoints/{model}/weights/a",
        json.dumps({"public": False, "entries": [entry]}).encode(),
        expected_revision=0,
    )
    second = await caller.post("save_weights", {"model_id": model, "seq_id": 2, "path": "a"})
    assert (await save(caller, model, 1, "a"))["path"] == f"tinker://{model}/weights/a"
    assert "overwrite" in (await caller.result(second))["error"]


async def test_what_the_coordinator_has_no_longer_is_not_listed(world, caller):
    model = await caller.model()
    await save(caller, model, 1, "a")
    await save(caller, model, 2, "b", ttl_seconds=3600, user_metadata={"k": "v"})
    listed = (await caller.get("checkpoints"))["checkpoints"]
    assert [(each["checkpoint_id"], each["user_metadata"]) for each in listed] == [
        ("weights/b", {"k": "v"}),
        ("weights/a", None),
    ]
    assert listed[0]["expires_at"] is not None
    assert listed[1]["expires_at"] is None
    adapter = f"projects/p/adapters/{model.replace(':train:', '-')}"
    for checkpoint in [each async for each in world.coordinator.client.checkpoints.list(adapter)]:
        if checkpoint.expire_time is None:
            await world.coordinator.client.checkpoints.delete(checkpoint.name)
    assert await names(caller, model) == ["weights/b"]


async def test_a_checkpoint_is_given_another_time_to_live_and_taken_it_again(world, caller):
    model = await caller.model()
    path = (await save(caller, model, 1, "a"))["path"]
    url = f"training_runs/{model}/checkpoints/weights/a"
    for seconds in (7200, None):
        response = await caller.send("PUT", f"{url}/ttl", json={"ttl_seconds": seconds})
        assert response.status_code == 204
        [listed] = (await caller.get(f"training_runs/{model}/checkpoints"))["checkpoints"]
        assert listed["tinker_path"] == path
        assert (listed["expires_at"] is None) == (seconds is None)
    assert (await caller.send("PUT", f"{url}/ttl", json={"ttl_seconds": 1})).status_code == 400
    # No adapter is left behind by that.
    adapters = [each.name async for each in world.coordinator.client.adapters.list("projects/p")]
    assert adapters == [f"projects/p/adapters/{model.replace(':train:', '-')}"]


async def test_a_copy_is_another_run_and_made_once(caller):
    model = await caller.model()
    path = (await save(caller, model, 1, "a"))["path"]
    headers = {"x-idempotency-key": "once"}
    body = {"source_path": path, "destination_project_id": "p"}
    copies = [
        (await caller.send("POST", "copy_weights", json=body, headers=headers)).json()
        for _ in range(2)
    ]
    assert copies[0] == copies[1]
    assert copies[0]["tinker_path"] != path
    info = await caller.post("weights_info", copies[0])
    assert info["lora_rank"] == 4
    # A copy outlives what it was made of.
    await caller.send("DELETE", f"training_runs/{model}/checkpoints/weights/a")
    session = await caller.session()
    load = {"session_id": session, "model_seq_id": 0, "optimizer": False}
    ticket = await caller.post("load_weights", {**load, "path": copies[0]["tinker_path"]})
    assert (await caller.result(ticket))["model_id"] == f"{session}:train:0"
    other = {**body, "destination_project_id": "q"}
    assert (await caller.send("POST", "copy_weights", json=other)).status_code == 400


async def test_the_run_of_a_copy_is_not_trained(caller):
    model = await caller.model()
    saved = await caller.post("save_weights", {"model_id": model, "seq_id": 1, "path": "s"})
    path = (await caller.result(saved))["path"]
    copy = (await caller.post("copy_weights", {"source_path": path}))["tinker_path"]
    run = copy.removeprefix("tinker://").partition("/")[0]
    response = await caller.send(
        "POST", "forward_backward", content=batch(run, 1), headers=PROTOBUF
    )
    assert response.status_code == 400
    assert "load its checkpoint" in response.json()["detail"]


async def test_an_old_sampling_session_keeps_its_version(world, caller):
    model = await caller.model()
    await caller.step(model, 1)

    async def snapshot(seq):
        body = {"model_id": model, "seq_id": seq, "kind": "snapshot"}
        saved = await caller.post("save_weights_for_sampler", body)
        return (await caller.result(saved))["sampling_session_id"]

    old = await snapshot(3)
    assert await snapshot(3) == old
    await caller.step(model, 4)
    new = await snapshot(6)
    assert new != old
    for seq, (sampler, version) in enumerate([(old, 1), (new, 2), (old, 1)]):
        _, ticket = await sample(caller, sampler, seq=seq)
        await caller.result(ticket)
        assert world.fakes.sampler.versions[-1] == version


async def test_a_search_finds_what_it_is_asked_for(caller):
    for name, label in (("red fox", "a"), ("blue fox", "b"), ("red hen", "b")):
        body = {"tags": [], "user_metadata": {"k": label}, "sdk_version": "0", "display_name": name}
        await caller.post("create_session", body)

    async def found(**query):
        answer = await caller.post("sessions/search", query)
        return [each["display_name"] for each in answer["sessions"]]

    assert await found(display_name="RED") == ["red hen", "red fox"]
    assert await found(display_name="fox blue") == ["blue fox"]
    assert await found(user_metadata={"k": "b"}) == ["red hen", "blue fox"]
    assert await found(project_ids=["q"]) == []
    assert await found(statuses=[{"type": "client_finished"}]) == []
    assert len(await found(statuses=[{"type": "active"}])) == 3
    first = await caller.post("sessions/search", {"limit": 2})
    rest = await caller.post("sessions/search", {"limit": 2, "cursor": first["next_cursor"]})
    assert [each["display_name"] for each in rest["sessions"]] == ["red fox"]
    assert rest["next_cursor"] is None
    session = first["sessions"][0]["session_id"]
    reason = {"reason": {"type": "errored"}, "detail": None}
    assert (await caller.send("POST", f"sessions/{session}/finish", json=reason)).status_code == 204
    query = [{"type": "client_finished", "reasons": ["errored"]}]
    assert await found(statuses=query) == ["red hen"]


async def test_while_the_coordinator_is_away_polls_are_held_and_others_told_so(tmp_path):
    ending = asyncio.Event()
    async with gateway_world(tmp_path) as world:
        caller = world.caller()
        model = await caller.model()
        ticket = await caller.post("forward_backward", batch(model, 1))
        address = f"127.0.0.1:{world.coordinator.port}"
    async with (
        gateway_at(address, ending, max_hold_s=0.5) as url,
        httpx.AsyncClient(timeout=60) as http,
    ):
        caller.url, caller._http = url, http
        assert (await caller.poll(ticket)).status_code == 408
        response = await caller.send("GET", "sessions")
        assert response.status_code == 503
        assert response.headers["retry-after"]
        assert response.json()["detail"]


async def test_too_many_requests_are_put_off(tmp_path):
    async with gateway_world(tmp_path, coordinator_settings={"max_futures": 1}) as world:
        caller = world.caller()
        model = await caller.model()
        # Number 1 has not come.
        await caller.post("forward_backward", batch(model, 2))
        refused = await caller.send("POST", "forward_backward", content=batch(model, 3))
        assert refused.status_code == 429
        assert float(refused.headers["retry-after"]) >= 1
        assert refused.json()["detail"]


async def test_a_version_that_is_gone_is_had_again_from_its_checkpoint(world, caller):
    session = await caller.session()
    model = await caller.model(session)
    await caller.step(model, 1)
    body = {"model_id": model, "seq_id": 3, "path": "s", "kind": "snapshot"}
    saved = await caller.result(await caller.post("save_weights_for_sampler", body))
    adapter = f"projects/p/adapters/{model.replace(':train:', '-')}"
    await world.coordinator.client.adapters.delete(adapter)
    sampler = await caller.post(
        "create_sampling_session",
        {"session_id": session, "sampling_session_seq_id": 0, "model_path": saved["path"]},
    )
    _, ticket = await sample(caller, sampler["sampling_session_id"])
    assert await caller.result(ticket)


async def named_sampler(world, caller):
    """A sampling session of a named checkpoint, its model, and how to save under that name."""
    session = await caller.session()
    model = await caller.model(session)

    async def save(seq):
        await caller.step(model, seq)
        body = {"model_id": model, "seq_id": seq + 2, "path": "s", "kind": "snapshot"}
        return (await caller.result(await caller.post("save_weights_for_sampler", body)))["path"]

    place = {"session_id": session, "sampling_session_seq_id": 0}
    body = {**place, "model_path": await save(1)}
    made = await caller.post("create_sampling_session", body)
    return made["sampling_session_id"], model, save


async def lose_version(world, model):
    """The adapter goes, and its leases and versions with it; its checkpoints stay."""
    name = f"projects/p/adapters/{model.replace(':train:', '-')}"
    await world.coordinator.client.adapters.delete(name)


async def settled(caller, ticket):
    """The answer to a poll for what is done."""
    async with asyncio.timeout(30):
        while (response := await caller.poll(ticket)).status_code == 408:
            pass
    return response


async def test_weights_that_took_over_a_name_are_not_sampled_in_place_of_those_lost(world, caller):
    sampler, model, save = await named_sampler(world, caller)
    await save(4)
    await lose_version(world, model)
    _, ticket = await sample(caller, sampler)
    drawn = world.fakes.sampler.versions.copy()
    response = await settled(caller, ticket)
    assert (response.status_code, response.json()["category"]) == (200, "user")
    _, ticket = await sample(caller, sampler, seq=1)
    assert (await settled(caller, ticket)).json()["category"] == "user"
    assert world.fakes.sampler.versions == drawn


async def test_samples_whose_version_is_gone_have_it_again_with_one_lease(world, caller, tmp_path):
    sampler, model, _ = await named_sampler(world, caller)
    await lose_version(world, model)
    asked = [await sample(caller, sampler, seq=seq) for seq in range(12)]
    polls = await asyncio.gather(*(settled(caller, ticket) for _, ticket in asked))
    assert {response.status_code for response in polls} == {410}
    with contextlib.closing(sqlite3.connect(tmp_path / "coordinator.sqlite")) as store:
        assert store.execute("SELECT count(*) FROM leases").fetchone() == (1,)
    _, ticket = await sample(caller, sampler, seq=20)
    assert await caller.result(ticket)


async def test_a_fork_that_somebody_trained_is_not_sampled_for_its_checkpoint(world, caller):
    sampler, model, _ = await named_sampler(world, caller)
    await lose_version(world, model)
    _, ticket = await sample(caller, sampler)
    assert (await settled(caller, ticket)).status_code == 410
    client = world.coordinator.client
    records = await client.records.get("projects/p", f"samplers/{sampler}")
    held = json.loads(records.value)
    assert "/f-" in held["adapter"]
    name, sequence = held["adapter"], (await client.adapters.get(held["adapter"])).next_sequence
    tokens = np.arange(3, dtype=np.int32)
    await client.training.forward_backward(
        name, sequence, [types.Datum(tokens, tokens)], types.LossConfig("cross_entropy")
    )
    await client.training.optim_step(name, sequence + 1, types.AdamConfig(0.1))
    place = {"session_id": sampler.partition(":")[0], "sampling_session_seq_id": 1}
    other = await caller.post(
        "create_sampling_session", {**place, "model_path": held["model_path"]}
    )
    found = await client.records.get("projects/p", f"samplers/{other['sampling_session_id']}")
    assert json.loads(found.value)["digest"] == held["digest"]


async def test_a_fork_that_has_gone_is_made_anew_once_for_all(world, caller):
    sampler, model, _ = await named_sampler(world, caller)
    await lose_version(world, model)
    client = world.coordinator.client
    session = sampler.partition(":")[0]
    found = await client.records.get("projects/p", f"samplers/{sampler}")
    path = json.loads(found.value)["model_path"]
    forks = []
    for number in range(1, 4):
        body = {"session_id": session, "sampling_session_seq_id": number, "model_path": path}
        made = (await caller.post("create_sampling_session", body))["sampling_session_id"]
        found = await client.records.get("projects/p", f"samplers/{made}")
        forks.append(json.loads(found.value)["adapter"])
        if number == 1:
            await client.adapters.delete(forks[0])
    assert len(set(forks)) == 1


async def test_the_sdk_itself_trains_saves_and_samples(world, caller):
    def run():
        service = tinker.ServiceClient(base_url=caller.url, api_key=caller.key)
        training = service.create_lora_training_client("arith", rank=4).result()
        datum = tinker.Datum(
            model_input=tinker.ModelInput.from_ints([1, 2]),
            loss_fn_inputs={"target_tokens": [2, 3], "weights": [0.0, 1.0]},
        )
        forward = training.forward_backward([datum] * 3, "cross_entropy")
        step = training.optim_step(tinker.AdamParams(learning_rate=1e-3))
        assert len(forward.result().loss_fn_outputs) == 3
        assert step.result().metrics is not None
        sampling = training.save_weights_and_get_sampling_client().result()
        drawn = sampling.sample(
            tinker.ModelInput.from_ints([1]), 2, tinker.SamplingParams(max_tokens=2)
        ).result()
        assert len(drawn.sequences) == 2
        rest = tinker.RestClient(base_url=caller.url, api_key=caller.key)
        who = rest.whoami().result()
        assert who.org_urn == "tml:organization:p"
        service.close("success").result()
        return training.model_id

    model = await asyncio.to_thread(run)
    found = await caller.post("sessions/search", {})
    assert found["sessions"][0]["status"]["reason"] == {"type": "success"}
    assert (await caller.get(f"training_runs/{model}"))["lora_rank"] == 4


async def test_a_token_that_has_expired_is_told_so_and_another_can_be_had(tmp_path):
    now = [1e9]
    async with gateway_world(tmp_path, clock=lambda: now[0], token_lifetime_s=100) as world:
        caller = world.caller()
        key = caller.key
        caller.key = (await caller.post("auth/token", {}))["jwt"]
        assert (await caller.send("GET", "sessions")).status_code == 200
        now[0] += 101
        response = await caller.send("GET", "sessions")
        assert response.status_code == 401
        assert 'error="invalid_token"' in response.headers["www-authenticate"]
        caller.key = key
        fresh = (await caller.post("auth/token", {}))["jwt"]
        # Another's signature, or none, is not believed.
        caller.key = fresh[:-2] + ("AA" if fresh[-2:] != "AA" else "BB")
        assert (await caller.send("GET", "sessions")).status_code == 401
        # A token ends with its key.
        caller.key = fresh
        assert (await caller.send("DELETE", "auth/apikey/me")).status_code == 204
        assert (await caller.send("GET", "sessions")).status_code == 401


async def test_a_heartbeat_and_a_sample_keep_the_version_that_is_sampled(tmp_path):
    now = [1e9]
    async with gateway_world(
        tmp_path, clock=lambda: now[0], lease_ttl_s=600, leases_per_session=1
    ) as world:
        caller = world.caller()
        session = await caller.session()
        model = await caller.model(session)
        samplers = []
        for seq in (1, 4):
            await caller.step(model, seq)
            body = {"model_id": model, "seq_id": seq + 2, "kind": "snapshot"}
            saved = await caller.post("save_weights_for_sampler", body)
            samplers.append((await caller.result(saved))["sampling_session_id"])
        records = world.coordinator.client.records

        async def ends():
            """When the lease of each ends, which no call but this tells."""
            leases = [
                json.loads((await records.get("projects/p", f"samplers/{sampler}")).value)["lease"]
                for sampler in samplers
            ]
            with contextlib.closing(sqlite3.connect(tmp_path / "coordinator.sqlite")) as store:
                rows = dict(store.execute("SELECT name, expire_time FROM leases").fetchall())
            return [rows[lease] for lease in leases]

        first = await ends()
        await caller.post("session_heartbeat", {"session_id": session})
        second = await ends()
        # The newest is kept by the session, the older one by whoever samples from it.
        assert second[0] == first[0]
        assert second[1] > first[1]
        await sample(caller, samplers[0])
        third = await ends()
        assert third[0] > second[0]
        # Not each time.
        await caller.post("session_heartbeat", {"session_id": session})
        await sample(caller, samplers[0], seq=1)
        assert await ends() == third
        now[0] += 300
        await caller.post("session_heartbeat", {"session_id": session})
        assert (await ends())[1] > third[1]


async def test_the_sdk_waits_for_all_samples_of_a_client_at_once(tmp_path):
    client = {"sample_use_retrieve_futures": True}
    async with gateway_world(tmp_path, client=client) as world:
        caller = world.caller()

        def run():
            service = tinker.ServiceClient(base_url=caller.url, api_key=caller.key)
            sampling = service.create_sampling_client(base_model="arith").result()
            params = tinker.SamplingParams(max_tokens=2)
            prompt = tinker.ModelInput.from_ints([1])
            futures = [sampling.sample(prompt, 1, params) for _ in range(40)]
            assert all(len(future.result().sequences) == 1 for future in futures)

        await asyncio.to_thread(run)


def leases_in(folder):
    """How many leases there are, by the policy version that they hold."""
    with contextlib.closing(sqlite3.connect(folder / "coordinator.sqlite")) as db:
        found = db.execute("SELECT policy_version, count(*) FROM leases GROUP BY 1").fetchall()
    return dict(found)


async def unnamed_saves(caller, model, count, first=1):
    """Sampling sessions of so many versions, each of a step of its own, and the next number."""
    samplers, seq = [], first
    for _ in range(count):
        await caller.step(model, seq)
        body = {"model_id": model, "seq_id": seq + 2, "kind": "snapshot"}
        result = await caller.result(await caller.post("save_weights_for_sampler", body))
        samplers.append(result["sampling_session_id"])
        seq += 3
    return samplers, seq


async def test_who_saves_often_holds_the_newest_versions_and_those_in_use(tmp_path):
    now = time.time()
    async with gateway_world(tmp_path, leases_per_session=2, clock=lambda: now) as world:
        caller = world.caller()
        model = await caller.model()
        samplers, seq = await unnamed_saves(caller, model, 3)
        assert leases_in(tmp_path) == {1: 1, 2: 1, 3: 1}, "all were in use a moment ago"
        now += 61
        _, ticket = await sample(caller, samplers[0])
        assert await caller.result(ticket)
        now += 20
        more, seq = await unnamed_saves(caller, model, 2, seq)
        assert leases_in(tmp_path) == {1: 1, 4: 1, 5: 1}
        now += 61
        _, seq = await unnamed_saves(caller, model, 1, seq)
        assert leases_in(tmp_path) == {5: 1, 6: 1}
        # The mesh has this one still: it is held again once it is sampled from.
        _, ticket = await sample(caller, more[0])
        assert await caller.result(ticket)
        assert leases_in(tmp_path) == {4: 1, 5: 1, 6: 1}
        assert world.fakes.sampler.versions == [1, 4]


async def test_a_model_lasts_with_its_use_and_the_newest_with_their_session_too(tmp_path):
    now = time.time()
    settings = {"leases_per_session": 2, "model_idle_ttl_s": 3600.0, "clock": lambda: now}
    async with gateway_world(tmp_path, **settings) as world:
        caller = world.caller()
        session = await caller.session()
        for number in range(3):
            await caller.model(session, number)

        def uses():
            with contextlib.closing(sqlite3.connect(tmp_path / "coordinator.sqlite")) as store:
                found = store.execute("SELECT use_time, idle_ttl_s FROM adapters ORDER BY name")
                return found.fetchall()

        before = uses()
        await caller.post("session_heartbeat", {"session_id": session})
        after = uses()
        kept = [new[0] > old[0] for new, old in zip(after, before, strict=True)]
        assert kept == [False, True, True]
        assert {ttl for _, ttl in after} == {3600.0}
        # A while later again, and not before.
        await caller.post("session_heartbeat", {"session_id": session})
        assert uses() == after
        now += 301
        await caller.post("session_heartbeat", {"session_id": session})
        assert uses()[2] > after[2]


async def test_what_a_session_leaves_behind_is_forgotten_in_time(caller, tmp_path):
    session = await caller.session()
    model = await caller.model(session)
    (sampler,), _ = await unnamed_saves(caller, model, 1)
    await caller.post("join_sampling_session", {"sampling_session_id": sampler})
    days = {}
    with contextlib.closing(sqlite3.connect(tmp_path / "coordinator.sqlite")) as db:
        for key, ends in db.execute("SELECT key, expire_time FROM records"):
            days[key.partition("/")[0]] = ends and round((ends - time.time()) / 86400)
    assert days == {"joins": 90, "runs": None, "samplers": 30, "sessions": 90}


async def test_a_checkpoint_that_is_named_with_each_request_is_held_once_and_had_again(
    world, caller, tmp_path
):
    _, model, save = await named_sampler(world, caller)
    path = await save(4)
    client, now = world.coordinator.client, 0.0
    config = GatewayConfig(coordinator="127.0.0.1:1")
    named = gateway(config, Mesh.of(client), asyncio.Event(), monotonic=lambda: now).named
    before = sum(leases_in(tmp_path).values())

    async def asked():
        found = await asyncio.gather(*(named.policy("projects/p", path) for _ in range(20)))
        assert len(set(found)) == 1
        return found[0][1]

    own = await asked()
    assert await asked() == own
    now += BELIEVED_S + 1
    assert await asked() == own
    assert sum(leases_in(tmp_path).values()) == before + 1
    await lose_version(world, model)
    now += BELIEVED_S + 1
    fork = await asked()
    assert fork.adapter != own.adapter
    assert sum(leases_in(tmp_path).values()) == 1


class Waiting:
    """A port whose `call` begins to work only when it is let go; `num_done`: how often it did."""

    def __init__(self, port, call):
        self.port, self.call = port, call
        self.let_go = asyncio.Event()
        self.num_done = 0

    def __getattr__(self, name):
        work = getattr(self.port, name)

        async def waiting(*arguments, **options):
            await self.let_go.wait()
            result = await work(*arguments, **options)
            self.num_done += 1
            return result

        return waiting if name == self.call else work


async def test_a_caller_that_goes_away_leaves_the_others_what_they_wait_for(world, caller):
    _, _, save = await named_sampler(world, caller)
    path = await save(4)
    mesh = Mesh.of(world.coordinator.client)
    checkpoints, leases = Waiting(mesh.checkpoints, "get"), Waiting(mesh.leases, "create_lease")
    checkpoints.let_go.set()
    mesh = replace(mesh, checkpoints=checkpoints, leases=leases)
    named = gateway(GatewayConfig(coordinator="127.0.0.1:1"), mesh, asyncio.Event()).named
    first, second = (asyncio.ensure_future(named.policy("projects/p", path)) for _ in range(2))
    async with asyncio.timeout(20):
        while checkpoints.num_done < 2:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.01)
        first.cancel()
        leases.let_go.set()
        assert (await second)[1].adapter
    assert first.cancelled()
    assert leases.num_done == 1


async def test_a_sign_of_life_that_could_not_be_noted_is_noted_with_the_next(world, caller):
    session = await caller.session()
    fakes = Mesh.of(world.coordinator.client)
    failing = FailingOnce(fakes.records)
    config = GatewayConfig(coordinator="127.0.0.1:1")
    mesh = replace(fakes, records=failing)
    cores = gateway(config, mesh, asyncio.Event(), clock=lambda: 7.0)
    who = Caller(project="projects/p", key="")
    with pytest.raises(Unavailable):
        await cores.sessions.heartbeat(who, session)
    await cores.sessions.heartbeat(who, session)
    document = await fakes.records.get("projects/p", f"sessions/{session}")
    assert json.loads(document.value)["seen"] == 7.0


class FailingOnce:
    """Records of which the first is not written."""

    def __init__(self, records):
        self.records = records
        self.failed = False

    def __getattr__(self, name):
        return getattr(self.records, name)

    async def put(self, *arguments, **options):
        if not self.failed:
            self.failed = True
            raise Unavailable("the store is away")
        return await self.records.put(*arguments, **options)


async def test_while_a_large_batch_is_taken_apart_others_are_answered(world, caller, monkeypatch):
    model = await caller.model()
    begun, go_on, kept_waiting = asyncio.Event(), threading.Event(), []
    loop, taken_apart = asyncio.get_running_loop(), Training._batch

    def slowly(*arguments):
        loop.call_soon_threadsafe(begun.set)
        kept_waiting.append(go_on.wait(20))
        return taken_apart(*arguments)

    monkeypatch.setattr(aside, "LARGE", 1000)
    monkeypatch.setattr(Training, "_batch", slowly)
    large = asyncio.ensure_future(caller.post("forward_backward", batch(model, 1, [5] * 1000)))
    await asyncio.wait_for(begun.wait(), 20)
    assert await world.caller("q").session()
    assert not large.done()
    go_on.set()
    assert (await caller.trained(await large)).metrics
    assert kept_waiting == [True]


async def test_bodies_beyond_the_bound_are_put_off_and_other_projects_have_room(tmp_path):
    async with gateway_world(tmp_path, max_body_bytes=100_000, max_held_bytes=400_000) as world:
        go_on = asyncio.Event()

        async def slowly():
            yield b"x" * 90_000
            await go_on.wait()

        async def upload(project, content=b"x" * 90_000):
            return await world.caller(project).send("POST", "asample", content=content)

        async def until(project, *, refused):
            async with asyncio.timeout(30):
                while ((await upload(project)).status_code == 429) != refused:
                    await asyncio.sleep(0.01)

        uploads = [asyncio.ensure_future(upload("p", slowly())) for _ in range(2)]
        await until("p", refused=True)
        refusal = await upload("p")
        assert refusal.headers["retry-after"] == "1"
        assert "200000" in refusal.json()["detail"]
        assert (await upload("q")).status_code == 400, "it has room, and is no JSON"
        # Who goes away in the middle leaves room for others.
        uploads[0].cancel()
        await until("p", refused=False)
        go_on.set()
        assert (await uploads[1]).status_code == 400
        assert {(await upload("p")).status_code for _ in range(5)} == {400}
