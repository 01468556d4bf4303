"""Who am I, and who are the others: torchrun, mpirun or nothing, made into one Group.

Everything here happens while things are created. Ranks meet through the key-value store that a
torch process group is built on, or through point-to-point messages of MPI, never through a
collective of either: so a wait has a deadline, needs no GPU, and names the rank that is missing.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import pickle
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType
from typing import IO, Any, Protocol, TypeVar

import torch
import torch.distributed as dist

from megamoe_ep.errors import ArgumentError, BootstrapError, check_timeout

DEFAULT_TIMEOUT_S = 60.0

_T = TypeVar("_T")

_c10d: Any = dist  # its stores are not in its type stubs

_LOOPBACK = "127.0.0.1"
_NAMESPACE = "megamoe_ep"
_ANSWER_S = 2.0  # for the store to say that a wait is over
_FAREWELL_S = 5.0  # at most, for which rank 0 stays until all have read what was last gathered
# What each launcher tells its ranks.
_MPI_SIZE_VARIABLES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
_MPI_VARIABLES = (*_MPI_SIZE_VARIABLES, "PMIX_RANK")
_TORCHRUN_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_LOCAL_RANK_VARIABLES = ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID")
_LAUNCHER_PREFIXES = ("OMPI_", "PMIX_", "PMI_", "PRTE_", "MV2_COMM_", "TORCHELASTIC_")


class Exchange(Protocol):
    """How the ranks of one group hand bytes to one another. Failed once, it stays unusable."""

    rank: int
    world_size: int

    def all_gather(self, payload: bytes, timeout_s: float) -> list[bytes]:
        """Every rank's ``payload``, by rank. Raises BootstrapError past ``timeout_s`` seconds."""


@dataclass(frozen=True)
class Place:
    """Where a rank runs: what decides which ranks can share memory."""

    hostname: str
    boot_id: str  # one per running kernel: containers of one machine share it
    pid_namespace: str  # one per container, as a rule
    pid: int

    @classmethod
    def here(cls) -> Place:
        with open("/proc/sys/kernel/random/boot_id") as f:
            boot_id = f.read().strip()
        return cls(socket.gethostname(), boot_id, os.readlink("/proc/self/ns/pid"), os.getpid())


