"""The reward functions that exist. A new one is a function, its parameters' model, a line here."""

from __future__ import annotations

from typing import Any

from services.reward.functions.code import CodeTests, code_tests
from services.reward.functions.combination import Weighted, parts_of, weighted
from services.reward.functions.form import (
    FormatMatch,
    Repetition,
    Script,
    format_match,
    repetition,
    script,
)
from services.reward.functions.function import NoParameters, RewardFunction
from services.reward.functions.judge import LlmJudge, llm_judge
from services.reward.functions.mathematics import math_match
from services.reward.functions.numeric import NumericMatch, numeric_match
from services.reward.functions.pattern import RegexMatch, regex_match
from services.reward.functions.reasoning import ReasoningGym, reasoning_gym
from services.reward.functions.sql import SqlMatch, sql_match
from services.reward.functions.structure import JsonSchema, json_schema
from services.reward.functions.text import ExactMatch, Length, exact_match, length
from services.reward.reasoning import package

FUNCTIONS: dict[str, RewardFunction[Any]] = {
    function.name: function
    for function in (
        RewardFunction(code_tests, CodeTests, needs_sandbox=True),
        RewardFunction(exact_match, ExactMatch),
        RewardFunction(format_match, FormatMatch),
        RewardFunction(json_schema, JsonSchema, isolated=True, reward_when_stuck=0.0),
        RewardFunction(length, Length),
        RewardFunction(llm_judge, LlmJudge, asks_judge=True),
        RewardFunction(math_match, NoParameters, isolated=True, reward_when_stuck=0.0),
        RewardFunction(numeric_match, NumericMatch),
        RewardFunction(
            reasoning_gym, ReasoningGym, isolated=True, reward_when_stuck=0.0, prepare=package
        ),
        # A pattern that explodes is its author's mistake, which a reward of 0 would hide.
        RewardFunction(regex_match, RegexMatch, isolated=True),
        RewardFunction(repetition, Repetition),
        RewardFunction(script, Script),
        RewardFunction(sql_match, SqlMatch, isolated=True, reward_when_stuck=0.0),
        RewardFunction(weighted, Weighted, parts=parts_of),
    )
}
