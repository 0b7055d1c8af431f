"""Job files: the same keys as the protos, closed, and refused by key or by line."""

from __future__ import annotations

import inspect
import json
import typing
from pathlib import Path

import pytest
from pydantic import BaseModel

from rollmesh.api.coordinator.v1 import job_pb2
from rollmesh.errors import InvalidRequest
from rollmesh.job import JobSpec, Task, load_job_file, read_jsonl, whole_numbers

EXAMPLES = sorted((Path(__file__).parents[2] / "examples" / "jobs").glob("*.yaml"))
MINIMAL = {
    "base_model": "arith",
    "dataset": {"generator": {"name": "arithmetic"}},
    "prompt": {"text": "{question}="},
    "reward": {"function": "exact_match"},
    "stop": {"max_steps": 1},
}


def parse(**changes: object) -> JobSpec:
    return JobSpec.parse(MINIMAL | changes, source="job.yaml")


def models_in(annotation: object) -> list[type[BaseModel]]:
    if inspect.isclass(annotation) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for inner in typing.get_args(annotation) for model in models_in(inner)]


def pairs(model: type[BaseModel], message) -> list[tuple[type[BaseModel], object]]:
    """The model and its message, and those of every key, recursively."""
    found = [(model, message)]
    for name, field in model.model_fields.items():
        if name in message.fields_by_name:
            for inner in models_in(field.annotation):
                found += pairs(inner, message.fields_by_name[name].message_type)
    return found


@pytest.mark.parametrize(
    ("model", "message"), [pytest.param(*pair, id=pair[1].name) for pair in pairs(
        JobSpec, job_pb2.JobSpec.DESCRIPTOR)]
)  # fmt: skip
def test_a_job_file_has_the_keys_of_the_protos(model, message):
    # The client reads a jsonl file and sends its tasks.
    assert set(model.model_fields) - {"jsonl"} == set(message.fields_by_name)


def test_every_message_of_a_job_spec_is_compared():
    compared = {message.name for _, message in pairs(JobSpec, job_pb2.JobSpec.DESCRIPTOR)}
    assert compared == {
        *("JobSpec", "AdapterSpec", "DatasetSpec", "Task", "GeneratorSpec", "PromptSpec"),
        *("ChatMessage", "RewardSpec", "AlgorithmSpec", "LearningRateSpec", "SamplingSpec"),
        *("StopSpec", "EvaluationSpec", "EvaluationSetSpec", "DistillationSpec", "SftSpec"),
        *("CurriculumSpec", "EnvironmentSpec"),
    }


def test_every_key_is_documented():
    for model, _ in pairs(JobSpec, job_pb2.JobSpec.DESCRIPTOR):
        for name, field in model.model_fields.items():
            assert field.description, f"{model.__name__}.{name}"


@pytest.mark.parametrize("path", [pytest.param(path, id=path.stem) for path in EXAMPLES])
def test_every_example_is_a_job(path):
    assert load_job_file(path).base_model


def test_the_least_job_has_the_defaults_of_the_protos():
    spec = parse()
    assert spec.adapter.rank == 16
    assert spec.adapter.alpha is None
    assert spec.algorithm.advantage == "grpo"
    assert (spec.algorithm.group_size, spec.algorithm.groups_per_step) == (8, 32)
    assert (spec.algorithm.max_staleness, spec.algorithm.kl_coefficient) == (0, 0.0)
    assert (spec.algorithm.beta1, spec.algorithm.beta2) == (0.9, 0.95)
    assert (spec.algorithm.epsilon, spec.algorithm.weight_decay) == (1e-8, 0.0)
    assert spec.algorithm.max_grad_norm is None
    assert spec.algorithm.learning_rate.peak == 1e-4
    assert spec.algorithm.learning_rate.schedule == "constant"
    assert spec.sampling.temperature == 1.0
    assert (spec.sampling.min_p, spec.sampling.max_logprob_gap) == (None, None)
    assert (spec.sampling.logprobs_kind, spec.sampling.continue_on_newest) == ("policy", False)
    assert spec.seed == 0


