"""What an exercise is: one method of the SDK, called in each way that the SDK offers it.

Exercises know no version of the SDK: `Call` settles whatever a method returns, in old versions a
value, in newer ones a future.
"""

from __future__ import annotations

import asyncio
import inspect
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.mesh.sdk.world import World

CLIENTS = ("ServiceClient", "TrainingClient", "SamplingClient", "RestClient", "AdminClient")
ASYNC = "_async"
OWN_LOOP = "await, by the SDK's own loop"


@dataclass(frozen=True, slots=True)
class Exercise:
    """`effect`: what `run` checks, in words. `note`: what a user should know of it."""

    effect: str
    run: Callable[[World, Call], None]
    note: str = ""


EXERCISES: dict[str, Exercise] = {}
"""By Class.method, for twins without their ending."""


def exercise(
    *methods: str, effect: str, note: str = ""
) -> Callable[[Callable[[World, Call], None]], Callable[[World, Call], None]]:
    """Register what is decorated as the exercise of `methods`."""

    def register(run: Callable[[World, Call], None]) -> Callable[[World, Call], None]:
        for method in methods:
            assert method not in EXERCISES, f"there are two exercises of {method}"
            EXERCISES[method] = Exercise(effect, run, note)
        return run

    return register


class Call:
    """Calls the method under test. `way`: result, or await: how a plain method's future is settled;
    afterwards how it was.

    `num`: how often it was called; `awaitable`: whether what it returned could have been awaited.
    """

    def __init__(self, owner: str, method: str, way: str) -> None:
        self.owner = owner
        self.method = method
        self.way = way
        self.num = 0
        self.awaitable = False

    def __call__(self, target: Any, *args: Any, **kwargs: Any) -> Any:
        owner = target if inspect.isclass(target) else type(target)
        assert owner.__name__ == self.owner, f"{owner} is not {self.owner}"
        self.num += 1
        if isinstance(inspect.getattr_static(owner, self.method), property):
            return getattr(target, self.method)
        function = getattr(target, self.method)
        if self.way == "await" or self.method.endswith(ASYNC):
            self.awaitable = True
            try:
                return asyncio.run(_awaited(function, args, kwargs))
            except AssertionError as error:
                if "incorrect event loop" not in str(error):
                    raise
                # A coroutine of an old version that only its own loop can run.
                self.way = OWN_LOOP
                return settled(target.holder.run_coroutine_threadsafe(function(*args, **kwargs)))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            returned = function(*args, **kwargs)
        self.awaitable = hasattr(returned, "__await__")
        return settled(returned)


async def _awaited(function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        returned = function(*args, **kwargs)
        while hasattr(returned, "__await__"):
            returned = await returned
    if hasattr(returned, "add_done_callback"):
        # A concurrent.futures.Future, of versions before they could be awaited.
        returned = await asyncio.wrap_future(returned)
    return returned


def settled(returned: Any) -> Any:
    """What a future comes to, and anything else as it is."""
    while callable(getattr(returned, "result", None)):
        returned = returned.result()
    return returned


def methods(client: type) -> Iterator[str]:
    """Names of all that is public in a class of the SDK, inherited or not."""
    for name in sorted(dir(client)):
        if not name.startswith("_"):
            yield name
