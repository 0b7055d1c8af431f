"""The tokenizer's files, and what is wrong with them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from rollmesh.errors import InvalidRequest
from services.coordinator.tokenizer import load_tokenizer
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
        "from services.coordinator.tokenizer import load_tokenizer\n"
        "tokenizer = load_tokenizer('models/arith')\n"
        "tokenizer.render([{'role': 'user', 'content': '1+1'}])\n"
        "assert not {'torch', 'transformers'} & set(sys.modules), 'heavy imports'\n"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)  # noqa: S603 - our own
