"""The Tinker wire's codecs against the SDK's own, either way."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from google.protobuf import descriptor as descriptors
from hypothesis import given
from tinker import types as sdk
from tinker.proto import tinker_public_pb2
from tinker.proto.request_conv import forward_backward_request_to_proto
from tinker.proto.response_conv import (
    deserialize_forward_backward_output,
    deserialize_sample_response,
)
from tinker.types.forward_backward_input import ForwardBackwardInput
from tinker.types.forward_backward_request import ForwardBackwardRequest

from rollmesh.api.common.v1 import sampling_pb2, tensor_pb2, training_pb2
from rollmesh.api.coordinator.v1 import future_service_pb2
from rollmesh.api.tinker.v1 import tinker_pb2 as pb
from rollmesh.convert.tensors import tensor_to_pb
from rollmesh.errors import InvalidRequest, NotFound, Unimplemented
from services.gateway.wire import batches, bodies, ids, tensors, tickets
from services.gateway.wire.batches import data_of
from services.gateway.wire.losses import config_of, loss_of
from services.gateway.wire.outputs import forward_backward_output, runs_of
from services.gateway.wire.paths import CheckpointPath
from services.gateway.wire.samples import Sample, sample_request, sample_response

UNUSED = {"StopStrings", "StopTokens", "SamplingParams"}
"""Messages of the SDK's that it never sends."""

finite = st.floats(-100, 100, width=32)
tokens = st.integers(0, 2**31 - 1)


def test_the_binary_bodies_are_the_sdks_field_by_field():
    theirs = tinker_public_pb2.DESCRIPTOR.message_types_by_name
    ours = pb.DESCRIPTOR.message_types_by_name
    assert set(ours) == set(theirs) - UNUSED

    def shape(message):
        return {
            (
                field.name,
                field.number,
                # Enums are numbers on the wire, and may be integers here.
                field.TYPE_INT32 if field.type == field.TYPE_ENUM else field.type,
                field.is_repeated,
                field.has_presence,
                field.containing_oneof.name if field.containing_oneof else "",
                field.message_type.name if field.message_type else "",
            )
            for field in message.fields
        }

    for name, message in ours.items():
        assert shape(message) == shape(theirs[name]), name
        for nested in message.nested_types:  # the entries of maps
            assert shape(nested) == shape(theirs[name].nested_types_by_name[nested.name])
    assert isinstance(ours["Datum"], descriptors.Descriptor)


def encoded(data, loss="cross_entropy", config=None, **changes):
    """What the SDK puts on the wire."""
    request = ForwardBackwardRequest(
        model_id="s0123456789abcdef:train:0",
        seq_id=1,
        forward_backward_input=ForwardBackwardInput(data=data, loss_fn=loss, loss_fn_config=config),
    )
    message = pb.ForwardBackwardRequest.FromString(
        forward_backward_request_to_proto(request).SerializeToString()
    )
    for name, value in changes.items():
        setattr(message, name, value)
    return message


def read(message, max_columns=8):
    return data_of(message, loss_of(message), max_columns=max_columns)


def array(tensor, dtype="<f4"):
    return np.frombuffer(tensor.data, dtype)


def datum(prompt, **inputs):
    return sdk.Datum(model_input=sdk.ModelInput.from_ints(prompt), loss_fn_inputs=inputs)


@st.composite
def rectangles(draw):
    rows, columns = draw(st.integers(1, 6)), draw(st.integers(1, 5))
    cells = st.lists(tokens, min_size=columns, max_size=columns)
    weights = st.lists(st.just(0.0) | finite, min_size=columns, max_size=columns)
    return (
        draw(st.lists(tokens, min_size=rows, max_size=rows)),
        np.array(draw(st.lists(cells, min_size=rows, max_size=rows))),
        np.array(draw(st.lists(weights, min_size=rows, max_size=rows)), "f4"),
    )


