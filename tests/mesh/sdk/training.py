"""Exercises of TrainingClient."""

from __future__ import annotations

import asyncio
import datetime as dt
import inspect
import logging
import re
import time
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
import pytest
from tinker import types

from tests.mesh.sdk.calling import exercise, settled
from tests.mesh.sdk.losses import LOSSES, near_logprobs, sampler_logprobs
from tests.mesh.sdk.world import (
    ADAM,
    SEQUENCES,
    TORCH_ADAM,
    close,
    logprobs_of,
    near,
    same,
)

if TYPE_CHECKING:
    import torch

    from tests.mesh.sdk.calling import Call
    from tests.mesh.sdk.losses import Loss
    from tests.mesh.sdk.world import World


@exercise(
    "TrainingClient.forward",
    effect="loss and log-probabilities equal transformers' of the exported adapter; neither "
    "weights nor pending gradients change",
)
def forward(world: World, call: Call) -> None:
    trained, twin = world.model(seed=501), world.model(seed=501)
    for model in (trained, twin):
        world.train(model)
        settled(model.forward_backward(world.supervised(), "cross_entropy"))
    output = call(trained, world.supervised(), "cross_entropy")
    adapter = world.weights(trained)
    expected = [world.reference.logprobs(*pair, adapter) for pair in world.pairs()]
    close(logprobs_of(output), np.concatenate(expected))
    close(output.metrics["loss:sum"], -np.concatenate(expected).sum(), atol=1e-3)
    # The gradients of before are still there, and nothing was added to them.
    for model in (trained, twin):
        settled(model.optim_step(types.AdamParams(**ADAM)))
    assert same(world.weights(trained)[1], world.weights(twin)[1])


@exercise(
    "TrainingClient.forward_backward",
    effect="every loss's sum equals its formula in torch, and so do the weights after one step; "
    "the gradients of two calls add up",
    note="stable_reinforce is this mesh's own loss in place of one whose formula is not public",
)
def forward_backward(world: World, call: Call) -> None:
    offered = set(get_args(types.LossFnType)) - {"custom"}
    assert offered <= set(LOSSES)
    for name in sorted(offered):
        _check_loss(world, call, name, LOSSES[name])
    # Half of the data twice is all of it once.
    whole, halves = world.model(seed=502), world.model(seed=502)
    data = world.supervised()
    call(whole, data, "cross_entropy")
    call(halves, data[:1], "cross_entropy")
    call(halves, data[1:], "cross_entropy")
    for model in (whole, halves):
        settled(model.optim_step(types.AdamParams(**ADAM)))
    near(world.weights(whole)[1], world.weights(halves)[1], atol=1e-5)
    _matrix_targets(world, call)


def _check_loss(world: World, call: Call, name: str, loss: Loss) -> None:
    model = world.model()
    before = world.weights(model)
    if loss.near:  # of a fresh adapter, which is as the base model
        near_to = [world.reference.logprobs(*pair).tolist() for pair in world.pairs()]
        sampled = [near_logprobs(index, p) for index, p in enumerate(near_to)]
    else:
        sampled = [sampler_logprobs(index, pair) for index, pair in enumerate(world.pairs())]

    def input_of(field: str) -> Any:
        return lambda index, n: loss.inputs(field, index, n, sampled[index])

    data = world.data(**{field: input_of(field) for field in loss.fields})
    output = call(model, data, name, **({"loss_fn_config": loss.config} if loss.config else {}))
    settled(model.optim_step(types.AdamParams(**ADAM)))
    value, after = world.reference.stepped(
        before, world.pairs(), lambda logprobs: loss.value(logprobs, sampled), **TORCH_ADAM
    )
    assert output.metrics["loss:sum"] == _about(value), name
    near(world.weights(model)[1], after, atol=2e-4)


