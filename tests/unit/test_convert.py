"""Every value survives the wire; what a message cannot mean is refused by the name of its field."""

from __future__ import annotations

import math

import numpy as np
import pytest
from google.protobuf import text_format
from google.protobuf.struct_pb2 import Struct
from hypothesis import given, settings
from hypothesis import strategies as st

from rollmesh import convert, job, types
from rollmesh.api.common.v1 import export_pb2, policy_pb2, tensor_pb2, training_pb2
from rollmesh.api.coordinator.v1 import adapter_service_pb2, job_pb2
from rollmesh.api.sampler.v1 import sampler_service_pb2
from rollmesh.api.trainer.v1 import trainer_service_pb2
from rollmesh.errors import InvalidRequest

INT32 = st.integers(-(2**31), 2**31 - 1)
INT64 = st.integers(-(2**63), 2**63 - 1)
COUNTS = st.integers(0, 2**31 - 1)
FLOATS = st.floats(allow_nan=False)
FLOAT32S = st.floats(allow_nan=False, width=32)
# Unix seconds to the microsecond: clocks in use here are no finer.
TIMES = st.integers(0, 4 * 10**15).map(lambda microseconds: microseconds / 1e6)
TEXTS = st.text(max_size=8)
LOSSES = ("cross_entropy", "importance_sampling", "ppo", "cispo", "dro", "gspo",
          "stable_reinforce")  # fmt: skip
SPANS = st.builds(types.PolicySpan, COUNTS, INT64, TEXTS)
SOURCES = st.builds(types.AdapterSource, TEXTS, INT64, TEXTS, TEXTS)
LORAS = st.builds(
    types.LoraConfig, INT32, st.none() | FLOATS, st.lists(TEXTS, max_size=3).map(tuple), INT64
)


def tuples(elements: st.SearchStrategy) -> st.SearchStrategy:
    return st.lists(elements, max_size=3).map(tuple)


