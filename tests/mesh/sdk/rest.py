"""Exercises of RestClient and AdminClient."""

from __future__ import annotations

import datetime as dt
import time
from typing import TYPE_CHECKING, Any

import httpx
import numpy as np
import safetensors.numpy
from tinker import types

from tests.mesh.sdk.calling import exercise, settled
from tests.mesh.sdk.training import _refused
from tests.mesh.sdk.world import close, same, unpacked

if TYPE_CHECKING:
    from tests.mesh.sdk.calling import Call
    from tests.mesh.sdk.world import World


def _parts(path: str) -> tuple[str, str]:
    run, kind, name = path.removeprefix("tinker://").split("/")
    return run, f"{kind}/{name}"


@exercise(
    "RestClient.get_training_run", "RestClient.get_training_run_by_tinker_path",
    effect="tells base model, rank, metadata and the last checkpoints of the run; another's run is "
    "not found",
)  # fmt: skip
def get_training_run(world: World, call: Call) -> None:
    model = world.model(rank=4, user_metadata={"recipe": "rest"})
    path = world.saved(model)
    sampler = settled(model.save_weights_for_sampler(world.name("sampler"))).path
    by_path = call.method.startswith("get_training_run_by")
    run = call(world.rest, path if by_path else model.model_id)
    assert run.training_run_id == model.model_id
    assert run.base_model == world.base_model
    assert (run.is_lora, run.lora_rank, run.corrupted) == (True, 4, False)
    assert run.user_metadata == {"recipe": "rest"}
    assert run.last_checkpoint.tinker_path == path
    assert run.last_sampler_checkpoint.tinker_path == sampler
    assert abs(run.last_request_time.timestamp() - time.time()) < 600
    nobodys = "s0123456789abcdef:train:0"
    _refused(
        lambda: call(world.rest, f"tinker://{nobodys}/weights/x" if by_path else nobodys),
        "s0123456789abcdef",
    )


@exercise(
    "RestClient.list_training_runs",
    effect="runs come newest first, page by page, each once, with their number",
)
def list_training_runs(world: World, call: Call) -> None:
    made = [world.model().model_id for _ in range(3)]
    first = call(world.rest, limit=2)
    second = call(world.rest, limit=2, offset=2)
    listed = [run.training_run_id for run in (*first.training_runs, *second.training_runs)]
    assert listed[:3] == made[::-1]
    assert len(set(listed)) == 4
    assert (first.cursor.limit, first.cursor.offset, second.cursor.offset) == (2, 0, 2)
    assert first.cursor.total_count >= 3


@exercise(
    "RestClient.list_checkpoints",
    effect="lists all of the run with kind, size and time, and none of another",
)
def list_checkpoints(world: World, call: Call) -> None:
    model, other = world.model(), world.model()
    world.saved(other)
    paths = {
        world.saved(model),
        settled(model.save_weights_for_sampler(world.name("sampler"))).path,
    }
    listed = call(world.rest, model.model_id).checkpoints
    assert {each.tinker_path for each in listed} == paths
    assert {each.checkpoint_type for each in listed} == {"training", "sampler"}
    assert all(each.size_bytes > 0 and not each.public for each in listed)
    assert all(abs(each.time.timestamp() - time.time()) < 600 for each in listed)


@exercise(
    "RestClient.list_user_checkpoints",
    effect="checkpoints of all runs come newest first, page by page, each once",
)
def list_user_checkpoints(world: World, call: Call) -> None:
    made = [world.saved(world.model()) for _ in range(3)]
    first = call(world.rest, limit=2)
    second = call(world.rest, limit=2, offset=2)
    listed = [each.tinker_path for each in (*first.checkpoints, *second.checkpoints)]
    assert listed[:3] == made[::-1]
    assert len(listed) == len(set(listed))
    assert first.cursor.total_count >= 3


@exercise(
    "RestClient.get_weights_info_by_tinker_path",
    effect="base model, rank and which parts are trained, of the checkpoint",
)
def get_weights_info(world: World, call: Call) -> None:
    path = world.saved(world.model(rank=4, train_mlp=False))
    info = call(world.rest, path)
    assert (info.base_model, info.is_lora, info.lora_rank) == (world.base_model, True, 4)
    if hasattr(info, "train_mlp"):
        assert (info.train_attn, info.train_mlp) == (True, False)


