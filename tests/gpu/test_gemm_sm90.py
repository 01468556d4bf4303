"""csrc's Hopper GEMMs against the portable ones, on the same GPU and the same inputs."""

from __future__ import annotations

import dataclasses
import itertools
import math
from dataclasses import dataclass

import pytest
import torch

from megamoe_ep import nvfp4, transform_weights_for_nvfp4_mega_moe
from megamoe_ep.errors import ArgumentError
from megamoe_ep.kernels import cuda, library, portable
from megamoe_ep.prepack.sm90 import column_order
from megamoe_ep.weights import KernelWeights


def why_not() -> str | None:
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        return "needs a Hopper GPU"
    return library.why_unavailable((9, 0))


pytestmark = [pytest.mark.gpu, pytest.mark.skipif(why_not() is not None, reason=f"{why_not()}")]

# Greatest relative L2 difference, by what is between the GEMMs.
TOLERANCE = {"bf16": 2e-3, "nvfp4": 5e-3}
POISON = 0x7FA5  # a NaN that no arithmetic makes
GUARD_ROWS = 3
MIXED = (0, 1, 7, 63, 64, 65, 129, 1000, 0)
WIDTHS = tuple(range(8, 177, 8))


@pytest.fixture(params=[True, False], ids=["few", "many"], autouse=True)
def few(request, monkeypatch) -> bool:
    """Every test with both ways to cut a GEMM."""
    monkeypatch.setattr(cuda, "cut_for_few", lambda expert_offsets, rows: request.param)
    return request.param


@dataclass
class Layer:
    """Two projections' weights in both layouts, and their scales."""

    l1: dict[str, KernelWeights]
    l2: dict[str, KernelWeights]
    l1_alpha: torch.Tensor
    l2_alpha: torch.Tensor
    input_scale: torch.Tensor | None
    clamp: float | None = None

    @property
    def experts(self) -> int:
        return self.l1["sm90"].num_experts

    @property
    def hidden(self) -> int:
        return self.l1["sm90"].k

    @property
    def intermediate(self) -> int:
        return self.l2["sm90"].k


@dataclass
class Tokens:
    rows: torch.Tensor
    row_scales: torch.Tensor
    offsets: torch.Tensor

    @property
    def count(self) -> int:
        return int(self.offsets[-1])