ROUND_TRIPS = {
    "lora": (convert.lora_to_pb, convert.lora_from_pb, LORAS),
    "policy": (
        convert.policy_to_pb,
        convert.policy_from_pb,
        st.builds(types.PolicyRef, TEXTS, TEXTS, st.none() | INT64),
    ),
    "span": (convert.span_to_pb, convert.span_from_pb, SPANS),
    "source": (convert.source_to_pb, convert.source_from_pb, SOURCES),
    "params": (
        convert.params_to_pb,
        convert.params_from_pb,
        st.builds(
            types.SamplingParams,
            max_tokens=st.none() | INT32,
            temperature=st.none() | FLOATS,
            top_k=st.none() | INT32,
            top_p=st.none() | FLOATS,
            seed=st.none() | INT64,
            stop=tuples(TEXTS),
            stop_token_ids=tuples(INT32),
            ignore_eos=st.booleans(),
            top_logprobs=st.none() | INT32,
        ),
    ),
    "chunk": (
        convert.chunk_to_pb,
        convert.chunk_from_pb,
        st.builds(
            types.CompletionChunk,
            COUNTS,
            tuples(INT32),
            tuples(FLOAT32S),
            tuples(SPANS),
            st.sampled_from([None, "stop", "length"]),
        ),
    ),
    "logprobs": (
        convert.logprobs_to_pb,
        convert.logprobs_from_pb,
        st.builds(types.Logprobs, tuples(FLOAT32S), SPANS),
    ),
    "loss": (
        convert.loss_to_pb,
        convert.loss_from_pb,
        st.builds(
            types.LossConfig,
            st.sampled_from(LOSSES),
            kl_coefficient=st.none() | FLOATS,
            clip_low_threshold=st.none() | FLOATS,
            clip_high_threshold=st.none() | FLOATS,
            beta=st.none() | FLOATS,
            max_importance_ratio=st.none() | FLOATS,
            entropy=st.booleans(),
            temperature=st.none() | FLOATS,
            max_sequence_ratio=st.none() | FLOATS,
            sampler_kl_coefficient=st.none() | FLOATS,
        ),
    ),
    "adam": (
        convert.adam_to_pb,
        convert.adam_from_pb,
        st.builds(
            types.AdamConfig, FLOATS, FLOATS, FLOATS, FLOATS, FLOATS, st.none() | FLOATS
        ),
    ),
    "export header": (
        convert.export_header_to_pb,
        convert.export_header_from_pb,
        st.builds(types.AdapterExport, TEXTS, INT64, TEXTS, TEXTS, INT64),
    ),
    "trainer's adapter": (
        convert.trainer_adapter_to_pb,
        convert.trainer_adapter_from_pb,
        st.builds(types.TrainerAdapter, TEXTS, LORAS, INT64, INT64, st.booleans()),
    ),
    "trainer": (
        convert.trainer_info_to_pb,
        convert.trainer_info_from_pb,
        st.builds(
            types.TrainerInfo, TEXTS, COUNTS, COUNTS, COUNTS, COUNTS, COUNTS, tuples(TEXTS), COUNTS
        ),
    ),
    "sampler": (
        convert.sampler_info_to_pb,
        convert.sampler_info_from_pb,
        st.builds(
            types.SamplerInfo, TEXTS, COUNTS, COUNTS, TEXTS, COUNTS, tuples(SOURCES), COUNTS
        ),
    ),
    "adapter": (
        convert.adapter_to_pb,
        convert.adapter_from_pb,
        st.builds(
            types.Adapter, TEXTS, TEXTS, LORAS, INT64, st.none() | INT64, TEXTS, INT64, TIMES, TEXTS
        ),
    ),
    "fleet": (
        convert.fleet_to_pb,
        convert.fleet_from_pb,
        st.builds(
            types.Fleet,
            tuples(
                st.builds(
                    types.Member,
                    st.sampled_from(["trainer", "sampler", "reward"]),
                    TEXTS,
                    st.booleans(),
                    TEXTS,
                    TEXTS,
                    COUNTS,
                    COUNTS,
                    TIMES,
                    TEXTS,
                )
            ),
            COUNTS,
        ),
    ),
    "record": (
        convert.record_to_pb,
        convert.record_from_pb,
        st.builds(types.Record, TEXTS, st.binary(max_size=8), INT64, TIMES, st.none() | TIMES),
    ),
    "key": (
        convert.key_to_pb,
        convert.key_from_pb,
        st.builds(types.Key, TEXTS, TEXTS, TEXTS, TIMES),
    ),
    "event": (
        convert.event_to_pb,
        convert.event_from_pb,
        st.builds(
            job.JobEvent,
            number=st.integers(1, 2**63 - 1),
            time=TIMES,
            event=st.one_of(
                st.builds(job.StateChanged, reason=TEXTS),
                st.builds(
                    job.StepCompleted,
                    step=st.integers(1, 2**31 - 1),
                    policy_version=st.integers(0, 2**63 - 1),
                    metrics=st.dictionaries(TEXTS, FLOATS, max_size=3),
                    phases=st.dictionaries(TEXTS, FLOATS, max_size=3),
                ),
                st.builds(
                    job.EvaluationCompleted,
                    step=COUNTS,
                    reward_mean=FLOATS,
                    num_tasks=COUNTS,
                    duration_s=FLOATS,
                ),
                st.builds(job.Warned, reason=TEXTS, message=TEXTS),
            ),
        ),
    ),
}  # fmt: skip


def over_the_wire(message):
    return type(message).FromString(message.SerializeToString())


@pytest.mark.parametrize("name", ROUND_TRIPS)
@settings(max_examples=40)
@given(data=st.data())
def test_a_value_survives_the_wire(name, data):
    to_pb, from_pb, values = ROUND_TRIPS[name]
    value = data.draw(values)
    assert from_pb(over_the_wire(to_pb(value))) == value


@given(
    items=st.lists(st.builds(types.ScoreItem, TEXTS, TEXTS, TEXTS), max_size=3),
    arrays=st.lists(st.lists(FLOAT32S, max_size=3), max_size=3),
)
def test_lists_survive_the_wire(items, arrays):
    assert convert.score_items_from_pb(convert.score_items_to_pb(items)) == items
    vectors = [np.array(array, dtype=np.float32) for array in arrays]
    assert [list(v) for v in convert.arrays_from_pb(convert.arrays_to_pb(vectors))] == arrays


