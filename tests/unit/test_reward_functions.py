"""Each reward function by itself: what it rewards, and what it refuses."""

from __future__ import annotations

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollmesh.errors import InvalidRequest
from rollmesh.types import ScoreItem
from services.reward.functions import FUNCTIONS
from services.reward.functions.function import scored


def reward(function: str, parameters: dict, completion: str, reference: str = "") -> float:
    chosen = FUNCTIONS[function]
    checked = chosen.parameters.parse(parameters, source="parameters")
    return scored(chosen.score(ScoreItem(completion, reference), checked)).reward


@pytest.mark.parametrize(
    ("parameters", "completion", "reference", "expected"),
    [
        pytest.param({}, "7", "7", 1, id="equal"),
        pytest.param({}, "7", "8", 0, id="different"),
        pytest.param({}, " 7\n", "7 ", 1, id="white space is stripped from both"),
        pytest.param({}, "7 7", "77", 0, id="white space inside counts"),
        pytest.param({"strip": False}, " 7", "7", 0, id="unless asked not to strip"),
        pytest.param({}, "Yes", "yes", 0, id="case counts"),
        pytest.param(
            {"ignore_case": True}, "STRASSE", "straße", 1, id="unless ignored, by Unicode"
        ),
        pytest.param({}, "", "", 1, id="nothing is nothing"),
    ],
)
def test_exact_match(parameters, completion, reference, expected):
    assert reward("exact_match", parameters, completion, reference) == expected


@pytest.mark.parametrize(
    ("parameters", "completion", "reference", "expected"),
    [
        pytest.param({}, "3 + 4 = 7", "7", 1, id="the last number counts"),
        pytest.param({}, "7 or 8", "7", 0, id="the first does not"),
        pytest.param({}, "7.00", "7", 1, id="trailing zeros"),
        pytest.param({}, "007", "7", 1, id="leading zeros"),
        pytest.param({}, ".5", "0.5", 1, id="no digit before the point"),
        pytest.param({}, "It is 7.", "7", 1, id="a full stop is no decimal point"),
        pytest.param({}, "1,234,567.5", "1234567.5", 1, id="commas between thousands"),
        pytest.param({}, "(1,2)", "2", 1, id="a comma in a list is none between thousands"),
        pytest.param({}, "x = -5", "-5", 1, id="a sign"),
        pytest.param({}, "−5", "-5", 1, id="the typographic minus"),
        pytest.param({}, "3-5", "5", 1, id="a minus between two numbers is no sign"),
        pytest.param({}, "1.5e3", "1500", 1, id="an exponent"),
        pytest.param({}, "none", "7", 0, id="no number at all"),
        pytest.param({}, "", "7", 0, id="an empty completion"),
        pytest.param({}, "0.1", "0.1000000000000000055", 0, id="exact beyond floating point"),
        pytest.param({}, "9007199254740993", "9007199254740992", 0, id="exact for large integers"),
        pytest.param({}, "1e999999999999999999999", "7", 0, id="an absurd exponent"),
        pytest.param({}, "1e999999999", "1", 0, id="a difference too long to write down"),
        pytest.param({"tolerance": 0.3}, "1.3", "1", 1, id="a tolerance is inclusive and decimal"),
        pytest.param({"tolerance": 0.1}, "1.11", "1", 0, id="beyond the tolerance"),
        pytest.param({"where": "whole"}, " 7 ", "7", 1, id="the whole text"),
        pytest.param({"where": "whole"}, "It is 7", "7", 0, id="the whole text, with words"),
    ],
)
def test_numeric_match(parameters, completion, reference, expected):
    assert reward("numeric_match", parameters, completion, reference) == expected


@given(number=st.integers(), words=st.text(alphabet="ab =:\n"))
def test_numeric_match_finds_every_integer_in_either_spelling(number, words):
    for spelled in (f"{number}", f"{number:,}"):
        assert reward("numeric_match", {}, f"12 {words} {spelled}.", str(number)) == 1
        assert reward("numeric_match", {}, f"12 {words} {spelled}.", str(number + 1)) == 0


@pytest.mark.parametrize("reference", ["", "seven", "7 apples", "1/2", "1e999999999999999999999"])
def test_numeric_match_refuses_a_reference_that_is_not_a_number(reference):
    with pytest.raises(InvalidRequest, match="not a number") as caught:
        reward("numeric_match", {}, "7", reference)
    assert caught.value.context["field"] == "reference"


@pytest.mark.parametrize(
    ("completion", "reference", "expected"),
    [
        pytest.param("The answer is 1/2.", "0.5", 1, id="a fraction is its decimal"),
        pytest.param(r"so \boxed{\frac{1}{2}}", "1/2", 1, id="a boxed formula"),
        pytest.param(r"$x\cdot x$", "$x^2$", 1, id="equal formulas"),
        pytest.param(r"$\{2, 1\}$", r"$\{1, 2\}$", 1, id="sets have no order"),
        pytest.param(r"12, so \boxed{7}", "12", 0, id="the box counts"),
        pytest.param("3", "7", 0, id="wrong"),
        pytest.param("no idea", "7", 0, id="nothing to compare"),
        pytest.param("", "7", 0, id="an empty completion"),
        pytest.param(r"$\frac{1}{", "7", 0, id="broken LaTeX"),
    ],
)
def test_math_match(completion, reference, expected):
    assert reward("math_match", {}, completion, reference) == expected


@pytest.mark.parametrize("reference", ["", "Paris"])
def test_math_match_refuses_a_reference_that_is_no_mathematics(reference):
    with pytest.raises(InvalidRequest, match="neither a number nor a formula") as caught:
        reward("math_match", {}, "7", reference)
    assert caught.value.context["field"] == "reference"


