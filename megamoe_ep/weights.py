"""Experts' weights: from a ModelOpt NVFP4 checkpoint on disk to the layout the kernels read."""

from __future__ import annotations

import importlib
from dataclasses import dataclass

import torch

from megamoe_ep import nvfp4
from megamoe_ep.errors import ArgumentError
from megamoe_ep.kernels import WeightLayout, weight_layout


@dataclass(frozen=True)
class CheckpointExperts:
    """A contiguous range of one layer's experts, as checkpoints hold them: L experts, stacked.

    Every global scale multiplies. Rows of ``w13`` are gate, then up.
    """

    w13: torch.Tensor  # uint8 [L, 2I, H/2], two E2M1 codes a byte
    w13_scale: torch.Tensor  # float8_e4m3fn [L, 2I, H/16]
    w13_scale_2: torch.Tensor  # fp32 [L, 2], global scales of gate and of up
    w2: torch.Tensor  # uint8 [L, H, I/2]
    w2_scale: torch.Tensor  # float8_e4m3fn [L, H, I/16]
    w2_scale_2: torch.Tensor  # fp32 [L]
    w13_input_scale: torch.Tensor | None = None  # fp32 [L], static global scale of x
    w2_input_scale: torch.Tensor | None = None  # fp32 [L], static global scale of h
    first_expert: int = 0  # id in the layer of the first of them

    @property
    def num_experts(self) -> int:
        return self.w13.shape[0]

    @property
    def hidden_size(self) -> int:
        return self.w2.shape[1]

    @property
    def intermediate_size(self) -> int:
        return self.w13.shape[1] // 2


@dataclass(frozen=True)
class KernelWeights:
    """One GEMM's weights of all local experts, as the kernels of ``layout`` read them.

    "portable" is the checkpoint's own layout; the others are said in ``megamoe_ep.prepack``.
    """

    layout: WeightLayout
    codes: torch.Tensor  # portable: uint8 [num_experts, n, k/2]
    scales: torch.Tensor  # portable: float8_e4m3fn [num_experts, n, k/16]
    num_experts: int
    n: int  # outputs; 2I for L1, whose rows are gate, then up
    k: int
    gated: bool  # L1


def transform_weights_for_nvfp4_mega_moe(
    l1: tuple[torch.Tensor, torch.Tensor],
    l2: tuple[torch.Tensor, torch.Tensor],
    *,
    device: torch.device | str | None = None,
    layout: WeightLayout | None = None,
) -> tuple[KernelWeights, KernelWeights]:
    """Brings the experts' weights from checkpoint layout to the kernels', once, at load.

    Args:
        l1: codes uint8 [L, 2I, H/2] and block scales float8_e4m3fn [L, 2I, H/16]; gate rows, then
            up rows.
        l2: codes uint8 [L, H, I/2] and block scales float8_e4m3fn [L, H, I/16].
        device: where the layer will run; None: where ``l1``'s codes are.
        layout: None takes the fastest that ``device`` has kernels for.

    Returns:
        Weights of L1 and of L2. In "portable" layout they share memory with the arguments that are
        on ``device`` already.

    Raises:
        ArgumentError: a tensor has another dtype or shape than said here.
        UnsupportedDeviceError: ``device`` is neither a CPU nor a CUDA GPU.
    """
    _check_matrix(*l1, "l1")
    _check_matrix(*l2, "l2")
    experts, n1, _ = l1[0].shape
    hidden, intermediate = 2 * l1[0].shape[2], n1 // 2
    if n1 % 2 or tuple(l2[0].shape) != (experts, hidden, intermediate // 2):
        raise ArgumentError(
            f"l1 and l2 must be the two projections of one layer, codes [L, 2I, H/2] and "
            f"[L, H, I/2]; got {list(l1[0].shape)} and {list(l2[0].shape)}."
        )
    target = torch.device(device) if device is not None else l1[0].device
    if layout is None:
        layout = weight_layout(target)
    return _to_layout(*l1, target, layout, gated=True), _to_layout(*l2, target, layout, gated=False)


def _to_layout(
    codes: torch.Tensor,
    scales: torch.Tensor,
    device: torch.device,
    layout: WeightLayout,
    *,
    gated: bool,
) -> KernelWeights:
    experts, n, half_k = codes.shape
    codes, scales = codes.to(device).contiguous(), scales.to(device).contiguous()
    if layout != "portable":
        module = importlib.import_module(f"megamoe_ep.prepack.{layout}")
        codes, scales = module.pack(codes, scales, gated=gated)
    return KernelWeights(layout, codes, scales, experts, n, 2 * half_k, gated)


def _check_matrix(codes: torch.Tensor, scales: torch.Tensor, name: str) -> None:
    if codes.dtype != torch.uint8:
        raise ArgumentError(f"{name}'s codes must be uint8, two a byte; got {codes.dtype}.")
    if scales.dtype != torch.float8_e4m3fn:
        raise ArgumentError(f"{name}'s block scales must be float8_e4m3fn; got {scales.dtype}.")
    if codes.ndim != 3 or codes.shape[-1] % (nvfp4.BLOCK // 2):
        raise ArgumentError(
            f"{name}'s codes must have shape [L, N, K/2] with K a multiple of {nvfp4.BLOCK}; got "
            f"{list(codes.shape)}."
        )
    expected = [*codes.shape[:2], codes.shape[2] // (nvfp4.BLOCK // 2)]
    if list(scales.shape) != expected:
        raise ArgumentError(
            f"{name}'s block scales must have shape {expected}, one for every {nvfp4.BLOCK} "
            f"weights; got {list(scales.shape)}."
        )
