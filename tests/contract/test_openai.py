"""OpenAI's endpoints as the unmodified `openai` package and plain HTTP see them."""

from __future__ import annotations

import asyncio
import json
import re

import httpx
import openai
import pytest

from rollmesh.errors import FailedPrecondition
from rollmesh.types import LoraConfig
from tests.fakes.mesh import BASE_MODEL, digest_of
from tests.fakes.openai_world import (
    ADAPTER,
    FOREIGN,
    TINKER,
    UNPUBLISHED,
    openai_world,
)
from tests.fakes.tokenizers import TOOLED, bpe_model
from tests.fakes.training import ADAM, DATUM, LOSS

CHAT = [{"role": "user", "content": "2+2"}]
ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds.",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
        },
    },
}
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 2, "b": 2}}\n</tool_call>'


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return bpe_model(tmp_path_factory.mktemp("model") / "bpe", template=TOOLED)


@pytest.fixture(scope="module")
def shared(tmp_path_factory, model_folder):
    with openai_world(tmp_path_factory.mktemp("state"), model_folder) as world:
        yield world


@pytest.fixture
def world(shared):
    shared.speaker.drawn.clear()
    shared.speaker.say("four")
    yield shared
    shared.speaker.hold_after = shared.speaker.failure = None
    shared.now(shared.speaker.sampling.set)


@pytest.fixture
def client(world):
    with openai.OpenAI(base_url=f"{world.url}/v1", api_key="key-p", max_retries=0) as client:
        yield client


@pytest.fixture
def http(world):
    headers = {"authorization": "Bearer key-p"}
    with httpx.Client(base_url=world.url, headers=headers, timeout=60) as client:
        yield client


def turn_of(http, response_id):
    answer = http.get(f"/v1/turns/{response_id}")
    assert answer.status_code == 200, answer.text
    return answer.json()


class TestModels:
    def test_a_list_has_base_models_and_the_published_adapters_of_the_project(self, client):
        assert [model.id for model in client.models.list()] == ["arith", ADAPTER]

    @pytest.mark.parametrize(
        ("name", "means", "version"),
        [
            ("arith", "arith", None),
            (ADAPTER, f"{ADAPTER}/versions/0", 0),
            (f"{ADAPTER}/versions/0", f"{ADAPTER}/versions/0", 0),
            (TINKER, TINKER, 0),
        ],
    )
    def test_each_kind_of_name_is_found_and_sampled(self, client, world, name, means, version):
        found = client.models.retrieve(name)
        assert (found.id, found.policy_version) == (means, version)
        answer = client.chat.completions.create(model=name, messages=CHAT)
        assert (answer.model, answer.choices[0].message.content) == (means, "four")
        source = world.speaker.drawn[-1].source
        assert (source and (source.adapter, source.policy_version)) == (
            None if version is None else (ADAPTER, version)
        )

    @pytest.mark.parametrize(
        "name",
        [
            "nobody",
            "../../etc/passwd",
            FOREIGN,
            f"{FOREIGN}/versions/0",
            "projects/p/adapters/none",
            UNPUBLISHED,
            f"{ADAPTER}/versions/99",
            "tinker://other/sampler_weights/one",
        ],
    )
    def test_what_the_project_does_not_have_is_not_found(self, client, name):
        with pytest.raises(openai.NotFoundError) as refusal:
            client.chat.completions.create(model=name, messages=CHAT)
        assert (refusal.value.code, refusal.value.param) == ("model_not_found", "model")

    @pytest.mark.parametrize("name", [FOREIGN, f"{FOREIGN}/versions/0", TINKER])
    def test_of_what_is_anothers_nothing_is_told(self, world, name):
        key = "key-p" if name.startswith(FOREIGN) else "key-q"
        with (
            openai.OpenAI(base_url=f"{world.url}/v1", api_key=key) as stranger,
            pytest.raises(openai.NotFoundError) as refusal,
        ):
            stranger.models.retrieve(name)
        assert refusal.value.code == "model_not_found"

    def test_the_newest_version_is_the_newest_when_it_is_asked_for(self, client, world):
        name = "projects/p/adapters/grows"

        async def publish():
            held = await world.client.adapters.get(name)
            await world.client.training.forward_backward(name, held.next_sequence, [DATUM], LOSS)
            await world.client.training.optim_step(name, held.next_sequence + 1, ADAM)
            return (await world.client.adapters.publish(name)).policy_version

        world.call(world.client.adapters.create(name, "arith", LoraConfig(rank=4)))
        try:
            for _ in range(2):
                version = world.call(publish())
                answer = client.chat.completions.create(
                    model=name, messages=CHAT, extra_body={"return_token_ids": True}
                )
                assert answer.model == f"{name}/versions/{version}"
                (span,) = answer.choices[0].spans
                assert span["policy_version"] == version
                assert span["digest"] == digest_of(name, version)
        finally:
            world.call(world.client.adapters.delete(name))


