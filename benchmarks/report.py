"""Writes the tables and plots of docs/performance.md from the files in benchmarks/results.

    python benchmarks/report.py            write them
    python benchmarks/report.py --check    exit status 1 where the document is not what they give

A table stands between <!-- report:NAME --> and <!-- report:end -->; the rest of the document is
written by hand and left alone. Running it again changes nothing.
"""

from __future__ import annotations

import argparse
import itertools
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from megamoe_ep.forecast import KERNELS, expected_load, forecast
from megamoe_ep.measure import MODELS, Case
from megamoe_ep.results import Results
from megamoe_ep.roofline import KNOWN, PHASES, layer_floor
from megamoe_ep.shape import LayerShape

HERE = Path(__file__).resolve().parent
DOCUMENT = HERE.parent / "docs" / "performance.md"
PLOTS = "images"  # beside the document

FORECAST_MODELS = ("dsv3", "flash", "pro", "qwen3-235b")
FORECAST_RANKS = (4, 8, 16, 32, 64, 72)
FORECAST_TOKENS = (1, 64, 512, 2048, 8192)
CHECKED_FROM = 64  # tokens of a rank: below, a call is launches, which have no floor worth the name
CHECK_LIMIT = 0.15
LAUNCHERS_LIMIT = 0.05
LINES = {"exact": "-o", "fast": "--s"}
GPUS = {"NVIDIA H200": "H200", "NVIDIA H100 80GB HBM3": "H100"}
COLOURS = ("#3b6fb6", "#d1495b", "#2e8b57", "#8e6bb0", "#c98a1b", "#17a2a2", "#6b4f3a")
GREYS = ("black", "#808080", "#b0b0b0")
MARKERS = "o^sDv<>"
DOTS_PER_INCH = 120

Row = dict[str, Any]


def gpu_name(machine: dict[str, Any]) -> str:
    """What tables call it: its short name if it has one."""
    return GPUS.get(machine["device"], machine["device"])


@dataclass(frozen=True)
class Data:
    """All results, and from which file each row is."""

    files: dict[str, Results]

    @classmethod
    def read(cls, folder: Path) -> Data:
        return cls({path.name: Results.read(path) for path in sorted(folder.glob("*.json"))})

    def rows(self, benchmark: str, **wanted: Any) -> list[Row]:
        """Rows of a benchmark that have these values, each with GPU, machine and ceilings."""
        return [
            row | {"gpu": gpu_name(r.machine), "machine": r.machine, "ceilings": r.ceilings}
            for r in self.files.values()
            if r.benchmark == benchmark
            for row in r.rows
            if all(row.get(name) == value for name, value in wanted.items())
        ]

    @cached_property
    def scaling(self) -> list[Row]:
        """Points of the scaling benchmark; of those measured more than once the last."""
        rows = sorted(self.rows("scaling"), key=lambda row: str(row["machine"]["time"]))
        return list({(row["gpu"], *point(row)): row for row in rows}.values())


def point(row: Row) -> tuple[Any, ...]:
    return tuple(row[k] for k in ("shape", "mode", "ranks", "tokens", "combine", "skew"))


# Text


def table(heads: Sequence[str], rows: Iterable[Sequence[Any]], left: int = 1) -> str:
    """Markdown; the first ``left`` columns to the left, the others to the right."""
    lines = [heads, ["---" if i < left else "---:" for i in range(len(heads))], *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def us(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.0f}" if value >= 99.95 else f"{value:.1f}"


def ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def values(rows: Iterable[Row], name: str) -> list[Any]:
    """The distinct values in a column, in order."""
    return sorted({row[name] for row in rows})


def of(rows: Iterable[Row], **wanted: Any) -> list[Row]:
    return [r for r in rows if all(r[name] == value for name, value in wanted.items())]


def only(rows: Iterable[Row], **wanted: Any) -> Row | None:
    """The first row with these values."""
    return next(iter(of(rows, **wanted)), None)


def groups(rows: Iterable[Row], *names: str) -> dict[tuple[Any, ...], list[Row]]:
    """The rows by their values in these columns, in order of those."""
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row[name] for name in names), []).append(row)
    return dict(sorted(found.items()))


