"""``megamoe-ep bench``: the layer on this machine, against its floor and what else is installed."""

from __future__ import annotations

import contextlib
import math
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from megamoe_ep.cli.report import check_plot, console, errors_end_the_command
from megamoe_ep.errors import ArgumentError

if TYPE_CHECKING:
    from rich.progress import Progress
    from rich.table import Table

    from megamoe_ep.measure import Case, LayerWeights, Meter
    from megamoe_ep.results import Results
    from megamoe_ep.rivals import Rival

JOB_TIMEOUT_S = 3600.0
# What is measured when nothing is said: with csrc's kernels, and with the portable ones.
FAST = ("dsv3", "1,8,64,128,512,2048,8192")
SLOW = ("tiny", "1,8,64")
PORTABLE_CALLS = 5  # of which the median is taken; they vary less than they cost
TABLE_WIDTH = 22, 17  # columns that the names take and, at most, each number of tokens


def bench(
    shape: Annotated[
        str | None,
        typer.Option(
            help="dsv3, flash, pro, qwen3-235b or tiny; or hidden size, intermediate size, experts "
            "of one rank and top-k with slashes between, as 7168/2048/32/8. Not said: "
            f"{FAST[0]}, and {SLOW[0]} on portable kernels."
        ),
    ] = None,
    tokens: Annotated[
        str | None,
        typer.Option(
            help="Tokens of each rank, with commas between. Not said: "
            f"{FAST[1].replace(',', ', ')}; on portable kernels {SLOW[1].replace(',', ', ')}."
        ),
    ] = None,
    combine: Annotated[
        str, typer.Option(help="exact: the same bits at every number of ranks. fast: fewer bytes.")
    ] = "exact",
    skew: Annotated[
        float, typer.Option(help="Rows of the hottest expert over the mean.", min=1.0)
    ] = 1.0,
    ranks: Annotated[
        int | None,
        typer.Option(
            help="Ranks to start on this machine; one for each GPU, or one. Under torchrun or "
            "mpirun: how many they must have started.",
            min=1,
        ),
    ] = None,
    compare: Annotated[
        bool, typer.Option(help="Time what else is installed, on the same tokens and weights.")
    ] = True,
    device: Annotated[
        str | None, typer.Option(help="cpu or cuda; if not said, cuda where there is a GPU.")
    ] = None,
    json: Annotated[
        Path | None, typer.Option(help="File to write the figures to, with machine and versions.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Picture of latency and floor to write, a .png.")
    ] = None,
) -> None:
    """Measures the layer on this machine, against the floors of its bytes and FLOPs.

    Starts the ranks itself, or joins those that torchrun or mpirun started. How a number is
    measured: docs/performance.md.
    """
    with errors_end_the_command():
        from megamoe_ep.bootstrap import detect_launcher

        options = Options(
            shape, tokens, combine, skew, ranks, compare, device, json, plot
        ).checked()
        launched = detect_launcher(os.environ) is not None
    if launched:
        _join(options)
        return
    with errors_end_the_command():
        code = _start(options)
    raise typer.Exit(code)


@dataclass(frozen=True)
class Options:
    """What was asked for; see ``bench``."""

    shape: str | None
    tokens: str | None
    combine: str
    skew: float
    ranks: int | None
    compare: bool
    device: str | None
    json: Path | None
    plot: Path | None

    def checked(self) -> Options:
        """Itself, or ArgumentError for what can be told wrong before any rank is started."""
        if self.combine not in ("exact", "fast"):
            raise ArgumentError(f"--combine must be exact or fast; got {self.combine!r}.")
        if self.device not in (None, "cpu", "cuda"):
            raise ArgumentError(f"--device must be cpu or cuda; got {self.device!r}.")
        if self.tokens is not None and not all(
            part.isdecimal() and int(part) for part in self.tokens.split(",")
        ):
            raise ArgumentError(
                f"--tokens must be numbers of at least 1 with commas between; got {self.tokens!r}."
            )
        if self.shape is not None:
            from megamoe_ep.measure import model_shape

            model_shape(self.shape)
        if not math.isfinite(self.skew):
            raise ArgumentError(f"--skew must be a finite number; got {self.skew:g}.")
        if self.json is not None and (
            self.json.is_dir() or not self.json.absolute().parent.is_dir()
        ):
            raise ArgumentError(f"--json must be a file in a folder that exists; got {self.json}.")
        if self.plot is not None:
            check_plot(self.plot)
        return self

    def argv(self) -> list[str]:
        """The same again, for a rank."""
        argv = ["bench", "--combine", self.combine, "--skew", str(self.skew)]
        argv += ["--compare" if self.compare else "--no-compare"]
        for name in ("shape", "tokens", "device", "json", "plot"):
            value = getattr(self, name)
            if value is not None:
                argv += [f"--{name}", str(value)]
        return argv

    def cases(self, *, portable: bool) -> list[Case]:
        from megamoe_ep.measure import Case

        default_shape, default_tokens = SLOW if portable else FAST
        return [
            Case(self.shape or default_shape, "weak", int(number), self.combine, self.skew)
            for number in (self.tokens or default_tokens).split(",")
        ]


