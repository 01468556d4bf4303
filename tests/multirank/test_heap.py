"""The host heap, in every rank of whatever launched pytest."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
import torch

from megamoe_ep.errors import ArgumentError, HeapError, HeapTooSmallError, UnsupportedDeviceError
from megamoe_ep.heap import host, open_heap


def test_every_rank_sees_every_part(group):
    nbytes = 3 * 4096 + 17  # ends inside a page
    with open_heap(group, "cpu", nbytes) as heap:
        mine = heap.alloc(nbytes)
        assert mine.dtype == torch.uint8
        assert mine.shape == (nbytes,)
        assert not mine.any()
        assert heap.peer(group.rank) is mine
        heap.barrier()
        for r in range(group.world_size):
            heap.peer(r)[group.rank :: group.world_size] = group.rank + 1
        heap.barrier()
        expected = torch.arange(nbytes, dtype=torch.int64) % group.world_size + 1
        for r in range(group.world_size):
            assert torch.equal(heap.peer(r), expected.to(torch.uint8))
        pointers = heap.peer_ptrs
        assert pointers.dtype == torch.int64
        assert pointers.tolist() == [heap.peer(r).data_ptr() for r in range(group.world_size)]
        assert all(pointer % 256 == 0 for pointer in pointers.tolist())
        heap.barrier()


def test_nothing_has_a_name_and_no_descriptor_stays_open(group):
    before = set(os.listdir("/dev/shm"))
    descriptors = len(os.listdir("/proc/self/fd"))
    with open_heap(group, "cpu", 1 << 20) as heap:
        heap.alloc(1 << 20)
        ours = _segments()
        assert len(ours) == group.world_size
        assert all("(deleted)" in line for line in ours)
        assert len(os.listdir("/proc/self/fd")) == descriptors
        assert not {n for n in set(os.listdir("/dev/shm")) - before if "megamoe" in n}
        group.barrier()
    assert not _segments()


def _segments() -> list[str]:
    """This process's mappings of a heap's memory; csrc's library, also mapped, is none."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return [line for line in lines if "/memfd:megamoe_ep" in line]


def test_views_outlive_the_heap(group):
    heap = open_heap(group, "cpu", 4096)
    view = heap.alloc(4096)[100:200]
    heap.barrier()
    heap.free()
    heap.free()
    view.fill_(7)
    assert view.sum().item() == 700
    for use in (lambda: heap.peer(0), lambda: heap.peer_ptrs, lambda: heap.alloc(1)):
        with pytest.raises(HeapError, match=r"free\(\) was|one allocation"):
            use()
    group.barrier()


def test_one_allocation_per_heap(group):
    with open_heap(group, "cpu", 64) as heap:
        with pytest.raises(HeapError, match=r"alloc\(\) was not called"):
            heap.peer(0)
        heap.alloc(64)
        with pytest.raises(HeapError, match="open another heap"):
            heap.alloc(64)
        group.barrier()


def test_several_heaps_do_not_overlap(group):
    heaps = [open_heap(group, "cpu", 4096) for _ in range(3)]
    parts = [heap.alloc(4096) for heap in heaps]
    for i, part in enumerate(parts):
        part.fill_(10 * i + group.rank)
    group.barrier()
    for i, heap in enumerate(heaps):
        for r in range(group.world_size):
            assert heap.peer(r).unique().tolist() == [10 * i + r]
    group.barrier()
    for heap in heaps:
        heap.free()


def test_too_little_memory_is_told_to_every_rank(group, monkeypatch):
    if group.rank == group.world_size - 1:
        monkeypatch.setattr(host, "available_memory", lambda: 4096 * group.world_size - 1)
    heap = open_heap(group, "cpu", 4096)
    message = f"{4096 * group.world_size} bytes on this machine.*lower max_num_tokens"
    with pytest.raises(HeapTooSmallError, match=message):
        heap.alloc(4096)
    monkeypatch.undo()
    with pytest.raises(HeapTooSmallError, match="are free"):
        open_heap(group, "cpu", 1 << 60).alloc(1 << 60)


@pytest.mark.parametrize("step", ["_create_segment", "_map"])
def test_a_rank_that_fails_is_named_on_every_rank(group, monkeypatch, step):
    last = group.world_size - 1

    def fail(*_):
        raise OSError("no descriptors left")

    if group.rank == last:
        monkeypatch.setattr(host, step, fail)
    heap = open_heap(group, "cpu", 4096)
    with pytest.raises(HeapError, match=rf"rank {last} could not .*no descriptors left"):
        heap.alloc(4096)
    with pytest.raises(HeapError):
        heap.peer(0)
    assert not _segments()


def test_stores_arrive_in_order(group):
    """Rank 0 writes bytes, then a flag: who sees the flag sees the bytes. Then the other way."""
    rounds, words = 300, 512
    with open_heap(group, "cpu", 8 * (words + 8)) as heap:
        heap.alloc(8 * (words + 8))
        inboxes = [heap.peer(r).view(torch.int64) for r in range(group.world_size)]
        mine = inboxes[group.rank]
        heap.barrier()
        right = inboxes[(group.rank + 1) % group.world_size]
        for i in range(1, rounds + 1):
            # A token goes round the ring, so that each round's bytes are read before the next.
            if group.rank == 0:
                right[:words] = i
                heap.fence()
                right[words] = i
            while mine[words].item() != i:
                os.sched_yield()
            heap.fence()
            assert mine[:words].eq(i).all()
            if group.rank != 0:
                right[:words] = i
                heap.fence()
                right[words] = i
        heap.barrier()


def test_bad_arguments(group):
    with pytest.raises(ArgumentError, match="nbytes must be at least 1; got 0"):
        open_heap(group, "cpu", 0)
    with pytest.raises(UnsupportedDeviceError, match="'cpu' or 'cuda'; got 'meta'"):
        open_heap(group, "meta", 1)


def test_only_this_user_may_open_a_segment():
    import contextlib

    with contextlib.ExitStack() as owner:
        fd, _, _ = host._create_segment(4096, owner)
        assert stat.S_IMODE(os.fstat(fd).st_mode) == 0o600
        with pytest.raises(PermissionError):  # sealed: nobody cuts it short below a mapping
            os.ftruncate(fd, 0)
        if os.getuid() != 0:
            pytest.skip("only root can try as another user")
        child = os.fork()
        if child == 0:
            os.setgid(65534)
            os.setuid(65534)
            try:
                os.open(f"/proc/{os.getppid()}/fd/{fd}", os.O_RDWR)
            except PermissionError:
                os._exit(0)
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
