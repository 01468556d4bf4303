"""A rank that makes a group and a heap, and says how that went: one JSON object on one line.

    meet.py [--timeout S] [--die RANK:STEP] [--absent RANK:STEP]

STEP is "group", "heap" or "end": before making the group, between the group and the heap, after
both. The rank that dies kills itself; the one that is absent sleeps on.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time

import psutil

from megamoe_ep.bootstrap import Group
from megamoe_ep.errors import MegaMoEError
from megamoe_ep.heap import open_heap


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--timeout", type=float, default=60)
    parser.add_argument("--die", default=":")
    parser.add_argument("--absent", default=":")
    arguments = parser.parse_args()
    rank = os.environ.get("RANK", os.environ.get("OMPI_COMM_WORLD_RANK", "0"))

    def step(name: str) -> None:
        if arguments.die == f"{rank}:{name}":
            os.kill(os.getpid(), signal.SIGKILL)
        if arguments.absent == f"{rank}:{name}":
            time.sleep(600)

    report: dict[str, object] = {"rank": int(rank), "error": "", "message": ""}
    began = time.monotonic()
    try:
        step("group")
        group = Group.from_environment(device="cpu", timeout_s=arguments.timeout)
        step("heap")
        with open_heap(group, "cpu", 1 << 16) as heap:
            heap.alloc(1 << 16).fill_(group.rank + 1)
            heap.barrier()
            report["parts"] = [int(heap.peer(r)[-1]) for r in range(group.world_size)]
            step("end")
            heap.barrier()
    except MegaMoEError as error:
        report["error"] = type(error).__name__
        report["message"] = str(error)
    report["seconds"] = time.monotonic() - began
    report["listening"] = [
        connection.laddr.ip
        for connection in psutil.Process().net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    ]
    # One write: the ranks share a stream.
    os.write(1, (json.dumps(report) + "\n").encode())
    return 1 if report["error"] else 0


if __name__ == "__main__":
    sys.exit(main())
