"""How fast the trainer is: `python -m benchmarks.trainer`.

Prints a table, and as its last line one JSON object of numbers. All ratios are of one run: rounds
of the ways compared take turns, and medians are compared, so that a busy machine slows all alike.

The model is a random Qwen3 of 2.0 million parameters (12 layers, hidden size 128, vocabulary 2,048)
in float32. The work is 16 tenants × 4 sequences × 64 tokens, importance_sampling, with LoRA of
ranks 4 to 32 on all linear layers, on attention only or on the MLP only:
- fused: everybody's batch in shared passes, as the engine runs them.
- single: as many sequences of one tenant (rank 16, all linear layers), also by the engine's code.
- sequential: peft, one tenant after the other, each tenant's sequences as one batch.
- per_sequence: peft, one sequence after the other.
All with one thread of torch, as suits matrices of this size: two are slower in every way.

Then what the journal costs, see benchmarks/journal.py.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import Qwen3Config, Qwen3ForCausalLM

from benchmarks.journal import journal
from rollmesh.types import Datum, LossConfig
from services.trainer.model import Model
from services.trainer.requests import Request, advance, next_pass

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import nn

    from services.trainer.lora import LoraWeights

SEQUENCES = 4
TOKENS = 64
VOCABULARY = 2048
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
KINDS = [
    (rank, targets)
    for targets in (ATTENTION + MLP, ATTENTION, MLP, ATTENTION + MLP)
    for rank in (4, 8, 16, 32)
]
LOSS = LossConfig("importance_sampling")
TENANTS = len(KINDS)
MAX_BATCH_TOKENS = 2048  # what suits a CPU's caches


def main() -> None:
    """Print the table and the numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=_DOC)
    parser.add_argument("--rounds", type=int, default=4, help="rounds of each way")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    found = {**fused(arguments.rounds), **journal(rounds=40)}
    print(json.dumps(found))  # noqa: T201


_DOC = argparse.RawDescriptionHelpFormatter


def fused(rounds: int) -> dict[str, float]:
    """Tokens/s of each way, their spread, and the ratios of fused to the others."""
    model = Model(_base(), max_batch_tokens=MAX_BATCH_TOKENS)
    batches = [_batch(seed) for seed in range(TENANTS)]
    tenants = [_adapter(model, *kind, seed=seed) for seed, kind in enumerate(KINDS)]
    one = [(_adapter(model, 16, ATTENTION + MLP, seed=99), [d for data in batches for d in data])]
    peft = _peft()
    ways: dict[str, Callable[[], None]] = {
        "fused": lambda: _fused(model, list(zip(tenants, batches, strict=True))),
        "single": lambda: _fused(model, one),
        "sequential": lambda: _sequential(peft, batches),
        "per_sequence": lambda: _per_sequence(peft, batches),
    }
    speeds = _measure(ways, rounds)
    medians = {way: statistics.median(found) for way, found in speeds.items()}
    print(f"{'':14}{'tokens/s':>10}{'slowest':>10}{'fastest':>10}{'fused is':>10}")  # noqa: T201
    for way, found in speeds.items():
        ratio = medians["fused"] / medians[way]
        columns = f"{medians[way]:10.0f}{min(found):10.0f}{max(found):10.0f}{ratio:9.2f}x"
        print(f"{way:14}{columns}")  # noqa: T201
    others = [way for way in ways if way != "fused"]
    return {
        **{f"fused_vs_{way}": round(medians["fused"] / medians[way], 3) for way in others},
        **{f"{way}_tokens_per_s": round(medians[way], 1) for way in ways},
        **{
            f"{way}_spread": round((max(found) - min(found)) / medians[way], 3)
            for way, found in speeds.items()
        },
    }


def _measure(ways: Mapping[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Tokens/s of each round of each way; the ways take turns.

    Each is run twice and timed the second time: what the way before it left of the caches and the
    allocator's memory should not be its own.
    """
    speeds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way, run in ways.items():
            run()
            start = time.perf_counter()
            run()
            speeds[way].append(TENANTS * SEQUENCES * TOKENS / (time.perf_counter() - start))
    return speeds


def _base() -> Any:
    torch.manual_seed(0)
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=VOCABULARY,
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=12,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=512,
            tie_word_embeddings=True,
        )
    )


def _batch(seed: int) -> list[Datum]:
    rng = np.random.default_rng(seed)
    return [
        Datum(
            rng.integers(0, VOCABULARY, TOKENS).astype(np.int32),
            rng.integers(0, VOCABULARY, TOKENS).astype(np.int32),
            np.ones(TOKENS, np.float32),
            np.full(TOKENS, -8, np.float32),
            rng.normal(size=TOKENS).astype(np.float32),
        )
        for _ in range(SEQUENCES)
    ]


def _adapter(model: Model, rank: int, targets: Sequence[str], *, seed: int) -> LoraWeights:
    return model.lora.fresh(rank=rank, alpha=2.0 * rank, target_modules=targets, seed=seed)


def _fused(model: Model, batches: Sequence[tuple[LoraWeights, list[Datum]]]) -> None:
    """ForwardBackward of each batch, as services.trainer.engine runs them when all wait."""
    waiting: list[Request] = [model.request(weights, data, LOSS) for weights, data in batches]
    while left := [request for request in waiting if request.next_unit is not None]:
        advance(next_pass(left, model.max_batch_tokens), model.run_pass)
    for request in waiting:
        request.gradients({})


def _peft() -> Any:
    """Adapters "0" to "15" of peft like the tenants', on a base model of their own."""
    configs = [
        LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(targets))
        for rank, targets in KINDS
    ]
    peft = get_peft_model(_base(), configs[0], adapter_name="0")
    for index, config in enumerate(configs[1:], start=1):
        peft.add_adapter(str(index), config)
    return peft.eval()


def _sequential(peft: Any, batches: Sequence[list[Datum]]) -> None:
    for index, data in enumerate(batches):
        peft.set_adapter(str(index))
        _forward_backward(peft, data)


def _per_sequence(peft: Any, batches: Sequence[list[Datum]]) -> None:
    for index, data in enumerate(batches):
        peft.set_adapter(str(index))
        for datum in data:
            _forward_backward(peft, [datum])


def _forward_backward(peft: nn.Module, data: Sequence[Datum]) -> None:
    """What a trainer without fusion does with a batch; the gradients stay in the parameters."""

    def stacked(name: str) -> torch.Tensor:
        return torch.from_numpy(np.stack([getattr(datum, name) for datum in data]))

    logits = peft(input_ids=stacked("token_ids"), use_cache=False).logits
    targets = stacked("target_token_ids").long()
    rows = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), reduction="none"
    )
    ratio = torch.exp(-rows.view_as(targets) - stacked("sampling_logprobs"))
    loss = -(stacked("weights") * ratio * stacked("advantages")).sum()
    torch.autograd.backward(loss)
    loss.item()


if __name__ == "__main__":
    main()