NAN, INFINITY = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("changes", "field", "says"),
    [
        ({"base_model": ""}, "base_model", "at least 1 character"),
        ({"adapter": {"rank": 0}}, "adapter.rank", "greater than 0"),
        ({"adapter": {"rank": "big"}}, "adapter.rank", "valid integer"),
        ({"adapter": {"rank": True}}, "adapter.rank", "valid integer"),
        ({"adapter": {"alpha": 0}}, "adapter.alpha", "greater than 0"),
        ({"adapter": {"alpha": INFINITY}}, "adapter.alpha", "finite"),
        ({"adapter": {"id": "../x"}}, "adapter.id", "match pattern"),
        ({"adapter": {"id": "a\n"}}, "adapter.id", "match pattern"),
        ({"algorithm": {"learning_rate": {"peak": NAN}}}, "algorithm.learning_rate.peak", "finite"),
        ({"algorithm": {"learning_rate": {"peak": 0}}}, "algorithm.learning_rate.peak", "than 0"),
        ({"algorithm": {"learning_rate": {"peek": 1}}}, "algorithm.learning_rate.peek", "'peak'"),
        ({"algorithm": {"learning_rate": {"schedule": "step"}}},
         "algorithm.learning_rate.schedule", "'constant', 'linear' or 'cosine'"),
        ({"algorithm": {"group_size": 1}}, "algorithm.group_size", "than or equal to 2"),
        ({"algorithm": {"group_size": 1025}}, "algorithm.group_size", "than or equal to 1024"),
        ({"algorithm": {"groups_per_step": 0}}, "algorithm.groups_per_step", "greater than 0"),
        ({"algorithm": {"groups_per_step": 4097}}, "algorithm.groups_per_step", "equal to 4096"),
        ({"algorithm": {"groups_per_step": 4096, "group_size": 17}},
         "algorithm", "groups_per_step * group_size is 69,632; at most 65,536"),
        ({"algorithm": {"max_staleness": 10**9}}, "algorithm", "max_staleness"),
        ({"sft": {"completion": "a"}, "algorithm": {"groups_per_step": 4096, "max_staleness": 16}},
         "algorithm", "(max_staleness + 1) * groups_per_step is 69,632; at most 65,536"),
        ({"algorithm": {"max_staleness": -1}}, "algorithm.max_staleness", "equal to 0"),
        ({"algorithm": {"kl_coefficient": -0.1}}, "algorithm.kl_coefficient", "equal to 0"),
        ({"algorithm": {"kl_coefficient": NAN}}, "algorithm.kl_coefficient", "finite"),
        ({"algorithm": {"beta2": 1}}, "algorithm.beta2", "less than 1"),
        ({"algorithm": {"epsilon": 0}}, "algorithm.epsilon", "greater than 0"),
        ({"algorithm": {"advantage": "ppo"}}, "algorithm.advantage", "'rloo' or 'reinforce'"),
        ({"algorithm": {"loss": "dpo"}}, "algorithm.loss", "'gspo' or 'stable_reinforce'"),
        ({"algorithm": {"clip_low_threshold": 0.8}}, "algorithm.clip_low_threshold",
         "with the losses ppo, cispo, gspo, not with importance_sampling"),
        ({"algorithm": {"clip_high_threshold": 1.3}}, "algorithm.clip_high_threshold",
         "not with importance_sampling"),
        ({"algorithm": {"loss": "ppo", "clip_low_threshold": 1.1, "clip_high_threshold": 1}},
         "algorithm.clip_high_threshold", "1 is below clip_low_threshold, which is 1.1"),
        ({"algorithm": {"loss": "ppo", "clip_low_threshold": 1.3}},
         "algorithm.clip_high_threshold", "1.2 is below clip_low_threshold, which is 1.3"),
        ({"algorithm": {"loss": "gspo", "clip_high_threshold": 0.5}},
         "algorithm.clip_high_threshold", "0.5 is below clip_low_threshold, which is 0.9997"),
        ({"algorithm": {"loss": "cispo", "max_importance_ratio": 5}},
         "algorithm.max_importance_ratio", "not with cispo"),
        ({"algorithm": {"loss": "ppo", "max_importance_ratio": 1.1}},
         "algorithm.max_importance_ratio", "1.1 is below the ratio's upper bound, which is 1.2"),
        ({"algorithm": {"loss": "stable_reinforce", "max_importance_ratio": 0.9}},
         "algorithm.max_importance_ratio", "0.9 is below 1, with stable_reinforce it is at least"),
        ({"algorithm": {"loss": "stable_reinforce", "clip_high_threshold": 2}},
         "algorithm.clip_high_threshold", "not with stable_reinforce"),
        ({"algorithm": {"max_group_replacements": 101}}, "algorithm.max_group_replacements", "100"),
        ({"sft": {"completion": ""}}, "sft.completion", "at least 1 character"),
        ({"sft": {"completion": "a"}, "algorithm": {"loss": "ppo"}},
         "", "sft trains by cross-entropy, on nothing sampled: without algorithm.loss"),
        ({"sft": {"completion": "a"}, "sampling": {"max_logprob_gap": 1}},
         "", "without sampling.max_logprob_gap"),
        ({"distillation": {"coefficient": 0}}, "distillation.coefficient", "greater than 0"),
        ({"distillation": {"teacher_version": 1}}, "distillation", "needs teacher_adapter"),
        ({"distillation": {}, "sampling": {"logprobs_kind": "sampled", "temperature": 0.5}},
         "", "logprobs_kind must be 'policy'"),
        ({"curriculum": {}}, "curriculum", "at least one of min_reward and max_reward"),
        ({"curriculum": {"max_reward": 1, "revisit": 0}}, "curriculum.revisit", "greater than 0"),
        ({"sampling": {"temperature": 0}}, "sampling.temperature", "greater than 0"),
        ({"sampling": {"temperature": 2.1}}, "sampling.temperature", "less than or equal to 2"),
        ({"sampling": {"top_p": 1.1}}, "sampling.top_p", "less than or equal to 1"),
        ({"sampling": {"min_p": 1}}, "sampling.min_p", "less than 1"),
        ({"sampling": {"min_p": -0.1}}, "sampling.min_p", "equal to 0"),
        ({"sampling": {"min_p": NAN}}, "sampling.min_p", "finite"),
        ({"sampling": {"logprobs_kind": "raw"}}, "sampling.logprobs_kind", "'policy' or 'sampled'"),
        ({"sampling": {"max_logprob_gap": 0}}, "sampling.max_logprob_gap", "greater than 0"),
        ({"sampling": {"max_logprob_gap": INFINITY}}, "sampling.max_logprob_gap", "finite"),
        ({"sampling": {"max_tokens": 0}}, "sampling.max_tokens", "greater than 0"),
        ({"sampling": {"stop": [""]}}, "sampling.stop[0]", "at least 1 character"),
        ({"sampling": {"stop": ["a"] * 17}}, "sampling.stop", "at most 16"),
        ({"stop": {"max_steps": 0}}, "stop.max_steps", "greater than 0"),
        ({"stop": {}}, "stop.max_steps", "required, but absent"),
        ({"stop": {"max_steps": 1, "evaluation_reward": NAN}}, "stop.evaluation_reward", "finite"),
        ({"prompt": {"messages": [{"role": "robot", "content": ""}]}},
         "prompt.messages[0].role", "'system', 'user' or 'assistant'"),
        ({"dataset": {"tasks": [{"fields": {"a": 1}}]}}, "dataset.tasks[0].fields.a", "string"),
        ({"algoritm": {}}, "algoritm", "did you mean 'algorithm'?"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_refused_by_its_key(changes, field, says):
    with pytest.raises(InvalidRequest) as caught:
        parse(**changes)
    assert caught.value.context["field"] == field
    assert f"{field}: " in str(caught.value) or not field
    assert says in str(caught.value)


TASKS = [{"fields": {"question": "1+1"}}]
GENERATOR = {"name": "arithmetic"}
MESSAGES = [{"role": "user", "content": "{question}"}]


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        pytest.param({"dataset": {}}, "dataset", id="no source"),
        pytest.param({"dataset": {"tasks": []}}, "dataset", id="no tasks"),
        pytest.param({"dataset": {"tasks": TASKS, "generator": GENERATOR}}, "dataset", id="two"),
        pytest.param({"dataset": {"tasks": TASKS, "jsonl": "a.jsonl"}}, "dataset", id="two others"),
        pytest.param({"evaluation": {"dataset": {}}}, "evaluation.dataset", id="nothing held out"),
        pytest.param({"prompt": {}}, "prompt", id="no prompt"),
        pytest.param({"prompt": {"text": ""}}, "prompt", id="empty prompt"),
        pytest.param({"prompt": {"text": "a", "messages": MESSAGES}}, "prompt", id="two prompts"),
    ],
)
def test_of_several_forms_exactly_one_is_given(changes, field):
    with pytest.raises(InvalidRequest, match=f"{field}: exactly one of") as caught:
        parse(**changes)
    assert caught.value.context["field"] == field


