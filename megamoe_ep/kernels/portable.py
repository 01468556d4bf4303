"""The data path in plain torch, on CPU and GPU tensors: slow, clear, and the measure of the others.

Ranks meet in the symmetric regions of a ``SymmBuffer`` only. Every number of a row depends on that
row, its expert's weights and nothing else: not on the batch, the number of threads, the device or
the EP size.
"""

from __future__ import annotations

import itertools
import math
import time

import torch

from megamoe_ep import nvfp4
from megamoe_ep.errors import ArgumentError, LayerMismatchError
from megamoe_ep.kernels import ColumnOrder
from megamoe_ep.prepack.sm90 import column_order
from megamoe_ep.symm_buffer import PHASES, SymmBuffer
from megamoe_ep.weights import KernelWeights

COLUMNS: ColumnOrder = "plain"
STORES_HOME = False
EPOCH_MASK = 0xFFFF_FFFF


# Stage


def stage(
    x: torch.Tensor,
    topk_idx: torch.Tensor,
    topk_weights: torch.Tensor,
    buffer: SymmBuffer,
    num_tokens: int | torch.Tensor,
) -> None:
    """Writes this rank's tokens into its symmetric inputs, quantised in "nvfp4" format.

    Args:
        x: bf16 [n, H].
        topk_idx: int32 [n, K], -1 for no expert.
        topk_weights: fp32 [n, K].
        num_tokens: how many of the n rows are tokens; an int, or int32 [1] on the device.

    Raises:
        ArgumentError: an expert id of a token is out of range.
    """
    local = buffer.local
    n = int(num_tokens)
    if not 0 <= n <= x.shape[0]:
        raise ArgumentError(f"num_tokens must be 0 to {x.shape[0]}, the rows of x; got {n}.")
    ids = topk_idx[:n]
    wrong = ((ids < -1) | (ids >= buffer.shape.num_experts)).nonzero()
    if len(wrong):
        token, slot = wrong[0].tolist()
        raise ArgumentError(
            f"topk_idx must hold experts 0 to {buffer.shape.num_experts - 1}, or -1 for none; got "
            f"{int(ids[token, slot])} for token {token}, slot {slot}."
        )
    local.num_tokens.fill_(n)
    local.topk_idx[:n] = ids
    local.topk_weights[:n] = topk_weights[:n]
    if buffer.shape.activation_format == "bf16":
        local.x[:n] = x[:n]
        return
    if n == 0:
        return
    if buffer.input_global_scale is None:
        q = nvfp4.quantize_per_token(x[:n])
    else:
        q = nvfp4.quantize(x[:n], _static_scales(x[:n], buffer.input_global_scale))
    local.x[:n] = q.codes.view(torch.int8)
    local.x_sf[:n] = q.scales
    local.x_scales[:n] = q.global_scale


def _static_scales(x: torch.Tensor, global_scale: torch.Tensor) -> torch.Tensor:
    """The static scale for every row, NaN where the row holds NaN or inf: all of it is then NaN."""
    finite = x.isfinite().all(-1)
    return torch.where(finite, global_scale.view(()), torch.nan)


# Dispatch


def dispatch(
    buffer: SymmBuffer, *, combine: str, recv_stats: torch.Tensor | None = None,
    columns: ColumnOrder = "plain",
) -> None:  # fmt: skip
    """Sends each staged token once to each rank that owns one of its experts; receives likewise.

    Opens a new call (epoch). Fills the workspace's ``rows``, ``row_scales``, ``row_slot`` and
    ``expert_offsets``: rows by expert and, within an expert, by source rank, token and slot.
    Waits for every rank's dispatch flag.

    Args:
        combine: "exact" or "fast"; the weights of the slots travel for "fast" only.
        recv_stats: int32 or int64 [L], the rows of each local expert are added to it.
        columns: their order in ``rows``, which the GEMMs' module gives as ``COLUMNS``. "by lane"
            needs H to be a multiple of 64.

    Raises:
        PeerTimeoutError: a rank did not dispatch within the deadline.
    """
    shape, me, local = buffer.shape, buffer.rank, buffer.local
    n = int(local.num_tokens)
    local.epoch += 1
    owner = local.topk_idx[:n] // shape.experts_per_rank  # -1 stays -1
    counts = []
    for r in _others_last_self(me, shape.world_size):
        token = (owner == r).any(1).nonzero().squeeze(1)
        for name in travelling_regions(shape.activation_format, combine):
            destination = getattr(buffer.peers[r], f"recv_{name}")[me, : len(token)]
            _put(buffer, "dispatch", r, destination, getattr(local, name)[token])
        _put(buffer, "dispatch", r, buffer.peers[r].recv_token[me, : len(token)], token.int())
        counts.append((r, len(token)))
    _raise_flags(buffer, "dispatch", counts)
    _lay_out_rows(buffer, _wait_for_flags(buffer, "dispatch"), recv_stats)
    if columns == "by lane":
        work, rows = buffer.workspace, int(buffer.workspace.expert_offsets[-1])
        order = column_order(shape.hidden_size, buffer.device)
        work.rows[:rows] = work.rows[:rows, order]


