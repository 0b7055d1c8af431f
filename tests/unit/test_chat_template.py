"""What models write as messages, and how turns follow each other in tokens."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollmesh.chat import Message, Tool, ToolCall
from rollmesh.chat_template import answer_of, template_messages, template_tools
from rollmesh.errors import InvalidRequest
from rollmesh.tokenizer import load_tokenizer
from tests.fakes.tokenizers import CHATML, bpe_model

HERMES = """{% for m in messages %}
{%- set before = messages[loop.index0 - 1].role if not loop.first else '' %}
{%- set after = messages[loop.index0 + 1].role if not loop.last else '' %}
{%- if m.role == 'tool' %}
{%- if before != 'tool' %}{{ '<|im_start|>user' }}{% endif %}
{{- '\n<tool_response>\n' + m.content + '\n</tool_response>' }}
{%- if after != 'tool' %}{{ '<|im_end|>\n' }}{% endif %}
{%- else %}{{ '<|im_start|>' + m.role + '\n' + m.content }}
{%- for c in m.tool_calls or [] %}
{{- '\n<tool_call>\n' + (c.function | tojson) + '\n</tool_call>' }}
{%- endfor %}{{ '<|im_end|>\n' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
THINKING = """{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}
{%- if m.role == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}
{{- m.content + '<|im_end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
BARE = """{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"""
FORGETFUL = """{{ '<|im_start|>' + messages[-1].content }}"""


@pytest.fixture(scope="module")
def tokenizer_of(tmp_path_factory):
    def make(template):
        folder = tmp_path_factory.mktemp("model") / "bpe"
        return load_tokenizer(str(bpe_model(folder, template=template)))

    return make


def says(tokenizer, text):
    """As a model would draw it, its end token included."""
    return tokenizer.ending(text)


CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": "zwölf"}}\n</tool_call>'


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        ("four", "four", []),
        ("", "", []),
        (CALL, "", [("call_0", "add", '{"a": 1, "b": "zw\\u00f6lf"}')]),
        (f"let me see\n{CALL}", "let me see", [("call_0", "add", '{"a": 1, "b": "zw\\u00f6lf"}')]),
        (
            f"{CALL}{CALL}",
            "",
            [
                ("call_0", "add", '{"a": 1, "b": "zw\\u00f6lf"}'),
                ("call_1", "add", '{"a": 1, "b": "zw\\u00f6lf"}'),
            ],
        ),
        ('<tool_call>{"name": "now"}', "", [("call_0", "now", "{}")]),
        (
            '<tool_call>{"name": "f", "arguments": "text"}</tool_call>',
            "",
            [("call_0", "f", '"text"')],
        ),
        ("<tool_call>{nothing}</tool_call>", "<tool_call>{nothing}</tool_call>", []),
        ("<tool_call>[1]</tool_call>", "<tool_call>[1]</tool_call>", []),
        ('<tool_call>{"name": 3}</tool_call>', '<tool_call>{"name": 3}</tool_call>', []),
        ('<tool_call>{"name": "\\ud800"}</tool_call>', "", [("call_0", "?", "{}")]),
        ("</tool_call> alone", "</tool_call> alone", []),
    ],
)
def test_what_a_model_wrote_is_its_text_and_its_calls(tokenizer_of, text, content, calls):
    tokenizer = tokenizer_of(CHATML)
    message = answer_of(says(tokenizer, text), tokenizer)
    assert message == Message("assistant", content, tuple(ToolCall(*call) for call in calls))


@given(st.text())
def test_nothing_that_a_model_writes_is_an_error(text):
    tokenizer = load_tokenizer("models/arith")
    token_ids = tokenizer.encode(f"<tool_call>{text}</tool_call>")
    message = answer_of(token_ids, tokenizer, num_calls=7)
    template_messages([message])
    assert [call.id for call in message.tool_calls] in ([], ["call_7"])


@pytest.mark.parametrize("template", [HERMES, BARE], ids=["hermes", "bare"])
@pytest.mark.parametrize("said", ["four", "four\nor five", ""])
def test_turns_follow_each_other_as_the_template_writes_the_whole_chat(
    tokenizer_of, template, said
):
    tokenizer = tokenizer_of(template)
    chat = [{"role": "user", "content": "2+2"}]
    reply = [{"role": "user", "content": "are you sure?"}]
    drawn = tokenizer.answer(chat, said) if said else says(tokenizer, "")
    if template == BARE:
        drawn = drawn[:-1]  # It ends turns without a token of its own.
    token_ids = [*tokenizer.render(chat), *drawn]
    token_ids += tokenizer.follow(reply, token_ids[-1])
    whole = tokenizer.render([*chat, {"role": "assistant", "content": said}, *reply])
    assert tokenizer.decode(token_ids, skip_special_tokens=False) == tokenizer.decode(
        whole, skip_special_tokens=False
    )


def test_a_turn_that_was_cut_off_is_ended_before_the_next(tokenizer_of):
    tokenizer = tokenizer_of(CHATML)
    reply = [{"role": "user", "content": "go on"}]
    cut_off, whole = tokenizer.encode("four"), says(tokenizer, "four")
    assert [*cut_off, *tokenizer.follow(reply, cut_off[-1])] == [
        *whole,
        *tokenizer.follow(reply, whole[-1]),
    ]


def test_answers_of_tools_are_told_together_as_the_template_tells_them(tokenizer_of):
    tokenizer = tokenizer_of(HERMES)
    tools = [Message("tool", "3", tool_call_id="call_0"), Message("tool", "4")]
    text = tokenizer.decode(
        tokenizer.follow(template_messages(tools), None), skip_special_tokens=False
    )
    assert text == (
        "<|im_end|>\n<|im_start|>user\n<tool_response>\n3\n</tool_response>\n<tool_response>\n4\n"
        "</tool_response><|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_template_that_rewrites_old_turns_changes_nothing_that_was_drawn(tokenizer_of):
    tokenizer = tokenizer_of(THINKING)
    drawn = says(tokenizer, "<think>hm</think>four")
    follows = tokenizer.follow([{"role": "user", "content": "sure?"}], drawn[-1])
    text = tokenizer.decode(follows, skip_special_tokens=False)
    assert text == "\n<|im_start|>user\nsure?<|im_end|>\n<|im_start|>assistant\n"


def test_a_template_that_leaves_out_what_was_said_is_refused(tokenizer_of):
    with pytest.raises(InvalidRequest, match="cannot be used for several turns"):
        tokenizer_of(FORGETFUL).follow([{"role": "user", "content": "x"}], None)


def test_tools_and_calls_are_told_to_templates_as_openai_has_them():
    assert template_tools([]) is None
    schema = '{"type": "object"}'
    assert template_tools([Tool("add", "Adds.", schema), Tool("now")]) == [
        {
            "type": "function",
            "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object"}},
        },
        {"type": "function", "function": {"name": "now", "description": "", "parameters": {}}},
    ]
    calls = (ToolCall("call_0", "add", '{"a": 1}'),)
    assert template_messages(
        [Message("assistant", "", calls), Message("tool", "2", (), "call_0")]
    ) == [
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [
                {
                    "id": "call_0",
                    "type": "function",
                    "function": {"name": "add", "arguments": {"a": 1}},
                }
            ],
        },
        {"role": "tool", "content": "2", "tool_call_id": "call_0"},
    ]