class Group:
    """The ranks that share a layer, and the few collectives used while it is created.

    Made by ``Group.of(...)`` from what the caller has, or by ``Group.from_environment()`` from what
    the launcher said. Making one is collective.

    Attributes:
        rank, world_size: this rank, and how many there are.
        places: where each rank runs, by rank.
        local_rank, local_world_size: the same among the ranks of this machine.
        device: the device of this rank: the one asked for, else one of the machine's GPUs by local
            rank (modulo their number, so ranks may share a GPU), else the CPU.
        timeout_s: deadline of each collective, in seconds, unless the call says otherwise.
    """

    def __init__(
        self,
        exchange: Exchange,
        *,
        device: torch.device | str | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
    ) -> None:
        self._exchange = exchange
        self.rank = exchange.rank
        self.world_size = exchange.world_size
        self.timeout_s = float(timeout_s)
        self.places: list[Place] = self.all_gather_object(Place.here())
        neighbours = [
            r for r, p in enumerate(self.places) if p.boot_id == self.places[self.rank].boot_id
        ]
        self.local_rank = neighbours.index(self.rank)
        self.local_world_size = len(neighbours)
        self.device = self.device_of(device)

    def device_of(self, device: torch.device | str | None) -> torch.device:
        """The device that ``device`` means on this rank: "cuda" is one of the machine's GPUs.

        Raises:
            ArgumentError: there is no such GPU.
        """
        return _choose_device(device, self.local_rank)

    @classmethod
    def of(
        cls,
        ranks: object,
        *,
        device: torch.device | str | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
    ) -> Group:
        """The group of the given ranks; collective over them.

        Args:
            ranks: a ``Group`` (returned as it is), a torch ``ProcessGroup`` of any backend, an
                mpi4py intracommunicator, or None for a lone process.
            device: this rank's device; None lets the group choose, see ``Group``.
            timeout_s: deadline of each collective, in seconds.

        Raises:
            ArgumentError: ``ranks`` is something else, or a group that this process is not in.
            BootstrapError: a rank did not come within ``timeout_s``.
        """
        if isinstance(ranks, Group):
            return ranks
        check_timeout(timeout_s)
        exchange: Exchange
        if ranks is None:
            exchange = _Alone()
        elif isinstance(ranks, dist.ProcessGroup):
            exchange = _StoreExchange(
                ranks.get_group_store(), ranks.rank(), ranks.size(), timeout_s
            )
        elif _is_mpi_communicator(ranks):
            exchange = _MpiExchange(ranks, timeout_s)
        else:
            raise ArgumentError(
                f"group must be a Group, a torch ProcessGroup that this process is a member of, an "
                f"mpi4py intracommunicator, or None for a lone process; got {ranks!r}."
            )
        return cls(exchange, device=device, timeout_s=timeout_s)

    @classmethod
    def from_environment(
        cls,
        *,
        device: torch.device | str | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
    ) -> Group:
        """The group of all ranks that were launched together with this process; collective.

        Told apart by what launched it: an initialised ``torch.distributed``; the variables of
        torchrun (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT); those of mpirun or of an MPI started
        by srun; none of them, a lone process.

        Raises:
            BootstrapError: the variables contradict one another, mpi4py is missing or belongs to
                another MPI than the launcher, or a rank did not come within ``timeout_s``.
        """
        check_timeout(timeout_s)
        if dist.is_available() and dist.is_initialized():
            return cls.of(dist.group.WORLD, device=device, timeout_s=timeout_s)
        launcher = detect_launcher(os.environ)
        exchange: Exchange
        if launcher == "torchrun":
            exchange = _exchange_of_torchrun(os.environ, timeout_s)
        elif launcher == "mpirun":
            exchange = _exchange_of_mpirun(os.environ, timeout_s)
        else:
            exchange = _Alone()
        return cls(exchange, device=device, timeout_s=timeout_s)

    def all_gather_object(self, obj: Any, *, timeout_s: float | None = None) -> list[Any]:
        """Every rank's ``obj`` (anything that pickles), by rank.

        Raises:
            BootstrapError: a rank did not come within ``timeout_s``, which the message names; or an
                earlier collective of this group failed.
        """
        deadline = self.timeout_s if timeout_s is None else timeout_s
        gathered = self._exchange.all_gather(pickle.dumps(obj), deadline)
        return [pickle.loads(payload) for payload in gathered]

    def broadcast_object(
        self, obj: Any = None, *, root: int = 0, timeout_s: float | None = None
    ) -> Any:
        """The ``obj`` of rank ``root``; what the others pass is ignored. Raises as the gather."""
        if not 0 <= root < self.world_size:
            raise ArgumentError(f"root must be a rank, 0 to {self.world_size - 1}; got {root}.")
        mine = obj if self.rank == root else None
        return self.all_gather_object(mine, timeout_s=timeout_s)[root]

    def barrier(self, *, timeout_s: float | None = None) -> None:
        """Returns once every rank has called it. Raises as ``all_gather_object``."""
        self.all_gather_object(None, timeout_s=timeout_s)

    @property
    def on_one_machine(self) -> bool:
        return self.local_world_size == self.world_size

    def __repr__(self) -> str:
        return f"Group(rank={self.rank}, world_size={self.world_size}, device={self.device})"


