"""Bytes and FLOPs of one call of the layer, kernel by kernel, and how fast a machine can do them.

What crosses between ranks is exact: it is what the data path counts in ``SymmBuffer.bytes_put``.
What a kernel moves through its own rank's memory is the least that it can: each byte once, however
often caches serve it again.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

from megamoe_ep.errors import ArgumentError
from megamoe_ep.kernels import comm_kernels
from megamoe_ep.kernels.portable import travelling_regions
from megamoe_ep.shape import LayerShape

if TYPE_CHECKING:
    from megamoe_ep.measure import Meter
    from megamoe_ep.symm_buffer import SymmBuffer

PHASES = ("stage", "dispatch", "l1", "l2", "combine")

FLAG_NBYTES = 8
_BYTES_A_WEIGHT = 9 / 16  # half a byte of code, and a byte of block scale for sixteen
_COUNT_IN_EXPAND = 4096  # csrc/binding/comm.cu: up to so many entries dispatch_count is left out


@dataclass(frozen=True)
class Load:
    """What one call asks of each of W ranks: counts or, of a routing not yet drawn, expectations.

    Attributes:
        tokens: [W], tokens that each rank brings.
        sent: [W, W], tokens that rank s (row) sends to rank d: once, however many of its experts.
        rows: [W, W], (token, slot) pairs of rank s whose expert is on rank d.
        expert_rows: [W, L], rows of each expert, by its rank.
    """

    tokens: torch.Tensor
    sent: torch.Tensor
    rows: torch.Tensor
    expert_rows: torch.Tensor

    @classmethod
    def of(cls, shape: LayerShape, topk_idx: Sequence[torch.Tensor]) -> Load:
        """Counts of the call in which rank r brings tokens with experts ``topk_idx[r]``.

        Args:
            topk_idx: integers [n, K] of each rank, by rank; -1 for no expert.
        """
        if len(topk_idx) != shape.world_size:
            raise ArgumentError(
                f"topk_idx must hold one tensor for each of the {shape.world_size} ranks; got "
                f"{len(topk_idx)}."
            )
        w = range(shape.world_size)
        owners = [ids.long() // shape.experts_per_rank for ids in topk_idx]  # -1 stays -1
        ids = torch.cat([ids.long().flatten() for ids in topk_idx])
        per_expert = ids[ids >= 0].bincount(minlength=shape.num_experts)
        return cls(
            torch.tensor([len(ids) for ids in topk_idx]),
            torch.tensor([[int((o == d).any(1).sum()) for d in w] for o in owners]),
            torch.tensor([[int((o == d).sum()) for d in w] for o in owners]),
            per_expert.view(shape.world_size, -1).cpu(),
        )

    @property
    def experts_hit(self) -> torch.Tensor:
        """Experts of each rank that have rows: [W]."""
        return (self.expert_rows > 0).sum(1)

    @property
    def busiest_rows(self) -> float:
        """Rows of the rank that has most."""
        return float(self.rows.sum(0).max())


@dataclass(frozen=True)
class Step:
    """One kernel of a call, on each of W ranks.

    Attributes:
        memory_bytes: [W], what it reads and writes in its rank's memory, and what peers write there
            meanwhile.
        flops: [W].
        put: [W, W], bytes that rank s (row) writes into rank d's memory, its own included.
        waits: it waits for flags of all ranks.
    """

    phase: str
    kernel: str
    memory_bytes: torch.Tensor
    flops: torch.Tensor
    put: torch.Tensor
    waits: bool


def weight_nbytes(shape: LayerShape, experts: float = 1) -> float:
    """Bytes of the NVFP4 weights of so many experts: gate, up and down."""
    return experts * 3 * shape.hidden_size * shape.intermediate_size * _BYTES_A_WEIGHT


def token_nbytes(shape: LayerShape, combine: str) -> int:
    """Bytes that dispatch sends of one token to one rank."""
    names = [f"recv_{name}" for name in travelling_regions(shape.activation_format, combine)]
    slots = shape.world_size * shape.max_num_tokens
    return sum(shape.regions[name].nbytes // slots for name in (*names, "recv_token"))


def steps(shape: LayerShape, load: Load, combine: str, *, stores_home: bool = False) -> list[Step]:
    """The kernels of a call, in their order, named as in csrc.

    Args:
        combine: "exact" or "fast".
        stores_home: L2 stores the rows of "exact" at their homes, and nothing sends them.
    """
    if combine not in ("exact", "fast"):
        raise ArgumentError(f"combine must be 'exact' or 'fast'; got {combine!r}.")
    h, i, k = shape.hidden_size, shape.intermediate_size, shape.top_k
    token, row, h_row = token_nbytes(shape, combine), 2 * h, 2 * i
    rows, received = load.rows.sum(0), load.sent.sum(0)
    home = load.rows if combine == "exact" else load.sent
    nothing = torch.zeros_like(load.tokens)
    no_put = torch.zeros_like(load.sent)

    def step(
        phase: str, kernel: str, memory: torch.Tensor, flops: torch.Tensor = nothing,
        put: torch.Tensor = no_put, waits: bool = False,
    ) -> Step:  # fmt: skip
        return Step(phase, kernel, memory, flops, put, waits)

    inputs = ("x", "x_sf", "x_scales", "topk_idx", "topk_weights")
    staged = sum(
        region.nbytes // shape.max_num_tokens
        for name, region in shape.regions.items()
        if name in inputs
    )
    found = [
        step("stage", "stage_tokens", load.tokens * (row + 8 * k + staged)),
        step(
            "dispatch", "dispatch_send", (load.tokens + received) * token,
            put=load.sent * token + FLAG_NBYTES,
        ),
    ]  # fmt: skip
    counted_apart = shape.world_size * shape.max_num_tokens * k > _COUNT_IN_EXPAND
    if counted_apart:
        found.append(step("dispatch", "dispatch_count", received * 4 * k, waits=True))
    sent = home.t() * row + FLAG_NBYTES
    stores_home = stores_home and combine == "exact"
    found += [
        # A row comes with its scale, its home's address, and the slot's row.
        step(
            "dispatch", "dispatch_expand", received * token + rows * (row + 16),
            waits=not counted_apart,
        ),
        step(
            "l1", "l1",
            load.experts_hit * (weight_nbytes(shape) * 2 / 3) + rows * (row + 4 + h_row),
            flops=4 * rows * h * i,
        ),
        step(
            "l2", "l2",
            load.experts_hit * (weight_nbytes(shape) / 3) + rows * h_row
            + (home.sum(1) if stores_home else rows) * row,
            flops=2 * rows * h * i, put=sent if stores_home else no_put,
        ),
    ]  # fmt: skip
    if not stores_home:
        found.append(step("combine", "combine_send", (rows + home.sum(1)) * row, put=sent))
    found.append(
        step("combine", "combine_sum", (home.sum(1) + load.tokens) * row, waits=True),
    )
    return found


def bytes_put(shape: LayerShape, load: Load, combine: str) -> dict[str, list[list[int]]]:
    """Bytes that each rank (row) writes to each rank, its own memory included, by phase.

    Exactly what one call adds to each rank's ``SymmBuffer.bytes_put``.
    """
    total = {phase: torch.zeros_like(load.sent) for phase in ("dispatch", "combine")}
    for step in steps(shape, load, combine):
        if step.kernel.endswith("_send"):
            total[step.phase] += step.put
    return {phase: put.long().tolist() for phase, put in total.items()}


# Machines


@dataclass(frozen=True)
class Ceilings:
    """What a machine reaches at best, each figure by a program that does nothing else.

    Attributes:
        copy_bytes_per_s: device copy of a large array, bytes read plus bytes written.
        flop_per_s: the matrix product that the GEMMs are made of: cuBLAS bf16, 8192 x 8192 x 8192,
            on Hopper, where weights are decoded to bf16; NVFP4 on Blackwell.
        peer_bytes_per_s: stores of all SMs into a peer's memory, one way, all ranks at once.
        flag_s: from a store of a flag in a peer's memory until that peer has seen it.
        launch_s: from kernel to kernel in a CUDA graph, when each has next to nothing to do on
            every SM, and its code has to come from memory.
        source: where the figures come from.
        domain: ranks that NVLink joins; the others are reached through the network.
        network_bytes_per_s, network_flag_s: the same between domains.
        clock_hz: of the SMs at best; a scheduler issues one instruction a cycle.
        call_s: a CUDA graph of one such kernel, on an idle GPU; None where it was not measured.
    """

    name: str
    copy_bytes_per_s: float
    flop_per_s: float
    peer_bytes_per_s: float
    flag_s: float
    launch_s: float
    source: str
    domain: int = 8
    network_bytes_per_s: float = 45e9
    network_flag_s: float = 5e-6
    clock_hz: float = 1.98e9
    call_s: float | None = None


_H200 = (
    "two H200s of one host (NVLink, NV18), CUDA 13.0, torch 2.11: the middle of 4.0 to 4.2 TB/s "
    "and of 743 to 788 TFLOP/s; launch_s is an assumption, and so are the network's 45 GB/s of a "
    "400 Gb/s adapter and 5 us"
)
_B200 = (
    "not measured: NVIDIA's figures for HGX B200 (8 TB/s, 9 PFLOP/s dense FP4, NVLink 900 GB/s one "
    "way) times the share of NVIDIA's figures for H200 (4.8 TB/s, 989 TFLOP/s, 450 GB/s) that an "
    "H200 reaches; latencies of an H200; one NVLink domain of 72, as in GB200 NVL72"
)
_H200_COPY, _H200_FLOPS, _H200_PEER = 4.1e12, 765e12, 364e9

KNOWN = {
    "H200": Ceilings("H200", _H200_COPY, _H200_FLOPS, _H200_PEER, 1.36e-6, 2e-6, _H200),
    "B200": Ceilings(
        "B200",
        8e12 * _H200_COPY / 4.8e12,
        9e15 * _H200_FLOPS / 989e12,
        900e9 * _H200_PEER / 450e9,
        1.36e-6,
        2e-6,
        _B200,
        domain=72,
    ),
}


def known_ceilings(device_name: str) -> Ceilings | None:
    """The table's entry for a GPU by the name that its driver gives; None if there is none."""
    return next((c for name, c in KNOWN.items() if name in device_name), None)