def _start(options: Options) -> int:
    """Starts the ranks on this machine; the exit status."""
    import torch

    from megamoe_ep.bootstrap import Group, spawn_ranks
    from megamoe_ep.kernels import weight_layout

    # These raise here, and once, what every rank would raise.
    group = Group.of(None, device=options.device)
    gpus = torch.cuda.device_count() if group.device.type == "cuda" else 0
    world_size = options.ranks or max(gpus, 1)
    for case in options.cases(portable=weight_layout(group.device) == "portable"):
        shape = case.shape(world_size)
        if shape.top_k > shape.num_experts:
            raise ArgumentError(
                f"--shape must have a top-k of at most its {shape.num_experts} experts on "
                f"{world_size} rank(s); got {shape.top_k}."
            )
    codes = spawn_ranks(
        [sys.executable, "-m", "megamoe_ep.cli", *options.argv()],
        world_size,
        timeout_s=JOB_TIMEOUT_S,
    )
    return max((code if code > 0 else 1 for code in codes if code), default=0)


def _join(options: Options) -> None:
    """Does the work of the rank that this process is."""
    from megamoe_ep.measure import ranks

    with errors_end_the_command(), ranks(options.device) as meter:
        if options.ranks not in (None, meter.group.world_size):
            raise ArgumentError(
                f"--ranks must be the number of ranks that were launched, "
                f"{meter.group.world_size}, or be left out; got {options.ranks}."
            )
        results = _measure(meter, options)
        if meter.group.rank == 0:
            _tell(results, options)


def _measure(meter: Meter, options: Options) -> Results:
    from megamoe_ep.kernels import weight_layout
    from megamoe_ep.measure import (
        CALLS,
        machine,
        measure_case,
        random_weights,
    )
    from megamoe_ep.results import Results
    from megamoe_ep.rivals import installed
    from megamoe_ep.roofline import measure_ceilings

    world_size = meter.group.world_size
    portable = weight_layout(meter.device) == "portable"
    cases = options.cases(portable=portable)
    calls = PORTABLE_CALLS if portable else CALLS
    rivals = installed(meter.device, world_size) if options.compare else []
    with _progress(meter.group.rank == 0) as progress:
        bar = progress.add_task("the machine's ceilings", total=2 + len(cases) * (1 + len(rivals)))
        ceilings = measure_ceilings(meter)
        results = Results("bench", machine(meter) | {"calls": calls}, ceilings)
        progress.update(bar, advance=1, description="weights")
        weights = random_weights(
            cases[0].shape(world_size), meter.group.rank, meter.device, with_bf16=options.compare
        )
        progress.advance(bar)
        for case in cases:
            progress.update(bar, description=f"{case.model}, {case.tokens} tokens")
            row, _ = measure_case(meter, case, weights, ceilings, calls)
            progress.advance(bar)
            row["rivals_us"], row["rivals_failed"] = {}, {}
            for rival in rivals:
                progress.update(bar, description=f"{rival.name}, {case.tokens} tokens")
                us, why = _time_rival(meter, case, weights, rival, calls)
                row["rivals_us"][rival.name] = us
                if why:
                    row["rivals_failed"][rival.name] = why
                progress.advance(bar)
            results.rows.append(row)
    return results