def _choose_device(device: torch.device | str | None, local_rank: int) -> torch.device:
    chosen = torch.device(device if device is not None else _default_device_type())
    if chosen.type == "cpu":
        return torch.device("cpu")  # as tensors say it, without a number
    if chosen.type != "cuda":
        return chosen
    if not torch.cuda.is_available():
        raise ArgumentError(
            f"device '{chosen}' was asked for, and torch sees no GPU; use device='cpu'."
        )
    if ":" in str(chosen):
        if chosen.index >= torch.cuda.device_count():
            raise ArgumentError(
                f"device must be one of the {torch.cuda.device_count()} GPUs of this machine; got "
                f"'{chosen}'."
            )
        return chosen
    # The launcher's own local rank first: a group may leave out some ranks of the machine.
    for name in _LOCAL_RANK_VARIABLES:
        if os.environ.get(name, "").isdecimal():
            local_rank = int(os.environ[name])
            break
    return torch.device("cuda", local_rank % torch.cuda.device_count())


def _default_device_type() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


# Which launcher


def detect_launcher(environment: Mapping[str, str]) -> str | None:
    """Names the launcher, "torchrun" or "mpirun" (or None), by the variables that it sets.

    Raises:
        BootstrapError: variables of both are set and do not describe the same ranks, or some of
            torchrun's are missing.
    """
    by_mpi = any(name in environment for name in _MPI_VARIABLES)
    given = [name for name in _TORCHRUN_VARIABLES if name in environment]
    if len(given) == len(_TORCHRUN_VARIABLES):
        sizes = {environment[n] for n in _MPI_SIZE_VARIABLES if n in environment}
        # torchrun below mpirun (one agent per machine) is the inner of the two, and it says so.
        inner = "TORCHELASTIC_RUN_ID" in environment
        if by_mpi and not inner and sizes - {environment["WORLD_SIZE"]}:
            raise BootstrapError(
                f"this process has the variables of torchrun (WORLD_SIZE="
                f"{environment['WORLD_SIZE']}) and of mpirun ({sorted(sizes)} ranks), which do not "
                f"agree; unset those of the launcher that is not meant."
            )
        return "torchrun"
    if by_mpi:
        return "mpirun"
    if "RANK" in given and "WORLD_SIZE" in given:
        missing = [name for name in _TORCHRUN_VARIABLES if name not in given]
        raise BootstrapError(
            f"RANK and WORLD_SIZE are set, and {' and '.join(missing)} not: the ranks cannot find "
            f"one another; start them with torchrun or mpirun, or set the missing variables."
        )
    return None


class _Alone:
    rank = 0
    world_size = 1

    def all_gather(self, payload: bytes, timeout_s: float) -> list[bytes]:
        return [payload]


# torch: the store


class _StoreExchange:
    """All-gather over a torch store: each rank sets one key, and reads everyone's."""

    def __init__(self, store: Any, rank: int, world_size: int, timeout_s: float) -> None:
        self.rank = rank
        self.world_size = world_size
        self._gathers = 0
        self._broken = ""
        self._farewell: weakref.finalize[..., _StoreExchange] | None = None

        def join() -> int:
            # Counted by the store, so that two groups made from one store never share a key, even
            # when torch.distributed was shut down and started again in between.
            ticket = int(store.add(f"{_NAMESPACE}/joined", 1)) - 1
            self._store = _c10d.PrefixStore(f"{_NAMESPACE}/{ticket // world_size}", store)
            return int(self._store.add(f"claimed/{rank}", 1))

        with _store_errors(rank):
            claims = run_within(timeout_s, "store", join)
        if claims != 1:
            raise BootstrapError(
                f"two processes say that they are rank {rank} of {world_size}, or an earlier group "
                f"on the same store was never completed; start all ranks anew, each with its own "
                f"RANK."
            )

    def all_gather(self, payload: bytes, timeout_s: float) -> list[bytes]:
        if self._broken:
            raise BootstrapError(f"this group is unusable since an earlier failure: {self._broken}")
        try:
            # The store's own answers have no deadline.
            deadline = time.monotonic() + timeout_s
            with _store_errors(self.rank):
                return run_within(
                    timeout_s + _ANSWER_S,
                    "store",
                    lambda: self._all_gather(payload, deadline, timeout_s),
                )
        except BootstrapError as error:
            self._broken = str(error)
            self._stay_for([])
            raise

    def _all_gather(self, payload: bytes, deadline: float, timeout_s: float) -> list[bytes]:
        store, gather = self._store, self._gathers
        self._gathers += 1
        keys = self._keys(gather, "said")
        store.set(keys[self.rank], payload)
        if not _wait(store, keys, deadline):
            missing = [r for r, key in enumerate(keys) if not store.check([key])]
            if missing:
                raise BootstrapError(_missing_ranks(missing, self.rank, timeout_s))
        gathered = store.multi_get(keys)
        read = self._keys(gather, "read")
        store.set(read[self.rank], b"")
        if self.rank == 0:
            # Rank 0's process may hold the store, so it stays until all have read; but it goes on
            # with its work: a rank that dies reading is then found, and named, where it is missed.
            self._stay_for(read)
            if gather > 0:  # who has come to this gather is done with the one before
                for key in (*self._keys(gather - 1, "said"), *self._keys(gather - 1, "read")):
                    store.delete_key(key)
        return list(gathered)

    def _keys(self, gather: int, what: str) -> list[str]:
        return [f"{gather}/{what}/{r}" for r in range(self.world_size)]

    def _stay_for(self, keys: Sequence[str]) -> None:
        """Lets the store go, on exit or with this object, only once ``keys`` are there."""
        if self._farewell is not None:
            self._farewell.detach()
        self._farewell = weakref.finalize(self, _see_off, self._store, keys) if keys else None


