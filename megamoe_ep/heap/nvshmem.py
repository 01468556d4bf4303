"""Symmetric memory of GPUs: allocated by NVSHMEM, then reached by peer pointers alone."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self, TypeVar

import numpy as np
import torch

from megamoe_ep.bootstrap import Group, Place, run_within
from megamoe_ep.errors import BootstrapError, HeapError, HeapTooSmallError

_log = logging.getLogger(__name__)
_T = TypeVar("_T")

_SLACK = 64 << 20  # bytes: alignment of allocations, and NVSHMEM's own needs
_VMM_LIMIT = "128G"  # NVSHMEM's default of NVSHMEM_MAX_MEMORY_PER_GPU
_EXIT_TIMEOUT_S = 10.0
_SKEW_S = 2.0


class NvshmemHeap:
    """One allocation in NVSHMEM's symmetric heap of this process's GPU.

    NVSHMEM is initialised by the first heap of a process, over that heap's group, and finalised
    when the process ends; later heaps must have the same ranks. Memory given back by one heap stays
    with NVSHMEM for the next. ``alloc`` and ``free`` are collective, and not allowed during graph
    capture; no view may be used after ``free``.
    """

    def __init__(self, group: Group, device: torch.device, nbytes: int, timeout_s: float) -> None:
        self._group = group
        self._timeout_s = timeout_s
        self.device = torch.device("cuda", 0 if device.index is None else device.index)
        self._address = 0
        self._nbytes = 0
        self._parts: list[torch.Tensor] = []
        self._runtime = _Runtime.of(group, self.device, nbytes, timeout_s)

    def alloc(self, nbytes: int) -> torch.Tensor:
        if self._address:
            raise HeapError("a heap holds one allocation; open another heap for another one.")
        runtime, group = self._runtime, self._group
        self._check_room(nbytes)
        entered = time.monotonic()
        outcome: HeapError | None = None
        try:
            self._address = runtime.malloc(nbytes, self._timeout_s)
            self._nbytes = nbytes
            self._parts = self._reach_parts()
        except HeapError as error:
            outcome = error
        # Also the barrier after which a peer may write: not before the zeroing.
        everyone = group.all_gather_object(
            (self._address != 0, outcome), timeout_s=_rest(entered, self._timeout_s)
        )
        for rank, (_, failure) in enumerate(everyone):
            if failure is not None:
                self.free(together=all(has_memory for has_memory, _ in everyone))
                raise HeapError(
                    f"rank {rank}: {failure} All ranks need GPUs that reach one another over "
                    f"NVLink or PCIe peer access (nvidia-smi topo -p2p w shows which do)."
                )
        return self._parts[group.rank]

    def _reach_parts(self) -> list[torch.Tensor]:
        """Every rank's part as this process sees it, its own zeroed."""
        me = self._group.rank
        if not self._address:
            raise HeapError(f"NVSHMEM could not allocate {self._nbytes} bytes on {self.device}.")
        addresses = [
            self._address if r == me else self._runtime.peer_address(self._address, r)
            for r in range(self._group.world_size)
        ]
        unreachable = [r for r, address in enumerate(addresses) if not address]
        if unreachable:
            raise HeapError(f"its GPU has no direct access to the memory of rank(s) {unreachable}.")
        parts = [self._runtime.tensor(address, self._nbytes) for address in addresses]
        parts[me].zero_()
        torch.cuda.synchronize(self.device)
        return parts

    def _check_room(self, nbytes: int) -> None:
        """Raises on every rank if NVSHMEM's heap or some GPU has no room for ``nbytes`` a rank."""
        runtime = self._runtime
        mine = (
            str(torch.cuda.get_device_properties(self.device).uuid),
            torch.cuda.mem_get_info(self.device)[0],
            runtime.growth(nbytes),
            runtime.shortage(nbytes),
        )
        everyone = self._group.all_gather_object(mine, timeout_s=self._timeout_s)
        for rank, (gpu, free, _, shortage) in enumerate(everyone):
            if shortage:
                raise HeapTooSmallError(f"rank {rank}: {shortage}")
            wanted = sum(growth for other, _, growth, _ in everyone if other == gpu)
            if wanted > free:
                sharing = sum(other == gpu for other, *_ in everyone)
                raise HeapTooSmallError(
                    f"the layer needs {nbytes} bytes of symmetric memory on each rank, {wanted} "
                    f"bytes on the GPU that rank {rank} runs on ({sharing} rank(s) share it), and "
                    f"{free} are free there; lower max_num_tokens, or use more GPUs."
                )

    def peer(self, rank: int) -> torch.Tensor:
        return self._live()[rank]

    @property
    def peer_ptrs(self) -> torch.Tensor:
        addresses = [part.data_ptr() for part in self._live()]
        return torch.tensor(addresses, dtype=torch.int64, device=self.device)

    def fence(self) -> None:
        torch.cuda.current_stream(self.device).synchronize()

    def barrier(self) -> None:
        self.fence()
        self._group.barrier(timeout_s=self._timeout_s)

    def free(self, *, together: bool = True) -> None:
        """Collective. What cannot be freed because a rank is gone goes when this process ends.

        Args:
            together: False frees nothing and waits for nobody: for use after a rank has failed.
        """
        address, self._address = self._address, 0
        self._parts = []
        if not address:
            return
        if together:
            try:
                # nvshmem_free waits for all ranks and has no deadline: enter it only with them all.
                torch.cuda.synchronize(self.device)
                self._group.barrier(timeout_s=self._timeout_s)
                self._runtime.free(address, self._nbytes, self._timeout_s)
                return
            except (BootstrapError, HeapError) as error:
                _log.warning("symmetric memory is kept until this process ends: %s", error)
        self._runtime.orderly = False

    def _live(self) -> list[torch.Tensor]:
        if not self._parts:
            raise HeapError("the heap holds no memory: alloc() was not called, or free() was.")
        return self._parts

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.free(together=error is None)