class TestChat:
    def test_an_answer_has_its_text_and_what_it_cost(self, client, world):
        answer = client.chat.completions.create(model="arith", messages=CHAT)
        (choice,) = answer.choices
        assert (choice.message.role, choice.message.content) == ("assistant", "four")
        assert (choice.finish_reason, choice.logprobs) == ("stop", None)
        (drawn,) = world.speaker.drawn
        assert list(drawn.prompt) == world.speaker.tokenizer.render(CHAT)
        assert answer.usage.prompt_tokens == len(drawn.prompt)
        assert answer.usage.completion_tokens == len(drawn.token_ids[0])

    def test_every_parameter_reaches_the_sampler(self, client, world):
        client.chat.completions.create(
            model="arith",
            messages=CHAT,
            n=2,
            max_completion_tokens=40,
            temperature=0.5,
            top_p=0.9,
            seed=7,
            stop=["!", "?"],
            logit_bias={"5": -3},
            response_format={
                "type": "json_schema",
                "json_schema": {"name": "s", "schema": {"type": "integer"}},
            },
            extra_body={
                "top_k": 9,
                "min_p": 0.25,
                "stop_token_ids": [3],
                "ignore_eos": True,
                "logprobs_kind": "sampled",
            },
        )
        params = world.speaker.drawn[-1].params
        assert (params.max_tokens, params.temperature, params.top_p) == (40, 0.5, 0.9)
        assert (params.top_k, params.min_p, params.seed) == (9, 0.25, 7)
        assert (params.stop, params.stop_token_ids, params.ignore_eos) == (("!", "?"), (3,), True)
        assert params.logit_bias == ((5, -3.0),)
        assert json.loads(params.json_schema) == {"type": "integer"}
        assert params.logprobs_kind == "sampled"

    @pytest.mark.parametrize(
        ("body", "kind", "constraint"),
        [
            ({"response_format": {"type": "json_object"}}, "json_schema", '{"type":"object"}'),
            ({"guided_regex": "a|b"}, "regex", "a|b"),
            ({"structured_outputs": {"regex": "a+"}}, "regex", "a+"),
            ({"structured_outputs": {"json": {"const": 1}}}, "json_schema", '{"const": 1}'),
            ({"guided_json": '{"const": 1}'}, "json_schema", '{"const": 1}'),
            ({"response_format": {"type": "text"}}, "regex", None),
        ],
    )
    def test_each_way_to_constrain_the_text_is_the_samplers(
        self, client, world, body, kind, constraint
    ):
        client.chat.completions.create(model="arith", messages=CHAT, extra_body=body)
        assert getattr(world.speaker.drawn[-1].params, kind) == constraint

    def test_choices_come_in_order_and_each_with_its_own(self, client, world):
        world.speaker.say("one", "two", "three")
        answer = client.chat.completions.create(model="arith", messages=CHAT, n=3)
        assert [each.message.content for each in answer.choices] == ["one", "two", "three"]

    def test_a_stream_says_the_same_as_a_whole_answer(self, client, world):
        world.speaker.say("Größe 🙂 one", "the quick brown")
        whole = client.chat.completions.create(model="arith", messages=CHAT, n=2)
        texts, reasons, usage = ["", ""], ["", ""], None
        with client.chat.completions.create(
            model="arith",
            messages=CHAT,
            n=2,
            stream=True,
            stream_options={"include_usage": True},
        ) as stream:
            for chunk in stream:
                usage = chunk.usage or usage
                for choice in chunk.choices:
                    texts[choice.index] += choice.delta.content or ""
                    reasons[choice.index] += choice.finish_reason or ""
        assert texts == [each.message.content for each in whole.choices]
        assert texts == ["Größe 🙂 one", "the quick brown"]
        assert reasons == ["stop", "stop"]
        assert usage == whole.usage

    def test_a_stream_ends_with_done(self, http):
        body = {"model": "arith", "messages": CHAT, "stream": True}
        answer = http.post("/v1/chat/completions", json=body)
        assert answer.headers["content-type"].startswith("text/event-stream")
        events = answer.text.split("\n\n")
        assert events[-2:] == ["data: [DONE]", ""]
        first = json.loads(events[0].removeprefix("data: "))
        assert first["choices"][0]["delta"]["role"] == "assistant"
        assert "usage" not in first

    @pytest.mark.parametrize("stream", [False, True])
    @pytest.mark.parametrize(
        ("extra", "text"),
        [({}, "the quick "), ({"include_stop_str_in_output": True}, "the quick brown")],
    )
    def test_text_ends_before_what_stopped_it(self, client, world, stream, extra, text):
        world.speaker.say("the quick brown assistant")
        answer = client.chat.completions.create(
            model="arith", messages=CHAT, stop="brown", stream=stream, extra_body=extra
        )
        if stream:
            chunks = [chunk.choices[0] for chunk in answer]
            assert "".join(chunk.delta.content or "" for chunk in chunks) == text
            assert chunks[-1].finish_reason == "stop"
        else:
            assert answer.choices[0].message.content == text
            assert answer.choices[0].finish_reason == "stop"

    def test_the_reason_is_length_where_the_length_ended_it(self, client, world):
        world.speaker.say("the quick brown assistant")
        answer = client.chat.completions.create(model="arith", messages=CHAT, max_tokens=2)
        assert answer.choices[0].finish_reason == "length"
        assert answer.usage.completion_tokens == 2

    @pytest.mark.parametrize("stream", [False, True])
    def test_log_probabilities_are_those_of_the_tokens(self, client, world, stream):
        answer = client.chat.completions.create(
            model="arith", messages=CHAT, logprobs=True, stream=stream
        )
        if stream:
            entries = [
                entry
                for chunk in answer
                for choice in chunk.choices
                if choice.logprobs
                for entry in choice.logprobs.content
            ]
        else:
            entries = answer.choices[0].logprobs.content
        (drawn,) = world.speaker.drawn
        decode = world.speaker.tokenizer.decode
        assert [entry.logprob for entry in entries] == drawn.logprobs[0]
        assert [entry.token for entry in entries] == [
            decode([token_id], skip_special_tokens=False) for token_id in drawn.token_ids[0]
        ]
        assert entries[0].bytes == list(entries[0].token.encode())

    @pytest.mark.parametrize("stream", [False, True])
    @pytest.mark.parametrize("count", [1, 2, 3])
    def test_the_likeliest_tokens_come_with_each_that_was_drawn(self, client, world, stream, count):
        extra = {"return_tokens_as_token_ids": True}
        answer = client.chat.completions.create(
            model="arith",
            messages=CHAT,
            logprobs=True,
            top_logprobs=count,
            stream=stream,
            extra_body=extra,
        )
        answers = list(answer) if stream else [answer]
        entries = [entry for each in answers for entry in each.choices[0].logprobs.content]
        likely = [("token_id:40", -0.25), ("token_id:41", -2.0)][:count]
        for entry in entries:
            assert [(each.token, each.logprob) for each in entry.top_logprobs] == likely
        answer = client.completions.create(
            model="arith", prompt="a", logprobs=count, stream=stream, extra_body=extra
        )
        drawn = world.speaker.drawn[-1]
        rows = [
            row
            for each in (answer if stream else [answer])
            for row in each.choices[0].logprobs.top_logprobs
        ]
        assert rows == [
            {**dict(likely), f"token_id:{token_id}": logprob}
            for token_id, logprob in zip(drawn.token_ids[0], drawn.logprobs[0], strict=True)
        ]

    def test_tokens_are_told_by_id_to_who_wants_that(self, client, world):
        answer = client.chat.completions.create(
            model="arith",
            messages=CHAT,
            logprobs=True,
            extra_body={"return_tokens_as_token_ids": True},
        )
        tokens = [entry.token for entry in answer.choices[0].logprobs.content]
        assert tokens == [f"token_id:{each}" for each in world.speaker.drawn[0].token_ids[0]]

    def test_what_clients_dump_of_an_answer_can_be_sent_back(self, client, world):
        world.speaker.say(f"let me see\n{CALL}")
        first = client.chat.completions.create(model="arith", messages=CHAT, tools=[ADD])
        message = first.choices[0].message
        call = message.tool_calls[0]
        chat = [
            {"role": "developer", "content": [{"type": "text", "text": "be brief"}]},
            *CHAT,
            message.model_dump(),
            {"role": "tool", "tool_call_id": call.id, "content": "4"},
        ]
        world.speaker.say("four")
        client.chat.completions.create(model="arith", messages=chat, tools=[ADD])
        prompt = world.speaker.tokenizer.decode(
            world.speaker.drawn[-1].prompt, skip_special_tokens=False
        )
        assert "<|im_start|>system\nbe brief<|im_end|>" in prompt
        assert '{"name": "add", "arguments": {"a": 2, "b": 2}}' in prompt
        assert "<tool_response>4</tool_response>" in prompt

    async def test_the_async_client_gets_the_same(self, world):
        async with openai.AsyncOpenAI(base_url=f"{world.url}/v1", api_key="key-p") as client:
            whole = await client.chat.completions.create(model="arith", messages=CHAT)
            assert whole.choices[0].message.content == "four"
            stream = await client.chat.completions.create(model="arith", messages=CHAT, stream=True)
            texts = [chunk.choices[0].delta.content or "" async for chunk in stream]
            assert "".join(texts) == "four"

    async def test_many_at_once_get_each_their_own(self, world):
        world.speaker.script = lambda prompt, index: prompt[-9:]
        async with openai.AsyncOpenAI(base_url=f"{world.url}/v1", api_key="key-p") as client:
            prompts = [[n + 10] * 9 for n in range(24)]
            answers = await asyncio.gather(
                *(
                    client.completions.create(
                        model="arith", prompt=prompt, extra_body={"return_token_ids": True}
                    )
                    for prompt in prompts
                )
            )
        assert [answer.choices[0].token_ids for answer in answers] == prompts


