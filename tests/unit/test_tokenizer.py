"""The tokenizer's files, and what is wrong with them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from rollmesh.errors import InvalidRequest
from rollmesh.tokenizer import load_tokenizer
from tests.fakes.tokenizers import CHATML, bpe_model

ROOT = Path(__file__).resolve().parents[2]


def test_decoding_leaves_out_special_tokens_only(tmp_path):
    tokenizer = load_tokenizer(str(bpe_model(tmp_path / "model", template=CHATML)))
    ids = tokenizer.render([{"role": "user", "content": "2+2"}])
    assert "<|im_start|>" not in tokenizer.decode(ids)
    assert "user\n2+2\n" in tokenizer.decode(ids)
    assert tokenizer.decode(ids).endswith("assistant\n\n")


def test_a_model_without_a_chat_template_takes_plain_text_only(tmp_path):
    tokenizer = load_tokenizer(str(bpe_model(tmp_path / "model", template="", where="nowhere")))
    assert tokenizer.decode(tokenizer.encode("2+2")) == "2+2"
    with pytest.raises(InvalidRequest, match=r"no chat template; use prompt\.text"):
        tokenizer.render([{"role": "user", "content": "2+2"}])


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ nothing.at.all }}", "undefined"),
    ],
)
def test_a_template_that_refuses_is_the_callers_error(tmp_path, template, problem):
    tokenizer = load_tokenizer(str(bpe_model(tmp_path / "model", template=template)))
    with pytest.raises(InvalidRequest, match=problem):
        tokenizer.render([{"role": "user", "content": "x"}])


def test_a_folder_without_a_tokenizer_is_named(tmp_path):
    with pytest.raises(InvalidRequest, match=r"has no tokenizer\.json"):
        load_tokenizer(str(tmp_path))


def test_what_is_neither_a_folder_nor_a_hub_id_is_named():
    with pytest.raises(InvalidRequest, match="neither a folder nor a hub id"):
        load_tokenizer("/no/such/folder")


def test_it_works_without_torch_and_transformers():
    program = (
        "import sys\n"
        "from rollmesh.tokenizer import load_tokenizer\n"
        "tokenizer = load_tokenizer('models/arith')\n"
        "tokenizer.render([{'role': 'user', 'content': '1+1'}])\n"
        "assert not {'torch', 'transformers'} & set(sys.modules), 'heavy imports'\n"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)  # noqa: S603 - our own


TURNS = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{{ think if m['role'] == 'assistant' }}{{ m['content'] | trim + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.mark.parametrize("said", ["4", "four\nor so", " 4 "])
@pytest.mark.parametrize("think", ["", "<think>\n\n</think>\n\n"])
def test_an_answer_is_what_the_template_writes_up_to_the_end_of_the_turn(tmp_path, said, think):
    template = f"{{% set think = {think!r} %}}{TURNS}"
    tokenizer = load_tokenizer(str(bpe_model(tmp_path / "model", template=template)))
    question = [{"role": "user", "content": "2+2"}]
    answer = tokenizer.answer(question, said)
    assert tokenizer.decode(answer) == think + said.strip()
    end = tokenizer.vocabulary["<|im_end|>"]
    assert answer[-1] == end
    assert end not in answer[:-1]
    whole = tokenizer.render([*question, {"role": "assistant", "content": said}])
    before = tokenizer.render(question)
    # The line break behind the turn is the template's, before the next one.
    assert [*before, *answer] == whole[: len(before) + len(answer)]


@pytest.mark.parametrize(
    ("template", "end"),
    [
        pytest.param(CHATML, "<|im_end|>", id="another prompt than before a turn"),
        pytest.param("{{ messages[-1]['content'] | upper }}<extra>", "<|im_end|>", id="changed"),
        pytest.param("{{ messages[-1]['content'] }}<extra>", "<extra>", id="an end of its own"),
        pytest.param("{{ messages[-1]['content'] }}", "<|im_end|>", id="no end"),
    ],
)
def test_an_answer_that_the_template_does_not_write_is_the_text_and_an_end(tmp_path, template, end):
    tokenizer = load_tokenizer(str(bpe_model(tmp_path / "model", template=template)))
    answer = tokenizer.answer([{"role": "user", "content": "2+2"}], "four")
    assert (tokenizer.decode(answer), answer[-1]) == ("four", tokenizer.vocabulary[end])


def test_the_arithmetic_model_ends_its_turns_as_it_was_made_to():
    tokenizer = load_tokenizer(str(ROOT / "models" / "arith"))
    answer = tokenizer.answer([{"role": "user", "content": "37+58"}], "95")
    assert [tokenizer.decode(answer), answer[-1]] == ["95", tokenizer.vocabulary["<|end|>"]]
    assert tokenizer.ending("95") == answer


def test_a_tokenizer_that_names_no_end_of_sequence_is_refused(tmp_path):
    folder = bpe_model(tmp_path / "model", template=CHATML)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config.pop("eos_token", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(InvalidRequest, match="names no eos_token"):
        load_tokenizer(str(folder)).ending("four")
