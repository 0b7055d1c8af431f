"""Which tool makes the sandboxes: the first of those allowed that proves itself at start."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, TypeAlias

from rollmesh.errors import FailedPrecondition, MeshError
from services.reward.sandbox.places import Sandbox
from services.reward.sandbox.runtime import runtime
from services.reward.sandbox.self_test import weakness
from services.reward.sandbox.tools import Bubblewrap, Nsjail

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping

    from services.reward.config import SandboxConfig
    from services.reward.sandbox.runtime import Runtime
    from services.reward.sandbox.tools import Tool

TOOLS: Mapping[str, Callable[[Runtime], Tool]] = {"bubblewrap": Bubblewrap, "nsjail": Nsjail}
"""In the order in which `auto` tries them."""

Choice: TypeAlias = "Sandbox | str"
"""The sandbox, or why there is none."""


@contextlib.asynccontextmanager
async def sandbox(config: SandboxConfig) -> AsyncIterator[Choice]:
    """The sandbox that `config` asks for, until the block ends.

    Raises:
        FailedPrecondition: it asks for one tool, which is not there or not tight; it says why.
    """
    if config.tool == "none":
        yield "its configuration has sandbox.tool: none"
        return
    problems = []
    making = runtime()
    made = await asyncio.to_thread(making.__enter__)
    with contextlib.ExitStack() as stack:
        stack.push(making)
        for name in TOOLS if config.tool == "auto" else (config.tool,):
            chosen = await _proved(name, made, config)
            if isinstance(chosen, Sandbox):
                yield chosen
                return
            problems.append(chosen)
    problem = "; ".join(problems)
    if config.tool != "auto":
        raise FailedPrecondition(
            f"sandbox.tool: {config.tool} cannot be used: {problem}", field="sandbox.tool"
        )
    yield problem


async def _proved(name: str, made: Runtime, config: SandboxConfig) -> Choice:
    try:
        chosen = Sandbox(
            TOOLS[name](made),
            max_runs=config.max_runs,
            max_cpu_s=config.max_cpu_s,
            max_memory_bytes=config.max_memory_mib << 20,
        )
        problem = await weakness(chosen)
    except MeshError as error:
        return str(error)
    return f"{name} is not tight here: {problem}" if problem else chosen
