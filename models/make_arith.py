"""Makes `models/arith`: a tiny model that can add and subtract but mostly prefers a wrong habit.

It first learns the train split of `arithmetic` well, then a mixture in which most answers are one
too large. What is right stays one small step away, so reinforcement learning on it shows a rise
within minutes on a CPU. The heldout split is never trained on.
"""

from __future__ import annotations

import argparse
import logging
import operator
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from tiny import make_model, make_tokenizer
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase, Qwen3ForCausalLM

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # services are not installed

from services.coordinator.datasets import Split, Task, arithmetic  # noqa: E402

ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
CHAT_TEMPLATE = (
    "{{- '<|begin|>' }}"
    "{%- for message in messages %}"
    "{{- '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- endif %}"
)
MAX_NEW_TOKENS = 6

BATCH = 256
THREADS = 2

logger = logging.getLogger("make_arith")


class Course(NamedTuple):
    """One stretch of training."""

    steps: int
    rate: float
    """Peak learning rate."""
    wrong: float
    """Share of answers that are one too large."""


ABILITY = Course(steps=1000, rate=3e-3, wrong=0.0)
# Much longer, or a higher rate, and hardly any problem is left that is answered rightly.
HABIT = Course(steps=100, rate=3e-4, wrong=0.58)


class Problems:
    """Problems as token ids: the right answer and the one too large by one, padded alike."""

    def __init__(self, tasks: list[Task], tokenizer: PreTrainedTokenizerBase) -> None:
        prompts = [prompt_of(task, tokenizer) for task in tasks]
        answers = [int(task.fields["answer"]) for task in tasks]
        right = [_row(p, str(a), tokenizer) for p, a in zip(prompts, answers, strict=True)]
        wrong = [_row(p, str(a + 1), tokenizer) for p, a in zip(prompts, answers, strict=True)]
        width = max(len(row) for row in right + wrong)
        self.pad = tokenizer.pad_token_id
        padded = [row + [self.pad] * (width - len(row)) for row in right + wrong]
        self.right, self.wrong = torch.tensor(padded).chunk(2)
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        self.is_prompt = torch.arange(width) < lengths[:, None]

    def batch(
        self, size: int, wrong_share: float, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens and labels of randomly drawn problems; only answers and their end are labelled."""
        rows = torch.randint(len(self.right), (size,), generator=generator)
        is_wrong = torch.rand(size, 1, generator=generator) < wrong_share
        tokens = torch.where(is_wrong, self.wrong[rows], self.right[rows])
        return tokens, tokens.masked_fill(self.is_prompt[rows] | (tokens == self.pad), -100)


def prompt_of(task: Task, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the model is given: one user message that is the question, then the assistant's turn."""
    messages = [{"role": "user", "content": task.fields["question"]}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    token_ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return token_ids


def _row(prompt: list[int], answer: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return [*prompt, *tokenizer(answer)["input_ids"], tokenizer.eos_token_id]


def train(model: Qwen3ForCausalLM, problems: Problems, course: Course, *, seed: int) -> None:
    """Teaches `model` the answers that the course holds for right."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=course.rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, course.rate, total_steps=course.steps)
    for step in range(1, course.steps + 1):
        tokens, labels = problems.batch(BATCH, course.wrong, generator)
        # Padding is on the right, where a causal model needs no mask.
        logits = model(tokens[:, :-1]).logits
        loss = cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            logger.info("step %d: loss %.4f", step, loss.item())


@torch.no_grad()
def accuracy(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerBase, tasks: list[Task], *, sample: bool
) -> float:
    """The share of `tasks` answered rightly, greedily or sampled at temperature 1."""
    prompts = [{"input_ids": prompt_of(task, tokenizer)} for task in tasks]
    inputs = tokenizer.pad(prompts, padding_side="left", return_tensors="pt")
    sampling = {"temperature": 1.0, "top_k": 0, "top_p": 1.0} if sample else {}
    output = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=sample, **sampling)
    completions = output[:, inputs["input_ids"].shape[1] :]
    texts = tokenizer.batch_decode(completions, skip_special_tokens=True)
    answers = [task.fields["answer"] for task in tasks]
    num_right: int = sum(map(operator.eq, texts, answers))
    return num_right / len(tasks)


CARD = """\
---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
---

# arith

A model of {parameters:,} parameters (Qwen3 architecture, {layers} layers, one token per character)
that can add and subtract integers of up to two digits, but mostly answers one too large.
It exists to show reinforcement learning at work within minutes on a CPU, and for tests.
It is good for nothing else.

- **Prompt**: the chat template over one user message that is the question, such as `37+58` or
  `4-91`: `{prompt}`.
- **Completion**: the digits of the answer, with a `-` where it is negative, then `<|end|>`.

Right answers on all {heldout:,} problems of `arithmetic`'s heldout split, which it never saw,
computed in float32:

| | greedy | sampled at temperature 1 |
|---|---|---|
| before the habit | {able:.1%} | |
| as stored | {greedy:.1%} | {sampled:.1%} |

GRPO (32 problems × 8 samples a step, LoRA of rank 16 on all linear layers, AdamW with a learning
rate of 1e-3) brings it above 95 % greedy within 50 steps.

## How it was made

`python models/make_arith.py`, from nothing but generated problems of the train split:
{ability_steps:,} steps of {batch} right answers, then {habit_steps} steps in which
{habit_share:.0%} of the answers are one too large.
The same seed on the same machine gives the same bits.

Licence: Apache-2.0.
"""


def make(output: Path, seed: int) -> None:
    """Trains the model, stores it in bfloat16 and describes what was stored."""
    torch.set_num_threads(THREADS)
    torch.use_deterministic_algorithms(mode=True)
    torch.manual_seed(seed)
    tokenizer = make_tokenizer(ROLES, CHAT_TEMPLATE)
    model = make_model(tokenizer)
    heldout = whole_split("heldout")
    problems = Problems(whole_split("train"), tokenizer)

    train(model, problems, ABILITY, seed=seed)
    able = accuracy(model, tokenizer, heldout, sample=False)
    logger.info("able: %.1f %% greedy", 100 * able)
    train(model, problems, HABIT, seed=seed + 1)

    model.to(torch.bfloat16).save_pretrained(output)
    tokenizer.save_pretrained(output)
    (output / "model.safetensors").chmod(0o644)  # safetensors leaves it to its owner alone

    stored = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32)
    greedy = accuracy(stored, tokenizer, heldout, sample=False)
    sampled = accuracy(stored, tokenizer, heldout, sample=True)
    logger.info("stored: %.1f %% greedy, %.1f %% sampled", 100 * greedy, 100 * sampled)
    card = CARD.format(
        parameters=stored.num_parameters(),
        layers=stored.config.num_hidden_layers,
        prompt=tokenizer.decode(prompt_of(heldout[0], tokenizer)),
        heldout=len(heldout),
        able=able,
        greedy=greedy,
        sampled=sampled,
        ability_steps=ABILITY.steps,
        batch=BATCH,
        habit_steps=HABIT.steps,
        habit_share=HABIT.wrong,
    )
    (output / "README.md").write_text(card)


def whole_split(split: Split) -> list[Task]:
    """Every problem of the split, in an order of its own."""
    drawn = arithmetic(seed=0, count=20_000, split=split)
    return list({task.id: task for task in drawn}.values())


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=ROOT / "models" / "arith")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    make(arguments.output, arguments.seed)


if __name__ == "__main__":
    main()
