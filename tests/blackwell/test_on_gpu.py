"""The SM100 GEMMs on a Blackwell GPU: against the portable ones, and timed. Not yet run anywhere.

python -m pytest -m gpu -s tests/blackwell
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from megamoe_ep import nvfp4, reference
from megamoe_ep.kernels import cuda_sm100, library, portable
from megamoe_ep.moe import MegaMoE
from megamoe_ep.symm_buffer import get_symm_buffer_for_nvfp4_mega_moe
from megamoe_ep.weights import random_experts, transform_weights_for_nvfp4_mega_moe


def why_not() -> str | None:
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (10, 0):
        return "needs a Blackwell GPU, sm_100"
    return library.why_unavailable((10, 0))


pytestmark = [pytest.mark.gpu, pytest.mark.skipif(why_not() is not None, reason=f"{why_not()}")]

TOLERANCE = 5e-3  # relative L2; a code moves where h lies on a border and additions came otherwise
TILES = {"narrow": 2**62, "wide": 0}  # for cuda_sm100.WIDE_FROM
COUNTS = {
    "few": [1, 0, 3, 0],
    "around a tile": [63, 64, 65, 127, 128, 129],
    "around the wide tile": [255, 256, 257],
    "skewed": [0, 0, 1500, 0, 2, 0],
    "more experts than a warp has lanes": [e % 5 for e in range(70)],
    "all empty": [0, 0],
}


class Case:
    def __init__(self, hidden: int, intermediate: int, counts: list[int], device: str) -> None:
        experts = random_experts(len(counts), hidden, intermediate)
        experts.w13_scale_2[:, 1] *= 3.25
        pair = (experts.w13, experts.w13_scale), (experts.w2, experts.w2_scale)
        self.portable = transform_weights_for_nvfp4_mega_moe(*pair, device=device)
        self.sm100 = transform_weights_for_nvfp4_mega_moe(*pair, device=device, layout="sm100")
        if self.portable[0].layout != "portable":
            self.portable = transform_weights_for_nvfp4_mega_moe(
                *pair, device=device, layout="portable"
            )
        self.alpha1 = experts.w13_scale_2.to(device)
        self.input_scale = experts.w2_input_scale.to(device)
        self.alpha2 = (experts.w2_scale_2 * experts.w2_input_scale).to(device)
        self.offsets = torch.tensor([0, *counts]).cumsum(0).int().to(device)
        self.count = sum(counts)
        self.room = self.count + 7
        x = torch.randn(self.count, hidden, generator=torch.Generator().manual_seed(1))
        q = nvfp4.quantize_per_token(x)
        self.rows = torch.full((self.room, hidden), torch.nan).bfloat16().to(device)
        self.rows[: self.count] = nvfp4.dequantize(q.codes, q.scales).to(device)
        self.row_scales = torch.ones(self.room, device=device)
        self.row_scales[: self.count] = q.global_scale.to(device)
        self.intermediate, self.hidden, self.device = intermediate, hidden, device

    def run(self, gemm, weights, clamp: float | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        h = torch.full((self.room, self.intermediate), 7.0, device=self.device).bfloat16()
        out = torch.full((self.room, self.hidden), 7.0, device=self.device).bfloat16()
        gemm.l1(
            self.rows, self.row_scales, self.offsets, weights[0], self.alpha1,
            input_scale=self.input_scale, clamp=clamp, out=h,
        )  # fmt: skip
        gemm.l2(h, self.offsets, weights[1], self.alpha2, out=out)
        return h, out

    def check(self, given, expected) -> None:
        for tensor, right in zip(given, expected, strict=True):
            assert (tensor[self.count :] == 7).all(), "rows that no expert has were written"
            if self.count:
                error = reference.relative_l2_error(tensor[: self.count], right[: self.count])
                assert error < TOLERANCE


@pytest.fixture(params=list(TILES))
def tile(request, monkeypatch) -> str:
    monkeypatch.setattr(cuda_sm100, "WIDE_FROM", TILES[request.param])
    return request.param


@pytest.mark.parametrize("counts", list(COUNTS.values()), ids=list(COUNTS))
@pytest.mark.parametrize(("hidden", "intermediate"), [(512, 256), (96, 160), (1056, 544)])
def test_both_gemms_are_the_portable_ones(tile, hidden, intermediate, counts):
    case = Case(hidden, intermediate, counts, "cuda")
    case.check(case.run(cuda_sm100, case.sm100), case.run(portable, case.portable))


@pytest.mark.parametrize("clamp", [0.5, 10.0])
def test_clamp(tile, clamp):
    case = Case(512, 256, [5, 40], "cuda")
    case.check(case.run(cuda_sm100, case.sm100, clamp), case.run(portable, case.portable, clamp))


def test_the_same_bits_from_run_to_run_and_from_a_graph(tile):
    case = Case(1024, 512, [100, 0, 300], "cuda")
    first = case.run(cuda_sm100, case.sm100)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = case.run(cuda_sm100, case.sm100)
    for _ in range(3):
        graph.replay()
        torch.cuda.synchronize()
        for tensor, right in zip(captured, first, strict=True):
            assert torch.equal(tensor, right)


def test_a_row_of_nan_comes_out_as_nan_and_no_other(tile):
    case = Case(512, 256, [5, 40], "cuda")
    case.row_scales[3] = torch.nan
    _, out = case.run(cuda_sm100, case.sm100)
    assert out[3].isnan().all()
    assert not out[[*range(3), *range(4, case.room)]].isnan().any()


@pytest.mark.parametrize("tokens", [1, 64, 512])
def test_the_layer_is_the_references(tokens):
    experts = random_experts(8, 1024, 512)
    with get_symm_buffer_for_nvfp4_mega_moe(None, 8, tokens, 4, 1024, 512) as buffer:
        layer = MegaMoE.from_experts(experts, buffer)
        assert layer.l1_weights.layout == "sm100"
        draw = torch.Generator().manual_seed(tokens)
        x = torch.randn(tokens, 1024, generator=draw).bfloat16()
        ids = torch.rand(tokens, 8, generator=draw).topk(4).indices.int()
        weights = torch.rand(tokens, 4, generator=draw)
        y = layer(x.cuda(), ids.cuda(), weights.cuda())
        torch.cuda.synchronize()
        buffer.check()
    expected = reference.moe_layer(x, ids, weights, experts)
    assert reference.relative_l2_error(y.cpu(), expected) < TOLERANCE


@pytest.mark.parametrize("shape", ["dsv3", "flash", "pro"])
def test_the_layer_is_timed(shape, tmp_path):
    """Prints the benchmark's table: latency by phase against the floor of bytes and FLOPs."""
    file = tmp_path / f"{shape}.json"
    command = [sys.executable, "-m", "megamoe_ep.cli", "bench", "--shape", shape, "--ranks", "1"]
    done = subprocess.run(
        [*command, "--tokens", "1,8,64,512,4096", "--no-compare", "--json", str(file)],
        capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    print(f"\n{done.stdout}")
    assert done.returncode == 0, done.stderr
    assert json.loads(file.read_text())
