"""Symmetric memory of the processes of one machine, in host memory."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import mmap
import os
import platform
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil
import torch

from megamoe_ep.bootstrap import Group
from megamoe_ep.errors import HeapError, HeapTooSmallError

_MODE = 0o600
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL

_libc = ctypes.CDLL(None, use_errno=True)
_SYS_MEMBARRIER = {"x86_64": 324, "aarch64": 283, "riscv64": 283, "ppc64le": 365, "s390x": 356}
_MEMBARRIER_GLOBAL_EXPEDITED = 1 << 1


class HostHeap:
    """A segment per rank, made without a name and mapped by every rank.

    A segment is a memfd: no file, so none is ever left behind, at whatever moment a rank is killed.
    Peers open it through /proc/<pid>/fd, which the kernel allows to processes of the same user and
    pid namespace, and mode 0600 to nobody else. Once all have mapped it the descriptors are closed,
    and the memory lives as long as a mapping, that is as long as a process or a view needs it.
    """

    def __init__(self, group: Group, timeout_s: float) -> None:
        self._group = group
        self._timeout_s = timeout_s
        self._parts: list[torch.Tensor] = []
        self._freed = False
        _check_one_machine(group)
        if not _membarrier():
            raise HeapError(
                f"the host heap orders its writes by membarrier(2), which this kernel or sandbox "
                f"refuses ({os.strerror(ctypes.get_errno())}, {platform.machine()}); allow it."
            )

    def alloc(self, nbytes: int) -> torch.Tensor:
        if self._freed or self._parts:
            raise HeapError("a heap holds one allocation; open another heap for another one.")
        pages = -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
        total = pages * self._group.world_size
        # Everyone looks before anyone takes.
        free = min(self._gather(available_memory()))
        if total > free:
            raise HeapTooSmallError(
                f"the layer needs {nbytes} bytes of symmetric memory on each of "
                f"{self._group.world_size} ranks, {total} bytes on this machine, and {free} are "
                f"free; lower max_num_tokens, or run fewer ranks here."
            )
        with contextlib.ExitStack() as until_all_have_mapped:
            segment: tuple[int, int, int] | OSError
            try:
                segment = _create_segment(pages, until_all_have_mapped)
            except OSError as error:
                segment = error
            segments = self._gather(segment)
            _raise_failures(segments, "could not make its segment")
            outcome: OSError | None = None
            try:
                parts = [
                    _map(self._group.places[rank].pid, rank, segments[rank], pages)[:nbytes]
                    for rank in range(self._group.world_size)
                ]
            except OSError as error:
                outcome = error
            _raise_failures(self._gather(outcome), "could not map every segment")
        self._parts = parts
        return parts[self._group.rank]

    def peer(self, rank: int) -> torch.Tensor:
        return self._live()[rank]

    @property
    def peer_ptrs(self) -> torch.Tensor:
        return torch.tensor([part.data_ptr() for part in self._live()], dtype=torch.int64)

    def fence(self) -> None:
        _membarrier()

    def barrier(self) -> None:
        self._group.barrier(timeout_s=self._timeout_s)

    def free(self, *, together: bool = True) -> None:
        """Drops this rank's mappings, waiting for nobody; a view still held keeps its own."""
        self._freed = True
        self._parts = []

    def _live(self) -> list[torch.Tensor]:
        if not self._parts:
            raise HeapError("the heap holds no memory: alloc() was not called, or free() was.")
        return self._parts

    def _gather(self, value: Any) -> list[Any]:
        return self._group.all_gather_object(value, timeout_s=self._timeout_s)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.free()


def _create_segment(nbytes: int, owner: contextlib.ExitStack) -> tuple[int, int, int]:
    """A segment of ``nbytes`` zeros, open until ``owner`` closes: descriptor, device, inode."""
    fd = os.memfd_create("megamoe_ep", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    owner.callback(os.close, fd)
    os.fchmod(fd, _MODE)
    os.ftruncate(fd, nbytes)
    # No one can cut it short, which would turn another rank's access into a SIGBUS.
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
    status = os.fstat(fd)
    return fd, status.st_dev, status.st_ino


def _map(pid: int, rank: int, segment: tuple[int, int, int], nbytes: int) -> torch.Tensor:
    number, device, inode = segment
    path = f"/proc/{pid}/fd/{number}"
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            status = os.fstat(fd)
            if (status.st_dev, status.st_ino) != (device, inode):
                raise OSError(f"{path} is no longer what that rank made; it has died")
            # torch's own mapping: unmapped with the last view of it, and with no descriptor kept.
            return torch.from_file(
                f"/proc/self/fd/{fd}", shared=True, size=nbytes, dtype=torch.uint8
            )
        finally:
            os.close(fd)
    except (OSError, RuntimeError) as error:
        raise OSError(f"that of rank {rank}: {error}") from error


def _raise_failures(outcomes: list[Any], what: str) -> None:
    for rank, outcome in enumerate(outcomes):
        if isinstance(outcome, Exception):
            raise HeapError(
                f"rank {rank} {what}: {outcome}. Ranks of one host heap run as one user in one "
                f"container, with memory for all of them."
            ) from outcome


def _check_one_machine(group: Group) -> None:
    mine = group.places[group.rank]
    for rank, place in enumerate(group.places):
        if (place.boot_id, place.pid_namespace) != (mine.boot_id, mine.pid_namespace):
            where = "another machine" if place.boot_id != mine.boot_id else "another container"
            raise HeapError(
                f"the host heap is memory of one machine, and rank {rank} runs on {where} "
                f"({place.hostname}) than rank {group.rank} ({mine.hostname}); start all ranks on "
                f"one machine, or give them GPUs that reach one another."
            )


def _membarrier() -> bool:
    """A full memory barrier of this thread, with what the kernel does on its behalf elsewhere."""
    return bool(_syscall(_membarrier_number, _MEMBARRIER_GLOBAL_EXPEDITED, 0, 0) == 0)


_syscall = _libc.syscall
_membarrier_number = _SYS_MEMBARRIER.get(platform.machine(), -1)


def available_memory() -> int:
    """Bytes that processes here can still take: the machine's, or less where a cgroup says less."""
    return min([int(psutil.virtual_memory().available), *_cgroup_headrooms()])


def _cgroup_headrooms() -> list[int]:
    """Bytes left below each memory limit of the cgroups above this process, versions 1 and 2."""
    headrooms = []
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, limit, usage = Path("/sys/fs/cgroup"), "memory.max", "memory.current"
        elif controllers == "memory":
            root = Path("/sys/fs/cgroup/memory")
            limit, usage = "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        leaf = root / path.lstrip("/")
        for folder in (leaf, *leaf.parents):
            if not folder.is_relative_to(root):
                break
            with contextlib.suppress(OSError, ValueError):
                # "max", no number, is no limit. File pages count as used and can be taken back.
                left = int((folder / limit).read_text()) - int((folder / usage).read_text())
                stat = dict(
                    row.split(" ", 1) for row in (folder / "memory.stat").read_text().splitlines()
                )
                headrooms.append(max(0, left + int(stat["inactive_file"])))
    return headrooms
