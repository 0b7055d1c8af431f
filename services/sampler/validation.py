"""What a sampler refuses before it does anything, and the defaults of what a request leaves out."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from rollmesh import names
from rollmesh.errors import InvalidRequest
from services.sampler.backends.base import MAX_TEMPERATURE, Draw, Model

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from rollmesh.types import AdapterSource, SamplingParams

MAX_COMPLETIONS = 1024
MAX_STOP_STRINGS = 16
_DIGEST = re.compile(r"[0-9a-f]{64}")


def check_source(source: AdapterSource, *, field: str = "source") -> None:
    """Refuse a source that no trainer could have published."""
    names.parse_adapter(source.adapter, field=f"{field}.adapter")
    _check(source.policy_version >= 0, f"{field}.policy_version", source.policy_version, "≥ 0")
    if not _DIGEST.fullmatch(source.digest):
        raise _invalid(f"{field}.digest", source.digest, "64 lower-case hex digits")
    _check(bool(source.trainer_address), f"{field}.trainer_address", "", "host:port of a trainer")


def check_prompt(prompt_token_ids: Sequence[int], model: Model, *, field: str) -> None:
    """Refuse a prompt that is empty, too long for one more token, or not of this vocabulary."""
    length = len(prompt_token_ids)
    _check(length >= 1, field, "nothing", "at least one token id")
    if length >= model.max_length:
        raise _invalid(field, f"{length} token ids", f"at most {model.max_length - 1}")
    _check_tokens(prompt_token_ids, model, field)


def check_sequence(token_ids: Sequence[int], model: Model) -> None:
    """Refuse a sequence of which no log-probabilities can be computed."""
    _check(len(token_ids) >= 2, "token_ids", f"{len(token_ids)} token ids", "at least 2")
    check_prompt(token_ids, model, field="token_ids")


def resolve(
    params: SamplingParams,
    num_completions: int,
    num_prompt_tokens: int,
    model: Model,
    new_seed: Callable[[], int],
) -> Draw:
    """`params` with every default filled in.

    Raises:
        InvalidRequest: out of range; the context names the field.
    """
    _check(
        1 <= num_completions <= MAX_COMPLETIONS,
        "num_completions",
        num_completions,
        f"1 to {MAX_COMPLETIONS}",
    )
    left = model.max_length - num_prompt_tokens
    max_tokens = left if params.max_tokens is None else params.max_tokens
    _check(max_tokens >= 1, "params.max_tokens", max_tokens, "≥ 1")
    temperature = 1.0 if params.temperature is None else params.temperature
    # Written so that NaN, which compares with nothing, is refused too.
    _check(
        0 <= temperature <= MAX_TEMPERATURE,
        "params.temperature",
        temperature,
        f"0 to {MAX_TEMPERATURE:g}",
    )
    if params.top_k is not None:
        _check(params.top_k >= 1, "params.top_k", params.top_k, "≥ 1")
    top_p = 1.0 if params.top_p is None else params.top_p
    _check(0 < top_p <= 1, "params.top_p", top_p, "above 0, at most 1")
    _check(
        len(params.stop) <= MAX_STOP_STRINGS,
        "params.stop",
        f"{len(params.stop)} strings",
        f"at most {MAX_STOP_STRINGS}",
    )
    _check(all(params.stop), "params.stop", "an empty string", "text")
    _check_tokens(params.stop_token_ids, model, "params.stop_token_ids")
    return Draw(
        max_tokens=min(max_tokens, left),
        temperature=temperature,
        # Of a vocabulary, at most all.
        top_k=0 if params.top_k is None else min(params.top_k, model.vocab_size),
        top_p=top_p,
        seed=mixed(new_seed() if params.seed is None else params.seed),
        stop=params.stop,
        stop_token_ids=params.stop_token_ids,
        ignore_eos=params.ignore_eos,
    )


def mixed(seed: int, stream: int = 0) -> int:
    """A seed in [0, 2**62) that shares nothing with those of nearby seeds (splitmix64's finish).

    Callers count their seeds up, and vLLM counts up from the seed that it gets, one for each of n
    completions: unmixed, two requests of neighbouring seeds would draw the same numbers.
    """
    word = (seed + (stream + 1) * 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return (word ^ (word >> 31)) >> 2


def _check_tokens(token_ids: Sequence[int], model: Model, field: str) -> None:
    for index, token_id in enumerate(token_ids):
        if not 0 <= token_id < model.vocab_size:
            raise _invalid(f"{field}[{index}]", token_id, f"0 to {model.vocab_size - 1}")


def _check(holds: bool, field: str, value: object, allowed: str) -> None:  # noqa: FBT001
    if not holds:
        raise _invalid(field, value, allowed)


def _invalid(field: str, value: object, allowed: str) -> InvalidRequest:
    return InvalidRequest(
        f"{field}: {value}, allowed is {allowed}", field=field, value=value, allowed=allowed
    )
