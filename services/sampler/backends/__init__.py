"""The inference engines, and which one a machine gets."""

# ruff: noqa: PLC0415 - an engine is imported only where it is used

from __future__ import annotations

import logging
import traceback
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from services.sampler.backends.base import Backend
    from services.sampler.config import SamplerConfig

log = logging.getLogger(__name__)

# transformers imports them where they are installed, though nothing here uses them.
_UNWANTED = ("torchvision", "torchaudio", "torchcodec")


class BrokenInstallationError(Exception):
    """No engine can be imported; the text says what to do."""


def choose(config: SamplerConfig) -> Backend:
    """The backend that `config` asks for; for "auto", vLLM where it imports, else transformers.

    Raises:
        BrokenInstallationError: it cannot be imported.
    """
    try:
        if config.backend != "transformers":
            try:
                return _vllm(config)
            except ImportError as error:
                if config.backend == "vllm":
                    raise
                log.warning("backend: transformers, which is slow: vLLM does not import: %s", error)
        from services.sampler.backends.transformers import TransformersBackend

        return TransformersBackend(config)
    except Exception as error:  # an import can fail in any way
        raise BrokenInstallationError(
            f"the inference engine cannot be imported: {explained(error)}"
        ) from error


def explained(error: Exception) -> str:
    """What `error` says, and where it comes from a package that should not be there, the cure."""
    text = f"{type(error).__name__}: {error}"
    trace = "".join(traceback.format_exception(error))
    culprits = [name for name in _UNWANTED if name in trace]
    if not culprits:
        return text
    return (
        f"{text}. A build of {' and '.join(culprits)} that does not match the installed torch "
        "breaks every import of transformers, and nothing here needs it: "
        f"pip uninstall {' '.join(culprits)}"
    )


def _vllm(config: SamplerConfig) -> Backend:
    from services.sampler.backends.vllm import VllmBackend

    log.info("backend: vllm")
    return VllmBackend(config)
