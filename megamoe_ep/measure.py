"""How a layer is measured: its ranks together, its inputs, its weights, its time by phase.

Latency is the longest over the ranks, the median over calls. Before each call every rank has
flushed its GPU's L2 cache and met the others. On GPUs a call is one CUDA graph, staging included.
"""

from __future__ import annotations

import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from megamoe_ep import nvfp4
from megamoe_ep.bootstrap import Group, detect_launcher
from megamoe_ep.errors import ArgumentError
from megamoe_ep.kernels import comm_kernels, gemm_kernels, homes_of, weight_layout
from megamoe_ep.roofline import PHASES, Ceilings, Load, layer_floor, phase_floors, steps, wire_bytes
from megamoe_ep.shape import LayerShape
from megamoe_ep.symm_buffer import SymmBuffer
from megamoe_ep.timing import PhaseTimer
from megamoe_ep.weights import KernelWeights, transform_weights_for_nvfp4_mega_moe

CALLS = 25
WARM_UPS = 4
# Twenty times an L2, so that reading it takes longer than the host needs to launch what follows.
L2_FLUSH_BYTES = 1 << 30

Call = Callable[[], Any]


class ModelShape(NamedTuple):
    """One MoE layer of a model."""

    num_experts: int
    top_k: int
    hidden_size: int
    intermediate_size: int
    rank_experts: int  # a rank's share where its load is fixed, and not the model

    def layer(self, num_experts: int, tokens: int, world_size: int) -> LayerShape:
        return LayerShape(
            num_experts, tokens, self.top_k, self.hidden_size, self.intermediate_size, world_size
        )


MODELS = {
    "dsv3": ModelShape(256, 8, 7168, 2048, 32),
    "flash": ModelShape(256, 6, 4096, 2048, 32),
    "pro": ModelShape(384, 6, 7168, 3072, 48),
    "qwen3-235b": ModelShape(128, 8, 4096, 1536, 16),
    "tiny": ModelShape(16, 2, 256, 128, 4),
}


def model_shape(text: str) -> ModelShape:
    """One of ``MODELS`` by its name, or sizes as HIDDEN/INTERMEDIATE/EXPERTS/TOP_K, with the
    experts of one rank.

    Raises:
        ArgumentError: ``text`` is neither.
    """
    if text in MODELS:
        return MODELS[text]
    parts = text.split("/")
    if len(parts) != 4 or not all(part.isdecimal() and int(part) for part in parts):
        raise ArgumentError(
            f"a shape must be one of {', '.join(MODELS)}, or HIDDEN/INTERMEDIATE/EXPERTS/TOP_K; "
            f"got {text!r}."
        )
    hidden, intermediate, experts, top_k = map(int, parts)
    return ModelShape(experts, top_k, hidden, intermediate, experts)


# Ranks that measure together


@contextmanager
def ranks(device: str | None = None, timeout_s: float = 120.0) -> Iterator[Meter]:
    """The ranks that torchrun or mpirun started on this machine, or a lone one, ready to measure.

    Raises:
        BootstrapError: see ``Group.from_environment``.
    """
    group = Group.from_environment(device=device, timeout_s=timeout_s)
    if not group.on_one_machine:
        raise ArgumentError(
            f"the ranks that measure must be on one machine; got {group.world_size} ranks, "
            f"{group.local_world_size} of them here."
        )
    gpu = group.device.type == "cuda"
    if gpu:
        torch.cuda.set_device(group.device)
    if group.rank == 0:
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        group.broadcast_object(store.port)
    else:
        store = TCPStore("127.0.0.1", group.broadcast_object(None), is_master=False)
    dist.init_process_group(
        "nccl" if gpu else "gloo",
        store=store,
        rank=group.rank,
        world_size=group.world_size,
        device_id=group.device if gpu else None,
        timeout=timedelta(seconds=timeout_s),
    )
    try:
        yield Meter(group)
        dist.barrier()
    finally:
        dist.destroy_process_group()


