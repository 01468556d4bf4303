"""csrc's grouped GEMMs for Hopper: launched on the current stream, waited for by nobody.

Same arguments as in ``portable``, and its results but for two things: the order of fp32 additions,
and that of the columns of ``rows`` and of ``h``, which is ``COLUMNS``. A row's bits depend on that
row and on its expert's weights alone, and are the same at every run. Nothing here allocates or
waits for the device, so calls can be captured in a CUDA graph.
"""

from __future__ import annotations

import math
from collections.abc import MutableMapping
from typing import TYPE_CHECKING

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from megamoe_ep.errors import ArgumentError
from megamoe_ep.kernels import ColumnOrder, WeightLayout, library
from megamoe_ep.prepack import MAX_EXPERTS
from megamoe_ep.weights import KernelWeights

if TYPE_CHECKING:
    from megamoe_ep.shape import LayerShape
    from megamoe_ep.symm_buffer import Workspace

COLUMNS: ColumnOrder = "by lane"  # prepack.sm90.column_order
STORES_HOME = True
FEW_ROWS = 40  # of an expert, from which on the GEMMs are cut for many: docs/performance.md
_ALIGNMENT = 16  # bytes; TMA takes addresses and copies of no less

_expected_rows: MutableMapping[torch.Tensor, int] = WeakTensorKeyDictionary()  # by expert_offsets


def allocate_scratch(workspace: Workspace, shape: LayerShape) -> None:
    """Allocates nothing; notes how many rows to expect of a workspace, which has room for more."""
    _expected_rows[workspace.expert_offsets] = shape.max_num_tokens * shape.top_k


def is_few(rows: int, experts: int) -> bool:
    """Whether the GEMMs are cut for few rows an expert, where so many rows are expected. A matter
    of speed alone: every number of rows is right with both cuts, and gives the same bits."""
    return rows <= FEW_ROWS * experts


def cut_for_few(expert_offsets: torch.Tensor, rows: int) -> bool:
    """``is_few`` of what is expected of this workspace, or of the ``rows`` that it has room for."""
    return is_few(_expected_rows.get(expert_offsets, rows), expert_offsets.shape[0] - 1)


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
    """See ``portable.l1``.

    Raises:
        ArgumentError: ``weights`` are not L1's in layout "sm90", or a tensor has another dtype,
            shape, device or alignment than said there.
        LibraryError: csrc's library is missing or stale.
    """
    check_weights(weights, "sm90", gated=True)
    device, experts = weights.codes.device, weights.num_experts
    r = rows.shape[0]
    check_tensor(rows, "rows", torch.bfloat16, (r, weights.k), device)
    check_tensor(row_scales, "row_scales", torch.float32, (r,), device)
    check_tensor(expert_offsets, "expert_offsets", torch.int32, (experts + 1,), device)
    check_tensor(alpha, "alpha", torch.float32, (experts, 2), device)
    if input_scale is not None:
        check_tensor(input_scale, "input_scale", torch.float32, (experts,), device)
    check_tensor(out, "out", torch.bfloat16, (r, weights.n // 2), device)
    if r == 0:
        return
    library.load().gemm_sm90_l1(
        rows.data_ptr(),
        row_scales.data_ptr(),
        expert_offsets.data_ptr(),
        weights.codes.data_ptr(),
        alpha.data_ptr(),
        0 if input_scale is None else input_scale.data_ptr(),
        math.inf if clamp is None else clamp,
        out.data_ptr(),
        r,
        experts,
        weights.n,
        weights.k,
        cut_for_few(expert_offsets, r),
        device.index,
        torch.cuda.current_stream(device).cuda_stream,
    )


def l2(
    h: torch.Tensor,
    expert_offsets: torch.Tensor,
    weights: KernelWeights,
    alpha: torch.Tensor,
    *,
    out: torch.Tensor,
    homes: torch.Tensor | None = None,
) -> None:
    """See ``portable.l2``.

    ``expert_offsets``, ``alpha``, ``weights`` and ``homes`` may be read before the kernel ahead in
    the stream has ended: what writes them must be done before that one begins. With ``homes`` the
    rows go there, and ``out`` is not written.

    Raises:
        ArgumentError: ``weights`` are not L2's in layout "sm90", or a tensor has another dtype,
            shape, device or alignment than said there.
        LibraryError: csrc's library is missing or stale.
    """
    check_weights(weights, "sm90", gated=False)
    device, experts = weights.codes.device, weights.num_experts
    r = h.shape[0]
    check_tensor(h, "h", torch.bfloat16, (r, weights.k), device)
    check_tensor(expert_offsets, "expert_offsets", torch.int32, (experts + 1,), device)
    check_tensor(alpha, "alpha", torch.float32, (experts,), device)
    check_tensor(out, "out", torch.bfloat16, (r, weights.n), device)
    if homes is not None:
        check_tensor(homes, "homes", torch.int64, (r,), device)
    if r == 0:
        return
    library.load().gemm_sm90_l2(
        h.data_ptr(),
        expert_offsets.data_ptr(),
        weights.codes.data_ptr(),
        alpha.data_ptr(),
        out.data_ptr(),
        0 if homes is None else homes.data_ptr(),
        r,
        experts,
        weights.n,
        weights.k,
        cut_for_few(expert_offsets, r),
        device.index,
        torch.cuda.current_stream(device).cuda_stream,
    )


def check_weights(weights: KernelWeights, layout: WeightLayout, *, gated: bool) -> None:
    """Raises ArgumentError unless ``weights`` are L1's or L2's in ``layout``, on a GPU."""
    if weights.layout != layout or weights.gated != gated:
        which = {True: "L1's", False: "L2's"}
        raise ArgumentError(
            f"weights must be {which[gated]} in layout {layout!r}; got {which[weights.gated]} in "
            f"{weights.layout!r}. Make them with transform_weights_for_nvfp4_mega_moe()."
        )
    if weights.codes.device.type != "cuda":
        raise ArgumentError(f"weights must be on a GPU; got {weights.codes.device}.")
    if weights.num_experts > MAX_EXPERTS:
        raise ArgumentError(
            f"weights must be of at most {MAX_EXPERTS} experts on one rank; got "
            f"{weights.num_experts}. Use more ranks."
        )


def check_tensor(
    tensor: torch.Tensor, name: str, dtype: torch.dtype, shape: tuple[int, ...],
    device: torch.device,
) -> None:  # fmt: skip
    """Raises ArgumentError unless ``tensor`` is of that kind, contiguous, and aligned for TMA."""
    if tensor.dtype != dtype or tensor.shape != shape or tensor.device != device:
        raise ArgumentError(
            f"{name} must be {dtype} {list(shape)} on {device}; got {tensor.dtype} "
            f"{list(tensor.shape)} on {tensor.device}."
        )
    if not tensor.is_contiguous():
        raise ArgumentError(
            f"{name} must be contiguous; got strides {list(tensor.stride())} for shape "
            f"{list(tensor.shape)}. Call .contiguous() on it."
        )
    if dtype == torch.bfloat16 and tensor.data_ptr() % _ALIGNMENT:
        raise ArgumentError(
            f"{name} must start at a multiple of {_ALIGNMENT} bytes; got a view that starts at "
            f"{tensor.data_ptr() % _ALIGNMENT} bytes past one. Call .clone() on it."
        )
