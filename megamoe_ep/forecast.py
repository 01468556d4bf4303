"""How long a call of the layer will take on a machine, from its ceilings alone.

The sum over the kernels of a call (``roofline.steps``). A kernel takes a launch (the first one a
call's), the latency of a flag where it waits for one, and its floor; a GEMM takes what its busiest
block does, by the tiles that csrc cuts it into. Nothing here is fitted to a measured layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from megamoe_ep.kernels import cuda, cuda_sm100
from megamoe_ep.roofline import (
    PHASES,
    Ceilings,
    Load,
    Step,
    step_floor,
    steps,
    weight_nbytes,
    wire_seconds,
)
from megamoe_ep.shape import LayerShape


@dataclass(frozen=True)
class GemmTiles:
    """How a grouped GEMM is cut into tiles, numbered by expert.

    Attributes:
        weight_rows: rows of weights in a tile.
        max_tokens: the most rows of tokens in a tile; an expert's rows are cut into as few tiles as
            that allows, of one width or of two neighbouring ones.
        token_step: a width is a multiple of this. Tiles of one width only have ``max_tokens`` here.
        blocks: how many tiles the GPU works on at a time, with as much of it each.
        least_width: what tiles of fewer tokens take as long as, in the tensor cores.
        instructions: that a scheduler issues for a tile and 64 of k, tensor cores' aside. They are
            not overlapped: both want the register file, as csrc/gemm/sm90/gemm.cuh says.
        run: 0, and block b takes tiles b, b + blocks, b + 2 * blocks ... Else a block takes as many
            as every other, give or take one, that follow one another, half of them or so of an
            expert with wide tiles and half of one with narrow ones, in multiples of this.
        alike: widths up to this take the same time, and experts need no pairing.
        parts: without shares, a tile of the last round is split into so many, if there are blocks
            for all of them.
    """

    weight_rows: int
    max_tokens: int
    token_step: int
    blocks: int
    least_width: int = 0
    instructions: int = 0
    run: int = 0
    alike: int = 0
    parts: int = 1

    def of_expert(self, rows: float) -> tuple[int, int, float]:
        """How many token tiles an expert with so many rows has, the widest's width and the mean."""
        if rows == 0:
            return 0, 0, 0.0
        tiles = math.ceil(rows / self.max_tokens)
        if self.token_step == self.max_tokens:
            return tiles, self.max_tokens, self.max_tokens
        steps = math.ceil(rows / self.token_step)
        return tiles, math.ceil(steps / tiles) * self.token_step, steps / tiles * self.token_step

    def in_order(self, experts: list[tuple[int, float, int]]) -> list[float]:
        """Seconds of all tiles in order, of experts' (largest width, seconds of a tile, tiles)."""
        if not self.run:
            return [seconds for _, seconds, count in experts for _ in range(count)]
        most = math.ceil(sum(count for _, _, count in experts) / self.blocks)
        wide_run = min(most, math.ceil(most / (2 * self.run)) * self.run)
        narrow_run = most - wide_run if max((e[0] for e in experts), default=0) > self.alike else 0
        experts = sorted(experts, key=lambda expert: -expert[0])
        order: list[float] = []
        for place in range(math.ceil(len(experts) / 2)):
            _, slow, wide = experts[place]
            _, fast, narrow = experts[-1 - place]
            if place == len(experts) - 1 - place:
                narrow = 0
            turns = min(wide // wide_run, narrow // narrow_run) if narrow_run else 0
            order += ([slow] * wide_run + [fast] * narrow_run) * turns
            order += [slow] * (wide - turns * wide_run) + [fast] * (narrow - turns * narrow_run)
        return order

    def shares(self, n: int) -> list[int]:
        """Of n tiles in their order, how many each block has, the last block first."""
        share, more = divmod(n, self.blocks)
        return [share] * (self.blocks - more) + [share + 1] * more

    def busiest_block(self, seconds: torch.Tensor) -> float:
        """Of tiles that take ``seconds`` each, fp64 [n]: what the block that takes longest does."""
        n = len(seconds)
        if self.run:
            return max(float(part.sum()) for part in torch.split(seconds, self.shares(n)))
        rounds = seconds.new_zeros(-(-n // self.blocks), self.blocks)
        rounds.view(-1)[:n] = seconds
        last = n % self.blocks
        if self.parts * last <= self.blocks:
            rounds.view(-1)[n - last : n] /= self.parts
        return float(rounds.sum(0).max())


@dataclass(frozen=True)
class GemmKernels:
    """The two grouped GEMMs of one architecture.

    Attributes:
        few, many: how they are cut for few rows an expert, and for many.
        is_few: which of the two a layer gets.
        fused: rows come and go as bf16, and L1 ends with SwiGLU. Else passes of their own pack the
            rows into NVFP4 before each GEMM, and apply SwiGLU to the fp32 that L1 leaves.
        stores_home: as for ``roofline.steps``.
    """

    few: GemmTiles
    many: GemmTiles
    is_few: Callable[[LayerShape], bool]
    fused: bool
    stores_home: bool = False

    def tiles(self, shape: LayerShape) -> GemmTiles:
        return self.few if self.is_few(shape) else self.many


# csrc/gemm/sm90/schedule.cuh, on 132 SMs. wgmma takes no less than 13 cycles, which 26 tokens take;
# tests/unit/test_sass.py counts the instructions.
_SM90 = GemmKernels(
    GemmTiles(128, 48, 8, 132, 26, 132, run=4, alike=16),
    GemmTiles(256, 176, 8, 132, 26, 278, parts=2),
    lambda s: cuda.is_few(s.max_num_tokens * s.top_k, s.experts_per_rank),
    fused=True,
    stores_home=cuda.STORES_HOME,
)

KERNELS = {
    "H100": _SM90,
    "H200": _SM90,
    # csrc/gemm/sm100/grouped_gemm.cuh, on 148 SMs; a wide tile takes two of them
    "B200": GemmKernels(
        GemmTiles(128, 64, 64, 148),
        GemmTiles(256, 256, 256, 74),
        lambda s: cuda_sm100.is_few(s.max_rows, s.experts_per_rank),
        fused=False,
    ),
}


def forecast(
    shape: LayerShape, load: Load, combine: str, ceilings: Ceilings, kernels: GemmKernels
) -> dict[str, float]:
    """Seconds of each phase of one call."""
    seconds = dict.fromkeys(PHASES, 0.0)
    h, i = shape.hidden_size, shape.intermediate_size
    weights = weight_nbytes(shape)
    tiles = kernels.tiles(shape)
    packed = 9 / 16  # bytes of an element in NVFP4
    for step in steps(shape, load, combine, stores_home=kernels.stores_home):
        passes, row_nbytes = 0, 2.0 * (h + i)
        if step.kernel == "l1":
            if not kernels.fused:
                passes, row_nbytes = 2, packed * h + 8 * i
                seconds["l1"] += _pass(load, (2 + packed) * h + (8 + 2) * i, ceilings)
            work = _gemm(load, Matrix(2 * i, h, weights * 2 / 3, row_nbytes), ceilings, tiles)
        elif step.kernel == "l2":
            if not kernels.fused:
                passes, row_nbytes = 1, packed * i + 2 * h
                seconds["l2"] += _pass(load, (2 + packed) * i, ceilings)
            work = _gemm(load, Matrix(h, i, weights / 3, row_nbytes), ceilings, tiles)
            work = max(work, wire_seconds(step.put, ceilings))
        else:
            work = step_floor(step, ceilings)
        launches = (1 + passes) * ceilings.launch_s
        seconds[step.phase] += launches + _flag_seconds(step, ceilings) + work
    if ceilings.call_s is not None:
        seconds["stage"] += ceilings.call_s - ceilings.launch_s  # its kernel is the call's first
    return seconds


def _pass(load: Load, row_nbytes: float, ceilings: Ceilings) -> float:
    return load.busiest_rows * row_nbytes / ceilings.copy_bytes_per_s


def _flag_seconds(step: Step, ceilings: Ceilings) -> float:
    world_size = len(step.put)
    if not step.waits or world_size == 1:
        return 0.0
    return ceilings.flag_s if world_size <= ceilings.domain else ceilings.network_flag_s


class Matrix(NamedTuple):
    """One expert's side of a GEMM."""

    n: int
    k: int
    nbytes: float
    row_nbytes: float  # read and written with each row


def _gemm(load: Load, matrix: Matrix, ceilings: Ceilings, tiles: GemmTiles) -> float:
    """Seconds of the busiest block of the busiest rank."""
    ranks = {tuple(rows) for rows in load.expert_rows.tolist()}
    return max(tiles.busiest_block(_tile_seconds(rows, matrix, ceilings, tiles)) for rows in ranks)


def _tile_seconds(
    expert_rows: tuple[float, ...], matrix: Matrix, ceilings: Ceilings, tiles: GemmTiles
) -> torch.Tensor:
    """Of each tile, in their order, fp64. Its block has its share of memory and of products, and an
    SM's instructions.

    Token tiles of one expert run together and read its weights once; likewise with rows.
    """
    weight_tiles = math.ceil(matrix.n / tiles.weight_rows)
    experts = []
    for rows in expert_rows:
        token_tiles, widest, width = tiles.of_expert(rows)
        if not token_tiles:
            continue
        count = token_tiles * weight_tiles
        nbytes = (matrix.nbytes + rows * matrix.row_nbytes) / count
        flops = 2 * max(width, tiles.least_width) * matrix.k * matrix.n / weight_tiles
        multiplied = flops / ceilings.flop_per_s * tiles.blocks
        issued = tiles.instructions * matrix.k / 64 / ceilings.clock_hz
        read = nbytes / ceilings.copy_bytes_per_s * tiles.blocks
        experts.append((widest, max(read, multiplied + issued), count))
    return torch.tensor(tiles.in_order(experts), dtype=torch.float64)


# A routing that is not drawn yet


def expected_load(shape: LayerShape, skew: float = 1.0) -> Load:
    """What to expect of ``measure.route`` where every rank brings ``shape.max_num_tokens`` tokens.

    Rank 0 has the hot expert, if there is one. The rows of a rank's experts are spread as the
    quantiles of their distribution, and one rank has as many as the busiest can expect.
    """
    w, e, k = shape.world_size, shape.num_experts, shape.top_k
    local, t = shape.experts_per_rank, shape.max_num_tokens
    hot = skew != 1
    often = min(1.0, skew * k / e) if hot else k / e
    others = e - 1 if hot else e  # experts that are drawn evenly
    mean = (k - often) / others if hot else k / e

    def none_of(experts: int, drawn: int) -> float:
        """That a token's ``drawn`` even experts avoid so many."""
        if others - experts < drawn:
            return 0.0
        return math.comb(others - experts, drawn) / math.comb(others, drawn)

    def goes(experts: int) -> float:
        """That a token goes to a rank with so many even experts and not the hot one."""
        if not hot:
            return 1 - none_of(experts, k)
        return 1 - often * none_of(experts, k - 1) - (1 - often) * none_of(experts, k)

    to_first = often + (1 - often) * (1 - none_of(local - 1, k)) if hot else goes(local)
    sent = torch.full((w, w), t * goes(local), dtype=torch.float64)
    sent[:, 0] = t * to_first

    total = w * t
    per_expert = _binomial_quantiles(total, mean, local).repeat(w, 1)
    if hot:
        per_expert[0] = torch.cat(
            (torch.tensor([total * often], dtype=torch.float64),
             _binomial_quantiles(total, mean, local - 1))
        )  # fmt: skip
    rows = torch.full((w, w), t * mean * local, dtype=torch.float64)
    rows[:, 0] += t * (often - mean)
    # Chance favours one rank; with a hot expert it need not be the one that has it.
    favoured = 1 if hot and w > 1 else 0
    more = 1 + _excess(shape) / (total * mean * local)
    rows[:, favoured] *= more
    per_expert[favoured] *= more
    return Load(torch.full((w,), t, dtype=torch.float64), sent, rows, per_expert)


def _excess(shape: LayerShape) -> float:
    """Rows above the mean that the busiest of the ranks can expect, with even routing.

    A token's rows on a rank are hypergeometric, the sum over tokens near normal; the ranks' sums
    add up to a constant, so their largest is that of W independent ones times sqrt(W / (W - 1)).
    """
    w, e, k, local = shape.world_size, shape.num_experts, shape.top_k, shape.experts_per_rank
    if w == 1:
        return 0.0
    variance = k * (local / e) * (1 - local / e) * (e - k) / (e - 1)
    deviation = math.sqrt(w * shape.max_num_tokens * variance)
    x = torch.linspace(-8, 8, 4001, dtype=torch.float64)
    below = torch.special.ndtr(x)
    largest = float(torch.trapezoid((x > 0).double() - below**w, x))  # E = integral of 1(x>0) - F^w
    return deviation * math.sqrt(w / (w - 1)) * largest


def _binomial_quantiles(n: int, p: float, count: int) -> torch.Tensor:
    """Quantiles (j + 1/2) / count of Binomial(n, p), fp64 [count]."""
    if count == 0 or p >= 1:
        return torch.full((count,), float(n), dtype=torch.float64)
    deviation = math.sqrt(n * p * (1 - p))
    low = max(0, math.floor(n * p - 10 * deviation - 10))
    high = min(n, math.ceil(n * p + 10 * deviation + 10))
    x = torch.arange(low, high + 1, dtype=torch.float64)
    log = (
        math.lgamma(n + 1) - torch.lgamma(x + 1) - torch.lgamma(n - x + 1)
        + x * math.log(p) + (n - x) * math.log1p(-p)
    )  # fmt: skip
    below = log.exp().cumsum(0)
    wanted = (torch.arange(count, dtype=torch.float64) + 0.5) / count * below[-1]
    return x[torch.searchsorted(below, wanted).clamp(max=len(x) - 1)]
