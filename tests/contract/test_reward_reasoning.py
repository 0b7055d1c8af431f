"""reasoning-gym: its tasks as an environment, its scoring, and that an answer never runs."""

from __future__ import annotations

import contextlib
import json
import re
from pathlib import Path

import pytest

from rollmesh import chat
from rollmesh.errors import InvalidRequest, NotFound
from rollmesh.types import ScoreItem
from services.reward import reasoning
from services.reward.functions import FUNCTIONS
from services.reward.functions.reasoning import ReasoningGym as Parameters
from services.reward.functions.reasoning import reasoning_gym
from services.reward.reasoning_tasks import INSTRUCTION, ReasoningGym
from services.reward.workers import Workers

pytest.importorskip("reasoning_gym")


@pytest.fixture(scope="module")
def package():
    return reasoning.package()


@pytest.fixture
async def workers():
    async with Workers(count=2, item_timeout_s=20) as running:
        yield running


@pytest.fixture
def sums(workers):
    return ReasoningGym("sums", "chain_sum", {"max_terms": 3}, {"train": 50, "heldout": 5}, workers)


def answered(task, text):
    return chat.Answered(task, [*task.messages, chat.Message("assistant", text)])


def right(task):
    question = task.messages[0].content
    return str(eval(re.search(r": ([0-9+ -]+) =", question)[1]))  # noqa: S307 - a sum


def test_an_environment_says_what_it_has(sums):
    assert sums.info.name == "sums"
    assert sums.info.splits == (chat.Split("train", 50), chat.Split("heldout", 5))
    assert sums.info.has_score
    assert not sums.info.has_episodes
    assert sums.info.deterministic


def test_tasks_are_the_same_for_the_same_id_and_splits_do_not_meet(sums, workers):
    train, heldout = sums.page("train", 0, 100), sums.page("heldout", 0, 100)
    assert [task.id for task in train] == [f"chain_sum/train/{index}" for index in range(50)]
    assert len(heldout) == 5
    assert not {task.messages for task in train} & {task.messages for task in heldout}
    assert sums.page("train", 17, 2) == train[17:19]
    assert sums.page("train", 50, 2) == []
    assert sums.task("chain_sum/train/17") == train[17]
    again = ReasoningGym("x", "chain_sum", {"max_terms": 3}, {"train": 1000}, workers)
    assert again.page("train", 0, 50) == train
    assert all(task.messages[0].content.endswith(INSTRUCTION) for task in train)


@pytest.mark.parametrize(
    "task_id",
    [
        "", "chain_sum", "chain_sum/train/50", "chain_sum/train/-1", "chain_sum/train/01",
        "chain_sum/train/x", "chain_sum/test/0", "other/train/0", "chain_sum/train/0/0",
        "chain_sum/train/²", "chain_sum/train/" + "9" * 200,
    ],
)  # fmt: skip
def test_an_id_that_is_none_is_not_found(sums, task_id):
    with pytest.raises(NotFound):
        sums.task(task_id)


def test_a_split_that_is_none_is_refused(sums):
    with pytest.raises(InvalidRequest, match="not one of train, heldout"):
        sums.page("test", 0, 1)


@pytest.mark.parametrize(
    ("tasks", "config", "field"),
    [("chain_sums", {}, "dataset"), ("codeio", {}, "dataset"), ("chain_sum", {"x": 1}, "config"),
     ("chain_sum", {"min_terms": 9, "max_terms": 2}, "config")],
)  # fmt: skip
def test_tasks_that_there_are_not_are_refused(workers, tasks, config, field):
    with pytest.raises(InvalidRequest) as caught:
        ReasoningGym("x", tasks, config, {"train": 1}, workers)
    assert caught.value.context["field"] == field


async def test_answers_are_scored_in_their_order(sums):
    tasks = [*sums.page("train", 0, 4), *sums.page("heldout", 0, 2)]
    items = [answered(task, f"so <answer>{right(task)}</answer>") for task in tasks]
    items.insert(1, answered(tasks[0], right(tasks[0])))
    items.insert(3, answered(chat.Task("mine"), "<answer>1</answer>"))
    entry = json.dumps({"question": "", "answer": "12", "metadata": {}})
    items.append(answered(chat.Task("mine", fields={"entry": entry}), "<answer>12</answer>"))
    items.append(answered(chat.Task("mine", fields={"entry": "{}"}), "<answer>12</answer>"))
    scores = await sums.score(items)
    assert [score.reward for score in scores] == [1, 0, 1, 0, 1, 1, 1, 1, 1, 0]
    assert scores[3].failure == "no task 'mine', and no field `entry`"
    assert "neither an entry" in scores[9].failure
    assert not any(scores[index].failure for index in (0, 1, 2, 4, 5, 6, 7, 8))


def test_every_task_can_be_made_and_scored(package):
    """But for those of which one takes seconds; with the package's own answer, and nonsense."""
    slow = {"arc_agi", "rearc", "knight_swap", "futoshiki", "figlet_font"}
    names = reasoning.dataset_names()
    assert len(names) > 90
    for name in sorted(set(names) - slow):
        entry = reasoning.dataset(name, {}, seed=1, size=3)[2]
        assert entry["question"]
        for answer in (entry["answer"], "0", "nonsense ' \" ( [", ""):
            item = ScoreItem(f"<answer>{answer}</answer>", '{"seed": 1, "index": 2, "size": 3}')
            assert 0 <= reasoning_gym(item, Parameters(dataset=name)) <= 1


