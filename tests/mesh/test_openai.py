"""Agents roll out against a policy in training over OpenAI's wire; what they drew is trained on."""

from __future__ import annotations

import json
import re
from pathlib import Path

import httpx
import numpy as np
import openai
import pytest
import pytest_asyncio
from starlette.applications import Starlette

from rollmesh import types
from rollmesh.errors import NotFound
from rollmesh.tokenizer import load_tokenizer
from services.gateway.openai.config import OpenAiConfig
from services.gateway.openai.routes import routes
from tests.fakes.openai_world import served

pytestmark = pytest.mark.asyncio(loop_scope="session")
MODEL = Path(__file__).resolve().parents[2] / "models" / "arith"
PROJECT = "projects/openai"
ADAPTER = f"{PROJECT}/adapters/agent"
CHAT = [{"role": "user", "content": "37+58"}]
ADAM = types.AdamConfig(learning_rate=1e-2)


async def _project_of(request):
    return PROJECT


async def _no_checkpoints(project, path):
    raise NotFound(f"there is no {path}", field="model")


@pytest_asyncio.fixture(loop_scope="session")
async def url(client):
    mounted = routes(
        OpenAiConfig(),
        client,
        records=client.records,
        project_of=_project_of,
        policy_of=_no_checkpoints,
        load_tokenizer=lambda name: load_tokenizer(str(MODEL)),
    )
    async with served(Starlette(routes=mounted)) as url:
        yield url


@pytest_asyncio.fixture(loop_scope="session")
async def agent(url):
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="any", timeout=120) as connected:
        yield connected


async def turn_of(url, response_id):
    async with httpx.AsyncClient(base_url=url) as http:
        answer = await http.get(f"/v1/turns/{response_id}")
    assert answer.status_code == 200, answer.text
    return answer.json()


def data_of(turn, advantages):
    """What a trainer makes of a turn, and of nothing else."""
    prompt, data = turn["prompt_token_ids"], []
    for choice, advantage in zip(turn["choices"], advantages, strict=True):
        tokens = np.asarray(prompt + choice["token_ids"], np.int32)

        def targets(values, choice=choice):
            drawn = np.broadcast_to(np.float32(values), len(choice["token_ids"]))
            return np.concatenate([np.zeros(len(prompt) - 1, np.float32), drawn])

        data.append(
            types.Datum(
                tokens[:-1],
                tokens[1:],
                weights=targets(1.0),
                sampling_logprobs=np.minimum(targets(choice["logprobs"]), 0.0),
                advantages=targets(advantage),
            )
        )
    return data


async def test_what_an_agent_drew_is_trained_on_without_being_rendered_again(client, agent, url):
    await client.adapters.create(ADAPTER, "arith", types.LoraConfig(rank=4))
    sequence, digests = 1, []
    for version in range(2):
        await client.adapters.publish(ADAPTER)
        answer = await agent.chat.completions.create(
            model=ADAPTER, messages=CHAT, n=4, seed=version
        )
        turn = await turn_of(url, answer.id)
        tokenizer = load_tokenizer(str(MODEL))
        assert turn["model"] == answer.model == f"{ADAPTER}/versions/{version}"
        assert turn["prompt_token_ids"] == tokenizer.render(CHAT)
        assert [tokenizer.decode(choice["token_ids"]) for choice in turn["choices"]] == [
            choice.message.content for choice in answer.choices
        ]
        for choice in turn["choices"]:
            (span,) = choice["spans"]
            assert (span["policy_version"], span["num_tokens"]) == (
                version,
                len(choice["token_ids"]),
            )
            digests.append(span["digest"])
        result = await client.training.forward_backward(
            ADAPTER,
            sequence,
            data_of(turn, [1.0, -1.0, 1.0, -1.0]),
            types.LossConfig("importance_sampling"),
        )
        # The trainer finds for the same tokens what the sampler said: they are the tokens.
        for choice, logprobs in zip(turn["choices"], result.logprobs, strict=True):
            drawn = logprobs[len(turn["prompt_token_ids"]) - 1 :]
            assert drawn == pytest.approx(np.float32(choice["logprobs"]), abs=1e-4)
        await client.training.optim_step(ADAPTER, sequence + 1, ADAM)
        sequence += 2
    assert len(set(digests)) == 2
    await client.adapters.delete(ADAPTER)


async def test_the_same_seed_says_the_same_in_a_stream(agent):
    arguments = {"model": "arith", "messages": CHAT, "seed": 5, "temperature": 1.0, "n": 3}
    whole = await agent.chat.completions.create(**arguments)
    texts = ["", "", ""]
    async for chunk in await agent.chat.completions.create(**arguments, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == [choice.message.content for choice in whole.choices]


async def test_what_is_drawn_is_as_the_engine_is_told_to_draw_it(agent):
    two = await agent.completions.create(
        model="arith", prompt="1+1=", n=4, extra_body={"guided_regex": "[0-9]{2}"}
    )
    assert all(re.fullmatch("[0-9]{2}", choice.text) for choice in two.choices)
    schema = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"enum": [7, 12]}}}
    number = await agent.chat.completions.create(
        model="arith", messages=CHAT, response_format=schema
    )
    assert json.loads(number.choices[0].message.content) in {7, 12}
    greedy = await agent.chat.completions.create(model="arith", messages=CHAT, temperature=0)
    text = greedy.choices[0].message.content
    stopped = await agent.chat.completions.create(
        model="arith", messages=CHAT, temperature=0, stop=text[-1]
    )
    assert stopped.choices[0].message.content == text[: text.index(text[-1])]
    assert stopped.choices[0].finish_reason == "stop"


async def test_tools_are_refused_where_the_template_knows_none(agent):
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    with pytest.raises(openai.BadRequestError, match="knows no tools"):
        await agent.chat.completions.create(model="arith", messages=CHAT, tools=[tool])
