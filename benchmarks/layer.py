"""What does the whole layer cost, end to end and by phase, against what a user writes today?

    torchrun --nproc-per-node 2 benchmarks/layer.py --case dsv3:128:fast --case flash:64:exact
    mpirun -n 2 python benchmarks/layer.py --case dsv3:8192:fast:4

A case is shape:tokens per rank:combine[:skew]; skew is the hottest expert's load over the mean one.

How a number is measured: megamoe_ep/measure.py. The rival is NCCL all-to-all and torch._grouped_mm
in bf16, the faster of two: each token sent once to each rank that needs it, or once for each of its
experts. The ceilings behind the floors are measured in the same run.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megamoe_ep.kernels import homes_of, weight_layout
from megamoe_ep.measure import (
    MODELS,
    Case,
    LayerWeights,
    Meter,
    Tokens,
    layer_steps,
    machine,
    phase_times_us,
    random_weights,
    ranks,
    result_row,
)
from megamoe_ep.results import Results
from megamoe_ep.rivals import TorchLayer
from megamoe_ep.roofline import Ceilings, Load, measure_ceilings
from megamoe_ep.symm_buffer import SymmBuffer


def parse_case(text: str) -> Case:
    parts = re.fullmatch(r"([^:]+):(\d+):(exact|fast)(?::([\d.]+))?", text)
    if parts is None or parts[1] not in MODELS:
        raise argparse.ArgumentTypeError(
            f"a case must be SHAPE:TOKENS:exact|fast[:SKEW] with a shape of {list(MODELS)}; "
            f"got {text!r}."
        )
    return Case(parts[1], "weak", int(parts[2]), parts[3], float(parts[4] or 1))


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
    meter: Meter,
    case: Case,
    weights: LayerWeights | None,
    with_rival: bool,
    ceilings: Ceilings,
    comm_sms: int | None,
) -> dict[str, Any]:
    group = meter.group
    shape = case.shape(group.world_size)
    tokens = Tokens.draw(shape, case.tokens, case.skew, group.rank, meter.device)
    y = torch.empty_like(tokens.x)
    with SymmBuffer(group, shape, device=meter.device, timeout_s=30, comm_sms=comm_sms) as buffer:
        calls_of = layer_steps(buffer, tokens, weights, y, case.combine)
        total_us, phases_us = phase_times_us(meter, calls_of, graphs=True)
        kernels_us = kernel_times_us(lambda: [call() for call in calls_of.values()])
        buffer.check()
        layout = "portable" if weights is None else weights.l2.layout
        stores_home = homes_of(buffer, layout, case.combine) is not None
    load = Load.of(shape, group.all_gather_object(tokens.topk_idx.cpu()))
    row = result_row(case, shape, load, ceilings, total_us, phases_us, stores_home=stores_home)
    if weights is None:  # of a layer without its GEMMs these mean nothing
        row |= dict.fromkeys(("ours_us", "over_floor", "tflops"))

    for phase in ("dispatch", "combine"):
        nbytes = row[f"{phase}_wire_bytes"]
        us = row[f"{phase}_us"]
        if phase == "combine" and stores_home:
            us += row["l2_us"]  # in which they go
        row[f"{phase}_wire_gbps"] = nbytes / us / 1e3
        send = [us for name, us in kernels_us.items() if f"{phase}_send" in name]
        (slowest,) = meter.over_ranks([send[0] if send else 0.0])
        row[f"{phase}_send_wire_gbps"] = nbytes / slowest / 1e3 if slowest else None
    row["wire_gbps"] = row["combine_wire_gbps"]
    row["kernels_us"] = kernels_us

    row["torch_nccl_us"] = None
    if with_rival and weights is not None:
        rival = TorchLayer(shape, group.rank, weights)
        took = {}
        for name in ("once_a_rank", "once_an_expert"):
            call = partial(getattr(rival, name), tokens)
            took[name] = meter.median_us(call)
            error = (call().float() - y.float()).norm() / y.float().norm()
            (row["difference_from_rival"],) = meter.over_ranks([float(error)])
        row["torch_nccl_us"] = min(took.values())
        row["torch_nccl_by_variant_us"] = took
        row["speedup"] = row["torch_nccl_us"] / row["ours_us"]
    return {k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--case", type=parse_case, action="append", required=True, dest="cases")
    parser.add_argument("--output", type=Path, help="JSON file")
    parser.add_argument("--no-rival", action="store_true", help="time ours alone")
    parser.add_argument(
        "--exchange-only", action="store_true", help="stage, dispatch and combine without the GEMMs"
    )
    parser.add_argument("--comm-sms", type=int, help="SMs for the exchange; default: all")
    arguments = parser.parse_args()
    with ranks("cuda") as meter:
        if not arguments.exchange_only and weight_layout(meter.device) == "portable":
            parser.error("this GPU has no fast GEMMs here; --exchange-only times the rest.")
        run(meter, arguments)


def run(meter: Meter, arguments: argparse.Namespace) -> None:
    group = meter.group
    ceilings = measure_ceilings(meter)
    results = Results("layer", machine(meter), ceilings)
    weights: LayerWeights | None = None
    weights_of = None
    for case in arguments.cases:
        if not arguments.exchange_only and weights_of != case.model:
            weights = None  # before the next ones are allocated
            weights = random_weights(
                case.shape(group.world_size),
                group.rank,
                meter.device,
                with_bf16=not arguments.no_rival,
            )
            weights_of = case.model
        row = measure(meter, case, weights, not arguments.no_rival, ceilings, arguments.comm_sms)
        results.rows.append(row)
        if group.rank == 0:
            print(json.dumps(row), flush=True)
            if arguments.output:
                results.write(arguments.output)
    if group.rank == 0:
        print(json.dumps({"ceilings": vars(ceilings)}), flush=True)


if __name__ == "__main__":
    main()
