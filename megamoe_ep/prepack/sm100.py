"""The weights of csrc/gemm/sm100: codes as a checkpoint has them, block scales in tiles.

SM100's block-scaled MMA reads scales in tiles of 128 rows x 4 scales, 512 bytes each; the tiles of
the same rows follow one another along K. Inside a tile, row r and scale k lie at byte
(r % 32) * 16 + (r / 32) * 4 + k. Rows and scales are rounded up to whole tiles; padding is zero.
An expert starts on a tile of its own. csrc/layout/sm100.h says the same for the kernels, and
CUTLASS calls the layout SFA for one operand and SFB for the other.
"""

from __future__ import annotations

import torch

from megamoe_ep import nvfp4
from megamoe_ep.errors import ArgumentError

SIZE_MULTIPLE = (
    32  # of hidden and of intermediate size: TMA takes rows of 16 bytes and their multiples
)

TILE_ROWS = 128
TILE_SCALES = 4


def pack(
    codes: torch.Tensor, scales: torch.Tensor, *, gated: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """From checkpoint layout to this one.

    Args:
        codes: uint8 [L, N, K/2], two E2M1 codes a byte.
        scales: float8_e4m3fn [L, N, K/16], sign never set.
        gated: rows are gate, then up, as L1's are; they stay so.

    Returns:
        ``codes`` themselves, or a copy where they do not start at a multiple of 16 bytes as TMA
        wants; and uint8 [L, scale_nbytes(N, K/16)].

    Raises:
        ArgumentError: N or K is not a multiple of 32, or a scale is negative.
    """
    experts, n, half_k = codes.shape
    if n % SIZE_MULTIPLE or 2 * half_k % SIZE_MULTIPLE:
        raise ArgumentError(
            f"codes must have N and K multiples of {SIZE_MULTIPLE} in the sm100 layout; got {n} x "
            f"{2 * half_k}. The portable layout takes any multiple of {nvfp4.BLOCK}."
        )
    plain = scales.view(torch.uint8)
    if (plain > 0x7F).any():
        raise ArgumentError("scales must be positive or zero, as UE4M3 is; got a negative one.")
    ksf = scales.shape[2]
    packed = plain.new_zeros(experts, scale_nbytes(n, ksf))
    packed[:, scale_offsets(n, ksf, codes.device).flatten()] = plain.flatten(1)
    return codes.clone() if codes.data_ptr() % 16 else codes, packed


def unpack(
    codes: torch.Tensor, scales: torch.Tensor, *, gated: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Inverse of ``pack``: uint8 [L, N, K/2] and float8_e4m3fn [L, N, K/16]."""
    _, n, half_k = codes.shape
    ksf = half_k // (nvfp4.BLOCK // 2)
    plain = scales[:, scale_offsets(n, ksf, codes.device)]
    return codes, plain.view(torch.float8_e4m3fn)


def scale_nbytes(rows: int, ksf: int) -> int:
    """Bytes of the scales of ``rows`` rows with ``ksf`` scales each."""
    return -(-rows // TILE_ROWS) * TILE_ROWS * -(-ksf // TILE_SCALES) * TILE_SCALES


def scale_offsets(rows: int, ksf: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """int64 [rows, ksf]: the byte of each scale."""
    row = torch.arange(rows, device=device)[:, None]
    k = torch.arange(ksf, device=device)
    tile = row // TILE_ROWS * -(-ksf // TILE_SCALES) + k // TILE_SCALES
    row = row % TILE_ROWS
    return tile * (TILE_ROWS * TILE_SCALES) + row % 32 * 16 + row // 32 * 4 + k % TILE_SCALES
