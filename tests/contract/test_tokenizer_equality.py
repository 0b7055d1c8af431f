"""Our tokenizer against transformers.AutoTokenizer, on the same files."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import processors

from rollmesh.tokenizer import load_tokenizer
from tests.fakes.tokenizers import CHATML, bpe_model

transformers = pytest.importorskip("transformers")

ROOT = Path(__file__).resolve().parents[2]
BOS_BEFORE = processors.TemplateProcessing(
    single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
)
ODD = """{{- bos_token }}
{%- for message in messages -%}
  {%- if message.role == 'system' %}{% continue %}{% endif -%}
  {{ message | tojson }}{{ message.content | tojson(indent=1) }}
  {%- if message.role == 'assistant' -%}
    {% generation %}{{ message.content }}{% endgeneration %}
  {%- endif -%}
  {%- if loop.index > 3 %}{% break %}{% endif -%}
{% endfor %}
{{ strftime_now('%Y') | length }}{{ tools is none }}{{ pad_token is defined }}"""

CHATS = [
    [{"role": "user", "content": "What is 1+1?"}],
    [
        {"role": "system", "content": 'Answer < 3 words & no "quotes".'},
        {"role": "user", "content": "  Größe,\n\nemoji 🙂, <|im_end|> in the middle  "},
    ],
    [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b c"},
        {"role": "user", "content": ""},
    ],
]
TEXTS = ["", "plain", " leading and trailing ", "12+34=", "tab\tnew\nline", "🙂 ü <|im_end|> x"]


MODELS = {
    "chatml": {"template": CHATML},
    "chatml in the config": {"template": CHATML, "where": "config"},
    "named templates": {"template": CHATML, "where": "list"},
    "every feature of templates": {"template": ODD},
    "ends by the config": {
        "template": CHATML,
        "config": {"add_bos_token": True, "add_eos_token": True},
    },
    "ends by the file": {"template": CHATML, "post_processor": BOS_BEFORE},
    "ends by both": {
        "template": CHATML,
        "config": {"add_bos_token": False},
        "post_processor": BOS_BEFORE,
    },
    "special only by the config": {
        "template": CHATML,
        "config": {"extra_special_tokens": ["the", "<new>"]},
    },
}


@pytest.fixture(params=[*MODELS, "arith"])
def folder(request, tmp_path):
    if request.param == "arith":
        return ROOT / "models" / "arith"
    return bpe_model(tmp_path / "model", **MODELS[request.param])


def test_equal_to_transformers(folder):
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    theirs._tokenizer.no_truncation()
    theirs._tokenizer.no_padding()
    ours = load_tokenizer(str(folder))
    for chat in CHATS:
        expected = theirs.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        assert ours.render(chat) == expected
        assert ours.decode(expected) == theirs.decode(expected, skip_special_tokens=True)
    for text in TEXTS:
        expected = theirs.encode(text)
        assert ours.encode(text) == expected
        assert ours.decode(expected) == theirs.decode(expected, skip_special_tokens=True)
