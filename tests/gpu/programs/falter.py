"""A rank that runs calls until one of the ranks falters, and says what it then saw: one JSON line.

    falter.py --fate die|sleep --phase dispatch|combine --timeout S

Rank 1 kills itself, or sleeps for three deadlines, where it would next raise the flag of the phase.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time

import torch

from megamoe_ep.bootstrap import Group
from megamoe_ep.errors import BufferDestroyedError, PeerTimeoutError
from megamoe_ep.kernels import cuda_comm
from megamoe_ep.shape import LayerShape
from megamoe_ep.symm_buffer import SymmBuffer

VICTIM = 1
LAST_GOOD_CALL = 4


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--fate", required=True, choices=["die", "sleep"])
    parser.add_argument("--phase", required=True, choices=["dispatch", "combine"])
    parser.add_argument("--timeout", type=float, required=True)
    arguments = parser.parse_args()

    group = Group.from_environment(device="cuda", timeout_s=60)
    shape = LayerShape(2 * group.world_size, 8, 2, 256, 16, group.world_size)
    buffer = SymmBuffer(group, shape, timeout_s=arguments.timeout)
    x = torch.randn(8, 256, device="cuda").bfloat16()
    ids = torch.arange(16, device="cuda", dtype=torch.int32).view(8, 2) % shape.num_experts
    weights = torch.ones(8, 2, device="cuda")
    y = torch.zeros(8, 256, device="cuda").bfloat16()

    def falter(phase: str, call: int) -> None:
        if (group.rank, phase, call) != (VICTIM, arguments.phase, LAST_GOOD_CALL + 1):
            return
        torch.cuda.synchronize()
        if arguments.fate == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(3 * arguments.timeout)

    report: dict[str, object] = {"rank": group.rank}
    began = time.monotonic()
    try:
        for call in range(1, LAST_GOOD_CALL + 3):
            began = time.monotonic()
            cuda_comm.stage(x, ids, weights, buffer, 8)
            falter("dispatch", call)
            cuda_comm.dispatch(buffer, combine="exact")
            falter("combine", call)
            cuda_comm.combine(y, buffer, combine="exact")
            torch.cuda.synchronize()
            buffer.check()
    except PeerTimeoutError as error:
        report |= {
            "ranks": error.ranks, "phase": error.phase, "found_by": error.found_by,
            "expected": error.epoch_expected, "seen": error.epoch_seen, "message": str(error),
        }  # fmt: skip
    report["seconds"] = time.monotonic() - began
    report["calls"] = call
    report["y_is_nan"] = bool(y.isnan().all())
    try:
        buffer.check()
    except PeerTimeoutError:
        report["stays_failed"] = True
    a = torch.randn(512, 512, device="cuda")
    report["matmul_error"] = float((a @ a - (a.cpu() @ a.cpu()).cuda()).abs().max())
    buffer.destroy()
    try:
        buffer.check()
    except BufferDestroyedError:
        report["destroyed"] = True
    os.write(1, (json.dumps(report) + "\n").encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