def test_a_first_logprob_of_nan_survives_the_wire():
    result = types.Logprobs((math.nan, -0.5), types.PolicySpan(2, types.BASE_VERSION, ""))
    found = convert.logprobs_from_pb(over_the_wire(convert.logprobs_to_pb(result)))
    assert math.isnan(found.logprobs[0])
    assert found.logprobs[1:] == (-0.5,)
    assert found.span == result.span


PLAIN = st.recursive(
    st.none() | st.booleans() | TEXTS | st.integers(-(2**53), 2**53) | st.floats(-1e9, 1e9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=5,
)


@given(values=st.dictionaries(TEXTS, PLAIN, max_size=3))
def test_parameters_survive_the_wire(values):
    found = convert.struct_from_pb(over_the_wire(convert.struct_to_pb(values)))
    assert found == values


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_parameter_that_json_cannot_say_is_refused(value):
    message = Struct()
    message["deep"] = {"er": [value]}
    with pytest.raises(InvalidRequest, match="finite") as caught:
        convert.struct_from_pb(message)
    assert caught.value.context["field"] == "parameters"
    spec = job_pb2.JobSpec(reward=job_pb2.RewardSpec(function="f", parameters=message))
    with pytest.raises(InvalidRequest, match="finite"):
        convert.spec_from_pb(spec)


@given(microseconds=st.integers(0, 4 * 10**15))
def test_times_survive_the_wire_to_the_microsecond(microseconds):
    found = convert.time_from_pb(over_the_wire(convert.time_to_pb(microseconds / 1e6)))
    assert round(found * 1e6) == microseconds


# --- tensors -------------------------------------------------------------------------------------


@given(length=st.integers(1, 5), present=st.sets(st.sampled_from(["weights", "advantages"])))
def test_a_datum_survives_the_wire_bit_for_bit(length, present):
    rng = np.random.default_rng(length)
    datum = types.Datum(
        token_ids=rng.integers(0, 2**31, length).astype(np.int32),
        target_token_ids=rng.integers(0, 2**31, length).astype(np.int32),
        **{name: rng.standard_normal(length).astype(np.float32) for name in present},
    )
    (found,) = convert.data_from_pb([over_the_wire(convert.datum_to_pb(datum))])
    for name in ("token_ids", "target_token_ids", "weights", "sampling_logprobs", "advantages"):
        before, after = getattr(datum, name), getattr(found, name)
        if before is None:
            assert after is None
        else:
            assert after.dtype == before.dtype
            assert after.tobytes() == before.tobytes()


def test_tensors_are_little_endian_and_row_major():
    assert convert.tensor_to_pb([1.0]).data == b"\x00\x00\x80\x3f"
    assert convert.tensor_to_pb([258], "<i4").data == b"\x02\x01\x00\x00"
    columns = np.asfortranarray([[1, 2], [3, 4]])
    assert list(np.frombuffer(convert.tensor_to_pb(columns).data, "<f4")) == [1, 2, 3, 4]


FLOAT32, INT32_TYPE = tensor_pb2.DATA_TYPE_FLOAT32, tensor_pb2.DATA_TYPE_INT32


@pytest.mark.parametrize(
    ("message", "field"),
    [
        pytest.param(tensor_pb2.Tensor(), "x.dtype", id="nothing"),
        pytest.param(tensor_pb2.Tensor(shape=[1], data=b"1234"), "x.dtype", id="no dtype"),
        pytest.param(
            tensor_pb2.Tensor(dtype=INT32_TYPE, shape=[1], data=b"1234"), "x.dtype", id="other"
        ),
        pytest.param(
            tensor_pb2.Tensor(dtype=tensor_pb2.DATA_TYPE_BFLOAT16, shape=[2], data=b"1234"),
            "x.dtype",
            id="bfloat16",
        ),
        pytest.param(
            tensor_pb2.Tensor.FromString(b"\x08\x63"), "x.dtype", id="dtype of a newer protocol"
        ),
        pytest.param(tensor_pb2.Tensor(dtype=FLOAT32, shape=[1]), "x", id="no bytes"),
        pytest.param(tensor_pb2.Tensor(dtype=FLOAT32, shape=[2], data=b"1234"), "x", id="few"),
        pytest.param(tensor_pb2.Tensor(dtype=FLOAT32, shape=[0], data=b"1234"), "x", id="many"),
        pytest.param(tensor_pb2.Tensor(dtype=FLOAT32, shape=[1], data=b"123"), "x", id="torn"),
        pytest.param(tensor_pb2.Tensor(dtype=FLOAT32, shape=[-1], data=b"1234"), "x", id="minus"),
        pytest.param(tensor_pb2.Tensor(dtype=FLOAT32, data=b"1234"), "x", id="scalar"),
        pytest.param(
            tensor_pb2.Tensor(dtype=FLOAT32, shape=[1, 1], data=b"1234"), "x", id="matrix"
        ),
        pytest.param(
            tensor_pb2.Tensor(dtype=FLOAT32, shape=[2**62], data=b""), "x", id="absurd shape"
        ),
    ],
)
def test_a_bad_tensor_is_refused_by_its_field(message, field):
    with pytest.raises(InvalidRequest) as caught:
        convert.tensor_from_pb(message, field="x", dtype="<f4")
    assert caught.value.context["field"] == field


@pytest.mark.parametrize("name", ["token_ids", "target_token_ids", "weights", "advantages"])
def test_a_bad_tensor_in_a_batch_is_named_by_its_index(name):
    good = convert.datum_to_pb(types.Datum(np.zeros(1, np.int32), np.zeros(1, np.int32)))
    bad = training_pb2.Datum()
    bad.CopyFrom(good)
    getattr(bad, name).CopyFrom(tensor_pb2.Tensor(dtype=FLOAT32, shape=[9], data=b"1234"))
    with pytest.raises(InvalidRequest) as caught:
        convert.data_from_pb([good, bad])
    assert caught.value.context["field"].startswith(f"data[1].{name}")


def test_a_datum_without_its_tokens_is_refused():
    with pytest.raises(InvalidRequest) as caught:
        convert.data_from_pb([training_pb2.Datum()])
    assert caught.value.context["field"] == "data[0].token_ids.dtype"


@pytest.mark.parametrize("num_top", [0, 1, 3])
def test_the_likeliest_tokens_survive_the_wire_row_by_row(num_top):
    ids = ((5, 3, -1)[:num_top], (7, 1, 2)[:num_top])
    values = ((-0.5, -1.0, -math.inf)[:num_top], (-0.25, -2.0, -3.0)[:num_top])
    chunk = types.CompletionChunk(
        1, (4, 7), (-2.0, -0.25), (types.PolicySpan(2, 0, "d"),), None, None, ids, values
    )
    sent = convert.chunk_to_pb(chunk)
    assert list(sent.top_token_ids.shape) == list(sent.top_logprobs.shape) == [2, num_top]
    assert convert.chunk_from_pb(sent) == chunk


def test_where_no_likeliest_were_asked_for_none_are_sent():
    sent = convert.chunk_to_pb(types.CompletionChunk(0, (4,), (-2.0,), ()))
    assert not sent.HasField("top_token_ids")
    assert not sent.HasField("top_logprobs")


def test_no_logprobs_are_no_logprobs():
    assert convert.floats_from_pb(tensor_pb2.Tensor()) == ()
    assert convert.floats_from_pb(convert.tensor_to_pb([])) == ()


# --- absence, enums, parts -----------------------------------------------------------------------


@pytest.mark.parametrize("number", [training_pb2.LOSS_UNSPECIFIED, 99])
def test_a_loss_that_is_none_is_refused_with_those_that_are(number):
    with pytest.raises(InvalidRequest, match="cross_entropy, importance_sampling") as caught:
        convert.loss_from_pb(training_pb2.LossConfig(loss=number))
    assert caught.value.context == {
        "field": "loss_config.loss",
        "value": str(number),
        "allowed": ", ".join(LOSSES),
    }


def test_an_unknown_loss_is_refused_before_it_is_sent():
    with pytest.raises(InvalidRequest, match="hinge is not one of cross_entropy") as caught:
        convert.loss_to_pb(types.LossConfig("hinge"))
    assert caught.value.context["field"] == "loss_config.loss"


def test_every_loss_has_a_number_of_its_own():
    numbers = {convert.loss_to_pb(types.LossConfig(loss)).loss for loss in LOSSES}
    assert numbers | {training_pb2.LOSS_UNSPECIFIED} == set(training_pb2.Loss.values())


def test_an_option_of_a_loss_that_was_not_given_is_not_sent():
    sent = convert.loss_to_pb(types.LossConfig("ppo", clip_low_threshold=0.0))
    assert {field.name for field, _ in sent.ListFields()} == {"loss", "clip_low_threshold"}
    assert convert.loss_from_pb(sent) == types.LossConfig("ppo", clip_low_threshold=0.0)


def test_what_is_absent_has_the_default_of_the_protos():
    assert convert.adam_from_pb(training_pb2.AdamConfig(learning_rate=1)) == types.AdamConfig(1)
    assert convert.lora_from_pb(policy_pb2.LoraConfig(rank=8)) == types.LoraConfig(8)
    assert convert.policy_from_pb(policy_pb2.PolicyRef()) == types.PolicyRef()
    assert convert.params_from_pb(convert.params_to_pb(types.SamplingParams())) == (
        types.SamplingParams()
    )


def test_a_zero_that_was_given_is_not_absent():
    policy = types.PolicyRef(adapter="a", policy_version=0)
    assert convert.policy_from_pb(convert.policy_to_pb(policy)).policy_version == 0
    params = types.SamplingParams(temperature=0.0, seed=0)
    assert convert.params_from_pb(convert.params_to_pb(params)) == params


def test_a_request_without_a_source_is_for_the_base_model():
    request = sampler_service_pb2.SampleRequest()
    assert convert.optional_source_from_pb(request) is None
    source = types.AdapterSource("projects/p/adapters/a", 3, "d", "h:1")
    request = sampler_service_pb2.SampleRequest(source=convert.source_to_pb(source))
    assert convert.optional_source_from_pb(request) == source


@pytest.mark.parametrize("response", [
    trainer_service_pb2.ExportAdapterResponse, adapter_service_pb2.ExportAdapterResponse
])  # fmt: skip
def test_the_parts_of_an_export_are_told_apart(response):
    header = types.AdapterExport("a", 1, "m", "{}", 3)
    parts = [
        response(header=convert.export_header_to_pb(header)),
        response(chunk=b"abc"),
        response(chunk=b""),
        response(trailer=export_pb2.AdapterExportTrailer(digest="d")),
    ]
    assert list(map(convert.export_part_from_pb, parts)) == [header, b"abc", b"", "d"]


# --- jobs ----------------------------------------------------------------------------------------

MINIMAL = {
    "base_model": "arith",
    "dataset": {"generator": {"name": "arithmetic"}},
    "prompt": {"text": "{question}="},
    "reward": {"function": "exact_match"},
    "stop": {"max_steps": 1},
}
FULL = {
    "base_model": "arith",
    "adapter": {"id": "a", "rank": 4, "alpha": 2.5, "target_modules": ["q_proj"], "seed": 2**62},
    "dataset": {"tasks": [{"fields": {"question": "NaN", "answer": "5"}}]},
    "prompt": {"messages": [{"role": "user", "content": "{question}"}]},
    "reward": {"function": "f", "parameters": {"a": [1, 0.5, {"b": None}]}, "reference": "NaN"},
    "algorithm": {
        "advantage": "rloo",
        "group_size": 2,
        "groups_per_step": 3,
        "max_staleness": 1,
        "learning_rate": {"peak": 0.1, "schedule": "cosine", "warmup_steps": 2, "final": 0.01},
        "kl_coefficient": 0.5,
        "max_grad_norm": 1.0,
        "beta1": 0.0,
        "beta2": 0.5,
        "epsilon": 1e-5,
        "weight_decay": 0.1,
    },
    "sampling": {"max_tokens": 5, "temperature": 0.5, "top_k": 3, "top_p": 0.9, "stop": ["\n"]},
    "stop": {"max_steps": 7, "evaluation_reward": 0.75},
    "evaluation": {
        "every_steps": 2,
        "dataset": {"generator": {"name": "g", "parameters": {"count": 9}}},
        "max_tasks": 4,
    },
    "seed": -(2**63),
}
SPECS = [
    pytest.param(MINIMAL, id="minimal"),
    pytest.param(FULL, id="full"),
    pytest.param(MINIMAL | {"adapter": {"rank": 16}, "seed": 0}, id="defaults written out"),
    pytest.param(MINIMAL | {"prompt": {"text": "Infinity"}}, id="text that JSON means otherwise"),
    pytest.param(
        MINIMAL
        | {
            "algorithm": {"max_staleness": 2},
            "sampling": {
                "logprobs_kind": "sampled",
                "min_p": 0.0,
                "continue_on_newest": True,
                "max_logprob_gap": 1e-4,
            },
        },
        id="how samplers and trainer agree",
    ),
]


@pytest.mark.parametrize("values", SPECS)
def test_a_job_spec_survives_the_wire(values):
    spec = job.JobSpec.parse(values, source="test")
    assert convert.spec_from_pb(over_the_wire(convert.spec_to_pb(spec))) == spec


@pytest.mark.parametrize("values", SPECS)
def test_only_what_was_set_is_sent(values):
    message = convert.spec_to_pb(job.JobSpec.parse(values, source="test"))
    assert {field.name for field, _ in message.ListFields()} == set(values)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"seed": 2**63}, "seed"),
        ({"adapter": {"rank": 2**31}}, "rank"),
        ({"reward": {"function": "f", "parameters": {"a": 10**400}}}, "too large"),
    ],
)
def test_a_number_that_does_not_fit_its_field_is_refused_before_it_is_sent(changes, says):
    spec = job.JobSpec.parse(MINIMAL | changes, source="test")
    with pytest.raises(InvalidRequest, match=says):
        convert.spec_to_pb(spec)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ("adapter { rank: 0 }", "adapter.rank"),
        ("adapter { alpha: nan }", "adapter.alpha"),
        ("algorithm { learning_rate { peak: nan } }", "algorithm.learning_rate.peak"),
        ("algorithm { kl_coefficient: inf }", "algorithm.kl_coefficient"),
        ("sampling { temperature: -inf }", "sampling.temperature"),
        ("stop { max_steps: 1 evaluation_reward: nan }", "stop.evaluation_reward"),
        ("stop { }", "stop.max_steps"),
        ("base_model: ''", "base_model"),
        ("prompt { messages { role: 'robot' } }", "prompt.messages[0].role"),
        ("dataset { tasks { } }", "dataset"),
    ],
)
def test_a_spec_that_is_wrong_is_refused_by_its_key(change, field):
    message = convert.spec_to_pb(job.JobSpec.parse(MINIMAL, source="test"))
    message.ClearField(field.partition(".")[0])
    text_format.Merge(change, message)
    with pytest.raises(InvalidRequest) as caught:
        convert.spec_from_pb(over_the_wire(message))
    assert caught.value.context["field"].startswith(field)