@given(rectangles())
def test_columns_of_targets_are_data_with_the_same_tokens(drawn):
    prompt, targets, weights = drawn
    # As torch tensors the SDK writes them sparsely where that is shorter.
    for kind in (torch.tensor, lambda values: values):
        message = encoded([datum(prompt, target_tokens=kind(targets), weights=kind(weights))])
        data, columns = read(message)
        assert columns == [targets.shape[1]]
        assert len(data) == targets.shape[1]
        for index, made in enumerate(data):
            assert array(made.token_ids, "<i4").tolist() == prompt
            assert array(made.target_token_ids, "<i4").tolist() == targets[:, index].tolist()
            np.testing.assert_array_equal(array(made.weights), weights[:, index])


@given(st.lists(st.tuples(tokens, tokens, finite), min_size=1, max_size=20))
def test_vectors_arrive_as_they_were(rows):
    prompt, targets, weights = (list(column) for column in zip(*rows, strict=True))
    [made], columns = read(encoded([datum(prompt, target_tokens=targets, weights=weights)]))
    assert columns == [0]
    assert array(made.token_ids, "<i4").tolist() == prompt
    assert array(made.target_token_ids, "<i4").tolist() == targets
    np.testing.assert_array_equal(array(made.weights), np.array(weights, "f4"))


def policy_gradient(loss, config=None, *, spans=None, **inputs):
    given_inputs = {
        "target_tokens": [2, 3, 4, 5],
        "logprobs": [0.0, 1e-7, -1.0, 0.0],
        "advantages": [0.0, 0.0, 2.0, 3.0],
        **inputs,
    }
    made = sdk.Datum(
        model_input=sdk.ModelInput.from_ints([1, 2, 3, 4]),
        loss_fn_inputs={k: v for k, v in given_inputs.items() if v is not None},
        model_input_spans=spans,
        loss_fn_input_spans=spans,
    )
    return encoded([made], loss, config)


@pytest.mark.parametrize("loss", ["importance_sampling", "ppo", "cispo", "stable_reinforce"])
def test_a_prompt_counts_for_nothing_where_it_has_no_part_in_the_formula(loss):
    [made], _ = read(policy_gradient(loss))
    # Above 0 by rounding alone is 0.
    assert array(made.sampling_logprobs).tolist() == [0, 0, -1, 0]
    assert array(made.advantages).tolist() == [0, 0, 2, 3]
    assert array(made.weights).tolist() == [0, 1, 1, 1]


@pytest.mark.parametrize("loss", ["dro", "gspo"])
def test_all_positions_count_where_the_formula_sums_over_all(loss):
    [made], _ = read(policy_gradient(loss))
    assert not made.HasField("weights")


def test_the_mask_of_gspo_says_what_counts():
    [made], _ = read(policy_gradient("gspo", sequence_ratio_mask=[0.0, 0.0, 1.0, 1.0]))
    assert array(made.weights).tolist() == [0, 0, 1, 1]


def test_samples_are_told_apart_by_their_spans():
    spans = [
        sdk.PromptProvenanceSpan(sequence_id="a", offset=0, length=1),
        sdk.SampledProvenanceSpan(sequence_id="a", offset=0, length=1),
        sdk.SampledProvenanceSpan(sequence_id="b", offset=0, length=2),
    ]
    [made], _ = read(policy_gradient("stable_reinforce", spans=spans))
    assert array(made.sequence_ids, "<i4").tolist() == [-1, 0, 1, 1]
    # The other losses let them pass.
    [made], _ = read(policy_gradient("ppo", spans=spans))
    assert not made.HasField("sequence_ids")


@pytest.mark.parametrize(
    ("loss", "given_config", "expected"),
    [
        ("ppo", {"clip_low_threshold": 0.9, "clip_high_threshold": 1.1}, (0.9, 1.1)),
        ("cispo", {"clip_high_threshold": 5.0}, (None, 5.0)),
        ("gspo", None, (None, None)),
    ],
)
def test_bounds_of_the_ratio_are_taken_over(loss, given_config, expected):
    message = policy_gradient(loss, given_config)
    config = config_of(message, loss_of(message))
    found = tuple(
        getattr(config, name) if config.HasField(name) else None
        for name in ("clip_low_threshold", "clip_high_threshold")
    )
    assert found == expected