def random_matrix(
    experts: int, n: int, k: int, draw: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """All codes; scales of 2**-4 to 2**2 for the most part, some zero, subnormal or large."""
    codes = torch.randint(256, (experts, n, k // 2), generator=draw, device="cuda")
    scales = torch.randint(24, 73, (experts, n, k // 16), generator=draw, device="cuda")
    odd = torch.randint(0, 90, scales.shape, generator=draw, device="cuda")
    rare = torch.rand(scales.shape, generator=draw, device="cuda") < 0.03
    scales = torch.where(rare, odd, scales)
    return codes.to(torch.uint8), scales.to(torch.uint8).view(torch.float8_e4m3fn)


def make_layer(
    experts: int, hidden: int, inter: int, *, between: str = "bf16", seed: int = 0,
    clamp: float | None = None,
) -> Layer:  # fmt: skip
    draw = torch.Generator(device="cuda").manual_seed(seed)
    first = random_matrix(experts, 2 * inter, hidden, draw)
    second = random_matrix(experts, hidden, inter, draw)
    both = {
        layout: transform_weights_for_nvfp4_mega_moe(first, second, layout=layout)
        for layout in ("portable", "sm90")
    }

    def unit(matrix: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """Per expert, what makes of unit normal inputs outputs of about unit size."""
        experts = zip(*matrix, strict=True)
        squares = [nvfp4.dequantize(*expert).float().square().mean() for expert in experts]
        return (torch.stack(squares) * 2 * matrix[0].shape[2]).rsqrt()

    factor = torch.rand(experts, 2, generator=draw, device="cuda") + 0.5
    factor[:, 1] *= 3  # gate and up apart
    input_scale = None
    l2_alpha = unit(second)
    if between == "nvfp4":
        input_scale = (torch.rand(experts, generator=draw, device="cuda") + 0.5) * 20 / 2688
        l2_alpha = l2_alpha * input_scale
    return Layer(
        {layout: pair[0] for layout, pair in both.items()},
        {layout: pair[1] for layout, pair in both.items()},
        unit(first)[:, None] * factor, l2_alpha, input_scale, clamp,
    )  # fmt: skip


def make_tokens(
    counts: tuple[int, ...], hidden: int, *, form: str = "nvfp4", spare: int = 5, seed: int = 1
) -> Tokens:
    """Rows of these many of each expert; then ``spare`` ones of NaN."""
    draw = torch.Generator(device="cuda").manual_seed(seed)
    total = sum(counts)
    x = torch.randn(total + spare, hidden, generator=draw, device="cuda")
    rows, scales = x.bfloat16(), torch.ones(total + spare, device="cuda")
    if form == "nvfp4":
        q = nvfp4.quantize_per_token(x)
        rows, scales = nvfp4.dequantize(q.codes, q.scales), q.global_scale
    rows[total:] = torch.nan
    scales[total:] = torch.nan
    offsets = torch.tensor([0, *itertools.accumulate(counts)], dtype=torch.int32, device="cuda")
    return Tokens(rows, scales, offsets)


def poisoned(rows: int, columns: int) -> torch.Tensor:
    """bf16 [rows, columns] between guard rows, all of it poison."""
    bits = torch.full((rows + 2 * GUARD_ROWS, columns), POISON, dtype=torch.int16, device="cuda")
    return bits.view(torch.bfloat16)[GUARD_ROWS : GUARD_ROWS + rows]


def check_written(out: torch.Tensor, count: int) -> None:
    """The first ``count`` rows, each element of them, and nothing else."""
    columns = out.shape[1]
    whole = torch.as_strided(
        out.view(torch.int16), (len(out) + 2 * GUARD_ROWS, columns), (columns, 1), 0
    )
    poison = whole == POISON
    first, last = GUARD_ROWS, GUARD_ROWS + count
    assert not poison[first:last].any(), "an element was not written"
    assert poison[:first].all(), "something before the output was written"
    assert poison[last:].all(), "something past the rows was written"


def by_lane(rows: torch.Tensor) -> torch.Tensor:
    return rows[:, column_order(rows.shape[1], "cuda")]


def run_l1(layer: Layer, tokens: Tokens, kernels=cuda) -> torch.Tensor:
    layout = "sm90" if kernels is cuda else "portable"
    h = poisoned(len(tokens.rows), layer.intermediate)
    kernels.l1(
        tokens.rows, tokens.row_scales, tokens.offsets, layer.l1[layout], layer.l1_alpha,
        input_scale=layer.input_scale, clamp=layer.clamp, out=h,
    )  # fmt: skip
    return h


def run_l2(layer: Layer, h: torch.Tensor, offsets: torch.Tensor, kernels=cuda) -> torch.Tensor:
    layout = "sm90" if kernels is cuda else "portable"
    out = poisoned(len(h), layer.hidden)
    kernels.l2(h, offsets, layer.l2[layout], layer.l2_alpha, out=out)
    return out


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    ours, theirs = ours.double(), theirs.double()
    return float((ours - theirs).norm() / theirs.norm())


def check_layer(layer: Layer, tokens: Tokens) -> None:
    between = "bf16" if layer.input_scale is None else "nvfp4"
    count = tokens.count
    h = run_l1(layer, dataclasses.replace(tokens, rows=by_lane(tokens.rows)))
    check_written(h, count)
    out = run_l2(layer, h, tokens.offsets)
    check_written(out, count)
    h = h[:, column_order(layer.intermediate, "cuda").argsort()]
    expected_h = run_l1(layer, tokens, portable)
    expected = run_l2(layer, expected_h, tokens.offsets, portable)
    assert expected[:count].isfinite().all()
    assert difference(h[:count], expected_h[:count]) <= TOLERANCE[between]
    assert difference(out[:count], expected[:count]) <= TOLERANCE[between]
    # Of the same h, so that no difference of L1's hides one of L2's; and no expert's hides another.
    alone = run_l2(layer, by_lane(expected_h), tokens.offsets)
    for start, end in itertools.pairwise(tokens.offsets.tolist()):
        if end > start:
            assert difference(alone[start:end], expected[start:end]) <= TOLERANCE["bf16"]
            assert difference(h[start:end], expected_h[start:end]) <= 4 * TOLERANCE[between]
    if between == "nvfp4":
        same = (h[:count] == expected_h[:count]).double().mean()
        assert same > 0.999, "rounding to NVFP4 differs from nvfp4.quantize"


@pytest.mark.parametrize("between", ["bf16", "nvfp4"])
def test_mixed_row_counts(between):
    layer = make_layer(len(MIXED), 1024, 512, between=between)
    form = "bf16" if between == "bf16" else "nvfp4"
    check_layer(layer, make_tokens(MIXED, layer.hidden, form=form))


@pytest.mark.parametrize("between", ["bf16", "nvfp4"])
@pytest.mark.parametrize(
    ("hidden", "inter"),
    [(256, 256), (384, 640), (128, 128), (1152, 896), (256, 16384), (16384, 256), (7168, 2048)],
)
def test_sizes(hidden, inter, between):
    counts = (5, 0, 66, 130)
    layer = make_layer(len(counts), hidden, inter, between=between)
    check_layer(layer, make_tokens(counts, hidden))


@pytest.mark.parametrize("between", ["bf16", "nvfp4"])
def test_every_tile_width(between):
    counts = (*(width - less for width in WIDTHS for less in (1, 0)), 177, 353, 529)
    layer = make_layer(len(counts), 256, 256, between=between)
    check_layer(layer, make_tokens(counts, layer.hidden))


def test_many_experts_with_few_rows():
    counts = tuple(i * 7919 % 13 // 4 for i in range(300))
    layer = make_layer(len(counts), 256, 128)
    check_layer(layer, make_tokens(counts, layer.hidden))


@pytest.mark.parametrize("counts", [(0, 0, 1500, 0), (1500, 0, 0, 0), (1, 0, 0, 1499)])
def test_skew(counts):
    layer = make_layer(len(counts), 512, 384, between="nvfp4")
    check_layer(layer, make_tokens(counts, layer.hidden))


@pytest.mark.parametrize("between", ["bf16", "nvfp4"])
def test_clamp(between):
    layer = make_layer(3, 512, 256, between=between, clamp=0.6)
    tokens = make_tokens((40, 0, 200), layer.hidden)
    unclamped = run_l1(dataclasses.replace(layer, clamp=None), tokens)[: tokens.count]
    clamped = run_l1(layer, tokens)[: tokens.count]
    assert difference(clamped, unclamped) > 0.1
    check_layer(layer, tokens)


def test_no_rows_at_all():
    layer = make_layer(3, 256, 256)
    tokens = make_tokens((0, 0, 0), layer.hidden)
    h = run_l1(layer, tokens)
    check_written(h, 0)
    check_written(run_l2(layer, h, tokens.offsets), 0)
    none = make_tokens((0, 0, 0), layer.hidden, spare=0)
    run_l2(layer, run_l1(layer, none), none.offsets)
    torch.cuda.synchronize()


@pytest.mark.parametrize("between", ["bf16", "nvfp4"])
def test_nan_stays_in_its_row(between):
    layer = make_layer(2, 256, 256, between=between)
    tokens = make_tokens((70, 9), layer.hidden)
    before = run_l2(layer, run_l1(layer, tokens), tokens.offsets)
    tokens.rows[33, 5] = torch.nan
    tokens.row_scales[75] = torch.nan
    after = run_l2(layer, run_l1(layer, tokens), tokens.offsets)
    broken = torch.zeros(len(after), dtype=torch.bool, device="cuda")
    broken[[33, 75]] = True
    assert after[broken].isnan().all()
    assert torch.equal(after[~broken].view(torch.int16), before[~broken].view(torch.int16))


def test_nan_scale_of_a_weight_makes_its_output_nan():
    draw = torch.Generator(device="cuda").manual_seed(0)
    first, second = random_matrix(1, 512, 256, draw), random_matrix(1, 256, 256, draw)
    second[1].view(torch.uint8)[0, 100, 3] = 0x7F
    weights = transform_weights_for_nvfp4_mega_moe(first, second, layout="sm90")[1]
    tokens = make_tokens((20,), 256, form="bf16", spare=0)
    out = poisoned(20, 256)
    cuda.l2(tokens.rows, tokens.offsets, weights, torch.full((1,), 0.01, device="cuda"), out=out)
    check_written(out, 20)
    assert out[:, 100].isnan().all()
    assert out.isnan().sum() == 20


# Bits


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.view(torch.int16), b.view(torch.int16))


@pytest.mark.parametrize("between", ["bf16", "nvfp4"])
def test_same_bits_at_every_run(between):
    layer = make_layer(len(MIXED), 1024, 512, between=between)
    tokens = make_tokens(MIXED, layer.hidden)
    h = run_l1(layer, tokens)
    out = run_l2(layer, h, tokens.offsets)
    for _ in range(10):
        again = run_l1(layer, tokens)
        assert same(again, h)
        assert same(run_l2(layer, again, tokens.offsets), out)


@pytest.mark.parametrize("between", ["bf16", "nvfp4"])
def test_a_row_s_bits_are_its_own(between):
    """The same row alone, in every tile width, at every place of a tile, among other neighbours and
    with other loads of the other experts."""
    experts, hidden, inter, most = 3, 640, 384, 400
    layer = make_layer(experts, hidden, inter, between=between)
    pool = make_tokens((most, most, most), hidden, spare=0)
    whole_h = run_l1(layer, pool)
    whole = run_l2(layer, whole_h, pool.offsets)
    draw = torch.Generator().manual_seed(0)
    loads = [(1, 0, 0), (0, 0, 1), (1, 1, 1)]
    loads += [(width, 1, width - 1) for width in WIDTHS]
    loads += [(177, 8, 400), (2, 353, 9)]
    for counts in loads:
        picks = [
            e * most + torch.randperm(most, generator=draw)[:count]
            for e, count in enumerate(counts)
        ]
        index = torch.cat(picks).cuda()
        offsets = torch.tensor([0, *itertools.accumulate(counts)], dtype=torch.int32).cuda()
        tokens = Tokens(pool.rows[index], pool.row_scales[index], offsets)
        h = run_l1(layer, tokens)
        assert same(h, whole_h[index]), counts
        assert same(run_l2(layer, h, offsets), whole[index]), counts


@pytest.mark.parametrize("counts", [(9, 200, 0, 33), (40, 1, 48, 17)], ids=["many", "few"])
def test_rows_go_home(counts):
    """To anywhere, with the same bits."""
    layer, places = make_layer(len(counts), 512, 256), 600
    tokens = make_tokens(counts, layer.hidden)
    h = run_l1(layer, tokens)
    expected = run_l2(layer, h, tokens.offsets)
    draw = torch.Generator().manual_seed(0)
    at = torch.randperm(places, generator=draw)[: len(h)].cuda()
    memory = poisoned(places, layer.hidden)
    homes = memory.data_ptr() + 2 * layer.hidden * at
    out = poisoned(len(h), layer.hidden)
    for few in (False, True):
        memory.view(torch.int16).fill_(POISON)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cuda, "cut_for_few", lambda *_, few=few: few)
            cuda.l2(
                h, tokens.offsets, layer.l2["sm90"], layer.l2_alpha, out=out, homes=homes
            )  # fmt: skip
        assert (out.view(torch.int16) == POISON).all(), "a row was written here"
        sent = memory.view(torch.int16)
        assert torch.equal(sent[at[: tokens.count]], expected[: tokens.count].view(torch.int16))
        sent[at[: tokens.count]] = POISON
        assert (sent == POISON).all(), "something else was written"


def test_back_to_back_calls_do_not_meet():
    """L2 starts before L1 has ended, and the next L1 right after: they share h and the rows."""
    layers = [make_layer(4, 512, 256, seed=s, between="nvfp4") for s in range(2)]
    batches = [
        make_tokens((9, 200, 0, 33), 512, seed=7),
        make_tokens((100, 1, 60, 90), 512, seed=8),
    ]
    size = max(len(t.rows) for t in batches)
    expected = [
        run_l2(layer, run_l1(layer, t), t.offsets)[: t.count]
        for layer, t in zip(layers, batches, strict=True)
    ]
    h = torch.empty(size, 256, dtype=torch.bfloat16, device="cuda")
    outs = [torch.empty(size, 512, dtype=torch.bfloat16, device="cuda") for _ in range(60)]
    torch.cuda.synchronize()
    for i, out in enumerate(outs):
        layer, tokens = layers[i % 2], batches[i % 2]
        r = len(tokens.rows)
        cuda.l1(
            tokens.rows, tokens.row_scales, tokens.offsets, layer.l1["sm90"], layer.l1_alpha,
            input_scale=layer.input_scale, clamp=None, out=h[:r],
        )  # fmt: skip
        cuda.l2(h[:r], tokens.offsets, layer.l2["sm90"], layer.l2_alpha, out=out[:r])
    for i, out in enumerate(outs):
        assert same(out[: batches[i % 2].count], expected[i % 2]), i


@pytest.mark.parametrize("between", ["bf16", "nvfp4"])
def test_both_cuts_give_the_same_bits(between, few, monkeypatch):
    layer = make_layer(len(MIXED), 1152, 640, between=between)
    tokens = make_tokens(MIXED, layer.hidden)
    h = run_l1(layer, tokens)
    out = run_l2(layer, h, tokens.offsets)
    monkeypatch.setattr(cuda, "cut_for_few", lambda expert_offsets, rows: not few)
    assert same(run_l1(layer, tokens)[: tokens.count], h[: tokens.count])
    assert same(run_l2(layer, h, tokens.offsets)[: tokens.count], out[: tokens.count])


def test_one_graph_serves_any_row_counts():
    """Offsets are read on the device: nothing of a call depends on what they are."""
    layer = make_layer(4, 512, 256)
    most = 600
    pool = make_tokens((most,), 512, spare=0)
    offsets = torch.zeros(5, dtype=torch.int32, device="cuda")
    tokens = Tokens(pool.rows, pool.row_scales, offsets)
    run_l2(layer, run_l1(layer, tokens), offsets)
    h, out = poisoned(most, 256), poisoned(most, 512)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        cuda.l1(
            tokens.rows, tokens.row_scales, offsets, layer.l1["sm90"], layer.l1_alpha,
            input_scale=None, clamp=None, out=h,
        )  # fmt: skip
        cuda.l2(h, offsets, layer.l2["sm90"], layer.l2_alpha, out=out)
    for counts in ((1, 0, 3, 0), (0, 0, 0, 0), (150, 150, 150, 150), (0, 599, 0, 1), (9, 8, 7, 6)):
        offsets.copy_(torch.tensor([0, *itertools.accumulate(counts)]))
        for tensor in (h, out):
            tensor.view(torch.int16).fill_(POISON)
        graph.replay()
        check_written(out, sum(counts))
        expected = run_l2(layer, run_l1(layer, tokens), offsets)
        assert same(out, expected)


# What is refused


def test_faults_are_named():
    layer = make_layer(3, 256, 256)
    tokens = make_tokens((4, 0, 2), 256)
    h = poisoned(len(tokens.rows), 256)

    def call(**changed) -> None:
        given = {
            "rows": tokens.rows, "row_scales": tokens.row_scales, "expert_offsets": tokens.offsets,
            "weights": layer.l1["sm90"], "alpha": layer.l1_alpha, "input_scale": None,
            "clamp": None, "out": h,
        } | changed  # fmt: skip
        cuda.l1(**given)

    call()
    rows = len(tokens.rows)
    odd = torch.empty(rows * 256 + 1, dtype=torch.bfloat16, device="cuda")[1:].view(rows, 256)
    for name, wrong, sentence in (
        ("rows", tokens.rows.float(), "rows must be torch.bfloat16"),
        ("rows", tokens.rows[:, :128], "rows must be"),
        ("rows", tokens.rows.cpu(), "on cuda:0; got torch.bfloat16 .* on cpu"),
        ("rows", odd, "rows must start at a multiple of 16 bytes"),
        ("row_scales", tokens.row_scales[1:], "row_scales must be torch.float32"),
        ("row_scales", torch.ones(2 * rows, device="cuda")[::2], "row_scales must be contiguous"),
        ("expert_offsets", tokens.offsets.long(), "expert_offsets must be torch.int32"),
        ("expert_offsets", tokens.offsets[1:], r"expert_offsets must be torch.int32 \[4\]"),
        ("weights", layer.l1["portable"], "weights must be L1's in layout 'sm90'; got L1's in 'po"),
        ("weights", layer.l2["sm90"], "weights must be L1's in layout 'sm90'; got L2's in 'sm90'"),
        ("alpha", layer.l1_alpha[:, 0], "alpha must be"),
        ("input_scale", torch.ones(2, device="cuda"), r"input_scale must be torch.float32 \[3\]"),
        ("out", odd, "out must start at a multiple of 16 bytes"),
        ("out", h[1:], "out must be"),
    ):
        with pytest.raises(ArgumentError, match=sentence):
            call(**{name: wrong})
    with pytest.raises(ArgumentError, match="weights must be L2's in layout 'sm90'"):
        cuda.l2(h, tokens.offsets, layer.l1["sm90"], layer.l2_alpha, out=tokens.rows)
    many = dataclasses.replace(layer.l1["sm90"], num_experts=cuda.MAX_EXPERTS + 1)
    with pytest.raises(ArgumentError, match="at most 1024 experts"):
        call(weights=many)
    assert math.isfinite(float(run_l1(layer, tokens)[0, 0]))  # and the GPU is still well


def test_as_many_experts_as_are_allowed():
    layer = make_layer(16, 128, 128)
    times = cuda.MAX_EXPERTS // 16
    weights = layer.l1["sm90"]
    many = dataclasses.replace(
        layer,
        l1={"sm90": dataclasses.replace(
            weights, codes=weights.codes.repeat(times, 1, 1, 1), num_experts=cuda.MAX_EXPERTS
        )},
        l1_alpha=layer.l1_alpha.repeat(times, 1),
    )  # fmt: skip
    counts = torch.arange(cuda.MAX_EXPERTS) % 97 // 95
    tokens = make_tokens(tuple(counts.tolist()), 128, spare=0)
    h = run_l1(many, tokens)
    check_written(h, tokens.count)
    expert = counts.nonzero().squeeze(1) % 16
    order = expert.argsort()
    few = Tokens(tokens.rows[order], tokens.row_scales[order], torch.zeros(17).int().cuda())
    few.offsets[1:] = expert.bincount(minlength=16).cumsum(0)
    assert same(h[order], run_l1(layer, few))
