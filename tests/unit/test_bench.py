"""``megamoe-ep bench`` on the CPU: what it prints, writes and refuses; what it compares with."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from megamoe_ep import rivals
from megamoe_ep.cli import app
from megamoe_ep.measure import MODELS, Case, ModelShape, Tokens, model_shape, random_weights, route
from megamoe_ep.reference import moe_layer, relative_l2_error
from megamoe_ep.results import Results
from megamoe_ep.rivals import Rival, Setting, TorchLayer
from megamoe_ep.weights import CheckpointExperts

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


def bench(*arguments: object) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "megamoe_ep.cli", "bench", *map(str, arguments)]
    return subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=200)


def test_one_command_measures_compares_and_writes(tmp_path):
    figures, picture = tmp_path / "bench.json", tmp_path / "bench.png"
    sizes = ["--device", "cpu", "--shape", "64/32/4/2", "--tokens", "1,5", "--ranks", 2]
    done = bench(*sizes, "--combine", "fast", "--json", figures, "--plot", picture)
    assert done.returncode == 0, done.stdout + done.stderr
    for said in ("64/32/4/2 on", "2 rank(s), 8 experts in all", "portable kernels", "layer / floor",
                 "floor: weights", "dispatch", "torch + gloo, bf16, once a rank"):  # fmt: skip
        assert said in done.stdout
    results = Results.read(figures)
    assert results.benchmark == "bench"
    assert {"device", "torch", "python", "command", "commit", "launcher"} <= set(results.machine)
    assert [row["tokens"] for row in results.rows] == [1, 5]
    for row in results.rows:
        assert row["combine"] == "fast"
        assert row["ranks"] == 2
        assert len(row["rivals_us"]) == 2
        assert all(us > 0 for us in row["rivals_us"].values())
        assert not row["rivals_failed"]
    assert picture.read_bytes().startswith(b"\x89PNG")
    json.loads(figures.read_text(), parse_constant=lambda name: pytest.fail(f"not JSON: {name}"))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--shape", "gpt"], "a shape must be one of dsv3"),
        (["--shape", "64/32/0/2"], "a shape must be one of dsv3"),
        (["--tokens", "1,x"], "--tokens must be numbers"),
        (["--tokens", "0"], "--tokens must be numbers"),
        (["--combine", "slow"], "--combine must be exact or fast"),
        (["--device", "tpu"], "--device must be cpu or cuda"),
        (["--json", "/no/such/folder/x.json"], "--json must be a file in a folder that exists"),
        (["--json", "."], "--json must be a file in a folder that exists"),
        (["--skew", "inf"], "--skew must be a finite number; got inf"),
        (["--shape", "64/32/4/8", "--device", "cpu"], "a top-k of at most its 4 experts on 1 rank"),
        (["--plot", "x.svg"], "--plot must be a file name that ends in .png"),
        (["--shape", "60/32/4/2", "--device", "cpu"], "hidden_size must be a multiple of 16"),
    ],
)
def test_what_cannot_be_measured_is_refused_with_a_sentence(arguments, said):
    done = CliRunner().invoke(app, ["bench", *arguments])
    assert done.exit_code == 2
    assert said in done.stderr
    assert done.stdout == ""


def test_shapes():
    assert model_shape("dsv3") is MODELS["dsv3"]
    assert model_shape("4096/1536/16/8") == ModelShape(16, 8, 4096, 1536, 16)
    weak, strong = Case("flash", "weak", 10, "exact"), Case("flash", "strong", 10, "exact")
    assert (weak.shape(4).num_experts, weak.tokens_of(4)) == (128, [10] * 4)
    assert (strong.shape(4).num_experts, strong.tokens_of(4)) == (256, [3, 3, 2, 2])
    assert strong.shape(4).max_num_tokens == 3


@pytest.mark.parametrize("skew", [1.0, 2.0, 7.0])
def test_routes_are_distinct_experts_with_the_skew_asked_for(skew):
    draw = torch.Generator().manual_seed(0)
    ids = route(4000, 64, 6, skew, draw)
    assert all(len(set(row)) == 6 for row in ids.tolist())
    counts = ids.flatten().bincount(minlength=64).double()
    mean = 4000 * 6 / 64
    assert float(counts[0]) / mean == pytest.approx(skew, rel=0.08)
    rest = (4000 * 6 - skew * mean) / 63
    assert float(counts[1:].min()) > 0.8 * rest
    assert float(counts[1:].max()) < 1.2 * rest


@pytest.mark.parametrize("variant", ["once_a_rank", "once_an_expert"])
def test_torchs_layer_computes_the_same_layer(variant):
    shape = Case("64/32/8/3", "weak", 12, "exact").shape(1)
    weights = random_weights(shape, 0, CPU, with_bf16=True)
    tokens = Tokens.draw(shape, 12, 1.0, 0, CPU)
    experts = CheckpointExperts(
        weights.l1.codes,
        weights.l1.scales,
        weights.l1_alpha,
        weights.l2.codes,
        weights.l2.scales,
        weights.l2_alpha / weights.l2_input_scale,
    )
    expected = moe_layer(
        tokens.x, tokens.topk_idx, tokens.topk_weights, experts, activation_format="bf16"
    )
    y = getattr(TorchLayer(shape, 0, weights), variant)(tokens)
    assert relative_l2_error(y, expected) < 1e-2


def test_a_rival_that_fails_says_why_and_no_more():
    from megamoe_ep.cli.bench import _time_rival
    from megamoe_ep.measure import Meter, ranks

    def broken(setting: Setting) -> rivals.Layer:
        raise RuntimeError("no kernel for this shape\nand a page of more")

    case = Case("64/32/4/2", "weak", 2, "exact")
    with ranks("cpu") as meter:
        assert isinstance(meter, Meter)
        weights = random_weights(case.shape(1), 0, CPU, with_bf16=True)
        us, why = _time_rival(meter, case, weights, Rival("theirs", broken), 1)
        assert (us, why) == (None, "RuntimeError: no kernel for this shape")
        (first, *_) = rivals.installed(CPU, 1)
        us, why = _time_rival(meter, case, weights, first, 1)
        assert us is not None
        assert us > 0
        assert why == ""
