"""Snapshots, checkpoints and the journal's ops survive their encodings, to the last bit."""

from __future__ import annotations

import numpy as np
import pytest
from google.protobuf.duration_pb2 import Duration
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from rollmesh import convert, types
from rollmesh.api.common.v1 import export_pb2
from rollmesh.api.coordinator.v1 import adapter_pb2, checkpoint_service_pb2
from rollmesh.api.trainer.v1 import trainer_service_pb2

INT64 = st.integers(-(2**63), 2**63 - 1)
FLOATS = st.floats(allow_nan=False)
TIMES = st.integers(0, 4 * 10**15).map(lambda microseconds: microseconds / 1e6)
TEXTS = st.text(max_size=8)
LORAS = st.builds(
    types.LoraConfig,
    st.integers(-(2**31), 2**31 - 1),
    st.none() | FLOATS,
    st.lists(TEXTS, max_size=3).map(tuple),
    INT64,
)
SNAPSHOTS = st.builds(types.Snapshot, TEXTS, TEXTS, INT64, INT64, INT64, TEXTS)
CHECKPOINTS = st.builds(
    types.Checkpoint, TEXTS, TEXTS, LORAS, INT64, TEXTS, INT64, TIMES, st.none() | TIMES
)
METRICS = st.dictionaries(TEXTS, st.floats(), max_size=3)


def vectors(dtype: type[np.generic], length: int) -> st.SearchStrategy:
    return arrays.arrays(dtype, length)


DATA = st.lists(
    st.integers(1, 5).flatmap(
        lambda length: st.builds(
            types.Datum,
            vectors(np.int32, length),
            vectors(np.int32, length),
            st.none() | vectors(np.float32, length),
            st.none() | vectors(np.float32, length),
            st.none() | vectors(np.float32, length),
            st.none() | vectors(np.int32, length),
        )
    ),
    min_size=1,
    max_size=3,
)
BATCHES = st.builds(
    types.ForwardBackward,
    DATA,
    st.builds(
        types.LossConfig,
        st.sampled_from(["cross_entropy", "importance_sampling", "stable_reinforce"]),
        st.none() | FLOATS,
        max_sequence_ratio=st.none() | FLOATS,
        sampler_kl_coefficient=st.none() | FLOATS,
    ),
)
STEPS = st.builds(
    types.OptimStep,
    st.builds(types.AdamConfig, FLOATS, FLOATS, FLOATS, FLOATS, FLOATS, st.none() | FLOATS),
)
LOADS = st.builds(types.LoadSnapshot, SNAPSHOTS, st.booleans())
OPS = BATCHES | STEPS | LOADS
LOGPROBS = st.lists(st.integers(1, 5).flatmap(lambda n: vectors(np.float32, n)), max_size=3)


def bits(value: object) -> object:
    """`value` so that it can be compared to the last bit, NaN included."""
    match value:
        case np.ndarray():
            return value.dtype.str, value.shape, value.tobytes()
        case list() | tuple():
            return [bits(item) for item in value]
        case dict():
            return {key: bits(item) for key, item in value.items()}
        case float():
            return value.hex()
        case _ if hasattr(value, "__dataclass_fields__"):
            return {name: bits(getattr(value, name)) for name in value.__dataclass_fields__}
        case _:
            return value


@given(SNAPSHOTS)
def test_a_snapshot_survives_the_wire(snapshot):
    wire = convert.snapshot_to_pb(snapshot).SerializeToString()
    message = trainer_service_pb2.Snapshot.FromString(wire)
    assert convert.snapshot_from_pb(message) == snapshot


@given(st.none() | SNAPSHOTS)
def test_that_there_is_no_snapshot_survives_the_wire(snapshot):
    message = trainer_service_pb2.CreateAdapterRequest(
        fork_of=None if snapshot is None else convert.snapshot_to_pb(snapshot)
    )
    assert convert.optional_snapshot_from_pb(message, "fork_of") == snapshot


@given(CHECKPOINTS)
def test_a_checkpoint_survives_the_wire(checkpoint):
    wire = convert.checkpoint_to_pb(checkpoint).SerializeToString()
    assert convert.checkpoint_from_pb(adapter_pb2.Checkpoint.FromString(wire)) == checkpoint


