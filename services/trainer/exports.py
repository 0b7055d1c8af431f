"""Published versions on their way to the blob store, beside the ops that go on."""

from __future__ import annotations

import asyncio
import contextvars
import logging
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from rollmesh.errors import MeshError, Unavailable
from rollmesh.exports import export_key, write_export
from rollmesh.telemetry import log_fields

if TYPE_CHECKING:
    from collections.abc import Callable

    from rollmesh.blobs import Blobs
    from services.trainer.export import AdapterVersion

log = logging.getLogger(__name__)

NUM_THREADS = 2
"""Versions that are written at once."""
MAX_UNWRITTEN = 16
"""Versions that are in main memory because they are not written yet; the next one waits."""
MAX_UNWRITTEN_EACH = 2
"""Of them those of one adapter, so that none fills the memory that is for all."""
WAIT_S = 5.0
"""How long anybody waits for versions to be written: an adapter's other ops wait behind him."""
FIRST_RETRY_S, LAST_RETRY_S = 0.25, 8.0
"""From a failed attempt to write to the next one: doubled each time up to the last."""


@dataclass(eq=False)
class _Export:
    """A version with its key; `begun` once it is one of the unwritten."""

    key: str
    version: AdapterVersion
    context: contextvars.Context
    begun: asyncio.Future[None]
    written: asyncio.Future[None]
    retry_s: float = 0.0

    @property
    def adapter(self) -> str:
        return self.version.header.adapter


class Exports:
    """Writes versions to `blobs`, and tries again until each is written.

    None is left out: somebody may have a lease on any of them.

    Args:
        new_id: 32 hexadecimal digits that were never used before.
    """

    def __init__(self, blobs: Blobs, *, new_id: Callable[[], str]) -> None:
        self._blobs = blobs
        self._new_id = new_id
        self._threads = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="trainer-exports")
        # In the order in which they came. Publishes take turns, so it is one of each adapter.
        self._waiting: dict[_Export, None] = {}
        self._unwritten: defaultdict[str, set[_Export]] = defaultdict(set)
        self._closed = False

    async def write(self, version: AdapterVersion) -> str:
        """Begin to write `version`, as soon as not too many are under way; return its key.

        Raises:
            Unavailable: the blob store is WAIT_S behind, or the trainer is going away.
        """
        loop = asyncio.get_running_loop()
        export = _Export(
            key=export_key(self._new_id()),
            version=version,
            # The thread sees the caller's trace and log fields.
            context=contextvars.copy_context(),
            begun=loop.create_future(),
            written=loop.create_future(),
        )
        self._waiting[export] = None
        self._begin()
        try:
            async with asyncio.timeout(WAIT_S):
                await export.begun
        except TimeoutError:
            raise _behind(export.adapter) from None
        finally:
            self._waiting.pop(export, None)
        return export.key

    async def written(self, adapter: str) -> None:
        """Return when all that was begun before of the adapter is written.

        Raises:
            Unavailable: some is not after WAIT_S.
        """
        if begun := [export.written for export in self._unwritten.get(adapter, ())]:
            _, late = await asyncio.wait(begun, timeout=WAIT_S)
            if late:
                raise _behind(adapter)

    async def close(self, within_s: float) -> None:
        """Return when all are written, or so many seconds have passed; no other is begun then."""
        try:
            async with asyncio.timeout(within_s):
                while unwritten := self._all_unwritten():
                    await asyncio.wait([export.written for export in unwritten])
        except TimeoutError:
            unwritten = self._all_unwritten()
            log.warning("%d published versions are not in the blob store", len(unwritten))
        self._closed = True
        self._begin()
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _all_unwritten(self) -> list[_Export]:
        return [export for exports in self._unwritten.values() for export in exports]

    def _begin(self) -> None:
        """Let those that wait begin for which there is room, the first ones first."""
        for export in list(self._waiting):
            if export.begun.done():
                continue  # its caller has not gone on yet
            if self._closed:
                export.begun.set_exception(Unavailable("the trainer is going away"))
            elif len(self._unwritten.get(export.adapter, ())) < MAX_UNWRITTEN_EACH:
                if len(self._all_unwritten()) >= MAX_UNWRITTEN:
                    return
                self._unwritten[export.adapter].add(export)
                export.begun.set_result(None)
                self._attempt(export)

    def _attempt(self, export: _Export) -> None:
        if self._closed:
            return
        attempt = asyncio.get_running_loop().run_in_executor(
            self._threads, partial(export.context.run, self._write, export)
        )
        attempt.add_done_callback(partial(self._attempted, export))

    def _attempted(self, export: _Export, attempt: asyncio.Future[bool]) -> None:
        if attempt.cancelled():
            return
        if not attempt.result():
            export.retry_s = min(2 * export.retry_s or FIRST_RETRY_S, LAST_RETRY_S)
            asyncio.get_running_loop().call_later(export.retry_s, self._attempt, export)
            return
        exports = self._unwritten[export.adapter]
        exports.discard(export)
        if not exports:
            del self._unwritten[export.adapter]
        export.written.set_result(None)
        self._begin()

    def _write(self, export: _Export) -> bool:
        """Whether it is in the blob store now."""
        header, version = export.version.header, export.version
        with log_fields(
            adapter=header.adapter, policy_version=header.policy_version, key=export.key
        ):
            try:
                write_export(self._blobs, export.key, header, version.digest, version.file)
            except MeshError as error:
                log.warning("a published version is not in the blob store yet: %s", error)
            except Exception:
                log.exception("bug while writing a published version")
            else:
                return True
        return False


def _behind(adapter: str) -> Unavailable:
    return Unavailable(
        f"the blob store has not taken the versions of {adapter} that were published before",
        resource="blob store",
    )
