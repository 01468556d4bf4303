"""How near the floor are the two grouped GEMMs of a layer, and what would torch take?

    python benchmarks/grouped_gemm.py
    python benchmarks/grouped_gemm.py --shapes dsv3,flash --tokens 64,128 --no-rival
    python benchmarks/grouped_gemm.py --plot benchmarks/results/grouped_gemm-nvidia-h200.json

One GPU, one rank's load of two: 2 * T tokens with random experts, of which this rank owns half, cut
at T * top_k rows. NVFP4 activations before and between the GEMMs.

Time is that of L1 and L2 back to back, SwiGLU and requantisation within: the median over calls that
follow one another without a pause, several input sets in turn; a call is a CUDA graph, and "plain"
two launches from Python. torch's is that of its two products alone, on weights in bf16, the faster
of two memory layouts.

    floor = max(weight bytes of experts with rows / copy bandwidth, 6 * rows * H * I / cuBLAS rate)

Both rates are measured in the same run: a device copy of 1 GiB, read plus written, and a bf16
product of 8192^3.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from arguments import list_of

from megamoe_ep import nvfp4
from megamoe_ep.kernels import gemm_kernels, weight_layout
from megamoe_ep.measure import (
    MODELS,
    LayerWeights,
    Meter,
    ModelShape,
    machine,
    random_weights,
    ranks,
    route,
)
from megamoe_ep.results import Results
from megamoe_ep.roofline import KNOWN, Ceilings, known_ceilings

SHAPES = ("dsv3", "flash", "pro")
TOKENS = (1, 8, 64, 128, 512, 2048, 8192)
SKEW, SKEW_TOKENS, SKEW_LIMIT = 4.0, 2048, 1.10
OVER_FLOOR_LIMIT = {8: 1.30, 64: 1.20, 128: 1.20, 512: 1.45, 2048: 1.25, 8192: 1.20}
SPEEDUP_LIMIT = {64: 4.0, 128: 4.0, 8192: 1.0}
RANKS = 2
INPUT_SETS = 3
FOLDER = Path(__file__).parent / "results"

Call = Callable[[], Any]


def median_us(calls: Sequence[Call], count: int) -> float:
    """Median time of a call among ``count`` that follow one another, ``calls`` in turn."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    torch.cuda._sleep(8_000_000)  # some milliseconds, in which the host gets ahead
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    events[0].record()
    for i, event in enumerate(events[1:]):
        calls[i % len(calls)]()
        event.record()
    torch.cuda.synchronize()
    return statistics.median(
        before.elapsed_time(after) * 1e3 for before, after in itertools.pairwise(events)
    )


def rates() -> tuple[float, float]:
    """Of a device copy, bytes/s, read plus written; of cuBLAS in bf16, FLOP/s."""
    source = torch.randint(0, 100, (1 << 28,), dtype=torch.int32, device="cuda")
    target = torch.empty_like(source)
    copy = 2 * source.nbytes / median_us([lambda: target.copy_(source)], 20) * 1e6
    a, b = (torch.randn(8192, 8192, device="cuda").bfloat16() for _ in range(2))
    out = torch.empty_like(a)
    return copy, 2 * 8192**3 / median_us([lambda: torch.mm(a, b, out=out)], 40) * 1e6


def row_counts(model: ModelShape, tokens: int, skew: float, draw: torch.Generator) -> torch.Tensor:
    """Rows of each of this rank's experts, int64 [L]; ``tokens * top_k`` in all.

    With a skew, expert 0 has that many times the mean rows of this rank's experts.
    """
    local, top_k = model.rank_experts, model.top_k
    experts = RANKS * local
    if skew != 1:
        # A token has x rows of expert 0, and of each other one (top_k - x) / (experts - 1).
        others = (local - 1) / (experts - 1)
        x = skew / local * others * top_k / (1 - skew / local * (1 - others))
        skew = x * experts / top_k
    counted = torch.zeros(local, dtype=torch.long)
    while (missing := tokens * top_k - int(counted.sum())) > 0:
        ids = route(RANKS * tokens, experts, top_k, skew, draw).flatten()
        counted += ids[ids < local][:missing].long().bincount(minlength=local).cpu()
    return counted


