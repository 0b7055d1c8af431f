"""Reinforcement learning through the Tinker SDK, unmodified: the reward rises.

With a mesh of examples/tinker/local.yaml, its URL in TINKER_BASE_URL and a key's secret in
TINKER_API_KEY: `python examples/tinker/rl.py`. The last line is the reward before and after.
"""

from __future__ import annotations

import argparse
import random
from typing import Any

import tinker
from tinker import types

ADAM = types.AdamParams(learning_rate=1e-3, beta1=0.9, beta2=0.95, eps=1e-8)
RANK = 16
MAX_TOKENS = 6
"""A sign, three digits and the end."""


def main() -> None:
    """Train, and say what each step was worth."""
    parser = argparse.ArgumentParser("python examples/tinker/rl.py", description=__doc__)
    parser.add_argument("--base-model", default="arith")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--problems", type=int, default=32, help="of each step")
    parser.add_argument("--group-size", type=int, default=8, help="answers to each problem")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()

    with tinker.ServiceClient() as service:
        training = service.create_lora_training_client(
            arguments.base_model, rank=RANK, seed=arguments.seed
        ).result()
        tokenizer = training.get_tokenizer()
        rng = random.Random(arguments.seed)
        rewards = []
        for step in range(1, arguments.steps + 1):
            # 1. The weights as they are now, to draw from.
            sampler = training.save_weights_and_get_sampling_client().result()

            # 2. Problems, and a group of answers to each; all are drawn at once.
            problems, prompts, drawn = [], [], []
            for number in range(arguments.problems):
                a, sign, b = rng.randrange(100), rng.choice("+-"), rng.randrange(100)
                problems.append((f"{a}{sign}{b}", a + b if sign == "+" else a - b))
                text = tokenizer.apply_chat_template(
                    [{"role": "user", "content": problems[-1][0]}],
                    tokenize=False,
                    add_generation_prompt=True,
                )
                prompts.append(tokenizer.encode(text, add_special_tokens=False))
                params = types.SamplingParams(
                    max_tokens=MAX_TOKENS, seed=step * arguments.problems + number
                )
                prompt = types.ModelInput.from_ints(prompts[-1])
                drawn.append(sampler.sample(prompt, arguments.group_size, params))

            # 3. Rewards, and advantages: how much better than the rest of its group.
            data, worth = [], []
            for (_, answer), prompt_ids, future in zip(problems, prompts, drawn, strict=True):
                group = future.result().sequences
                texts = [tokenizer.decode(each.tokens, skip_special_tokens=True) for each in group]
                group_rewards = [float(text == str(answer)) for text in texts]
                worth += group_rewards
                mean = sum(group_rewards) / len(group_rewards)
                for each, reward in zip(group, group_rewards, strict=True):
                    if reward == mean:  # the whole group has it, and there is nothing to learn
                        continue
                    before = len(prompt_ids) - 1  # positions that predict the prompt itself
                    inputs: dict[str, Any] = {
                        "target_tokens": [0] * before + each.tokens,
                        "logprobs": [0.0] * before + (each.logprobs or []),
                        "advantages": [0.0] * before + [reward - mean] * len(each.tokens),
                    }
                    model_input = types.ModelInput.from_ints(prompt_ids + each.tokens[:-1])
                    data.append(types.Datum(model_input=model_input, loss_fn_inputs=inputs))

            # 4. One step; both requests are sent before the first is answered.
            if data:
                gradients = training.forward_backward(data, "importance_sampling")
                stepped = training.optim_step(ADAM)
                gradients.result()
                stepped.result()
            rewards.append(sum(worth) / len(worth))
            print(f"step {step:3}: reward {rewards[-1]:.3f}, {len(data)} data", flush=True)
        print(f"reward {rewards[0]:.3f} -> {rewards[-1]:.3f}")


if __name__ == "__main__":
    main()
