"""Service times of samplers and trainers: what benchmarks/ measured, or others published."""

from __future__ import annotations

import bisect
from typing import TYPE_CHECKING

from pydantic import Field, PositiveFloat, PositiveInt

from rollmesh.config import Config

if TYPE_CHECKING:
    from pathlib import Path


class Calibration(Config):
    """Of one kind of machine and one base model."""

    machine: str
    """What it was measured on, with which model."""
    sources: dict[str, str]
    """By field: the command that measured it, the page that says it, or `assumed`."""
    decode_tokens_per_s: list[tuple[PositiveInt, PositiveFloat]] = Field(min_length=1)
    """Completions drawn at once, and the tokens/s of all of them together, in ascending order."""
    prefill_s_per_token: float = Field(ge=0)
    """Of a prompt, during which the sampler draws nothing."""
    load_s: float = Field(ge=0)
    """From the end of a training step until a sampler that asks for the version draws from it."""
    train_s_per_token: PositiveFloat
    """Forward, backward, of prompt and drawn tokens alike."""
    train_step_s: float = Field(ge=0)
    """Of each pass, whatever its size: the optimizer, the publication."""
    fused_tokens: PositiveInt
    """That the trainer takes into one pass, of several adapters if they wait."""
    max_running_completions: PositiveInt
    """On one sampler."""

    @classmethod
    def load(cls, path: Path) -> Calibration:
        """Of a JSON file.

        Raises:
            ValidationError: it is none.
        """
        return cls.model_validate_json(path.read_text())

    def rates(self) -> list[float]:
        """Tokens/s of one completion among 0, 1, … `max_running_completions` and twice as many.

        Between two that are given, the tokens/s of all together are on a straight line; beyond the
        last, they are as there.
        """
        sizes = [size for size, _ in self.decode_tokens_per_s]
        totals = [total for _, total in self.decode_tokens_per_s]
        rates = [totals[0] / sizes[0]]
        for size in range(1, 2 * self.max_running_completions + 1):
            above = bisect.bisect_left(sizes, size)
            if above == len(sizes):
                total = totals[-1]
            elif above == 0:
                total = totals[0] * size / sizes[0]
            else:
                share = (size - sizes[above - 1]) / (sizes[above] - sizes[above - 1])
                total = totals[above - 1] + share * (totals[above] - totals[above - 1])
            rates.append(total / size)
        return rates
