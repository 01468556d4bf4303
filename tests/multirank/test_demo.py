"""``megamoe-ep demo`` over ranks that it starts itself; launch/test runs it under the launchers."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from megamoe_ep.weights import random_experts, write_modelopt_checkpoint

pytestmark = pytest.mark.usefixtures("launcher_side")

ROOT = Path(__file__).parents[2]
DEMO = [sys.executable, "-m", "megamoe_ep.cli", "demo", "--device", "cpu"]


@pytest.fixture
def temporary(tmp_path) -> Path:
    folder = tmp_path / "temporary"
    folder.mkdir()
    return folder


@pytest.fixture
def environment(temporary) -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, "TMPDIR": str(temporary), "OMP_NUM_THREADS": "1"}


def test_a_checkpoint_and_a_picture(tmp_path, temporary, environment):
    write_modelopt_checkpoint(tmp_path / "model", 4, random_experts(6, 64, 32), num_files=2)
    picture = tmp_path / "traffic.png"
    arguments = ["--ranks", "3", "--tokens", "12", "--top-k", "4", "--plot", str(picture)]
    arguments += ["--checkpoint", str(tmp_path / "model"), "--layer", "4"]
    done = subprocess.run(
        [*DEMO, *arguments], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert said[0] == (
        f"Layer 4 of {tmp_path / 'model'}: 6 experts, hidden 64, intermediate 32, top-k 4, "
        f"combine exact, 3 rank(s)"
    )
    rows = [line.split() for line in said if " cpu " in line]
    assert [row[:3] for row in rows] == [["0", "cpu", "12"], ["1", "cpu", "8"], ["2", "cpu", "0"]]
    assert max(map(len, said[1:10])) <= 80
    assert sum(int(row[3]) for row in rows) == (12 + 8) * 4, "each token reaches top-k experts"
    error = next(line for line in said if line.startswith("relative L2 error against the oracle"))
    assert float(error.split(":")[1].split()[0]) < 5e-3
    assert "bits equal from call to call: yes" in said
    assert "bits equal to one rank: yes" in said
    data = picture.read_bytes()
    assert data.startswith(b"\x89PNG")
    width, height = struct.unpack(">II", data[16:24])
    assert width > 1000
    assert height > 500
    assert not list(temporary.iterdir())


def test_a_rank_is_killed(temporary, environment, left_in_shared_memory):
    """The demo ends, says which rank it was, and leaves nothing behind."""
    arguments = ["--ranks", "3", "--tokens", "4096", "--timeout", "3"]
    demo = subprocess.Popen(
        [*DEMO, *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    ranks = ranks_of(demo.pid, 3)
    deadline = time.monotonic() + 60
    while not list(temporary.rglob("*.safetensors")):  # the layer is being made
        assert demo.poll() is None, demo.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    ranks[1].kill()
    _, stderr = demo.communicate(timeout=60)
    assert demo.returncode == 1
    assert "Exit status by rank, of those that failed: " in stderr
    assert "rank 1: -9" in stderr
    _, alive = psutil.wait_procs(list(ranks.values()), timeout=10)
    assert not alive
    assert not list(temporary.iterdir())
    assert not left_in_shared_memory()


def ranks_of(parent: int, count: int) -> dict[int, psutil.Process]:
    """The processes of a demo's ranks, by rank, once all of them run."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        found = {}
        for child in psutil.Process(parent).children():
            try:
                if "megamoe_ep.cli" in child.cmdline():
                    found[int(child.environ()["RANK"])] = child
            except (psutil.Error, KeyError):
                continue
        if len(found) == count:
            return found
        time.sleep(0.02)
    raise AssertionError("the ranks did not start")