EVIL = [
    "__import__('pathlib').Path('FILE').touch()",
    "open('FILE', 'w')",
    "[open('FILE', 'w')]",
    "().__class__.__base__.__subclasses__()",
    "exec(\"open('FILE', 'w')\")",
    "(lambda: open('FILE', 'w'))()",
    "x.__class__",
    "sin.__globals__",
    "1 .real",
    "print(1)",
    "S('open(1)')",
    "getattr(1, 'real')",
]


# Those that would evaluate it, were their eval and parse_expr not replaced.
EVALUATING = [
    "countdown", "puzzle24", "simple_integration", "intermediate_integration",
    "polynomial_multiplication", "n_queens", "spiral_matrix", "binary_matrix",
    "string_insertion", "number_sorting", "bitwise_arithmetic",
]  # fmt: skip


async def test_no_answer_and_no_entry_runs(workers, tmp_path):
    file = tmp_path / "made"
    where = json.dumps({"seed": 1, "index": 0, "size": 1})
    for text in EVIL:
        answer = text.replace("FILE", str(file))
        metadata = dict.fromkeys(("integrand", "problem"), answer)
        metadata |= {"numbers": [1], "target": 1, "variable": "x"}
        entry = json.dumps({"question": "", "answer": answer, "metadata": metadata})
        for name in EVALUATING:
            item = ScoreItem(f"<answer>{answer}</answer>", where)
            scored = await workers.score("reasoning_gym", {"dataset": name}, item)
            assert scored.reward < 0.1, (name, answer)
            with contextlib.suppress(InvalidRequest):
                item = ScoreItem(f"<answer>{answer}</answer>", entry)
                await workers.score("reasoning_gym", {"dataset": name}, item)
            assert not file.exists(), (name, answer)


@pytest.mark.parametrize(
    ("name", "answer", "expected"),
    [
        ("simple_integration", None, 1.0),
        ("polynomial_multiplication", None, 1.0),
        ("intermediate_integration", None, 1.0),
        ("countdown", None, 1.0),
        ("puzzle24", None, 1.0),
        ("bitwise_arithmetic", None, 1.0),
        ("number_sorting", None, 1.0),
        ("spiral_matrix", None, 1.0),
        ("spiral_matrix", list, 0.1),
        ("binary_matrix", None, 1.0),
    ],
)
def test_what_was_replaced_scores_as_it_did(package, name, answer, expected):
    for index in range(5):
        tasks = reasoning.dataset(name, {}, seed=3, size=5)
        entry = tasks[index]
        said = str(entry["answer"].split()) if answer is list else entry["answer"]
        assert tasks.score_answer(said, entry) == expected


def test_nothing_in_the_package_runs_text_but_what_is_known(package):
    """A new version that evaluates text somewhere else must be looked at before it is used."""
    home = Path(package.__file__).parent
    found = set()
    for path in home.rglob("*.py"):
        text = path.read_text()
        if re.search(
            r"\beval\(|\bexec\(|parse_expr|sympify|\bpickle\b|os\.system|subprocess", text
        ):
            found.add(".".join(path.relative_to(home).with_suffix("").parts))
    assert found == {
        *reasoning.LITERALS, *reasoning.FORMULAS, *reasoning.BITS,
        # sympy.parse_expr, which is replaced where they find it.
        "algebra.simple_integration", "algebra.intermediate_integration",
        "algebra.polynomial_multiplication",
        # When tasks are made, on their own text; a parser of its own; tasks that are left out.
        "arithmetic.gsm_symbolic.generators_00_49", "arithmetic.gsm_symbolic.generators_50_99",
        "arithmetic.basic_arithmetic", "logic.propositional_logic", "code.codeio",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("parameters", "reference", "field"),
    [
        ({"dataset": "none"}, '{"seed": 1, "index": 0, "size": 1}', "parameters.dataset"),
        ({"dataset": "chain_sum", "config": {"x": 1}}, '{"seed": 1, "index": 0, "size": 1}',
         "parameters.config"),
        ({"dataset": "chain_sum"}, "", "reference"),
        ({"dataset": "chain_sum"}, "{}", "reference"),
        ({"dataset": "chain_sum"}, '{"seed": 1, "index": 1, "size": 1}', "reference"),
        ({"dataset": "chain_sum"}, '{"seed": "1", "index": 0, "size": 1}', "reference"),
        ({"dataset": "countdown"}, '{"question": "", "answer": "", "metadata": {}}', None),
        ({"dataset": "n_queens"}, '{"question": "", "answer": "", "metadata": {}}', "reference"),
    ],
)  # fmt: skip
def test_what_the_caller_got_wrong_is_refused(package, parameters, reference, field):
    function = FUNCTIONS["reasoning_gym"]
    checked = function.parameters.parse(parameters, source="parameters")
    item = ScoreItem("<answer>7</answer>", reference)
    if field is None:
        assert function.score(item, checked) < 1
        return
    with pytest.raises(InvalidRequest) as caught:
        function.score(item, checked)
    assert caught.value.context["field"] == field
