"""What a sandbox must refuse: tried in it before anything untrusted is.

The whole list of attacks is a test of ours (tests/contract/test_sandbox_attacks.py); this is what
each machine proves of itself when the service starts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from services.reward.sandbox.limits import Limits, Program

if TYPE_CHECKING:
    from services.reward.sandbox.places import Sandbox

# Each line that it prints is something that it could do and should not.
_PROBE = b"""
import os, resource, socket

def refused(what, attempt):
    try:
        attempt()
    except OSError:
        return
    print(what)

if set(os.listdir("/")) - {"dev", "lib", "lib64", "usr", "work"}:
    print("sees", sorted(os.listdir("/")))
if os.getuid() != 65534 or os.getgid() != 65534:
    print("is user", os.getuid(), os.getgid())
if set(os.environ) - {"PYTHONHASHSEED", "LD_LIBRARY_PATH", "MALLOC_ARENA_MAX", "LC_CTYPE", "PWD"}:
    print("has the environment", sorted(os.environ))
refused("opens a socket", socket.socket)
refused("starts a process", os.fork)
refused("writes outside its folder", lambda: open("/usr/x", "w"))
refused("changes who it is", lambda: os.setuid(0))
refused("writes more than it may", lambda: open("big", "wb").write(bytes(1 << 20)))
refused("makes more files than it may", lambda: [open(str(n), "w").close() for n in range(99)])
try:
    bytearray(1 << 28)
    print("takes more memory than it may")
except MemoryError:
    pass
for fd in range(3, 64):
    refused(f"has file {fd} open", lambda: os.fstat(fd))
print("done")
"""
_LIMITS = Limits(memory_bytes=128 << 20, file_bytes=1 << 19, num_files=32, idle_s=60)


async def weakness(sandbox: Sandbox) -> str:
    """What `sandbox` fails to refuse, or does wrong; empty: nothing.

    Raises:
        Unavailable: it did not come up.
    """
    outcome = await sandbox.run(Program({"main.py": _PROBE}), limits=_LIMITS)
    said = outcome.stdout.decode(errors="replace").splitlines()
    if not outcome.is_well or not said:
        return f"its test came to {outcome}: {outcome.stderr.decode(errors='replace')[-300:]}"
    return "; ".join(said[:-1])
