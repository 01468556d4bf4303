"""The heap of a lone rank on a GPU: that GPU's ordinary memory, with nobody to share it."""

from __future__ import annotations

from types import TracebackType
from typing import Self

import torch

from megamoe_ep.errors import HeapError, HeapTooSmallError


class LocalHeap:
    """One GPU allocation of torch's own allocator."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._memory: torch.Tensor | None = None
        self._freed = False

    def alloc(self, nbytes: int) -> torch.Tensor:
        if self._freed or self._memory is not None:
            raise HeapError("a heap holds one allocation; open another heap for another one.")
        try:
            self._memory = torch.zeros(nbytes, dtype=torch.uint8, device=self._device)
        except torch.OutOfMemoryError as error:
            raise HeapTooSmallError(
                f"the layer needs {nbytes} bytes of symmetric memory, and {self._device} has fewer "
                f"free; lower max_num_tokens. ({error})"
            ) from error
        return self._memory

    def peer(self, rank: int) -> torch.Tensor:
        if self._memory is None:
            raise HeapError("the heap holds no memory: alloc() was not called, or free() was.")
        return (self._memory,)[rank]

    @property
    def peer_ptrs(self) -> torch.Tensor:
        return torch.tensor([self.peer(0).data_ptr()], dtype=torch.int64, device=self._device)

    def fence(self) -> None:
        torch.cuda.current_stream(self._device).synchronize()

    def barrier(self) -> None:
        self.fence()

    def free(self, *, together: bool = True) -> None:
        """Drops the memory. A view that is still held keeps it."""
        self._freed = True
        self._memory = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.free()