# Floors


class Floor(NamedTuple):
    """Least time of the two GEMMs on the busiest rank, and with it of the layer, in seconds."""

    weights_s: float  # reading the weights of the experts that have rows
    flops_s: float  # 6 * rows * H * I operations

    @property
    def seconds(self) -> float:
        return max(self)


def layer_floor(shape: LayerShape, load: Load, ceilings: Ceilings) -> Floor:
    """max(weights / copy bandwidth, FLOPs / product rate): what every measurement is held to."""
    nbytes = weight_nbytes(shape, float(load.experts_hit.max()))
    flops = 6 * load.busiest_rows * shape.hidden_size * shape.intermediate_size
    return Floor(nbytes / ceilings.copy_bytes_per_s, flops / ceilings.flop_per_s)


def wire_bytes(put: torch.Tensor) -> float:
    """Bytes that the busiest rank sends to others, or receives from them if that is more."""
    between = put - torch.diag(put.diag())
    return float(torch.maximum(between.sum(0), between.sum(1)).max())


def wire_seconds(put: torch.Tensor, ceilings: Ceilings) -> float:
    """Least time to move ``put`` [W, W] between ranks; NVLink and network work side by side."""
    domain = torch.arange(len(put)) // ceilings.domain
    near = domain[:, None] == domain
    return max(
        wire_bytes(torch.where(near, put, 0)) / ceilings.peer_bytes_per_s,
        wire_bytes(torch.where(near, 0, put)) / ceilings.network_bytes_per_s,
    )


