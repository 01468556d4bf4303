"""``megamoe-ep demo``: the layer over several ranks, checked against the oracle and one rank."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple, cast, get_args

import typer

from megamoe_ep.cli.report import bytes_text, check_plot, console, errors_end_the_command
from megamoe_ep.errors import ArgumentError, check_timeout

if TYPE_CHECKING:
    import torch

    from megamoe_ep.bootstrap import Group
    from megamoe_ep.moe import CombineMode
    from megamoe_ep.shape import LayerShape

ERROR_LIMIT = 5e-3  # relative L2 against the oracle
DEFAULT_RANKS = 4
# The layer that is made up when no checkpoint is given.
HIDDEN, INTERMEDIATE, MIN_EXPERTS = 512, 256, 32
SEED = 2026
JOB_TIMEOUT_S = 3600.0  # of everything, the oracle on a CPU included; the waits have their own

Traffic = list[list[int]]  # bytes from rank (row) to rank (column)


def demo(
    ranks: Annotated[
        int | None,
        typer.Option(
            help=f"Ranks to start on this machine ({DEFAULT_RANKS} if not said). Under torchrun or "
            f"mpirun: how many they must have started.",
            min=1,
        ),
    ] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            help="NVFP4 checkpoint of ModelOpt or compressed-tensors, a safetensors file or a "
            "folder; else one is made up."
        ),
    ] = None,
    layer: Annotated[
        int | None, typer.Option(help="Layer of the checkpoint, by its index in the model.", min=0)
    ] = None,
    tokens: Annotated[
        int, typer.Option(help="Tokens of rank 0; the others bring fewer, the last none.", min=1)
    ] = 64,
    top_k: Annotated[int, typer.Option(help="Experts of a token.", min=1)] = 6,
    combine: Annotated[
        str, typer.Option(help="exact: the same bits at every number of ranks. fast: fewer bytes.")
    ] = "exact",
    timeout: Annotated[
        float, typer.Option(help="Deadline of every wait for another rank, in seconds.")
    ] = 60.0,
    device: Annotated[
        str | None, typer.Option(help="cpu or cuda; if not said, cuda where there is a GPU.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Picture of the bytes between ranks to write, a .png.")
    ] = None,
) -> None:
    """Runs the layer over several ranks and checks what comes out.

    Starts the ranks itself, or joins those that torchrun or mpirun started. Exit status 0 says that
    the output is right: near the oracle, and with the bits of a single rank.
    """
    with errors_end_the_command():
        from megamoe_ep.bootstrap import detect_launcher

        options = Options(
            ranks, checkpoint, layer, tokens, top_k, combine, timeout, device, plot
        ).checked()
        launched = detect_launcher(os.environ) is not None
    if launched:
        raise typer.Exit(_join(options))
    with errors_end_the_command():
        code = _start(options)
    raise typer.Exit(code)


@dataclass(frozen=True)
class Options:
    """What was asked for; see ``demo``."""

    ranks: int | None
    checkpoint: Path | None
    layer: int | None
    tokens: int
    top_k: int
    combine: str
    timeout: float
    device: str | None
    plot: Path | None

    def checked(self) -> Options:
        """Itself, or ArgumentError for what can be told wrong before any rank is started."""
        from megamoe_ep.moe import CombineMode

        if (self.checkpoint is None) != (self.layer is None):
            raise ArgumentError(
                f"--checkpoint and --layer must be given together; got {self.checkpoint} and "
                f"{self.layer}."
            )
        if self.combine not in get_args(CombineMode):
            raise ArgumentError(f"--combine must be exact or fast; got {self.combine!r}.")
        check_timeout(self.timeout, "--timeout")
        if self.device not in (None, "cpu", "cuda"):
            raise ArgumentError(f"--device must be cpu or cuda; got {self.device!r}.")
        if self.plot is not None:
            check_plot(self.plot)
        return self

    def argv(self) -> list[str]:
        """The same again, for a rank."""
        argv = ["demo", "--tokens", str(self.tokens), "--top-k", str(self.top_k)]
        argv += ["--combine", self.combine, "--timeout", str(self.timeout)]
        for name in ("checkpoint", "layer", "device", "plot"):
            value = getattr(self, name)
            if value is not None:
                argv += [f"--{name}", str(value)]
        return argv


# Starting the ranks


def _start(options: Options) -> int:
    """Starts the ranks on this machine; the exit status."""
    from megamoe_ep.bootstrap import Group, spawn_ranks

    world_size = options.ranks or DEFAULT_RANKS
    # These raise here, and once, what every rank would raise.
    Group.of(None, device=options.device)
    layer_shape(options, world_size)
    # What the ranks leave behind when they are killed goes with this folder.
    with tempfile.TemporaryDirectory(prefix="megamoe-ep-") as folder:
        codes = spawn_ranks(
            [sys.executable, "-m", "megamoe_ep.cli", *options.argv()],
            world_size,
            timeout_s=JOB_TIMEOUT_S,
            environment={"TMPDIR": folder},
        )
    failed = {rank: code for rank, code in enumerate(codes) if code}
    if failed:
        said = ", ".join(f"rank {rank}: {code}" for rank, code in failed.items())
        print(f"Exit status by rank, of those that failed: {said}", file=sys.stderr)
        return 1
    return 0


def _join(options: Options) -> int:
    """Does the work of the rank that this process is; the exit status, the same on every rank."""
    from megamoe_ep.bootstrap import Group

    with errors_end_the_command():
        group = Group.from_environment(device=options.device, timeout_s=options.timeout)
    with errors_end_the_command(group.rank):
        if options.ranks not in (None, group.world_size):
            raise ArgumentError(
                f"--ranks must be the number of ranks that were launched, {group.world_size}, or "
                f"be left out; got {options.ranks}."
            )
        return _run(options, group)


# The run


class Report(NamedTuple):
    """What one rank tells rank 0."""

    device: str
    tokens: int
    rows_received: int
    seconds: dict[str, float]  # by phase
    repeatable: bool  # two calls gave the same bits
    y: torch.Tensor  # bf16 [n, H], on the CPU


def _run(options: Options, group: Group) -> int:
    from megamoe_ep.moe import MegaMoE
    from megamoe_ep.timing import PhaseTimer

    shape = layer_shape(options, group.world_size)
    with _folder_of(options, group, shape) as (path, layer):
        moe = MegaMoE.from_checkpoint(
            path,
            layer=layer,
            max_num_tokens=shape.max_num_tokens,
            top_k=options.top_k,
            group=group,
            combine=cast("CombineMode", options.combine),
            device=group.device,
            timeout_s=options.timeout,
        )
        with moe.buffer as buffer:
            inputs = [t.to(group.device) for t in inputs_of(shape, group.rank, options.tokens)]
            first = moe(*inputs)
            group.barrier()
            timer = PhaseTimer(group.device)
            y = moe(*inputs, timer=timer)
            buffer.check()
            mine = Report(
                str(group.device),
                len(y),
                int(buffer.workspace.expert_offsets[-1]),
                timer.seconds(),
                same_bits(first, y),
                y.cpu(),
            )
            reports: list[Report] = group.all_gather_object(mine)
        right = None
        if group.rank == 0:
            right = _verify(options, group, shape, path, layer, reports)
        return 0 if group.broadcast_object(right, timeout_s=JOB_TIMEOUT_S) else 1


def made_up_experts(top_k: int, world_size: int) -> int:
    """How many a made-up layer has: as many on each rank."""
    return -(-max(MIN_EXPERTS, top_k) // world_size) * world_size


def layer_shape(options: Options, world_size: int) -> LayerShape:
    """Of the checkpoint's layer, or of the one that is made up."""
    from megamoe_ep.shape import LayerShape
    from megamoe_ep.weights import LayerSize, describe_layer

    if options.checkpoint is not None and options.layer is not None:
        size = describe_layer(options.checkpoint, options.layer)
    else:
        size = LayerSize(made_up_experts(options.top_k, world_size), HIDDEN, INTERMEDIATE)
    if options.top_k > size.num_experts:
        raise ArgumentError(
            f"--top-k must be at most the layer's {size.num_experts} experts; got {options.top_k}."
        )
    return LayerShape(
        size.num_experts,
        options.tokens,
        options.top_k,
        size.hidden_size,
        size.intermediate_size,
        world_size,
    )