class TestTools:
    @pytest.mark.parametrize("stream", [False, True])
    @pytest.mark.parametrize(
        ("said", "content", "num_calls"),
        [
            (CALL, None, 1),
            (f"let me see\n{CALL}", "let me see", 1),
            (f"{CALL}\n{CALL}", None, 2),
            ("no tools needed", "no tools needed", 0),
            ("<tool_call>nothing</tool_call>", "<tool_call>nothing</tool_call>", 0),
            (CALL.removesuffix("</tool_call>"), None, 1),
        ],
    )
    def test_calls_are_told_apart_from_text(self, client, world, stream, said, content, num_calls):
        world.speaker.say(said)
        answer = client.chat.completions.create(
            model="arith", messages=CHAT, tools=[ADD], stream=stream
        )
        if stream:
            text, calls, reason = gathered(answer)
        else:
            (choice,) = answer.choices
            text, reason = choice.message.content, choice.finish_reason
            calls = [
                (call.id, call.function.name, call.function.arguments)
                for call in choice.message.tool_calls or []
            ]
        assert (text or None) == content
        assert [call[1:] for call in calls] == [("add", '{"a": 2, "b": 2}')] * num_calls
        assert len({call[0] for call in calls}) == num_calls
        assert reason == ("tool_calls" if num_calls else "stop")

    def test_the_model_is_told_of_tools_unless_it_may_not_call_any(self, client, world):
        for choice, told in (("auto", True), ("none", False)):
            world.speaker.say(CALL)
            answer = client.chat.completions.create(
                model="arith", messages=CHAT, tools=[ADD], tool_choice=choice
            )
            prompt = world.speaker.drawn[-1].prompt
            tools = [{"type": "function", "function": ADD["function"]}]
            expected = world.speaker.tokenizer.render(CHAT, tools if told else None)
            assert list(prompt) == expected
            assert bool(answer.choices[0].message.tool_calls) == told

    @pytest.mark.parametrize(
        ("choice", "reason"),
        [
            ("required", "tool_calls"),
            ({"type": "function", "function": {"name": "add"}}, "stop"),
        ],
    )
    @pytest.mark.parametrize("stream", [False, True])
    def test_a_call_that_is_required_is_drawn_by_its_schema(
        self, client, world, choice, reason, stream
    ):
        world.speaker.say('{"name": "add", "arguments": {"a": 1}}')
        answer = client.chat.completions.create(
            model="arith", messages=CHAT, tools=[ADD], tool_choice=choice, stream=stream
        )
        if stream:
            _, calls, told = gathered(answer)
            assert (calls[0][1:], told) == (("add", '{"a": 1}'), reason)
        else:
            (call,) = answer.choices[0].message.tool_calls
            assert (call.function.name, call.function.arguments) == ("add", '{"a": 1}')
            assert answer.choices[0].finish_reason == reason
        schema = json.loads(world.speaker.drawn[-1].params.json_schema)
        assert schema["properties"]["name"] == {"const": "add"}
        assert schema["properties"]["arguments"] == ADD["function"]["parameters"]

    @pytest.mark.parametrize("stream", [False, True])
    def test_one_call_alone_is_told_where_only_one_is_wanted(self, client, world, stream):
        world.speaker.say(f"{CALL}{CALL}")
        answer = client.chat.completions.create(
            model="arith", messages=CHAT, tools=[ADD], parallel_tool_calls=False, stream=stream
        )
        calls = gathered(answer)[1] if stream else answer.choices[0].message.tool_calls
        assert len(calls) == 1


