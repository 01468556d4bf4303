"""How does the layer's latency grow with tokens, ranks and skew?

    mpirun -n 2 python benchmarks/scaling.py --models dsv3,flash,pro
    torchrun --nproc-per-node 2 benchmarks/scaling.py --models dsv3 --tokens 64,128 --skews 1,4
    python benchmarks/scaling.py --device cpu --models tiny --tokens 1,8 --output tiny.json

weak: every rank has the same number of tokens and of experts, whatever the number of ranks.
strong: the model's experts, and one number of tokens, over all ranks together.

One launch is one number of ranks. GPUs meet over NVSHMEM, CPU ranks over the host heap. How a
number is measured: megamoe_ep/measure.py. The ceilings of the machine are measured in the same run.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from arguments import list_of

from megamoe_ep.measure import (
    CALLS,
    MODELS,
    Case,
    LayerWeights,
    Meter,
    machine,
    measure_case,
    random_weights,
    ranks,
)
from megamoe_ep.results import Results
from megamoe_ep.roofline import measure_ceilings

TOKENS = [1, 8, 64, 128, 512, 2048, 8192]
SKEWS = [1.0, 2.0, 4.0, 7.0]
FOLDER = Path(__file__).parent / "results"


def cases(arguments: argparse.Namespace) -> list[Case]:
    """Points in the order in which they are measured: the even ones of all models first."""
    return [
        Case(model, mode, tokens, combine, skew)
        for skew in arguments.skews
        for model in arguments.models
        for mode in arguments.modes
        for tokens in arguments.tokens
        for combine in arguments.combine
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", type=list_of(str, tuple(MODELS)), default=["dsv3"])
    parser.add_argument(
        "--modes", type=list_of(str, ("weak", "strong")), default=["weak", "strong"]
    )
    parser.add_argument("--tokens", type=list_of(int), default=TOKENS)
    parser.add_argument("--skews", type=list_of(float), default=SKEWS)
    parser.add_argument(
        "--combine", type=list_of(str, ("exact", "fast")), default=["exact", "fast"]
    )
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], help="default: cuda where there is one"
    )
    parser.add_argument("--calls", type=int, default=CALLS, help="of which the median is taken")
    parser.add_argument("--budget", type=float, help="seconds; points past it are left out")
    parser.add_argument(
        "--output",
        type=Path,
        help="JSON file; default: in benchmarks/results, and none for portable kernels",
    )
    arguments = parser.parse_args()
    with ranks(arguments.device) as meter:
        measure(meter, arguments)


def measure(meter: Meter, arguments: argparse.Namespace) -> None:
    began = time.monotonic()
    group = meter.group
    ceilings = measure_ceilings(meter)
    results = Results("scaling", machine(meter) | {"calls": arguments.calls}, ceilings)
    path = arguments.output
    if path is None and results.machine["kernels"] != "portable":
        path = FOLDER / results.file_name()
    weights: LayerWeights | None = None
    weights_of: tuple[str, int] | None = None
    todo = cases(arguments)
    for number, case in enumerate(todo):
        spent = max(meter.over_ranks([time.monotonic() - began]))
        if arguments.budget is not None and spent > arguments.budget:
            say(meter, {"left_out_for_lack_of_time": len(todo) - number})
            break
        shape = case.shape(group.world_size)
        if weights_of != (case.model, shape.experts_per_rank):
            weights = None  # before the next ones are allocated
            weights = random_weights(shape, group.rank, meter.device)
            weights_of = case.model, shape.experts_per_rank
        assert weights is not None
        row, _ = measure_case(
            meter, case, weights, ceilings, arguments.calls, by_phase=case.skew == 1
        )
        results.rows.append(row)
        say(meter, row)
        if group.rank == 0 and path is not None:
            results.write(path)


def say(meter: Meter, line: dict[str, Any]) -> None:
    if meter.group.rank == 0:
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
