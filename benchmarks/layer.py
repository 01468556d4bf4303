"""What does the whole layer cost, end to end and by phase, against what a user writes today?

    torchrun --nproc-per-node 2 benchmarks/layer.py --case dsv3:128:fast --case flash:64:exact
    mpirun -n 2 python benchmarks/layer.py --case dsv3:8192:fast:4

A case is shape:tokens per rank:combine[:skew]; skew is the hottest expert's load over the mean one.

Latency is the maximum over ranks, the median over calls; before each call the L2 cache is flushed
and all ranks meet. Ours is one CUDA graph, staging included. A phase is the difference between the
graph that ends with it and the one that ends before it. The rival is NCCL all-to-all and
torch._grouped_mm in bf16, the faster of two: each token sent once to each rank that needs it, or
once for each of its experts.

Floors, from rates measured in the same run: reading the NVFP4 weights of the experts that have
rows, and 6 * rows * H * I operations at cuBLAS's bf16 rate, both on the busiest rank.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megamoe_ep import nvfp4
from megamoe_ep.bootstrap import Group
from megamoe_ep.kernels import comm_kernels, gemm_kernels, weight_layout
from megamoe_ep.shape import LayerShape
from megamoe_ep.symm_buffer import SymmBuffer
from megamoe_ep.weights import KernelWeights, transform_weights_for_nvfp4_mega_moe

CALLS = 25
WARM_UPS = 4
L2_FLUSH_BYTES = 128 << 20
PHASES = ("stage", "dispatch", "l1", "l2", "combine")

# experts of one rank, top-k, hidden, intermediate
SHAPES = {
    "dsv3": (32, 8, 7168, 2048),
    "flash": (32, 6, 4096, 2048),
    "pro": (48, 6, 7168, 3072),
    "tiny": (4, 2, 256, 128),
}


@dataclass(frozen=True)
class Case:
    shape: str
    tokens_per_rank: int
    combine: str
    skew: float

    @classmethod
    def parse(cls, text: str) -> Case:
        shape, tokens, combine, *skew = text.split(":")
        if shape not in SHAPES or combine not in ("exact", "fast"):
            raise argparse.ArgumentTypeError(
                f"a case must be SHAPE:TOKENS:exact|fast[:SKEW] with a shape of {list(SHAPES)}; "
                f"got {text!r}."
            )
        return cls(shape, int(tokens), combine, float(skew[0]) if skew else 1.0)


@dataclass
class Bench:
    """This rank, and how it measures together with the others."""

    group: Group

    def __post_init__(self) -> None:
        self.device = self.group.device
        self.flush = torch.empty(L2_FLUSH_BYTES // 4, dtype=torch.int32, device=self.device)
        self.meeting = torch.zeros(1, device=self.device)

    def times_us(self, call: Callable[[], Any], calls: int = CALLS) -> list[float]:
        """Duration of each call, the longest over the ranks."""
        for _ in range(WARM_UPS):
            self._meet()
            call()
        events = []
        for _ in range(calls):
            self._meet()
            pair = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            pair[0].record()
            call()
            pair[1].record()
            events.append(pair)
        torch.cuda.synchronize()
        times = torch.tensor([a.elapsed_time(b) * 1e3 for a, b in events], device=self.device)
        dist.all_reduce(times, dist.ReduceOp.MAX)
        return times.tolist()

    def median_us(self, call: Callable[[], Any], calls: int = CALLS) -> float:
        return statistics.median(self.times_us(call, calls))

    def _meet(self) -> None:
        self.flush.add_(1)
        dist.all_reduce(self.meeting)

    def over_ranks(self, value: float, op: dist.ReduceOp.RedOpType = dist.ReduceOp.MAX) -> float:
        tensor = torch.tensor([float(value)], device=self.device, dtype=torch.float64)
        dist.all_reduce(tensor, op)
        return float(tensor)


def rates(bench: Bench, peer_memory: torch.Tensor | None) -> dict[str, float]:
    """Measured ceilings: device copy in B/s, cuBLAS bf16 in FLOP/s, SM stores to a peer in B/s."""
    source = torch.randint(0, 100, (1 << 28,), dtype=torch.int32, device=bench.device)
    target = torch.empty_like(source)
    copy = 2 * source.nbytes / bench.median_us(lambda: target.copy_(source), 10) * 1e6
    a, b = (torch.randn(8192, 8192, device=bench.device).bfloat16() for _ in range(2))
    flops = 2 * 8192**3 / bench.median_us(lambda: a @ b, 10) * 1e6
    found = {"copy_bytes_per_s": copy, "cublas_flop_per_s": flops}
    if peer_memory is not None:
        there = peer_memory.view(torch.int32)[: 1 << 26]
        here = source[: len(there)]
        us = bench.median_us(lambda: torch.add(here, 1, out=there), 10)
        found["sm_store_bytes_per_s"] = here.nbytes / us * 1e6
    return found


@dataclass
class Weights:
    l1: KernelWeights
    l2: KernelWeights
    l1_alpha: torch.Tensor
    l2_alpha: torch.Tensor
    l2_input_scale: torch.Tensor
    w13: torch.Tensor  # bf16 [L, H, 2I]: what the rival multiplies with
    w2: torch.Tensor  # bf16 [L, I, H]


def make_weights(shape: LayerShape, rank: int, device: torch.device) -> Weights:
    draw = torch.Generator(device=device).manual_seed(rank)
    local, h, i = shape.experts_per_rank, shape.hidden_size, shape.intermediate_size
    quantised: dict[str, list[torch.Tensor]] = {}
    for _ in range(local):
        for name, n, k in (("13", 2 * i, h), ("2", h, i)):
            weight = torch.randn(n, k, generator=draw, device=device) / k**0.5
            q = nvfp4.quantize(weight, nvfp4.global_scale_from_amax(weight.abs().amax()))
            values = nvfp4.dequantize(*q).bfloat16().t().contiguous()
            parts = {
                "codes": q.codes,
                "scales": q.scales,
                "scale_2": q.global_scale,
                "bf16": values,
            }
            for part, tensor in parts.items():
                quantised.setdefault(part + name, []).append(tensor)
    stacked = {name: torch.stack(tensors) for name, tensors in quantised.items()}
    l1, l2 = transform_weights_for_nvfp4_mega_moe(
        (stacked["codes13"], stacked["scales13"]), (stacked["codes2"], stacked["scales2"]),
        device=device,
    )  # fmt: skip
    input_scale = torch.full((local,), 20 / 2688, device=device)
    return Weights(
        l1, l2, stacked["scale_213"][:, None].expand(-1, 2).contiguous(),
        stacked["scale_22"] * input_scale, input_scale, stacked["bf1613"], stacked["bf162"],
    )  # fmt: skip


def route(
    shape: LayerShape, skew: float, draw: torch.Generator, device: torch.device
) -> torch.Tensor:
    """Distinct experts of each token, uniform but for expert 0, with ``skew`` times the mean."""
    scores = torch.rand(shape.max_num_tokens, shape.num_experts, generator=draw, device=device)
    if skew != 1:
        often = min(1.0, skew * shape.top_k / shape.num_experts)
        hot = torch.rand(shape.max_num_tokens, generator=draw, device=device) < often
        scores[:, 0] = torch.where(hot, 2.0, -1.0)
    return scores.topk(shape.top_k).indices.int()


class Rival:
    """NCCL all-to-all and torch._grouped_mm in bf16."""

    def __init__(self, shape: LayerShape, rank: int, weights: Weights) -> None:
        self.shape, self.rank, self.weights = shape, rank, weights

    def experts(self, rows: torch.Tensor, local_expert: torch.Tensor) -> torch.Tensor:
        """The two GEMMs of rows sorted by expert."""
        experts = self.shape.experts_per_rank
        ends = torch.bincount(local_expert, minlength=experts).cumsum(0).int()
        gate, up = torch._grouped_mm(rows, self.weights.w13, offs=ends).chunk(2, dim=-1)
        return torch._grouped_mm(torch.nn.functional.silu(gate) * up, self.weights.w2, offs=ends)

    def exchange_counts(self, counts: torch.Tensor) -> tuple[list[int], list[int]]:
        received = torch.empty_like(counts)
        dist.all_to_all_single(received, counts)
        both = torch.stack((counts, received)).tolist()
        return both[0], both[1]

    @staticmethod
    def all_to_all(rows: torch.Tensor, there: list[int], here: list[int]) -> torch.Tensor:
        received = rows.new_empty(sum(here), *rows.shape[1:])
        dist.all_to_all_single(received, rows, here, there)
        return received

    def once_a_rank(self, x: torch.Tensor, ids: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        """Each token goes once to each rank with one of its experts, which adds up its rows."""
        ranks, per_rank = self.shape.world_size, self.shape.experts_per_rank
        goes = torch.zeros(len(x), ranks, dtype=torch.bool, device=x.device)
        goes.scatter_(1, (ids // per_rank).long(), True)
        _, token = goes.t().nonzero(as_tuple=True)
        there, here = self.exchange_counts(goes.sum(0))
        rows = self.all_to_all(x[token], there, here)
        routing = torch.cat((ids[token].view(torch.float32), w[token]), dim=1)
        routing = self.all_to_all(routing, there, here)
        experts = routing[:, : ids.shape[1]].contiguous().view(torch.int32) - self.rank * per_rank
        mine = (experts >= 0) & (experts < per_rank)
        row, slot = mine.nonzero(as_tuple=True)
        expert, order = experts[row, slot].sort()
        row, slot = row[order], slot[order]
        out = self.experts(rows[row], expert)
        out *= routing[row, ids.shape[1] + slot, None].bfloat16()
        back = self.all_to_all(torch.zeros_like(rows).index_add_(0, row, out), here, there)
        return torch.zeros_like(x).index_add_(0, token, back)

    def once_an_expert(self, x: torch.Tensor, ids: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        """Each token goes once for each of its experts."""
        ranks, per_rank = self.shape.world_size, self.shape.experts_per_rank
        expert, order = ids.flatten().sort(stable=True)
        there, here = self.exchange_counts(torch.bincount(expert // per_rank, minlength=ranks))
        rows = self.all_to_all(x[order // ids.shape[1]], there, here)
        local = self.all_to_all(expert, there, here) - self.rank * per_rank
        local, by_expert = local.sort(stable=True)
        out = torch.empty_like(rows)
        out[by_expert] = self.experts(rows[by_expert], local)
        back = self.all_to_all(out, here, there)
        home = torch.empty_like(back)
        home[order] = back
        return torch.bmm(w[:, None].bfloat16(), home.view(*ids.shape, -1)).squeeze(1)


def capture(call: Callable[[], Any]) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    stream.synchronize()
    dist.barrier()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        call()
    return graph


def kernel_times_us(call: Callable[[], Any], calls: int = 8) -> dict[str, float]:
    """Median duration of each of the layer's kernels on this rank, waiting included."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(calls):
            dist.barrier()
            call()
        torch.cuda.synchronize()
    durations: dict[str, list[float]] = {}
    for event in profile.events():
        if "megamoe" in event.name:
            name = event.name.split("(")[0].split("::")[-1]
            durations.setdefault(name, []).append(event.time_range.elapsed_us())
    return {name: round(statistics.median(times), 1) for name, times in durations.items()}


