"""A process that scores one item after another: a JSON line in, a JSON line out.

The kernel ends it when an item takes too much processor time, whatever code is running then; that
also holds when the service itself was killed and nobody is left to do it. Not wall time: rewards
must not depend on how busy the machine is.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import signal
import sys
import traceback
import warnings
from dataclasses import asdict
from typing import Any

from rollmesh.errors import MeshError
from rollmesh.types import ScoreItem
from services.reward.functions import FUNCTIONS
from services.reward.functions.function import scored

MAX_MEMORY_BYTES = 1 << 30
"""Memory of one process. The largest request is 64 MiB, and sympy itself takes about 100."""


def main() -> None:
    """Serve standard input to its end; the argument is the bound in seconds of processor time."""
    limit_s = float(sys.argv[1])
    resource.setrlimit(resource.RLIMIT_DATA, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    # What libraries remark on texts that they cannot read.
    logging.disable()
    warnings.simplefilter("ignore")
    with os.fdopen(os.dup(sys.stdout.fileno()), "w") as answers:
        # A library that prints must not break the protocol.
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        for line in sys.stdin.buffer:
            answer = _answer(json.loads(line), limit_s)
            print(json.dumps(answer), file=answers, flush=True)


def _answer(request: dict[str, Any], limit_s: float) -> dict[str, Any]:
    function = FUNCTIONS[request["function"]]
    score: Any = function.score
    try:
        if function.prepare is not None:
            function.prepare()
        # Nobody handles the signal on purpose: its default is to end the process.
        signal.setitimer(signal.ITIMER_PROF, limit_s)
        parameters = function.parameters.model_validate(request["parameters"])
        worth = scored(score(ScoreItem(**request["item"]), parameters))
        return {"scored": asdict(worth)}
    except MeshError as error:
        return {"error": error.reason, "message": str(error), "context": error.context}
    except MemoryError:
        return {"stuck": "it takes too much memory"}
    except Exception:  # noqa: BLE001 - a bug must reach the service's log, and end nothing
        return {"bug": traceback.format_exc()[-8000:]}
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


if __name__ == "__main__":
    main()
