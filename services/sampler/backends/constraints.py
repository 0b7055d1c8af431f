"""Whether a schema or regular expression can be compiled, found out where it can do no harm.

38 bytes of schema can keep xgrammar busy for half a minute. So what a caller sends is compiled once
in a process that ends when it has used up its time, before the engine, which compiles it again,
gets it. A process that has everything loaded forks one for each: that takes milliseconds.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Literal

from rollmesh.errors import Unavailable

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.connection import Connection
    from multiprocessing.context import SpawnProcess

Kind = Literal["json_schema", "regex"]

CPU_S = 0.5
"""What compiling may take: processor time, so that a busy machine refuses nothing."""
_PATIENCE_S = 60.0
"""For an answer, which for the first waits for the process to load what it needs."""
_MAX_KNOWN = 256
_MAX_REASON = 1000


class Constraints:
    """Checks constraints for the model at `source`, one at a time.

    Its process starts with the first of them: most samplers never see one.
    """

    def __init__(self, source: str, vocab_size: int) -> None:
        self._arguments = (source, vocab_size, CPU_S)
        # One thread: an answer that nobody waits for any more is not taken for the next one's.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="constraints")
        self._process: SpawnProcess | None = None
        self._connection: Connection | None = None
        # What was accepted; the requests of a job all have the same.
        self._known: OrderedDict[tuple[Kind, str], None] = OrderedDict()
        self._closed = False

    async def refusal(self, kind: Kind, text: str) -> str:
        """Why it cannot be had; empty: it can.

        Raises:
            Unavailable: the process that checks it died, or stands still.
        """
        if (kind, text) in self._known:
            self._known.move_to_end((kind, text))
            return ""
        loop = asyncio.get_running_loop()
        reason = await loop.run_in_executor(self._thread, self._ask, kind, text)
        if not reason:
            self._known[kind, text] = None
            if len(self._known) > _MAX_KNOWN:
                self._known.popitem(last=False)
        return reason

    async def close(self) -> None:
        """End the process; checks that are under way end with it."""
        self._closed = True
        if self._process is not None:
            self._process.kill()
        await asyncio.get_running_loop().run_in_executor(self._thread, self._end)
        self._thread.shutdown()

    def _ask(self, kind: Kind, text: str) -> str:
        if self._closed:
            raise Unavailable("the sampler is going away")
        if self._connection is None:
            self._start()
        assert self._connection is not None  # noqa: S101 - it has just been made
        try:
            self._connection.send((kind, text))
            if self._connection.poll(_PATIENCE_S):
                reason: str = self._connection.recv()
                return reason
        except (EOFError, OSError):
            pass
        self._end()
        raise Unavailable("the process that checks constraints does not answer")

    def _start(self) -> None:
        # Forked, it would have the threads' locks without the threads.
        context = multiprocessing.get_context("spawn")
        self._connection, far_end = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(far_end, *self._arguments), name="constraints", daemon=True
        )
        self._process.start()
        # Or the death of the process would not end what waits for its answer.
        far_end.close()

    def _end(self) -> None:
        if self._process is not None and self._connection is not None:
            self._process.kill()
            self._process.join()
            self._connection.close()
        self._process = self._connection = None


def _serve(connection: Connection, source: str, vocab_size: int, cpu_s: float) -> None:
    """The process: answers until the sampler is gone."""
    # Ctrl-C goes to all processes; the sampler ends this one after its last request.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    import xgrammar  # noqa: PLC0415 - the sampler itself does without
    from transformers import AutoTokenizer  # noqa: PLC0415

    tokens = xgrammar.TokenizerInfo.from_huggingface(
        AutoTokenizer.from_pretrained(source), vocab_size=vocab_size
    )
    compiler = xgrammar.GrammarCompiler(tokens)
    compile_: dict[Kind, Callable[[str], Any]] = {
        "json_schema": compiler.compile_json_schema,
        "regex": compiler.compile_regex,
    }
    while True:
        try:
            kind, text = connection.recv()
        except EOFError:
            return
        connection.send(tried(compile_[kind], text, cpu_s))


def tried(compile_: Callable[[str], Any], text: str, cpu_s: float) -> str:
    """Why `compile_` refuses `text`, as a fork that may use `cpu_s` found out; empty: it does not.

    The process must have one thread.
    """
    read_end, write_end = os.pipe()
    pid = os.fork()
    if not pid:
        _try(compile_, text, cpu_s, write_end)
    os.close(write_end)
    _, status = os.waitpid(pid, 0)
    with os.fdopen(read_end, "rb") as pipe:
        reason = pipe.read().decode(errors="replace")
    if not os.WIFSIGNALED(status):
        return reason
    if os.WTERMSIG(status) == signal.SIGPROF:
        return f"too costly to compile: it takes more than {cpu_s} s"
    return "cannot be compiled"  # Its stack overflowed, perhaps.


def _try(compile_: Callable[[str], Any], text: str, cpu_s: float, write_end: int) -> None:
    """The fork, which does not return."""
    # Nobody handles this signal, so it ends the process, in the middle of native code too.
    signal.setitimer(signal.ITIMER_PROF, cpu_s)
    try:
        compile_(text)
    except BaseException as error:  # noqa: BLE001 - whatever it is, the constraint is refused
        reason = str(error) or type(error).__name__
        os.write(write_end, reason.encode(errors="replace")[:_MAX_REASON])
    finally:
        os._exit(0)