NOTHING = "No result file holds any of this yet."


def sources(data: Data) -> str:
    if not data.files:
        return NOTHING
    return table(
        ["file", "device", "ranks", "launcher", "torch", "commit", "command"],
        [
            [
                f"`{name}`",
                r.machine["device"],
                r.machine["ranks"],
                r.machine["launcher"],
                r.machine["torch"],
                r.machine["commit"],
                f"`{r.machine['command']}`",
            ]
            for name, r in data.files.items()
        ],
        left=7,
    )


def ceilings(data: Data) -> str:
    # One rank alone has no peer to measure.
    measured = [(f"`{n}`", r.ceilings, r.machine["ranks"] > 1) for n, r in data.files.items()]
    assumed = [(f"table: {name}", c, True) for name, c in KNOWN.items()]
    lines = [
        [
            where,
            f"{c.copy_bytes_per_s / 1e12:.2f}",
            f"{c.flop_per_s / 1e12:.0f}",
            f"{c.peer_bytes_per_s / 1e9:.0f}" if peers else "-",
            f"{c.flag_s * 1e6:.2f}" if peers else "-",
            f"{c.launch_s * 1e6:.2f}",
            "-" if c.call_s is None else f"{c.call_s * 1e6:.2f}",
            c.source,
        ]
        for where, c, peers in [*measured, *assumed]
    ]
    heads = ["", "copy TB/s", "product TFLOP/s", "peer GB/s", "flag us", "launch us", "call us"]
    return table([*heads, "source"], lines)


def latency(data: Data) -> str:
    """Weak scaling with even routing: the layer against its floor."""
    rows = of(data.scaling, mode="weak", skew=1.0)
    if not rows:
        return NOTHING
    lines = []
    for where, mine in groups(rows, "gpu", "shape", "ranks", "tokens").items():
        exact, fast = (only(mine, combine=mode) for mode in ("exact", "fast"))
        row = exact or fast
        assert row is not None
        lines.append(
            [
                *where,
                row["rows_busiest_rank"],
                us(row["weight_floor_us"]),
                us(row["flop_floor_us"]),
                *(us(r and r["ours_us"]) for r in (exact, fast)),
                *(ratio(r and r["over_floor"]) for r in (exact, fast)),
                f"{max(r['tflops'] for r in (exact, fast) if r):.0f}",
            ]
        )
    heads = [
        "GPU", "shape", "ranks", "tokens a rank", "rows", "weight floor us", "FLOP floor us",
        "exact us", "fast us", "exact / floor", "fast / floor", "TFLOP/s",
    ]  # fmt: skip
    return table(heads, lines, left=2)


def phases(data: Data) -> str:
    rows = [r for r in of(data.scaling, mode="weak", skew=1.0, combine="exact") if "l1_us" in r]
    if not rows:
        return NOTHING
    lines = []
    for where, (row,) in groups(rows, "gpu", "shape", "ranks", "tokens").items():
        cells = [f"{us(row[f'{p}_us'])} ({us(row[f'{p}_floor_us'])})" for p in PHASES]
        lines.append([*where, *cells])
    heads = ["GPU", "shape", "ranks", "tokens a rank", *(f"{p} us" for p in PHASES)]
    return table(heads, lines, left=2)


