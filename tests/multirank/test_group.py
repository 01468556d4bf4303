"""A Group's collectives, in every rank of whatever launched pytest."""

from __future__ import annotations

import os
import time

import pytest
import torch.distributed as dist

from megamoe_ep.bootstrap import Group, detect_launcher
from megamoe_ep.errors import ArgumentError

LAUNCHER = detect_launcher(os.environ)


def test_ranks_are_those_that_were_launched(group):
    expected = {"torchrun": ("RANK", "WORLD_SIZE")}.get(
        LAUNCHER, ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE")
    )
    assert group.rank == int(os.environ.get(expected[0], 0))
    assert group.world_size == int(os.environ.get(expected[1], 1))
    assert group.local_rank == group.rank  # one machine
    assert group.on_one_machine
    assert [place.pid for place in group.places][group.rank] == os.getpid()
    assert len({place.pid for place in group.places}) == group.world_size


@pytest.mark.parametrize("nbytes", [0, 1, 70_000, 3_000_000])
def test_gather_is_in_rank_order_whatever_the_sizes(group, nbytes):
    mine = (group.rank, bytes([group.rank]) * (nbytes // (group.rank + 1)))
    assert group.all_gather_object(mine) == [
        (r, bytes([r]) * (nbytes // (r + 1))) for r in range(group.world_size)
    ]


def test_many_gathers_do_not_mix(group):
    for i in range(50):
        assert group.all_gather_object((i, group.rank)) == [(i, r) for r in range(group.world_size)]


def test_broadcast_from_every_root(group):
    for root in range(group.world_size):
        given = {"root": root} if group.rank == root else "ignored"
        assert group.broadcast_object(given, root=root) == {"root": root}
    with pytest.raises(ArgumentError, match=f"root must be a rank.*got {group.world_size}"):
        group.broadcast_object(1, root=group.world_size)


def test_barrier_waits_for_the_last(group):
    time.sleep(0.2 * group.rank)
    came = time.monotonic()
    group.barrier()
    left = time.monotonic()
    times = group.all_gather_object((came, left))
    assert max(t for t, _ in times) <= min(t for _, t in times)


def test_two_groups_of_the_same_ranks_are_separate(group):
    first = Group.from_environment(device="cpu")
    second = Group.from_environment(device="cpu")
    for i in range(5):
        assert first.all_gather_object(("first", i)) == [("first", i)] * group.world_size
        assert second.all_gather_object(("second", i)) == [("second", i)] * group.world_size


def test_of_a_group_is_that_group(group):
    assert Group.of(group) is group


def test_of_none_is_alone():
    alone = Group.of(None, device="cpu")
    assert (alone.rank, alone.world_size, alone.local_world_size) == (0, 1, 1)
    assert alone.all_gather_object("x") == ["x"]


@pytest.mark.parametrize("what", ["nccl", 4, object()])
def test_of_anything_else_is_an_error(what):
    with pytest.raises(ArgumentError, match="group must be a Group, a torch ProcessGroup"):
        Group.of(what)


@pytest.mark.skipif(LAUNCHER != "torchrun", reason="needs the ranks of torchrun")
def test_of_process_groups(group):
    dist.init_process_group("gloo")
    try:
        world = Group.of(dist.group.WORLD, device="cpu")
        assert (world.rank, world.world_size) == (group.rank, group.world_size)
        implied = Group.from_environment(device="cpu")
        assert implied.all_gather_object(group.rank) == list(range(group.world_size))

        # The ranks of a subgroup count anew, and the two halves do not hear one another.
        halves = [list(range(group.world_size))[i::2] for i in range(2)]
        process_groups = [dist.new_group(half) for half in halves if half]
        for half, process_group in zip(halves, process_groups, strict=False):
            if group.rank in half:
                part = Group.of(process_group, device="cpu")
                assert part.rank == half.index(group.rank)
                assert part.all_gather_object(group.rank) == half
            else:
                with pytest.raises(ArgumentError, match="this process is a member of"):
                    Group.of(process_group)
    finally:
        group.barrier()
        dist.destroy_process_group()


@pytest.mark.mpi(min_size=2)
def test_of_communicators(group):
    from mpi4py import MPI

    world = Group.of(MPI.COMM_WORLD, device="cpu")
    assert (world.rank, world.world_size) == (group.rank, group.world_size)
    half = MPI.COMM_WORLD.Split(color=group.rank % 2, key=-group.rank)
    part = Group.of(half, device="cpu")
    members = [r for r in reversed(range(group.world_size)) if r % 2 == group.rank % 2]
    assert part.all_gather_object(group.rank) == members
    assert part.rank == members.index(group.rank)
    with pytest.raises(ArgumentError, match="mpi4py intracommunicator"):
        Group.of(MPI.COMM_NULL)