@contextlib.contextmanager
def _folder_of(options: Options, group: Group, shape: LayerShape) -> Iterator[tuple[Path, int]]:
    """Path and layer of the checkpoint; a made-up one is written once on each machine."""
    if options.checkpoint is not None and options.layer is not None:
        yield options.checkpoint, options.layer
        return
    from megamoe_ep.weights import random_experts, write_modelopt_checkpoint

    with contextlib.ExitStack() as stack:
        written = None
        if group.local_rank == 0:
            written = stack.enter_context(tempfile.TemporaryDirectory(prefix="megamoe-ep-demo-"))
            experts = random_experts(
                shape.num_experts, shape.hidden_size, shape.intermediate_size, seed=SEED
            )
            write_modelopt_checkpoint(written, 0, experts, num_files=2)
        boot_id = group.places[group.rank].boot_id
        folders = group.all_gather_object((boot_id, written))
        folder = next(folder for machine, folder in folders if machine == boot_id and folder)
        yield Path(folder), 0


def tokens_of(rank: int, world_size: int, tokens: int) -> int:
    """How many tokens a rank brings: fewer the higher it is, and the last of several none."""
    if rank and rank == world_size - 1:
        return 0
    return tokens * (world_size - rank) // world_size


def inputs_of(
    shape: LayerShape, rank: int, tokens: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens of a rank, on the CPU: x bf16 [n, H], topk_idx int32 [n, K], topk_weights fp32 [n, K].

    Some experts are sought after more than others, as with a trained router.
    """
    import torch

    popularity = torch.randn(shape.num_experts, generator=torch.Generator().manual_seed(SEED))
    generator = torch.Generator().manual_seed(SEED + 1 + rank)
    n = tokens_of(rank, shape.world_size, tokens)
    x = torch.randn(n, shape.hidden_size, generator=generator).bfloat16()
    logits = torch.randn(n, shape.num_experts, generator=generator) + 0.5 * popularity
    best, topk_idx = logits.topk(shape.top_k, dim=1)
    return x, topk_idx.int(), best.softmax(dim=1)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    import torch

    return torch.equal(a.view(torch.int16), b.view(torch.int16))


# What rank 0 does with it


def _verify(
    options: Options,
    group: Group,
    shape: LayerShape,
    path: Path,
    layer: int,
    reports: list[Report],
) -> bool:
    import torch

    from megamoe_ep import reference
    from megamoe_ep.bootstrap import Group
    from megamoe_ep.moe import MegaMoE
    from megamoe_ep.roofline import Load, bytes_put
    from megamoe_ep.weights import read_modelopt_experts

    inputs = [inputs_of(shape, rank, options.tokens) for rank in range(group.world_size)]
    ids = [topk_idx for _, topk_idx, _ in inputs]
    everyone = [torch.cat(parts).to(group.device) for parts in zip(*inputs, strict=True)]
    y = torch.cat([report.y for report in reports])

    experts = read_modelopt_experts(path, layer, range(shape.num_experts), device=group.device)
    oracle = reference.moe_layer(everyone[0], everyone[1], everyone[2], experts)
    error = reference.relative_l2_error(y, oracle.cpu())

    alone = MegaMoE.from_checkpoint(
        path,
        layer=layer,
        max_num_tokens=len(y),
        top_k=options.top_k,
        group=Group.of(None, device=group.device),
        combine="exact",
        device=group.device,
        timeout_s=options.timeout,
    )
    with alone.buffer as buffer:
        one_rank = alone(*everyone)
        buffer.check()
    repeatable = all(report.repeatable for report in reports)
    equal = same_bits(y, one_rank.cpu())

    put = bytes_put(shape, Load.of(shape, ids), options.combine)
    dispatched, combined = put["dispatch"], put["combine"]
    total = [
        [a + b for a, b in zip(*rows, strict=True)]
        for rows in zip(dispatched, combined, strict=True)
    ]
    out = console()
    out.print(
        f"Layer {layer} of {options.checkpoint or 'a made-up checkpoint'}: "
        f"{shape.num_experts} experts, "
        f"hidden {shape.hidden_size}, intermediate {shape.intermediate_size}, "
        f"top-k {shape.top_k}, combine {options.combine}, {shape.world_size} rank(s)",
        highlight=False,
        soft_wrap=True,
    )
    _print_table(reports, total)
    out.print(
        f"relative L2 error against the oracle: {error:.2e} (limit {ERROR_LIMIT:.0e})",
        highlight=False,
    )
    out.print(f"bits equal from call to call: {_yes(repeatable)}", highlight=False)
    if options.combine == "exact":
        out.print(f"bits equal to one rank: {_yes(equal)}", highlight=False)
    else:
        out.print("bits equal to one rank: not promised by combine fast", highlight=False)
    if options.plot is not None:
        _plot(options.plot, {"dispatch": dispatched, "combine": combined})
        out.print(f"bytes between ranks: {options.plot}", highlight=False, soft_wrap=True)
    return error < ERROR_LIMIT and repeatable and (equal or options.combine == "fast")


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _print_table(reports: list[Report], total: Traffic) -> None:
    """One line a rank, in no more than the 80 columns of a terminal as it comes."""
    from rich import box
    from rich.table import Table

    phases = list(reports[0].seconds)
    table = Table(
        box=box.SIMPLE,
        padding=0,
        caption="sent, received: to and from other ranks; phases in ms, waiting included",
    )
    for name in ("rank", "device", "tokens", "rows", "sent", "received", *phases):
        table.add_column(name, justify="left" if name == "device" else "right", no_wrap=True)
    for rank, report in enumerate(reports):
        sent = sum(total[rank]) - total[rank][rank]
        received = sum(row[rank] for row in total) - total[rank][rank]
        table.add_row(
            str(rank),
            report.device,
            str(report.tokens),
            str(report.rows_received),
            bytes_text(sent),
            bytes_text(received),
            *(f"{1e3 * report.seconds[phase]:.2f}" for phase in phases),
        )
    console().print(table)


def _plot(file: Path, matrices: dict[str, Traffic]) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    world_size = len(next(iter(matrices.values())))
    figure = Figure(figsize=(5.0 * len(matrices), 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    highest = max(max(map(max, matrix)) for matrix in matrices.values())
    for i, (phase, matrix) in enumerate(matrices.items()):
        axes = figure.add_subplot(1, len(matrices), i + 1)
        image = axes.imshow(matrix, vmin=0, vmax=highest, cmap="viridis")
        axes.set(title=phase, xlabel="to rank", ylabel="from rank")
        axes.set_xticks(range(world_size))
        axes.set_yticks(range(world_size))
        if world_size <= 16:
            for source in range(world_size):
                for target in range(world_size):
                    nbytes = matrix[source][target]
                    axes.text(
                        target,
                        source,
                        bytes_text(nbytes),
                        ha="center",
                        va="center",
                        fontsize=8,
                        color="black" if nbytes > 0.6 * highest else "white",
                    )
    figure.colorbar(
        image, ax=figure.axes, label="in one call", format=lambda nbytes, _: bytes_text(nbytes)
    )
    figure.savefig(file, dpi=150)