@dataclass
class _Runtime:
    """NVSHMEM of this process: initialised once, since its ranks and limits are fixed by that."""

    group: Group
    device: torch.device
    capacity: int  # bytes that the heap can hold
    capacity_variable: str  # and what sets it
    library: Any  # libnvshmem_host
    resource: Any  # what cuda.core asks which device an address belongs to
    in_use: int = 0
    peak: int = 0
    orderly: bool = True  # no rank is known to have failed

    @staticmethod
    def of(group: Group, device: torch.device, nbytes: int, timeout_s: float) -> _Runtime:
        """The runtime, initialised now if it was not: collective then."""
        global _runtime
        if _runtime is None:
            _runtime = _initialise(group, device, nbytes, timeout_s)
            atexit.register(_runtime.finalise)
        if (_ranks(group), device) != (_ranks(_runtime.group), _runtime.device):
            raise HeapError(
                f"NVSHMEM of this process was initialised for rank {_runtime.group.rank} of "
                f"{_runtime.group.world_size} on {_runtime.device} and cannot serve rank "
                f"{group.rank} of {group.world_size} on {device}; make all SymmBuffers of a "
                f"process over the same ranks and device."
            )
        return _runtime

    def growth(self, nbytes: int) -> int:
        """Bytes that an allocation takes from the GPU, beyond what NVSHMEM holds already."""
        return max(0, self.in_use + nbytes - self.peak)

    def shortage(self, nbytes: int) -> str:
        """Why NVSHMEM's heap has no room for ``nbytes`` more; empty if it has."""
        if self.in_use + nbytes + _SLACK <= self.capacity:
            return ""
        return (
            f"NVSHMEM's heap holds at most {self.capacity} bytes ({self.capacity_variable}, read "
            f"when the first SymmBuffer of the process was made), {self.in_use} of them in use, "
            f"and {nbytes} more are needed; set {self.capacity_variable} to "
            f"{self.in_use + nbytes + _SLACK} or more when starting the process."
        )

    def malloc(self, nbytes: int, timeout_s: float) -> int:
        call = self.library.nvshmem_malloc
        address = self._collective(timeout_s, "allocation", lambda: call(nbytes))
        if address:
            self.in_use += nbytes
            self.peak = max(self.peak, self.in_use)
        return address or 0

    def free(self, address: int, nbytes: int, timeout_s: float) -> None:
        call = self.library.nvshmem_free
        self._collective(timeout_s, "release", lambda: call(address))
        self.in_use -= nbytes

    def _collective(self, timeout_s: float, what: str, call: Callable[[], _T]) -> _T:
        try:
            return _within(timeout_s, self.device, what, call)
        except HeapError:
            self.orderly = False
            raise

    def peer_address(self, address: int, rank: int) -> int:
        """Where ``address`` of ``rank`` is mapped in this process; 0 where it is not."""
        return self.library.nvshmem_ptr(address, rank) or 0

    def tensor(self, address: int, nbytes: int) -> torch.Tensor:
        from cuda.core import Buffer

        buffer = Buffer.from_handle(ptr=address, size=nbytes, mr=self.resource)
        return torch.utils.dlpack.from_dlpack(buffer).view(torch.uint8)

    def finalise(self) -> None:
        if not self.orderly:  # the process's end takes NVSHMEM's memory as well, and cannot hang
            return
        import nvshmem.core

        with contextlib.suppress(BootstrapError, HeapError):
            # nvshmem_finalize waits for all ranks, also for one that never comes.
            self.group.barrier(timeout_s=_EXIT_TIMEOUT_S)
            _within(_EXIT_TIMEOUT_S, self.device, "finalisation", nvshmem.core.finalize)


