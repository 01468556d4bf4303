"""benchmarks/grouped_gemm.py, as far as it goes without a GPU: its loads, its limits, its plot."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from megamoe_ep.measure import MODELS
from megamoe_ep.results import Results
from megamoe_ep.roofline import KNOWN

FILE = Path(__file__).parents[2] / "benchmarks" / "grouped_gemm.py"


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("grouped_gemm", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Its dataclasses look for their module.
    sys.modules["grouped_gemm"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["grouped_gemm"]


@pytest.mark.parametrize("name", ["dsv3", "flash", "pro"])
@pytest.mark.parametrize("tokens", [1, 8, 512])
def test_rows_are_tokens_times_top_k(benchmark, name, tokens):
    model = MODELS[name]
    counts = benchmark.row_counts(model, tokens, 1.0, torch.Generator().manual_seed(0))
    assert len(counts) == model.rank_experts
    assert counts.sum() == tokens * model.top_k
    if tokens == 512:
        assert counts.max() < 1.6 * counts.float().mean()


@pytest.mark.parametrize("skew", [2.0, 4.0])
def test_hottest_expert_has_its_share(benchmark, skew):
    counts = benchmark.row_counts(MODELS["pro"], 2048, skew, torch.Generator().manual_seed(0))
    assert counts.sum() == 2048 * 6
    assert counts.argmax() == 0
    assert float(counts[0] / counts.float().mean()) == pytest.approx(skew, rel=0.05)


def row(tokens: int, over_floor: float, faster: float | None, skew: float = 1.0) -> dict:
    model = MODELS["dsv3"]
    rows, floor = tokens * 8, 200.0
    flops = 6 * rows * model.hidden_size * model.intermediate_size
    ours = floor * over_floor
    return {
        "shape": "dsv3", "tokens_per_rank": tokens, "skew": skew, "rows": rows, "ours_us": ours,
        "ours_plain_us": ours, "l1_us": ours, "l2_us": ours, "floor_us": floor,
        "over_floor": over_floor, "torch_grouped_mm_us": faster and faster * ours,
        "ours_tflops": flops / ours / 1e6, "ours_weight_gbps": 4e6 / ours,
        "hottest_over_mean": skew,
    }  # fmt: skip


def test_a_missed_limit_is_marked(benchmark):
    for given, missed in (
        (row(64, 1.19, 4.1), False),
        (row(64, 1.21, 4.1), True),
        (row(64, 1.19, 3.9), True),
        (row(64, 1.19, None), False),
        (row(2048, 1.26, 1.0), True),
        (row(2048, 1.26, 1.0, skew=4.0), False),
        (row(1, 9.0, 0.1), False),
    ):
        assert benchmark.line(given).endswith("!") is missed, given
    (even_and_skewed,) = benchmark.skew_lines([row(2048, 1.2, 1), row(2048, 1.3, 1, 4.0)])
    assert "1.083 x the even case" in even_and_skewed
    assert not even_and_skewed.endswith("!")
    (too_slow,) = benchmark.skew_lines([row(2048, 1.2, 1), row(2048, 1.4, 1, 4.0)])
    assert too_slow.endswith("!")


def test_plot_of_a_result_file(benchmark, tmp_path):
    pytest.importorskip("matplotlib")
    machine = {"device": "a GPU", "ranks": 1, "launcher": "alone"}
    rows = [row(tokens, 1.2, None if tokens == 8 else 3.0) for tokens in (1, 8, 2048)]
    results = Results("grouped_gemm", machine, KNOWN["H200"], rows)
    results.write(tmp_path / "result.json")
    benchmark.plot(Results.read(tmp_path / "result.json"), tmp_path / "result.png")
    assert (tmp_path / "result.png").read_bytes().startswith(b"\x89PNG")
