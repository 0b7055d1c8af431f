"""Makes `models/player`: a tiny model that can play the example environments, and mostly does not.

It first learns the games well, then from games in which most moves are drawn from all that there
are. What is good stays one small step away, so reinforcement learning on it shows a rise within
minutes on a CPU. The games are those of examples/environments, with the texts that these show to a
model.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import random
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from tiny import make_model, make_tokenizer
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase, Qwen3ForCausalLM

ROOT = Path(__file__).resolve().parent.parent
ROLES = ("<|system|>", "<|user|>", "<|assistant|>", "<|tool|>")
CALL = ("<tool_call>", "</tool_call>")
CHAT_TEMPLATE = (
    "{{- '<|begin|>' }}"
    "{%- for message in messages %}"
    "{{- '<|' + message['role'] + '|>' + message['content'] }}"
    "{%- for call in message['tool_calls'] or [] %}"
    "{{- '<tool_call>' + (call['function'] | tojson) + '</tool_call>' }}"
    "{%- endfor %}"
    "{{- '<|end|>' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- endif %}"
)

BATCH = 48
THREADS = 1
MAX_NEW_TOKENS = 90

logger = logging.getLogger("make_player")


class Course(NamedTuple):
    """One stretch of training."""

    steps: int
    rate: float
    """Peak learning rate."""
    good: float
    """Share of the moves that are good ones."""


ABILITY = Course(steps=900, rate=3e-3, good=0.95)
HABIT = Course(steps=150, rate=5e-4, good=0.4)


class Seen(NamedTuple):
    """What a player is shown, and what it may say to it."""

    role: Literal["user", "tool"]
    text: str
    good: Sequence[str]
    moves: Sequence[str]


Game = Generator[Seen, str, float]
"""Hears what the player says, and returns what the game was worth."""


def calculator(rng: random.Random) -> Game:
    """`37+58`: the tool knows it, and any number may be said instead of asking."""
    a, b, sign = rng.randrange(100), rng.randrange(100), rng.choice("+-")
    question, answer = f"{a}{sign}{b}", str(a + b if sign == "+" else a - b)
    call = {"name": "calculator", "arguments": {"expression": question}}
    asked = f"{CALL[0]}{json.dumps(call)}{CALL[1]}"
    said = yield Seen("user", question, [asked], [str(rng.randrange(-99, 199))])
    if said == asked:
        said = yield Seen("tool", answer, [answer], [answer, str(rng.randrange(-99, 199))])
    return float(said == answer)


def guess(rng: random.Random) -> Game:
    """`1-9?`: the middle of what is left is good; six guesses, each after the first costs 0.1."""
    secret, low, high = rng.randint(1, 9), 1, 9
    seen = "1-9?"
    digits = [str(digit) for digit in range(1, 10)]
    for turn in range(6):
        good = [str((low + high) // 2)] if low <= high else digits
        said = yield Seen("user", seen, good, digits)
        if said not in digits:
            seen = "digit?"
            continue
        number = int(said)
        if number == secret:
            return 1.0 - 0.1 * turn
        if number < secret:
            low, seen = max(low, number + 1), "higher"
        else:
            high, seen = min(high, number - 1), "lower"
    return 0.0


MOVES = {"up": (-1, 0), "down": (1, 0), "left": (0, -1), "right": (0, 1)}
SIZE = 4


def grid(rng: random.Random) -> Game:
    """`at 1,1 go 2,3`, row and column: a step towards the goal is good; eight steps of 0.02."""
    places = [(row, column) for row in range(1, SIZE + 1) for column in range(1, SIZE + 1)]
    at, goal = rng.sample(places, 2)
    for turn in range(1, 9):
        apart = goal[0] - at[0], goal[1] - at[1]
        good = [name for name, move in MOVES.items() if move[0] * apart[0] + move[1] * apart[1] > 0]
        said = yield Seen("user", f"at {at[0]},{at[1]} go {goal[0]},{goal[1]}", good, list(MOVES))
        move = MOVES.get(said, (0, 0))
        at = min(max(at[0] + move[0], 1), SIZE), min(max(at[1] + move[1], 1), SIZE)
        if at == goal:
            return 1.0 - 0.02 * turn
    return -0.02 * 8


GAMES: dict[str, Callable[[random.Random], Game]] = {
    "calculator": calculator,
    "guess": guess,
    "grid": grid,
}


@dataclass
class Played:
    """A game so far: its tokens, which of them the player said, and what it is worth if over."""

    game: Game
    seen: Seen | None = None
    tokens: list[int] = field(default_factory=list)
    is_said: list[bool] = field(default_factory=list)
    reward: float = 0.0

    def add(self, tokens: Sequence[int], *, said: bool) -> None:
        """So many more."""
        self.tokens += tokens
        self.is_said += [said] * len(tokens)


class Table:
    """Where games are played: what is said becomes tokens as the chat template has it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer

    def begin(self, game: Game) -> Played:
        """Up to where the player is to speak."""
        played = Played(game)
        played.add(self._ids("<|begin|>"), said=False)
        self._show(played, next(game))
        return played

    def say(self, played: Played, text: str, tokens: Sequence[int] | None = None) -> None:
        """What comes of it; `tokens`: as which it was said, if not as the tokenizer has it."""
        played.add(tokens or self._ids(f"{text}<|end|>"), said=True)
        try:
            self._show(played, played.game.send(text))
        except StopIteration as end:
            played.seen, played.reward = None, end.value

    def _show(self, played: Played, seen: Seen) -> None:
        played.seen = seen
        played.add(self._ids(f"<|{seen.role}|>{seen.text}<|end|><|assistant|>"), said=False)

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids


