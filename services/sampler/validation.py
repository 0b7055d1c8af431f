"""What a sampler refuses before it does anything, and the defaults of what a request leaves out."""

from __future__ import annotations

import itertools
import json
import re
from typing import TYPE_CHECKING

from rollmesh import names
from rollmesh.errors import InvalidRequest
from services.sampler.backends.base import MAX_TEMPERATURE, Draw, Model
from services.sampler.splitmix import STEP, WORD, finished

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from rollmesh.types import AdapterSource, Continuation, SamplingParams

MAX_COMPLETIONS = 1024
MAX_STOP_STRINGS = 16
MAX_LOGIT_BIAS = 1024
MAX_BIAS = 100.0
MAX_PROMPT_LOGPROBS = 20
MAX_TOP_LOGPROBS = 20
MAX_CONSTRAINT_BYTES = 16 * 2**10
MAX_NESTING = 32
"""Of a schema's objects and arrays, and of a regular expression's groups."""
MAX_REPETITIONS = 1000
"""That a regular expression counts in one place."""
MAX_ALTERNATIVES = 1000
"""Of a regular expression, in all."""
_DIGEST = re.compile(r"[0-9a-f]{64}")


def check_source(source: AdapterSource, *, field: str = "source") -> None:
    """Refuse a source that no trainer could have published."""
    names.parse_adapter(source.adapter, field=f"{field}.adapter")
    _check(source.policy_version >= 0, f"{field}.policy_version", source.policy_version, "≥ 0")
    if not _DIGEST.fullmatch(source.digest):
        raise _invalid(f"{field}.digest", source.digest, "64 lower-case hex digits")
    if not (source.trainer_address or source.export_key):
        allowed = "host:port of a trainer, unless export_key is set"
        raise _invalid(f"{field}.trainer_address", "nothing", allowed)


def check_project(project: str) -> None:
    """Refuse what is no project's id."""
    names.check_id(project, field="project")


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


def check_continuations(
    continuations: Sequence[Continuation], num_completions: int, model: Model, draw: Draw
) -> None:
    """Refuse completions that are not the request's, or that nothing is left to draw of."""
    seen: set[int] = set()
    for place, continuation in enumerate(continuations):
        field = f"continuations[{place}]"
        index, length = continuation.index, len(continuation.token_ids)
        _check(0 <= index < num_completions, f"{field}.index", index, f"0 to {num_completions - 1}")
        _check(index not in seen, f"{field}.index", index, "each index once")
        seen.add(index)
        if length >= draw.max_tokens:
            # Those have room in the context.
            allowed = f"fewer than may be drawn, {draw.max_tokens}"
            raise _invalid(f"{field}.token_ids", f"{length} token ids", allowed)
        _check_tokens(continuation.token_ids, model, f"{field}.token_ids")


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
    min_p = 0.0 if params.min_p is None else params.min_p
    _check(0 <= min_p < 1, "params.min_p", min_p, "at least 0, below 1")
    _check_logit_bias(params.logit_bias, model)
    _check_constraint(params)
    if params.prompt_logprobs is not None:
        _check(
            0 <= params.prompt_logprobs <= MAX_PROMPT_LOGPROBS,
            "params.prompt_logprobs",
            params.prompt_logprobs,
            f"0 to {MAX_PROMPT_LOGPROBS}",
        )
    if params.top_logprobs is not None:
        most = min(MAX_TOP_LOGPROBS, model.vocab_size)
        _check(
            0 <= params.top_logprobs <= most,
            "params.top_logprobs",
            params.top_logprobs,
            f"0 to {most}",
        )
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
        min_p=min_p,
        logit_bias=params.logit_bias,
        json_schema=params.json_schema,
        regex=params.regex,
        logprobs_kind=params.logprobs_kind,
        prompt_logprobs=params.prompt_logprobs,
        top_logprobs=params.top_logprobs,
    )


def mixed(seed: int, stream: int = 0) -> int:
    """A seed in [0, 2**62) of `stream`, which shares nothing with those of nearby seeds or streams.

    Callers count their seeds up: unmixed, requests of neighbouring seeds could draw the same
    numbers.
    """
    return finished((seed + (stream + 1) * STEP) & WORD) >> 2


def _check_logit_bias(logit_bias: Sequence[tuple[int, float]], model: Model) -> None:
    field = "params.logit_bias"
    if len(logit_bias) > MAX_LOGIT_BIAS:
        raise _invalid(field, f"{len(logit_bias)} token ids", f"at most {MAX_LOGIT_BIAS}")
    for token_id, bias in logit_bias:
        _check(
            0 <= token_id < model.vocab_size,
            f"{field}[{token_id}]",
            f"token id {token_id}",
            f"0 to {model.vocab_size - 1}",
        )
        _check(
            -MAX_BIAS <= bias <= MAX_BIAS,
            f"{field}[{token_id}]",
            bias,
            f"-{MAX_BIAS:g} to {MAX_BIAS:g}",
        )


def _check_constraint(params: SamplingParams) -> None:
    """Whether the engine can use the schema or expression, the engine itself says."""
    if params.regex is not None:
        _check_regex(params.regex)
    if params.json_schema is not None:
        _check_schema(params.json_schema)


def _check_regex(regex: str) -> None:
    field = "params.regex"
    _check(bool(regex), field, "an empty string", "a regular expression")
    _check_size(regex, field)
    _check("\0" not in regex, field, "a NUL character", "text without it")
    counts = [int(count) for count in re.findall(r"(?<=[{,])[0-9]+(?=[,}])", regex)]
    most = max(counts, default=0)
    allowed = f"at most {MAX_REPETITIONS} repetitions"
    _check(most <= MAX_REPETITIONS, field, f"{most} repetitions", allowed)
    bars = regex.count("|")
    allowed = f"fewer than {MAX_ALTERNATIVES} alternatives"
    _check(bars < MAX_ALTERNATIVES, field, f"{bars} times |", allowed)
    # Escaped ones are counted too: nobody needs that many.
    depths = itertools.accumulate((char == "(") - (char == ")") for char in regex)
    _check(max(depths) <= MAX_NESTING, field, "a deeper one", f"{MAX_NESTING} groups in each other")


def _check_schema(text: str) -> None:
    field = "params.json_schema"
    _check_size(text, field)
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError):
        schema = None
    if not isinstance(schema, dict | bool):
        raise _invalid(field, repr(text[:80]), "a JSON schema")
    level: list[object] = [schema]
    for _ in range(MAX_NESTING):
        parents = [each for each in level if isinstance(each, dict | list)]
        level = [
            child
            for parent in parents
            for child in (parent.values() if isinstance(parent, dict) else parent)
        ]
    _check(
        not any(isinstance(each, dict | list) for each in level),
        field,
        "a deeper one",
        f"{MAX_NESTING} objects and arrays in each other",
    )


def _check_size(text: str, field: str) -> None:
    size = len(text.encode())
    _check(size <= MAX_CONSTRAINT_BYTES, field, f"{size} bytes", f"at most {MAX_CONSTRAINT_BYTES}")


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