@exercise(
    "RestClient.get_external_weights_urls",
    effect="behind the URLs, without a key, lie an adapter's configuration and its tensors",
)
def get_external_weights_urls(world: World, call: Call) -> None:
    model = world.model()
    world.train(model)
    path = settled(model.save_weights_external(world.name("external"))).path
    answer = call(world.rest, path)
    expires = getattr(answer, "expires", None) or answer.expires_at
    assert expires.timestamp() > time.time()
    files = {name: httpx.get(url) for name, url in answer.urls.items()}
    assert set(files) == {"adapter_config.json", "adapter_model.safetensors"}
    assert all(file.status_code == 200 for file in files.values())
    adapter = (
        files["adapter_config.json"].json(),
        safetensors.numpy.load(files["adapter_model.safetensors"].content),
    )
    expected = [world.reference.logprobs(*pair, adapter) for pair in world.pairs()]
    close(np.concatenate(expected), world.logprobs(model))


@exercise(
    "RestClient.get_checkpoint_archive_url",
    "RestClient.get_checkpoint_archive_url_from_tinker_path",
    effect="behind the URL, without a key, lies a tar with an adapter's configuration and tensors",
    note="of SDKs before 0.36",
)  # fmt: skip
def get_checkpoint_archive_url(world: World, call: Call) -> None:
    model = world.model()
    world.train(model)
    path = world.saved(model)
    by_path = call.method.startswith("get_checkpoint_archive_url_from")
    answer = call(world.rest, *([path] if by_path else _parts(path)))
    assert answer.expires.timestamp() > time.time()
    archive = httpx.get(answer.url).content
    assert same(unpacked(archive)[1], world.adapter(path)[1])


@exercise(
    "RestClient.delete_checkpoint", "RestClient.delete_checkpoint_from_tinker_path",
    effect="the checkpoint is listed no more, and loading it fails; others stay",
)  # fmt: skip
def delete_checkpoint(world: World, call: Call) -> None:
    model = world.model()
    path, other = world.saved(model), world.saved(model)
    by_path = call.method.startswith("delete_checkpoint_from")
    call(world.rest, *([path] if by_path else _parts(path)))
    assert world.checkpoint(path) is None
    assert world.checkpoint(other) is not None
    _refused(
        lambda: settled(world.service.create_training_client_from_state(path)), _parts(path)[1]
    )


@exercise(
    "RestClient.publish_checkpoint_from_tinker_path",
    effect="the checkpoint is listed as public",
    note="a flag within the project: nothing of one project is ever visible to another",
)
def publish(world: World, call: Call) -> None:
    path = world.saved(world.model())
    assert world.checkpoint(path)["public"] is False  # type: ignore[index]
    call(world.rest, path)
    assert world.checkpoint(path)["public"] is True  # type: ignore[index]


@exercise(
    "RestClient.unpublish_checkpoint_from_tinker_path",
    effect="the checkpoint is listed as private again",
)
def unpublish(world: World, call: Call) -> None:
    path = world.saved(world.model())
    settled(world.rest.publish_checkpoint_from_tinker_path(path))
    call(world.rest, path)
    assert world.checkpoint(path)["public"] is False  # type: ignore[index]


@exercise(
    "RestClient.set_checkpoint_ttl_from_tinker_path",
    effect="the checkpoint is listed with when it expires, or without, and has the same tensors",
)
def set_ttl(world: World, call: Call) -> None:
    model = world.model()
    world.train(model)
    path = world.saved(model)
    tensors = world.adapter(path)[1]
    for ttl in (7200, 36000):
        call(world.rest, path, ttl)
        expires = dt.datetime.fromisoformat(world.checkpoint(path)["expires_at"])  # type: ignore[index]
        assert ttl - 200 < expires.timestamp() - time.time() <= ttl
    call(world.rest, path, None)
    assert world.checkpoint(path)["expires_at"] is None  # type: ignore[index]
    assert same(world.adapter(path)[1], tensors)


@exercise("RestClient.get_session", effect="names the runs and samplers that the session made")
def get_session(world: World, call: Call) -> None:
    model, sampler = world.model(), world.base_sampler()
    told = call(world.rest, world.session_id)
    assert model.model_id in told.training_run_ids
    assert sampler._sampling_session_id in told.sampler_ids


@exercise("RestClient.list_sessions", effect="lists sessions, newest first, page by page")
def list_sessions(world: World, call: Call) -> None:
    made = []
    for _ in range(2):
        service = world.new_service()
        made.append(service.holder.get_session_id())
    assert call(world.rest, limit=2).sessions == made[::-1]
    assert call(world.rest, limit=1, offset=1).sessions == made[:1]


