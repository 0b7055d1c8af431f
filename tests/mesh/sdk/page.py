"""The page of what the SDK can do at this mesh, from what came of its exercises."""

# ruff: noqa: E501 - Markdown has a line for each row

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    Run = dict[str, Any]

_HEAD = """\
# Tinker compatibility

Written by `python -m tests.mesh.sdk --write`; a test fails where it is not what the code does. Do not edit.

Every public method of every client class of the unmodified [Tinker SDK](https://pypi.org/project/tinker/) is found by inspection and called
against a running mesh: a gateway, a coordinator, a trainer and a sampler, as processes, with a tiny Qwen3. What counts is not that nothing
was raised, but the **effect**: it is looked at another way than by the method itself, most often through the checkpoint's files and
transformers, peft and torch in a process of their own. A method without an exercise fails the test.

The SDK runs are the newest version and the oldest that speaks the same wire: since {oldest} batches go as protobuf, and results come so.

| SDK | public methods | called, and their effect as below |
|---|---|---|
{totals}

How it is called: `result()`: the method's future is waited for by a thread; `await`: by a coroutine; `call`: it returns no future.
What has an `_async` twin, which newer versions call deprecated, has its twin called too, with the same effect to be shown.
"""

_NOT_THERE = """\
## What is different here

{notes}

What is refused fails with a message that names the field, at its place in the order of the run, so that later requests go on.
How the SDK maps to the mesh, and what else differs: [tinker.md](tinker.md#what-differs).
"""


def page(runs: Sequence[Run]) -> str:
    """Markdown; `runs`: what the runner wrote, the newest SDK first."""
    parts = [
        _HEAD.format(
            oldest=runs[-1]["version"],
            totals="\n".join(
                f"| {run['version']} | {len(run['outcomes'])} | {_num_fine(run)} |" for run in runs
            ),
        )
    ]
    methods = _by_method(runs)
    for client, group in groupby(methods, key=lambda each: each[0]):
        rows = [_row(found, runs) for _, _, found in group]
        versions = " | ".join(run["version"] for run in runs)
        lines = "|---" * (len(runs) + 2) + "|"
        parts.append(
            f"## {client}\n\n| method | {versions} | effect |\n{lines}\n" + "\n".join(rows) + "\n"
        )
    parts.append(_NOT_THERE.format(notes="\n".join(_notes(methods))))
    return "\n".join(parts)


def failures(run: Run) -> list[str]:
    """What went wrong, in words."""
    return [
        f"{each['client']}.{each['method']} of {run['version']}: {each['error']}"
        for each in run["outcomes"]
        if each["error"]
    ]


def _num_fine(run: Run) -> int:
    return sum(not each["error"] for each in run["outcomes"])


def _by_method(runs: Sequence[Run]) -> list[tuple[str, str, dict[str, Run]]]:
    """Client, method and outcome by version, in the order of the newest, older ones' own behind."""
    found: dict[str, dict[str, dict[str, Run]]] = {}
    for run in runs:
        for each in run["outcomes"]:
            of_client = found.setdefault(each["client"], {})
            of_client.setdefault(each["method"], {})[run["version"]] = each
    return [
        (client, method, outcomes)
        for client, by_method in found.items()
        for method, outcomes in sorted(by_method.items())
    ]


def _row(outcomes: dict[str, Run], runs: Sequence[Run]) -> str:
    newest = next(iter(outcomes.values()))
    cells = []
    for run in runs:
        outcome = outcomes.get(run["version"])
        if outcome is None:
            cells.append("–")
        elif outcome["error"]:
            cells.append("**fails**")
        else:
            ways = ", ".join(f"{way}()" if way == "result" else way for way in outcome["ways"])
            cells.append(ways)
    twin = newest["method"].endswith("_async")
    effect = "the same" if twin else newest["effect"]
    return f"| `{newest['method']}` | {' | '.join(cells)} | {effect} |"


def _notes(methods: list[tuple[str, str, dict[str, Run]]]) -> list[str]:
    """Each note once, with all that it is about."""
    about: dict[str, list[str]] = {}
    for client, method, outcomes in methods:
        note = next(iter(outcomes.values()))["note"]
        if note and not method.endswith("_async"):
            about.setdefault(note, []).append(f"`{client}.{method}`")
    return [f"- {', '.join(names)}: {note}." for note, names in about.items()]
