"""TensorBoard: a folder of event files for each job."""

from __future__ import annotations

import json
import struct
from typing import TYPE_CHECKING, Any

from rollmesh.cli.sinks import LAST_EVENT, key_of, package, parameters_of, points_of
from rollmesh.names import parse_job

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from rollmesh.job import Job, JobEvent

OPTION = "--tensorboard"
_HEADER = struct.Struct("<QI")
"""Of a record: length of its body, CRC of that; the body and its CRC follow."""


class TensorBoard:
    """The run `{project}/{job}-{key}` in `folder`.

    All points of an event are one record of a file, and its number is among them: what a file holds
    whole is exported, and what was torn when a process died is not.
    """

    def __init__(self, folder: Path, job: Job) -> None:
        self._protos = package("tensorboardX.proto.summary_pb2", OPTION)
        self._events = package("tensorboardX.proto.event_pb2", OPTION)
        project, job_id = parse_job(job.name)
        self._folder = folder / project / f"{job_id}-{key_of(job)}"
        self.last_event = max(map(self._last_in, self._folder.glob("events.*")), default=0)
        self._job = job
        self._writer: Any = None

    def write(self, events: Sequence[JobEvent]) -> None:
        """Take the next events."""
        for event in events:
            step, points = points_of(event)
            if points:
                told = {**points, LAST_EVENT: float(event.number)}
                values = [
                    self._protos.Summary.Value(tag=tag, simple_value=value)
                    for tag, value in told.items()
                ]
                self._add(self._protos.Summary(value=values), step, event.time)
            self.last_event = event.number
        if self._writer:
            self._writer.flush()

    def close(self) -> str:
        """End the file."""
        if self._writer:
            self._writer.close()
        return f"tensorboard --logdir {self._folder.parent.parent}"

    def _add(self, summary: Any, step: int, time: float) -> None:
        if self._writer is None:
            self._begin()
        self._writer.write_event(self._events.Event(summary=summary, step=step, wall_time=time))

    def _begin(self) -> None:
        is_new = not self._folder.exists()
        self._folder.mkdir(parents=True, exist_ok=True)
        # Not the writer with a queue, whose flush leaves behind what is in it. Files are named by
        # the second: one of the same second would be written over.
        self._writer = package("tensorboardX.event_file_writer", OPTION).EventsWriter(
            str(self._folder / "events"), filename_suffix=f".{self.last_event}"
        )
        if is_new:
            text = json.dumps(parameters_of(self._job), indent=2)
            spec = package("tensorboardX.summary", OPTION).text("spec", f"```json\n{text}\n```")
            self._add(spec, 0, self._job.create_time)

    def _last_in(self, path: Path) -> int:
        numbers = [
            int(value.simple_value)
            for record in _records(path)
            for value in self._events.Event.FromString(record).summary.value
            if value.tag == LAST_EVENT
        ]
        return max(numbers, default=0)


def _records(path: Path) -> Iterator[bytes]:
    """The bodies of the whole records in an event file."""
    with path.open("rb") as file:
        while len(header := file.read(_HEADER.size)) == _HEADER.size:
            length, _ = _HEADER.unpack(header)
            body = file.read(length + 4)
            if len(body) < length + 4:
                return
            yield body[:length]
