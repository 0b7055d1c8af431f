"""What is sent to each endpoint of the gateway: a good request, and what can be wrong with one."""

from __future__ import annotations

import copy
import gzip
import json
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import numpy as np
import zstandard
from hypothesis import strategies as st

from rollmesh.api.tinker.v1 import tinker_pb2 as pb
from tests.fakes.mesh import BASE_MODEL

if TYPE_CHECKING:
    from collections.abc import Mapping

JSON, PROTOBUF = "application/json", "application/x-protobuf"


@dataclass(frozen=True)
class Names:
    """What a tenant has made, and what it is called."""

    session: str
    model: str
    sampler: str
    path: str
    external: str
    train_request: str
    sample_request: str
    token: str

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]


@dataclass
class Sent:
    """A request. `path`: below /api/v1/, its parts quoted already."""

    method: str
    path: str
    body: bytes = b""
    query: dict[str, str] = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)


def batch(model: str, seq: int = 10**6, **inputs: Any) -> pb.ForwardBackwardRequest:
    """A small batch for cross_entropy."""
    tokens = np.array([1, 2, 3], "<i4")
    datum = pb.Datum(
        model_input=[pb.Chunk(encoded_text=pb.EncodedTextChunk(tokens=tokens.tobytes()))]
    )
    values = {"target_tokens": np.array([2, 3, 4], "<i8"), "weights": np.ones(3, "<f4"), **inputs}
    for name, value in values.items():
        dtype = pb.DATA_TYPE_INT64 if value.dtype.kind == "i" else pb.DATA_TYPE_FLOAT32
        datum.loss_fn_inputs[name].CopyFrom(
            pb.Tensor(dense=value.tobytes(), dtype=dtype, shape=value.shape)
        )
    return pb.ForwardBackwardRequest(
        model_id=model, seq_id=seq, data=[datum], loss_fn="cross_entropy"
    )