def travelling_regions(activation_format: str, combine: str) -> tuple[str, ...]:
    """The input regions of a token that dispatch sends along; its index comes on top."""
    x = ("x", "x_sf", "x_scales") if activation_format == "nvfp4" else ("x",)
    return (*x, "topk_idx", "topk_weights") if combine == "fast" else (*x, "topk_idx")


def _others_last_self(me: int, world_size: int) -> list[int]:
    """All ranks, the next one first: so no two ranks write to the same one at the same time."""
    return [(me + step) % world_size for step in range(1, world_size + 1)]


def _lay_out_rows(buffer: SymmBuffer, counts: list[int], recv_stats: torch.Tensor | None) -> None:
    shape, local, work = buffer.shape, buffer.local, buffer.workspace
    # Received tokens in order of (source rank, token), as indices into the [W * T] blocks.
    received = torch.cat(
        [torch.arange(c, device=buffer.device) + s * shape.max_num_tokens
         for s, c in enumerate(counts)]
    )  # fmt: skip
    expert = local.recv_topk_idx.flatten(0, 1)[received] - buffer.experts_start_idx
    index, slot = ((expert >= 0) & (expert < shape.experts_per_rank)).nonzero(as_tuple=True)
    expert = expert[index, slot]
    order = expert.argsort(stable=True)
    index, slot = received[index[order]], slot[order]

    per_expert = expert.bincount(minlength=shape.experts_per_rank)
    work.expert_offsets[1:] = per_expert.cumsum(0)
    work.row_slot[: len(index)] = index * shape.top_k + slot
    x = local.recv_x.flatten(0, 1)[index]
    if shape.activation_format == "nvfp4":
        work.rows[: len(index)] = nvfp4.dequantize(x, local.recv_x_sf.flatten(0, 1)[index])
        work.row_scales[: len(index)] = local.recv_x_scales.flatten()[index]
    else:
        work.rows[: len(index)] = x
    if recv_stats is not None:
        recv_stats += per_expert


# The two grouped GEMMs


def l1(
    rows: torch.Tensor,
    row_scales: torch.Tensor,
    expert_offsets: torch.Tensor,
    weights: KernelWeights,
    alpha: torch.Tensor,
    *,
    input_scale: torch.Tensor | None,
    clamp: float | None,
    out: torch.Tensor,
) -> None:
    """Gate and up projections and SwiGLU of every row, by its expert.

    With acc the product of row and weights without global scales::

        gate = acc_gate * row_scales[r] * alpha[e, 0]
        up = acc_up * row_scales[r] * alpha[e, 1]
        h = silu(min(gate, clamp)) * clip(up, -clamp, clamp)

    Args:
        rows: bf16 [R, H]; expert e's are expert_offsets[e] to expert_offsets[e + 1].
        row_scales: fp32 [R].
        expert_offsets: int32 [L + 1].
        weights: of L experts, n = 2I (gate rows, then up rows), k = H.
        alpha: fp32 [L, 2], global scales of gate and up.
        input_scale: fp32 [L] or None. With it, h is quantised to NVFP4 with this global scale, and
            ``out`` gets code x block scale, exact in bf16; the global scale is left to l2's alpha.
        clamp: bound of the activation, or None.
        out: bf16 [R, I]; rows from expert_offsets[L] on are not written.
    """
    for expert, span in _spans(expert_offsets):
        acc = exact_matmul(rows[span], weights, expert) * row_scales[span, None]
        gate, up = acc.chunk(2, dim=1)
        gate, up = gate * alpha[expert, 0], up * alpha[expert, 1]
        if clamp is not None:
            gate, up = gate.clamp(max=clamp), up.clamp(-clamp, clamp)
        h = silu(gate) * up
        if input_scale is None:
            out[span] = h
        else:
            q = nvfp4.quantize(h, input_scale[expert])
            out[span] = nvfp4.dequantize(q.codes, q.scales)