@pytest.mark.parametrize("dataset", [{"tasks": TASKS}, {"generator": GENERATOR}])
@pytest.mark.parametrize("prompt", [{"text": "a"}, {"messages": MESSAGES}])
def test_each_form_is_enough(dataset, prompt):
    assert parse(dataset=dataset, prompt=prompt)


SAMPLED = {"logprobs_kind": "sampled", "temperature": 0.7}


@pytest.mark.parametrize(
    ("cuts", "named"),
    [
        ({"top_k": 5}, "top_k"),
        ({"top_p": 0.9}, "top_p"),
        ({"min_p": 0.01}, "min_p"),
        ({"top_k": 5, "top_p": 0.9, "min_p": 0.01}, "top_k and top_p and min_p"),
    ],
)
def test_the_trainer_knows_no_distribution_that_is_cut_off(cuts, named):
    with pytest.raises(InvalidRequest, match=rf"goes without {named}: the trainer computes") as e:
        parse(sampling={**SAMPLED, **cuts})
    assert e.value.context["field"] == "sampling"
    assert parse(sampling={**SAMPLED, **cuts, "logprobs_kind": "policy"})


@pytest.mark.parametrize("cuts", [{}, {"top_p": 1.0}, {"min_p": 0.0}])
def test_what_cuts_nothing_off_goes_with_sampled_logprobs(cuts):
    assert parse(sampling={**SAMPLED, **cuts}).sampling.logprobs_kind == "sampled"


