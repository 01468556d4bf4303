"""The weights of csrc/gemm/sm90: codes in the order of ``wgmma``'s A fragment, scales beside them.

The kernel multiplies weights (A, m64k16, from registers) with tokens (B), and a thread has all 16
columns of a scale: four a step of k, in four steps. For each stage of 128 columns it needs two
16-byte loads of codes for either block of 64, and one of 8 bytes of scales. ``codes`` is uint8
[L, N/128, K/128, 9216]: for every 128 rows ("slab") and 128 columns, 4096 bytes of codes for each
block, and 1024 of scales. Words are little-endian.

Columns. Four threads share the rows of a fragment; thread c of them has the columns that wgmma
takes for 2 * c, 2 * c + 1, 2 * c + 8 and 2 * c + 9 of a step, and they are of its own scale when
column 16 * c + 4 * j + 2 * i + h of a block is at 16 * j + 8 * i + 2 * c + h. Rows of tokens have
their columns in that order too, "by lane": ``column_order``.

Codes. Strip mb (64 rows) and thread t of a warpgroup: 16 bytes at 2048 * mb + 16 * t, one word for
each step j. With warp w = t / 32, lane l = t % 32, c = l % 4, the thread's rows of the strip are
r = 16 * w + l / 4 and r + 8. Its registers hold two columns each, h = 0, 1, the even one in the low
half of the word and of the register:

    register   row     column of the block      sign at    magnitude at
    a0         r       16 * c + 4 * j + h       15         8, 7, 6
    a1         r + 8   16 * c + 4 * j + h       12         5, 4, 3
    a2         r       16 * c + 4 * j + 2 + h   2*         11, 10, 9
    a3         r + 8   16 * c + 4 * j + 2 + h   0          14*, 13*, 1

Bits are those of the 16-bit half of h, or with * of the other half. Bit 15 and 8..6 are where a
bf16 has its sign, the two lowest bits of its exponent and the highest of its significand; so
masked, and a1 rotated left by 3, a2 right by 3, a code is a bf16 worth value * 2**-126, denormals
included. a3 is what these leave: masked in a1's rotated word, shifted by 2, 7 and 12, the three
added, and masked.

Scales. Thread t has 8 bytes at 8192 + 8 * t, a word for each block. It serves both strips:

    strip   row r      row r + 8
    0       11..4      27..20
    1       the same, after rotating the word right by 8

A scale's byte is e << 3 | m for 2**(e - 22) * (1 + m / 8), e from 13 to 30: UE4M3 with its
subnormals made normal. (word & 0x0FF00FF0) | 0x70007000 is a pair of bf16 worth scale * 2**119, so
code times scale is the weight * 2**-7, exact; the kernel gives alpha the rest. A scale of zero has
byte 0, and its block's magnitudes are stored as 0, which leaves the weights what they were. NaN has
byte 0xFF, and is a NaN in bf16 as well.

Rows. The strips of a thread have neighbours. Slab s of L2: row 16 * w + 8 * i + j of strip mb,
j < 8, is row 128 * s + 32 * w + 4 * j + 2 * i + mb, so that a thread has four of them. Slab s of L1
holds gate and up of the intermediate elements from 64 * s on, so that a thread has both of one
element: row 16 * w + j of strip mb is gate of element 64 * s + 16 * w + 2 * j + mb, and the row
eight below is up.
"""

from __future__ import annotations

import torch

from megamoe_ep import nvfp4
from megamoe_ep.errors import ArgumentError

SIZE_MULTIPLE = 128  # of hidden and of intermediate size

SLAB_ROWS = 128
BLOCK_COLUMNS = 64
STAGE_COLUMNS = 128
CODE_BYTES = SLAB_ROWS * STAGE_COLUMNS // 2
SCALE_BYTES = SLAB_ROWS * STAGE_COLUMNS // nvfp4.BLOCK
STAGE_BYTES = CODE_BYTES + SCALE_BYTES

# Where a code's bits are, the sign first: in its half of a word, or from 16 on in the other half.
_BITS_AT = ((15, 8, 7, 6), (12, 5, 4, 3), (16 + 2, 11, 10, 9), (0, 16 + 14, 16 + 13, 1))
_NAN = 0x7F  # of UE4M3
_PACKED_NAN = 0xFF


