"""Whatever a body holds: a documented status, never a 500, and nobody else is disturbed."""

from __future__ import annotations

import json

import httpx
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.fakes.openai_world import ADAPTER, TINKER, openai_world
from tests.fakes.tokenizers import TOOLED, bpe_model

DOCUMENTED = {200, 400, 401, 404, 413, 429, 503}
numbers = st.one_of(
    st.integers(), st.floats(), st.sampled_from([0, -1, 2**31, 2**63, -(2**63), 1e308, 10**400])
)
texts = st.one_of(st.text(), st.sampled_from(["\0", "\ud800", "<tool_call>", "arith", "", TINKER]))
anything = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, texts),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(
            st.one_of(texts, st.sampled_from(["role", "content", "name", "type"])),
            inner,
            max_size=4,
        ),
    ),
    max_leaves=12,
)


words = st.one_of(
    st.text(), st.sampled_from(["<tool_call>", "<|im_end|>", "{{ 1/0 }}", "\0", "é🙂"])
)
contents = st.one_of(
    words, st.none(), st.lists(st.builds(lambda text: {"type": "text", "text": text}, words))
)
arguments = st.one_of(anything.map(json.dumps), words)
calls = st.fixed_dictionaries(
    {"function": st.fixed_dictionaries({"name": words.filter(bool), "arguments": arguments})},
    optional={"id": words, "type": st.just("function"), "index": st.integers()},
)
messages = st.one_of(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["system", "developer", "user", "tool"]), "content": contents},
        optional={"name": words, "tool_call_id": words},
    ),
    st.fixed_dictionaries(
        {"role": st.just("assistant")},
        optional={
            "content": contents,
            "tool_calls": st.lists(calls, max_size=3),
            "reasoning_content": words,
        },
    ),
)
schemas = st.one_of(
    st.sampled_from([{}, True, {"type": "object"}, {"const": 1}]),
    st.dictionaries(st.text(max_size=4), anything, max_size=3),
)
tools = st.builds(
    lambda name, told, schema: {
        "type": "function",
        "function": {"name": name, "description": told, "parameters": schema},
    },
    st.sampled_from(["f", "g"]),
    words,
    schemas.filter(lambda schema: schema is not True),
)
numbers_in_range = {
    "n": st.integers(1, 3),
    "max_tokens": st.integers(1, 5000),
    "temperature": st.floats(0, 2.5),
    "top_p": st.floats(0, 1),
    "top_k": st.integers(-1, 2**31 - 1),
    "min_p": st.floats(0, 1),
    "seed": st.integers(-(2**63), 2**63 - 1),
    "stop": st.one_of(words, st.lists(words, max_size=3)),
    "stop_token_ids": st.lists(st.integers(0, 500), max_size=3),
    "logit_bias": st.dictionaries(st.integers(0, 500).map(str), st.floats(-101, 101), max_size=3),
    "stream": st.booleans(),
    "return_token_ids": st.booleans(),
    "skip_special_tokens": st.booleans(),
    "response_format": st.one_of(
        st.just({"type": "json_object"}),
        st.builds(
            lambda schema: {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}},
            schemas,
        ),
    ),
    "guided_regex": words,
}
chats = st.fixed_dictionaries(
    {"model": st.sampled_from(["arith", ADAPTER]), "messages": st.lists(messages, min_size=1)},
    optional={
        **numbers_in_range,
        "logprobs": st.just(True),  # noqa: FBT003
        "top_logprobs": st.integers(0, 3),
        "tools": st.lists(tools, min_size=1, max_size=2),
        "tool_choice": st.sampled_from(["none", "auto", "required"]),
    },
)
completions = st.fixed_dictionaries(
    {
        "model": st.sampled_from(["arith", TINKER]),
        "prompt": st.one_of(
            words,
            st.lists(words, max_size=3),
            st.lists(st.integers(0, 400), max_size=9),
            st.lists(st.lists(st.integers(0, 400), max_size=9), max_size=3),
        ),
    },
    optional={**numbers_in_range, "logprobs": st.integers(0, 3)},
)


@st.composite
def changed(draw, bodies):
    """One of `bodies` with something else at one of its places, however deep."""
    values = at = draw(bodies)
    while True:
        keys = list(at) if isinstance(at, dict) else list(range(len(at)))
        if not keys:
            return values
        key = draw(st.sampled_from(keys))
        if not isinstance(at[key], dict | list) or draw(st.booleans()):
            at[key] = draw(anything)
            return values
        at = at[key]


def called_with(arguments):
    """A chat with a call that has these arguments."""
    call = {"function": {"name": "f", "arguments": arguments}}
    return {"model": "arith", "messages": [{"role": "assistant", "tool_calls": [call]}]}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    model = bpe_model(tmp_path_factory.mktemp("model") / "bpe", template=TOOLED)
    with openai_world(tmp_path_factory.mktemp("state"), model) as running:
        running.speaker.script = lambda prompt, index: [40 + index, 50, 2]
        yield running


@pytest.fixture(scope="module")
def http(world):
    headers = {"authorization": "Bearer key-p", "content-type": "application/json"}
    with httpx.Client(base_url=world.url, headers=headers, timeout=60) as client:
        yield client


def check(answer):
    assert answer.status_code in DOCUMENTED, (answer.status_code, answer.text)
    if answer.status_code != 200:
        error = answer.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["message"]
        assert answer.status_code not in {429, 503} or int(answer.headers["retry-after"]) > 0


def sent(http, path, body):
    # Also what no strict reader takes for JSON: NaN, halves of characters.
    return http.post(path, content=json.dumps(body).encode(errors="replace"))


@settings(max_examples=150, deadline=None)
@given(body=st.one_of(chats, changed(chats)))
@example(body=called_with('"\\ud800"'))
@example(body=called_with("[" * 5000))
@example(body=called_with("1e999"))
def test_a_chat_with_anything_in_it(http, body):
    check(sent(http, "/v1/chat/completions", body))


@settings(max_examples=100, deadline=None)
@given(body=st.one_of(completions, changed(completions)))
def test_a_completion_with_anything_in_it(http, body):
    check(sent(http, "/v1/completions", body))


@settings(max_examples=60, deadline=None)
@given(body=anything, path=st.sampled_from(["/v1/completions", "/v1/chat/completions"]))
def test_any_json_at_all(http, path, body):
    check(sent(http, path, body))


@settings(max_examples=30, deadline=None)
@given(body=st.binary(max_size=200))
def test_any_bytes_at_all(http, body):
    check(http.post("/v1/chat/completions", content=body))


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(["models", "turns"]),
    name=st.one_of(
        st.text(),
        st.sampled_from([ADAPTER, TINKER, f"{ADAPTER}/versions/-1", f"{ADAPTER}/versions/{9**30}"]),
        st.from_regex(r"projects/[pq]/adapters/[a-z/.0-9]*", fullmatch=True),
    ),
)
def test_any_name_at_all(world, kind, name):
    url = httpx.URL(f"{world.url}/v1/{kind}/").copy_with(
        raw_path=f"/v1/{kind}/".encode() + quoted(name)
    )
    answer = httpx.get(url, headers={"x-api-key": "key-p"})
    if answer.status_code == 404 and not answer.text.startswith("{"):
        return  # A name with a slash is no turn's: there is no such route.
    if answer.status_code in {200, 307}:
        assert kind == "models"
        return
    check(answer)


def quoted(name):
    return b"".join(b"%%%02x" % byte for byte in name.encode(errors="replace"))