@contextlib.contextmanager
def _progress(shown: bool) -> Iterator[Progress]:
    """A bar on stderr, gone when all is done."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
        disable=not shown,
    ) as progress:
        yield progress


def _time_rival(
    meter: Meter, case: Case, weights: LayerWeights, rival: Rival, calls: int
) -> tuple[float | None, str]:
    """Latency in us, or None and why there is none. Others' code may fail in any way."""
    from megamoe_ep.measure import Tokens
    from megamoe_ep.rivals import Setting

    group = meter.group
    shape = case.shape(group.world_size)
    tokens = Tokens.draw(shape, case.tokens, case.skew, group.rank, meter.device)
    try:
        call = rival.make(Setting(shape, group.rank, weights, tokens))
        if rival.graph:
            call = meter.capture(call)
        return round(meter.median_us(call, calls), 3), ""
    except Exception as error:
        said = str(error).strip().splitlines()
        return None, f"{type(error).__name__}: {said[0] if said else 'no message'}"


# What rank 0 says


def _tell(results: Results, options: Options) -> None:
    out = console()
    about, first = results.machine, results.rows[0]
    out.print(
        f"{first['shape']} on {about['device']}, {about['ranks']} rank(s), {first['experts']} "
        f"experts in all, combine {first['combine']}, skew {first['skew']:g}, "
        f"{about['kernels']} kernels",
        highlight=False,
        soft_wrap=True,
    )
    c = results.ceilings
    out.print(
        f"ceilings: copy {_rate(c.copy_bytes_per_s)}B/s, product {_rate(c.flop_per_s)}FLOP/s, "
        f"peer {_rate(c.peer_bytes_per_s)}B/s ({c.source})",
        highlight=False,
        soft_wrap=True,
    )
    names, each = TABLE_WIDTH
    at_once = max(1, (out.width - names) // each)
    for first_column in range(0, len(results.rows), at_once):
        out.print(_table(results.rows[first_column : first_column + at_once]))
    for row in results.rows:
        for name, why in row["rivals_failed"].items():
            out.print(f"{name}, {row['tokens']} tokens: {why}", highlight=False, soft_wrap=True)
    if options.json is not None:
        results.write(options.json)
        out.print(f"figures: {options.json}", highlight=False, soft_wrap=True)
    if options.plot is not None:
        _plot(options.plot, results)
        out.print(f"latency over tokens: {options.plot}", highlight=False, soft_wrap=True)


def _table(rows: list[dict[str, Any]]) -> Table:
    from rich.table import Table

    from megamoe_ep.roofline import PHASES

    table = Table(
        caption="us; phases with their floor in brackets; of others, how many times ours they take"
    )
    table.add_column("tokens of a rank")
    for row in rows:
        table.add_column(str(row["tokens"]), justify="right")
    for phase in PHASES:
        cells = [f"{_us(r[f'{phase}_us'])} ({_us(r[f'{phase}_floor_us'])})" for r in rows]
        table.add_row(phase, *cells)
    table.add_section()
    table.add_row("layer", *(_us(r["ours_us"]) for r in rows), style="bold")
    table.add_row("floor: weights", *(_us(r["weight_floor_us"]) for r in rows))
    table.add_row("floor: FLOPs", *(_us(r["flop_floor_us"]) for r in rows))
    table.add_row("layer / floor", *(f"{r['over_floor']:.2f}" for r in rows))
    table.add_section()
    for name in rows[0]["rivals_us"]:
        took = [(r["rivals_us"][name], r["ours_us"]) for r in rows]
        table.add_row(
            name, *("failed" if us is None else f"{_us(us)} ({us / o:.2f}x)" for us, o in took)
        )
    return table


def _rate(value: float) -> str:
    return f"{value / 1e12:.3g} T" if value >= 1e12 else f"{value / 1e9:.3g} G"


def _us(value: float) -> str:
    return f"{value:.0f}" if value >= 99.95 else f"{value:.1f}"


def _plot(file: Path, results: Results) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = results.rows
    x = [row["tokens"] for row in rows]
    figure = Figure(figsize=(8.0, 5.0), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot(x, [r["ours_us"] for r in rows], "-o", label="layer")
    axes.plot(x, [r["floor_us"] for r in rows], ":", color="black", label="floor")
    for name in rows[0]["rivals_us"]:
        known = [(t, r["rivals_us"][name]) for t, r in zip(x, rows, strict=True)]
        known = [(t, us) for t, us in known if us is not None]
        if known:
            axes.plot(*zip(*known, strict=True), "--x", lw=1, ms=5, label=name)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(x, [str(t) for t in x])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    about = results.machine
    axes.set(
        title=f"{rows[0]['shape']} on {about['ranks']} x {about['device']}",
        xlabel="tokens of a rank",
        ylabel="latency, us",
    )
    axes.legend(fontsize=8)
    figure.savefig(file, dpi=150)
