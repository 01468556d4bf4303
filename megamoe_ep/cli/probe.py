"""One rank of doctor's trial of NVSHMEM: initialise, allocate, write to every peer, read back.

It runs in processes of its own, since a failing NVSHMEM may end its process or never return.
"""

from __future__ import annotations

import argparse

import torch

from megamoe_ep.bootstrap import Group
from megamoe_ep.cli.report import errors_end_the_command
from megamoe_ep.errors import HeapError
from megamoe_ep.heap.nvshmem import NvshmemHeap

NBYTES = 1 << 20


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--timeout", type=float, required=True)
    timeout_s = parser.parse_args().timeout
    with errors_end_the_command():
        group = Group.from_environment(device="cuda", timeout_s=timeout_s)
        with NvshmemHeap(group, group.device, NBYTES, timeout_s) as heap:
            mine = heap.alloc(NBYTES)
            for r in range(group.world_size):
                heap.peer(r)[group.rank] = group.rank + 1
            heap.barrier()
            expected = torch.arange(1, group.world_size + 1, dtype=torch.uint8)
            if not torch.equal(mine[: group.world_size].cpu(), expected):
                raise HeapError(
                    f"rank {group.rank} did not find in its memory what its peers wrote there."
                )
            heap.barrier()


if __name__ == "__main__":
    main()