def test_other_settings_have_the_meshs_names():
    message = policy_gradient("dro", {"beta": 0.1})
    assert config_of(message, loss_of(message)).beta == 0.1
    message = policy_gradient("stable_reinforce", {"kl_coeff": 0.2})
    config = config_of(message, loss_of(message))
    assert config.loss == training_pb2.LOSS_STABLE_REINFORCE
    assert config.sampler_kl_coefficient == 0.2


IMAGE = sdk.Datum(
    model_input=sdk.ModelInput(chunks=[sdk.ImageChunk(data=b"x", format="png")]),
    loss_fn_inputs={"target_tokens": [1]},
)


@pytest.mark.parametrize(
    ("message", "error", "said"),
    [
        pytest.param(encoded([datum([1], target_tokens=[2])], "nope"), InvalidRequest, "nope"),
        pytest.param(policy_gradient("ppo", {"beta": 1.0}), InvalidRequest, "beta"),
        pytest.param(policy_gradient("ppo", {"clip_low_threshold": "x"}), InvalidRequest, "'x'"),
        pytest.param(policy_gradient("ppo", advantages=None), InvalidRequest, "advantages"),
        pytest.param(
            policy_gradient("ppo", weights=[1.0] * 4), InvalidRequest, "'weights' is not one"
        ),
        pytest.param(
            policy_gradient("gspo", sequence_ratio_mask=[1.0, 1.0, 0.0, 1.0]),
            InvalidRequest,
            "sequence_ratio_mask",
        ),
        pytest.param(encoded([IMAGE]), Unimplemented, "image"),
        pytest.param(
            encoded([datum([1, 2], target_tokens=[2])]), InvalidRequest, r"data\[0\].*fit"
        ),
        pytest.param(
            encoded([datum([1], target_tokens=[2], weights=[1.0, 2.0])]), InvalidRequest, "weights"
        ),
        pytest.param(encoded([datum([1], target_tokens=[-2])]), InvalidRequest, "no tokens"),
        pytest.param(encoded([datum([], target_tokens=[])]), InvalidRequest, "empty"),
        pytest.param(
            encoded([datum([1], target_tokens=np.ones((1, 9), int))]), InvalidRequest, "9 columns"
        ),
        pytest.param(pb.ForwardBackwardRequest(loss_fn="cross_entropy"), InvalidRequest, "data"),
    ],
)
def test_what_cannot_be_is_refused_by_its_name(message, error, said):
    def taken():
        config_of(message, loss_of(message))
        read(message)

    with pytest.raises(error, match=said):
        taken()


@pytest.mark.parametrize(
    "tensor",
    [
        pb.Tensor(dtype=9, dense=b"", shape=[0]),
        pb.Tensor(dtype=pb.DATA_TYPE_INT64, dense=b"1234", shape=[1]),
        pb.Tensor(dtype=pb.DATA_TYPE_FLOAT32, dense=b"1234", shape=[2]),
        pb.Tensor(dtype=pb.DATA_TYPE_FLOAT32, dense=b"1234", shape=[-1]),
        pb.Tensor(dtype=pb.DATA_TYPE_FLOAT32, dense=b"1234", shape=[1, 1, 1]),
        pb.Tensor(
            dtype=pb.DATA_TYPE_FLOAT32, sparse_csr=pb.SparseCsr(values=b"1234"), shape=[10**12, 2]
        ),
        pb.Tensor(
            dtype=pb.DATA_TYPE_FLOAT32,
            sparse_csr=pb.SparseCsr(
                values=b"1234",
                crow_indices=np.array([0, 1], "<i8").tobytes(),
                col_indices=np.array([2], "<i8").tobytes(),
            ),
            shape=[1, 2],
        ),
        pb.Tensor(
            dtype=pb.DATA_TYPE_FLOAT32,
            sparse_csr=pb.SparseCsr(
                values=b"12341234",
                crow_indices=np.array([0, 2, 1, 2], "<i8").tobytes(),
                col_indices=np.array([0, 1], "<i8").tobytes(),
            ),
            shape=[3, 2],
        ),
    ],
)
def test_an_array_that_does_not_fit_its_bytes_is_refused(tensor):
    with pytest.raises(InvalidRequest):
        tensors.decode(tensor, field="x", max_columns=8)


