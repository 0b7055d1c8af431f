"""What a job file says to use each function, with completions and what they are worth.

docs/rewards.md shows them, and a test scores them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from services.reward.functions.code.reference import CodeReference

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rollmesh.config import Config


@dataclass(frozen=True, slots=True)
class Example:
    """One use of a function.

    Attributes:
        yaml: the section `reward` of a job file.
        worth: completions, and the reward of each.
        fields: a task's fields, which fill the reference's template.
        judge: what a judge answers about each completion.
        reference: what a reference may be that is a JSON object. None: nothing of its own.
    """

    yaml: str
    worth: Mapping[str, float]
    fields: Mapping[str, str] = field(default_factory=dict)
    judge: Mapping[str, str] = field(default_factory=dict)
    reference: type[Config] | None = None


EXAMPLES: dict[str, Example] = {
    "code_tests": Example(
        """\
reward:
  function: code_tests
  reference: "{tests}"
  parameters: {cpu_s: 2, memory_mib: 128}
""",
        {
            "```python\ndef double(x):\n    return 2 * x\n```": 1.0,
            "def double(x): return x + 2": 0.5,
            "def double(x): exit()": 0.0,
        },
        {"tests": "assert double(2) == 4\nassert double(-1) == -2"},
        reference=CodeReference,
    ),
    "exact_match": Example(
        """\
reward:
  function: exact_match
  reference: "{answer}"
  parameters: {ignore_case: true}
""",
        {"paris": 1.0, "Paris, France": 0.0},
        {"answer": "Paris"},
    ),
    "format_match": Example(
        """\
reward:
  function: format_match
  parameters: {tags: [think, answer]}
""",
        {"<think>3 + 4</think><answer>7</answer>": 1.0, "<answer>7</answer>": 0.0},
    ),
    "json_schema": Example(
        """\
reward:
  function: json_schema
  parameters:
    find: fence
    schema:
      type: object
      required: [city]
      properties: {city: {type: string}}
""",
        {'```json\n{"city": "Paris"}\n```': 1.0, '{"city": 7}': 0.0},
    ),
    "length": Example(
        """\
reward:
  function: length
  parameters: {at_most: 10}
""",
        {"short": 1.0, "fifteen letters": 0.5},
    ),
    "llm_judge": Example(
        """\
reward:
  function: llm_judge
  reference: "{answer}"
  parameters:
    rubric: "10 if the answer means the same as: {reference}. Else 0."
    base_model: judge
    max_tokens: 256
    when_unclear: 0
""",
        {"It is Paris.": 1.0, "It is Rome.": 0.1, "Hm.": 0.0},
        {"answer": "Paris"},
        {
            "It is Paris.": "It is the same.\nScore: 10",
            "It is Rome.": "It is another city.\nScore: 1",
            "Hm.": "I cannot tell.",
        },
    ),
    "math_match": Example(
        """\
reward:
  function: math_match
  reference: "{answer}"
""",
        {r"so it is \boxed{\frac{1}{2}}": 1.0, "0.25": 0.0},
        {"answer": "1/2"},
    ),
    "numeric_match": Example(
        """\
reward:
  function: numeric_match
  reference: "{answer}"
  parameters: {tolerance: 0.01}
""",
        {"about 3.14": 1.0, "3": 0.0},
        {"answer": "3.1416"},
    ),
    "reasoning_gym": Example(
        """\
reward:
  function: reasoning_gym
  reference: "{entry}"
  parameters: {dataset: chain_sum}
""",
        {"3 + 4 is <answer>7</answer>": 1.0, "7": 0.0},
        {"entry": '{"question": "3 + 4 =", "answer": "7", "metadata": {}}'},
    ),
    "regex_match": Example(
        """\
reward:
  function: regex_match
  parameters: {pattern: '[0-9]+', where: whole}
""",
        {"42": 1.0, "42.": 0.0},
    ),
    "repetition": Example(
        """\
reward:
  function: weighted
  parameters:
    parts:
      - {function: exact_match}
      - {function: repetition, parameters: {size: 2}, weight: -1}
  reference: "{answer}"
""",
        {"a b c": 1.0, "a b a b a b": -0.6},
        {"answer": "a b c"},
    ),
    "script": Example(
        """\
reward:
  function: script
  parameters: {scripts: [latin]}
""",
        {"good": 1.0, "goод": 0.5},
    ),
    "sql_match": Example(
        """\
reward:
  function: sql_match
  reference: "{query}"
  parameters:
    database: |
      CREATE TABLE person (name TEXT, age INTEGER);
      INSERT INTO person VALUES ('Ada', 36), ('Alan', 41);
""",
        {
            "```sql\nSELECT name FROM person WHERE age > 40\n```": 1.0,
            "SELECT name FROM person": 0.0,
            "DROP TABLE person": 0.0,
        },
        {"query": "SELECT name FROM person ORDER BY age DESC LIMIT 1"},
    ),
    "weighted": Example(
        """\
reward:
  function: weighted
  reference: "{answer}"
  parameters:
    parts:
      - {function: format_match, parameters: {only: false}, at_least: 1, weight: 0.1}
      - {function: numeric_match}
      - {function: length, parameters: {at_most: 100}, weight: 0.1, name: short}
""",
        {
            "<think>3 + 4</think><answer>7</answer>": 1.2,
            "<think>3 + 4</think><answer>8</answer>": 0.2,
            "7": 0.0,
        },
        {"answer": "7"},
    ),
}
