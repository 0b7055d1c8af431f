"""The system calls that a sandboxed Python may make, with their numbers; all others are refused.

What is not here is out of reach whatever the mounts, namespaces and limits do: new processes,
sockets, namespaces, mounts, tracing, keys, io_uring, BPF, performance counters, userfaultfd,
System V and POSIX IPC, memory files, changing who it is. Numbers: the kernel's tables
arch/x86/entry/syscalls/syscall_64.tbl and, for arm64, include/uapi/asm-generic/unistd.h.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

Numbers: TypeAlias = tuple[int | None, int | None]
"""On x86-64 and on arm64; None: there is no such call there."""

ALLOWED: dict[str, Numbers] = {
    # Memory.
    "brk": (12, 214),
    "madvise": (28, 233),
    "mmap": (9, 222),
    "mprotect": (10, 226),
    "mremap": (25, 216),
    "munmap": (11, 215),
    # Files that are open.
    "read": (0, 63),
    "write": (1, 64),
    "readv": (19, 65),
    "writev": (20, 66),
    "pread64": (17, 67),
    "pwrite64": (18, 68),
    "preadv": (295, 69),
    "pwritev": (296, 70),
    "preadv2": (327, 286),
    "pwritev2": (328, 287),
    "lseek": (8, 62),
    "close": (3, 57),
    "close_range": (436, 436),
    "dup": (32, 23),
    "dup2": (33, None),
    "dup3": (292, 24),
    "fcntl": (72, 25),
    "flock": (73, 32),
    "fstat": (5, 80),
    "fstatfs": (138, 44),
    "fsync": (74, 82),
    "fdatasync": (75, 83),
    "ftruncate": (77, 46),
    "fallocate": (285, 47),
    "fadvise64": (221, 223),
    "sendfile": (40, 71),
    "copy_file_range": (326, 285),
    "getdents": (78, None),
    "getdents64": (217, 61),
    "pipe": (22, None),
    "pipe2": (293, 59),
    "eventfd": (284, None),
    "eventfd2": (290, 19),
    # Waiting for files.
    "poll": (7, None),
    "ppoll": (271, 73),
    "select": (23, None),
    "pselect6": (270, 72),
    "epoll_create": (213, None),
    "epoll_create1": (291, 20),
    "epoll_ctl": (233, 21),
    "epoll_pwait": (281, 22),
    "epoll_pwait2": (441, 441),
    "epoll_wait": (232, None),
    # Names of files; what is there to name is decided by the mounts.
    "access": (21, None),
    "faccessat": (269, 48),
    "faccessat2": (439, 439),
    "chdir": (80, 49),
    "fchdir": (81, 50),
    "getcwd": (79, 17),
    "chmod": (90, None),
    "fchmod": (91, 52),
    "fchmodat": (268, 53),
    "link": (86, None),
    "linkat": (265, 37),
    "listxattr": (194, 11),
    "llistxattr": (195, 12),
    "flistxattr": (196, 13),
    "mkdir": (83, None),
    "mkdirat": (258, 34),
    "open": (2, None),
    "openat": (257, 56),
    "readlink": (89, None),
    "readlinkat": (267, 78),
    "rename": (82, None),
    "renameat": (264, 38),
    "renameat2": (316, 276),
    "rmdir": (84, None),
    "stat": (4, None),
    "lstat": (6, None),
    "newfstatat": (262, 79),
    "statx": (332, 291),
    "statfs": (137, 43),
    "symlink": (88, None),
    "symlinkat": (266, 36),
    "truncate": (76, 45),
    "umask": (95, 166),
    "unlink": (87, None),
    "unlinkat": (263, 35),
    "utime": (132, None),
    "utimes": (235, None),
    "utimensat": (280, 88),
    # Threads and the process itself.
    "arch_prctl": (158, None),
    "execve": (59, 221),
    "exit": (60, 93),
    "exit_group": (231, 94),
    "futex": (202, 98),
    "getcpu": (309, 168),
    "membarrier": (324, 283),
    "restart_syscall": (219, 128),
    "rseq": (334, 293),
    "sched_getaffinity": (204, 123),
    "sched_yield": (24, 124),
    "setsid": (112, 157),
    "set_robust_list": (273, 99),
    "set_tid_address": (218, 96),
    "wait4": (61, 260),
    "waitid": (247, 95),
    # Signals: they reach its own PID namespace alone.
    "kill": (62, 129),
    "tgkill": (234, 131),
    "pause": (34, None),
    "rt_sigaction": (13, 134),
    "rt_sigpending": (127, 136),
    "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139),
    "rt_sigsuspend": (130, 133),
    "rt_sigtimedwait": (128, 137),
    "sigaltstack": (131, 132),
    # Time.
    "alarm": (37, None),
    "clock_getres": (229, 114),
    "clock_gettime": (228, 113),
    "clock_nanosleep": (230, 115),
    "getitimer": (36, 102),
    "gettimeofday": (96, 169),
    "nanosleep": (35, 101),
    "setitimer": (38, 103),
    "time": (201, None),
    "times": (100, 153),
    # Who it is, and its limits, which can only be lowered.
    "getegid": (108, 177),
    "geteuid": (107, 175),
    "getgid": (104, 176),
    "getgroups": (115, 158),
    "getpgid": (121, 155),
    "getpgrp": (111, None),
    "getpid": (39, 172),
    "getppid": (110, 173),
    "getpriority": (140, 141),
    "getresgid": (120, 150),
    "getresuid": (118, 148),
    "getrlimit": (97, 163),
    "getrusage": (98, 165),
    "getsid": (124, 156),
    "gettid": (186, 178),
    "getuid": (102, 174),
    "prlimit64": (302, 261),
    "setrlimit": (160, 164),
    "uname": (63, 160),
    # Randomness.
    "getrandom": (318, 278),
    # What asyncio needs of the pair of sockets that it wakes itself by.
    "getpeername": (52, 205),
    "getsockname": (51, 204),
    "getsockopt": (55, 209),
    "recvfrom": (45, 207),
    "sendto": (44, 206),
    "shutdown": (48, 210),
}


@dataclass(frozen=True, slots=True)
class Condition:
    """An argument of a call, by its index, which masked must be one of `values` (32 bits)."""

    argument: int
    mask: int
    values: tuple[int, ...]


_CLONE_THREAD, _CLONE_NEW = 0x00010000, 0x7E020080

CONDITIONAL: dict[str, tuple[Numbers, Condition]] = {
    # A thread, in no new namespace of any kind; no process.
    "clone": ((56, 220), Condition(0, _CLONE_THREAD | _CLONE_NEW, (_CLONE_THREAD,))),
    # TCGETS, TIOCGWINSZ, FIONREAD, FIONBIO, FIONCLEX, FIOCLEX: nothing that acts on a device.
    "ioctl": (
        (16, 29),
        Condition(1, 0xFFFFFFFF, (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)),
    ),
    # AF_UNIX.
    "socketpair": ((53, 199), Condition(0, 0xFFFFFFFF, (1,))),
}

ABSENT: dict[str, Numbers] = {
    # Its arguments are out of a filter's sight. Told that it does not exist, glibc takes clone.
    "clone3": (435, 435),
}