def skew(data: Data) -> str:
    rows = of(data.scaling, combine="exact")
    skews = [s for s in values(rows, "skew") if s != 1]
    lines = []
    for where, mine in groups(rows, "gpu", "shape", "mode", "ranks", "tokens").items():
        even = only(mine, skew=1.0)
        hot = [only(mine, skew=s) for s in skews]
        if even and any(hot):
            cells = [
                f"{ratio(r['ours_us'] / even['ours_us'])} ({r['hottest_over_mean']:.1f}x)"
                if r
                else "-"
                for r in hot
            ]
            lines.append([*where, us(even["ours_us"]), *cells])
    if not lines:
        return NOTHING
    heads = ["GPU", "shape", "scaling", "ranks", "tokens", "even us", *(f"{s:g}x" for s in skews)]
    return table(heads, lines, left=3)


def strong(data: Data) -> str:
    rows = of(data.scaling, mode="strong", skew=1.0)
    if not rows:
        return NOTHING
    counts = values(rows, "ranks")
    lines = []
    for where, mine in groups(rows, "gpu", "shape", "tokens", "combine").items():
        measured = (only(mine, ranks=w) for w in counts)
        lines.append([*where, *(us(r and r["ours_us"]) for r in measured)])
    heads = ["GPU", "shape", "tokens in all", "combine", *(f"{w} rank(s) us" for w in counts)]
    return table(heads, lines, left=2)


def rivals(data: Data) -> str:
    """What the layer and bench benchmarks timed beside the layer, in the same run."""
    timed: list[tuple[Row, str, float]] = []
    for row in data.rows("layer"):
        if row.get("torch_nccl_us") and row["ours_us"]:
            name = "torch" if row["ranks"] == 1 else "torch + NCCL"
            timed.append((row, f"{name}, bf16", row["torch_nccl_us"]))
    for row in data.rows("bench"):
        timed += [(row, name, took) for name, took in row["rivals_us"].items() if took]
    if not timed:
        return NOTHING
    keys = ("gpu", "shape", "ranks", "tokens_per_rank", "combine", "skew")
    timed.sort(key=lambda t: ([t[0][k] for k in keys], t[1]))
    lines = [
        [
            *(f"{r[k]:g}" if isinstance(r[k], float) else r[k] for k in keys),
            us(r["floor_us"]),
            us(r["ours_us"]),
            name,
            us(took),
            ratio(took / r["ours_us"]),
        ]
        for r, name, took in timed
    ]
    heads = ["GPU", "shape", "ranks", "tokens a rank", "combine", "skew", "floor us", "ours us"]
    return table([*heads, "beside it", "us", "times ours"], lines, left=2)


def launchers(data: Data) -> str:
    """The same points under mpirun and under torchrun."""
    found: dict[tuple[Any, ...], dict[str, float]] = {}
    for row in data.rows("scaling"):
        key = (row["machine"]["device"], *point(row))
        found.setdefault(key, {})[row["machine"]["launcher"]] = row["ours_us"]
    off = [
        abs(by["mpirun"] / by["torchrun"] - 1)
        for by in found.values()
        if {"mpirun", "torchrun"} <= set(by)
    ]
    if not off:
        return "No machine has been measured under both launchers yet."
    within = sum(o <= LAUNCHERS_LIMIT for o in off)
    return (
        f"{len(off)} points were measured under both launchers on one machine: {within} differ by "
        f"at most {LAUNCHERS_LIMIT:.0%}, the median by {statistics.median(off):.1%}, the largest "
        f"by {max(off):.1%}."
    )


# The forecast, and its check


@dataclass(frozen=True)
class Checked:
    """One measured point beside its forecast."""

    row: Row
    seconds: float

    @property
    def ratio(self) -> float:
        return self.seconds * 1e6 / float(self.row["ours_us"])

    @property
    def within(self) -> bool:
        return abs(self.ratio - 1) <= CHECK_LIMIT


def checked(data: Data) -> list[Checked]:
    """Every measured point of a GPU whose kernels' tiles are known."""
    found = []
    for row in data.scaling:
        kernels = next((k for name, k in KERNELS.items() if name in row["machine"]["device"]), None)
        if kernels is None or row["machine"]["kernels"] == "portable":
            continue
        case = Case(row["shape"], row["mode"], row["tokens"], row["combine"], row["skew"])
        shape = case.shape(row["ranks"])
        load = expected_load(shape, case.skew)
        phases = forecast(shape, load, case.combine, row["ceilings"], kernels)
        found.append(Checked(row, sum(phases.values())))
    return found