@pytest.mark.parametrize(
    ("parameters", "completion", "expected"),
    [
        pytest.param({"pattern": r"\d+"}, "abc 12", 1, id="anywhere"),
        pytest.param({"pattern": r"\d+"}, "abc", 0, id="nowhere"),
        pytest.param({"pattern": r"\d+", "where": "whole"}, "12", 1, id="all of it"),
        pytest.param({"pattern": r"\d+", "where": "whole"}, "12\n", 0, id="not quite all of it"),
        pytest.param({"pattern": "yes"}, "YES", 0, id="case counts"),
        pytest.param({"pattern": "yes", "ignore_case": True}, "YES", 1, id="unless ignored"),
    ],
)
def test_regex_match(parameters, completion, expected):
    assert reward("regex_match", parameters, completion) == expected


@pytest.mark.parametrize("pattern", ["(", "a{99999999999}", "*", r"\p{L}", "(?P<a"])
def test_regex_match_refuses_what_is_no_regular_expression(pattern):
    with pytest.raises(InvalidRequest, match="not a regular expression") as caught:
        reward("regex_match", {"pattern": pattern}, "x")
    assert caught.value.context["field"] == "parameters.pattern"


@pytest.mark.parametrize(
    ("parameters", "characters", "expected"),
    [
        ({"target": 4}, 4, 1.0),
        ({"target": 4}, 3, 0.75),
        ({"target": 4}, 5, 0.75),
        ({"target": 4}, 0, 0.0),
        ({"target": 4}, 8, 0.0),
        ({"target": 4}, 800, 0.0),
        ({"at_most": 4}, 0, 1.0),
        ({"at_most": 4}, 4, 1.0),
        ({"at_most": 4}, 6, 0.5),
        ({"at_most": 4}, 8, 0.0),
        ({"at_most": 4}, 800, 0.0),
    ],
)
def test_length_counts_characters_not_bytes(parameters, characters, expected):
    assert reward("length", parameters, "ü" * characters) == expected


@pytest.mark.parametrize(
    ("parameters", "completion", "expected"),
    [
        pytest.param({}, "<think>a</think><answer>b</answer>", 1, id="both, in order"),
        pytest.param({}, " <think>\na\n</think>\n<answer></answer>\n", 1, id="white space around"),
        pytest.param({}, "<answer>b</answer><think>a</think>", 0, id="the wrong order"),
        pytest.param({}, "<think>a</think>", 0, id="one is missing"),
        pytest.param({}, "<think>a</think><answer>b", 0, id="one is open"),
        pytest.param({}, "<think>a</think><answer>b</answer><answer>c</answer>", 0, id="twice"),
        pytest.param({}, "<think>a<answer>b</think></answer>", 0, id="crossed"),
        pytest.param({}, "<think><answer>b</answer></think>", 0, id="one within the other"),
        pytest.param({}, "so: <think>a</think><answer>b</answer>", 0, id="text before"),
        pytest.param({}, "<think>a</think>so<answer>b</answer>", 0, id="text between"),
        pytest.param({}, "<think>a</think><answer>b</answer>.", 0, id="text after"),
        pytest.param(
            {"only": False}, "x<think>a</think>y<answer>b</answer>z", 1, id="text is allowed"
        ),
        pytest.param({"tags": ["plan"]}, "<plan>a</plan>", 1, id="a tag of one's own"),
        pytest.param({}, "", 0, id="nothing"),
    ],
)
def test_format_match(parameters, completion, expected):
    assert reward("format_match", parameters, completion) == expected


@pytest.mark.parametrize(
    ("parameters", "completion", "expected"),
    [
        ({"size": 1}, "a b c", 0.0),
        ({"size": 1}, "a a a a", 0.75),
        ({"size": 2}, "a b a b a b", 0.6),
        ({"size": 4}, "one two three", 0.0),
        ({}, "", 0.0),
    ],
)
def test_repetition_is_the_share_of_sequences_that_come_again(parameters, completion, expected):
    assert reward("repetition", parameters, completion) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("scripts", "completion", "expected"),
    [
        (["latin"], "Grüß Gott, 12!", 1.0),
        (["latin"], "да и нет", 0.0),
        (["cyrillic"], "да yes", 0.4),
        (["cjk", "hiragana"], "日本の", 1.0),
        (["hangul"], "한국", 1.0),
        (["latin"], "12 + 7 = 19", 1.0),
        (["latin"], "", 1.0),
    ],
)
def test_script_is_the_share_of_letters_of_it(scripts, completion, expected):
    assert reward("script", {"scripts": scripts}, completion) == pytest.approx(expected)


@given(completion=st.text(), reference=st.text())
@pytest.mark.parametrize(
    ("function", "parameters"),
    [
        ("exact_match", {}),
        ("numeric_match", {}),
        ("regex_match", {"pattern": "a.b"}),
        ("length", {"target": 3}),
        ("length", {"at_most": 3}),
        ("format_match", {}),
        ("repetition", {"size": 2}),
        ("script", {"scripts": ["latin"]}),
    ],
)
def test_rewards_are_finite_whatever_a_model_wrote(function, parameters, completion, reference):
    reference = reference if function != "numeric_match" else "7"
    found = reward(function, parameters, completion, reference)
    assert math.isfinite(found)
    assert 0 <= found <= 1


def test_every_function_is_documented():
    for name, function in FUNCTIONS.items():
        assert name == function.name
        assert re.match(r"\S.*\.$", function.description)
        schema = function.parameters.model_json_schema()
        assert schema["additionalProperties"] is False
        for parameter in schema["properties"].values():
            assert parameter["description"]
