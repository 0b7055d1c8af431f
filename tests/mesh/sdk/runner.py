"""Runs all exercises of the SDK that is first on the path, and writes down what came of each.

`python -m tests.mesh.sdk.runner --url … --key … --project … --base-model … --folder … --out FILE
--clients CLASS …`
"""

from __future__ import annotations

import argparse
import inspect
import json
import logging
import time
import traceback
import warnings
from pathlib import Path
from typing import Any


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("url", "key", "project", "base-model", "folder", "out"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--clients", nargs="+", required=True, help="classes of clients")
    parser.add_argument("--only", default="", help="methods whose names contain this")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore", FutureWarning)
    logging.getLogger("tinker").setLevel(logging.CRITICAL)

    import tinker  # noqa: PLC0415 - after the arguments are known to be right

    from tests.mesh.sdk import rest, sampling, service, training  # noqa: F401, PLC0415
    from tests.mesh.sdk.calling import methods  # noqa: PLC0415
    from tests.mesh.sdk.world import World  # noqa: PLC0415

    world = World(
        arguments.url, arguments.key, arguments.project, arguments.base_model, arguments.folder
    )
    outcomes = []
    for owner in arguments.clients:
        client = _client(tinker, owner)
        for method in methods(client) if client else ():
            if arguments.only in f"{owner}.{method}":
                outcome = _outcome(world, client, owner, method)
                outcomes.append(outcome)
                print(json.dumps({k: v for k, v in outcome.items() if k != "effect"}), flush=True)
    Path(arguments.out).write_text(
        json.dumps({"version": tinker.__version__, "outcomes": outcomes}, indent=1)
    )


def _client(tinker: Any, owner: str) -> Any:
    if hasattr(tinker, owner):
        return getattr(tinker, owner)
    try:
        from tinker.lib.public_interfaces import rest_client  # noqa: PLC0415
    except ImportError:
        return None
    return getattr(rest_client, owner, None)


def _outcome(world: Any, client: Any, owner: str, method: str) -> dict[str, Any]:
    from tests.mesh.sdk.calling import ASYNC, EXERCISES, OWN_LOOP, Call  # noqa: PLC0415

    base = method.removesuffix(ASYNC)
    exercise = EXERCISES.get(f"{owner}.{base}")
    outcome: dict[str, Any] = {
        "client": owner,
        "method": method,
        "deprecated": hasattr(inspect.getattr_static(client, method), "__deprecated__"),
        "ways": [],
        "effect": exercise.effect if exercise else "",
        "note": exercise.note if exercise else "",
    }
    if exercise is None:
        return {**outcome, "error": "there is no exercise of this method"}
    begun = time.monotonic()
    for way in ("result", "await"):
        call = Call(owner, method, way)
        try:
            exercise.run(world, call)
            assert call.num, "the exercise did not call the method"
        except Exception:  # noqa: BLE001 - one exercise's failure is told, the others go on
            return {**outcome, "error": f"{way}: {traceback.format_exc()}"}
        outcome["ways"].append(way)
        if method.endswith(ASYNC):
            outcome["ways"] = [OWN_LOOP if call.way == OWN_LOOP else "await"]
            break
        if not call.awaitable:
            outcome["ways"] = ["call"] if way == "result" else outcome["ways"]
            break
    return {**outcome, "error": None, "seconds": round(time.monotonic() - begun, 1)}


if __name__ == "__main__":
    main()
