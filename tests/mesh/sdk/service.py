"""Exercises of ServiceClient."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tinker import types

from tests.mesh.sdk.calling import exercise, settled
from tests.mesh.sdk.training import _about, _refused, sampled_logprobs
from tests.mesh.sdk.world import ADAM, TORCH_ADAM, close, near, same

if TYPE_CHECKING:
    from tests.mesh.sdk.calling import Call
    from tests.mesh.sdk.world import World


@exercise(
    "ServiceClient.create_lora_training_client",
    effect="the exported adapter has the rank and the target modules asked for, the seed decides "
    "its weights, and it begins as the base model",
    note="train_unembed is accepted and not applied unless the gateway is configured to",
)
def create_lora_training_client(world: World, call: Call) -> None:
    def make(**kwargs: Any) -> Any:
        return call(world.service, world.base_model, **kwargs)

    model, twin, other = make(rank=4, seed=5), make(rank=4, seed=5), make(rank=8, seed=6)
    assert len({each.model_id for each in (model, twin, other)}) == 3
    weights, again, more = (world.weights(each) for each in (model, twin, other))
    assert (weights[0]["r"], more[0]["r"]) == (4, 8)
    assert same(weights[1], again[1])
    assert _modules(weights[1]) == {"q", "k", "v", "o", "gate", "up", "down"}
    for name, tensor in weights[1].items():
        assert 4 in tensor.shape, name
        assert ("lora_B" in name) == (not np.any(tensor)), name
    different = make(rank=4, seed=6)
    assert not same(world.weights(different)[1], weights[1])
    assert _modules(world.weights(make(train_mlp=False))[1]) == {"q", "k", "v", "o"}
    metadata = {"recipe": "exercise"}
    parts = make(rank=2, train_attn=False, user_metadata=metadata)
    assert _modules(world.weights(parts)[1]) == {"gate", "up", "down"}
    run = world.http.get(f"training_runs/{parts.model_id}").json()
    assert run["user_metadata"] == metadata
    base = [world.reference.logprobs(*pair) for pair in world.pairs()]
    close(world.logprobs(model), np.concatenate(base))
    _refused(lambda: make(rank=0), "rank")
    _refused(lambda: call(world.service, "no-such-model"), "no-such-model")


def _modules(tensors: dict[str, Any]) -> set[str]:
    return {name.split("_proj")[0].rpartition(".")[2] for name in tensors}


@exercise(
    "ServiceClient.create_training_client_from_state",
    effect="a new run with the checkpoint's weights and a fresh optimizer; the old run is "
    "untouched",
)
def create_training_client_from_state(world: World, call: Call) -> None:
    _from_state(world, call, with_optimizer=False)


@exercise(
    "ServiceClient.create_training_client_from_state_with_optimizer",
    effect="a new run with the checkpoint's weights and moments: its next step is, bit for bit, "
    "the old run's",
)
def create_training_client_from_state_with_optimizer(world: World, call: Call) -> None:
    _from_state(world, call, with_optimizer=True)


def _from_state(world: World, call: Call, *, with_optimizer: bool) -> None:
    model = world.model(rank=4)
    world.train(model, steps=2)
    path = world.saved(model)
    world.train(model)
    continued = world.weights(model)[1]
    resumed = call(world.service, path, user_metadata={"resumed": "yes"})
    assert resumed.model_id != model.model_id
    assert settled(resumed.get_info()).lora_rank == 4
    assert same(world.weights(resumed)[1], world.adapter(path)[1])
    run = world.http.get(f"training_runs/{resumed.model_id}").json()
    assert run["user_metadata"] == {"resumed": "yes"}
    world.train(resumed)
    assert same(world.weights(resumed)[1], continued) == with_optimizer
    assert same(world.weights(model)[1], continued)


@exercise(
    "ServiceClient.create_sampling_client",
    effect="samples the base model, or what a path stood for when it was saved",
)
def create_sampling_client(world: World, call: Call) -> None:
    base = [world.reference.logprobs(*pair) for pair in world.pairs()]
    sampler = call(world.service, base_model=world.base_model)
    close(sampled_logprobs(sampler), np.concatenate(base))
    model = world.model()
    world.train(model)
    logprobs = world.logprobs(model)
    path = settled(model.save_weights_for_sampler(world.name("sampler"))).path
    world.train(model)
    close(sampled_logprobs(call(world.service, model_path=path)), logprobs)
    _refused(lambda: call(world.service, base_model="no-such-model"), "no-such-model")


@exercise(
    "ServiceClient.copy_weights", "RestClient.copy_weights",
    effect="a run of its own lists the copy, with the source's tensors bit for bit; it outlives "
    "its source, and its time to live is its own",
)  # fmt: skip
def copy_weights(world: World, call: Call) -> None:
    model = world.model()
    world.train(model)
    source = world.saved(model)
    tensors = world.adapter(source)[1]
    if call.owner == "ServiceClient":
        copy = call(world.new_service(project_id=world.project), source, ttl_seconds=7200)
    else:
        copy = call(world.client(call.owner), source, world.project, ttl_seconds=7200)
    assert copy.rpartition("/")[2] == source.rpartition("/")[2]
    assert model.model_id not in copy
    settled(world.rest.delete_checkpoint_from_tinker_path(source))
    listed = world.checkpoint(copy)
    assert listed is not None
    assert listed["expires_at"]
    assert same(world.adapter(copy)[1], tensors)


@exercise(
    "ServiceClient.create_custom_loss",
    effect="training with the handle has the function's loss and metrics, and the weights of torch "
    "autograd through it",
    note="traced by the SDK and computed in its process; the wire carries log-probabilities",
)
def create_custom_loss(world: World, call: Call) -> None:
    def mixed(logprobs, weights):
        loss = -(weights * logprobs * 0.5).sum() + (logprobs**2).sum() * 0.1
        return loss, {"custom/half:sum": loss}

    service = world.new_service()  # which makes each loss once
    handle = call(service, mixed, {"logprobs": 1, "weights": 1})
    model = settled(service.create_lora_training_client(world.base_model, rank=8, seed=3))
    before = world.weights(model)
    output = settled(model.forward_backward_custom(world.supervised(), handle))
    settled(model.optim_step(types.AdamParams(**ADAM)))

    def total(logprobs: list[torch.Tensor]) -> torch.Tensor:
        return sum(mixed(each, torch.ones_like(each))[0] for each in logprobs)  # type: ignore[return-value]

    value, after = world.reference.stepped(before, world.pairs(), total, **TORCH_ADAM)
    assert output.metrics["loss:sum"] == _about(value)
    assert output.metrics["custom/half:sum"] == _about(value)
    near(world.weights(model)[1], after, atol=2e-4)


@exercise("ServiceClient.close", effect="the session is finished, with the status given")
def close_service(world: World, call: Call) -> None:
    for status in ("success", "errored", "interrupted"):
        service = world.new_service(display_name=f"closed {status}")
        session = service.holder.get_session_id()
        assert world.session(session)["status"]["type"] == "active"
        call(service, status, detail="the end")
        told = world.session(session)["status"]
        assert told["type"] == "client_finished"
        assert told["reason"] == {"type": status}
        assert told["detail"] == "the end"


@exercise("ServiceClient.create_rest_client", effect="tells of the runs of the same key")
def create_rest_client(world: World, call: Call) -> None:
    model = world.model()
    rest = call(world.service)
    assert settled(rest.get_training_run(model.model_id)).training_run_id == model.model_id


@exercise(
    "ServiceClient.get_server_capabilities", "RestClient.get_server_capabilities",
    effect="lists the base model that is trained and sampled here",
)  # fmt: skip
def get_server_capabilities(world: World, call: Call) -> None:
    client = world.service if call.owner == "ServiceClient" else world.client(call.owner)
    models = {each.model_name: each for each in call(client).supported_models}
    assert set(models) == {world.base_model}
    if hasattr(models[world.base_model], "trainable"):
        assert models[world.base_model].trainable
        assert models[world.base_model].sampleable


@exercise("ServiceClient.holder", effect="its session is one that the gateway knows")
def holder(world: World, call: Call) -> None:
    session = call(world.service).get_session_id()
    assert world.session(session)["session_id"] == session
