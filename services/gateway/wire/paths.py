"""Paths of checkpoints: `tinker://{model_id}/{kind}/{name}`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, cast, get_args

from rollmesh.errors import InvalidRequest
from services.gateway.wire.ids import ModelId

Kind = Literal["weights", "sampler_weights", "external_weights"]
TYPES: dict[Kind, str] = {
    "weights": "training",
    "sampler_weights": "sampler",
    "external_weights": "external",
}
"""What the SDK calls a checkpoint of each kind."""

# What stands in a URL, and in a record's key, as it is.
_NAME = re.compile(r"(?!\.{1,2}$)[A-Za-z0-9_.,:=@+~-]{1,128}")


@dataclass(frozen=True, slots=True)
class CheckpointPath:
    """A checkpoint of a run, under the name that its maker gave it."""

    model: ModelId
    kind: Kind
    name: str

    def __str__(self) -> str:
        return f"tinker://{self.model}/{self.checkpoint_id}"

    @property
    def checkpoint_id(self) -> str:
        """Its id within the run."""
        return f"{self.kind}/{self.name}"

    @classmethod
    def of(cls, model: ModelId, kind: str, name: str) -> CheckpointPath:
        """Of these parts; InvalidRequest: one of them cannot be."""
        if kind not in get_args(Kind):
            allowed = ", ".join(get_args(Kind))
            raise InvalidRequest(
                f"kind: {kind[:50]!r} is not one of {allowed}", field="kind", allowed=allowed
            )
        return cls(model, cast("Kind", kind), check_name(name))

    @classmethod
    def parse(cls, text: str, *, field: str = "path") -> CheckpointPath:
        """What `text` says."""
        parts = text.removeprefix("tinker://").split("/")
        if not text.startswith("tinker://") or len(parts) != 3:
            form = "tinker://RUN/KIND/NAME"
            raise InvalidRequest(
                f"{field}: {text[:200]!r} is not {form}",
                field=field,
                value=text[:200],
                allowed=form,
            )
        return cls.of(ModelId.parse(parts[0], field=field), parts[1], parts[2])


def check_name(name: str, *, field: str = "path") -> str:
    """`name`, which must be one that a checkpoint may have."""
    if not _NAME.fullmatch(name):
        raise InvalidRequest(
            f"{field}: {name[:150]!r} is no name of a checkpoint: 1–128 of letters, digits and "
            "_.,:=@+~-",
            field=field,
            value=name[:150],
            allowed=_NAME.pattern,
        )
    return name