def empty(rows, columns):
    """A sparse array of nothing but 0."""
    csr = pb.SparseCsr(crow_indices=bytes(8 * (rows + 1)))
    return pb.Tensor(dtype=pb.DATA_TYPE_INT64, sparse_csr=csr, shape=[rows, columns])


def test_few_bytes_do_not_become_many(monkeypatch):
    assert tensors.decode(empty(2, 8), field="x", max_columns=8).shape == (2, 8)
    monkeypatch.setattr(tensors, "MAX_CELLS", 15)
    with pytest.raises(InvalidRequest, match="15 cells"):
        tensors.decode(empty(2, 8), field="x", max_columns=8)


def test_data_do_not_take_more_than_a_message_may(monkeypatch):
    message = encoded([datum([1, 2], target_tokens=[2, 3])] * 3)
    for each in message.data:
        each.loss_fn_inputs["target_tokens"].CopyFrom(empty(2, 8))
    assert len(read(message)[0]) == 24
    monkeypatch.setattr(batches, "MAX_MESSAGE_BYTES", 8 * 2 * 20)
    with pytest.raises(InvalidRequest, match="data: with their target columns"):
        read(message)


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3)), min_size=1, max_size=8))
def test_the_sdk_reads_the_logprobs_in_the_shape_of_the_targets(data):
    """`data`: of each its length and its columns, 0 for a vector."""
    rng = np.random.default_rng(0)
    expected = [
        rng.normal(size=(length, width) if width else length).astype("f4") for length, width in data
    ]
    columns = [width for _, width in data]
    sent = [
        column
        for values, width in zip(expected, columns, strict=True)
        for column in (values.T if width else [values])
    ]
    output = forward_backward_output(
        [tensor_to_pb(column) for column in sent],
        {"loss": 1.5, "ratio_max": 2.0, "ess": 0.5},
        runs_of(columns),
    )
    found = deserialize_forward_backward_output(output.SerializeToString())
    assert found.metrics == {"loss:sum": 1.5, "ratio_max:max": 2.0, "ess:mean": 0.5}
    assert len(found.loss_fn_outputs) == len(data)
    for outputs, values in zip(found.loss_fn_outputs, expected, strict=True):
        assert outputs["logprobs"].shape == list(values.shape)
        np.testing.assert_array_equal(outputs["logprobs"]._numpy.reshape(values.shape), values)


@pytest.mark.parametrize(
    "runs",
    [
        None,
        "x",
        [],
        [[0, 5], [2, 0]],
        [[1, 2]],
        [[10**9, 10**9]],
        [[2, 0], [1, 0]],
        [[1], [1]],
        [5],
    ],
)
def test_a_forged_shape_is_not_believed(runs):
    output = forward_backward_output([tensor_to_pb([1.0]), tensor_to_pb([1.0, 2.0])], {}, runs)
    found = deserialize_forward_backward_output(output.SerializeToString())
    assert [each["logprobs"].shape for each in found.loss_fn_outputs] == [[1], [2]]


def matrix(rows, dtype="<f4"):
    return tensor_to_pb(np.array(rows), dtype)


def sampled(**changes):
    first = sampling_pb2.CompletionChunk(
        index=1,
        token_ids=[7, 8],
        logprobs=tensor_to_pb([-0.5, -1.5]),
        stop_reason=sampling_pb2.STOP_REASON_STOP,
    )
    second = sampling_pb2.CompletionChunk(
        index=0,
        token_ids=[9],
        logprobs=tensor_to_pb([-2.5]),
        stop_reason=sampling_pb2.STOP_REASON_LENGTH,
        **changes,
    )
    return future_service_pb2.Sampled(completions=[first, second])


