"""How vLLM's engine process runs its workers: as ever, but not longer than the sampler lives.

vLLM's workers notice the death of their engine process, but the engine process does not notice
the death of the process that started it: after a SIGKILL of the sampler, engine and workers would
keep their memory for ever. An executor is what vLLM lets one choose that lives in there.
"""

from __future__ import annotations

import multiprocessing
import os
import threading

from vllm.v1.executor.multiproc_executor import MultiprocExecutor


class OwnedExecutor(MultiprocExecutor):  # type: ignore[misc]  # vLLM is untyped to mypy
    """vLLM's executor of worker processes, in an engine process that ends with its parent."""

    def _init_executor(self) -> None:
        # Ctrl-C goes to a whole process group. The sampler drains and then stops the engine; the
        # engine in a group of its own does not drop its requests before.
        os.setpgid(0, 0)
        threading.Thread(target=_end_with_parent, daemon=True, name="end-with-parent").start()
        super()._init_executor()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None  # noqa: S101 - an engine process is always started by another
    parent.join()
    # The workers see their pipe to this process close, and end too.
    os._exit(1)
