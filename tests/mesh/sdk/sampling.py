"""Exercises of SamplingClient."""

from __future__ import annotations

import base64
import inspect
import logging
import pickle
from typing import TYPE_CHECKING, Any

import numpy as np
import tinker
from tinker import types

from tests.mesh.sdk.calling import exercise, settled
from tests.mesh.sdk.training import _refused, sampled_logprobs
from tests.mesh.sdk.world import SEQUENCES, VOCABULARY, close

if TYPE_CHECKING:
    from tests.mesh.sdk.calling import Call
    from tests.mesh.sdk.world import World

PROMPT = list(SEQUENCES[0][:5])


@exercise(
    "SamplingClient.sample",
    effect="a seed repeats its samples and each sample is another; max_tokens, stop (tokens, text, "
    "none), temperature, top-k and top-p hold; stop reasons are true; log-probabilities of "
    "samples, prompt and likeliest tokens equal transformers'; copies by pickle draw the same",
    note="refused with a clear error: images, target_prompt_logprobs and prompt_alt_tokens_k, "
    "which this mesh's samplers do not compute",
)
def sample(world: World, call: Call) -> None:
    sampler = world.base_sampler()

    def draw(num: int = 1, *, prompt: list[int] = PROMPT, given: Any = None, **params: Any) -> Any:
        params = {"max_tokens": 8, "temperature": 1.0, "seed": 7, "stop": [], **params}
        model_input = types.ModelInput.from_ints(prompt)
        return call(sampler, model_input, num, types.SamplingParams(**params), **(given or {}))

    # A seed, and how many.
    first, again = draw(4), draw(4)
    tokens = [list(sequence.tokens) for sequence in first.sequences]
    assert tokens == [list(sequence.tokens) for sequence in again.sequences]
    assert len({tuple(each) for each in tokens}) > 1
    other = [list(sequence.tokens) for sequence in draw(4, seed=8).sequences]
    assert other != tokens
    assert all(len(each) == 8 for each in tokens)
    assert {sequence.stop_reason for sequence in first.sequences} == {"length"}
    # Log-probabilities of what was drawn, also at another temperature.
    for temperature in (1.0, 0.5):
        (drawn,) = draw(temperature=temperature).sequences
        _check_logprobs(world, drawn, temperature)
    # Greedy, and the likeliest token alone, are the same tokens.
    greedy = _greedy(world, PROMPT, 6)
    assert list(draw(temperature=0.0, max_tokens=6).sequences[0].tokens) == greedy
    assert list(draw(top_k=1, max_tokens=6).sequences[0].tokens) == greedy
    assert list(draw(top_p=1e-6, max_tokens=6).sequences[0].tokens) == greedy
    # It stops at a token, which is part of the answer, and says so.
    at = next(i for i in range(1, 8) if tokens[0][i] not in tokens[0][:i])
    (stopped,) = draw(stop=[tokens[0][at]]).sequences[:1]
    assert list(stopped.tokens) == tokens[0][: at + 1]
    assert stopped.stop_reason == "stop"
    tokenizer = sampler.get_tokenizer()
    word = tokenizer.decode(tokens[0][at : at + 2])
    (stopped,) = draw(stop=[word]).sequences
    assert stopped.stop_reason == "stop", word
    assert word in tokenizer.decode(stopped.tokens)
    assert word not in tokenizer.decode(stopped.tokens[:-1])
    # The prompt's log-probabilities and the likeliest tokens at each position.
    given: dict[str, Any] = {"include_prompt_logprobs": True, "topk_prompt_logprobs": 3}
    answer = draw(given=given)
    expected = world.reference.distributions(PROMPT)
    assert answer.prompt_logprobs[0] is None
    close(answer.prompt_logprobs[1:], [expected[i, t] for i, t in enumerate(PROMPT[1:])])
    assert answer.topk_prompt_logprobs[0] is None
    for position, row in enumerate(answer.topk_prompt_logprobs[1:]):
        best = np.sort(expected[position])[::-1][:3]
        close([logprob for _, logprob in row[:3]], best)
        close([expected[position, token] for token, _ in row[:3]], best)
    _check_image(call, sampler)
    _newer(world, call, sampler, draw)
    clone = pickle.loads(pickle.dumps(sampler))  # noqa: S301 - our own bytes
    model_input = types.ModelInput.from_ints(PROMPT)
    params = types.SamplingParams(max_tokens=8, temperature=1.0, seed=7, stop=[])
    cloned = call(clone, model_input, 4, params)
    assert [list(sequence.tokens) for sequence in cloned.sequences] == tokens


def _check_image(call: Call, sampler: Any) -> None:
    image = types.ImageChunk(data=b"png", format="png", expected_tokens=1)
    prompt = types.ModelInput(chunks=[image])
    _refused(lambda: call(sampler, prompt, 1, types.SamplingParams(max_tokens=1)), "only text")


