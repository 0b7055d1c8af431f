"""Sampling sessions, and samples of them."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from cachetools import TTLCache

from rollmesh.api.common.v1 import policy_pb2
from rollmesh.api.coordinator.v1 import future_service_pb2 as pb
from rollmesh.errors import AlreadyExists, InvalidRequest, MeshError, NotFound
from services.gateway.sessions import SESSION_TTL_S
from services.gateway.wire.ids import CLONE, SamplerId, session_id
from services.gateway.wire.paths import CheckpointPath
from services.gateway.wire.samples import Sample, sample_request
from services.gateway.wire.tickets import SampleTicket

if TYPE_CHECKING:
    from collections.abc import Callable

    from services.gateway.callers import Caller
    from services.gateway.capabilities import Capabilities
    from services.gateway.checkpoints import Checkpoints
    from services.gateway.documents import Document, Documents, Fields
    from services.gateway.policies import Policies
    from services.gateway.ports import Futures
    from services.gateway.sessions import Sessions
    from services.gateway.wire import bodies
    from services.gateway.wire.ids import ModelId


log = logging.getLogger(__name__)

SAMPLER_TTL_S = 30 * 86400.0
"""For so long after its last sample a sampling session is known."""
IN_USE_S = 60.0
"""Sampled from so lately, a version is kept, however many newer ones its session has."""
_USE_NOTED_S = 30.0
_KNOWN = 10_000
_TRIMMED_AT_ONCE = 64


def sampler_key(sampler: SamplerId) -> str:
    """Key of its document."""
    return f"samplers/{sampler}"


class Sampling:
    """Makes sampling sessions and takes samples.

    Of one session's sampling sessions it keeps the versions of the newest `leases_per_session`, and
    of those that are in use: who saves often would else hold more than a project may.

    Args:
        clock: Unix seconds.
        monotonic: seconds.
    """

    def __init__(
        self,
        futures: Futures,
        documents: Documents,
        sessions: Sessions,
        checkpoints: Checkpoints,
        policies: Policies,
        capabilities: Capabilities,
        clock: Callable[[], float],
        monotonic: Callable[[], float],
        *,
        leases_per_session: int,
    ) -> None:
        self._futures = futures
        self._documents = documents
        self._sessions = sessions
        self._checkpoints = checkpoints
        self._policies = policies
        self._capabilities = capabilities
        self._clock = clock
        self._leases_per_session = leases_per_session
        # Whose use this gateway wrote down a moment ago.
        self._noted: TTLCache[str, bool] = TTLCache(_KNOWN, _USE_NOTED_S, timer=monotonic)

    async def create(self, caller: Caller, body: bodies.CreateSampler) -> Fields:
        """A sampling session of a base model or a checkpoint."""
        sampler = SamplerId(session_id(body.session_id), body.sampling_session_seq_id)
        await self._sessions.get(caller, sampler.session)
        if (body.base_model is None) == (body.model_path is None):
            raise InvalidRequest("exactly one of base_model and model_path is needed")
        asked = {"base_model": body.base_model, "model_path": body.model_path}
        found = await self._documents.find(caller.project, sampler_key(sampler))
        if found is None:
            if body.model_path is None:
                await self._capabilities.check_base_model(body.base_model or "")
                fields: Fields = {"base_model": body.base_model}
            else:
                path = CheckpointPath.parse(body.model_path, field="model_path")
                fields = await self._of_path(caller, path, f"sampler-{sampler}")
            found, ours = await self._documents.create(
                caller.project,
                sampler_key(sampler),
                {**fields, "asked": asked, "time": self._clock()},
                ttl_s=SAMPLER_TTL_S,
            )
            if ours and "lease" in fields:
                await self._trim(caller, sampler.session)
        if found.fields.get("asked") != asked:
            raise AlreadyExists(f"{sampler} is another sampling session", resource=sampler)
        return {"type": "create_sampling_session", "sampling_session_id": str(sampler)}

    async def adopt(
        self,
        caller: Caller,
        model: ModelId,
        seq: int,
        kept: pb.Kept,
        *,
        base_model: str,
        inflight: bool,
    ) -> SamplerId:
        """The sampling session of an unnamed save."""
        sampler = SamplerId(model.session, model.number, seq)
        fields = {
            "base_model": base_model,
            "adapter": kept.policy.adapter,
            "version": kept.policy.policy_version,
            "digest": kept.digest,
            "lease": kept.lease.name,
            "inflight": inflight,
            "time": self._clock(),
        }
        _, ours = await self._documents.create(
            caller.project, sampler_key(sampler), fields, ttl_s=SAMPLER_TTL_S
        )
        if ours:
            await self._trim(caller, sampler.session)
        return sampler

    async def info(self, caller: Caller, text: str) -> Fields:
        """What a sampling session samples from."""
        sampler = SamplerId.parse(text)
        fields = (await self._get(caller, sampler)).fields
        return {
            "sampler_id": str(sampler),
            "base_model": fields["base_model"],
            "model_path": fields.get("model_path"),
        }

    async def join(self, caller: Caller, body: bodies.OfSampler) -> Fields:
        """A number for one more client of a sampling session, from 1."""
        sampler = SamplerId.parse(body.sampling_session_id)
        await self._get(caller, sampler)
        counter = await self._documents.count(
            caller.project, f"joins/{sampler}", ttl_s=SESSION_TTL_S
        )
        return {"type": "join_sampling_session", "client_counter": counter}

    async def sample(self, caller: Caller, body: Sample) -> dict[str, Any]:
        """The ticket of a sample."""
        sampler = SamplerId.parse(body.sampling_session_id)
        document = await self._get(caller, sampler)
        fields = document.fields
        newest = bool(fields.get("inflight"))
        request = sample_request(body, caller.project, _policy(fields), continue_on_newest=newest)
        await self._policies.renew([document])
        await self._note_use(caller, document)
        ticket = SampleTicket(sampler, body.seq_id, body.prompt_logprobs_last_n or 0)
        await self._futures.create(
            caller.future(ticket.future_id),
            pb.Work(sample=request),
            group=sampler.group(body.seq_id // CLONE),
        )
        return {
            "request_id": str(ticket),
            "sample_sequence_ids": [
                f"{sampler}:{body.seq_id}:{index}" for index in range(body.num_samples)
            ],
        }

    async def revive(self, caller: Caller, sampler: SamplerId) -> bool:
        """Have its version again, which was not found. False: its weights are nowhere any more.

        Whoever else asks at the same moment is answered with the same version and lease.
        """
        document = await self._documents.find(caller.project, sampler_key(sampler))
        path = document.fields.get("model_path") if document else None
        if document is None or path is None:
            return False
        if await self._policies.is_held(document.fields.get("lease", "")):
            return True
        try:
            fields = await self._of_path(
                caller,
                CheckpointPath.parse(path),
                f"revive-{sampler}-{document.revision}",
                digest=document.fields["digest"],
            )
        except NotFound:
            return False
        await self._documents.change(
            caller.project,
            sampler_key(sampler),
            lambda old: None if old.get("lease") == fields["lease"] else {**old, **fields},
            ttl_s=SAMPLER_TTL_S,
        )
        return True

    async def _note_use(self, caller: Caller, document: Document) -> None:
        """Write down that it is sampled from, now and then; what was let go of is held again."""
        if document.key in self._noted:
            return
        # Before it is: of many that come at once one does it.
        self._noted[document.key] = True
        more = {"used": self._clock()}
        try:
            if document.fields.get("lease") == "":
                more |= await self._policies.hold_again(caller, document)
            await self._documents.change(
                caller.project,
                document.key,
                lambda fields: {**fields, **more},
                ttl_s=SAMPLER_TTL_S,
            )
        except MeshError:
            self._noted.pop(document.key, None)
            raise

    async def _trim(self, caller: Caller, session: str) -> None:
        """Let go of versions that are neither new nor in use. It may fail: they end by themselves.

        Where one of them is sampled from all the same it has its version for as long as the mesh
        has, and then that of its checkpoint.
        """
        try:
            older, _ = await self._documents.page(
                caller.project,
                f"samplers/{session}:",
                limit=_TRIMMED_AT_ONCE,
                offset=self._leases_per_session,
            )
            for document in older:
                await self._release(caller, document)
        except MeshError as error:
            log.warning("leases of session %s are not let go of: %s", session, error)

    async def _release(self, caller: Caller, document: Document) -> None:
        lease = document.fields.get("lease")
        unused_since = self._clock() - IN_USE_S
        if not lease or _used(document.fields) > unused_since:
            return

        def without(fields: Fields) -> Fields | None:
            if fields.get("lease") != lease or _used(fields) > unused_since:
                return None
            return {**fields, "lease": ""}

        changed = await self._documents.change(
            caller.project, document.key, without, ttl_s=SAMPLER_TTL_S
        )
        if not changed.fields["lease"]:
            await self._policies.release(lease)

    async def _of_path(
        self, caller: Caller, path: CheckpointPath, request_id: str, *, digest: str | None = None
    ) -> Fields:
        """`digest`: of the weights that it must have; another checkpoint may have its name now."""
        checkpoint = await self._checkpoints.get(caller, path)
        if digest not in {None, checkpoint.digest}:
            raise NotFound(f"{path} has other weights by now", resource=path)
        held = await self._policies.hold(caller, checkpoint, request_id)
        return {"base_model": checkpoint.base_model, "model_path": str(path), **held}

    async def _get(self, caller: Caller, sampler: SamplerId) -> Document:
        try:
            return await self._documents.seen(caller.project, sampler_key(sampler))
        except NotFound:
            raise NotFound(f"there is no sampling session {sampler}", resource=sampler) from None


def _used(fields: Fields) -> float:
    """When it was last sampled from, or else made: Unix seconds, up to _USE_NOTED_S too early."""
    return float(fields.get("used") or fields["time"])


def _policy(fields: Fields) -> policy_pb2.PolicyRef:
    """What to sample from. In flight it is whatever is newest, also in the middle of a sample."""
    if "adapter" not in fields:
        return policy_pb2.PolicyRef(base_model=fields["base_model"])
    return policy_pb2.PolicyRef(
        adapter=fields["adapter"],
        policy_version=None if fields.get("inflight") else fields["version"],
    )