def _see_off(store: Any, keys: Sequence[str]) -> None:
    with contextlib.suppress(dist.DistError):
        _wait(store, keys, time.monotonic() + _FAREWELL_S)


def _wait(store: Any, keys: Sequence[str], deadline: float) -> bool:
    """Whether all keys are there before the deadline, on the clock of time.monotonic()."""
    remaining = max(deadline - time.monotonic(), 0.001)
    try:
        store.wait(list(keys), timedelta(seconds=remaining))
    except dist.DistStoreError:
        return False
    except RuntimeError as error:
        # A FileStore has no class of its own for that.
        if type(error) is RuntimeError and "timeout" in str(error).lower():
            return False
        raise
    return True


@contextlib.contextmanager
def _store_errors(rank: int) -> Iterator[None]:
    try:
        yield
    except TimeoutError as error:
        raise BootstrapError(
            f"the store that the ranks meet at does not answer rank {rank}; the process that holds "
            f"it (rank 0, or torchrun) is stuck, or cut off. Start all ranks anew."
        ) from error
    except dist.DistError as error:
        raise BootstrapError(
            f"rank {rank} lost the store that the ranks meet at; the process that holds it (rank "
            f"0, or torchrun) is gone. Start all ranks anew. ({str(error).splitlines()[0]})"
        ) from error


def run_within(timeout_s: float, what: str, call: Callable[[], _T]) -> _T:
    """What ``call`` returns or raises, for calls that have no deadline of their own.

    Raises:
        TimeoutError: it has not returned in time. It is left behind, in a thread that ends with the
            process.
    """
    result: list[_T] = []
    failure: list[Exception] = []

    def run() -> None:
        try:
            result.append(call())
        except Exception as error:
            failure.append(error)

    thread = threading.Thread(target=run, name=f"megamoe_ep {what}", daemon=True)
    thread.start()
    thread.join(timeout_s)
    if failure:
        raise failure[0]
    if not result:
        raise TimeoutError(what)
    return result[0]


def _missing_ranks(missing: Sequence[int], rank: int, timeout_s: float) -> str:
    who = f"rank {missing[0]}" if len(missing) == 1 else f"ranks {list(missing)}"
    return (
        f"{who} did not come within timeout_s={timeout_s:g} (told by rank {rank}): not started, "
        f"dead, or stuck before this point; look at the logs of those ranks, and start all ranks "
        f"anew."
    )


