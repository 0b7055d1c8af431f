"""Text and calls piece by piece are what the whole would have been."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollmesh.chat import ToolCall
from rollmesh.chat_template import answer_of
from rollmesh.tokenizer import load_tokenizer
from rollmesh.types import CompletionChunk, PolicySpan
from services.gateway.openai.calls import CallReader, RequiredCallReader
from services.gateway.openai.choice import Choice
from services.gateway.openai.text import StopCutter, TextStream
from tests.fakes.tokenizers import TOOLED, bpe_model

ROOT = Path(__file__).resolve().parents[2]
CALL = '<tool_call>{"name": "f", "arguments": {"x": 1}}</tool_call>'


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "bpe"
    return load_tokenizer(str(bpe_model(folder, template=TOOLED)))


def pieces_of(text, cuts):
    places = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    return [text[begin:end] for begin, end in itertools.pairwise(places)]


@given(text=st.text())
def test_text_in_pieces_is_the_text(bpe, text):
    token_ids = bpe.encode(text)
    stream = TextStream(bpe, set(bpe.special))
    pieces = [stream.push([token_id]) for token_id in token_ids]
    assert "".join(pieces) + stream.rest() == bpe.decode(token_ids)
    assert not any(piece.endswith("\ufffd") for piece in pieces) or "\ufffd" in text


@given(token_ids=st.lists(st.integers(0, 390)))
def test_any_tokens_have_the_text_that_they_have_together(bpe, token_ids):
    stream = TextStream(bpe, set(bpe.special))
    pieces = "".join(stream.push([token_id]) for token_id in token_ids) + stream.rest()
    whole = bpe.decode(token_ids)
    # Bytes that are no text are told one by one or together: both are what they are.
    assert pieces.replace("\ufffd", "") == whole.replace("\ufffd", "")


def test_a_model_of_whole_characters_is_read_too():
    arith = load_tokenizer(str(ROOT / "models" / "arith"))
    stream = TextStream(arith, set(arith.special))
    assert [stream.push([each]) for each in arith.encode("12+3=")] == list("12+3=")


@given(
    text=st.text(alphabet="abc"),
    stops=st.lists(st.text(alphabet="abc", min_size=1, max_size=3), max_size=3),
    cuts=st.lists(st.integers(0, 20)),
    keep=st.booleans(),
)
def test_text_ends_at_the_first_stop_however_it_comes(text, stops, cuts, keep):
    cutter = StopCutter(stops, keep=keep)
    told = "".join(cutter.push(piece) for piece in pieces_of(text, cuts)) + cutter.rest()
    whole = [(at + len(stop), at) for stop in stops if (at := text.find(stop)) >= 0]
    end, at = min(whole, default=(len(text), len(text)))
    assert told == text[: end if keep else at]
    assert cutter.stopped == bool(whole)


def test_what_may_become_a_stop_is_not_told_before_it_is_clear():
    cutter = StopCutter(["END"], keep=False)
    assert [cutter.push(part) for part in ("a", "E", "N", "x", "EN")] == ["a", "", "", "ENx", ""]
    assert cutter.rest() == "EN"


parts = st.lists(
    st.sampled_from(
        [CALL, "<tool_call>no</tool_call>", "<tool", "_call>", "</tool_call>", "a", " ", "\n", "<"]
    )
)


def read(text, cuts):
    """Text and calls, as pieces between `cuts` have it."""
    reader = CallReader(lambda number: f"call_{number}")
    found = [part for piece in pieces_of(text, cuts) for part in reader.push(piece)]
    found += reader.rest()
    calls = [part for part in found if isinstance(part, ToolCall)]
    return "".join(part for part in found if isinstance(part, str)), calls


@given(parts=parts, cuts=st.lists(st.integers(0, 200)))
def test_calls_are_the_same_however_they_come(parts, cuts):
    text = "".join(parts)
    assert read(text, cuts) == read(text, [])


@given(parts=parts)
def test_calls_are_those_of_a_jobs_episodes(bpe, parts):
    text = "".join(parts)
    message = answer_of(bpe.encode(text), bpe)
    said, calls = read(text, range(len(text)))
    assert tuple(calls) == message.tool_calls
    assert "".join(said.split()) == "".join(message.content.split())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"name": "f", "arguments": {}}', [ToolCall("c", "f", "{}")]),
        ('{"name": "f", "argum', ['{"name": "f", "argum']),
        ("", []),
    ],
)
def test_a_required_call_is_the_whole_text_or_none(text, expected):
    reader = RequiredCallReader("c")
    assert [part for each in text for part in reader.push(each)] == []
    assert reader.rest() == expected


def test_a_choice_adds_up_what_its_chunks_say(bpe):
    token_ids = bpe.ending(f"so:\n{CALL}")
    choice = Choice(
        index=0,
        prompt_token_ids=(1,),
        stream=TextStream(bpe, set(bpe.special)),
        cutter=StopCutter([], keep=False),
        reader=CallReader(lambda number: f"call_{number}"),
        max_calls=9,
        calls_end_it=True,
    )
    for place, token_id in enumerate(token_ids):
        span = PolicySpan(1, 3 if place < 4 else 4, "d", "s")
        reason = "stop" if place == len(token_ids) - 1 else None
        piece = choice.push(CompletionChunk(0, (token_id,), (-0.5,), (span,), reason))
    assert piece.finish_reason == "tool_calls"
    assert (choice.text, [call.name for call in choice.calls]) == ("so:", ["f"])
    assert choice.token_ids == token_ids
    assert [(span.policy_version, span.num_tokens) for span in choice.spans] == [
        (3, 4),
        (4, len(token_ids) - 4),
    ]
