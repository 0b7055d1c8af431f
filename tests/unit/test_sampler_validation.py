"""Defaults and seeds of a sampler's requests, and what is refused."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollmesh.errors import InvalidRequest
from rollmesh.types import AdapterSource, Continuation, SamplingParams
from services.sampler.backends.base import Draw, Model
from services.sampler.validation import (
    check_continuations,
    check_project,
    check_source,
    mixed,
    resolve,
)

MODEL = Model(vocab_size=50, max_length=100, max_loras=2)


def resolved(params: SamplingParams) -> Draw:
    return resolve(params, 1, 90, MODEL, lambda: 1234)


def nested(depth):
    return "{}".join(['{"a": ' * (depth - 1), "}" * (depth - 1)])


def test_what_a_request_leaves_out_gets_the_defaults_of_the_protos():
    assert resolved(SamplingParams()) == Draw(
        max_tokens=10,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        seed=mixed(1234),
        stop=(),
        stop_token_ids=(),
        ignore_eos=False,
    )


@pytest.mark.parametrize(
    ("params", "field", "value"),
    [
        (SamplingParams(max_tokens=4), "max_tokens", 4),
        (SamplingParams(max_tokens=400), "max_tokens", 10),
        (SamplingParams(temperature=0), "temperature", 0),
        (SamplingParams(top_k=7), "top_k", 7),
        (SamplingParams(top_k=7000), "top_k", 50),
        (SamplingParams(top_p=1), "top_p", 1),
        (SamplingParams(seed=0), "seed", mixed(0)),
        (SamplingParams(seed=-(2**63)), "seed", mixed(-(2**63))),
        (SamplingParams(stop=("a",)), "stop", ("a",)),
        (SamplingParams(ignore_eos=True), "ignore_eos", True),
        (SamplingParams(min_p=0.25), "min_p", 0.25),
        (
            SamplingParams(logit_bias=((49, -100.0), (0, 100.0))),
            "logit_bias",
            ((49, -100), (0, 100)),
        ),
        (SamplingParams(json_schema="{}"), "json_schema", "{}"),
        (SamplingParams(json_schema="true"), "json_schema", "true"),
        (SamplingParams(regex="a+"), "regex", "a+"),
        (SamplingParams(logprobs_kind="sampled"), "logprobs_kind", "sampled"),
        (SamplingParams(prompt_logprobs=0), "prompt_logprobs", 0),
        (SamplingParams(prompt_logprobs=20), "prompt_logprobs", 20),
        (SamplingParams(), "top_logprobs", None),
        (SamplingParams(top_logprobs=0), "top_logprobs", 0),
        (SamplingParams(top_logprobs=20), "top_logprobs", 20),
        (SamplingParams(json_schema=nested(32)), "json_schema", nested(32)),
        (SamplingParams(regex="(" * 32 + ")" * 32), "regex", "(" * 32 + ")" * 32),
        (SamplingParams(regex="(a|b){1,1000}"), "regex", "(a|b){1,1000}"),
    ],
)
def test_what_a_request_says_is_taken_within_what_the_model_has(params, field, value):
    assert getattr(resolved(params), field) == value


@pytest.mark.parametrize(
    ("params", "field", "value"),
    [
        (SamplingParams(max_tokens=0), "params.max_tokens", "0"),
        (SamplingParams(temperature=2.5), "params.temperature", "2.5"),
        (SamplingParams(temperature=math.nan), "params.temperature", "nan"),
        (SamplingParams(min_p=1.0), "params.min_p", "1.0"),
        (SamplingParams(min_p=-0.1), "params.min_p", "-0.1"),
        (SamplingParams(min_p=math.nan), "params.min_p", "nan"),
        (SamplingParams(logit_bias=((50, 1.0),)), "params.logit_bias[50]", "token id 50"),
        (SamplingParams(logit_bias=((-1, 1.0),)), "params.logit_bias[-1]", "token id -1"),
        (SamplingParams(logit_bias=((7, 100.5),)), "params.logit_bias[7]", "100.5"),
        (SamplingParams(logit_bias=((7, math.nan),)), "params.logit_bias[7]", "nan"),
        (SamplingParams(logit_bias=((7, -math.inf),)), "params.logit_bias[7]", "-inf"),
        (SamplingParams(logit_bias=((7, 1.0),) * 1025), "params.logit_bias", "1025 token ids"),
        (SamplingParams(regex=""), "params.regex", "an empty string"),
        (SamplingParams(json_schema=""), "params.json_schema", "''"),
        (SamplingParams(json_schema="{"), "params.json_schema", "'{'"),
        (SamplingParams(json_schema="[1]"), "params.json_schema", "'[1]'"),
        (SamplingParams(json_schema="[" * 10**4), "params.json_schema", repr("[" * 80)),
        (SamplingParams(json_schema=" " * 16385), "params.json_schema", "16385 bytes"),
        (SamplingParams(json_schema=nested(33)), "params.json_schema", "a deeper one"),
        (SamplingParams(regex="ä" * 8193), "params.regex", "16386 bytes"),
        (SamplingParams(regex="a\0b"), "params.regex", "a NUL character"),
        (SamplingParams(regex="a{1001}"), "params.regex", "1001 repetitions"),
        (SamplingParams(regex="a{2,1001}"), "params.regex", "1001 repetitions"),
        (SamplingParams(regex="a|" * 1000 + "b"), "params.regex", "1000 times |"),
        (SamplingParams(regex="(" * 33 + "a" + ")" * 33), "params.regex", "a deeper one"),
        (SamplingParams(prompt_logprobs=-1), "params.prompt_logprobs", "-1"),
        (SamplingParams(prompt_logprobs=21), "params.prompt_logprobs", "21"),
        (SamplingParams(top_logprobs=-1), "params.top_logprobs", "-1"),
        (SamplingParams(top_logprobs=21), "params.top_logprobs", "21"),
    ],
)
def test_what_is_out_of_range_is_refused_by_its_field(params, field, value):
    with pytest.raises(InvalidRequest) as caught:
        resolved(params)
    assert caught.value.context["field"] == field
    assert caught.value.context["value"] == value
    assert caught.value.context["allowed"]


CONTINUED = Continuation(1, (1, 2))


@pytest.mark.parametrize(
    ("continuations", "field"),
    [
        ([Continuation(3)], "continuations[0].index"),
        ([Continuation(-1)], "continuations[0].index"),
        ([CONTINUED, Continuation(1)], "continuations[1].index"),
        ([CONTINUED, Continuation(2, (1, 50))], "continuations[1].token_ids[1]"),
        ([CONTINUED, Continuation(2, (1,) * 4)], "continuations[1].token_ids"),
    ],
)
def test_completions_that_cannot_go_on_are_refused(continuations, field):
    draw = resolved(SamplingParams(max_tokens=4))
    with pytest.raises(InvalidRequest) as caught:
        check_continuations(continuations, 3, MODEL, draw)
    assert caught.value.context["field"] == field


def test_completions_go_on_from_any_length_below_max_tokens():
    draw = resolved(SamplingParams(max_tokens=4))
    check_continuations([Continuation(2, (49,) * 3), Continuation(0)], 3, MODEL, draw)


@pytest.mark.parametrize("project", ["", "p/q", "projects/p", "..", "P"])
def test_what_is_no_project_is_refused(project):
    check_project("p")
    with pytest.raises(InvalidRequest) as caught:
        check_project(project)
    assert caught.value.context["field"] == "project"


@given(st.integers(-(2**63), 2**63 - 1), st.integers(0, 1024))
def test_a_mixed_seed_leaves_room_to_count_up(seed, stream):
    assert 0 <= mixed(seed, stream) < 2**62


def test_seeds_that_are_near_each_other_share_no_stream():
    # A backend may count up from a seed, once for each of up to 1,024 completions.
    starts = sorted(mixed(seed) for seed in range(-1000, 1000))
    assert min(b - a for a, b in itertools.pairwise(starts)) > 1024


def test_a_source_has_a_trainer_or_a_blob():
    source = AdapterSource("projects/p/adapters/a", 0, "0" * 64)
    check_source(replace(source, trainer_address="trainer:1"))
    check_source(replace(source, export_key="versions/" + "0" * 32))
    with pytest.raises(InvalidRequest) as caught:
        check_source(source)
    assert caught.value.context["field"] == "source.trainer_address"