def step_floor(step: Step, ceilings: Ceilings) -> float:
    """Least time of a kernel, seconds: its memory, its FLOPs and its wire, whichever takes longest.

    On each the rank that has most counts.
    """
    return max(
        float(step.memory_bytes.max()) / ceilings.copy_bytes_per_s,
        float(step.flops.max()) / ceilings.flop_per_s,
        wire_seconds(step.put, ceilings),
    )


def phase_floors(
    shape: LayerShape, load: Load, combine: str, ceilings: Ceilings, *, stores_home: bool = False
) -> dict[str, float]:
    """Least time of each phase, seconds: the sum over its kernels."""
    floors = dict.fromkeys(PHASES, 0.0)
    for step in steps(shape, load, combine, stores_home=stores_home):
        floors[step.phase] += step_floor(step, ceilings)
    return floors


# Measuring the ceilings

# A kernel each, so that none finds its code in a cache, as none does in a layer's call.
_KERNELS = (
    "abs_", "neg_", "sin_", "cos_", "tanh_", "exp_", "log1p_", "sqrt_", "rsqrt_", "floor_", "ceil_",
    "round_", "trunc_", "sign_", "sigmoid_", "erf_",
)  # fmt: skip
_KERNEL_ELEMENTS = 1 << 17  # a block for every SM
_FLAG_ROUNDS = 50