def good(names: Names) -> dict[tuple[str, str], Any]:
    """By method and path of the application's routes: a body that is right, but for its place.

    Training requests name places that are never reached, so that none of them waits for another.
    """
    session, model, sampler = names.session, names.model, names.sampler
    place = {"model_id": model, "seq_id": 10**6}
    return {
        ("GET", "healthz"): None,
        ("POST", "client/config"): {"sdk_version": "0.38.0"},
        ("POST", "client/dynamic_config"): {"sdk_version": "0.38.0"},
        ("POST", "auth/token"): {},
        ("GET", "auth/apikey/me"): None,
        ("DELETE", "auth/apikey/me"): None,
        ("POST", "telemetry"): {"events": [], "platform": "x", "session_id": session},
        ("GET", "get_server_capabilities"): None,
        ("POST", "create_session"): {
            "tags": ["a"], "user_metadata": {"a": "b"}, "sdk_version": "0.38.0",
            "project_id": "fuzzer", "display_name": "a run", "type": "create_session",
        },
        ("POST", "session_heartbeat"): {"session_id": session},
        ("GET", "sessions"): None,
        ("POST", "sessions/search"): {
            "session_id": session, "project_ids": ["fuzzer"], "user_metadata": {"a": "b"},
            "display_name": "a", "owner": {"type": "own"}, "limit": 5,
            "statuses": [{"type": "client_finished", "reasons": ["success"]}],
            "cursor": {"last_created_at": "2026-01-01T00:00:00Z", "last_session_id": session},
        },
        ("GET", "sessions/{session}"): None,
        ("POST", "sessions/{session}/finish"): {"reason": {"type": "success"}, "detail": "x"},
        ("PUT", "sessions/{session}/project"): {"project_id": "fuzzer"},
        ("GET", "sessions/{session}/trace_export"): None,
        ("POST", "create_model"): {
            "session_id": session, "model_seq_id": 0, "base_model": BASE_MODEL,
            "user_metadata": {"a": "b"}, "optimizer_config": {"type": "adamw"},
            "lora_config": {"rank": 8, "seed": 1, "train_unembed": True, "train_mlp": True,
                            "train_attn": True},
        },
        ("POST", "get_info"): {"model_id": model},
        ("POST", "load_weights"): {**place, "path": names.path, "optimizer": True},
        ("POST", "forward_backward"): batch(model),
        ("POST", "optim_step"): {
            **place, "adam_params": {"learning_rate": 1e-4, "beta1": 0.9, "beta2": 0.95,
                                     "eps": 1e-12, "weight_decay": 0.0, "grad_clip_norm": 0.0},
        },
        ("POST", "save_weights"): {
            **place, "path": "a", "ttl_seconds": 3600, "overwrite": True,
            "user_metadata": {"a": "b"},
        },
        ("POST", "save_weights_for_sampler"): {
            **place, "path": "b", "kind": "snapshot", "sampling_session_seq_id": 3,
            "ttl_seconds": 3600,
        },
        ("POST", "save_weights_external"): {
            **place, "path": "c", "age_encryption_recipients": ["age1qqq"],
        },
        ("POST", "create_custom_loss"): {"session_id": session, "name": "x"},
        ("POST", "create_sampling_session"): {
            "session_id": session, "sampling_session_seq_id": 0, "model_path": names.path,
        },
        ("POST", "join_sampling_session"): {"sampling_session_id": sampler},
        ("GET", "samplers/{sampler}"): None,
        ("POST", "asample"): {
            "sampling_session_id": sampler, "seq_id": 1, "num_samples": 2,
            "prompt": {"chunks": [{"tokens": [1, 2, 3], "type": "encoded_text"}]},
            "sampling_params": {"max_tokens": 3, "seed": 1, "stop": ["a"], "temperature": 0.7,
                                "top_k": 5, "top_p": 0.9},
            "prompt_logprobs": True, "topk_prompt_logprobs": 2, "topk_sample_logprobs": 2,
            "prompt_logprobs_last_n": 1,
        },
        ("POST", "retrieve_future"): {
            "request_id": names.train_request, "allow_metadata_only": True,
        },
        ("POST", "retrieve_futures"): {
            "target": {"type": "sampling_session", "sampling_session_id": sampler,
                       "cloned_sampler_id": 0},
            "prev_cursor": 0, "timeout": 0.0, "retrieved_request_ids": ["a"],
        },
        ("POST", "cancel_future"): {"request_id": names.sample_request},
        ("POST", "weights_info"): {"tinker_path": names.path},
        ("POST", "copy_weights"): {
            "source_path": names.path, "ttl_seconds": 3600, "destination_project_id": "fuzzer",
        },
        ("GET", "training_runs"): None,
        ("GET", "training_runs/{run}"): None,
        ("GET", "training_runs/{run}/checkpoints"): None,
        ("GET", "checkpoints"): None,
        ("DELETE", "training_runs/{run}/checkpoints/{kind}/{name}"): None,
        ("POST", "training_runs/{run}/checkpoints/{kind}/{name}/publish"): None,
        ("DELETE", "training_runs/{run}/checkpoints/{kind}/{name}/publish"): None,
        ("PUT", "training_runs/{run}/checkpoints/{kind}/{name}/ttl"): {"ttl_seconds": 3600},
        ("GET", "training_runs/{run}/checkpoints/{kind}/{name}/external_weights_urls"): None,
        ("GET", "training_runs/{run}/checkpoints/{kind}/{name}/archive"): None,
        ("GET", "download/{token}/{name}"): None,
        ("GET", "audit"): None,
        ("GET", "billing/usage/events"): None,
        ("GET", "billing/usage/checkpoints/current"): None,
        ("GET", "/v1/models"): None,
        ("GET", "/v1/models/{id:path}"): None,
        ("GET", "/v1/turns/{id}"): None,
        ("POST", "/v1/completions"): {
            "model": BASE_MODEL, "prompt": [[1, 2, 3]], "max_tokens": 2, "n": 2, "logprobs": 2,
            "echo": False, "stop": ["="], "temperature": 0.5, "top_p": 0.9, "seed": 1,
            "stream": False,
        },
        ("POST", "/v1/chat/completions"): {
            "model": BASE_MODEL, "messages": [{"role": "user", "content": "1+1="}], "n": 2,
            "max_tokens": 2, "logprobs": True, "top_logprobs": 2, "stop": ["="], "stream": True,
            "stream_options": {"include_usage": True}, "seed": 1, "temperature": 0.5,
        },
    }  # fmt: skip


def parts(names: Names) -> dict[str, str]:
    """What stands for the parts of paths in braces."""
    _, kind, name = names.path.removeprefix("tinker://").split("/")
    return {
        "session": names.session,
        "run": names.model,
        "kind": kind,
        "name": name,
        "sampler": names.sampler,
        "token": names.token,
        "id": "0" * 32,
        "id:path": names.external,
    }


QUERIES = ("limit", "offset", "access_scope", "project_id", "event_type", "day", "starting_on",
           "ending_before")  # fmt: skip