def forecast_check(data: Data) -> str:
    found = checked(data)
    if not found:
        return "Nothing to hold the forecast to yet: no result file of csrc's kernels on a GPU."
    lines = []
    for gpu, ranks in groups((c.row for c in found), "gpu", "ranks"):
        for model in ["all", *values((c.row for c in found), "shape")]:
            mine = [
                c
                for c in found
                if (c.row["gpu"], c.row["ranks"]) == (gpu, ranks)
                and model in ("all", c.row["shape"])
                and c.row["tokens_per_rank"] >= CHECKED_FROM
            ]
            if mine:
                within = sum(c.within for c in mine) / len(mine)
                spread = sorted(c.ratio for c in mine)
                lines.append(
                    [
                        gpu, ranks, model, len(mine), f"{within:.0%}",
                        ratio(statistics.median(spread)), ratio(spread[0]), ratio(spread[-1]),
                    ]
                )  # fmt: skip
    heads = [
        "GPU", "ranks", "shape", "points", f"within {CHECK_LIMIT:.0%}", "median", "lowest",
        "highest",
    ]  # fmt: skip
    summary = table(heads, lines, left=3)

    keys = ("gpu", "shape", "mode", "ranks", "tokens")
    points = []
    for c in sorted(found, key=lambda c: [c.row[k] for k in keys]):
        r = c.row
        if r["skew"] == 1 and r["combine"] == "exact":
            points.append(
                [
                    *(r[k] for k in keys), us(r["ours_us"]), us(c.seconds * 1e6), ratio(c.ratio),
                    "yes" if c.within else "no",
                ]
            )  # fmt: skip
    heads = [
        "GPU", "shape", "scaling", "ranks", "tokens", "measured us", "forecast us", "ratio",
        "within",
    ]  # fmt: skip
    return (
        f"Forecast over measured, points with at least {CHECKED_FROM} tokens a rank, every skew "
        f"and both combine modes:\n\n{summary}\n\nEven routing, `exact`:\n\n"
        f"{table(heads, points, left=3)}"
    )


