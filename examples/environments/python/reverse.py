"""Say a word backwards: a single turn, rewarded by the share of letters that are right."""

import random

from rollmesh.environment import Environment, Task, serve, task_of

draw = random.Random(0)
words = sorted({"".join(draw.choices("abcdefgh", k=4)) for _ in range(2_000)})
draw.shuffle(words)
tasks = [task_of(word, answer=word[::-1]) for word in words]

environment = Environment(
    "reverse",
    version="1",
    description="The user says a word; the assistant says it backwards.",
    tasks={"train": tasks[128:], "heldout": tasks[:128]},
    deterministic=True,
)


@environment.score
def score(task: Task, answer: str) -> float:
    right = task.fields["answer"]
    same = sum(said == letter for said, letter in zip(answer, right, strict=False))
    return same / max(len(answer), len(right))


if __name__ == "__main__":
    serve(environment)
