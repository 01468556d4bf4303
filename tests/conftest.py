"""What tests of several ranks share. Those that take ``group`` run in every rank of whatever
started pytest:

    python -m pytest tests/multirank
    torchrun --nproc-per-node 3 -m pytest tests/multirank
    mpirun -n 3 python -m pytest --with-mpi tests/multirank

Those that take ``launcher_side`` or ``fork_ranks`` start ranks of their own, and are skipped inside
a rank.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path

import pytest

from megamoe_ep import bootstrap
from megamoe_ep.bootstrap import Group, detect_launcher
from megamoe_ep.kernels import library

HERE = Path(__file__).parent
ROOT = HERE.parent
ZYGOTE = HERE / "multirank" / "programs" / "zygote.py"
SEARCH_PATH = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
MPIRUN = shutil.which("mpirun", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")


@pytest.fixture(scope="session")
def group() -> Group:
    return Group.from_environment(device="cpu", timeout_s=60)


@pytest.fixture(scope="session")
def cuobjdump() -> str:
    """The program that takes csrc's library apart: PyPI's, or the one on PATH."""
    if library.why_unavailable() is not None:
        pytest.skip(f"no library to look at: {library.why_unavailable()}")
    try:
        files = metadata.files("nvidia-cuda-cuobjdump") or []
        found = [str(file.locate()) for file in files if file.name == "cuobjdump"]
    except metadata.PackageNotFoundError:
        found = []
    program = found[0] if found else shutil.which("cuobjdump")
    if program is None:
        pytest.skip("needs cuobjdump: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm")
    return program


@pytest.fixture(scope="session")
def launcher_side() -> None:
    if detect_launcher(os.environ) is not None:
        pytest.skip("starts ranks itself; this process is one")


@pytest.fixture(scope="session")
def launch(launcher_side: None) -> Callable[..., str]:
    return launch_ranks


@pytest.fixture(scope="session")
def launch_tests(launcher_side: None) -> Callable[..., list[int]]:
    return launch_tests_in_ranks


@pytest.fixture(scope="module")
def left_in_shared_memory() -> Callable[[], set[str]]:
    """Call it for the files in /dev/shm that came since and that no living process maps."""
    before = set(os.listdir("/dev/shm"))

    def look() -> set[str]:
        mapped = set()
        for maps in Path("/proc").glob("[0-9]*/maps"):
            # It may have ended meanwhile, or be another user's.
            with contextlib.suppress(OSError):
                mapped |= {line.split(maxsplit=5)[-1] for line in maps.read_text().splitlines()}
        came = set(os.listdir("/dev/shm")) - before
        return {name for name in came if f"/dev/shm/{name}" not in mapped}

    return look


def launch_ranks(launcher: str, world_size: int, program: list[str], *, check: bool = True) -> str:
    """Runs a Python program and its arguments as ranks of "spawner", "torchrun" or "mpirun".

    Returns what they wrote. Asserts that all ended well, unless ``check`` is False.
    """
    python = [sys.executable, *program]
    if launcher == "spawner":
        body = (
            f"import sys; from megamoe_ep.bootstrap import spawn_ranks\n"
            f"codes = spawn_ranks({python!r}, {world_size}, timeout_s=120)\n"
            f"sys.exit(any(codes))"
        )
        argv = [sys.executable, "-c", body]
    elif launcher == "torchrun":
        nproc = ["--standalone", "--nproc-per-node", str(world_size)]
        argv = [sys.executable, "-m", "torch.distributed.run", *nproc, *program]
    else:
        if MPIRUN is None:
            pytest.skip("no mpirun")
        pytest.importorskip("mpi4py")
        argv = [MPIRUN, "--allow-run-as-root", "--oversubscribe", "-n", str(world_size), *python]
    environment = {**os.environ, "PYTHONPATH": SEARCH_PATH}
    done = subprocess.run(
        argv, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=150
    )
    if check:
        assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def launch_tests_in_ranks(launcher: str, world_size: int, files: Sequence[Path]) -> list[int]:
    """How many tests of ``files`` passed in each rank; asserts that none failed."""
    argv = ["-m", "pytest", "-q", "--color=no", "-p", "no:cacheprovider", *map(str, files)]
    output = launch_ranks(launcher, world_size, argv + ["--with-mpi"] * (launcher == "mpirun"))
    # One rank's summary may stand in the line of another's.
    return [int(count) for count in re.findall(r"(\d+) passed", output)]


class ForkedRanks:
    """One job of forked ranks, with torchrun's environment; its store lives in this process."""

    def __init__(
        self, fork: Callable[[dict[str, object]], int], argv: Sequence[str], world_size: int,
        folder: Path,
    ) -> None:  # fmt: skip
        listener = bootstrap._listen_on_loopback(0)
        port = listener.getsockname()[1]
        self._store = bootstrap._serve_store_on_loopback(listener)
        self.outputs = [folder / f"rank{r}" for r in range(world_size)]
        self.pids = [
            fork(
                {
                    "argv": list(argv),
                    "environment": bootstrap._rank_environment(rank, world_size, port, {}),
                    "output": str(self.outputs[rank]),
                }
            )
            for rank in range(world_size)
        ]

    def kill(self, rank: int) -> None:
        os.kill(self.pids[rank], signal.SIGKILL)

    def running(self) -> list[int]:
        """Ranks whose process is there. It is the zygote's to reap, which it does at once."""
        return [r for r, pid in enumerate(self.pids) if Path(f"/proc/{pid}").exists()]

    def wait(self, timeout_s: float, *, but: Sequence[int] = ()) -> list[int]:
        """Waits for all ranks ``but`` some to end; those that did not."""
        deadline = time.monotonic() + timeout_s
        while (left := [r for r in self.running() if r not in but]) and time.monotonic() < deadline:
            time.sleep(0.02)
        return left

    def end(self) -> None:
        for rank in self.running():
            self.kill(rank)
        assert not self.wait(10)

    def said(self, rank: int) -> list[dict]:
        """The JSON objects, one a line, that a rank has printed."""
        lines = self.outputs[rank].read_text().splitlines() if self.outputs[rank].exists() else []
        return [json.loads(line) for line in lines if line.startswith("{")]

    def log(self) -> str:
        return "\n".join(
            f"--- rank {r}\n{path.read_text() if path.exists() else ''}"
            for r, path in enumerate(self.outputs)
        )


@pytest.fixture(scope="session")
def fork_ranks(
    launcher_side: None, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[Sequence[str], int], ForkedRanks]]:
    """Starts a job: (program and arguments, number of ranks). Safe to call from several threads."""
    zygote = subprocess.Popen(
        [sys.executable, str(ZYGOTE), str(os.getpid())],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": SEARCH_PATH, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert zygote.stdin is not None
    assert zygote.stdout is not None
    stdin, stdout, one_at_a_time = zygote.stdin, zygote.stdout, threading.Lock()

    def fork(request: dict[str, object]) -> int:
        with one_at_a_time:
            stdin.write(json.dumps(request) + "\n")
            stdin.flush()
            return int(stdout.readline())

    jobs: list[ForkedRanks] = []

    def start(argv: Sequence[str], world_size: int) -> ForkedRanks:
        with one_at_a_time:
            folder = tmp_path_factory.mktemp("ranks")
        job = ForkedRanks(fork, argv, world_size, folder)
        jobs.append(job)
        return job

    yield start
    for job in jobs:
        job.end()
    stdin.close()
    assert zygote.wait(10) == 0
