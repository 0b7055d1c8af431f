"""The identity of a policy version: of its tensors alone, in whatever order or file they lie."""

from __future__ import annotations

import hashlib
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save

from rollmesh.digest import safetensors_digest, tensors_digest

TENSORS = [
    ("b.weight", "F32", (2, 2), np.arange(4, dtype="<f4").tobytes()),
    ("a.weight", "F16", (3,), np.arange(3, dtype="<f2").tobytes()),
    ("ü", "F32", (), np.float32(1.5).tobytes()),
]
NAMED = {
    "b.weight": np.arange(4, dtype=np.float32).reshape(2, 2),
    "a.weight": np.arange(3, dtype=np.float16),
    "ü": np.array(1.5, dtype=np.float32),
}


def test_the_digest_is_the_documented_one():
    expected = hashlib.sha256()
    for name, dtype, shape, data in (TENSORS[1], TENSORS[0], TENSORS[2]):
        extents = ",".join(map(str, shape))
        expected.update(f"{len(name.encode())}:{name} {dtype} [{extents}]\n".encode() + data)
    assert tensors_digest(TENSORS) == expected.hexdigest()


@given(seed=st.integers())
def test_the_order_of_the_tensors_does_not_matter(seed):
    shuffled = random.Random(seed).sample(TENSORS, len(TENSORS))
    assert tensors_digest(iter(shuffled)) == tensors_digest(TENSORS)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(("c", "F32", (2, 2), TENSORS[0][3]), id="name"),
        pytest.param(("b.weight", "I32", (2, 2), TENSORS[0][3]), id="dtype"),
        pytest.param(("b.weight", "F32", (4,), TENSORS[0][3]), id="shape"),
        pytest.param(("b.weight", "F32", (2, 2), b"\1" + TENSORS[0][3][1:]), id="one byte"),
    ],
)
def test_whatever_changes_changes_the_digest(change):
    assert tensors_digest([change, *TENSORS[1:]]) != tensors_digest(TENSORS)


def test_a_tensor_more_or_less_changes_the_digest():
    digests = {tensors_digest(TENSORS[:n]) for n in range(len(TENSORS) + 1)}
    assert len(digests) == len(TENSORS) + 1


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_a_safetensors_file_has_the_digest_of_its_tensors(metadata):
    file = save(NAMED, metadata)
    assert safetensors_digest(file) == tensors_digest(TENSORS)
    assert safetensors_digest(memoryview(file)) == tensors_digest(TENSORS)


def test_a_file_without_tensors_has_the_digest_of_none():
    assert safetensors_digest(save({})) == tensors_digest([])


def test_a_torn_file_has_no_digest():
    file = save(NAMED)
    for size in range(len(file)):
        with pytest.raises(ValueError, match=r".+"):
            safetensors_digest(file[:size])


def test_a_file_with_something_behind_it_has_no_digest():
    with pytest.raises(ValueError, match="do not end where the file does"):
        safetensors_digest(save(NAMED) + b"\0")


@pytest.mark.parametrize(
    "header",
    [
        b"[]",
        b"null",
        b"7",
        b'{"a": 1}',
        b'{"a": {}}',
        b'{"a": {"data_offsets": []}}',
        b"{",
        b"\xff",
    ],
)
def test_a_header_that_says_something_else_is_refused(header):
    with pytest.raises(ValueError, match=r".+"):
        safetensors_digest(len(header).to_bytes(8, "little") + header)


@given(position=st.integers(min_value=0, max_value=len(save(NAMED)) - 1), bits=st.integers(1, 255))
def test_a_damaged_file_is_refused_or_has_another_digest(position, bits):
    file = bytearray(save(NAMED))
    file[position] ^= bits
    try:
        digest = safetensors_digest(bytes(file))
    except ValueError:
        return
    # White space pads the header; damage there leaves the tensors as they are.
    assert digest != tensors_digest(TENSORS) or chr(file[position]).isspace()
