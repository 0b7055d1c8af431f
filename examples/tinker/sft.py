"""Supervised fine-tuning through the Tinker SDK, unmodified: the loss falls.

With a mesh of examples/tinker/local.yaml, its URL in TINKER_BASE_URL and a key's secret in
TINKER_API_KEY: `python examples/tinker/sft.py`. The last line is the loss before and after.
"""

from __future__ import annotations

import argparse
import random

import tinker
from tinker import types

RANK = 8


def main() -> None:
    """Train, say what was lost at each step, then ask what was learned."""
    parser = argparse.ArgumentParser("python examples/tinker/sft.py", description=__doc__)
    parser.add_argument("--base-model", default="arith")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--checkpoint", default="sft", help="name to keep the weights under")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()

    with tinker.ServiceClient() as service:
        training = service.create_lora_training_client(
            arguments.base_model, rank=RANK, seed=arguments.seed
        ).result()
        tokenizer = training.get_tokenizer()
        rng = random.Random(arguments.seed)

        def prompt_of(question: str) -> list[int]:
            messages = [{"role": "user", "content": question}]
            text = tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
            tokens: list[int] = tokenizer.encode(text, add_special_tokens=False)
            return tokens

        losses = []
        for step in range(1, arguments.steps + 1):
            data = []
            for _ in range(arguments.batch_size):
                a, b = rng.randrange(100), rng.randrange(100)
                prompt = prompt_of(f"{a}+{b}")
                answer = tokenizer.encode(str(a + b), add_special_tokens=False)
                answer.append(tokenizer.eos_token_id)
                tokens = prompt + answer
                inputs = {
                    "target_tokens": tokens[1:],
                    # Only the answer is learned.
                    "weights": [0.0] * (len(prompt) - 1) + [1.0] * len(answer),
                }
                model_input = types.ModelInput.from_ints(tokens[:-1])
                data.append(types.Datum(model_input=model_input, loss_fn_inputs=inputs))

            # Linear decay; both requests are sent before the first is answered.
            rate = 1e-3 * (1 - (step - 1) / arguments.steps)
            gradients = training.forward_backward(data, "cross_entropy")
            stepped = training.optim_step(types.AdamParams(learning_rate=rate))
            outputs = gradients.result().loss_fn_outputs
            stepped.result()

            # Losses are sums; what is told is the mean over what is learned.
            weights = [weight for each in data for weight in each.loss_fn_inputs["weights"].data]
            logprobs = [logprob for each in outputs for logprob in each["logprobs"].data]
            total = sum(w * p for w, p in zip(weights, logprobs, strict=True))
            losses.append(-total / sum(weights))
            print(f"step {step:3}: loss {losses[-1]:.4f}", flush=True)

        saved = training.save_state(arguments.checkpoint).result()
        sampler = training.save_weights_and_get_sampling_client().result()
        question = "37+58"
        prompt_input = types.ModelInput.from_ints(prompt_of(question))
        params = types.SamplingParams(max_tokens=6, temperature=0.0)
        (drawn,) = sampler.sample(prompt_input, 1, params).result().sequences
        print(f"{question} = {tokenizer.decode(drawn.tokens, skip_special_tokens=True)}")
        print(f"kept as {saved.path}")
        print(f"loss {losses[0]:.4f} -> {losses[-1]:.4f}")


if __name__ == "__main__":
    main()