def measure(
    bench: Bench, case: Case, weights: Weights | None, with_rival: bool, found: dict[str, float],
    comm_sms: int | None,
) -> dict[str, Any]:  # fmt: skip
    group, device = bench.group, bench.device
    local, top_k, hidden, intermediate = SHAPES[case.shape]
    tokens = case.tokens_per_rank
    shape = LayerShape(
        local * group.world_size, tokens, top_k, hidden, intermediate, group.world_size
    )
    draw = torch.Generator(device=device).manual_seed(100 + group.rank)
    x = torch.randn(tokens, hidden, generator=draw, device=device).bfloat16()
    ids = route(shape, case.skew, draw, device)
    w = torch.rand(tokens, top_k, generator=draw, device=device)
    w /= w.sum(1, keepdim=True)
    y = torch.empty_like(x)

    with SymmBuffer(group, shape, timeout_s=30, comm_sms=comm_sms) as buffer:
        if "sm_store_bytes_per_s" not in found:
            neighbour = (group.rank + 1) % group.world_size
            peer = buffer.peers[neighbour].home_rows.view(-1) if group.world_size > 1 else None
            found.update(rates(bench, peer))
        comm, work = comm_kernels(device), buffer.workspace
        steps: dict[str, Callable[[], Any]] = {
            "stage": lambda: comm.stage(x, ids, w, buffer, tokens),
            "dispatch": lambda: comm.dispatch(buffer, combine=case.combine),
        }
        if weights is not None:
            gemm = gemm_kernels(weights.l1.layout)
            steps["l1"] = lambda: gemm.l1(
                work.rows, work.row_scales, work.expert_offsets, weights.l1, weights.l1_alpha,
                input_scale=weights.l2_input_scale, clamp=None, out=work.h,
            )  # fmt: skip
            steps["l2"] = lambda: gemm.l2(
                work.h, work.expert_offsets, weights.l2, weights.l2_alpha, out=work.rows
            )
        steps["combine"] = lambda: comm.combine(y, buffer, combine=case.combine)

        def run(names: list[str]) -> None:
            for name in names:
                steps[name]()

        names = list(steps)
        until: dict[str, float] = {}
        for last in range(1, len(names) + 1):
            # The ranks meet between calls, so a call may end before its combine.
            graph = capture(lambda last=last: run(names[:last]))
            until[names[last - 1]] = bench.median_us(graph.replay)
            buffer.check()
        kernels = kernel_times_us(lambda: run(names))
        rows = int(work.expert_offsets[-1])
        hit = int((work.expert_offsets.diff() > 0).sum())
        staged_bytes = shape.hidden_size // 2 + shape.hidden_size // 16 + 4 * (2 + top_k)
        if case.combine == "fast":
            staged_bytes += 4 * top_k
        owner = ids // shape.experts_per_rank
        elsewhere = [owner.eq(r).any(1).sum().item() for r in range(group.world_size)]
        sent = sum(elsewhere) - elsewhere[group.rank]
        flags = (buffer.dispatch_flags & 0xFFFFFFFF).tolist()
        if case.combine == "fast":
            returned = sum(flags) - flags[group.rank]
        else:
            source = work.row_slot[:rows] // top_k // shape.max_num_tokens
            returned = int((source != group.rank).sum())

    busiest = bench.over_ranks(rows)
    weight_bytes = bench.over_ranks(hit) * 3 * hidden * intermediate * 9 / 16
    row: dict[str, Any] = asdict(case) | {"ranks": group.world_size, "rows_busiest_rank": busiest}
    row["ours_us"] = until["combine"] if weights is not None else None
    before = 0.0
    for name in names:
        row[f"{name}_us"] = round(until[name] - before, 1)
        before = until[name]
    row["weight_floor_us"] = weight_bytes / found["copy_bytes_per_s"] * 1e6
    row["flop_floor_us"] = 6 * busiest * hidden * intermediate / found["cublas_flop_per_s"] * 1e6
    row["floor_us"] = max(row["weight_floor_us"], row["flop_floor_us"])
    for name, kernel, count, size in (
        ("dispatch", "dispatch_send", sent, staged_bytes),
        ("combine", "combine_send", returned, 2 * hidden),
    ):
        wire = bench.over_ranks(count * size)
        row[f"{name}_wire_bytes"] = wire
        row[f"{name}_wire_gbps"] = wire / row[f"{name}_us"] / 1e3
        alone = [us for found_name, us in kernels.items() if kernel in found_name]
        row[f"{kernel}_wire_gbps"] = wire / bench.over_ranks(alone[0] if alone else 0) / 1e3 if (
            bench.over_ranks(len(alone))) else None  # fmt: skip
    row["wire_gbps"] = row["combine_wire_gbps"]
    row["kernels_us"] = kernels

    row["torch_nccl_us"] = None
    if with_rival and weights is not None:
        rival = Rival(shape, group.rank, weights)
        answers = {}
        for name in ("once_a_rank", "once_an_expert"):
            call = getattr(rival, name)
            answers[name] = bench.median_us(lambda call=call: call(x, ids, w))
            error = (call(x, ids, w).float() - y.float()).norm() / y.float().norm()
            row["difference_from_rival"] = bench.over_ranks(float(error))
        row["torch_nccl_us"] = min(answers.values())
        row["torch_nccl_by_variant_us"] = answers
        row["speedup"] = row["torch_nccl_us"] / row["ours_us"]
    if row["ours_us"]:
        row["over_floor"] = row["ours_us"] / row["floor_us"]
        row["tflops"] = 6 * busiest * hidden * intermediate / row["ours_us"] / 1e6
    return {k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}