def pack(
    codes: torch.Tensor, scales: torch.Tensor, *, gated: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """From checkpoint layout to this one, an expert at a time.

    Args:
        codes: uint8 [L, N, K/2], two E2M1 codes a byte, the even column in the low nibble.
        scales: float8_e4m3fn [L, N, K/16], sign never set.
        gated: the rows are gate, then up, as L1's are.

    Returns:
        uint8 [L, N/128, K/128, 9216], and an empty uint8 tensor where other layouts have scales.

    Raises:
        ArgumentError: N or K is not a multiple of 128, or a scale is negative.
    """
    experts, n, half_k = codes.shape
    k = 2 * half_k
    if n % SLAB_ROWS or k % SIZE_MULTIPLE:
        raise ArgumentError(
            f"codes must have N and K multiples of {SIZE_MULTIPLE} in the sm90 layout; got {n} x "
            f"{k}. The portable layout takes any multiple of {nvfp4.BLOCK}."
        )
    if (scales.view(torch.uint8) > _NAN).any():
        raise ArgumentError("scales must be positive or zero, as UE4M3 is; got a negative one.")
    packed = codes.new_empty(experts, n // SLAB_ROWS, k // STAGE_COLUMNS, STAGE_BYTES)
    order = row_order(n, gated, codes.device)
    recode = _recoded_scales(codes.device)
    for target, expert_codes, expert_scales in zip(packed, codes, scales, strict=True):
        ue4m3 = expert_scales.view(torch.uint8)[order]
        nibbles = expert_codes[order].view(n, k // nvfp4.BLOCK, nvfp4.BLOCK // 2)
        nibbles = torch.where((ue4m3 == 0)[..., None], nibbles & 0x88, nibbles).view(n, half_k)
        target[..., :CODE_BYTES] = _code_words(nibbles).view(torch.uint8).flatten(2)
        target[..., CODE_BYTES:] = _scale_words(recode[ue4m3.int()]).view(torch.uint8).flatten(2)
    return packed, codes.new_empty(0)


def unpack(
    codes: torch.Tensor, scales: torch.Tensor, *, gated: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Inverse of ``pack``; codes under a scale of zero come back as +0 and -0.

    Args:
        codes, scales: what ``pack`` returned.

    Returns:
        uint8 [L, N, K/2] and float8_e4m3fn [L, N, K/16].
    """
    experts, slabs, stages, _ = codes.shape
    n, k = slabs * SLAB_ROWS, stages * STAGE_COLUMNS
    order = row_order(n, gated, codes.device)
    recode = _recoded_scales(codes.device)
    decode = torch.zeros(256, dtype=torch.uint8, device=codes.device)
    decode[recode.long()] = torch.arange(len(recode), dtype=torch.uint8, device=codes.device)
    plain_codes = codes.new_empty(experts, n, k // 2)
    ue4m3 = codes.new_empty(experts, n, k // nvfp4.BLOCK)
    for i, expert in enumerate(codes):
        plain_codes[i, order] = _codes_of_words(expert[..., :CODE_BYTES])
        ue4m3[i, order] = decode[_scales_of_words(expert[..., CODE_BYTES:]).int()]
    return plain_codes, ue4m3.view(torch.float8_e4m3fn)


def row_order(n: int, gated: bool, device: torch.device | str = "cpu") -> torch.Tensor:
    """int64 [n]: the checkpoint's row that each packed row is."""
    slabs = n // SLAB_ROWS
    if not gated:
        # Slab, warp, row of eight, half of its rows, strip.
        row = torch.arange(n, device=device).view(slabs, 4, 8, 2, 2)
        return row.permute(0, 4, 1, 3, 2).flatten()
    # Slab, warp, row of eight, strip.
    element = torch.arange(n // 2, device=device).view(slabs, 4, 8, 2).movedim(3, 1)
    return torch.stack((element, element + n // 2), dim=3).flatten()


def column_order(k: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """int64 [k]: the column of a plain row that each column of a row by lane is."""
    # Block, thread of four, step, half of the step, two neighbours.
    column = torch.arange(k, device=device).view(k // BLOCK_COLUMNS, 4, 4, 2, 2)
    return column.permute(0, 2, 3, 1, 4).flatten()


def _recoded_scales(device: torch.device) -> torch.Tensor:
    """uint8 [128]: the packed byte of every UE4M3 byte."""
    every = torch.arange(_NAN, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    fraction, exponent = torch.frexp(every)  # fraction in [1/2, 1)
    byte = (exponent + 21) * 8 + (fraction * 16 - 8).int()
    byte = torch.where(every == 0, 0, byte)
    return torch.cat((byte, torch.tensor([_PACKED_NAN]))).to(torch.uint8).to(device)


# In what follows: S slabs of 2 strips of 4 warps of 2 x 8 rows; G stages of 2 blocks of 4 threads'
# columns, of 4 steps of 2 pairs.


def _code_words(codes: torch.Tensor) -> torch.Tensor:
    """Bytes [N, K/2], in packed row order, to int32
    [S, G, block, strip, warp, row, thread, step]."""
    n, half_k = codes.shape
    byte = codes.view(n // SLAB_ROWS, 2, 4, 2, 8, 2 * half_k // STAGE_COLUMNS, 2, 4, 4, 2)
    word: torch.Tensor | int = 0
    for register, places in enumerate(_BITS_AT):
        pair = byte[:, :, :, register % 2, ..., register // 2].int()
        for bit, at in zip((3, 2, 1, 0), places, strict=True):
            even, odd = pair >> bit & 1, pair >> bit + 4 & 1
            word = even << at | odd << (at + 16) % 32 | word
    assert isinstance(word, torch.Tensor)
    return word.permute(0, 4, 5, 1, 2, 3, 6, 7).contiguous()


def _codes_of_words(packed: torch.Tensor) -> torch.Tensor:
    slabs, stages, _ = packed.shape
    word = packed.contiguous().view(torch.int32).view(slabs, stages, 2, 2, 4, 8, 4, 4)
    word = word.permute(0, 3, 4, 5, 1, 2, 6, 7)
    byte = packed.new_zeros(slabs, 2, 4, 2, 8, stages, 2, 4, 4, 2)
    for register, places in enumerate(_BITS_AT):
        pair = byte[:, :, :, register % 2, ..., register // 2]
        for bit, at in zip((3, 2, 1, 0), places, strict=True):
            even, odd = word >> at & 1, word >> (at + 16) % 32 & 1
            pair |= (even << bit | odd << bit + 4).to(torch.uint8)
    return byte.view(slabs * SLAB_ROWS, stages * STAGE_COLUMNS // 2)


def _scale_words(scales: torch.Tensor) -> torch.Tensor:
    """Packed bytes [N, K/16], in packed row order, to int32 [S, G, warp, row, thread, block]."""
    n, columns = scales.shape
    byte = scales.int().view(n // SLAB_ROWS, 2, 4, 2, 8, columns // 8, 2, 4)
    # By half of the warp's rows, and strip: [S, warp, row, G, block, thread].
    (low_0, high_0), (low_1, high_1) = (strip.unbind(2) for strip in byte.unbind(1))
    word = low_0 << 4 | high_0 << 20 | low_1 << 12 | high_1 << 28 | high_1 >> 4
    return word.permute(0, 3, 1, 2, 5, 4).contiguous()


def _scales_of_words(packed: torch.Tensor) -> torch.Tensor:
    slabs, stages, _ = packed.shape
    word = packed.contiguous().view(torch.int32).view(slabs, stages, 4, 8, 4, 2)
    word = word.permute(0, 2, 3, 1, 5, 4)
    byte = packed.new_empty(slabs, 2, 4, 2, 8, stages, 2, 4)
    byte[:, 0, :, 0] = word >> 4 & 255
    byte[:, 1, :, 0] = word >> 12 & 255
    byte[:, 0, :, 1] = word >> 20 & 255
    byte[:, 1, :, 1] = word >> 28 & 15 | (word & 15) << 4
    return byte.view(slabs * SLAB_ROWS, stages * STAGE_COLUMNS // nvfp4.BLOCK)