def gathered(stream):
    """Text, calls and reason of a stream with one choice."""
    text, calls, reason = "", {}, None
    for chunk in stream:
        (choice,) = chunk.choices
        text += choice.delta.content or ""
        reason = choice.finish_reason or reason
        for call in choice.delta.tool_calls or []:
            assert call.index not in calls
            calls[call.index] = (call.id, call.function.name, call.function.arguments)
    assert list(calls) == list(range(len(calls)))
    return text, list(calls.values()), reason


class TestCompletions:
    def test_prompts_of_every_kind_are_answered_in_order(self, client, world):
        encode = world.speaker.tokenizer.encode
        tokens = [5, 6, 7]
        for prompt, expected in (
            ("2+2", [encode("2+2")]),
            (tokens, [tokens]),
            (["a", "b"], [encode("a"), encode("b")]),
            ([tokens, [8]], [tokens, [8]]),
        ):
            world.speaker.drawn.clear()
            world.speaker.script = lambda prompt, index: [prompt[0], 40 + index]
            answer = client.completions.create(
                model="arith", prompt=prompt, n=2, extra_body={"return_token_ids": True}
            )
            assert [each.index for each in answer.choices] == list(range(2 * len(expected)))
            assert [each.prompt_token_ids for each in answer.choices] == [
                one for one in expected for _ in range(2)
            ]
            assert [each.token_ids for each in answer.choices] == [
                [one[0], 40 + index] for one in expected for index in range(2)
            ]
            assert answer.usage.prompt_tokens == sum(map(len, expected))

    def test_a_stream_says_the_same_as_a_whole_answer(self, client, world):
        world.speaker.say("the quick", "brown 🙂")
        arguments = {"model": "arith", "prompt": ["a", "b"], "n": 2, "logprobs": 0}
        whole = client.completions.create(**arguments)
        texts = [""] * 4
        offsets = [[] for _ in range(4)]
        for chunk in client.completions.create(**arguments, stream=True):
            for choice in chunk.choices:
                texts[choice.index] += choice.text
                offsets[choice.index] += choice.logprobs.text_offset if choice.logprobs else []
        assert texts == [choice.text for choice in whole.choices]
        assert texts == ["the quick", "brown 🙂"] * 2
        assert offsets == [choice.logprobs.text_offset for choice in whole.choices]
        assert whole.choices[0].logprobs.token_logprobs == world.speaker.drawn[0].logprobs[0]

    def test_what_is_not_asked_for_is_sixteen_tokens(self, client, world):
        client.completions.create(model="arith", prompt="a")
        assert world.speaker.drawn[-1].params.max_tokens == 16


