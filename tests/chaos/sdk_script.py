"""What a user of the Tinker SDK does with one model: the same loop every time it is run.

Both loops sample at every step; one trains on what it drew, the other on data of its own.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import tinker
from tinker import types

from services.gateway.wire.ids import ModelId

if TYPE_CHECKING:
    from collections.abc import Callable

BASE_MODEL = "arith"
VOCAB_SIZE = 104
PROMPTS_A_STEP = 2
COMPLETIONS = 3
MAX_TOKENS = 12
AGREE_WITHIN = 1e-3
"""Log-probabilities of sampler and trainer, in nats: those of another step are far from it."""
ADAM = types.AdamParams(learning_rate=2e-3, grad_clip_norm=1.0, weight_decay=0.01)


@dataclass(frozen=True)
class Loop:
    """One of the loops."""

    project: str
    rank: int
    loss: types.LossFnType
    seed: int


LOOPS = (
    Loop("projects/red", rank=4, loss="importance_sampling", seed=1),
    Loop("projects/blue", rank=8, loss="cross_entropy", seed=2),
)


@dataclass
class Trace:
    """What came of each request, in order, and the adapter that holds the weights."""

    adapter: str = ""
    results: list[str] = field(default_factory=list)


def train(loop: Loop, url: str, key: str, steps: int, turn: Callable[[], None]) -> Trace:
    """Run a loop to its end; `turn` returns when the next requests may be made."""
    trace = Trace()
    rng = np.random.default_rng(loop.seed)

    def told(what: str, value: Any) -> Any:
        trace.results.append(f"{what} {value}")
        return value

    with tinker.ServiceClient(base_url=url, api_key=key) as service:
        turn()
        training = service.create_lora_training_client(
            BASE_MODEL, rank=loop.rank, seed=loop.seed, train_unembed=False
        ).result()
        trace.adapter = ModelId.parse(training.model_id).adapter(loop.project)
        for step in range(steps):
            turn()
            sampler = training.save_weights_and_get_sampling_client().result()
            prompts = [_tokens(rng, 8) for _ in range(PROMPTS_A_STEP)]
            turn()
            drawing = [
                sampler.sample(
                    types.ModelInput.from_ints(prompt),
                    COMPLETIONS,
                    types.SamplingParams(
                        max_tokens=MAX_TOKENS, seed=step * PROMPTS_A_STEP + n, stop=[]
                    ),
                )
                for n, prompt in enumerate(prompts)
            ]
            drawn = [
                (prompt, completion)
                for prompt, future in zip(prompts, drawing, strict=True)
                for completion in future.result().sequences
            ]
            told("drew", [completion.tokens for _, completion in drawn])
            whole = [(prompt, completion.tokens) for prompt, completion in drawn]
            turn()
            # The trainer's own log-probabilities: the same bits every time, whoever else is there.
            logprobs = _logprobs(training.forward(_data(whole), "cross_entropy").result())
            told("forward", _bits(logprobs))
            for (_, completion), mine in zip(drawn, logprobs, strict=True):
                gap = np.abs(np.array(completion.logprobs) - mine[-len(completion.tokens) :]).max()
                assert gap < AGREE_WITHIN, "the sampler drew with the weights of another step"
            turn()
            if loop.loss == "cross_entropy":
                own = [(_tokens(rng, 5), _tokens(rng, int(rng.integers(2, 40)))) for _ in range(4)]
                data = _data(own)
            else:
                data = _data(whole, logprobs)
            # Both are under way before either is answered.
            gradients = training.forward_backward(data, loop.loss)
            stepped = training.optim_step(ADAM)
            result = gradients.result()
            told("forward_backward", _bits(_logprobs(result)))
            told("metrics", _metrics(result.metrics))
            told("optim_step", _metrics(stepped.result().metrics or {}))
            if step == steps // 2:
                turn()
                told("saved", training.save_state("middle").result().path.rpartition("/")[2])
    return trace


def _tokens(rng: np.random.Generator, count: int) -> list[int]:
    tokens: list[int] = rng.integers(8, VOCAB_SIZE, count).tolist()
    return tokens


def _data(
    pairs: list[tuple[list[int], list[int]]], logprobs: list[np.ndarray] | None = None
) -> list[types.Datum]:
    """Prompts and what follows, which is learned; with `logprobs`, by its worth: its parity."""
    data = []
    for n, (prompt, tokens) in enumerate(pairs):
        sequence = prompt + tokens
        target = np.array(sequence[1:], np.int64)
        learned = np.arange(len(target)) >= len(prompt) - 1
        inputs: dict[str, Any] = {"target_tokens": target}
        if logprobs is None:
            inputs["weights"] = learned.astype(np.float32)
        else:
            worth = np.where(target % 2, 1.0, -0.5)
            inputs["advantages"] = (worth * learned).astype(np.float32)
            inputs["logprobs"] = logprobs[n]
        data.append(types.Datum(types.ModelInput.from_ints(sequence[:-1]), inputs))
    return data


def _logprobs(output: types.ForwardBackwardOutput) -> list[np.ndarray]:
    return [np.array(each["logprobs"].data, np.float32) for each in output.loss_fn_outputs]


def _bits(arrays: list[np.ndarray]) -> str:
    return hashlib.sha256(b"".join(each.tobytes() for each in arrays)).hexdigest()


def _metrics(metrics: dict[str, float]) -> list[str]:
    """Every bit of them, but no times."""
    times = ("_s:", "time")
    return [
        f"{key} {float(value).hex()}"
        for key, value in sorted(metrics.items())
        if not key.endswith("_s") and not any(each in key for each in times)
    ]
