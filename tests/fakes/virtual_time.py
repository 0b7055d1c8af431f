"""An event loop whose clock jumps to the next timer: hours of waiting in no time, and the same
order of events in every run. It knows no sockets.
"""

from __future__ import annotations

import asyncio


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        super().__init__()
        self._now = 0.0
        select = self._selector.select

        def jump(timeout=None):
            if timeout is None:
                raise AssertionError("deadlock: every task waits, and no timer is set")
            self._now += max(timeout, 0.0)
            return select(0)

        self._selector.select = jump

    def time(self) -> float:
        return self._now

    def busy(self, seconds) -> None:
        """Whoever calls this has computed for so long, and nobody else was served meanwhile."""
        self._now += seconds

    def run_in_executor(self, executor, func, *args):
        """No time passes in a thread, and no order of events hangs on one."""
        done = self.create_future()
        try:
            done.set_result(func(*args))
        except Exception as error:  # noqa: BLE001 - whoever awaits it gets it
            done.set_exception(error)
        return done


def simulate(coroutine):
    """Run `coroutine` to its end in virtual time."""
    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        return runner.run(coroutine)
