"""A rank that dies, or sleeps past the deadline: what the others say, and what they can still do.

Starts its own ranks, two on each GPU if there is but one.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import torch

from megamoe_ep.bootstrap import RankProcesses, detect_launcher
from megamoe_ep.kernels import library

HERE = Path(__file__).parent
TIMEOUT_S = 3.0

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.skipif(
        library.why_unavailable() is not None, reason=f"{library.why_unavailable()}"
    ),
    pytest.mark.skipif(
        detect_launcher(os.environ) is not None, reason="starts ranks itself; this process is one"
    ),
]


@pytest.mark.parametrize("world_size", [2, 3, 4])
@pytest.mark.parametrize("phase", ["dispatch", "combine"])
@pytest.mark.parametrize("fate", ["die", "sleep"])
def test_the_others_name_the_missing_rank_in_time_and_live_on(tmp_path, fate, phase, world_size):
    gpus = torch.cuda.device_count()
    if world_size > gpus and world_size % gpus:
        pytest.skip(f"NVSHMEM was seen not to start {world_size} uneven ranks on {gpus} GPUs")
    arguments = ["--fate", fate, "--phase", phase, "--timeout", str(TIMEOUT_S)]
    argv = [sys.executable, str(HERE / "programs" / "falter.py"), *arguments]
    paths = [tmp_path / f"rank{r}" for r in range(world_size)]
    files = [path.open("wb") for path in paths]
    environment = {"PYTHONPATH": f"{HERE.parents[1]}:{os.environ.get('PYTHONPATH', '')}"}
    with RankProcesses(argv, world_size, environment=environment, output=files) as ranks:
        codes = ranks.wait(120, kill_rest=False)
    for file in files:
        file.close()
    said = "\n".join(path.read_text()[-3000:] for path in paths)
    lines = [line for line in said.splitlines() if line.startswith('{"rank"')]
    reports = {report["rank"]: report for report in map(json.loads, lines)}
    survivors = [rank for rank in range(world_size) if rank != 1]
    if fate == "sleep":
        survivors.append(1)  # woken up, it hears that it was given up
        assert codes == [0] * world_size, said
    else:
        assert codes[1] == -9
        assert set(codes) <= {0, -9}, said
    assert sorted(reports) == sorted(survivors), said
    for rank, report in reports.items():
        assert report["ranks"] == [1], report
        assert (report["phase"], report["expected"], report["seen"]) == (phase, 5, 4), report
        assert report["calls"] == 5
        assert report["found_by"] != 1
        if rank != 1:
            assert TIMEOUT_S - 0.5 < report["seconds"] < TIMEOUT_S + 2, report
        assert report["y_is_nan"], report
        assert report["stays_failed"]
        assert report["destroyed"]
        assert report["matmul_error"] < 1e-2
