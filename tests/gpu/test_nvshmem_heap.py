"""NVSHMEM's heap. The tests that take ``gpu_group`` run in every rank of whatever started pytest;
the others start such ranks, also two on each GPU, or kill some.
"""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

import pytest
import torch

from megamoe_ep.bootstrap import Group
from megamoe_ep.errors import HeapError, HeapTooSmallError
from megamoe_ep.heap import local, nvshmem, open_heap

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

HERE = Path(__file__)
KILL_VICTIM = str(HERE.parents[1] / "multirank" / "programs" / "kill_victim.py")


@pytest.fixture(scope="module")
def gpu_group(group):
    if group.world_size == 1:
        pytest.skip("needs several ranks; the tests with a launcher start them")
    return Group.from_environment(device="cuda", timeout_s=60)


def test_every_rank_sees_every_part(gpu_group):
    nbytes = 3 * 4096 + 17
    world_size, rank = gpu_group.world_size, gpu_group.rank
    with open_heap(gpu_group, gpu_group.device, nbytes) as heap:
        assert isinstance(heap, nvshmem.NvshmemHeap)
        mine = heap.alloc(nbytes)
        assert (mine.dtype, mine.shape, mine.device) == (torch.uint8, (nbytes,), gpu_group.device)
        assert not mine.any()
        heap.barrier()
        for r in range(world_size):
            heap.peer(r)[rank::world_size] = rank + 1
        heap.barrier()
        expected = torch.arange(nbytes, device=mine.device) % world_size + 1
        for r in range(world_size):
            assert torch.equal(heap.peer(r), expected.to(torch.uint8))
        pointers = heap.peer_ptrs
        assert pointers.device == gpu_group.device
        assert pointers.tolist() == [heap.peer(r).data_ptr() for r in range(world_size)]
        assert all(pointer % 256 == 0 for pointer in pointers.tolist())
        heap.barrier()


def test_memory_given_back_is_given_out_again(gpu_group):
    sizes = [8 << 20, 200 << 20, 1 << 10, 200 << 20]
    free = []
    for _ in range(3):
        for i, nbytes in enumerate(sizes):
            heap = open_heap(gpu_group, gpu_group.device, nbytes)
            part = heap.alloc(nbytes)
            assert not part.any(), "a rank was handed bytes of an earlier heap"
            heap.barrier()
            heap.peer((gpu_group.rank + 1) % gpu_group.world_size).fill_(i + 1)
            heap.barrier()
            assert part.eq(i + 1).all()
            heap.free()
            heap.free()
        gpu_group.barrier()
        free.append(torch.cuda.mem_get_info(gpu_group.device)[0])
    # Other ranks on the same GPU may still be growing their torch caches in the first round.
    assert free[2] >= free[1] - (64 << 20), free


def test_several_heaps_do_not_overlap(gpu_group):
    heaps = [open_heap(gpu_group, gpu_group.device, 4096) for _ in range(3)]
    for i, heap in enumerate(heaps):
        heap.alloc(4096).fill_(10 * i + gpu_group.rank)
    heaps[0].barrier()
    for i, heap in enumerate(heaps):
        for r in range(gpu_group.world_size):
            assert heap.peer(r).unique().tolist() == [10 * i + r]
    heaps[0].barrier()
    for heap in reversed(heaps):
        heap.free()


def test_use_out_of_turn(gpu_group):
    heap = open_heap(gpu_group, gpu_group.device, 64)
    with pytest.raises(HeapError, match=r"alloc\(\) was not called"):
        heap.peer(0)
    heap.alloc(64)
    with pytest.raises(HeapError, match="open another heap"):
        heap.alloc(64)
    heap.free()
    with pytest.raises(HeapError, match=r"free\(\) was"):
        heap.peer(0)


def test_too_little_memory_is_told_to_every_rank(gpu_group, monkeypatch):
    """By one rank's GPU, by one rank's NVSHMEM, and truly; and the next heap is in order."""
    last = gpu_group.world_size - 1
    with pytest.raises(HeapTooSmallError, match="NVSHMEM_MAX_MEMORY_PER_GPU, read when"):
        open_heap(gpu_group, gpu_group.device, 1 << 50).alloc(1 << 50)

    heap = open_heap(gpu_group, gpu_group.device, 8 << 30)
    if gpu_group.rank == last:
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (1 << 20, 1 << 37))
    with pytest.raises(HeapTooSmallError, match=r"1048576 are free there; lower max_num_tokens"):
        heap.alloc(8 << 30)
    monkeypatch.undo()

    heap = open_heap(gpu_group, gpu_group.device, 4096)
    if gpu_group.rank == last:
        monkeypatch.setattr(nvshmem._runtime, "capacity", 4096)
    with pytest.raises(HeapTooSmallError, match=rf"rank {last}: NVSHMEM's heap holds at most 4096"):
        heap.alloc(4096)
    monkeypatch.undo()
    heap.alloc(4096).fill_(1)
    heap.free()


