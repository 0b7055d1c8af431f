"""The inference engines, and which one a machine gets."""

# ruff: noqa: PLC0415 - an engine is imported only where it is used

from __future__ import annotations

import importlib.util
import logging
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
        raise BrokenInstallationError(_explained(error)) from error


def _vllm(config: SamplerConfig) -> Backend:
    from services.sampler.backends.vllm import VllmBackend

    log.info("backend: vllm")
    return VllmBackend(config)


def _explained(error: Exception) -> str:
    text = f"the inference engine cannot be imported: {type(error).__name__}: {error}"
    installed = [name for name in _UNWANTED if importlib.util.find_spec(name)]
    if not installed:
        return text
    return (
        f"{text}. Likely because of {', '.join(installed)}: a build that does not match the "
        "installed torch makes every import of transformers fail. Nothing here needs them: "
        f"pip uninstall {' '.join(installed)}"
    )