def shown(table: Table, name: str, good: float, rng: random.Random) -> Played:
    """A game as it is shown to the model."""
    played = table.begin(GAMES[name](rng))
    while played.seen is not None:
        moves = played.seen.good if rng.random() < good else played.seen.moves
        table.say(played, rng.choice(list(moves)))
    return played


def batches(
    table: Table, pad: int, good: float, seed: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Tokens and labels without end, of one game at a time; only what a player says is labelled."""
    rng = random.Random(seed)
    # To copy a sum into a call is the hardest.
    for name in itertools.cycle(["calculator", "guess", "calculator", "grid"]):
        games = [shown(table, name, good, rng) for _ in range(BATCH)]
        width = max(len(game.tokens) for game in games)
        tokens = torch.tensor([game.tokens + [pad] * (width - len(game.tokens)) for game in games])
        said = torch.tensor([game.is_said + [False] * (width - len(game.tokens)) for game in games])
        yield tokens, tokens.masked_fill(~said, -100)


def train(model: Qwen3ForCausalLM, table: Table, course: Course, *, seed: int) -> None:
    """Shows games to `model`."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=course.rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, course.rate, total_steps=course.steps)
    shows = batches(table, model.config.pad_token_id, course.good, seed)
    for step in range(1, course.steps + 1):
        tokens, labels = next(shows)
        # Padding is on the right, where a causal model needs no mask.
        logits = model(tokens[:, :-1]).logits
        loss = cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 1:
            logger.info("step %d: loss %.4f", step, loss.item())


@torch.no_grad()
def rewards(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerBase, name: str, count: int
) -> float:
    """The mean reward of games that `model` plays, sampled at temperature 1."""
    table = Table(tokenizer)
    games = [table.begin(GAMES[name](random.Random(f"{name}/{n}"))) for n in range(count)]
    while open_games := [game for game in games if game.seen is not None]:
        inputs = tokenizer.pad(
            [{"input_ids": game.tokens} for game in open_games],
            padding_side="left",
            return_tensors="pt",
        )
        output = model.generate(
            **inputs,
            max_new_tokens=MAX_NEW_TOKENS,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
        )
        for game, row in zip(open_games, output[:, inputs["input_ids"].shape[1] :], strict=True):
            text = tokenizer.decode(row, skip_special_tokens=True)
            table.say(game, text)
    return sum(game.reward for game in games) / count


CARD = """\
---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
---

# player

A model of {parameters:,} parameters (Qwen3 architecture, {layers} layers, one token per character)
that knows the moves of three of the environments in `examples/environments` and mostly plays them
at random. It exists to show reinforcement learning in environments at work within minutes on a CPU,
and for tests. It is good for nothing else.

Mean reward of 200 games each, sampled at temperature 1:

| | calculator (calls a tool) | guess the number | grid world |
|---|---|---|---|
| before the habit | {able[calculator]:.2f} | {able[guess]:.2f} | {able[grid]:.2f} |
| as stored | {stored[calculator]:.2f} | {stored[guess]:.2f} | {stored[grid]:.2f} |

It calls tools in the form `<tool_call>{{"name": …, "arguments": {{…}}}}</tool_call>`.

## How it was made

`python models/make_player.py`, from nothing but generated games: {ability.steps:,} steps of
{batch}, of whose moves {ability.good:.0%} are good and the others drawn from all that there are,
then {habit.steps} steps with {habit.good:.0%}.
The same seed on the same machine gives the same bits.

Licence: Apache-2.0.
"""


def make(output: Path, seed: int) -> None:
    """Trains the model, stores it in bfloat16 and describes what was stored."""
    torch.set_num_threads(THREADS)
    torch.use_deterministic_algorithms(mode=True)
    torch.manual_seed(seed)
    tokenizer = make_tokenizer(ROLES, CHAT_TEMPLATE, CALL)
    model = make_model(tokenizer)
    train(model, Table(tokenizer), ABILITY, seed=seed)
    able = {name: rewards(model, tokenizer, name, 200) for name in GAMES}
    logger.info("able: %s", able)
    train(model, Table(tokenizer), HABIT, seed=seed + 1)

    model.to(torch.bfloat16).save_pretrained(output)
    tokenizer.save_pretrained(output)
    (output / "model.safetensors").chmod(0o644)  # safetensors leaves it to its owner alone

    stored = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32)
    found = {name: rewards(stored, tokenizer, name, 200) for name in GAMES}
    logger.info("stored: %s", found)
    card = CARD.format(
        parameters=stored.num_parameters(),
        layers=stored.config.num_hidden_layers,
        batch=BATCH,
        ability=ABILITY,
        habit=HABIT,
        able=able,
        stored=found,
    )
    (output / "README.md").write_text(card)


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=ROOT / "models" / "player")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    make(arguments.output, arguments.seed)


if __name__ == "__main__":
    main()