@pytest.mark.parametrize("field", ["base_model", "dataset", "stop"])
def test_a_spec_without_what_it_needs_is_refused(field):
    message = convert.spec_to_pb(job.JobSpec.parse(MINIMAL, source="test"))
    message.ClearField(field)
    with pytest.raises(InvalidRequest, match=f"{field}: required, but absent"):
        convert.spec_from_pb(message)


IN_WORLD = {
    "base_model": "m",
    "environment": {"name": "world"},
    "dataset": {"split": "train"},
    "stop": {"max_steps": 1},
}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        pytest.param({}, "", id="as it should be"),
        pytest.param(
            {"environment": None, "reward": {"function": "f"}}, "prompt is needed", id="no prompt"
        ),
        pytest.param(
            {"environment": None, "prompt": {"text": "x"}, "reward": {"function": "f"}},
            "a split is one of an environment's, and there is none",
            id="a split of nothing",
        ),
        pytest.param(
            {"dataset": {"tasks": [{"fields": {}}]}},
            "with environment each dataset is a split",
            id="tasks of its own",
        ),
        pytest.param(
            {"evaluation": {"dataset": {"generator": {"name": "g"}}}},
            "with environment each dataset is a split",
            id="evaluated on other tasks",
        ),
        pytest.param(
            {"prompt": {"text": "x"}, "reward": {"function": "f"}},
            "without prompt, reward",
            id="prompt and reward beside it",
        ),
        pytest.param(
            {"dataset": {"split": "a", "tasks": [{"fields": {}}]}}, "exactly one", id="two sources"
        ),
        pytest.param({"environment": {"name": "A b"}}, "environment.name", id="no name"),
        pytest.param({"environment": {"name": "world", "max_turns": 0}}, "max_turns", id="no turn"),
    ],
)
def test_an_environment_goes_with_splits_of_its_own_and_nothing_else_that_scores(changes, says):
    values = {key: value for key, value in {**IN_WORLD, **changes}.items() if value is not None}
    if not says:
        spec = job.JobSpec.parse(values, source="test")
        assert convert.spec_from_pb(convert.spec_to_pb(spec)) == spec
        return
    with pytest.raises(InvalidRequest, match=says):
        job.JobSpec.parse(values, source="test")