PROMPT = sampling_pb2.PromptLogprobs(
    logprobs=tensor_to_pb([np.nan, -1.0, -2.0]),
    top_token_ids=matrix([[-1, -1], [3, 4], [5, 6]], "<i4"),
    top_logprobs=matrix([[np.nan, np.nan], [-1.0, -2.0], [-3.0, -4.0]]),
)


def test_the_sdk_reads_samples_in_their_order():
    found = deserialize_sample_response(
        sample_response(sampled(prompt_logprobs=PROMPT), last_n=0).SerializeToString()
    )
    assert [sequence.tokens for sequence in found.sequences] == [[9], [7, 8]]
    assert [sequence.stop_reason for sequence in found.sequences] == ["length", "stop"]
    assert found.sequences[1].logprobs == [-0.5, -1.5]
    assert found.prompt_logprobs == [None, -1.0, -2.0]
    assert found.topk_prompt_logprobs == [None, [(3, -1.0), (4, -2.0)], [(5, -3.0), (6, -4.0)]]


def test_of_a_prompts_end_alone_nothing_before_is_told():
    response = sample_response(sampled(prompt_logprobs=PROMPT), last_n=1)
    found = deserialize_sample_response(response.SerializeToString())
    assert found.prompt_logprobs == [None, None, -2.0]
    assert found.topk_prompt_logprobs == [None, None, [(5, -3.0), (6, -4.0)]]


def test_the_likeliest_tokens_of_a_sample_are_told_and_none_where_there_are_fewer():
    chunk = sampled(top_token_ids=matrix([[9, -1]], "<i4"), top_logprobs=matrix([[-0.1, -np.inf]]))
    found = deserialize_sample_response(sample_response(chunk, last_n=0).SerializeToString())
    assert found.sequences[0].topk_logprobs_np.token_ids.tolist() == [[9, 0]]
    assert found.sequences[0].topk_logprobs_np.logprobs.tolist() == [
        [pytest.approx(-0.1), -99999.0]
    ]


def sample(**changes):
    fields = {
        "sampling_session_id": "s0123456789abcdef:sample:0",
        "seq_id": 3,
        "num_samples": 2,
        "prompt": {"chunks": [{"tokens": [1, 2], "type": "encoded_text"}, {"tokens": [3]}]},
        "sampling_params": {"max_tokens": 4, "seed": 3, "temperature": 0.7, "top_k": -1},
        **changes,
    }
    body = Sample.model_validate(fields)
    return sample_request(body, "projects/p", None, continue_on_newest=False)


@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        (None, ([], [], False)),
        ([], ([], [], True)),
        ("\n", (["\n"], [], False)),
        (["a", "b"], (["a", "b"], [], False)),
        ([5, 6], ([], [5, 6], False)),
    ],
)
def test_a_sample_stops_where_it_is_told_to(stop, expected):
    params = sample(sampling_params={"stop": stop}).params
    assert (list(params.stop), list(params.stop_token_ids), params.ignore_eos) == expected


def test_a_sample_is_drawn_as_it_is_asked_for():
    request = sample(prompt_logprobs=True, topk_prompt_logprobs=2)
    assert list(request.prompt_token_ids) == [1, 2, 3]
    assert request.num_completions == 2
    assert request.params.max_tokens == 4
    assert request.params.seed == 3
    assert request.params.prompt_logprobs == 2
    assert not request.params.HasField("top_k")
    assert sample(sampling_params={"top_k": 5, "top_p": 0.5}).params.top_k == 5
    assert not sample().params.HasField("prompt_logprobs")
    assert sample(prompt_logprobs=True).params.prompt_logprobs == 0
    assert sample(topk_sample_logprobs=3).params.top_logprobs == 3


