"""Forks ranks from a process that has imported torch, which takes each of them seconds otherwise.

On stdin a request a line, {"argv": [...], "environment": {...}, "output": PATH}; on stdout the
answer, the process id. ``argv`` is a Python program and its arguments. All end with this process.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import runpy
import signal
import sys

import megamoe_ep.moe  # noqa: F401  what the ranks would import, torch with it


def main() -> None:
    die_with(int(sys.argv[1]))
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody asks for exit codes: none stays a zombie
    # A rank that ends would otherwise copy all of this process's memory, object by object.
    gc.freeze()
    me = os.getpid()
    for line in iter(sys.stdin.readline, ""):
        pid = os.fork()
        if pid == 0:
            die_with(me)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            become(**json.loads(line))
            sys.exit()
        print(pid, flush=True)


def die_with(parent: int) -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def become(argv: list[str], environment: dict[str, str], output: str) -> None:
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = argv
    fd = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for standard in (1, 2):
        os.dup2(fd, standard)
    os.close(fd)
    runpy.run_path(argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
