"""csrc's Hopper GEMMs, whole, with no GPU: fibers stand for threads (tests/unit/host_cuda), copies
come late and in any order. What races on a GPU, and wgmma's own timing, do not show here."""

from __future__ import annotations

import ctypes
import itertools
import math
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from megamoe_ep import nvfp4, transform_weights_for_nvfp4_mega_moe
from megamoe_ep.kernels import portable
from megamoe_ep.prepack.sm90 import column_order
from megamoe_ep.weights import KernelWeights

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
POISON = 0x7FA5  # a NaN that no arithmetic makes
GUARD_ROWS = 2
TOLERANCE = {"bf16": 2e-3, "nvfp4": 5e-3}

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


@pytest.fixture(scope="module")
def kernel(tmp_path_factory) -> ctypes.CDLL:
    library = tmp_path_factory.mktemp("kernel") / "kernel.so"
    flags = ["-std=c++20", "-O2", "-U_FORTIFY_SOURCE", "-D__CUDA_ARCH_FEAT_SM90_ALL"]
    includes = [f"-I{HERE / 'host_cuda'}", f"-I{CSRC}"]
    source = HERE / "host_sm90" / "kernel.cpp"
    built = subprocess.run(
        ["g++", *flags, *includes, "-shared", "-fPIC", "-o", str(library), str(source)],
        capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    return ctypes.CDLL(str(library))


@dataclass
class Layer:
    """Two projections' weights in both layouts, and their scales."""

    l1: dict[str, KernelWeights]
    l2: dict[str, KernelWeights]
    l1_alpha: torch.Tensor
    l2_alpha: torch.Tensor
    input_scale: torch.Tensor | None

    @classmethod
    def draw(cls, experts: int, hidden: int, inter: int, between: str) -> Layer:
        draw = torch.Generator().manual_seed(experts)

        def matrix(n: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
            codes = torch.randint(256, (experts, n, k // 2), generator=draw, dtype=torch.uint8)
            scales = torch.randint(24, 73, (experts, n, k // 16), generator=draw)
            return codes, scales.to(torch.uint8).view(torch.float8_e4m3fn)

        first, second = matrix(2 * inter, hidden), matrix(hidden, inter)
        both = {
            layout: transform_weights_for_nvfp4_mega_moe(first, second, layout=layout)
            for layout in ("portable", "sm90")
        }
        l1_alpha = (torch.rand(experts, 2, generator=draw) + 0.5) / (3 * hidden**0.5)
        l2_alpha = (torch.rand(experts, generator=draw) + 0.5) / (3 * inter**0.5)
        input_scale = None
        if between == "nvfp4":
            input_scale = (torch.rand(experts, generator=draw) + 0.5) * 20 / 2688
            l2_alpha = l2_alpha * input_scale
        return cls(
            {layout: pair[0] for layout, pair in both.items()},
            {layout: pair[1] for layout, pair in both.items()},
            l1_alpha, l2_alpha, input_scale,
        )  # fmt: skip


@dataclass
class Tokens:
    rows: torch.Tensor
    row_scales: torch.Tensor
    offsets: torch.Tensor

    @classmethod
    def draw(cls, counts: tuple[int, ...], hidden: int, spare: int = 3) -> Tokens:
        """Rows of these many of each expert; then ``spare`` ones of NaN."""
        draw = torch.Generator().manual_seed(sum(counts))
        total = sum(counts)
        q = nvfp4.quantize_per_token(torch.randn(total + spare, hidden, generator=draw))
        rows, scales = nvfp4.dequantize(q.codes, q.scales).bfloat16(), q.global_scale.clone()
        rows[total:] = torch.nan
        scales[total:] = torch.nan
        return cls(rows, scales, torch.tensor([0, *itertools.accumulate(counts)]).int())

    def pick(self, counts: tuple[int, ...], draw: torch.Generator) -> tuple[Tokens, torch.Tensor]:
        """So many rows of each expert, drawn, and which they were."""
        index = torch.cat([
            int(start) + torch.randperm(int(end - start), generator=draw)[:count]
            for (start, end), count in zip(itertools.pairwise(self.offsets), counts, strict=True)
        ])  # fmt: skip
        offsets = torch.tensor([0, *itertools.accumulate(counts)]).int()
        return Tokens(self.rows[index], self.row_scales[index], offsets), index


class Homes:
    """Memory for twice as many rows as there are, and where in it each of them goes."""

    def __init__(self, count: int, columns: int) -> None:
        draw = torch.Generator().manual_seed(0)
        self._memory = torch.full((2 * count + 2, columns), POISON, dtype=torch.int16)
        self._places = 1 + torch.randperm(2 * count, generator=draw)[:count]
        self.addresses = self._memory.data_ptr() + 2 * columns * self._places

    def collect(self) -> torch.Tensor:
        """The rows from their homes, and nothing else may have been written."""
        found = self._memory[self._places]
        self._memory[self._places] = POISON
        assert (self._memory == POISON).all(), "something else was written"
        assert (found != POISON).all(), "an element was not written"
        return found.view(torch.bfloat16)


def on_host(
    kernel: ctypes.CDLL, weights: KernelWeights, rows: torch.Tensor, offsets: torch.Tensor,
    alpha: torch.Tensor, *, few: bool, row_scales: torch.Tensor | None = None,
    input_scale: torch.Tensor | None = None, clamp: float = math.inf, blocks: int = 3,
    seed: int = 1, slow_producer: int = -1, homes: Homes | None = None,
) -> torch.Tensor:  # fmt: skip
    """One GEMM; checks that it writes every element of its rows and nothing else.

    With ``homes`` nothing is written here, and what was written there is returned instead.
    """
    columns = weights.n // 2 if weights.gated else weights.n
    count, experts = int(offsets[-1]), len(offsets) - 1
    whole = torch.full((len(rows) + 2 * GUARD_ROWS, columns), POISON, dtype=torch.int16)
    out = whole[GUARD_ROWS : GUARD_ROWS + len(rows)]

    def at(tensor: torch.Tensor | None) -> ctypes.c_void_p:
        assert tensor is None or tensor.is_contiguous()
        return ctypes.c_void_p(0 if tensor is None else tensor.data_ptr())

    kernel.grouped_gemm_on_host(
        weights.gated, few, blocks, seed, slow_producer, at(rows), at(row_scales), at(offsets),
        at(weights.codes), at(alpha), at(input_scale), ctypes.c_float(clamp), at(out),
        at(homes.addresses if homes else None),
        ctypes.c_int64(len(rows)), experts, weights.n, weights.k,
    )  # fmt: skip
    poison = whole == POISON
    if homes:
        assert poison.all(), "a row was written here"
        return homes.collect()
    written = slice(GUARD_ROWS, GUARD_ROWS + count)
    assert not poison[written].any(), "an element was not written"
    assert int(poison.sum()) == (len(whole) - count) * columns, "something else was written"
    return out.view(torch.bfloat16)[:count]


def by_lane(rows: torch.Tensor) -> torch.Tensor:
    return rows[:, column_order(rows.shape[1])]


def run_l1(kernel: ctypes.CDLL, layer: Layer, tokens: Tokens, **how) -> torch.Tensor:
    """Plain h of plain rows."""
    h = on_host(
        kernel, layer.l1["sm90"], by_lane(tokens.rows), tokens.offsets, layer.l1_alpha,
        row_scales=tokens.row_scales, input_scale=layer.input_scale, **how,
    )  # fmt: skip
    return h[:, column_order(h.shape[1]).argsort()]


def run_l2(
    kernel: ctypes.CDLL, layer: Layer, h: torch.Tensor, offsets: torch.Tensor, **how
) -> torch.Tensor:
    """Of plain h."""
    return on_host(kernel, layer.l2["sm90"], by_lane(h), offsets, layer.l2_alpha, **how)


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.view(torch.int16), b.view(torch.int16))


def check(
    kernel: ctypes.CDLL, counts: tuple[int, ...], hidden: int, inter: int, between: str,
    clamp: float = math.inf, **how,
) -> None:  # fmt: skip
    """Both GEMMs of a drawn layer against the portable ones, expert by expert."""
    layer, tokens = Layer.draw(len(counts), hidden, inter, between), Tokens.draw(counts, hidden)
    expected_h = torch.zeros(len(tokens.rows), inter, dtype=torch.bfloat16)
    expected = torch.zeros(len(tokens.rows), hidden, dtype=torch.bfloat16)
    portable.l1(
        tokens.rows, tokens.row_scales, tokens.offsets, layer.l1["portable"], layer.l1_alpha,
        input_scale=layer.input_scale, clamp=None if clamp == math.inf else clamp, out=expected_h,
    )  # fmt: skip
    portable.l2(expected_h, tokens.offsets, layer.l2["portable"], layer.l2_alpha, out=expected)
    h = run_l1(kernel, layer, tokens, clamp=clamp, **how)
    out = run_l2(kernel, layer, expected_h, tokens.offsets, **how)
    for start, end in itertools.pairwise(tokens.offsets.tolist()):
        if end > start:
            assert difference(h[start:end], expected_h[start:end]) <= TOLERANCE[between]
            assert difference(out[start:end], expected[start:end]) <= TOLERANCE["bf16"]


@pytest.mark.parametrize("few", [True, False], ids=["few", "many"])
@pytest.mark.parametrize("between", ["bf16", "nvfp4"])
@pytest.mark.parametrize(
    ("counts", "hidden", "inter", "clamp"),
    [
        ((0, 1, 7, 63, 64, 65, 0), 256, 256, math.inf),
        ((5, 0, 66), 384, 128, 0.6),
        ((9, 177, 40, 3), 128, 256, math.inf),
        ((0, 0), 128, 128, math.inf),
        (tuple(range(1, 177, 8)), 128, 128, math.inf),  # every width
        (tuple(e * 7 % 19 for e in range(70)), 128, 128, math.inf),  # sorted 32 at a time
    ],
)
def test_what_the_portable_kernels_give(kernel, counts, hidden, inter, clamp, between, few):
    check(kernel, counts, hidden, inter, between, clamp, few=few)


def test_drawn_loads(kernel):
    """Shapes, loads, blocks and the order in which copies come, all drawn."""
    draw = torch.Generator().manual_seed(0)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=draw))

    for case in range(100):
        most = (2, 20, 60, 200)[case % 4]
        counts = tuple(number(0, most) for _ in range(number(1, 400 // (most + 20))))
        hidden, inter = 128 * number(1, 3), 128 * number(1, 3)
        how = {"few": case % 8 < 4, "blocks": number(1, 9), "seed": case}
        check(kernel, counts, hidden, inter, ("bf16", "nvfp4")[case % 3 % 2], **how)


@pytest.mark.parametrize("few", [True, False], ids=["few", "many"])
@pytest.mark.parametrize("slow", range(4))
def test_a_producer_may_be_slow(kernel, slow, few):
    """By turns of the ring, also one that often has nothing to bring: lone slabs of 128 rows."""
    check(kernel, (9,), 128, 2560, "bf16", few=few, blocks=1, slow_producer=slow)


@pytest.mark.parametrize("few", [True, False], ids=["few", "many"])
def test_barriers_are_what_tells_of_copies(kernel, few):
    """Every case here fails where a thread cannot know what it goes by. If it heard of nothing, it
    could know nothing."""
    check(kernel, (9, 70), 128, 1024, "bf16", few=few)
    assert kernel.be_deaf(True) == 0
    try:
        check(kernel, (9, 70), 128, 1024, "bf16", few=few)
    finally:
        unknown = kernel.be_deaf(False)
    assert unknown > 1000


@pytest.mark.parametrize("few", [True, False], ids=["few", "many"])
def test_rows_go_home(kernel, few):
    """To anywhere, with the same bits."""
    for counts, hidden in (((9, 0, 200, 33, 1), 384), ((47, 65), 256), ((3, 30), 128)):
        layer, tokens = Layer.draw(len(counts), hidden, 256, "bf16"), Tokens.draw(counts, hidden)
        h = run_l1(kernel, layer, tokens, few=few)
        homes = Homes(sum(counts), hidden)
        sent = run_l2(kernel, layer, h, tokens.offsets, few=few, homes=homes)
        assert same(sent, run_l2(kernel, layer, h, tokens.offsets, few=few))


@pytest.mark.parametrize("few", [True, False], ids=["few", "many"])
def test_tiles_of_one_stage(kernel, few):
    """So many in the ring at a time that a tile's description is the first to be written over."""
    for seed in range(6):
        check(kernel, (8,) * 40, 128, 128, "bf16", few=few, blocks=1, seed=seed)


@pytest.mark.parametrize("between", ["bf16", "nvfp4"])
def test_a_row_s_bits_are_its_own(kernel, between):
    """With either cut, in every tile width, among other neighbours, with any number of blocks, and
    whenever copies come."""
    hidden, inter, most = 256, 128, 180
    layer = Layer.draw(2, hidden, inter, between)
    pool = Tokens.draw((most, most), hidden, spare=0)
    whole_h = run_l1(kernel, layer, pool, few=False)
    whole = run_l2(kernel, layer, whole_h, pool.offsets, few=False)
    draw = torch.Generator().manual_seed(0)
    cases = [(True, width, 49 - width) for width in range(1, 50, 8)]
    cases += [(False, width, 177 - width) for width in range(1, 178, 16)]
    for few, *counts in cases:
        tokens, index = pool.pick(tuple(counts), draw)
        how = {"few": few, "blocks": counts[0] % 5 + 1, "seed": counts[0]}
        h = run_l1(kernel, layer, tokens, **how)
        assert same(h, whole_h[index]), (few, counts)
        assert same(run_l2(kernel, layer, h, tokens.offsets, **how), whole[index]), (few, counts)