def l2(
    h: torch.Tensor,
    expert_offsets: torch.Tensor,
    weights: KernelWeights,
    alpha: torch.Tensor,
    *,
    out: torch.Tensor,
    homes: torch.Tensor | None = None,
) -> None:
    """Down projection of every row, by its expert: bf16(acc * alpha[e]).

    Args:
        h: bf16 [R, I], as l1 leaves it.
        expert_offsets: int32 [L + 1].
        weights: of L experts, n = H, k = I.
        alpha: fp32 [L], the expert's weight scale, times its input scale where h is NVFP4.
        out: bf16 [R, H]; rows from expert_offsets[L] on are not written.
        homes: int64 [R], the device address of where each row goes instead, for kernels with
            ``STORES_HOME``; None for all others.
    """
    assert homes is None
    for expert, span in _spans(expert_offsets):
        out[span] = exact_matmul(h[span], weights, expert) * alpha[expert]


def _spans(expert_offsets: torch.Tensor) -> list[tuple[int, slice]]:
    offsets = expert_offsets.tolist()
    pairs = enumerate(itertools.pairwise(offsets))
    return [(expert, slice(start, end)) for expert, (start, end) in pairs if end > start]


def exact_matmul(rows: torch.Tensor, weights: KernelWeights, expert: int) -> torch.Tensor:
    """rows (bf16 [R, K]) times the expert's weights, without global scales, as fp32 [R, N].

    A weight is an integer times 2**-10, below 2**21.4 in magnitude. A row is made integer at 30
    bits below its largest magnitude and split into two halves of 15 bits, so that both fp64
    products are sums of integers below 2**53: the same in whatever order a BLAS adds, and exact for
    rows of NVFP4. Of a row of bf16 at large, what is below 2**-31 of its largest magnitude is lost.
    A row that holds NaN or inf gives a row of NaN.
    """
    codes, scales = weights.codes[expert], weights.scales[expert]
    doubled = (2 * nvfp4.decode_e2m1(nvfp4.unpack(codes))).double()
    steps = (scales.double() * 512).repeat_interleave(nvfp4.BLOCK, dim=1)
    integers = (doubled * steps).t()

    finite = rows.isfinite().all(1, keepdim=True)
    exact = torch.where(finite, rows, 0).double()
    amax = exact.abs().amax(1, keepdim=True)
    _, exponent = torch.frexp(amax)
    scale = _power_of_two(torch.where(amax > 0, 30 - exponent, 0))
    scaled = (exact * scale).round()
    high = (scaled * 2.0**-15).floor()
    low = scaled - high * 2.0**15
    product = (high @ integers) * 2.0**15 + low @ integers
    # Both factors are powers of two: one rounding, to fp32.
    product = (product * 2.0**-10) * (1 / scale)
    return torch.where(finite, product, torch.nan).float()


def _power_of_two(exponent: torch.Tensor) -> torch.Tensor:
    """2**exponent in fp64, for integers -1022 to 1023."""
    return ((exponent.long() + 1023) << 52).view(torch.float64)


_LN2_HIGH = 0.6931471803691238  # the first 32 bits of ln 2: k times it is exact in fp64
_LN2_LOW = 1.9082149292705877e-10  # the rest
_EXP_TERMS = [1 / math.factorial(i) for i in range(13, -1, -1)]


def silu(x: torch.Tensor) -> torch.Tensor:
    """x / (1 + exp(-x)) for fp32 ``x``, worked in fp64 and rounded once.

    From additions, multiplications and divisions alone: an ``exp`` of the library rounds
    differently in the middle of a vector and at its end, and so by the batch.
    """
    t = (-x.double()).clamp(-700, 700).nan_to_num(0.0)
    k = (t * (1 / math.log(2))).round()
    r = (t - k * _LN2_HIGH) - k * _LN2_LOW
    exp = torch.full_like(r, _EXP_TERMS[0])
    for term in _EXP_TERMS[1:]:
        exp = exp * r
        exp = exp + term
    exp = exp * _power_of_two(k)
    return (x.double() / (1 + exp)).float()