def test_a_group_of_other_ranks_is_an_error(gpu_group):
    with open_heap(gpu_group, gpu_group.device, 64) as heap:
        heap.alloc(64)
        alone = Group.of(None, device=gpu_group.device)
        with pytest.raises(HeapError, match=r"cannot serve rank 0 of 1"):
            nvshmem.NvshmemHeap(alone, gpu_group.device, 64, 5)
        heap.barrier()


def test_stores_arrive_in_order(gpu_group):
    """Who sees the flag sees the bytes written before it: a token goes round the ring."""
    rounds, words = 40, 1 << 16
    nbytes = 8 * (words + 8)
    with open_heap(gpu_group, gpu_group.device, nbytes) as heap:
        heap.alloc(nbytes)
        inboxes = [heap.peer(r).view(torch.int64) for r in range(gpu_group.world_size)]
        mine = inboxes[gpu_group.rank]
        heap.barrier()
        right = inboxes[(gpu_group.rank + 1) % gpu_group.world_size]

        def pass_on(i):
            right[:words] = i
            heap.fence()
            right[words] = i
            heap.fence()

        for i in range(1, rounds + 1):
            if gpu_group.rank == 0:
                pass_on(i)
            while mine[words].item() != i:
                pass
            heap.fence()
            assert mine[:words].eq(i).all()
            if gpu_group.rank != 0:
                pass_on(i)
        heap.barrier()


def test_a_lone_rank_needs_no_nvshmem(launcher_side):
    device = torch.device("cuda", 0)
    with open_heap(Group.of(None, device=device), device, 100) as heap:
        assert isinstance(heap, local.LocalHeap)
        part = heap.alloc(100)
        assert not part.any()
        assert heap.peer_ptrs.tolist() == [part.data_ptr()]
        assert heap.peer(0) is part
        heap.barrier()
        with pytest.raises(HeapError, match="one allocation"):
            heap.alloc(100)
    with pytest.raises(HeapError, match=r"free\(\) was"):
        heap.peer(0)
    with pytest.raises(HeapTooSmallError, match="fewer free; lower max_num_tokens"):
        open_heap(Group.of(None, device=device), device, 1 << 50).alloc(1 << 50)


@pytest.mark.parametrize("ranks_per_gpu", [1, 2])
@pytest.mark.parametrize("launcher", ["torchrun", "mpirun"])
def test_the_rank_side_tests_pass(launch_tests, launcher, ranks_per_gpu):
    world_size = max(2, torch.cuda.device_count() * ranks_per_gpu)
    assert launch_tests(launcher, world_size, [HERE]) == [7] * world_size


@pytest.mark.slow
@pytest.mark.parametrize("run", range(6))
def test_survivors_of_a_kill_name_the_victim_and_end(fork_ranks, run):
    """As tests/multirank/test_kill.py, over NVSHMEM: what a survivor does next must not hang."""
    timeout, grace = 8.0, 5.0
    rng = random.Random(run)
    world_size = rng.randint(2, 4)
    victim = rng.randrange(world_size)
    job = fork_ranks([KILL_VICTIM, "cuda", str(timeout), "0"], world_size)
    at_creation = run < 3
    if not at_creation:
        deadline = time.monotonic() + 60
        while not all(job.said(r) for r in range(world_size)):
            assert time.monotonic() < deadline, job.log()
            time.sleep(0.01)
    time.sleep(rng.uniform(0, 5 if at_creation else 0.5))
    killed_at = time.monotonic()
    job.kill(victim)
    left = job.wait(timeout + 2 * grace + nvshmem._EXIT_TIMEOUT_S)
    assert not left, f"ranks {left} hang, {victim} was killed at {killed_at}\n{job.log()}"
    for rank in set(range(world_size)) - {victim}:
        said = [line for line in job.said(rank) if line["event"] != "ready"]
        assert said, job.log()
        assert said[-1]["event"] == "end", job.log()
        first = said[0]
        assert killed_at <= first["at"] <= killed_at + timeout + grace, job.log()
        if first["type"] == "PeerTimeoutError":
            assert first["ranks"] == [victim], job.log()
        else:
            assert at_creation, job.log()
            assert f"rank {victim} did not come" in first["message"], job.log()
    assert not [name for name in os.listdir("/dev/shm") if "megamoe" in name]
