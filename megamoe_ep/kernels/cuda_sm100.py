"""csrc's grouped GEMMs for Blackwell: launched on the current stream, waited for by nobody.

Same arguments as in ``portable``, and its results but for the order of fp32 additions and the last
bit of an exponential. Compiled and checked without such a GPU, and not yet run on one: see
docs/blackwell.md.

The MMA takes NVFP4 on both sides. So the rows have to be NVFP4 too, as they are with "nvfp4"
activations and a static scale for h; with bf16 activations the portable GEMMs have to serve.

The kernels need memory between them, for packed rows and accumulators. It belongs to the caller's
``expert_offsets``: allocated with the SymmBuffer, or at the first call, and freed with that tensor.
After that nothing here allocates or waits for the device, so calls can be captured in a CUDA graph.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import MutableMapping
from typing import Any

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from megamoe_ep.errors import ArgumentError
from megamoe_ep.kernels import ColumnOrder, library
from megamoe_ep.kernels.cuda import check_tensor, check_weights
from megamoe_ep.prepack.sm100 import SIZE_MULTIPLE
from megamoe_ep.shape import LayerShape
from megamoe_ep.symm_buffer import Workspace
from megamoe_ep.weights import KernelWeights

COLUMNS: ColumnOrder = "plain"
STORES_HOME = False
# Room for rows, over experts, from which on tiles of 2 SMs and 256 tokens are taken instead of
# those of 1 SM and 64. The room is all that the host knows; at EP 8 an eighth of it is filled on
# average. Reckoned, not measured.
WIDE_FROM = 512


def is_few(rows: int, experts: int) -> bool:
    """Whether the GEMMs are cut for few rows an expert, where there is room for so many rows."""
    return rows < WIDE_FROM * experts


class Scratch:
    """Memory of the kernels between one another, for L1 and L2 of one layer shape.

    Args:
        rows: the most that all local experts together receive.
        device: the GPU.

    Raises:
        ArgumentError: CUTLASS cannot do these sizes.
    """

    def __init__(
        self, rows: int, experts: int, hidden: int, intermediate: int, device: torch.device
    ) -> None:
        self.sizes = (rows, experts, hidden, intermediate)
        self.functions: Any = library.load()
        sms = torch.cuda.get_device_properties(device).multi_processor_count
        try:
            nbytes = int(self.functions.gemm_sm100_scratch_bytes(*self.sizes, sms))
        except ValueError as error:
            raise ArgumentError(str(error)) from None
        self._memory = torch.empty(nbytes, dtype=torch.uint8, device=device)
        values = {
            "scratch": self._memory.data_ptr(),
            "rows": rows,
            "experts": experts,
            "hidden": hidden,
            "intermediate": intermediate,
            "wide": int(not is_few(rows, experts)),
            "sms": sms,
            "device": torch.cuda.current_device() if device.index is None else device.index,
        }
        fields = self.functions.gemm_sm100_fields().split()
        self._layer = array("q", (values[name] for name in fields))
        self.layer = self._layer.buffer_info()[0]


_scratch: MutableMapping[torch.Tensor, Scratch] = WeakTensorKeyDictionary()  # by expert_offsets


def allocate_scratch(workspace: Workspace, shape: LayerShape) -> None:
    """Allocates what ``l1`` and ``l2`` need on this workspace; where they cannot serve, nothing."""
    sizes = (shape.hidden_size, shape.intermediate_size)
    if shape.activation_format == "bf16" or any(size % SIZE_MULTIPLE for size in sizes):
        return
    _scratch_of(workspace.expert_offsets, workspace.rows.shape[0], *sizes)


def _scratch_of(expert_offsets: torch.Tensor, rows: int, hidden: int, intermediate: int) -> Scratch:
    sizes = (rows, expert_offsets.shape[0] - 1, hidden, intermediate)
    found = _scratch.get(expert_offsets)
    if found is not None and found.sizes == sizes:
        return found
    made = _scratch[expert_offsets] = Scratch(*sizes, expert_offsets.device)
    return made


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
    """See ``portable.l1``. A block of ``rows`` that is not E2M1 code x UE4M3 scale gives NaN.

    Raises:
        ArgumentError: ``input_scale`` is None; ``weights`` are not L1's in layout "sm100"; or a
            tensor has another dtype, shape, device or alignment than said there.
        LibraryError: csrc's library is missing or stale.
    """
    if input_scale is None:
        raise ArgumentError(
            "input_scale (l2_input_scale of the layer) must be given on Blackwell: its MMA takes "
            "NVFP4 on both sides, so csrc's GEMMs serve activation_format='nvfp4' with a static "
            "scale for h; got None. For bf16 activations, or a checkpoint without "
            "down-projection input scales, transform the weights with nvfp4_activations=False, "
            "which leaves them to the portable GEMMs."
        )
    check_weights(weights, "sm100", gated=True)
    device, experts, r = weights.codes.device, weights.num_experts, rows.shape[0]
    check_tensor(rows, "rows", torch.bfloat16, (r, weights.k), device)
    check_tensor(row_scales, "row_scales", torch.float32, (r,), device)
    check_tensor(expert_offsets, "expert_offsets", torch.int32, (experts + 1,), device)
    check_tensor(alpha, "alpha", torch.float32, (experts, 2), device)
    check_tensor(input_scale, "input_scale", torch.float32, (experts,), device)
    check_tensor(out, "out", torch.bfloat16, (r, weights.n // 2), device)
    if r == 0:
        return
    scratch = _scratch_of(expert_offsets, r, weights.k, weights.n // 2)
    scratch.functions.gemm_sm100_l1(
        scratch.layer,
        rows.data_ptr(),
        row_scales.data_ptr(),
        expert_offsets.data_ptr(),
        weights.codes.data_ptr(),
        weights.scales.data_ptr(),
        alpha.data_ptr(),
        input_scale.data_ptr(),
        math.inf if clamp is None else clamp,
        out.data_ptr(),
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
    """See ``portable.l2``. A block of ``h`` that is not E2M1 code x UE4M3 scale gives NaN.

    Raises:
        ArgumentError: ``weights`` are not L2's in layout "sm100", or a tensor has another dtype,
            shape, device or alignment than said there.
        LibraryError: csrc's library is missing or stale.
    """
    assert homes is None
    check_weights(weights, "sm100", gated=False)
    device, experts, r = weights.codes.device, weights.num_experts, h.shape[0]
    check_tensor(h, "h", torch.bfloat16, (r, weights.k), device)
    check_tensor(expert_offsets, "expert_offsets", torch.int32, (experts + 1,), device)
    check_tensor(alpha, "alpha", torch.float32, (experts,), device)
    check_tensor(out, "out", torch.bfloat16, (r, weights.n), device)
    if r == 0:
        return
    scratch = _scratch_of(expert_offsets, r, weights.n, weights.k)
    scratch.functions.gemm_sm100_l2(
        scratch.layer,
        h.data_ptr(),
        expert_offsets.data_ptr(),
        weights.codes.data_ptr(),
        weights.scales.data_ptr(),
        alpha.data_ptr(),
        out.data_ptr(),
        torch.cuda.current_stream(device).cuda_stream,
    )