# Combine


def combine(
    y: torch.Tensor, buffer: SymmBuffer, *, combine: str, rows_are_home: bool = False
) -> None:
    """Sends the rows of the workspace home to their tokens' ranks, and adds up what comes home.

    "exact": every row goes home as it is; a token's rank adds weight x row over the slots, in slot
    order. "fast": a rank first adds weight x row over its own rows of a token, in slot order, and
    sends one row; a token's rank adds those in rank order. All in fp32, multiplications and
    additions rounded apart, starting from +0. Waits for every rank's combine flag.

    Args:
        y: bf16, at least [num_tokens, H]; rows past the staged tokens are not written.
        rows_are_home: ``l2`` has stored the rows at their ``homes``, on "exact" alone.

    Raises:
        PeerTimeoutError: a rank did not combine within the deadline.
        LayerMismatchError: a rank combined in the other mode; ``y`` is then not written.
    """
    assert not rows_are_home
    shape, local = buffer.shape, buffer.local
    (_send_rows_home if combine == "exact" else _send_sums_home)(buffer)
    mine = _MODES.index(combine)
    ranks = _others_last_self(buffer.rank, shape.world_size)
    _raise_flags(buffer, "combine", [(r, mine) for r in ranks])
    for rank, mode in enumerate(_wait_for_flags(buffer, "combine")):
        if mode != mine:
            raise combined_differently(rank)

    n = int(local.num_tokens)
    home = local.home_rows[: n * shape.top_k].view(n, shape.top_k, shape.hidden_size)
    topk_idx = local.topk_idx[:n]
    total = torch.zeros(n, shape.hidden_size, dtype=torch.float32, device=buffer.device)
    if combine == "exact":
        for k in range(shape.top_k):
            term = local.topk_weights[:n, k, None] * home[:, k].float()
            total = torch.where(topk_idx[:, k, None] >= 0, total + term, total)
    else:
        owners = _distinct_owners_below(topk_idx, shape.experts_per_rank, shape.world_size)
        for j in range(min(shape.top_k, shape.world_size)):
            total = torch.where(j < owners[:, None], total + home[:, j].float(), total)
    y[:n] = total


_MODES = ("exact", "fast")  # what a combine flag carries beside the call


def combined_differently(rank: int) -> LayerMismatchError:
    return LayerMismatchError(
        f"every rank must give the same combine; rank {rank} gave another one than this rank, so "
        f"what came of that call is not valid."
    )


def _send_rows_home(buffer: SymmBuffer) -> None:
    shape, local, work = buffer.shape, buffer.local, buffer.workspace
    row_slot = work.row_slot[: int(work.expert_offsets[-1])]
    index, slot = row_slot // shape.top_k, row_slot % shape.top_k
    target = local.recv_token.flatten()[index] * shape.top_k + slot
    source = index // shape.max_num_tokens
    for r in _others_last_self(buffer.rank, shape.world_size):
        chosen = (source == r).nonzero().squeeze(1)
        _put_rows(buffer, r, target[chosen], work.rows[chosen])