def measure_ceilings(meter: Meter) -> Ceilings:
    """Measures this machine, with all ranks of ``meter`` at once; collective.

    What it has no means to measure is taken from the table, and ``source`` says so: a lone rank's
    stores to peers and its flags.

    Raises:
        HeapError, HeapTooSmallError: see ``SymmBuffer``.
        PeerTimeoutError: a rank did not answer a flag.
    """
    device = meter.device
    gpu = device.type == "cuda"
    words, side = (1 << 28, 8192) if gpu else (1 << 22, 512)
    source = torch.randint(0, 100, (words,), dtype=torch.int32, device=device)
    target = torch.empty_like(source)
    copy_us = meter.median_us(lambda: target.copy_(source), 10)
    dtype = torch.bfloat16 if gpu else torch.float64  # as the GEMMs of each
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    product_us = meter.median_us(lambda: a @ b, 10)

    few = torch.zeros(_KERNEL_ELEMENTS if gpu else 1, device=device)

    def kernels_us(count: int) -> float:
        def run() -> None:
            for name in _KERNELS[:count]:
                getattr(few, name)()

        return meter.median_us(meter.capture(run) if gpu else run, 10)

    call_us = kernels_us(1)
    launch_us = (kernels_us(len(_KERNELS)) - call_us) / (len(_KERNELS) - 1)
    copy = 2 * source.nbytes / copy_us * 1e6
    # What a peer would be: the table's or, for a device that is not in it, as near as one's own.
    table = known_ceilings(meter.device_name)
    peer, flag_s = (table.peer_bytes_per_s, table.flag_s) if table else (copy / 2, 0.0)
    assumed = "; peer_bytes_per_s and flag_s not measured: one rank"
    if meter.group.world_size > 1:
        peer, measured_flag_s = _measure_peer(meter, source)
        assumed = "; flag_s not measured" if measured_flag_s is None else ""
        flag_s = flag_s if measured_flag_s is None else measured_flag_s
    return Ceilings(
        name=meter.device_name,
        copy_bytes_per_s=copy,
        flop_per_s=2 * side**3 / product_us * 1e6,
        peer_bytes_per_s=peer,
        flag_s=flag_s,
        launch_s=launch_us / 1e6,
        source="measured in this run" + assumed,
        domain=meter.group.world_size,
        call_s=call_us / 1e6,
    )


def _measure_peer(meter: Meter, source: torch.Tensor) -> tuple[float, float | None]:
    """Stores to the next rank, bytes/s, and a flag there, seconds; None on a GPU without csrc."""
    from megamoe_ep.symm_buffer import SymmBuffer

    group = meter.group
    gpu = meter.device.type == "cuda"
    # Only its home_rows are used, the largest region of this shape.
    shape = LayerShape(
        group.world_size, 8192 if gpu else 512, 1, 8192 if gpu else 1024, 16, group.world_size
    )
    with SymmBuffer(group, shape, device=meter.device, timeout_s=group.timeout_s) as buffer:
        there = buffer.peers[(group.rank + 1) % group.world_size].home_rows.view(-1)
        there = there.view(torch.int32)
        here = source[: len(there)]
        us = meter.median_us(lambda: torch.add(here, 1, out=there), 10)
        flag_s = _flag_round(meter, buffer)
    return here.nbytes / us * 1e6, flag_s


def _flag_round(meter: Meter, buffer: SymmBuffer) -> float | None:
    """Every rank tells the next one, and waits until the one before has told it."""
    here = buffer.local.home_rows.view(-1)[:4].view(torch.int64)
    peer = buffer.peers[(buffer.rank + 1) % buffer.shape.world_size]
    there = peer.home_rows.view(-1)[:4].view(torch.int64)
    before = (buffer.rank - 1) % buffer.shape.world_size
    here.zero_()
    meter.meet()
    firsts = itertools.count(1, _FLAG_ROUNDS)

    def rounds_of_host() -> None:
        deadline = time.monotonic() + buffer.timeout_s
        first = next(firsts)
        for number in range(first, first + _FLAG_ROUNDS):
            there.fill_(number)
            buffer.fence()
            while int(here[0]) < number:
                if time.monotonic() > deadline:
                    raise buffer.abort([before], "dispatch", number, int(here[0]))

    def rounds_of_device() -> None:
        comm.flag_rounds(there, here, next(firsts), _FLAG_ROUNDS, buffer.timeout_s)

    comm = comm_kernels(meter.device)
    on_host = meter.device.type == "cpu"
    if not on_host and not hasattr(comm, "flag_rounds"):
        return None
    seconds = meter.median_us(rounds_of_host if on_host else rounds_of_device, 3) / 1e6
    last = next(firsts) - 1
    if int(here[0]) < last:
        raise buffer.abort([before], "dispatch", last, int(here[0]))
    return seconds / _FLAG_ROUNDS