def start() -> Group:
    """The ranks, and NCCL among them."""
    group = Group.from_environment(device="cuda", timeout_s=120)
    torch.cuda.set_device(group.device)
    if group.rank == 0:
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        group.broadcast_object(store.port)
    else:
        store = dist.TCPStore("127.0.0.1", group.broadcast_object(None), is_master=False)
    dist.init_process_group(
        "nccl", store=store, rank=group.rank, world_size=group.world_size,
        device_id=group.device, timeout=timedelta(seconds=120),
    )  # fmt: skip
    return group


def environment(group: Group) -> dict[str, Any]:
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    return {
        "gpu": torch.cuda.get_device_name(group.device),
        "ranks": group.world_size,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())),
        "python": platform.python_version(),
        "command": " ".join(sys.argv),
        "commit": commit.stdout.strip() or None,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "calls": CALLS,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--case", type=Case.parse, action="append", required=True, dest="cases")
    parser.add_argument("--output", type=Path, help="JSON file")
    parser.add_argument("--no-rival", action="store_true", help="time ours alone")
    parser.add_argument(
        "--exchange-only", action="store_true", help="stage, dispatch and combine without the GEMMs"
    )
    parser.add_argument("--comm-sms", type=int, help="SMs for the exchange; default: all")
    arguments = parser.parse_args()

    group = start()
    if not arguments.exchange_only and weight_layout(group.device) == "portable":
        parser.error("this GPU has no fast GEMMs here; --exchange-only times the rest.")
    bench = Bench(group)
    found: dict[str, float] = {}
    rows = []
    weights: Weights | None = None
    weights_of = None
    for case in arguments.cases:
        local, top_k, hidden, intermediate = SHAPES[case.shape]
        if not arguments.exchange_only and weights_of != case.shape:
            weights = None
            shape = LayerShape(
                local * group.world_size, 1, top_k, hidden, intermediate, group.world_size
            )
            weights = make_weights(shape, group.rank, group.device)
            weights_of = case.shape
        row = measure(bench, case, weights, not arguments.no_rival, found, arguments.comm_sms)
        rows.append(row)
        if group.rank == 0:
            print(json.dumps(row), flush=True)
            if arguments.output:
                arguments.output.parent.mkdir(parents=True, exist_ok=True)
                result = {"machine": environment(group), "measured": found, "rows": rows}
                arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    if group.rank == 0:
        print(json.dumps({"measured": {k: f"{v:.4g}" for k, v in found.items()}}), flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
