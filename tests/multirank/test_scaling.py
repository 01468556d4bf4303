"""The scaling harness over CPU ranks, and the counted bytes at more than one rank."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from megamoe_ep.measure import MODELS
from megamoe_ep.results import Results

pytestmark = pytest.mark.usefixtures("launcher_side")

HERE = Path(__file__).parent
SCALING = str(HERE.parents[1] / "benchmarks" / "scaling.py")
QUICK = ["--device", "cpu", "--models", "tiny", "--calls", "2"]


@pytest.mark.parametrize(("launcher", "ranks"), [("spawner", 1), ("mpirun", 2), ("torchrun", 4)])
def test_every_point_is_measured_and_written(launch, tmp_path, launcher, ranks):
    output = tmp_path / "results.json"
    sizes = ["--tokens", "1,6", "--skews", "1,4"]
    launch(launcher, ranks, [SCALING, *QUICK, *sizes, "--output", str(output)])
    results = Results.read(output)
    assert results.machine["ranks"] == ranks
    assert results.machine["launcher"] == ("torchrun" if launcher == "spawner" else launcher)
    assert results.machine["kernels"] == "portable"
    assert results.ceilings.source.startswith("measured in this run")
    assert ("not measured" in results.ceilings.source) == (ranks == 1)

    points = [(row["skew"], row["mode"], row["tokens"], row["combine"]) for row in results.rows]
    assert points == [
        (skew, mode, tokens, combine)
        for skew in (1.0, 4.0)
        for mode in ("weak", "strong")
        for tokens in (1, 6)
        for combine in ("exact", "fast")
    ]
    tiny = MODELS["tiny"]
    for row in results.rows:
        assert row["ranks"] == ranks
        weak = row["mode"] == "weak"
        assert row["experts"] == (ranks * tiny.rank_experts if weak else tiny.num_experts)
        assert row["tokens_per_rank"] == (
            row["tokens"] if weak else math.ceil(row["tokens"] / ranks)
        )
        all_rows = row["tokens"] * tiny.top_k * (ranks if weak else 1)
        assert all_rows / ranks <= row["rows_busiest_rank"] <= all_rows
        assert row["hottest_over_mean"] >= 1
        assert row["ours_us"] > row["floor_us"] > 0
        assert row["floor_us"] == max(row["weight_floor_us"], row["flop_floor_us"])
        crossing = row["dispatch_wire_bytes"] + row["combine_wire_bytes"]
        assert crossing == 0 if ranks == 1 else crossing >= 8 * 2 * (ranks - 1)
        phases = [row.get(f"{phase}_us") for phase in ("stage", "dispatch", "l1", "l2", "combine")]
        assert all(phases) if row["skew"] == 1 else not any(phases)


def test_points_past_the_budget_are_left_out_and_said_so(launch, tmp_path):
    said = launch("spawner", 1, [SCALING, *QUICK, "--budget", "0", "--tokens", "1,8"])
    assert '{"left_out_for_lack_of_time": 32}' in said


@pytest.mark.parametrize(("launcher", "ranks"), [("torchrun", 2), ("mpirun", 4)])
def test_counted_bytes(launch_tests, launcher, ranks):
    assert launch_tests(launcher, ranks, [HERE / "test_counted_bytes.py"]) == [20] * ranks