class Meter:
    """Times calls that all ranks make together. torch.distributed is initialised over them."""

    def __init__(self, group: Group) -> None:
        self.group = group
        self.device = group.device
        self._gpu = self.device.type == "cuda"
        nbytes = L2_FLUSH_BYTES if self._gpu else 0
        self._flush = torch.empty(nbytes // 4, dtype=torch.int32, device=self.device)
        self._meeting = torch.zeros(1, device=self.device)

    @property
    def device_name(self) -> str:
        if self._gpu:
            return torch.cuda.get_device_name(self.device)
        return platform.processor() or platform.machine()

    def meet(self) -> None:
        self._flush.sum()  # only read: what was written would have to be written back in the call
        dist.all_reduce(self._meeting)

    def times_us(self, call: Call, calls: int = CALLS) -> list[float]:
        """Duration of each call, the longest over the ranks, after some that do not count."""
        for _ in range(WARM_UPS):
            self.meet()
            call()
        clock = PhaseTimer(self.device)
        names = [str(number) for number in range(calls)]
        for name in names:
            self.meet()
            with clock.measure(name):
                call()
        seconds = clock.seconds()
        return self.over_ranks([seconds[name] * 1e6 for name in names])

    def median_us(self, call: Call, calls: int = CALLS) -> float:
        return statistics.median(self.times_us(call, calls))

    def over_ranks(self, values: list[float]) -> list[float]:
        """The largest of each value over the ranks."""
        tensor = torch.tensor(values, device=self.device, dtype=torch.float64)
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return list(tensor.tolist())

    def capture(self, call: Call) -> Call:
        """``call`` as one CUDA graph, to be replayed."""
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            call()
        stream.synchronize()
        dist.barrier()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            call()
        return graph.replay


# What is measured


@dataclass(frozen=True)
class LayerWeights:
    """One rank's experts, transformed for its device."""

    l1: KernelWeights
    l2: KernelWeights
    l1_alpha: torch.Tensor  # fp32 [L, 2]
    l2_alpha: torch.Tensor  # fp32 [L]
    l2_input_scale: torch.Tensor  # fp32 [L]
    w13: torch.Tensor | None = None  # bf16 [L, H, 2I], what others multiply with
    w2: torch.Tensor | None = None  # bf16 [L, I, H]


def random_weights(
    shape: LayerShape, rank: int, device: torch.device, *, with_bf16: bool = False
) -> LayerWeights:
    """Normal weights of variance 1/K, drawn and quantised on ``device``, expert by expert."""
    draw = torch.Generator(device=device).manual_seed(rank)
    experts, h, i = shape.experts_per_rank, shape.hidden_size, shape.intermediate_size
    matrices: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    scale_2: dict[str, list[torch.Tensor]] = {}
    values: dict[str, torch.Tensor] = {}
    for name, n, k in (("13", 2 * i, h), ("2", h, i)):
        codes = torch.empty(experts, n, k // 2, dtype=torch.uint8, device=device)
        scales = torch.empty(experts, n, k // 16, dtype=torch.float8_e4m3fn, device=device)
        if with_bf16:
            values[name] = torch.empty(experts, k, n, dtype=torch.bfloat16, device=device)
        for expert in range(experts):
            weight = torch.randn(n, k, generator=draw, device=device) / k**0.5
            q = nvfp4.quantize(weight, nvfp4.global_scale_from_amax(weight.abs().amax()))
            codes[expert], scales[expert] = q.codes, q.scales
            scale_2.setdefault(name, []).append(q.global_scale)
            if with_bf16:
                values[name][expert] = nvfp4.dequantize(*q).bfloat16().t()
        matrices[name] = codes, scales
    l1, l2 = transform_weights_for_nvfp4_mega_moe(matrices["13"], matrices["2"], device=device)
    input_scale = torch.full((experts,), 20 / (6 * 448), device=device)  # h up to 20
    return LayerWeights(
        l1,
        l2,
        torch.stack(scale_2["13"])[:, None].expand(-1, 2).contiguous(),
        torch.stack(scale_2["2"]) * input_scale,
        input_scale,
        values.get("13"),
        values.get("2"),
    )


def route(
    num_tokens: int, num_experts: int, top_k: int, skew: float, draw: torch.Generator
) -> torch.Tensor:
    """Distinct experts of each token, int32 [n, K]: uniform, but for expert 0 with ``skew`` times
    the mean rows (or all tokens, if that is less).

    Raises:
        ArgumentError: there are fewer experts than slots.
    """
    if top_k > num_experts:
        raise ArgumentError(
            f"top_k must be at most the number of experts, where a token's are to be distinct; got "
            f"{top_k} of {num_experts}."
        )
    scores = torch.rand(num_tokens, num_experts, generator=draw, device=draw.device)
    if skew != 1:
        often = min(1.0, skew * top_k / num_experts)
        hot = torch.rand(num_tokens, generator=draw, device=draw.device) < often
        scores[:, 0] = torch.where(hot, 2.0, -1.0)
    return scores.topk(top_k).indices.int()


@dataclass(frozen=True)
class Tokens:
    """What one rank brings to a call."""

    x: torch.Tensor  # bf16 [n, H]
    topk_idx: torch.Tensor  # int32 [n, K]
    topk_weights: torch.Tensor  # fp32 [n, K], sums to 1 over K

    @classmethod
    def draw(
        cls, shape: LayerShape, n: int, skew: float, rank: int, device: torch.device
    ) -> Tokens:
        draw = torch.Generator(device=device).manual_seed(100 + rank)
        x = torch.randn(n, shape.hidden_size, generator=draw, device=device).bfloat16()
        ids = route(n, shape.num_experts, shape.top_k, skew, draw)
        weights = torch.rand(n, shape.top_k, generator=draw, device=device)
        return cls(x, ids, weights / weights.sum(1, keepdim=True))


def layer_steps(
    buffer: SymmBuffer,
    tokens: Tokens,
    weights: LayerWeights | None,
    y: torch.Tensor,
    combine: str,
) -> dict[str, Call]:
    """The phases of one call, to be called in their order; no GEMMs without ``weights``."""
    comm, work = comm_kernels(buffer.device), buffer.workspace
    gemm = gemm_kernels("portable" if weights is None else weights.l1.layout)
    n, homes = len(tokens.x), None
    found: dict[str, Call] = {
        "stage": lambda: comm.stage(tokens.x, tokens.topk_idx, tokens.topk_weights, buffer, n),
        "dispatch": lambda: comm.dispatch(buffer, combine=combine, columns=gemm.COLUMNS),
    }
    if weights is not None:
        found["l1"] = lambda: gemm.l1(
            work.rows,
            work.row_scales,
            work.expert_offsets,
            weights.l1,
            weights.l1_alpha,
            input_scale=weights.l2_input_scale,
            clamp=None,
            out=work.h,
        )
        homes = homes_of(buffer, weights.l2.layout, combine)
        found["l2"] = lambda: gemm.l2(
            work.h, work.expert_offsets, weights.l2, weights.l2_alpha, out=work.rows, homes=homes
        )
    sent = homes is not None
    found["combine"] = lambda: comm.combine(y, buffer, combine=combine, rows_are_home=sent)
    return found


def phase_times_us(
    meter: Meter, calls_of: dict[str, Call], calls: int = CALLS, *, graphs: bool
) -> tuple[float, dict[str, float]]:
    """Latency of all phases in one call, and of each.

    With ``graphs`` a call is a CUDA graph, and a phase the difference between the graph that ends
    with it and the one that ends before it; else it is measured on its own within the call.
    """
    names = list(calls_of)

    def run(until: int) -> None:
        for name in names[:until]:
            calls_of[name]()

    if graphs:
        ends = []
        for until in range(1, len(names) + 1):
            # The ranks meet between calls, so a call may end before its combine.
            graph = meter.capture(lambda until=until: run(until))  # type: ignore[misc]
            ends.append(meter.median_us(graph, calls))
        return ends[-1], dict(zip(names, _differences(ends), strict=True))
    total = meter.median_us(lambda: run(len(names)), calls)
    spent: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(calls):
        meter.meet()
        timer = PhaseTimer(meter.device)
        for name in names:
            with timer.measure(name):
                calls_of[name]()
        longest = meter.over_ranks([s * 1e6 for s in timer.seconds().values()])
        for name, us in zip(names, longest, strict=True):
            spent[name].append(us)
    return total, {name: statistics.median(times) for name, times in spent.items()}


def _differences(ends: list[float]) -> list[float]:
    return [end - before for before, end in zip([0.0, *ends], ends, strict=False)]


Mode = Literal["weak", "strong"]


@dataclass(frozen=True)
class Case:
    """One point of a curve.

    weak: ``tokens`` on every rank, and ``rank_experts`` experts; strong: ``tokens`` on all ranks
    together, and the model's experts. ``model`` is as in ``model_shape``, the skew the hottest
    expert's rows over the mean; what it comes to is in the results, since an expert can get no more
    than every token.
    """

    model: str
    mode: Mode
    tokens: int
    combine: str
    skew: float = 1.0

    def shape(self, world_size: int) -> LayerShape:
        """Sizes of the layer on so many ranks.

        Raises:
            ArgumentError: the model's experts are not a multiple of the ranks.
        """
        model = model_shape(self.model)
        if self.mode == "weak":
            return model.layer(model.rank_experts * world_size, self.tokens, world_size)
        return model.layer(model.num_experts, max(self.tokens_of(world_size)), world_size)

    def tokens_of(self, world_size: int) -> list[int]:
        """Tokens of each rank."""
        if self.mode == "weak":
            return [self.tokens] * world_size
        each, left = divmod(self.tokens, world_size)
        return [each + (rank < left) for rank in range(world_size)]


def measure_case(
    meter: Meter,
    case: Case,
    weights: LayerWeights,
    ceilings: Ceilings,
    calls: int = CALLS,
    by_phase: bool = True,
) -> tuple[dict[str, Any], torch.Tensor]:
    """Measures one point, on all ranks at once; a row for the results, and this rank's output.

    Args:
        weights: this rank's, of ``case.shape``.
        by_phase: measure the phases too.

    Raises:
        HeapError, HeapTooSmallError: see ``SymmBuffer``.
        PeerTimeoutError: a rank is missing.
    """
    group = meter.group
    shape, counts = case.shape(group.world_size), case.tokens_of(group.world_size)
    tokens = Tokens.draw(shape, counts[group.rank], case.skew, group.rank, meter.device)
    y = torch.empty_like(tokens.x)
    with SymmBuffer(group, shape, device=meter.device, timeout_s=group.timeout_s) as buffer:
        calls_of = layer_steps(buffer, tokens, weights, y, case.combine)
        graphs = weights.l1.layout != "portable"  # the portable kernels read the device
        phases: dict[str, float] = {}
        if by_phase:
            ours_us, phases = phase_times_us(meter, calls_of, calls, graphs=graphs)
        else:
            run = lambda: [call() for call in calls_of.values()]  # noqa: E731
            ours_us = meter.median_us(meter.capture(run) if graphs else run, calls)
        buffer.check()
        stores_home = homes_of(buffer, weights.l2.layout, case.combine) is not None
    load = Load.of(shape, group.all_gather_object(tokens.topk_idx.cpu()))
    return result_row(case, shape, load, ceilings, ours_us, phases, stores_home=stores_home), y


def result_row(
    case: Case,
    shape: LayerShape,
    load: Load,
    ceilings: Ceilings,
    ours_us: float,
    phases_us: dict[str, float],
    *,
    stores_home: bool = False,
) -> dict[str, Any]:
    """What is written of one point; ``stores_home`` as for ``roofline.steps``."""
    floor = layer_floor(shape, load, ceilings)
    floors = phase_floors(shape, load, case.combine, ceilings, stores_home=stores_home)
    put = {"dispatch": torch.zeros_like(load.sent), "combine": torch.zeros_like(load.sent)}
    for step in steps(shape, load, case.combine):
        if step.phase in put:
            put[step.phase] = put[step.phase] + step.put
    row: dict[str, Any] = {
        "shape": case.model,
        "mode": case.mode,
        "ranks": shape.world_size,
        "experts": shape.num_experts,
        "tokens": case.tokens,
        "tokens_per_rank": shape.max_num_tokens,
        "combine": case.combine,
        "skew": case.skew,
        "rows_busiest_rank": int(load.busiest_rows),
        "experts_hit": int(load.experts_hit.max()),
        "hottest_over_mean": float(load.expert_rows.max() / load.expert_rows.double().mean()),
        "ours_us": ours_us,
        **{f"{phase}_us": us for phase, us in phases_us.items()},
        **{f"{phase}_floor_us": floors[phase] * 1e6 for phase in PHASES},
        **{f"{phase}_wire_bytes": int(wire_bytes(p)) for phase, p in put.items()},
        "weight_floor_us": floor.weights_s * 1e6,
        "flop_floor_us": floor.flops_s * 1e6,
        "floor_us": floor.seconds * 1e6,
        "over_floor": ours_us / (floor.seconds * 1e6) if floor.seconds else None,
        "tflops": 6
        * load.busiest_rows
        * shape.hidden_size
        * shape.intermediate_size
        / ours_us
        / 1e6,
    }
    return {k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}


def machine(meter: Meter) -> dict[str, Any]:
    """What a result file says of where it comes from."""
    nccl: tuple[int, ...] | None = None
    if meter.device.type == "cuda":
        nccl = torch.cuda.nccl.version()  # type: ignore[no-untyped-call]
    return {
        "device": meter.device_name,
        "ranks": meter.group.world_size,
        "launcher": detect_launcher(os.environ) or "alone",
        "kernels": weight_layout(meter.device),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "nccl": ".".join(map(str, nccl)) if nccl else None,
        "python": platform.python_version(),
        "command": _command(),
        "commit": _commit(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "calls": CALLS,
    }


def _command() -> str:
    first = Path(sys.argv[0])
    return shlex.join([first.name if first.is_absolute() else str(first), *sys.argv[1:]])


def _commit() -> str | None:
    """The commit of this package's checkout; "+" after it where tracked files differ from it."""
    here = Path(__file__).parent
    git = ["git", "-C", str(here)]
    try:
        head = subprocess.run(
            [*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True
        )
        if head.returncode:
            return None
        dirty = subprocess.run([*git, "diff", "--quiet", "HEAD"], capture_output=True)
    except OSError:
        return None
    return head.stdout.strip() + ("+" if dirty.returncode else "")