_runtime: _Runtime | None = None


def _ranks(group: Group) -> tuple[int, Sequence[Place]]:
    return group.rank, group.places


def _initialise(group: Group, device: torch.device, nbytes: int, timeout_s: float) -> _Runtime:
    """Collective: either every rank gets NVSHMEM, or every rank raises."""
    failure = ""
    try:
        import nvshmem.core
        from cuda.core import Device
        from nvshmem.core.nvshmem_types import NvshmemResource
    except ImportError as error:
        failure = (
            f"NVSHMEM for Python does not load: {error}; pip install 'megamoe_ep[cuda]' brings it."
        )
    set_defaults(nbytes, group.on_one_machine)
    try:
        capacity, capacity_variable = heap_capacity()
    except HeapError as error:
        failure = failure or str(error)
    _raise_failures(group, failure, timeout_s)

    torch.cuda.set_device(device)  # NVSHMEM binds to the current device
    torch.cuda.synchronize(device)
    unique_id = nvshmem.core.get_unique_id(empty=group.rank != 0)
    words = group.broadcast_object(
        unique_id._data.tobytes() if group.rank == 0 else None, timeout_s=timeout_s
    )
    unique_id._data.view(np.uint8)[...] = np.frombuffer(words, np.uint8)

    def initialise() -> None:
        gpu = Device(device.index)
        gpu.set_current()
        nvshmem.core.init(
            device=gpu,
            uid=unique_id,
            rank=group.rank,
            nranks=group.world_size,
            initializer_method="uid",
        )

    entered = time.monotonic()
    try:
        _within(timeout_s, device, "initialisation", initialise)
    except HeapError as error:
        failure = str(error)
    except Exception as error:  # nvshmem's own errors share no base class
        failure = f"NVSHMEM does not initialise: {error!r} (NVSHMEM_DEBUG=INFO tells more)."
    _raise_failures(group, failure, _rest(entered, timeout_s))

    library = ctypes.CDLL("libnvshmem_host.so.3")  # the one that nvshmem.core has loaded
    library.nvshmem_malloc.argtypes = [ctypes.c_size_t]
    library.nvshmem_malloc.restype = ctypes.c_void_p
    library.nvshmem_free.argtypes = [ctypes.c_void_p]
    library.nvshmem_free.restype = None
    library.nvshmem_ptr.argtypes = [ctypes.c_void_p, ctypes.c_int]
    library.nvshmem_ptr.restype = ctypes.c_void_p
    resource = NvshmemResource(Device(device.index))
    return _Runtime(group, device, capacity, capacity_variable, library, resource)