def _exchange_of_torchrun(environment: Mapping[str, str], timeout_s: float) -> _StoreExchange:
    try:
        rank, world_size, port = (
            int(environment[name]) for name in ("RANK", "WORLD_SIZE", "MASTER_PORT")
        )
    except ValueError as error:
        raise BootstrapError(
            f"RANK, WORLD_SIZE and MASTER_PORT must be whole numbers; got "
            f"{environment['RANK']!r}, {environment['WORLD_SIZE']!r} and "
            f"{environment['MASTER_PORT']!r}."
        ) from error
    if not 0 <= rank < world_size:
        raise BootstrapError(f"RANK must be 0 to WORLD_SIZE - 1; got {rank} of {world_size}.")
    if not 0 <= port < 1 << 16:
        raise BootstrapError(f"MASTER_PORT must be 0 to 65535; got {port}.")
    address = environment["MASTER_ADDR"]
    launcher_holds_it = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    holds_it = rank == 0 and not launcher_holds_it
    timeout = timedelta(seconds=timeout_s)
    try:
        if holds_it and address in (_LOOPBACK, "localhost"):
            store = _serve_store_on_loopback(_listen_on_loopback(port))
        else:
            store = _c10d.TCPStore(
                address, port, world_size, holds_it, timeout, wait_for_workers=False,
                multi_tenant=True,
            )  # fmt: skip
    except (dist.DistError, OSError) as error:
        what = "open" if holds_it else "reach"
        raise BootstrapError(
            f"rank {rank} could not {what} the store at MASTER_ADDR={address} MASTER_PORT={port} "
            f"within timeout_s={timeout_s:g}: is rank 0 up, is the port right, and free? "
            f"({str(error).splitlines()[0]})"
        ) from error
    # torchrun's store outlives a restart of the ranks.
    attempt = environment.get("TORCHELASTIC_RESTART_COUNT", "0")
    return _StoreExchange(
        _c10d.PrefixStore(f"attempt_{attempt}", store), rank, world_size, timeout_s
    )


def _listen_on_loopback(port: int) -> socket.socket:
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((_LOOPBACK, port))
        listener.listen(1024)
    except OSError:
        listener.close()
        raise
    return listener


def _serve_store_on_loopback(listener: socket.socket) -> Any:
    # TCPStore by itself listens on every interface of the machine.
    port = listener.getsockname()[1]
    return _c10d.TCPStore(
        _LOOPBACK, port, None, True, wait_for_workers=False, multi_tenant=True,
        master_listen_fd=listener.detach(),
    )  # fmt: skip


# MPI: point to point


def _is_mpi_communicator(ranks: object) -> bool:
    mpi = sys.modules.get("mpi4py.MPI")
    return mpi is not None and isinstance(ranks, mpi.Intracomm) and ranks != mpi.COMM_NULL


