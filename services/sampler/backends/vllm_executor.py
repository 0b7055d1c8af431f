"""How vLLM's engine process runs its workers: as ever, but not longer than the sampler lives.

The engine process does not notice the death of the process that started it: after a SIGKILL of the
sampler, engine and workers would keep their memory for ever. An executor is what vLLM lets one
choose that lives in there.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from typing import TYPE_CHECKING

from vllm.v1.executor.multiproc_executor import MultiprocExecutor
from vllm.v1.executor.uniproc_executor import UniProcExecutor

from services.sampler.backends.vllm_life import shared_folder, show_life

if TYPE_CHECKING:
    from vllm.config import VllmConfig


class InProcess(UniProcExecutor):  # type: ignore[misc]  # vLLM is untyped to mypy
    """One worker, within the engine process: no other process to start, and to wait for spinning.

    That spinning took half a core of two, which the worker then lacked.
    """

    def _init_executor(self) -> None:
        _begin(self.vllm_config)
        super()._init_executor()


class InProcesses(MultiprocExecutor):  # type: ignore[misc]
    """A worker process for each device."""

    def _init_executor(self) -> None:
        _begin(self.vllm_config)
        super()._init_executor()


def _begin(vllm_config: VllmConfig) -> None:
    # Ctrl-C goes to a whole process group. The sampler drains and then stops the engine; the engine
    # in a group of its own does not drop its requests before.
    os.setpgid(0, 0)
    threading.Thread(target=_end_with_parent, daemon=True, name="end-with-parent").start()
    show_life(shared_folder(vllm_config), "engine")


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None  # noqa: S101 - an engine process is always started by another
    parent.join()
    # The workers are in this group, and one that hangs or is stopped would not end by itself.
    os.killpg(0, signal.SIGKILL)
