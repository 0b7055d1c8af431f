"""Templates and what is wrong with them."""

from __future__ import annotations

import pytest

from rollmesh.errors import InvalidRequest
from rollmesh.job import PromptSpec
from services.coordinator.datasets import Task
from services.coordinator.prompts import (
    check_completions,
    check_templates,
    completion_token_ids,
    fill,
    prompt_token_ids,
)
from tests.fakes.job_mesh import TASKS, Letters, spec

TASK = Task(id="t", fields={"question": "1+1", "a.b": "x", "braces": "{question}"})


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("", ""),
        ("plain", "plain"),
        ("{question}", "1+1"),
        ("a{question}b{question}", "a1+1b1+1"),
        ("{{question}}", "{question}"),
        ("{{{question}}}", "{1+1}"),
        pytest.param("{braces}", "{question}", id="a field's own braces are text"),
        pytest.param("{a.b}", "x", id="a dot is part of the name"),
    ],
)
def test_fill(template, expected):
    assert fill(template, TASK, field="prompt.text") == expected


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("{answer}", "no field 'answer'; it has: a.b, braces, question"),
        ("{", "prompt.text: "),
        ("}", "prompt.text: "),
        ("{}", "a field is {name}"),
        ("{question!r}", "a field is {name}"),
        ("{question:>9}", "a field is {name}"),
        pytest.param("{question.__class__}", "no field", id="nothing is looked up in a value"),
        pytest.param("{question[0]}", "no field", id="nothing is looked up by index"),
    ],
)
def test_a_wrong_template_is_the_callers_error(template, problem):
    with pytest.raises(InvalidRequest) as caught:
        fill(template, TASK, field="prompt.text")
    assert problem in str(caught.value)
    assert caught.value.context["field"] == "prompt.text"


def test_a_chat_goes_through_the_template_and_text_as_it_is():
    class Chat(Letters):
        def render(self, messages):
            return self.encode("".join(f"<{m['role']}>{m['content']}" for m in messages))

    messages = [{"role": "system", "content": "Add."}, {"role": "user", "content": "{question}"}]
    chat = PromptSpec.model_validate({"messages": messages})
    assert Chat().decode(prompt_token_ids(chat, TASK, Chat())) == "<system>Add.<user>1+1"
    text = PromptSpec(text="{question}=")
    assert Chat().decode(prompt_token_ids(text, TASK, Chat())) == "1+1="


def test_an_empty_prompt_names_its_task():
    task = Task(id="empty", fields={"question": ""})
    with pytest.raises(InvalidRequest, match="'empty'"):
        prompt_token_ids(PromptSpec(text="{question}"), task, Letters())


@pytest.mark.parametrize("field", ["prompt", "reward"])
def test_every_task_is_checked_before_the_job_runs(field):
    changed = {
        "prompt": {"prompt": {"text": "{hint}"}},
        "reward": {"reward": {"function": "exact", "reference": "{hint}"}},
    }[field]
    tasks = [Task(id="a", fields={"question": "q", "hint": "h", "answer": "1"}), TASK]
    with pytest.raises(InvalidRequest, match=r"task 't' has no field 'hint'"):
        check_templates(spec(**changed), tasks)
    check_templates(spec(**changed), tasks[:1])


def test_a_completion_to_learn_ends_as_its_prompt_demands():
    chat = spec(sft={"completion": "{question}!"}, prompt={"messages": [
        {"role": "user", "content": "{question}"}]})  # fmt: skip
    plain = spec(sft={"completion": "{question}!"})
    assert Letters().decode(completion_token_ids(chat, TASK, Letters())) == "1+1!$"
    assert Letters().decode(completion_token_ids(plain, TASK, Letters())) == "1+1!."


def test_completions_are_checked_before_the_job_runs():
    tasks = [Task(id="a", fields={"question": "q", "hint": "h", "answer": "1"}), TASK]
    learns = spec(sft={"completion": "{hint}"})
    with pytest.raises(InvalidRequest, match=r"task 't' has no field 'hint'") as caught:
        check_completions(learns, tasks)
    assert caught.value.context["field"] == "sft.completion"
    check_completions(learns, tasks[:1])
    check_completions(spec(), tasks)


def test_an_empty_completion_names_its_task():
    task = Task(id="empty", fields={"question": "q", "answer": " "})
    with pytest.raises(InvalidRequest, match="'empty'"):
        check_completions(spec(sft={"completion": "{answer}"}), [TASKS[0], task])


def test_without_a_reward_there_is_no_reference_to_check():
    check_templates(spec(reward=None, distillation={}), [TASK])
