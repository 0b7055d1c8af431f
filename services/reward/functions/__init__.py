"""The reward functions that exist. A new one is a function, its parameters' model, a line here."""

from __future__ import annotations

from typing import Any

from services.reward.functions.function import NoParameters, RewardFunction
from services.reward.functions.mathematics import math_match
from services.reward.functions.numeric import NumericMatch, numeric_match
from services.reward.functions.pattern import RegexMatch, regex_match
from services.reward.functions.text import ExactMatch, Length, exact_match, length

FUNCTIONS: dict[str, RewardFunction[Any]] = {
    function.name: function
    for function in (
        RewardFunction(exact_match, ExactMatch),
        RewardFunction(length, Length),
        RewardFunction(math_match, NoParameters, isolated=True, reward_when_stuck=0.0),
        RewardFunction(numeric_match, NumericMatch),
        # A pattern that explodes is its author's mistake, which a reward of 0 would hide.
        RewardFunction(regex_match, RegexMatch, isolated=True),
    )
}