class _MpiExchange:
    """All-gather by messages from everyone to everyone: unlike a collective, it can be given up."""

    def __init__(self, communicator: Any, timeout_s: float) -> None:
        from mpi4py import MPI

        self._mpi = MPI
        self.rank = communicator.Get_rank()
        self.world_size = communicator.Get_size()
        self._gathers = 0
        self._broken = ""
        # A communicator of its own, so that no message of ours meets a receive of the user's.
        deadline = time.monotonic() + timeout_s
        try:
            self._communicator, request = communicator.Idup()
            while not request.Test():
                if time.monotonic() > deadline:
                    raise self._give_up(
                        f"MPI could not duplicate the communicator within timeout_s={timeout_s:g}: "
                        f"not every one of its {self.world_size} ranks is making the group."
                    )
                time.sleep(0.001)
        except MPI.Exception as error:
            raise self._give_up(f"MPI reports: {error}; start all ranks anew.") from error

    def all_gather(self, payload: bytes, timeout_s: float) -> list[bytes]:
        if self._broken:
            raise BootstrapError(f"this group is unusable since an earlier failure: {self._broken}")
        try:
            return self._all_gather(payload, timeout_s)
        except self._mpi.Exception as error:
            raise self._give_up(f"MPI reports: {error}; start all ranks anew.") from error

    def _all_gather(self, payload: bytes, timeout_s: float) -> list[bytes]:
        deadline = time.monotonic() + timeout_s
        byte = self._mpi.BYTE
        tag = self._gathers % 32768  # what every MPI allows at least
        self._gathers += 1
        others = [r for r in range(self.world_size) if r != self.rank]
        sends = [self._communicator.Isend([payload, byte], r, tag) for r in others]
        arriving: dict[int, tuple[bytearray, Any]] = {}
        gathered: dict[int, bytes] = {self.rank: payload}
        pause = 0.0
        while True:
            status = self._mpi.Status()
            for r in others:
                if r not in gathered and r not in arriving:
                    message = self._communicator.Improbe(r, tag, status)
                    if message is not None:
                        buffer = bytearray(status.Get_count(byte))
                        arriving[r] = buffer, message.Irecv([buffer, byte])
            for r, (buffer, request) in list(arriving.items()):
                if request.Test():
                    gathered[r] = bytes(buffer)
                    del arriving[r]
            if len(gathered) == self.world_size and self._mpi.Request.Testall(sends):
                return [gathered[r] for r in range(self.world_size)]
            if time.monotonic() > deadline:
                missing = [r for r in others if r not in gathered]
                raise self._give_up(_missing_ranks(missing or others, self.rank, timeout_s))
            time.sleep(pause)
            pause = min(pause + 0.0001, 0.002)

    def _give_up(self, reason: str) -> BootstrapError:
        if not self._broken:
            self._broken = reason
            # MPI_Finalize waits for every rank, also for one that never comes.
            atexit.register(_abort_mpi)
        return BootstrapError(reason)


def _abort_mpi() -> None:
    from mpi4py import MPI

    if not MPI.Is_finalized():
        sys.stdout.flush()
        sys.stderr.flush()
        MPI.COMM_WORLD.Abort(1)


def _exchange_of_mpirun(environment: Mapping[str, str], timeout_s: float) -> _MpiExchange:
    size = environment.get("OMPI_COMM_WORLD_SIZE")
    if size is not None and environment.get("OMPI_COMM_WORLD_LOCAL_SIZE") == size:
        # Open MPI's TCP transport listens on every interface, and ranks of one machine need none.
        os.environ.setdefault("OMPI_MCA_btl", "^tcp")
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise BootstrapError(
            f"this process was started by mpirun, and mpi4py does not load: {error}. Install it "
            f"(pip install 'megamoe_ep[mpi]') with an MPI library, or start the ranks by torchrun."
        ) from error
    for name in _MPI_SIZE_VARIABLES:
        if environment.get(name, str(MPI.COMM_WORLD.Get_size())) != str(MPI.COMM_WORLD.Get_size()):
            raise BootstrapError(
                f"the launcher started {environment[name]} ranks ({name}), and mpi4py sees "
                f"{MPI.COMM_WORLD.Get_size()}: it belongs to another MPI "
                f"({MPI.Get_library_version().splitlines()[0]}) than the mpirun that was used; use "
                f"the mpirun of the same MPI."
            )
    return _MpiExchange(MPI.COMM_WORLD, timeout_s)


# Starting ranks

# The child asks the kernel to be killed when its parent goes, then becomes the rank. It does so
# itself, after the fork, since nothing but exec is safe between the fork and the exec of a process
# with threads; and a parent that went before it asked is found by its id.
_BECOME_RANK = """
import ctypes, os, sys
ctypes.CDLL(None).prctl(1, 9, 0, 0, 0)
if os.getppid() != int(sys.argv[1]):
    os._exit(1)
os.execvp(sys.argv[2], sys.argv[2:])
"""


