"""NVFP4, bit by bit: value = e2m1 code x ue4m3 scale of its block x fp32 global scale.

A block is 16 consecutive elements of the last dimension. Quantising, with all operations in fp32,
each correctly rounded, in the order of NVIDIA ModelOpt's ``NVFP4QTensor``:

    scale = ue4m3(clamp(amax(|block|) / (6 * global_scale), 2**-9, 448))
    code  = e2m1(x / (scale * global_scale))

Both conversions round to nearest, ties to even. The lower bound keeps a block that is small against
its global scale: without it the scale would round to zero, and values of up to 3 * 2**-9 *
global_scale would be lost. A block of zeros gets that bound too. A block that holds NaN or infinity
gets the scale NaN (byte 0x7F) and codes of zero.

Everything here is plain torch, gives the same bits on CPU and GPU, and never waits for the device.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from megamoe_ep.errors import ArgumentError

BLOCK = 16
E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # of codes 0..7; bit 3 is the sign
E2M1_MAX = 6.0
UE4M3_MAX = 448.0
UE4M3_MIN = 2.0**-9
MIN_GLOBAL_SCALE = 2.0**-117  # times UE4M3_MIN it is still a normal fp32 number


class QuantizedTensor(NamedTuple):
    """A tensor [..., K] in NVFP4."""

    codes: torch.Tensor  # uint8 [..., K/2], even k in the low nibble
    scales: torch.Tensor  # float8_e4m3fn [..., K/16], sign never set
    global_scale: torch.Tensor  # fp32, broadcastable to [...]; multiplies


def encode_e2m1(x: torch.Tensor) -> torch.Tensor:
    """Codes of ``x`` (fp32), uint8 of the same shape: nearest, ties to even, saturating at 6.

    The sign of zero is kept; NaN gives code 0.
    """
    magnitude = x.abs()
    codes = (magnitude > 0.25).to(torch.uint8)
    codes += magnitude >= 0.75
    codes += magnitude > 1.25
    codes += magnitude >= 1.75
    codes += magnitude > 2.5
    codes += magnitude >= 3.5
    codes += magnitude > 5.0
    negative = torch.signbit(x) & ~torch.isnan(x)
    return codes | negative.to(torch.uint8) << 3


def decode_e2m1(codes: torch.Tensor) -> torch.Tensor:
    """Values of ``codes`` (uint8, 0..15), bf16 of the same shape; code 8 gives -0."""
    magnitude = (codes & 7).to(torch.int16)
    exponent = magnitude >> 1
    significand = (magnitude & 1) + 2 * (exponent > 0)
    halves = significand << (exponent - 1).clamp(min=0)
    value = halves.to(torch.bfloat16) * 0.5
    return torch.where(codes > 7, -value, value)


def pack(codes: torch.Tensor) -> torch.Tensor:
    """Two codes a byte: uint8 [..., K] to uint8 [..., K/2], even k in the low nibble."""
    if codes.shape[-1] % 2:
        raise ArgumentError(
            f"codes must have an even number of elements in the last dimension, two a byte; "
            f"got shape {list(codes.shape)}."
        )
    return codes[..., 0::2] | codes[..., 1::2] << 4


def unpack(packed: torch.Tensor) -> torch.Tensor:
    """Inverse of ``pack``: uint8 or int8 [..., K/2] to uint8 [..., K]."""
    packed = packed.view(torch.uint8)
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)


def global_scale_from_amax(amax: torch.Tensor) -> torch.Tensor:
    """Global scale (fp32) with which the largest magnitude ``amax`` is just representable.

    amax / (6 * 448), at least 2**-117; NaN where ``amax`` is not finite.
    """
    amax = amax.float()
    # A divisor that is a Python number becomes a multiplication by its reciprocal on a GPU.
    largest = torch.full_like(amax, E2M1_MAX * UE4M3_MAX)
    scale = (amax / largest).clamp(min=MIN_GLOBAL_SCALE)
    return torch.where(amax.isfinite(), scale, torch.nan)


def quantize(x: torch.Tensor, global_scale: torch.Tensor | float) -> QuantizedTensor:
    """Quantises with a global scale that is known beforehand.

    Args:
        x: bf16, fp16 or fp32 [..., K], K a multiple of 16.
        global_scale: a positive number, or fp32 on the device of ``x`` and broadcastable to
            ``x.shape[:-1]``: one for all, or one per row. A row whose scale is NaN gets NaN block
            scales and zero codes.

    Raises:
        ArgumentError: ``x`` or ``global_scale`` is of another dtype, shape or device.
    """
    if x.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ArgumentError(f"x must be bf16, fp16 or fp32; got {x.dtype}.")
    if x.ndim == 0 or x.shape[-1] % BLOCK:
        raise ArgumentError(
            f"x must have a multiple of {BLOCK} elements in its last dimension, the block of "
            f"NVFP4; got shape {list(x.shape)}."
        )
    if not isinstance(global_scale, torch.Tensor):
        if not 0 < global_scale < float("inf"):
            raise ArgumentError(f"global_scale must be positive and finite; got {global_scale}.")
        global_scale = torch.full((), global_scale, device=x.device)
    g = _per_row(global_scale, x.shape[:-1], x.device)[..., None]

    blocks = x.float().reshape(*x.shape[:-1], x.shape[-1] // BLOCK, BLOCK)
    amax = blocks.abs().amax(-1)
    scales = (amax / (E2M1_MAX * g)).clamp(UE4M3_MIN, UE4M3_MAX)
    scales = torch.where(amax.isfinite(), scales, torch.nan).to(torch.float8_e4m3fn)
    step = scales.float() * g
    codes = encode_e2m1(blocks / step[..., None])
    codes = torch.where(step.isnan()[..., None], 0, codes)
    return QuantizedTensor(pack(codes.flatten(-2)), scales, global_scale)


def quantize_per_token(x: torch.Tensor) -> QuantizedTensor:
    """Quantises each row of ``x`` (bf16, fp16 or fp32 [..., K]) with its own global scale.

    The scale, fp32 [...], is ``global_scale_from_amax`` of the row. A row that holds NaN or inf
    gets NaN scales and zero codes, and changes no other row.

    Raises:
        ArgumentError: see ``quantize``.
    """
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ArgumentError(f"x must have elements in its last dimension; got {list(x.shape)}.")
    return quantize(x, global_scale_from_amax(x.abs().amax(-1)))


def dequantize(
    codes: torch.Tensor, scales: torch.Tensor, global_scale: torch.Tensor | None = None
) -> torch.Tensor:
    """Values [..., K] of packed ``codes`` and block ``scales``.

    Args:
        codes: uint8 or int8 [..., K/2].
        scales: float8_e4m3fn [..., K/16].
        global_scale: None, or fp32 and broadcastable to ``codes.shape[:-1]``.

    Returns:
        Without ``global_scale``: bf16, exact, since code x scale has at most six significant bits.
        With it: fp32, (code x scale) x global_scale, rounded once.

    Raises:
        ArgumentError: a tensor is of another dtype, shape or device.
    """
    if codes.dtype not in (torch.uint8, torch.int8):
        raise ArgumentError(f"codes must be uint8 or int8, two a byte; got {codes.dtype}.")
    if scales.dtype != torch.float8_e4m3fn:
        raise ArgumentError(f"scales must be float8_e4m3fn; got {scales.dtype}.")
    expected = (*codes.shape[:-1], codes.shape[-1] // (BLOCK // 2)) if codes.ndim else ()
    if codes.ndim == 0 or codes.shape[-1] % (BLOCK // 2) or tuple(scales.shape) != expected:
        raise ArgumentError(
            f"scales must have one element for every {BLOCK // 2} bytes of codes; "
            f"got codes {list(codes.shape)} and scales {list(scales.shape)}."
        )
    values = _decode_bytes(codes).view(*scales.shape, BLOCK)
    values = (values * scales.to(torch.bfloat16)[..., None]).flatten(-2)
    if global_scale is None:
        return values
    return values.float() * _per_row(global_scale, codes.shape[:-1], codes.device)[..., None]


def _decode_bytes(packed: torch.Tensor) -> torch.Tensor:
    """decode_e2m1(unpack(packed)), by one look-up a byte: many times faster on a CPU."""
    every_byte = torch.arange(256, device=packed.device).to(torch.uint8)
    pairs = decode_e2m1(unpack(every_byte[:, None])).view(torch.int32).squeeze(-1)
    index = packed.view(torch.uint8).to(torch.int32).flatten()
    return pairs.index_select(0, index).view(packed.shape).view(torch.bfloat16)


def _per_row(global_scale: torch.Tensor, rows: torch.Size, device: torch.device) -> torch.Tensor:
    if global_scale.dtype != torch.float32 or global_scale.device != device:
        raise ArgumentError(
            f"global_scale must be fp32 on {device}, like the tensor it scales; "
            f"got {global_scale.dtype} on {global_scale.device}."
        )
    try:
        return global_scale.expand(rows) if global_scale.numel() != 1 else global_scale.view(())
    except RuntimeError:
        raise ArgumentError(
            f"global_scale must be one number, or broadcastable to one per row {list(rows)}; "
            f"got shape {list(global_scale.shape)}."
        ) from None