def _newer(world: World, call: Call, sampler: Any, draw: Any) -> None:
    """What only newer versions can ask for."""
    takes = inspect.signature(sampler.sample).parameters
    if "topk_sample_logprobs" in takes:
        (drawn,) = draw(given={"topk_sample_logprobs": 2}).sequences
        whole = [*PROMPT, *drawn.tokens]
        expected = world.reference.distributions(whole)[len(PROMPT) - 1 :]
        for position, row in enumerate(drawn.topk_logprobs):
            close([logprob for _, logprob in row], np.sort(expected[position])[::-1][: len(row)])
    if "prompt_logprobs_last_n" in takes:
        given = {"include_prompt_logprobs": True, "prompt_logprobs_last_n": 2}
        told = draw(given=given).prompt_logprobs
        assert [each is None for each in told] == [True] * (len(PROMPT) - 2) + [False] * 2
    if "sequence_id" in types.SampledSequence.__dataclass_fields__:
        ids = {sequence.sequence_id for sequence in draw(3).sequences}
        assert len(ids) == 3
    if "prompt_alt_tokens_k" in takes:
        # Should it be answered one day: compare what it says.
        _refused(lambda: draw(given={"prompt_alt_tokens_k": 2}), "prompt_alt_tokens_k")


def _check_logprobs(world: World, drawn: Any, temperature: float) -> None:
    whole = [*PROMPT, *drawn.tokens]
    logits = world.reference.distributions(whole)[len(PROMPT) - 1 : -1] / temperature
    tempered = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    close(drawn.logprobs, tempered[np.arange(len(drawn.tokens)), drawn.tokens])


def _greedy(world: World, prompt: list[int], num: int) -> list[int]:
    whole = list(prompt)
    for _ in range(num):
        whole.append(int(world.reference.distributions(whole)[-1].argmax()))
    return whole[len(prompt) :]


@exercise(
    "SamplingClient.compute_logprobs",
    effect="equal the trainer's forward of the same weights, and transformers' of the base model",
)
def compute_logprobs(world: World, call: Call) -> None:
    tokens = list(SEQUENCES[0])
    model_input = types.ModelInput.from_ints(tokens)
    expected = world.reference.logprobs(tokens[:-1], tokens[1:])
    told = call(world.base_sampler(), model_input)
    assert told[0] is None
    close(told[1:], expected)
    model = world.model()
    world.train(model)
    sampler = world.sampler(model)
    told = call(sampler, model_input)
    close(told[1:], world.logprobs(model)[: len(tokens) - 1])
    if "prompt_logprobs_last_n" in inspect.signature(sampler.compute_logprobs).parameters:
        last = call(sampler, model_input, prompt_logprobs_last_n=3)
        assert [each is None for each in last] == [True] * (len(tokens) - 3) + [False] * 3
        close(last[-3:], told[-3:])


@exercise("SamplingClient.get_base_model", effect="the model's, also of a client made from a path")
def get_base_model(world: World, call: Call) -> None:
    assert call(world.base_sampler()) == world.base_model
    path = settled(world.model().save_weights_for_sampler(world.name("sampler"))).path
    sampler = settled(world.service.create_sampling_client(model_path=path))
    assert call(sampler) == world.base_model


@exercise(
    "SamplingClient.get_sampler_handle", "SamplingClient.from_sampler_handle",
    effect="a client made from the handle samples the same weights; the handle has no key",
)  # fmt: skip
def sampler_handle(world: World, call: Call) -> None:
    model = world.model()
    world.train(model)
    sampler = world.sampler(model)
    if call.method == "get_sampler_handle":
        handle = call(sampler)
        other = tinker.SamplingClient.from_sampler_handle(handle, api_key=world.key)
    else:
        handle = sampler.get_sampler_handle()
        other = call(tinker.SamplingClient, handle, api_key=world.key)
    assert world.key not in base64.urlsafe_b64decode(handle).decode()
    world.train(model)
    close(sampled_logprobs(other), sampled_logprobs(sampler), atol=0.0)


@exercise(
    "SamplingClient.create", effect="samples the base model, or the weights that a path stands for"
)
def create(world: World, call: Call) -> None:
    holder = world.service.holder
    base = call(tinker.SamplingClient, holder, base_model=world.base_model)
    expected = [world.reference.logprobs(*pair) for pair in world.pairs()]
    close(sampled_logprobs(base), np.concatenate(expected))
    model = world.model()
    world.train(model)
    path = settled(model.save_weights_for_sampler(world.name("sampler"))).path
    close(
        sampled_logprobs(call(tinker.SamplingClient, holder, model_path=path)),
        world.logprobs(model),
    )


@exercise(
    "SamplingClient.on_queue_state_change",
    effect="the user is told why samples wait",
    note="called by the SDK while a sample waits; nothing goes over the wire",
)
def on_queue_state_change(world: World, call: Call) -> None:
    from tinker.lib.api_future_impl import QueueState  # noqa: PLC0415

    told: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("tinker.lib.public_interfaces.sampling_client")
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.WARNING)
    try:
        call(world.base_sampler(), QueueState.PAUSED_CAPACITY, "the sampler is full")
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)
    assert any("the sampler is full" in each for each in told)


assert max(max(each) for each in SEQUENCES) < VOCABULARY