@pytest.mark.parametrize(
    ("temperature", "kind"),
    [
        (1.0, sampling_pb2.LOGPROBS_KIND_POLICY),
        (0.0, sampling_pb2.LOGPROBS_KIND_POLICY),
        (0.7, sampling_pb2.LOGPROBS_KIND_SAMPLED),
    ],
)
def test_logprobs_are_of_the_temperature_that_was_drawn_at(temperature, kind):
    assert sample(sampling_params={"temperature": temperature}).params.logprobs_kind == kind


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"prompt": {"chunks": []}}, InvalidRequest),
        ({"prompt": {"chunks": [{"type": "image", "data": "x"}]}}, Unimplemented),
        ({"target_prompt_logprobs": {"data": [1]}}, Unimplemented),
        ({"prompt_alt_tokens_k": 1}, Unimplemented),
        ({"prompt_logprobs_last_n": 1}, InvalidRequest),
        ({"prompt_logprobs_last_n": 3, "prompt_logprobs": True}, InvalidRequest),
    ],
)
def test_a_sample_that_cannot_be_is_refused(changes, error):
    with pytest.raises(error):
        sample(**changes)


sessions = st.from_regex(r"s[0-9a-f]{16}", fullmatch=True)
numbers = st.integers(0, ids.MAX_NUMBER)
samplers = st.builds(ids.SamplerId, sessions, numbers, st.just(0) | st.integers(1, ids.MAX_SEQ))
models = st.builds(ids.ModelId, sessions, numbers)
notes = st.dictionaries(st.text(max_size=5), st.text(max_size=20) | st.booleans(), max_size=3)


@given(
    st.builds(tickets.SampleTicket, samplers, st.integers(0, 2**63 - 1), st.integers(0, 10**6))
    | st.builds(tickets.TrainTicket, models, st.integers(0, ids.MAX_SEQ), notes)
)
def test_a_ticket_is_what_it_was_when_it_comes_back(ticket):
    assert tickets.parse(str(ticket)) == ticket
    assert len(ticket.future_id) <= 63


@given(samplers, models)
def test_ids_are_what_they_were_when_they_come_back(sampler, model):
    assert ids.SamplerId.parse(str(sampler)) == sampler
    assert ids.ModelId.parse(str(model)) == model
    assert len(sampler.group(10**9)) <= 63


@given(st.text(max_size=40) | st.from_regex(r"[at]-s[0-9a-f]{16}(-[0-9a-z]{1,14})*(\.\w*)?"))
def test_a_ticket_that_was_never_given_out_is_nothing(text):
    try:
        ticket = tickets.parse(text)
    except NotFound:
        return
    assert tickets.parse(str(ticket)) == ticket


@pytest.mark.parametrize(
    "path",
    [
        "",
        "tinker://",
        "tinker://s0123456789abcdef:train:0/weights",
        "tinker://s0123456789abcdef:train:0/other/name",
        "tinker://s0123456789abcdef:train:0/weights/a/b",
        "tinker://s0123456789abcdef:train:0/weights/..",
        "tinker://s0123456789abcdef:train:0/weights/a b",
        "tinker://s0123456789abcdef:train:0/weights/" + "a" * 129,
        "tinker://s0123456789abcdef:train:00/weights/a",
        "tinker://../weights/a",
    ],
)
def test_a_path_of_another_form_is_refused(path):
    with pytest.raises(InvalidRequest):
        CheckpointPath.parse(path)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"{",
        b'{"model_id":1,"seq_id":1}',
        b'{"model_id":"x","seq_id":0}',
        b'{"model_id":"x","seq_id":2147483648}',
        b'{"model_id":"x","seq_id":true}',
        b'{"model_id":"x","seq_id":' + b"[" * 1000,
        b"\xff",
    ],
)
def test_a_body_of_another_form_is_refused(body):
    with pytest.raises(InvalidRequest):
        bodies.parse(bodies.Sequenced, body)


@pytest.mark.parametrize("value", [b"NaN", b"1e999", b'{"a": -Infinity}'])
def test_metadata_that_no_answer_could_have_is_refused(value):
    body = b'{"session_id":"x","model_seq_id":0,"base_model":"m","user_metadata":{"a":%s}}' % value
    with pytest.raises(InvalidRequest):
        bodies.parse(bodies.CreateModel, body)


def test_tensors_of_results_are_float32():
    assert tensor_to_pb([1.0]).dtype == tensor_pb2.DATA_TYPE_FLOAT32