def _rest(entered: float, timeout_s: float) -> float:
    """What is left of a deadline for hearing how the other ranks fared in a collective of NVSHMEM.

    They entered it with this rank, so they leave it with this one, if only by their deadline.
    """
    return max(0.0, entered + timeout_s - time.monotonic()) + _SKEW_S


def _raise_failures(group: Group, failure: str, timeout_s: float) -> None:
    for rank, reason in enumerate(group.all_gather_object(failure, timeout_s=timeout_s)):
        if reason:
            raise HeapError(f"rank {rank}: {reason}")


def set_defaults(nbytes: int, on_one_machine: bool) -> None:
    """Sets NVSHMEM's variables for peer access alone, where the user has not set them."""
    defaults = {
        "NVSHMEM_SYMMETRIC_SIZE": str(nbytes + _SLACK),
        "NVSHMEM_DISABLE_NVLS": "1",  # NVLink multicast is not used
    }
    if on_one_machine:
        defaults["NVSHMEM_REMOTE_TRANSPORT"] = "none"
        defaults["NVSHMEM_BOOTSTRAP_UID_SOCK_IFNAME"] = "lo"
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


def heap_capacity() -> tuple[int, str]:
    """Bytes that NVSHMEM's heap will hold at most, and the variable that says so.

    By default the heap grows as memory is asked for (CUDA's virtual memory management), up to
    NVSHMEM_MAX_MEMORY_PER_GPU; with that disabled it has one size from the start.
    """
    if os.environ.get("NVSHMEM_DISABLE_CUDA_VMM", "0").lower() not in ("", "0", "n", "no", "false"):
        return parse_size(os.environ["NVSHMEM_SYMMETRIC_SIZE"]), "NVSHMEM_SYMMETRIC_SIZE"
    limit = os.environ.get("NVSHMEM_MAX_MEMORY_PER_GPU", _VMM_LIMIT)
    return parse_size(limit), "NVSHMEM_MAX_MEMORY_PER_GPU"


def parse_size(text: str) -> int:
    """Bytes of a size as NVSHMEM takes it: a number and, perhaps, k, m, g or t (powers of 1024)."""
    scale = {"k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}.get(text[-1:].lower())
    try:
        return int(float(text[:-1]) * scale) if scale else int(text)
    except ValueError as error:
        raise HeapError(
            f"NVSHMEM's heap size must be a number with an optional k, m, g or t; got {text!r}."
        ) from error


def _within(timeout_s: float, device: torch.device, what: str, call: Callable[[], _T]) -> _T:
    """Runs a collective of NVSHMEM, which has no deadline of its own, with one.

    Raises:
        HeapError: it did not return in time. It is left running: this process is of no more use to
            NVSHMEM, but keeps its GPU context and can end in order.
    """

    def on_device() -> _T:
        torch.cuda.set_device(device)
        return call()

    try:
        return run_within(timeout_s, f"nvshmem {what}", on_device)
    except TimeoutError as error:
        raise HeapError(
            f"NVSHMEM's {what} did not end within timeout_s={timeout_s:g}: a rank died meanwhile, "
            f"or GPUs cannot reach one another; look at the ranks' logs (NVSHMEM_DEBUG=INFO tells "
            f"more), and start all of them anew."
        ) from error
