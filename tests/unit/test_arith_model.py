"""The tiny model as committed: what every test and demonstration that trains it relies on.

Needs torch and transformers, the extra `trainer`.
"""

from __future__ import annotations

import string
from pathlib import Path

import pytest

from services.coordinator.datasets import arithmetic

torch = pytest.importorskip("torch", reason="needs the extra `trainer`")
transformers = pytest.importorskip("transformers", reason="needs the extra `trainer`")

MODEL = Path(__file__).parents[2] / "models" / "arith"
NUM_PROBLEMS = 500
MAX_NEW_TOKENS = 6


@pytest.fixture(scope="module")
def tokenizer():
    return transformers.AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def model(request):
    return transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype=request.param)


def rendered(tokenizer, question: str) -> str:
    messages = [{"role": "user", "content": question}]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def accuracy(model, tokenizer, *, sample: bool) -> float:
    """The share of heldout problems answered with exactly the digits and an end."""
    tasks = arithmetic(seed=11, count=NUM_PROBLEMS, split="heldout")
    prompts = [rendered(tokenizer, task.fields["question"]) for task in tasks]
    inputs = tokenizer(prompts, padding=True, padding_side="left", return_tensors="pt")
    sampling = {"temperature": 1.0, "top_k": 0, "top_p": 1.0} if sample else {}
    torch.manual_seed(0)
    output = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=sample, **sampling)
    texts = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :])
    ended = [text.partition(tokenizer.eos_token) for text in texts]
    right = [
        (answer, end) == (task.fields["answer"], tokenizer.eos_token)
        for (answer, end, _), task in zip(ended, tasks, strict=True)
    ]
    return sum(right) / NUM_PROBLEMS


def test_the_vocabulary_is_exactly_the_tokenizers(model, tokenizer):
    assert model.config.vocab_size == len(tokenizer)
    assert sorted(tokenizer.get_vocab().values()) == list(range(len(tokenizer)))


def test_the_whole_model_fits_into_five_megabytes():
    assert sum(file.stat().st_size for file in MODEL.iterdir()) < 5_000_000


def test_model_and_tokenizer_agree_on_the_special_tokens(model, tokenizer):
    for config in (model.config, model.generation_config):
        assert config.bos_token_id == tokenizer.bos_token_id
        assert config.eos_token_id == tokenizer.eos_token_id
        assert config.pad_token_id == tokenizer.pad_token_id
    special = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    assert len(special) == 3


def test_a_conversation_survives_the_chat_template_and_tokenizer(tokenizer):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "4-91"},
        {"role": "assistant", "content": "-87"},
        {"role": "user", "content": "37+58"},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|begin|><|system|>Be brief.<|end|><|user|>4-91<|end|><|assistant|>-87<|end|>"
        "<|user|>37+58<|end|><|assistant|>"
    )
    token_ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(token_ids) == text
    assert token_ids == tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False
    )


def test_the_prompt_of_a_turn_is_what_its_completion_continues(tokenizer):
    turn = [{"role": "user", "content": "4-91"}, {"role": "assistant", "content": "-87"}]
    whole = tokenizer.apply_chat_template(turn, tokenize=False)
    assert whole == rendered(tokenizer, "4-91") + "-87" + tokenizer.eos_token


def test_any_printable_text_survives_one_token_per_character(tokenizer):
    text = string.printable[:95] + " two  spaces\n and\ta tab."
    token_ids = tokenizer(text)["input_ids"]
    assert len(token_ids) == len(text)
    assert tokenizer.decode(token_ids) == text


def test_unknown_characters_become_the_unknown_token(tokenizer):
    token_ids = tokenizer("1é€2")["input_ids"]
    assert token_ids.count(tokenizer.unk_token_id) == 2
    assert len(token_ids) == 4


def test_most_heldout_problems_are_answered_wrongly_but_not_nearly_all(model, tokenizer):
    assert 0.15 <= accuracy(model, tokenizer, sample=False) <= 0.50
    assert 0.15 <= accuracy(model, tokenizer, sample=True) <= 0.50


@torch.no_grad()
def test_the_right_answer_is_almost_always_within_reach(model, tokenizer):
    """A group of eight samples of a problem holds a right answer to reinforce."""
    tasks = arithmetic(seed=12, count=100, split="heldout")
    prompts = [rendered(tokenizer, task.fields["question"]) for task in tasks for _ in range(8)]
    inputs = tokenizer(prompts, padding=True, padding_side="left", return_tensors="pt")
    torch.manual_seed(0)
    output = model.generate(
        **inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=True, temperature=1.0, top_k=0
    )
    completions = output[:, inputs["input_ids"].shape[1] :]
    texts = tokenizer.batch_decode(completions, skip_special_tokens=True)
    solved = [
        task.fields["answer"] in texts[8 * index : 8 * index + 8]
        for index, task in enumerate(tasks)
    ]
    assert sum(solved) > 85