def _send_sums_home(buffer: SymmBuffer) -> None:
    shape, local, work = buffer.shape, buffer.local, buffer.workspace
    row_slot = work.row_slot[: int(work.expert_offsets[-1])]
    index, place = torch.unique(row_slot // shape.top_k, return_inverse=True)
    row_of = torch.full((len(index), shape.top_k), -1, device=buffer.device)
    row_of[place, (row_slot % shape.top_k).long()] = torch.arange(
        len(row_slot), device=buffer.device
    )
    weights = local.recv_topk_weights.flatten(0, 1)[index]
    total = torch.zeros(len(index), shape.hidden_size, dtype=torch.float32, device=buffer.device)
    for k in range(shape.top_k):
        term = weights[:, k, None] * work.rows[row_of[:, k].clamp(min=0)].float()
        total = torch.where(row_of[:, k, None] >= 0, total + term, total)
    sums = total.bfloat16()

    ordinal = _distinct_owners_below(
        local.recv_topk_idx.flatten(0, 1)[index], shape.experts_per_rank, buffer.rank
    )
    target = local.recv_token.flatten()[index] * shape.top_k + ordinal
    source = index // shape.max_num_tokens
    for r in _others_last_self(buffer.rank, shape.world_size):
        chosen = (source == r).nonzero().squeeze(1)
        _put_rows(buffer, r, target[chosen], sums[chosen])


def _distinct_owners_below(
    topk_idx: torch.Tensor, experts_per_rank: int, rank: int
) -> torch.Tensor:
    """How many ranks below ``rank`` own an expert of each token: int32 [n]."""
    owner = topk_idx // experts_per_rank
    first = owner >= 0
    for k in range(1, owner.shape[1]):
        first[:, k] &= (owner[:, :k] != owner[:, k, None]).all(1)
    return (first & (owner < rank)).sum(1, dtype=torch.int32)


# One-sided writes, and the flags that announce them


def _put(
    buffer: SymmBuffer, phase: str, rank: int, destination: torch.Tensor, source: torch.Tensor
) -> None:
    destination.copy_(source)
    buffer.bytes_put[phase][rank] += source.nbytes


def _put_rows(buffer: SymmBuffer, rank: int, target: torch.Tensor, rows: torch.Tensor) -> None:
    buffer.peers[rank].home_rows.index_copy_(0, target.long(), rows)
    buffer.bytes_put["combine"][rank] += rows.nbytes


def _raise_flags(buffer: SymmBuffer, phase: str, counts: list[tuple[int, int]]) -> None:
    """Tells every rank that this rank's writes of the phase are there, and a number with it: of
    dispatch, how many tokens; of combine, the mode."""
    buffer.fence()
    epoch = int(buffer.local.epoch) & EPOCH_MASK
    for r, count in counts:
        word = epoch << 32 | count
        signed = word - (1 << 64) if word >= 1 << 63 else word
        flag = getattr(buffer.peers[r], f"{phase}_flags")[buffer.rank]
        _put(buffer, phase, r, flag, torch.tensor(signed))
    buffer.fence()


def _wait_for_flags(buffer: SymmBuffer, phase: str) -> list[int]:
    """Waits until every rank has raised its flag of the phase; the numbers in them, by rank."""
    local = buffer.local
    epoch = int(local.epoch)
    flags = getattr(local, f"{phase}_flags")
    deadline = time.monotonic() + buffer.timeout_s
    local.progress.fill_(epoch << 8 | PHASES.index(phase) + 1)
    pause = 0.0
    while late := _late(flags, epoch):
        buffer.check()
        if time.monotonic() > deadline:
            blamed = _blame(buffer, late)
            # Whoever stopped waiting in the meantime has told everyone why before it did.
            buffer.check()
            seen = int(flags[blamed[0]]) >> 32 & EPOCH_MASK
            behind = (epoch - seen) & EPOCH_MASK
            raise buffer.abort(blamed, phase, epoch, max(epoch - behind, 0))
        time.sleep(pause)
        pause = min(pause + 20e-6, 1e-3)
    local.progress.zero_()
    buffer.fence()
    return [word & EPOCH_MASK for word in flags.tolist()]


def _late(flags: torch.Tensor, epoch: int) -> list[int]:
    """Ranks whose flag is not of this call. Equality, not order: a peer is at most one call ahead,
    and never of a flag that is still waited for, so the 32 bits may wrap around."""
    expected = epoch & EPOCH_MASK
    return [r for r, word in enumerate(flags.tolist()) if word >> 32 & EPOCH_MASK != expected]


def _blame(buffer: SymmBuffer, late: list[int]) -> list[int]:
    """Of the ranks that are late, and those that they wait for, the ones that wait for nobody."""
    blamed: set[int] = set()
    seen = {buffer.rank}
    pending = list(late)
    while pending:
        r = pending.pop()
        if r in seen:
            continue
        seen.add(r)
        progress = int(buffer.peers[r].progress)
        waits_for: list[int] = []
        if progress:
            flags = getattr(buffer.peers[r], f"{PHASES[(progress & 255) - 1]}_flags")
            waits_for = _late(flags, progress >> 8)
        if waits_for:
            pending += waits_for
        else:
            blamed.add(r)
    return sorted(blamed or late)