@exercise(
    "RestClient.search_sessions",
    effect="finds sessions by id, words of their names, metadata and status; pages follow one "
    "another",
)
def search_sessions(world: World, call: Call) -> None:
    word = world.name("needle")
    made = []
    for index in range(3):
        service = world.new_service(
            display_name=f"Run {word} {index}", user_metadata={"needle": word, "n": str(index)}
        )
        made.append(service.holder.get_session_id())

    def found(**kwargs: Any) -> Any:
        request = types.SessionSearchRequest(**kwargs)
        answer = call(world.rest, request)
        return [each.session_id for each in answer.sessions], answer.next_cursor

    assert found(display_name=f"{word.upper()} run")[0] == made[::-1]
    assert found(user_metadata={"needle": word, "n": "1"})[0] == [made[1]]
    assert found(session_id=made[0])[0] == [made[0]]
    page, cursor = found(display_name=word, limit=2)
    assert page == made[:0:-1]
    assert found(display_name=word, limit=2, cursor=cursor) == ([made[0]], None)
    settled(service.close("errored"))
    status = types.ClientFinishedSessionStatusQuery(type="client_finished", reasons=["errored"])
    assert found(display_name=word, statuses=[status])[0] == [made[2]]


@exercise(
    "RestClient.assign_session_project",
    effect="to its own project a session is assigned; any other is refused",
    note="a key lets into one project, and its sessions stay there",
)
def assign_session_project(world: World, call: Call) -> None:
    call(world.rest, world.session_id, world.project)
    assert world.session(world.session_id)["project_id"] == world.project
    _refused(lambda: call(world.rest, world.session_id, "another"), "another")


@exercise(
    "RestClient.export_session_trace",
    effect="behind the URL lies a trace, as Perfetto reads it, with what the session made",
)
def export_session_trace(world: World, call: Call) -> None:
    model = world.model()
    trace = httpx.get(call(world.rest, world.session_id)).json()
    assert f"runs/{model.model_id}" in {event["name"] for event in trace["traceEvents"]}


@exercise("RestClient.get_sampler", effect="tells base model and path of a sampling client")
def get_sampler(world: World, call: Call) -> None:
    path = settled(world.model().save_weights_for_sampler(world.name("sampler"))).path
    sampler = settled(world.service.create_sampling_client(model_path=path))
    told = call(world.rest, sampler._sampling_session_id)
    assert told.sampler_id == sampler._sampling_session_id
    assert (told.base_model, told.model_path) == (world.base_model, path)


@exercise(
    "RestClient.whoami", effect="tells the project of the key, by the token in exchange for it"
)
def whoami(world: World, call: Call) -> None:
    told = call(world.rest)
    if hasattr(told, "org_urn"):
        assert world.project in told.org_urn
    assert told.user_urn


@exercise(
    "RestClient.get_audit_log", "AdminClient.get_audit_log",
    effect="tells of the sessions and checkpoints that were made on the day, of the kind asked for",
)  # fmt: skip
def get_audit_log(world: World, call: Call) -> None:
    path = world.saved(world.model())
    client = world.client(call.owner)
    today = dt.datetime.now(dt.UTC).date()
    told = call(client, "checkpoints", today).entries
    assert path in {entry.tinker_path for entry in told}
    everything = call(client).entries
    assert {"session_create", "checkpoint_create"} <= {entry.event for entry in everything}
    assert not call(client, "all", today - dt.timedelta(days=2)).entries


@exercise(
    "RestClient.get_billing_usage", "AdminClient.get_billing_usage",
    effect="answers that nothing was billed",
    note="a mesh of one's own bills nobody; usage is in its metrics",
)  # fmt: skip
def get_billing_usage(world: World, call: Call) -> None:
    world.train(world.model())
    now = dt.datetime.now(dt.UTC)
    told = call(world.client(call.owner), now - dt.timedelta(days=1), now)
    assert told.data == []


@exercise(
    "RestClient.get_current_checkpoint_storage_usage",
    "AdminClient.get_current_checkpoint_storage_usage",
    effect="count and bytes grow by those of a checkpoint that is saved",
)
def get_current_checkpoint_storage_usage(world: World, call: Call) -> None:
    client = world.client(call.owner)
    world.saved(world.model())
    (before,) = call(client).data
    path = world.saved(world.model())
    (after,) = call(client).data
    assert after.project_id == world.project
    assert after.checkpoint_count == before.checkpoint_count + 1
    assert after.size_bytes - before.size_bytes == world.checkpoint(path)["size_bytes"]  # type: ignore[index]