def nasty(*others: Names) -> st.SearchStrategy[Any]:
    """Values that a field may be given; `others`: tenants whose names are tried."""
    strangers = [value for other in others for value in vars(other).values()]
    return st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.sampled_from([0, -1, 2**31 - 1, 2**31, 2**32, 2**63 - 1, 2**63, -(2**63) - 1, 10**30]),
        st.floats(),
        st.sampled_from([math.nan, math.inf, -math.inf, 1e308, 5e-324, -0.0]),
        st.text(max_size=20),
        st.sampled_from(["", "\0", "a\0b", "\ud800", "../../etc/passwd", "a/b", "ä" * 2000,
                         "x" * 100_000, "; rm -rf /", "%00", "tinker://", "tinker://a/b/c/d",
                         "\u202e\u0000\uffff", "projects/other", *strangers]),
        st.just([]),
        st.just({}),
        st.just([[1]] * 3),
        st.integers(2, 20_000).map(Deep),
        st.lists(st.integers(), max_size=3),
        st.dictionaries(st.text(max_size=3), st.floats(), max_size=3),
    )  # fmt: skip


class Deep:
    """Arrays in arrays, so many deep: written by hand, as json does not write them."""

    def __init__(self, depth: int) -> None:
        self.depth = depth

    def __repr__(self) -> str:
        return f"Deep({self.depth})"


def changed(body: Any, draw: Any, values: st.SearchStrategy[Any]) -> bytes:
    """`body` as JSON, with something in it changed, left out or added, once or more often."""
    made = json.loads(json.dumps(body))
    deep: dict[str, int] = {}
    for _ in range(draw(st.integers(0, 3))):
        place, key = _place(made, draw)
        if place is None:
            continue
        match draw(st.sampled_from(["change", "change", "change", "drop", "add"])):
            case "drop" if isinstance(place, dict):
                place.pop(key, None)
            case "add" if isinstance(place, dict):
                place[draw(st.text(max_size=8))] = _value(draw(values), deep)
            case _:
                place[key] = _value(draw(values), deep)
    text = json.dumps(made)
    for mark, depth in deep.items():
        text = text.replace(f'"{mark}"', "[" * depth + "]" * depth)
    return text.encode("utf-8", "surrogatepass")


def _value(value: Any, deep: dict[str, int]) -> Any:
    if not isinstance(value, Deep):
        return copy.deepcopy(value)  # strategies hand out the same again
    mark = f"deep-{len(deep)}"
    deep[mark] = value.depth
    return mark


def _place(body: Any, draw: Any) -> tuple[Any, Any]:
    """Somewhere in a body: what it is in, and its key there."""
    place, key = None, None
    within = body
    while isinstance(within, (dict, list)) and within:
        keys = sorted(within) if isinstance(within, dict) else list(range(len(within)))
        place, key = within, draw(st.sampled_from(keys))
        within = within[key]
        if draw(st.booleans()):
            break
    return place, key


def changed_batch(  # noqa: C901, PLR0912 - a list of what can be wrong
    batch: pb.ForwardBackwardRequest, draw: Any, strange: str
) -> bytes:
    """A batch with something wrong in it."""
    made = pb.ForwardBackwardRequest.FromString(batch.SerializeToString())
    tensor = made.data[0].loss_fn_inputs["target_tokens"]
    numbers = st.sampled_from([0, 1, -1, 3, 2**31, 2**62, -(2**63)])
    for _ in range(draw(st.integers(0, 3))):
        match draw(st.integers(0, 13)):
            case 0:
                made.model_id = draw(st.sampled_from([strange, "", "a", "\0", "x" * 5000]))
            case 1:
                made.seq_id = draw(st.sampled_from([0, -1, 2**31 - 1, 7]))
            case 2:
                made.loss_fn = draw(st.text(max_size=10))
            case 3:
                made.loss_fn = draw(
                    st.sampled_from(["ppo", "dro", "gspo", "cispo", "custom", "stable_reinforce"])
                )
            case 4:
                tensor.dense = draw(st.binary(max_size=40))
            case 5:
                del tensor.shape[:]
                tensor.shape.extend(draw(st.lists(numbers, max_size=3)))
            case 6:
                tensor.dtype = draw(st.integers(0, 9))
            case 7:
                tensor.sparse_csr.values = draw(st.binary(max_size=16))
                tensor.sparse_csr.crow_indices = draw(_indices(numbers))
                tensor.sparse_csr.col_indices = draw(_indices(numbers))
            case 8:
                made.loss_fn_config_v2[draw(st.text(max_size=5))].number = draw(st.floats())
                made.loss_fn_config["beta"] = draw(st.floats())
            case 9:
                made.data[0].model_input[0].encoded_text.tokens = draw(st.binary(max_size=20))
            case 10:
                made.data[0].model_input.add().image.data = b"png"
            case 11:
                made.data[0].loss_fn_inputs[draw(st.text(max_size=5))].dense = b"1234"
            case 12:
                span = made.data[0].model_input_spans.add().sampled_tokens
                span.sequence_id, span.offset = draw(st.text(max_size=5)), draw(numbers)
            case 13:
                floats = draw(st.lists(st.floats(width=32), min_size=3, max_size=3))
                weights = made.data[0].loss_fn_inputs["weights"]
                weights.dense = np.array(floats, "<f4").tobytes()
    made.forward_only = draw(st.booleans())
    sent = bytearray(made.SerializeToString())
    for _ in range(draw(st.sampled_from([0, 0, 1, 5]))):
        sent[draw(st.integers(0, len(sent) - 1))] = draw(st.integers(0, 255))
    return bytes(sent)