@dataclass
class InputSet:
    """Rows by expert in NVFP4's values, as dispatch leaves them but for the order of their columns,
    and room for the results."""

    counts: torch.Tensor
    rows: torch.Tensor
    row_scales: torch.Tensor
    offsets: torch.Tensor
    h: torch.Tensor
    out: torch.Tensor

    @classmethod
    def draw(cls, model: ModelShape, tokens: int, skew: float, draw: torch.Generator) -> InputSet:
        counts = row_counts(model, tokens, skew, draw)
        total, hidden = int(counts.sum()), model.hidden_size
        rows = torch.empty(total, hidden, dtype=torch.bfloat16, device="cuda")
        row_scales = torch.empty(total, device="cuda")
        for start in range(0, total, 4096):
            part = slice(start, min(start + 4096, total))
            x = torch.randn(part.stop - start, hidden, generator=draw, device="cuda")
            q = nvfp4.quantize_per_token(x)
            rows[part] = nvfp4.dequantize(q.codes, q.scales)
            row_scales[part] = q.global_scale
        offsets = torch.zeros(len(counts) + 1, dtype=torch.int32)
        offsets[1:] = counts.cumsum(0)
        h = torch.empty(total, model.intermediate_size, dtype=torch.bfloat16, device="cuda")
        return cls(counts, rows, row_scales, offsets.cuda(), h, torch.empty_like(rows))


def ours(weights: LayerWeights, given: InputSet) -> tuple[Call, Call]:
    gemm = gemm_kernels(weights.l1.layout)

    def l1() -> None:
        gemm.l1(
            given.rows, given.row_scales, given.offsets, weights.l1, weights.l1_alpha,
            input_scale=weights.l2_input_scale, clamp=None, out=given.h,
        )  # fmt: skip

    def l2() -> None:
        gemm.l2(given.h, given.offsets, weights.l2, weights.l2_alpha, out=given.out)

    return l1, l2


class Torch:
    """``torch._grouped_mm`` on weights in bf16, as [L, K, N] and as transposed [L, N, K]."""

    def __init__(self, weights: LayerWeights) -> None:
        assert weights.w13 is not None
        assert weights.w2 is not None
        both = (weights.w13, weights.w2)
        self.layouts = {
            "k x n": both,
            "n x k": tuple(w.transpose(1, 2).contiguous().transpose(1, 2) for w in both),
        }

    def products(self, given: InputSet, layout: str) -> Call:
        """The two products; ``h`` stands for what comes of the first."""
        w13, w2 = self.layouts[layout]
        rows = (given.rows * given.row_scales[:, None]).bfloat16()
        ends = given.offsets[1:]
        h = torch.nn.functional.silu(torch.randn_like(given.h.float())).bfloat16()

        def call() -> None:
            torch._grouped_mm(rows, w13, offs=ends)
            torch._grouped_mm(h, w2, offs=ends)

        return call

    def layer(self, given: InputSet) -> torch.Tensor:
        w13, w2 = self.layouts["k x n"]
        rows = (given.rows * given.row_scales[:, None]).bfloat16()
        ends = given.offsets[1:]
        gate, up = torch._grouped_mm(rows, w13, offs=ends).chunk(2, dim=-1)
        return torch._grouped_mm(torch.nn.functional.silu(gate) * up, w2, offs=ends)