class TestTurns:
    @pytest.mark.parametrize("stream", [False, True])
    def test_a_turn_has_the_tokens_that_were_drawn(self, client, world, http, stream):
        world.speaker.say("four", "five")
        answer = client.chat.completions.create(model=ADAPTER, messages=CHAT, n=2, stream=stream)
        response_id = [chunk.id for chunk in answer][-1] if stream else answer.id
        turn = turn_of(http, response_id)
        (drawn,) = world.speaker.drawn
        assert (turn["id"], turn["model"]) == (response_id, f"{ADAPTER}/versions/0")
        assert turn["prompt_token_ids"] == list(drawn.prompt)
        for index, choice in enumerate(turn["choices"]):
            assert choice["token_ids"] == drawn.token_ids[index]
            assert choice["logprobs"] == drawn.logprobs[index]
            assert choice["spans"] == [
                {
                    "num_tokens": len(drawn.token_ids[index]),
                    "policy_version": 0,
                    "digest": digest_of(ADAPTER, 0),
                }
            ]
        assert turn["logprobs_kind"] == "policy"

    def test_a_turn_of_several_prompts_has_each_with_its_own(self, client, world, http):
        answer = client.completions.create(model="arith", prompt=[[5, 6], [7]])
        turn = turn_of(http, answer.id)
        assert [each["prompt_token_ids"] for each in turn["choices"]] == [[5, 6], [7]]

    def test_an_answer_and_a_stream_can_have_them_too(self, client, world):
        body = {"return_token_ids": True}
        whole = client.chat.completions.create(model="arith", messages=CHAT, extra_body=body)
        drawn = world.speaker.drawn[-1]
        assert whole.prompt_token_ids == list(drawn.prompt)
        assert whole.choices[0].token_ids == drawn.token_ids[0]
        assert whole.choices[0].token_logprobs == drawn.logprobs[0]
        assert whole.choices[0].spans == [
            {"num_tokens": len(drawn.token_ids[0]), "policy_version": -1, "digest": ""}
        ]
        chunks = list(
            client.chat.completions.create(
                model="arith", messages=CHAT, extra_body=body, stream=True
            )
        )
        assert chunks[0].prompt_token_ids == list(drawn.prompt)
        token_ids = [token for chunk in chunks for token in chunk.choices[0].token_ids]
        assert token_ids == drawn.token_ids[0]

    @pytest.mark.long
    def test_a_turn_larger_than_a_record_is_kept_whole(self, client, world, http):
        words = [5 + n % 300 for n in range(1500)]
        world.speaker.script = lambda prompt, index: words
        answer = client.chat.completions.create(model="arith", messages=CHAT, n=20)
        raw = http.get(f"/v1/turns/{answer.id}")
        assert len(raw.content) > 256 * 1024
        assert [each["token_ids"] for each in raw.json()["choices"]] == [words] * 20

    @pytest.mark.parametrize("name", ["chatcmpl-" + "0" * 32, "x", "../sessions/a", "a/1"])
    def test_a_turn_that_is_not_there_is_not_found(self, http, name):
        answer = http.get(f"/v1/turns/{name}")
        assert answer.status_code == 404

    def test_another_project_does_not_find_it(self, client, world, http):
        answer = client.chat.completions.create(model="arith", messages=CHAT)
        other = http.get(f"/v1/turns/{answer.id}", headers={"authorization": "Bearer key-q"})
        assert (other.status_code, other.json()["error"]["code"]) == (404, "turn_not_found")