@given(st.none() | TIMES)
def test_an_adapters_time_to_live_survives_the_wire(idle_ttl_s):
    adapter = types.Adapter(
        "a", "arith", types.LoraConfig(4, 8.0), 0, None, "", 1, 1.0, idle_ttl_s=idle_ttl_s
    )
    wire = convert.adapter_to_pb(adapter).SerializeToString()
    assert convert.adapter_from_pb(adapter_pb2.Adapter.FromString(wire)) == adapter


@given(
    st.builds(types.TrainerAdapter, TEXTS, LORAS, INT64, INT64, st.booleans(), INT64),
    st.builds(
        types.TrainerInfo,
        *(TEXTS, *[st.integers(0, 2**31 - 1)] * 5),
        st.lists(TEXTS, max_size=2).map(tuple),
        *(st.integers(0, 2**31 - 1), TEXTS, st.booleans()),
        st.lists(st.builds(types.HeldAdapter, TEXTS, INT64), max_size=2).map(tuple),
        *(INT64, INT64),
    ),
)
def test_what_a_trainer_holds_under_which_epoch_survives_the_wire(adapter, info):
    wire = convert.trainer_adapter_to_pb(adapter).SerializeToString()
    message = trainer_service_pb2.TrainerAdapter.FromString(wire)
    assert convert.trainer_adapter_from_pb(message) == adapter
    wire = convert.trainer_info_to_pb(info).SerializeToString()
    message = trainer_service_pb2.GetTrainerResponse.FromString(wire)
    assert convert.trainer_info_from_pb(message) == info


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(None, None), (0.0, 0.0), (-1.5, -1.5), (1e-6, 1e-6), (86400.0, 86400.0)],
)
def test_an_absent_duration_is_not_one_of_zero(seconds, expected):
    ttl = None if seconds is None else convert.duration_to_pb(seconds)
    message = checkpoint_service_pb2.CreateCheckpointRequest(ttl=ttl)
    assert convert.optional_duration_from_pb(message, "ttl") == expected


def test_a_duration_that_no_clock_has_is_read_all_the_same():
    message = checkpoint_service_pb2.CreateCheckpointRequest(ttl=Duration(seconds=2**63 - 1))
    assert convert.optional_duration_from_pb(message, "ttl") == pytest.approx(2.0**63)


@pytest.mark.parametrize(
    ("message", "part"),
    [
        (checkpoint_service_pb2.ExportCheckpointResponse(chunk=b"abc"), b"abc"),
        (
            checkpoint_service_pb2.ExportCheckpointResponse(
                trailer=export_pb2.AdapterExportTrailer(digest="ab")
            ),
            "ab",
        ),
        (
            checkpoint_service_pb2.ExportCheckpointResponse(
                header=export_pb2.AdapterExportHeader(adapter="a", num_bytes=3)
            ),
            types.AdapterExport("a", 0, "", "", 3),
        ),
    ],
)
def test_the_parts_of_an_exported_checkpoint_are_those_of_an_adapter(message, part):
    assert convert.export_part_from_pb(message) == part


@given(OPS)
def test_an_op_comes_out_of_the_journal_as_it_went_in(op):
    kind, body = convert.op_to_bytes(op)
    back = convert.op_from_bytes(kind, body)
    assert type(back) is type(op)
    assert bits(back) == bits(op)
    assert convert.op_to_bytes(back) == (kind, body)


@given(OPS, OPS)
def test_ops_have_the_same_bytes_exactly_if_they_are_the_same(one, other):
    same = type(one) is type(other) and bits(one) == bits(other)
    assert (convert.op_to_bytes(one) == convert.op_to_bytes(other)) == same


@given(
    st.tuples(
        st.just("forward_backward"),
        st.builds(types.ForwardBackwardResult, LOGPROBS.map(tuple), METRICS),
    )
    | st.tuples(st.just("optim_step"), st.builds(types.OptimStepResult, INT64, METRICS))
    | st.tuples(st.just("load_snapshot"), st.builds(types.LoadResult, INT64))
)
def test_a_result_comes_out_of_the_journal_as_it_went_in(kept):
    kind, result = kept
    back = convert.result_from_bytes(kind, convert.result_to_bytes(result))
    assert type(back) is type(result)
    assert bits(back) == bits(result)
