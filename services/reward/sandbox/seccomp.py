"""The filter of system calls: as the BPF program that bubblewrap takes, and in nsjail's language.

Written by hand, because the one binding of libseccomp on PyPI has not been kept since 2021, and
because two architectures and a flat list need no compiler.
"""

from __future__ import annotations

import errno
import platform
import struct
from typing import TYPE_CHECKING

from rollmesh.errors import FailedPrecondition
from services.reward.sandbox.syscalls import ABSENT, ALLOWED, CONDITIONAL

if TYPE_CHECKING:
    from services.reward.sandbox.syscalls import Condition, Numbers

ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
"""By what `uname -m` says: the column of Numbers, and AUDIT_ARCH of <linux/audit.h>."""

# struct seccomp_data: the call's number, the architecture, the instruction's address, arguments.
_NUMBER, _ARCHITECTURE, _ARGUMENTS = 0, 4, 16
# <linux/bpf_common.h>: BPF_LD|W|ABS, BPF_JMP|JEQ|K, BPF_JMP|JGE|K, BPF_ALU|AND|K, BPF_RET|K.
_LOAD, _EQUAL, _AT_LEAST, _AND, _RETURN = 0x20, 0x15, 0x35, 0x54, 0x06
# <linux/seccomp.h>: SECCOMP_RET_*.
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_X32 = 0x40000000
"""x86-64 kernels answer a second set of numbers, from here on."""


def column() -> int:
    """Of Numbers, which this machine's are.

    Raises:
        FailedPrecondition: another architecture.
    """
    machine = platform.machine()
    if machine not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise FailedPrecondition(
            f"the sandbox knows the system calls of {known}, not of {machine}",
            value=machine,
            allowed=known,
        )
    return ARCHITECTURES[machine][0]


def bpf() -> bytes:
    """The filter as an array of struct sock_filter, for this machine."""
    architecture = next(code for which, code in ARCHITECTURES.values() if which == column())
    program = [
        _instruction(_LOAD, _ARCHITECTURE),
        _instruction(_EQUAL, architecture, then=1),
        _instruction(_RETURN, _KILL),
        _instruction(_LOAD, _NUMBER),
        _instruction(_AT_LEAST, _X32, otherwise=1),
        _instruction(_RETURN, _KILL),
    ]
    for number in _numbers(ALLOWED):
        program += _when(number, [_instruction(_RETURN, _ALLOW)])
    for number, condition in _conditional():
        program += _when(number, _conditions(condition))
    for number in _numbers(ABSENT):
        program += _when(number, [_instruction(_RETURN, _ERRNO | errno.ENOSYS)])
    program.append(_instruction(_RETURN, _ERRNO | errno.EPERM))
    return b"".join(program)


def kafel() -> str:
    """The same filter in the language of nsjail's --seccomp_string, for this machine."""
    rules = [f"SYSCALL[{number}]" for number in _numbers(ALLOWED)]
    for number, condition in _conditional():
        names = ", ".join(f"a{index}" for index in range(condition.argument + 1))
        wanted = " || ".join(
            f"(a{condition.argument} & {condition.mask:#x}) == {value:#x}"
            for value in condition.values
        )
        rules.append(f"SYSCALL[{number}]({names}) {{ {wanted} }}")
    absent = ", ".join(f"SYSCALL[{number}]" for number in _numbers(ABSENT))
    return (
        f"ALLOW {{ {', '.join(rules)} }} "
        f"ERRNO({errno.ENOSYS}) {{ {absent} }} DEFAULT ERRNO({errno.EPERM})"
    )


def _numbers(calls: dict[str, Numbers]) -> list[int]:
    which = column()
    return [number for numbers in calls.values() if (number := numbers[which]) is not None]


def _conditional() -> list[tuple[int, Condition]]:
    which = column()
    return [
        (number, condition)
        for numbers, condition in CONDITIONAL.values()
        if (number := numbers[which]) is not None
    ]


def _when(number: int, block: list[bytes]) -> list[bytes]:
    """`block` for the call with this number; each block returns."""
    return [_instruction(_EQUAL, number, otherwise=len(block)), *block]


def _conditions(condition: Condition) -> list[bytes]:
    # The low half of a 64-bit argument: the kernel reads no more of these, on either architecture.
    block = [
        _instruction(_LOAD, _ARGUMENTS + 8 * condition.argument),
        _instruction(_AND, condition.mask),
    ]
    for value in condition.values:
        block += [
            _instruction(_EQUAL, value, otherwise=1),
            _instruction(_RETURN, _ALLOW),
        ]
    return [*block, _instruction(_RETURN, _ERRNO | errno.EPERM)]


def _instruction(code: int, value: int, *, then: int = 0, otherwise: int = 0) -> bytes:
    return struct.pack("<HBBI", code, then, otherwise, value)
