"""Sampling from a policy by its name."""

from __future__ import annotations

import contextlib

from rollmesh.types import CompletionChunk, PolicyRef, PolicySpan, SamplingParams
from services.coordinator.policies import Policies


class Endless:
    """Knows every base model, and draws from it until it is left."""

    left = False

    async def resolve(self, policy):
        return policy.base_model, None

    async def stream(self, *asked):
        try:
            while True:
                yield CompletionChunk(0, (1,), (-1.0,), (PolicySpan(1, -1, ""),), None)
        finally:
            self.left = True


async def test_a_caller_that_leaves_in_the_middle_has_left_the_fleet_too():
    mesh = Endless()
    chunks = Policies(mesh, mesh).sample(
        "projects/p", PolicyRef(base_model="tiny"), [1], 1, SamplingParams()
    )
    async with contextlib.aclosing(chunks):
        await anext(chunks)
        assert not mesh.left
    assert mesh.left
