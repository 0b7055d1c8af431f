"""Recipes of the installed tinker-cookbook, unmodified, against a mesh."""

from __future__ import annotations

import json
import random
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.asyncio(loop_scope="session")
COMMON = ("model_name=arith", "renderer_name=role_colon", "behavior_if_log_dir_exists=delete")
FEW_SHOT = [
    {"role": "user", "content": "What is 4 + 5?"},
    {"role": "assistant", "content": "9"},
]
SAMPLER_AND_TRAINER_WITHIN = 1e-3
"""Mean of the log-probabilities' differences, in nats."""


def sums(folder: Path, count: int) -> Path:
    """Chats in the words of the arithmetic environment."""
    rng = random.Random(1)
    path = folder / "sums.jsonl"
    with path.open("w") as lines:
        for _ in range(count):
            a, b = rng.randrange(101), rng.randrange(101)
            chat = [
                *FEW_SHOT,
                {"role": "user", "content": f"What is {a} + {b}?"},
                {"role": "assistant", "content": str(a + b)},
            ]
            lines.write(json.dumps({"messages": chat}) + "\n")
    return path


async def recipe(tinker, folder: Path, name: str, *arguments: str) -> list[dict[str, float]]:
    """The metrics of each step of a recipe, which must end well."""
    log = folder / "log"
    module = f"tinker_cookbook.recipes.{name}"
    await tinker.run(folder, "-m", module, *COMMON, f"log_path={log}", *arguments)
    assert "final" in (log / "checkpoints.jsonl").read_text()
    return [json.loads(line) for line in (log / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("name", "data"), [("chat_sl.train", "dataset"), ("prompt_distillation.train", "file_path")]
)
async def test_the_loss_of_supervised_recipes_falls(tinker, tmp_path, name, data):
    steps = await recipe(
        tinker,
        tmp_path,
        name,
        f"{data}={sums(tmp_path, 200)}",
        *("learning_rate=2e-3", "lr_schedule=constant", "lora_rank=16", "batch_size=16"),
        *("max_length=512", "max_steps=6", "eval_every=0", "save_every=4"),
    )
    losses = [step["train_mean_nll"] for step in steps if "train_mean_nll" in step]
    assert len(losses) == 6
    assert losses[-1] < losses[0] - 1.0


@pytest.mark.parametrize("loss", ["importance_sampling", "stable_reinforce"])
async def test_the_arithmetic_recipe_trains_on_what_the_mesh_draws(tinker, tmp_path, loss):
    steps = await recipe(
        tinker,
        tmp_path,
        "math_rl.train",
        "env=arithmetic",
        f"loss_fn={loss}",
        *("group_size=4", "groups_per_batch=4", "learning_rate=2e-3", "lora_rank=16"),
        *("max_tokens=6", "max_steps=3", "eval_every=0", "save_every=0"),
    )
    assert_trained(steps, 3)


async def test_the_shorter_recipe_prefers_and_moves_the_policy(tinker, tmp_path):
    steps = await recipe(
        tinker,
        tmp_path,
        "preference.shorter.train",
        *("batch_size=8", "group_size=4", "learning_rate=1e-3", "max_tokens=48"),
        *("max_steps=3", "eval_every=0"),
    )
    trained = assert_trained(steps, 3)
    # Some answers were shorter than others, and the policy is not what it was before the step.
    assert any(step["env/all/by_group/frac_mixed"] > 0 for step in trained)
    assert any(step["kl_pre_post_v2"] > 0 for step in trained)


def assert_trained(steps: list[dict[str, float]], count: int) -> list[dict[str, float]]:
    """Each step has rewards, and the trainer found the sampler's tokens as likely as it did."""
    trained = [step for step in steps if "env/all/reward/total" in step]
    assert len(trained) == count
    for step in trained:
        assert abs(step["optim/kl_sample_train_v1"]) < SAMPLER_AND_TRAINER_WITHIN
        assert step["optim/kl_sample_train_v2"] < SAMPLER_AND_TRAINER_WITHIN
        assert step["env/all/total_ac_tokens"] > 0
    return trained