def test_only_a_job_with_staleness_may_continue_on_the_newest():
    moving = {"continue_on_newest": True}
    with pytest.raises(InvalidRequest, match=r"needs algorithm\.max_staleness of at least 1"):
        parse(sampling=moving)
    with pytest.raises(InvalidRequest, match=r"needs algorithm\.max_staleness"):
        parse(sampling=moving, algorithm={"max_staleness": 0})
    assert parse(sampling=moving, algorithm={"max_staleness": 1}).sampling.continue_on_newest


def test_of_a_task_that_is_shown_there_is_one_rollout_whatever_the_group_size_says():
    most = {"groups_per_step": 4096, "max_staleness": 15}
    assert parse(sft={"completion": "a"}, algorithm=most).algorithm.groups_per_step == 4096


def test_a_job_that_only_shows_tasks_needs_no_sampler():
    shown = {"sft": {"completion": "a"}}
    assert not parse(**shown).needs_sampler
    assert parse(**shown, evaluation={"dataset": {"tasks": TASKS}}).needs_sampler
    assert parse().needs_sampler


def test_a_stop_by_evaluation_needs_an_evaluation():
    stop = {"max_steps": 1, "evaluation_reward": 0.9}
    with pytest.raises(InvalidRequest, match=r"stop\.evaluation_reward needs evaluation"):
        parse(stop=stop)
    assert parse(stop=stop, evaluation={"dataset": {"tasks": TASKS}}).evaluation is not None


