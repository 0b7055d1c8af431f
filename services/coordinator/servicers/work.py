"""The work of futures as messages: checked, and done by the servicers of the same calls."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

from rollmesh import convert, types
from rollmesh.api.common.v1 import policy_pb2
from rollmesh.api.coordinator.v1 import future_service_pb2 as pb
from rollmesh.errors import CapacityExhausted, InvalidRequest, MeshError, NotFound
from rollmesh.names import parse_adapter, parse_checkpoint, parse_future, project_name
from rollmesh.rpc.channel import MAX_MESSAGE_BYTES
from services.coordinator.future_work import Work
from services.coordinator.servicers.adapters import AdapterServicer
from services.coordinator.servicers.training import TrainingServicer
from services.coordinator.store import derived_request_id

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from services.coordinator.adapters import Adapters
    from services.coordinator.checkpoints import Checkpoints
    from services.coordinator.leases import Leases
    from services.coordinator.policies import Policies

_OPS = {"forward_backward", "optim_step", "load_checkpoint"}
_MAX_RESULT_BYTES = MAX_MESSAGE_BYTES - 64 * 1024
"""What is around it takes a little too."""


def work_from_pb(name: str, message: pb.Work) -> Work:
    """The work of the future of that name.

    Raises:
        InvalidRequest: there is none, or a sequence or request_id in it.
    """
    kind = _kind(message)
    request = getattr(message, kind)
    for field in ("sequence", "request_id"):
        if value := getattr(request, field, None):
            path = f"work.{kind}.{field}"
            raise InvalidRequest(
                f"{path}: {value!r} is not the caller's to choose",
                field=path,
                value=value,
                allowed="none",
            )
    body = message.SerializeToString(deterministic=True)
    adapter = request.adapter if kind in _OPS and _is_own(name, request.adapter) else ""
    return Work(body, adapter, samples=kind == "sample")


class MessageWorks:
    """A future_work.Works over the servicers and cores of a coordinator."""

    def __init__(
        self,
        adapters: Adapters,
        checkpoints: Checkpoints,
        policies: Policies,
        leases: Leases,
    ) -> None:
        self._adapters = adapters
        self._checkpoints = checkpoints
        self._policies = policies
        self._leases = leases
        of_adapters = AdapterServicer(adapters, checkpoints)
        of_training = TrainingServicer(adapters, checkpoints)
        self._calls: dict[str, Any] = {
            "create_adapter": of_adapters.CreateAdapter,
            "fork_adapter": of_adapters.ForkAdapter,
            "forward_backward": of_training.ForwardBackward,
            "forward": of_training.Forward,
            "optim_step": of_training.OptimStep,
            "load_checkpoint": of_training.LoadCheckpoint,
        }

    async def do(self, future: str, body: bytes, sequence: int) -> bytes:
        """All but sampling."""
        work = pb.Work.FromString(body)
        kind = _kind(work)
        request = getattr(work, kind)
        if kind == "refused":
            return pb.Future(failure=request).SerializeToString()
        _check_names(future, request)
        if kind == "keep":
            return pb.Future(kept=await self._keep(future, request)).SerializeToString()
        if kind in _OPS:
            request.sequence = sequence
        elif kind != "forward":
            request.request_id = derived_request_id("future", future)
        result: dict[str, Any] = {kind: await self._calls[kind](request, None)}
        return pb.Future(**result).SerializeToString()

    async def sample(self, future: str, body: bytes, told: Callable[[str], None]) -> bytes:
        """Whole completions."""
        request = pb.Work.FromString(body).sample
        _check_names(future, request)
        chunks: defaultdict[int, list[types.CompletionChunk]] = defaultdict(list)
        drawn = self._policies.sample(
            request.project,
            convert.policy_from_pb(request.policy),
            tuple(request.prompt_token_ids),
            request.num_completions,
            convert.params_from_pb(request.params),
            continue_on_newest=request.continue_on_newest,
            priority=request.priority,
            told=told,
        )
        # Whoever is cancelled in the middle gives its place up then, not at garbage collection.
        async with contextlib.aclosing(drawn):
            async for chunk in drawn:
                chunks[chunk.index].append(chunk)
        sampled = pb.Sampled(completions=map(convert.chunk_to_pb, _joined(chunks)))
        if sampled.ByteSize() > _MAX_RESULT_BYTES:
            raise CapacityExhausted(
                f"the completions take {sampled.ByteSize()} bytes, more than a message may have",
                value=sampled.ByteSize(),
                allowed=_MAX_RESULT_BYTES,
            )
        return pb.Future(sampled=sampled).SerializeToString()

    def failure(self, error: MeshError) -> bytes:
        """As a result."""
        failure = pb.Failure(reason=error.reason, message=str(error), metadata=error.context)
        return pb.Future(failure=failure).SerializeToString()

    async def _keep(self, future: str, keep: pb.Keep) -> pb.Kept:
        parse_adapter(keep.adapter, field="work.keep.adapter")
        ttl_s = convert.optional_duration_from_pb(keep, "lease_ttl")
        if ttl_s is not None and not keep.publish:
            raise InvalidRequest(
                "work.keep.lease_ttl: without publish there is no version to lease",
                field="work.keep.lease_ttl",
                value=ttl_s,
                allowed="none without publish",
            )
        if keep.checkpoint:
            _check_checkpoint(keep)
        kept = pb.Kept()
        if keep.publish:
            version = await self._adapters.publish_adapter(
                keep.adapter, with_pending_gradients=True
            )
            policy = types.PolicyRef(adapter=keep.adapter, policy_version=version.policy_version)
            kept.policy.CopyFrom(convert.policy_to_pb(policy))
            kept.digest = version.digest
            if ttl_s is not None:
                lease = await self._lease(future, policy, ttl_s)
                kept.lease.CopyFrom(convert.lease_to_pb(lease))
        if keep.checkpoint:
            made = await self._checkpoints.create_checkpoint(
                keep.checkpoint,
                ttl_s=convert.optional_duration_from_pb(keep, "checkpoint_ttl"),
                request_id=derived_request_id("future", future, "checkpoint"),
            )
            kept.checkpoint.CopyFrom(convert.checkpoint_to_pb(made))
        return kept

    async def _lease(self, future: str, policy: types.PolicyRef, ttl_s: float) -> types.Lease:
        parent = project_name(parse_future(future)[0])
        request_id = derived_request_id("future", future, "lease")
        try:
            return await self._leases.create(parent, policy, ttl_s=ttl_s, request_id=request_id)
        except NotFound:
            # The one that was made before a crash may have expired meanwhile.
            return await self._leases.create(parent, policy, ttl_s=ttl_s, request_id="")


def _kind(message: pb.Work) -> str:
    kind = message.WhichOneof("kind")
    if kind is None:
        allowed = ", ".join(field.name for field in pb.Work.DESCRIPTOR.fields)
        raise InvalidRequest(
            f"work: nothing is to be done; needed is one of {allowed}",
            field="work",
            allowed=allowed,
        )
    return str(kind)


def _is_own(future: str, adapter: str) -> bool:
    """Whether `adapter` is the name of one of the future's project."""
    try:
        return parse_adapter(adapter)[0] == parse_future(future)[0]
    except InvalidRequest:
        return False