@pytest.mark.parametrize(
    ("reward", "prompt", "says"),
    [
        ({"environment": "w"}, {"messages": [{"role": "user", "content": "x"}]}, ""),
        ({"environment": "w"}, {"text": "x"}, "it needs prompt.messages"),
        ({"environment": "w", "function": "f"}, {"text": "x"}, "exactly one of function and env"),
        ({}, {"text": "x"}, "exactly one of function and environment"),
        ({"environment": "w", "reference": "r"}, {"text": "x"}, "are a function's"),
    ],
)
def test_a_reward_is_by_a_function_or_by_an_environment_that_reads_chats(reward, prompt, says):
    values = {**MINIMAL, "reward": reward, "prompt": prompt}
    if not says:
        assert job.JobSpec.parse(values, source="test").reward.environment == "w"
        return
    with pytest.raises(InvalidRequest, match=says):
        job.JobSpec.parse(values, source="test")


def test_a_spec_without_a_reward_needs_something_else_to_learn_from():
    message = convert.spec_to_pb(job.JobSpec.parse(MINIMAL, source="test"))
    message.ClearField("reward")
    with pytest.raises(InvalidRequest, match="reward is needed, but with environment, sft"):
        convert.spec_from_pb(message)
    message.sft.completion = "{answer}"
    assert convert.spec_from_pb(message).reward is None


EVALUATION = job.EvaluationCompleted(step=0, reward_mean=0.25, num_tasks=100, duration_s=1.5)


@pytest.mark.parametrize("state", ["PENDING", "RUNNING", "PAUSED", "SUCCEEDED", "FAILED"])
@pytest.mark.parametrize("values", SPECS)
def test_a_job_survives_the_wire(values, state):
    before = job.Job(
        name="projects/p/jobs/j",
        spec=job.JobSpec.parse(values, source="test"),
        state=state,
        state_reason="why",
        create_time=1763900000.25,
        update_time=1763900001.125,
        adapter="projects/p/adapters/j",
        step=3,
        metrics={"reward_mean": 0.5, "loss": -1e-9},
        first_evaluation=EVALUATION,
        last_evaluation=None,
        last_event=2**40,
    )
    assert convert.job_from_pb(over_the_wire(convert.job_to_pb(before))) == before


def test_every_state_has_a_number_of_its_own():
    states = set(job.FINAL_STATES) | {"PENDING", "RUNNING", "PAUSED"}
    assert {f"JOB_STATE_{state}" for state in states} | {"JOB_STATE_UNSPECIFIED"} == set(
        job_pb2.JobState.keys()
    )