def test_a_job_file_takes_its_tasks_from_the_files_beside_it(tmp_path):
    folder = tmp_path / "jobs"
    folder.mkdir()
    (folder / "train.jsonl").write_text('{"question": "1+1", "answer": 2}\n\n{"question": "2"}\n')
    (folder / "test.jsonl").write_text('{"question": "ü", "easy": true, "share": 0.5}\n')
    (folder / "job.yaml").write_text(
        json.dumps(
            MINIMAL
            | {
                "dataset": {"jsonl": "train.jsonl"},
                "evaluation": {"dataset": {"jsonl": "test.jsonl"}, "max_tasks": 3},
            }
        )
    )
    spec = load_job_file(folder / "job.yaml")
    assert spec.dataset.jsonl is None
    assert spec.dataset.tasks == [
        Task(fields={"question": "1+1", "answer": "2"}),
        Task(fields={"question": "2"}),
    ]
    assert spec.evaluation.dataset.tasks == [
        Task(fields={"question": "ü", "easy": "true", "share": "0.5"})
    ]
    assert spec.evaluation.max_tasks == 3


@pytest.mark.parametrize(
    ("text", "says"),
    [
        pytest.param(
            '{"a": "1"}\n{"a": }\n', ":2: not JSON: Expecting value at column 7", id="bad"
        ),
        pytest.param('\n\n{"a"\n', ":3: not JSON", id="blank lines count"),
        pytest.param("[1]\n", ":1: a JSON object is needed, found list", id="list"),
        pytest.param('{"a": [1]}\n', ":1: 'a' must be text, a number or a boolean", id="nested"),
        pytest.param('{"a": null}\n', ":1: 'a' must be text, a number or a boolean", id="null"),
        pytest.param("", ": no tasks in it", id="empty"),
        pytest.param("\n \n", ": no tasks in it", id="blank"),
    ],
)
def test_a_bad_line_is_named_by_its_number(tmp_path, text, says):
    path = tmp_path / "tasks.jsonl"
    path.write_text(text)
    with pytest.raises(InvalidRequest) as caught:
        read_jsonl(path)
    assert str(caught.value).startswith(f"{path}{says}")
    assert caught.value.context["field"] == "dataset.jsonl"


def test_a_line_is_what_ends_with_a_newline_and_nothing_else(tmp_path):
    path = tmp_path / "tasks.jsonl"
    path.write_text(json.dumps({"a": "x\u2028y\x85z"}, ensure_ascii=False) + "\n")
    assert read_jsonl(path) == [Task(fields={"a": "x\u2028y\x85z"})]


def test_an_absent_or_unreadable_dataset_is_refused_by_its_name(tmp_path):
    binary = tmp_path / "binary.jsonl"
    binary.write_bytes(b"\xff\n")
    for path in (tmp_path / "absent.jsonl", binary):
        with pytest.raises(InvalidRequest) as caught:
            read_jsonl(path)
        assert str(caught.value).startswith(f"{path}: ")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (3.0, 3),
        (3.5, 3.5),
        ("3.0", "3.0"),
        (True, True),
        (None, None),
        (1e300, int(1e300)),
        ({"a": [1.0, {"b": 2.0}]}, {"a": [1, {"b": 2}]}),
    ],
)
def test_whole_numbers_are_integers_again(value, expected):
    found = whole_numbers(value)
    assert found == expected
    assert type(found) is type(expected)
