"""Symmetric memory: as many bytes on every rank, all of them readable and writable by all ranks."""

from __future__ import annotations

from types import TracebackType
from typing import Protocol, Self

import torch

from megamoe_ep.bootstrap import Group
from megamoe_ep.errors import ArgumentError, UnsupportedDeviceError


class Heap(Protocol):
    """One symmetric allocation over the ranks of a group.

    ``alloc``, ``barrier`` and ``free`` are collective. An ``alloc`` that fails on one rank raises
    on all of them.
    """

    def alloc(self, nbytes: int) -> torch.Tensor:
        """This rank's part: uint8 [nbytes], zeroed, aligned to 256 bytes. Once per heap.

        Raises:
            HeapTooSmallError: it does not fit on some rank.
            HeapError: a peer's part cannot be reached; the message names the peer.
        """

    def peer(self, rank: int) -> torch.Tensor:
        """The same bytes on ``rank``: uint8 [nbytes]; on this rank, what ``alloc`` returned."""

    @property
    def peer_ptrs(self) -> torch.Tensor:
        """int64 [world_size] on the heap's device: address of each rank's part, as seen here."""

    def fence(self) -> None:
        """Puts this rank's accesses before it, of its own memory and of peers', before those after.

        A writer calls it between the bytes and the flag that announces them; a reader, between the
        flag and the bytes. On CUDA tensors it waits for the current stream.
        """

    def barrier(self) -> None:
        """Returns once every rank has called it. Raises BootstrapError past the deadline."""

    def free(self, *, together: bool = True) -> None:
        """Gives the memory back; safe to call twice.

        Args:
            together: every rank is freeing, as it must where that is collective. False, after a
                rank has failed: wait for nobody, even if memory stays taken until the process ends.
        """

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...


def open_heap(
    group: Group, device: torch.device | str, nbytes: int, *, timeout_s: float | None = None
) -> Heap:
    """The heap for tensors on ``device``; collective.

    On "cpu" it is host memory, shared by the ranks of one machine; on "cuda" it is NVSHMEM's, or,
    for a lone rank, the GPU's own memory.

    Args:
        group: the ranks.
        device: of this rank; all ranks give the same type.
        nbytes: how much ``alloc`` will ask for.
        timeout_s: deadline of each step in seconds; None takes the group's.

    Raises:
        HeapTooSmallError, HeapError: such a heap cannot be had; raised on every rank.
    """
    device = torch.device(device)
    if nbytes < 1:
        raise ArgumentError(f"nbytes must be at least 1; got {nbytes}.")
    timeout_s = group.timeout_s if timeout_s is None else timeout_s
    if device.type == "cpu":
        from megamoe_ep.heap.host import HostHeap

        return HostHeap(group, timeout_s)
    if device.type == "cuda" and group.world_size == 1:
        from megamoe_ep.heap.local import LocalHeap

        return LocalHeap(device)
    if device.type == "cuda":
        from megamoe_ep.heap.nvshmem import NvshmemHeap

        return NvshmemHeap(group, device, nbytes, timeout_s)
    raise UnsupportedDeviceError(f"device must be 'cpu' or 'cuda'; got '{device}'.")
