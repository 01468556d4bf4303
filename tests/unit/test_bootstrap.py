"""Who launched this process, told from its environment."""

from __future__ import annotations

import re

import pytest
import torch
import torch.distributed as dist

from megamoe_ep import bootstrap
from megamoe_ep.bootstrap import Group, Place, RankProcesses, detect_launcher
from megamoe_ep.errors import ArgumentError, BootstrapError

TORCHRUN = {
    "RANK": "1",
    "WORLD_SIZE": "4",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
}
OPEN_MPI = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0", "PMIX_RANK": "0"}


@pytest.mark.parametrize(
    ("environment", "launcher"),
    [
        ({}, None),
        ({"PATH": "/bin", "MASTER_ADDR": "host", "MASTER_PORT": "1"}, None),
        ({"RANK": "0"}, None),
        (TORCHRUN, "torchrun"),
        (OPEN_MPI, "mpirun"),
        ({"PMI_SIZE": "2", "PMI_RANK": "0"}, "mpirun"),
        ({"MV2_COMM_WORLD_SIZE": "2"}, "mpirun"),
        ({"PMIX_RANK": "3"}, "mpirun"),
        # A script that mpirun starts may export torchrun's variables, of the same ranks.
        ({**TORCHRUN, **OPEN_MPI, "OMPI_COMM_WORLD_SIZE": "4"}, "torchrun"),
        # srun sets no more than this where PMIx is its default.
        ({**TORCHRUN, "PMIX_RANK": "3"}, "torchrun"),
        # One torchrun agent per machine, started by mpirun.
        ({**TORCHRUN, **OPEN_MPI, "TORCHELASTIC_RUN_ID": "x"}, "torchrun"),
    ],
)
def test_launcher(environment, launcher):
    assert detect_launcher(environment) == launcher


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({**TORCHRUN, **OPEN_MPI}, r"torchrun \(WORLD_SIZE=4\) and of mpirun \(\['2'\] ranks\)"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR and MASTER_PORT not"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "h"}, "and MASTER_PORT not"),
    ],
)
def test_contradictions_are_errors(environment, message):
    with pytest.raises(BootstrapError, match=message):
        detect_launcher(environment)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"RANK": "4"}, "RANK must be 0 to WORLD_SIZE - 1; got 4 of 4"),
        ({"MASTER_PORT": "99999"}, "MASTER_PORT must be 0 to 65535; got 99999"),
        ({"RANK": "one"}, "must be whole numbers; got 'one'"),
        ({"MASTER_PORT": "1", "WORLD_SIZE": "2"}, "could not reach the store at MASTER_ADDR=127"),
    ],
)
def test_bad_torchrun_variables(change, message):
    with pytest.raises(BootstrapError, match=message):
        bootstrap._exchange_of_torchrun({**TORCHRUN, **change}, timeout_s=1)


def test_lone_process(monkeypatch):
    for name in (*TORCHRUN, *OPEN_MPI, *bootstrap._MPI_VARIABLES):
        monkeypatch.delenv(name, raising=False)
    group = Group.from_environment(device="cpu")
    assert (group.rank, group.world_size, group.local_rank) == (0, 1, 0)
    assert group.device == torch.device("cpu")
    assert group.places == [Place.here()]
    assert group.broadcast_object([1]) == [1]
    group.barrier()
    assert repr(group) == "Group(rank=0, world_size=1, device=cpu)"


def test_a_rank_missing_at_a_store_in_a_file_is_named(tmp_path):
    exchange = bootstrap._StoreExchange(dist.FileStore(str(tmp_path / "store"), 2), 0, 2, 5.0)
    with pytest.raises(BootstrapError, match=r"rank 1 did not come within timeout_s=0\.3"):
        exchange.all_gather(b"", 0.3)


@pytest.mark.parametrize("timeout_s", [0, -1, float("nan"), float("inf")])
def test_timeout_must_be_positive(timeout_s):
    with pytest.raises(ArgumentError, match="timeout_s must be a positive number"):
        Group.of(None, timeout_s=timeout_s)


@pytest.mark.parametrize("device", ["cuda", "cuda:0"])
def test_cuda_without_a_gpu(monkeypatch, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ArgumentError, match=f"'{device}' was asked for, and torch sees no GPU"):
        Group.of(None, device=device)


@pytest.mark.parametrize(
    ("environment", "computed", "index"),
    [({}, 0, 0), ({}, 5, 1), ({"LOCAL_RANK": "3"}, 0, 1), ({"LOCAL_RANK": "2"}, 1, 0)],
)
def test_ranks_share_the_gpus_there_are(monkeypatch, environment, computed, index):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name in bootstrap._LOCAL_RANK_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert bootstrap._choose_device(None, computed) == torch.device("cuda", index)
    assert bootstrap._choose_device("cuda", computed) == torch.device("cuda", index)
    assert bootstrap._choose_device("cuda:1", computed) == torch.device("cuda", 1)
    assert bootstrap._choose_device("cpu:0", computed) == torch.device("cpu")
    with pytest.raises(ArgumentError, match=r"one of the 2 GPUs of this machine; got 'cuda:7'"):
        bootstrap._choose_device("cuda:7", computed)


class _Scripted:
    """An exchange whose other ranks say what the test wants."""

    def __init__(self, places):
        import pickle

        self.rank = 1
        self.world_size = len(places)
        self._payloads = [pickle.dumps(place) for place in places]

    def all_gather(self, payload, timeout_s):
        return self._payloads


def test_local_ranks_count_those_of_the_same_machine():
    def place(host, boot, pid):
        return Place(host, boot, "pid:[1]", pid)

    places = [place("a", "A", 1), place("b", "B", 2), place("a2", "A", 3), place("b", "B", 4)]
    group = Group(_Scripted(places), device="cpu")
    assert (group.local_rank, group.local_world_size) == (0, 2)
    assert not group.on_one_machine


def test_rank_environment_is_a_fresh_one(monkeypatch):
    for name in (*OPEN_MPI, "TORCHELASTIC_RUN_ID", "PRTE_LAUNCHED", "OMPI_COMM_WORLD_LOCAL_RANK"):
        monkeypatch.setenv(name, "7")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth9")
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    environment = bootstrap._rank_environment(1, 3, 1234, {"EXTRA": "x"})
    assert detect_launcher(environment) == "torchrun"
    assert environment["GLOO_SOCKET_IFNAME"] == "eth9"
    assert environment["NCCL_SOCKET_IFNAME"] == "lo"
    assert environment["OMP_NUM_THREADS"] == "5"
    assert environment["EXTRA"] == "x"
    assert (environment["RANK"], environment["LOCAL_RANK"]) == ("1", "1")
    assert not [n for n in environment if re.match("OMPI_|PMIX_|PRTE_|TORCHELASTIC_RUN", n)]


def test_world_size_of_the_spawner():
    with pytest.raises(ArgumentError, match="world_size must be at least 1; got 0"):
        RankProcesses(["true"], 0)
