"""A version on disk, in PEFT's format."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from rollmesh.errors import CapacityExhausted, FailedPrecondition, InvalidRequest

if TYPE_CHECKING:
    from pathlib import Path

    from rollmesh.types import AdapterExport
    from services.sampler.download import Transfer


def check_export(export: AdapterExport, *, base_model: str, max_rank: int) -> None:
    """Refuse a version that belongs elsewhere or that no slot has room for."""
    if export.base_model != base_model:
        raise InvalidRequest(
            f"source: {export.adapter} is an adapter of {export.base_model!r}, this sampler has "
            f"{base_model!r}",
            field="source",
            value=export.base_model,
            allowed=base_model,
        )
    rank = _rank(export.adapter_config_json)
    if rank > max_rank:
        raise InvalidRequest(
            f"source: {export.adapter} has rank {rank}, this sampler takes at most {max_rank}",
            field="source",
            value=rank,
            allowed=max_rank,
        )


def write_folder(transfer: Transfer, folder: Path) -> None:
    """Make `folder` of exactly the bytes that were verified.

    Raises:
        CapacityExhausted: the disk is full.
    """
    try:
        folder.mkdir()
        (folder / "adapter_model.safetensors").write_bytes(transfer.file)
        (folder / "adapter_config.json").write_text(
            transfer.export.adapter_config_json, encoding="utf-8"
        )
    except OSError as error:
        raise CapacityExhausted(
            f"cache_dir has no room for an adapter of {len(transfer.file)} bytes: {error.strerror}",
            resource="cache_dir",
        ) from None


def _rank(adapter_config_json: str) -> int:
    """Largest rank that a PEFT configuration gives any layer."""
    try:
        config: dict[str, Any] = json.loads(adapter_config_json)
        return max(int(config["r"]), *map(int, (config.get("rank_pattern") or {}).values()), 0)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FailedPrecondition(f"adapter_config.json is not PEFT's: {error!r}") from None
