"""A rank that calls a layer again and again until another rank is found missing.

    kill_victim.py DEVICE TIMEOUT PAUSE

DEVICE is "cpu" or "cuda"; TIMEOUT is the deadline of every wait and PAUSE the time between calls,
in seconds. Prints a JSON object a line, {"event": ..., "at": time.monotonic()} and more: "ready"
before the first call, "error" when a rank is missing, "end" after giving everything back.
"""

from __future__ import annotations

import json
import os
import sys
import time

import torch

from megamoe_ep import MegaMoE, get_symm_buffer_for_nvfp4_mega_moe
from megamoe_ep.bootstrap import Group
from megamoe_ep.errors import MegaMoEError, PeerTimeoutError
from megamoe_ep.weights import random_experts

EXPERTS_PER_RANK, TOKENS, TOP_K, HIDDEN, INTERMEDIATE = 2, 24, 3, 64, 32


def say(event: str, **facts: object) -> None:
    os.write(1, (json.dumps({"event": event, "at": time.monotonic(), **facts}) + "\n").encode())


def say_error(error: MegaMoEError) -> None:
    facts: dict[str, object] = {}
    if isinstance(error, PeerTimeoutError):
        facts = {"rank": error.rank, "ranks": error.ranks, "phase": error.phase}
    say("error", type=type(error).__name__, message=str(error), **facts)


def main() -> None:
    torch.set_num_threads(1)
    device, timeout, pause = sys.argv[1], float(sys.argv[2]), float(sys.argv[3])
    try:
        group = Group.from_environment(device=device, timeout_s=timeout)
        num_experts = EXPERTS_PER_RANK * group.world_size
        buffer = get_symm_buffer_for_nvfp4_mega_moe(
            group, num_experts, TOKENS, TOP_K, HIDDEN, INTERMEDIATE, timeout_s=timeout
        )
        experts = random_experts(EXPERTS_PER_RANK, HIDDEN, INTERMEDIATE, seed=group.rank)
        layer = MegaMoE.from_experts(experts, buffer)
    except MegaMoEError as error:
        say_error(error)
        say("end")
        return
    generator = torch.Generator().manual_seed(group.rank)
    x = torch.randn(TOKENS, HIDDEN, generator=generator).bfloat16().to(buffer.device)
    topk_idx = torch.randint(num_experts, (TOKENS, TOP_K), generator=generator).int()
    topk_idx = topk_idx.to(buffer.device)
    topk_weights = torch.rand(TOKENS, TOP_K, generator=generator).to(buffer.device)
    expected: torch.Tensor | None = None
    say("ready")
    try:
        while True:
            y = layer(x, topk_idx, topk_weights)
            if y.is_cuda:
                torch.cuda.synchronize()
            buffer.check()  # on a GPU what came of the call is known only now
            expected = y if expected is None else expected
            assert torch.equal(y, expected), "a call that raised nothing gave a wrong result"
            time.sleep(pause)
    except MegaMoEError as error:
        say_error(error)
    try:
        layer(x, topk_idx, topk_weights)
    except PeerTimeoutError as error:
        say_error(error)
    buffer.destroy()
    say("end")


if __name__ == "__main__":
    main()