def deployed(model: str, tokens: int, ranks: int) -> LayerShape:
    """The model's experts over so many ranks. Where they do not divide, some are held twice."""
    experts = -(-MODELS[model].num_experts // ranks) * ranks
    return MODELS[model].layer(experts, tokens, ranks)


@cache
def forecast_us(machine: str, shape: LayerShape, combine: str) -> float:
    phases = forecast(shape, expected_load(shape), combine, KNOWN[machine], KERNELS[machine])
    return sum(phases.values()) * 1e6


def forecast_table(data: Data) -> str:
    parts = []
    for machine in KNOWN:
        lines = [
            [
                model,
                tokens,
                *(
                    us(forecast_us(machine, deployed(model, tokens, ranks), "fast"))
                    for ranks in FORECAST_RANKS
                ),
            ]
            for model in FORECAST_MODELS
            for tokens in FORECAST_TOKENS
        ]
        heads = ["model", "tokens a rank", *(f"EP {ranks} us" for ranks in FORECAST_RANKS)]
        parts.append(f"{machine}, `fast`, every point a forecast:\n\n{table(heads, lines)}")
    return "\n\n".join(parts)


def gemms(data: Data) -> str:
    rows = data.rows("grouped_gemm")
    if not rows:
        return NOTHING
    lines = []
    keys = ("gpu", "shape", "skew", "tokens_per_rank")
    for r in sorted(({"skew": 1.0} | r for r in rows), key=lambda r: [r[k] for k in keys]):
        floor = max(r["weight_floor_us"], r["flop_floor_us"])
        rival = r.get("torch_grouped_mm_us")
        lines.append(
            [
                r["gpu"], r["shape"], f"{r['skew']:g}", r["tokens_per_rank"], r["rows"], us(floor),
                us(r["ours_us"]), ratio(r["ours_us"] / floor), us(rival),
                ratio(rival and rival / r["ours_us"]),
            ]
        )  # fmt: skip
    heads = ["GPU", "shape", "skew", "tokens a rank", "rows", "floor us", "ours us", "ours / floor"]
    return table([*heads, "torch._grouped_mm us", "times faster"], lines, left=2)


# Plots


def figure(width: float, height: float) -> Figure:
    found = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(found)
    return found


def panels(shown: Figure, rows: int, columns: int) -> list[Any]:
    return [shown.add_subplot(rows, columns, i + 1) for i in range(rows * columns)]


def legend_below(shown: Figure) -> None:
    """One legend for all panels: what is drawn in any of them."""
    found: dict[str, Any] = {}
    for axes in shown.axes:
        handles, labels = axes.get_legend_handles_labels()
        found |= dict(zip(labels, handles, strict=True))
    shown.legend(
        found.values(), found, loc="outside lower center", ncols=min(len(found), 5), fontsize=9
    )


def ticks(axes: Any, at: Sequence[float]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(at, [f"{x:g}" for x in at], fontsize=8)
    axes.minorticks_off()
    axes.set_yscale("log")
    axes.grid(alpha=0.3, which="both")


def line(rows: Iterable[Row], x: str, y: str) -> tuple[list[Any], list[Any]]:
    """One column over another; of rows that have the same x the last."""
    found = {row[x]: row[y] for row in rows}
    return sorted(found), [found[at] for at in sorted(found)]


def looks(keys: Iterable[Any], styles: Iterable[str]) -> dict[Any, str]:
    """A colour or marker for each."""
    return dict(zip(keys, itertools.cycle(styles), strict=False))


def latency_plot(data: Data) -> Figure | None:
    rows = of(data.scaling, mode="weak", skew=1.0)
    models = [m for m in MODELS if m in values(rows, "shape")]
    if not models:
        return None
    others = [r for r in data.rows("layer", skew=1.0) if r.get("torch_nccl_us")]
    colours = looks(groups([*rows, *others], "gpu", "ranks"), COLOURS)
    greys = looks(values(rows, "gpu"), GREYS)
    shown = figure(3.6 * len(models), 5)
    for axes, model in zip(panels(shown, 1, len(models)), models, strict=True):
        mine = of(rows, shape=model)
        for (gpu, ranks, combine), found in groups(mine, "gpu", "ranks", "combine").items():
            axes.plot(
                *line(found, "tokens", "ours_us"), LINES[combine], ms=4,
                color=colours[gpu, ranks], label=f"{gpu} EP{ranks} {combine}",
            )  # fmt: skip
        for (gpu, ranks), found in groups(of(others, shape=model), "gpu", "ranks").items():
            axes.plot(
                *line(found, "tokens_per_rank", "torch_nccl_us"), "-.x", ms=6, lw=1,
                color=colours[gpu, ranks], label=f"{gpu} EP{ranks} torch, bf16",
            )  # fmt: skip
        for (gpu,), found in groups(mine, "gpu").items():
            fewest = of(found, ranks=min(values(found, "ranks")))
            axes.plot(
                *line(fewest, "tokens", "floor_us"), ":", color=greys[gpu], label=f"{gpu} floor"
            )
        ticks(axes, values(mine, "tokens"))
        axes.set(title=model, xlabel="tokens a rank", ylabel="latency, us")
    legend_below(shown)
    return shown


def scaling_plot(data: Data) -> Figure | None:
    """Latency over ranks: weak and strong, of GPUs that several numbers of ranks were run on."""
    rows = [
        row
        for mine in groups(of(data.scaling, skew=1.0, combine="exact"), "gpu").values()
        if len(values(mine, "ranks")) > 1
        for row in mine
    ]
    models = [m for m in MODELS if m in values(rows, "shape")]
    if not models:
        return None
    colours = looks(values(rows, "tokens"), COLOURS)
    styles = looks(values(rows, "gpu"), ("-o", "--s", ":^"))
    modes = [m for m in ("weak", "strong") if m in values(rows, "mode")]
    shown = figure(3.6 * len(models), 3.8 * len(modes))
    axes_of = panels(shown, len(modes), len(models))
    for row, mode in enumerate(modes):
        for column, model in enumerate(models):
            axes = axes_of[row * len(models) + column]
            mine = of(rows, shape=model, mode=mode)
            for (gpu, tokens), found in groups(mine, "gpu", "tokens").items():
                axes.plot(
                    *line(found, "ranks", "ours_us"), styles[gpu], ms=4, color=colours[tokens],
                    label=f"{gpu}, {tokens} token{'s' if tokens > 1 else ''}",
                )  # fmt: skip
            ticks(axes, values(rows, "ranks"))
            what = "a rank's load fixed" if mode == "weak" else "all tokens fixed"
            axes.set(title=f"{model}: {what}", xlabel="ranks", ylabel="latency, us")
    legend_below(shown)
    return shown


def check_plot(data: Data) -> Figure | None:
    found = checked(data)
    if not found:
        return None
    shown = figure(8.4, 5)
    (axes,) = panels(shown, 1, 1)
    rows = [c.row for c in found]
    models = [m for m in MODELS if m in values(rows, "shape")]
    markers = looks(groups(rows, "gpu", "ranks"), MARKERS)
    axes.axhspan(1 - CHECK_LIMIT, 1 + CHECK_LIMIT, color="#2e8b57", alpha=0.15, lw=0)
    axes.axhline(1, color="black", lw=0.8)
    for number, model in enumerate(models):
        for (gpu, ranks), marker in markers.items():
            keys = (model, gpu, ranks)
            mine = [c for c in found if (c.row["shape"], c.row["gpu"], c.row["ranks"]) == keys]
            if mine:
                # Side by side, so that the shapes do not hide one another.
                shift = 2 ** (0.18 * (number - (len(models) - 1) / 2))
                axes.plot(
                    [c.row["tokens_per_rank"] * shift for c in mine], [c.ratio for c in mine],
                    marker, ms=4, alpha=0.6, color=COLOURS[number % len(COLOURS)],
                    label=f"{model}, {gpu} EP{ranks}", mew=0,
                )  # fmt: skip
    ticks(axes, values(rows, "tokens_per_rank"))
    axes.set_yscale("linear")
    axes.set(xlabel="tokens a rank", ylabel="forecast / measured")
    legend_below(shown)
    return shown


def forecast_plot(machine: str) -> Callable[[Data], Figure]:
    def plot(data: Data) -> Figure:
        shown = figure(10.5, 8.2)
        shown.suptitle(f"{machine}: the model's experts over EP ranks, combine fast")
        measured = [
            r
            for r in of(data.scaling, mode="strong", skew=1.0, combine="fast")
            if machine in r["machine"]["device"] and r["machine"]["kernels"] != "portable"
        ]
        places = sorted({*FORECAST_RANKS, *values(measured, "ranks")})
        at = {ranks: float(i) for i, ranks in enumerate(places)}  # evenly: 64 is next to 72
        x = [at[ranks] for ranks in FORECAST_RANKS]
        for axes, model in zip(panels(shown, 2, 2), FORECAST_MODELS, strict=True):
            for number, tokens in enumerate(FORECAST_TOKENS):
                colour = COLOURS[number]
                y = [
                    forecast_us(machine, deployed(model, tokens, ranks), "fast")
                    for ranks in FORECAST_RANKS
                ]
                axes.plot(
                    x, y, "--o", mfc="white", color=colour, ms=5,
                    label=f"{tokens} token{'s' if tokens > 1 else ''} a rank",
                )  # fmt: skip
                floors = [
                    layer_floor(shape, expected_load(shape), KNOWN[machine]).seconds * 1e6
                    for shape in (deployed(model, tokens, ranks) for ranks in FORECAST_RANKS)
                ]
                axes.plot(x, floors, ":", color=colour, lw=0.9)
                points = of(measured, shape=model, tokens_per_rank=tokens)
                axes.plot(
                    [at[r["ranks"]] for r in points], [r["ours_us"] for r in points], "o",
                    color=colour, ms=6,
                )  # fmt: skip
            if KNOWN[machine].domain in at and KNOWN[machine].domain < max(places):
                axes.axvline(at[KNOWN[machine].domain] + 0.5, color="#888888", lw=0.8)
            axes.set_xticks([*at.values()], [f"{ranks}" for ranks in places])
            axes.set_yscale("log")
            axes.grid(alpha=0.3, which="both")
            axes.set(title=model, xlabel="EP ranks", ylabel="latency, us")
        legend_below(shown)
        return shown

    return plot


TABLES: dict[str, Callable[[Data], str]] = {
    "sources": sources,
    "ceilings": ceilings,
    "latency": latency,
    "phases": phases,
    "skew": skew,
    "strong": strong,
    "rivals": rivals,
    "gemms": gemms,
    "launchers": launchers,
    "forecast-check": forecast_check,
    "forecast": forecast_table,
}
PICTURES: dict[str, tuple[str, Callable[[Data], Figure | None]]] = {
    "latency-plot": ("Latency over tokens, with the floor", latency_plot),
    "scaling-plot": ("Latency over ranks", scaling_plot),
    "forecast-check-plot": ("Forecast over measured", check_plot),
    **{
        f"forecast-plot-{name.lower()}": (f"Forecast for {name}", forecast_plot(name))
        for name in KNOWN
    },
}
SECTION = re.compile(r"<!-- report:(?!end)([\w-]+) -->\n.*?<!-- report:end -->", re.S)


def render(text: str, data: Data, draw: Callable[[str, Figure], None]) -> str:
    """The document with its sections made anew; ``draw`` takes each picture by its file name.

    Raises:
        KeyError: a section of the document is none that is known here.
    """

    def section(match: re.Match[str]) -> str:
        name = match[1]
        if name in TABLES:
            body = TABLES[name](data)
        else:
            caption, plot = PICTURES[name]
            shown = plot(data)
            body = NOTHING
            if shown is not None:
                draw(f"{name}.png", shown)
                body = f"![{caption}]({PLOTS}/{name}.png)"
        return f"<!-- report:{name} -->\n\n{body}\n\n<!-- report:end -->"

    return SECTION.sub(section, text)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=HERE / "results", help="folder of JSON")
    parser.add_argument("--document", type=Path, default=DOCUMENT)
    parser.add_argument("--check", action="store_true", help="write nothing; compare the text")
    arguments = parser.parse_args(argv)
    document: Path = arguments.document

    def draw(name: str, shown: Figure) -> None:
        if not arguments.check:
            folder = document.parent / PLOTS
            folder.mkdir(exist_ok=True)
            # No version of matplotlib in it: the same data give the same bytes.
            shown.savefig(folder / name, dpi=DOTS_PER_INCH, metadata={"Software": None})

    before = document.read_text()
    after = render(before, Data.read(arguments.results), draw)
    if arguments.check:
        if before != after:
            print(f"{document} is not what the files of {arguments.results} give: run this again "
                  f"without --check, and look at what changes.", file=sys.stderr)  # fmt: skip
        return int(before != after)
    if before != after:
        document.write_text(after)
    return 0


if __name__ == "__main__":
    sys.exit(main())