def measure_point(
    meter: Meter, name: str, tokens: int, skew: float, weights: LayerWeights, rival: Torch | None,
    ceilings: Ceilings, calls: int,
) -> dict[str, Any]:  # fmt: skip
    model = MODELS[name]
    hidden, inter = model.hidden_size, model.intermediate_size
    draw = torch.Generator(device="cuda").manual_seed(tokens)
    sets = [InputSet.draw(model, tokens, skew, draw) for _ in range(INPUT_SETS)]
    pairs = [ours(weights, given) for given in sets]
    together = [lambda pair=pair: [call() for call in pair] for pair in pairs]
    ours_us = median_us([meter.capture(call) for call in together], calls)
    plain_us = median_us(together, calls)
    l1_us, l2_us = (median_us([meter.capture(pair[i]) for pair in pairs], calls) for i in range(2))

    torch_us: dict[str, float] = {}
    difference = None
    if rival is not None:
        fewer = max(9, calls // 2)
        torch_us = {
            layout: median_us([rival.products(given, layout) for given in sets], fewer)
            for layout in rival.layouts
        }
        together[0]()
        theirs = rival.layer(sets[0]).float()
        difference = float((sets[0].out.float() - theirs).norm() / theirs.norm())

    rows = sum(int(given.counts.sum()) for given in sets) / len(sets)
    hit = sum(int((given.counts > 0).sum()) for given in sets) / len(sets)
    hottest = sum(float(g.counts.max() / g.counts.float().mean()) for g in sets) / len(sets)
    weight_bytes, flops = hit * 3 * hidden * inter * 9 / 16, 6 * rows * hidden * inter
    weight_floor_us = weight_bytes / ceilings.copy_bytes_per_s * 1e6
    flop_floor_us = flops / ceilings.flop_per_s * 1e6
    row: dict[str, Any] = {
        "shape": name,
        "tokens_per_rank": tokens,
        "skew": skew,
        "rows": round(rows),
        "experts_hit": hit,
        "hottest_over_mean": hottest,
        "ours_us": ours_us,
        "ours_plain_us": plain_us,
        "l1_us": l1_us,
        "l2_us": l2_us,
        "torch_grouped_mm_us": min(torch_us.values(), default=None),
        "torch_grouped_mm_by_layout_us": torch_us,
        "difference_from_torch": difference,
        "weight_floor_us": weight_floor_us,
        "flop_floor_us": flop_floor_us,
        "floor_us": max(weight_floor_us, flop_floor_us),
        "over_floor": ours_us / max(weight_floor_us, flop_floor_us),
        "ours_tflops": flops / ours_us / 1e6,
        "ours_weight_gbps": weight_bytes / ours_us / 1e3,
    }
    return {k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}


HEADS = (
    f"{'shape':6}{'T':>6}{'skew':>5}{'rows':>7}{'ours us':>9}{'plain':>9}{'l1':>9}{'l2':>8}"
    f"{'floor':>9}{'ratio':>6}{'limit':>6} {'torch':>9}{'faster':>7}{'limit':>6}{'TFLOP/s':>8}"
    f"{'GB/s':>6}"
)


def line(row: dict[str, Any]) -> str:
    """A row for people; "!" where a limit is missed."""
    tokens, even = row["tokens_per_rank"], row["skew"] == 1
    most = OVER_FLOOR_LIMIT.get(tokens) if even else None
    least = SPEEDUP_LIMIT.get(tokens) if even else None
    rival = row["torch_grouped_mm_us"]
    faster = rival / row["ours_us"] if rival else None
    missed = (most and row["over_floor"] > most) or (least and faster and faster < least)

    def optional(value: float | None, form: str, width: int) -> str:
        return f"{'-':>{width}}" if value is None else f"{value:{width}{form}}"

    return (
        f"{row['shape']:6}{tokens:6}{row['skew']:5g}{row['rows']:7}{row['ours_us']:9.1f}"
        f"{row['ours_plain_us']:9.1f}{row['l1_us']:9.1f}{row['l2_us']:8.1f}{row['floor_us']:9.1f}"
        f"{row['over_floor']:6.2f}{optional(most, '.2f', 6)} {optional(rival, '.1f', 9)}"
        f"{optional(faster, '.2f', 7)}{optional(least, '.1f', 6)}{row['ours_tflops']:8.0f}"
        f"{row['ours_weight_gbps']:6.0f}{' !' if missed else ''}"
    )


def skew_lines(rows: list[dict[str, Any]]) -> list[str]:
    found = []
    for skewed in (row for row in rows if row["skew"] != 1):
        even = [
            row["ours_us"]
            for row in rows
            if row["skew"] == 1
            and (row["shape"], row["tokens_per_rank"])
            == (skewed["shape"], skewed["tokens_per_rank"])
        ]
        if even:
            ratio = skewed["ours_us"] / even[-1]
            found.append(
                f"{skewed['shape']}: hottest expert {skewed['hottest_over_mean']:.2f} x the mean "
                f"costs {ratio:.3f} x the even case (limit {SKEW_LIMIT}"
                f"{') !' if ratio > SKEW_LIMIT else ')'}"
            )
    return found


def plot(results: Results, path: Path) -> None:
    """TFLOP/s over FLOP per weight byte, against the roofline; a panel for each shape."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [row for row in results.rows if row["skew"] == 1]
    names = [name for name in MODELS if any(row["shape"] == name for row in rows)]
    figure = Figure(figsize=(3.6 * len(names), 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    peak, bandwidth = results.ceilings.flop_per_s / 1e12, results.ceilings.copy_bytes_per_s
    for place, name in enumerate(names):
        axes = figure.add_subplot(1, len(names), place + 1)
        mine = [row for row in rows if row["shape"] == name]
        # TFLOP/s over GB/s, both over the same time.
        x = [row["ours_tflops"] * 1e3 / row["ours_weight_gbps"] for row in mine]
        ends = sorted([min(x) / 1.5, peak * 1e12 / bandwidth, max(x) * 4])
        axes.plot(ends, [min(peak, e * bandwidth / 1e12) for e in ends], "k-", label="roofline")
        axes.plot(x, [row["ours_tflops"] for row in mine], "o", ms=5, label="ours")
        for at, row in zip(x, mine, strict=True):
            axes.annotate(
                f"T={row['tokens_per_rank']}", (at, row["ours_tflops"]), fontsize=7,
                xytext=(4, -9), textcoords="offset points",
            )  # fmt: skip
        theirs = [(a, row) for a, row in zip(x, mine, strict=True) if row["torch_grouped_mm_us"]]
        axes.plot(
            [at for at, _ in theirs],
            [row["ours_tflops"] * row["ours_us"] / row["torch_grouped_mm_us"] for _, row in theirs],
            "x", ms=5, label="torch._grouped_mm, bf16",
        )  # fmt: skip
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.grid(alpha=0.3)
        axes.set_title(name)
        axes.set_xlabel("FLOP per byte of NVFP4 weights")
        if place == 0:
            axes.set_ylabel("TFLOP/s")
            axes.legend(fontsize=8)
    figure.suptitle(f"L1 and L2 on {results.machine['device']}", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def measure(meter: Meter, arguments: argparse.Namespace) -> None:
    copy, flops = rates()
    known = known_ceilings(meter.device_name) or KNOWN["H200"]
    ceilings = dataclasses.replace(
        known,
        name=meter.device_name,
        copy_bytes_per_s=copy,
        flop_per_s=flops,
        source=f"copy and product measured in this run; the others are of {known.name}'s table",
    )
    results = Results("grouped_gemm", machine(meter) | {"calls": arguments.calls}, ceilings)
    path = arguments.output or FOLDER / results.file_name()
    print(f"copy {copy / 1e12:.3f} TB/s, cuBLAS bf16 {flops / 1e12:.1f} TFLOP/s", flush=True)
    print(HEADS, flush=True)
    for name in arguments.shapes:
        model = MODELS[name]
        weights, rival = None, None  # before the next ones are allocated
        shape = model.layer(model.rank_experts, 1, 1)
        weights = random_weights(shape, 0, meter.device, with_bf16=not arguments.no_rival)
        rival = None if arguments.no_rival else Torch(weights)
        points = [(tokens, 1.0) for tokens in arguments.tokens]
        if SKEW_TOKENS in arguments.tokens:
            points.append((SKEW_TOKENS, SKEW))
        for tokens, skew in points:
            row = measure_point(
                meter, name, tokens, skew, weights, rival, ceilings, arguments.calls
            )
            results.rows.append(row)
            print(line(row), flush=True)
            results.write(path)
        del weights, rival
    print("\n".join(skew_lines(results.rows)))
    results.machine["rates_after"] = dict(
        zip(("copy_bytes_per_s", "flop_per_s"), rates(), strict=True)
    )
    print("at the end: copy {:.3f} TB/s, cuBLAS bf16 {:.1f} TFLOP/s".format(
        *(rate / 1e12 for rate in results.machine["rates_after"].values())
    ))  # fmt: skip
    results.write(path)
    try:
        plot(results, path.with_suffix(".png"))
    except ImportError as error:
        print(f"no plot ({error}); draw it elsewhere with --plot {path}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", type=list_of(str, tuple(MODELS)), default=list(SHAPES))
    parser.add_argument("--tokens", type=list_of(int), default=list(TOKENS))
    parser.add_argument("--calls", type=int, default=30, help="of which the median is taken")
    parser.add_argument("--no-rival", action="store_true", help="time ours alone")
    parser.add_argument("--output", type=Path, help="JSON file; default: in benchmarks/results")
    parser.add_argument("--plot", type=Path, help="draw a result file, and measure nothing")
    arguments = parser.parse_args()
    if arguments.plot is not None:
        plot(Results.read(arguments.plot), arguments.plot.with_suffix(".png"))
        return
    if not torch.cuda.is_available():
        parser.error("needs a GPU, and torch sees none.")
    if weight_layout(torch.device("cuda")) == "portable":
        parser.error("this GPU has no fast GEMMs here.")
    with ranks("cuda") as meter:
        measure(meter, arguments)


if __name__ == "__main__":
    main()