def _indices(numbers: st.SearchStrategy[int]) -> st.SearchStrategy[bytes]:
    return st.lists(numbers, max_size=4).map(lambda each: np.array(each, "<i8").tobytes())


def wrapped(body: bytes, draw: Any) -> tuple[bytes, Mapping[str, str]]:  # noqa: PLR0911 - a list too
    """A body in a wrong or another wrapping: its bytes and headers."""
    wrapping = draw(st.sampled_from(["", "", "", "", "zstd", "gzip", "lie", "bomb", "torn", "odd"]))
    kind = draw(st.sampled_from([JSON, JSON, PROTOBUF, "text/plain", "", "a/b; charset=nothing"]))
    headers = {"content-type": kind} if kind else {}
    match wrapping:
        case "zstd":
            return zstandard.compress(body), {**headers, "content-encoding": "zstd"}
        case "gzip":
            return gzip.compress(body), {**headers, "content-encoding": "gzip"}
        case "lie":
            encoding = draw(st.sampled_from(["zstd", "gzip", "deflate"]))
            return body, {**headers, "content-encoding": encoding}
        case "bomb":
            pack, encoding = draw(st.sampled_from([(zstandard.compress, "zstd"),
                                                   (gzip.compress, "gzip")]))  # fmt: skip
            return pack(b" " * (4 * 2**20)), {**headers, "content-encoding": encoding}
        case "torn":
            packed = zstandard.compress(body)
            return packed[: len(packed) // 2], {**headers, "content-encoding": "zstd"}
        case "odd":
            return body, {**headers, "content-encoding": "br, br, x"}
    return body, headers


def request(
    draw: Any, endpoint: tuple[str, str], own: Names, others: Names
) -> tuple[Sent, str | None]:
    """A request to an endpoint, right or wrong, and with which key; None: the sender's own."""
    method, path = endpoint
    body = good(own)[endpoint]
    values = nasty(others)
    strange = others.model
    given_parts = parts(own)
    # httpx resolves . and .. itself: another endpoint would be asked.
    texts = st.one_of(
        st.text(min_size=1, max_size=20).filter(lambda text: text not in {".", ".."}),
        st.sampled_from([*parts(others).values(), "\0", "a" * 3000, "%2e%2e"]),
    )
    made = path
    for name, right in given_parts.items():
        if "{" + name + "}" in made:
            part = right if draw(st.booleans()) else draw(texts)
            quoted = quote(part.encode("utf-8", "surrogatepass"), safe="")
            made = made.replace("{" + name + "}", quoted)
    query = {
        name: draw(st.one_of(st.integers().map(str), st.text(max_size=10)))
        for name in draw(st.sets(st.sampled_from(QUERIES), max_size=2))
    }
    if draw(st.integers(0, 9)) == 0:
        content = draw(st.binary(max_size=200))
    elif isinstance(body, pb.ForwardBackwardRequest):
        content = changed_batch(body, draw, strange)
    elif body is None:
        content = draw(st.sampled_from([b"", b"{}"]))
    else:
        content = changed(body, draw, values)
    content, headers = wrapped(content, draw)
    if draw(st.booleans()):
        headers = {**headers, "accept": PROTOBUF}
    query = {k: v.encode("utf-8", "replace").decode() for k, v in query.items()}
    sent = Sent(method, made, content, query, dict(headers))
    key = None
    if draw(st.integers(0, 9)) == 0 or endpoint == ("DELETE", "auth/apikey/me"):
        # The fuzzer would delete its own key.
        key = draw(st.sampled_from(["", "tml-", "tml-none", "eyJhbGciOiJIUzI1NiJ9.e30.a"]))
    return sent, key
