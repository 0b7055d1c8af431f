"""Weighted fair sharing between projects by the tokens they were served.

A virtual token counter for each project (VTC, "Fairness in Serving Large Language Models",
arXiv:2401.00588): tokens over weight. Whoever has the least is served next, so over any time in
which two projects both wait, their tokens are as their weights, up to what is in flight.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping


class TokenCounters:
    """The weighted tokens of each project, since it was first seen.

    It keeps two numbers for every project that ever asked, and nothing for each request.
    """

    def __init__(self, weights: Mapping[str, float]) -> None:
        """Weights by project; 1 where none is named."""
        self._weights = weights
        self._served: dict[str, float] = {}
        self._level = 0.0
        self._length: dict[str, float] = {}

    def arrive(self, project: str, waiting: Iterable[str]) -> None:
        """`project`, which had nothing waiting, asks again; others are `waiting`.

        It starts level with whoever is next: what it did not use while it was away was lent to the
        others and is not owed to it.
        """
        level = min((self._served[other] for other in waiting), default=self._level)
        self._served[project] = max(self._served.get(project, 0.0), level)

    def next_of(self, projects: Iterable[str]) -> str:
        """Whom of `projects` to serve now: the one with the fewest weighted tokens."""
        project = min(projects, key=lambda project: (self._served[project], project))
        self._level = max(self._level, self._served[project])
        return project

    def charge(self, project: str, tokens: float) -> None:
        """Count tokens; fewer than 0 give back what was charged in advance."""
        self._served[project] += tokens / self._weights.get(project, 1.0)

    def expected_length(self, project: str) -> float:
        """Tokens that a completion of `project` will have, going by its last ones."""
        return self._length.get(project, 0.0)

    def observe_length(self, project: str, tokens: float) -> None:
        """Completions of `project` ended after so many tokens on average."""
        expected = self._length.get(project, tokens)
        # The last dozen or so count: prompts and policies change as jobs go on.
        self._length[project] = expected + (tokens - expected) / 8