def _check_names(future: str, request: Any) -> None:
    """Raise NotFound, as for what does not exist, where `request` names another project's."""
    project = project_name(parse_future(future)[0])
    for name in _names(request):
        if name.startswith("projects/") and not f"{name}/".startswith(f"{project}/"):
            raise NotFound(f"there is no {name}", resource=name)


def _names(request: Any) -> Iterator[str]:
    for field in ("project", "name", "adapter", "checkpoint"):
        if value := getattr(request, field, ""):
            yield value
    policy = getattr(request, "policy", None)
    if isinstance(policy, policy_pb2.PolicyRef):
        yield policy.adapter


def _check_checkpoint(keep: pb.Keep) -> None:
    project, adapter, _ = parse_checkpoint(keep.checkpoint, field="work.keep.checkpoint")
    if (project, adapter) != parse_adapter(keep.adapter):
        raise InvalidRequest(
            f"work.keep.checkpoint: {keep.checkpoint} is not of {keep.adapter}",
            field="work.keep.checkpoint",
            value=keep.checkpoint,
            allowed=f"{keep.adapter}/checkpoints/{{id}}",
        )


def _joined(chunks: dict[int, list[types.CompletionChunk]]) -> Iterator[types.CompletionChunk]:
    """One chunk for each completion; what is of the prompt is in the first."""
    wholes = {index: types.join_chunks(parts) for index, parts in chunks.items()}
    prompt = next((w.prompt_logprobs for w in wholes.values() if w.prompt_logprobs), None)
    for place, index in enumerate(sorted(wholes)):
        whole = wholes[index]
        values = {field.name: getattr(whole, field.name) for field in fields(whole)}
        values["prompt_logprobs"] = None if place else prompt
        yield replace(chunks[index][-1], **values)