class TestRefusals:
    @pytest.mark.parametrize("headers", [{}, {"authorization": "Bearer nobody"}])
    @pytest.mark.parametrize(
        ("method", "path"),
        [
            ("GET", "/v1/models"),
            ("GET", "/v1/models/arith"),
            ("POST", "/v1/completions"),
            ("POST", "/v1/chat/completions"),
            ("GET", "/v1/turns/x"),
        ],
    )
    def test_nobody_gets_in_without_a_key(self, world, headers, method, path):
        answer = httpx.request(method, world.url + path, headers=headers)
        assert answer.status_code == 401
        assert answer.json()["error"]["code"] == "invalid_api_key"

    def test_a_key_may_come_in_its_own_header(self, world):
        answer = httpx.get(f"{world.url}/v1/models", headers={"x-api-key": "key-q"})
        assert [each["id"] for each in answer.json()["data"]] == ["arith", FOREIGN]

    @pytest.mark.parametrize(
        ("changes", "param"),
        [
            ({"messages": []}, "messages"),
            ({"messages": [{"role": "nobody", "content": ""}]}, "messages[0].role"),
            (
                {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
                "messages[0].content",
            ),
            ({"messages": [{"role": "user", "contents": "x"}]}, "messages[0].contents"),
            ({"model": None}, "model"),
            ({"n": 0}, "n"),
            ({"n": 129}, "n"),
            ({"n": True}, "n"),
            ({"temperature": 3}, "temperature"),
            ({"temperature": "hot"}, "temperature"),
            ({"top_p": 0}, "top_p"),
            ({"min_p": 1}, "min_p"),
            ({"max_tokens": 0}, "max_tokens"),
            ({"seed": 2**63}, "seed"),
            ({"stop": ["x"] * 17}, "stop"),
            ({"stop": [""]}, "stop[0]"),
            ({"logit_bias": {"x": 1}}, "logit_bias"),
            ({"logit_bias": {"5": 101}}, "logit_bias[5]"),
            ({"logit_bias": {"400": 1}}, "logit_bias[400]"),
            ({"echo": True}, "echo"),
            ({"frequency_penalty": 0.5}, "frequency_penalty"),
            ({"best_of": 2}, "best_of"),
            ({"top_logprobs": 2}, "top_logprobs"),
            ({"tool_choice": "required"}, "tool_choice"),
            ({"nonsense": 1}, "nonsense"),
            ({"guided_regex": "a{9999}"}, "structured_outputs"),
            ({"guided_regex": "a", "guided_json": {}}, "guided_json"),
            ({"response_format": {"type": "json_schema"}}, "response_format"),
            ({"messages": [{"role": "user", "content": "x" * 5000}]}, "messages"),
        ],
    )
    @pytest.mark.parametrize("stream", [False, True])
    def test_a_wrong_body_is_refused_by_the_name_of_what_is_wrong(
        self, http, changes, param, stream
    ):
        body = {"model": "arith", "messages": CHAT, "stream": stream, **changes}
        answer = http.post("/v1/chat/completions", json=body)
        assert answer.status_code == 400, answer.text
        error = answer.json()["error"]
        assert error["type"] == "invalid_request_error"
        assert error["param"] == param
        assert param.partition("[")[0] in error["message"]

    @pytest.mark.parametrize(
        "prompt", [[], "", [[]], [""], [-1], [2**31], [1.5], [True], [1, "a"], {}, [400], 7]
    )
    def test_a_wrong_prompt_is_refused(self, http, prompt):
        answer = http.post("/v1/completions", json={"model": "arith", "prompt": prompt})
        assert answer.status_code == 400
        assert answer.json()["error"]["param"].startswith("prompt")

    def test_a_prompt_that_leaves_no_room_is_told_as_openai_tells_it(self, client):
        with pytest.raises(openai.BadRequestError) as refusal:
            client.completions.create(model="arith", prompt=[5] * 3000)
        assert refusal.value.code == "context_length_exceeded"
        assert refusal.value.param == "prompt"

    @pytest.mark.parametrize("body", [b"", b"{", b"[]", b"\xff", b'{"model": NaN}', b"[" * 9999])
    def test_what_is_no_json_object_is_refused(self, http, body):
        assert http.post("/v1/chat/completions", content=body).status_code == 400

    def test_a_body_beyond_the_bound_is_refused(self, http):
        body = b'{"model": "' + b"x" * 5 * 2**20
        answer = http.post("/v1/chat/completions", content=body)
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_large")

    @pytest.mark.parametrize("stream", [False, True])
    def test_a_mesh_without_samplers_is_unavailable_and_says_when_to_try_again(
        self, world, http, stream
    ):
        body = {"model": "arith", "messages": CHAT, "stream": stream}
        world.speaker.away = True
        try:
            world.call(world.until_serving(serving=False))
            answer = http.post("/v1/chat/completions", json=body)
        finally:
            world.speaker.away = False
            world.call(world.until_serving(serving=True))
        assert answer.status_code == 503
        assert int(answer.headers["retry-after"]) >= 1
        assert answer.json()["error"]["type"] == "server_error"


class TestOwnMistakes:
    def test_they_are_told_without_what_they_say(self, http, monkeypatch):
        def breaks(*arguments):
            raise RuntimeError("what nobody outside is to read")

        monkeypatch.setattr("services.gateway.openai.routes.params_of", breaks)
        body = {"model": BASE_MODEL, "messages": CHAT}
        answer = http.post("/v1/chat/completions", json=body)
        assert answer.status_code == 500
        error = answer.json()["error"]
        assert (error["type"], error["code"]) == ("server_error", "internal_error")
        assert "nobody" not in answer.text


class TestConfigured:
    def test_a_quota_that_is_used_up_is_told_with_when_to_try_again(self, tmp_path, model_folder):
        limits = {"projects": [{"id": "p", "tokens_per_day": 5}]}
        with openai_world(tmp_path, model_folder, coordinator=limits) as world:
            world.speaker.say("the quick brown assistant helps the user")
            with openai.OpenAI(
                base_url=f"{world.url}/v1", api_key="key-p", max_retries=0
            ) as client:
                client.completions.create(model="arith", prompt=[5] * 9)
                with pytest.raises(openai.RateLimitError) as refusal:
                    client.completions.create(model="arith", prompt=[5] * 9)
        assert refusal.value.code == "quota_exceeded"
        assert int(refusal.value.response.headers["retry-after"]) >= 1

    def test_a_gateway_may_keep_no_turns(self, tmp_path, model_folder):
        with openai_world(tmp_path, model_folder, keep_turns=False) as world:
            headers = {"authorization": "Bearer key-p"}
            with httpx.Client(base_url=world.url, headers=headers) as http:
                body = {"model": "arith", "messages": CHAT}
                answer = http.post("/v1/chat/completions", json=body).json()
                assert "turn_problem" not in answer
                turn = http.get(f"/v1/turns/{answer['id']}")
            records, _ = world.call(world.client.records.list("projects/p"))
        assert (turn.status_code, records) == (404, [])
        assert "keeps no turns" in turn.json()["error"]["message"]

    @pytest.mark.parametrize(
        ("config", "limits", "problem"),
        [
            ({"max_turn_bytes": 100}, {}, "more than 100"),
            ({}, {"max_records": 1}, "max_records|records"),
        ],
    )
    @pytest.mark.parametrize("stream", [False, True])
    def test_an_answer_says_so_where_its_turn_cannot_be_kept(
        self, tmp_path, model_folder, config, limits, problem, stream
    ):
        with openai_world(tmp_path, model_folder, coordinator=limits, **config) as world:
            world.call(world.client.records.put("projects/p", "x", b"{}"))
            world.speaker.say("four")
            with openai.OpenAI(base_url=f"{world.url}/v1", api_key="key-p") as client:
                answer = client.chat.completions.create(model="arith", messages=CHAT, stream=stream)
                told = list(answer)[-1] if stream else answer
        assert re.search(problem, told.turn_problem)

    def test_turns_go_when_their_time_is_over(self, tmp_path, model_folder):
        with openai_world(tmp_path, model_folder, turn_retention_s=60.0) as world:
            world.speaker.say("four")
            with openai.OpenAI(base_url=f"{world.url}/v1", api_key="key-p") as client:
                client.chat.completions.create(model="arith", messages=CHAT)
            (record,), _ = world.call(world.client.records.list("projects/p"))
        assert record.expire_time - record.create_time == pytest.approx(60.0, abs=1e-3)


class TestEndsEarly:
    @pytest.mark.parametrize("stream", [False, True])
    async def test_who_goes_away_frees_the_place(self, world, stream):
        world.speaker.hold_after = 1
        world.now(world.speaker.sampling.clear)
        aborted = world.speaker.num_aborted
        body = {"model": "arith", "messages": CHAT, "stream": stream}
        headers = {"authorization": "Bearer key-p"}
        async with httpx.AsyncClient(base_url=world.url, headers=headers) as client:
            asking = asyncio.create_task(client.post("/v1/chat/completions", json=body))
            await asyncio.to_thread(world.call, world.speaker.until_running(1))
            asking.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asking
        await asyncio.to_thread(world.call, world.speaker.until_running(0))
        assert world.speaker.num_aborted == aborted + 1

    def test_a_failure_in_a_stream_is_told_in_the_stream(self, world, client):
        world.speaker.hold_after = 2
        world.now(world.speaker.sampling.clear)
        world.speaker.say("the quick brown assistant")
        stream = client.chat.completions.create(model="arith", messages=CHAT, stream=True)
        next(iter(stream))
        world.speaker.failure = FailedPrecondition("it broke")
        world.now(world.speaker.sampling.set)
        with pytest.raises(openai.APIError, match="it broke"):
            list(stream)