class RankProcesses:
    """Ranks of one job as processes of this machine, started here and ended with this one.

    They see the environment that torchrun gives, on 127.0.0.1 and a free port; the store that they
    meet at lives in this process, so it outlasts any of them. They are killed by the kernel when
    the thread that started them ends, however it ends. Use it as a context manager; leaving it
    kills what still runs.

    Args:
        argv: command of every rank, the program first.
        world_size: how many ranks.
        environment: variables of the ranks on top of this process's own.
        output: where stdout and stderr of each rank go, by rank; None: where this process's go.
    """

    def __init__(
        self,
        argv: Sequence[str],
        world_size: int,
        *,
        environment: Mapping[str, str] | None = None,
        output: Sequence[IO[bytes]] | None = None,
    ) -> None:
        if world_size < 1:
            raise ArgumentError(f"world_size must be at least 1; got {world_size}.")
        self.processes: list[subprocess.Popen[bytes]] = []
        listener = _listen_on_loopback(0)
        port = listener.getsockname()[1]
        try:
            for rank in range(world_size):
                sink = None if output is None else output[rank]
                self.processes.append(
                    subprocess.Popen(
                        [sys.executable, "-I", "-S", "-c", _BECOME_RANK, str(os.getpid()), *argv],
                        env=_rank_environment(rank, world_size, port, environment or {}),
                        stdin=subprocess.DEVNULL,
                        stdout=sink,
                        stderr=sink,
                    )
                )
            self._store = _serve_store_on_loopback(listener)
        except BaseException:
            listener.close()
            self.kill()
            raise

    def kill(self, rank: int | None = None) -> None:
        """Kills one rank, or all, by SIGKILL, and reaps what it killed."""
        chosen = self.processes if rank is None else [self.processes[rank]]
        for process in chosen:
            process.kill()
        for process in chosen:
            process.wait()

    def wait(self, timeout_s: float, *, kill_rest: bool = True) -> list[int]:
        """Waits for all ranks; exit codes by rank, negative for a signal.

        Args:
            timeout_s: deadline in seconds; what still runs then is killed (code -9).
            kill_rest: when a rank fails, give the others ``GRACE_S`` seconds to end by themselves,
                then kill them; False lets them run on to the deadline.
        """
        deadline = time.monotonic() + timeout_s
        failed = False
        while None in (codes := [process.poll() for process in self.processes]):
            if kill_rest and not failed and any(codes):
                failed = True
                deadline = min(deadline, time.monotonic() + self.GRACE_S)
            if time.monotonic() > deadline:
                self.kill()
                break
            time.sleep(0.01)
        return [process.wait() for process in self.processes]

    GRACE_S = 5.0

    def __enter__(self) -> RankProcesses:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.kill()


def _rank_environment(
    rank: int, world_size: int, port: int, extra: Mapping[str, str]
) -> dict[str, str]:
    # A rank of ours may be started by a process that itself is a rank of mpirun or torchrun.
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(_LAUNCHER_PREFIXES) and name not in _LOCAL_RANK_VARIABLES
    }
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // world_size)))
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        environment.setdefault(name, "lo")
    environment.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR=_LOOPBACK,
        MASTER_PORT=str(port),
        TORCHELASTIC_USE_AGENT_STORE="True",
    )
    environment.update(extra)
    return environment


def spawn_ranks(
    argv: Sequence[str],
    world_size: int,
    *,
    timeout_s: float,
    environment: Mapping[str, str] | None = None,
) -> list[int]:
    """Runs ``argv`` as ``world_size`` ranks on this machine; their exit codes, by rank.

    Their output goes where this process's goes. When one fails the others are ended, and past
    ``timeout_s`` seconds all are (code -9). See ``RankProcesses``.
    """
    with RankProcesses(argv, world_size, environment=environment) as ranks:
        return ranks.wait(timeout_s)


__all__ = [
    "DEFAULT_TIMEOUT_S",
    "Group",
    "Place",
    "RankProcesses",
    "detect_launcher",
    "spawn_ranks",
]