def _matrix_targets(world: World, call: Call) -> None:
    """Targets [N, K]: the sum over all of them, and log-probabilities of the same shape."""
    tokens = list(SEQUENCES[0][:-1])
    targets = np.stack([SEQUENCES[0][1:], np.arange(len(tokens)) + 3], axis=1).astype(np.int64)
    weights = np.linspace(0.1, 1.0, targets.size).reshape(targets.shape).astype(np.float32)
    datum = types.Datum(
        model_input=types.ModelInput.from_ints(tokens),
        loss_fn_inputs={
            "target_tokens": types.TensorData.from_numpy(targets),
            "weights": types.TensorData.from_numpy(weights),
        },
    )
    model = world.model()
    output = call(model, [datum], "cross_entropy")
    expected = np.stack([world.reference.logprobs(tokens, column) for column in targets.T], axis=1)
    told = output.loss_fn_outputs[0]["logprobs"]
    assert list(told.shape or []) == list(targets.shape)
    close(np.asarray(told.data).reshape(targets.shape), expected)
    assert output.metrics["loss:sum"] == _about(float(-(weights * expected).sum()))


@exercise(
    "TrainingClient.forward_backward_custom",
    effect="the loss is the function's, and the weights after one step are those of torch autograd "
    "through it",
)
def forward_backward_custom(world: World, call: Call) -> None:
    def squared(logprobs: list[torch.Tensor]) -> torch.Tensor:
        return sum(((each + 2.0) ** 2).sum() for each in logprobs) / 10.0  # type: ignore[return-value]

    def loss(data: Any, logprobs: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
        assert len(data) == len(logprobs) == len(SEQUENCES)
        return squared(logprobs), {"seen": float(len(data))}

    model = world.model()
    before = world.weights(model)
    output = call(model, world.supervised(), loss)
    settled(model.optim_step(types.AdamParams(**ADAM)))
    value, after = world.reference.stepped(before, world.pairs(), squared, **TORCH_ADAM)
    if "surrogate_loss:sum" in output.metrics:  # old versions tell that one as the loss
        assert output.metrics["loss:sum"] == _about(value)
    assert output.metrics["seen"] == len(SEQUENCES)
    near(world.weights(model)[1], after, atol=2e-4)


@exercise(
    "TrainingClient.optim_step",
    effect="weights equal torch's AdamW on transformers' gradients, with weight decay and with the "
    "global norm clipped; the gradients are used up",
    note="Dimuon, whose formula is not public, is refused",
)
def optim_step(world: World, call: Call) -> None:
    def supervised(logprobs: list[torch.Tensor]) -> torch.Tensor:
        return -sum(each.sum() for each in logprobs)  # type: ignore[return-value]

    for clip in (0.0, 0.05):
        model = world.model()
        before = world.weights(model)
        settled(model.forward_backward(world.supervised(), "cross_entropy"))
        call(model, types.AdamParams(**ADAM, grad_clip_norm=clip))
        _, after = world.reference.stepped(
            before, world.pairs(), supervised, max_grad_norm=clip, **TORCH_ADAM
        )
        near(world.weights(model)[1], after, atol=2e-4)
        changed = [not np.array_equal(after[name], before[1][name]) for name in after]
        assert any(changed)
    if hasattr(types, "DimuonParams"):
        _refused(lambda: call(world.model(), types.DimuonParams(learning_rate=0.1)), "adamw")
    # With gradients that are used up, and without momentum, weights stay.
    still = {"learning_rate": 1e-2, "beta1": 0.0, "beta2": 0.95, "eps": 1e-3}
    model = world.model()
    settled(model.forward_backward(world.supervised(), "cross_entropy"))
    call(model, types.AdamParams(**still))
    trained = world.weights(model)[1]
    settled(model.forward_backward(world.data(weights=lambda _, n: [0.0] * n), "cross_entropy"))
    call(model, types.AdamParams(**still))
    assert same(world.weights(model)[1], trained)


@exercise(
    "TrainingClient.save_state",
    effect="the checkpoint is listed with its metadata and time to live, has the model's weights, "
    "and keeps them while training goes on; a name that is taken is refused unless overwritten",
)
def save_state(world: World, call: Call) -> None:
    model = world.model()
    world.train(model)
    name, logprobs = world.name(), world.logprobs(model)
    path = call(model, name, ttl_seconds=7200).path
    assert path == f"tinker://{model.model_id}/weights/{name}"
    listed = world.checkpoint(path)
    assert listed is not None
    assert listed["checkpoint_type"] == "training"
    assert 7000 < _seconds_left(listed["expires_at"]) <= 7200
    frozen = world.adapter(path)
    expected = [world.reference.logprobs(*pair, frozen) for pair in world.pairs()]
    close(np.concatenate(expected), logprobs)
    world.train(model)
    assert same(world.adapter(path)[1], frozen[1])
    _refused(lambda: call(model, name), name)
    if _takes(model.save_state, "overwrite"):
        labelled = _takes(model.save_state, "user_metadata")
        labels = {"user_metadata": {"step": "2"}} if labelled else {}
        assert call(model, name, overwrite=True, **labels).path == path
        assert not same(world.adapter(path)[1], frozen[1])
        assert world.checkpoint(path)["user_metadata"] == labels.get("user_metadata")  # type: ignore[index]


@exercise(
    "TrainingClient.load_state",
    effect="the model has the checkpoint's weights and goes on with a fresh optimizer",
)
def load_state(world: World, call: Call) -> None:
    _load(world, call, with_optimizer=False)


@exercise(
    "TrainingClient.load_state_with_optimizer",
    effect="the model has the checkpoint's weights and moments: the next step is, bit for bit, the "
    "one that followed then",
)
def load_state_with_optimizer(world: World, call: Call) -> None:
    _load(world, call, with_optimizer=True)


def _load(world: World, call: Call, *, with_optimizer: bool) -> None:
    model = world.model()
    world.train(model, steps=2)
    path = world.saved(model)
    saved = world.adapter(path)[1]
    world.train(model)
    continued = world.weights(model)[1]
    call(model, path)
    assert same(world.weights(model)[1], saved)
    world.train(model)
    assert same(world.weights(model)[1], continued) == with_optimizer


@exercise(
    "TrainingClient.save_weights_for_sampler",
    effect="the path is listed as a sampler's, and a sampling client of it has the trainer's "
    "log-probabilities of then, after further steps too",
)
def save_weights_for_sampler(world: World, call: Call) -> None:
    model = world.model()
    world.train(model)
    logprobs, name = world.logprobs(model), world.name("sampler")
    path = call(model, name, ttl_seconds=7200).path
    assert path == f"tinker://{model.model_id}/sampler_weights/{name}"
    listed = world.checkpoint(path)
    assert listed is not None
    assert listed["checkpoint_type"] == "sampler"
    assert 7000 < _seconds_left(listed["expires_at"]) <= 7200
    world.train(model)
    sampler = settled(world.service.create_sampling_client(model_path=path))
    close(sampled_logprobs(sampler), logprobs)


@exercise(
    "TrainingClient.save_weights_external",
    effect="the files behind the URLs are a PEFT adapter with which transformers has the trainer's "
    "log-probabilities",
)
def save_weights_external(world: World, call: Call) -> None:
    model = world.model()
    world.train(model)
    answer = call(model, world.name("external"))
    assert f"tinker://{model.model_id}/external_weights/" in answer.path
    listed = world.checkpoint(answer.path)
    assert listed is not None
    assert listed["checkpoint_type"] == "external"
    adapter = world.adapter(answer.path)
    expected = [world.reference.logprobs(*pair, adapter) for pair in world.pairs()]
    close(np.concatenate(expected), world.logprobs(model))


@exercise(
    "TrainingClient.save_weights_and_get_sampling_client",
    effect="samples come from the weights of then, with the trainer's log-probabilities, after "
    "further steps too; kind=inflight follows later saves",
)
def save_weights_and_get_sampling_client(world: World, call: Call) -> None:
    model = world.model()
    world.train(model)
    old = world.logprobs(model)
    sampler = call(model)
    close(sampled_logprobs(sampler), old)
    world.train(model, steps=2)
    close(sampled_logprobs(sampler), old)
    new = world.logprobs(model)
    assert np.abs(new - old).max() > 0.05
    close(sampled_logprobs(call(model)), new)
    close(sampled_logprobs(sampler), old)
    if _takes(model.save_weights_and_get_sampling_client, "kind"):
        follower = call(model, kind="inflight")
        close(sampled_logprobs(follower), new)
        world.train(model, steps=2)
        call(model, kind="inflight")
        close(sampled_logprobs(follower), world.logprobs(model))


@exercise(
    "TrainingClient.create_sampling_client",
    effect="the client has the trainer's log-probabilities of when the path was saved",
)
def create_sampling_client(world: World, call: Call) -> None:
    model = world.model()
    world.train(model)
    logprobs = world.logprobs(model)
    path = settled(model.save_weights_for_sampler(world.name("sampler"))).path
    world.train(model)
    close(sampled_logprobs(call(model, path)), logprobs)


@exercise("TrainingClient.get_info", effect="base model, rank and id are those it was created with")
def get_info(world: World, call: Call) -> None:
    model = world.model(rank=4)
    info = call(model)
    assert info.model_id == model.model_id
    assert info.model_data.model_name == world.base_model
    assert (info.is_lora, info.lora_rank) == (True, 4)


@exercise(
    "TrainingClient.get_tokenizer", "SamplingClient.get_tokenizer",
    effect="the base model's own: text comes back from its tokens",
    note="loaded by the SDK itself, from the hub or a folder: a training client's from what the "
    "gateway is configured to say, a sampling client's from the base model's name",
)  # fmt: skip
def get_tokenizer(world: World, call: Call) -> None:
    client = world.model() if call.owner == "TrainingClient" else world.base_sampler()
    tokenizer = call(client)
    assert tokenizer.decode(tokenizer.encode("1+2=3", add_special_tokens=False)) == "1+2=3"
    assert len(tokenizer) <= 104


@exercise(
    "ServiceClient.get_console_url", "TrainingClient.get_console_url",
    effect="names the session or the run",
    note="points at the hosted console, whose address is fixed in the SDK",
)  # fmt: skip
def get_console_url(world: World, call: Call) -> None:
    if call.owner == "TrainingClient":
        model = world.model()
        assert model.model_id.partition(":")[0] in call(model)
    else:
        assert world.session_id in call(world.service)


@exercise(
    "ServiceClient.get_telemetry", "TrainingClient.get_telemetry", "SamplingClient.get_telemetry",
    "RestClient.get_telemetry", "AdminClient.get_telemetry",
    effect="events of it are accepted by the gateway",
    note="the gateway drops them; clients without a session have none",
)  # fmt: skip
def get_telemetry(world: World, call: Call) -> None:
    makers = {
        "ServiceClient": lambda: world.service,
        "TrainingClient": world.model,
        "SamplingClient": world.base_sampler,
    }
    maker = makers.get(call.owner)
    telemetry = call(maker() if maker else world.client(call.owner))
    if maker is None and telemetry is None:
        return
    batch = telemetry._batch([telemetry._generic_event("exercise", {"number": 1})])
    loop = telemetry._tinker_provider.get_loop()
    sent = asyncio.run_coroutine_threadsafe(telemetry._send_batch(batch), loop).result()
    assert sent.status == "accepted"


def sampled_logprobs(sampler: Any) -> Any:
    """The sampler's, of all tokens of SEQUENCES but each first one."""
    each = [
        settled(sampler.compute_logprobs(types.ModelInput.from_ints(list(tokens))))
        for tokens in SEQUENCES
    ]
    assert all(logprobs[0] is None for logprobs in each)
    return np.concatenate([logprobs[1:] for logprobs in each]).astype(np.float64)


def _about(value: float) -> Any:
    return pytest.approx(value, rel=1e-4, abs=1e-3)


def _takes(function: Any, parameter: str) -> bool:
    return parameter in inspect.signature(function).parameters


def _refused(action: Any, said: str) -> None:
    """That `action` fails at once, and says what it is about."""
    logging.disable(logging.CRITICAL)
    try:
        # Which class it is depends on the SDK's version.
        with pytest.raises(Exception, match=re.escape(said)):
            action()
    finally:
        logging.disable(logging.NOTSET)


def _seconds_left(expires_at: str) -> float:
    return dt.datetime.fromisoformat(expires_at).timestamp() - time.time()
