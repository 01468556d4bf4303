"""The SM90 weight layout: every word against its description, bit by bit, and the way back."""

from __future__ import annotations

import itertools

import pytest
import torch

from megamoe_ep import nvfp4, transform_weights_for_nvfp4_mega_moe, weights
from megamoe_ep.errors import ArgumentError
from megamoe_ep.prepack import sm90

# By row and column of the register: where the code's bits are, the sign first; from 16 on, in the
# other half of the word.
BITS_AT = {
    (0, 0): (15, 8, 7, 6),
    (8, 0): (12, 5, 4, 3),
    (0, 2): (18, 11, 10, 9),
    (8, 2): (0, 30, 29, 1),
}


def checkpoint(experts: int, n: int, k: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Random codes; scales that go through all 128 bytes, NaN's included."""
    draw = torch.Generator().manual_seed(seed)
    codes = torch.randint(256, (experts, n, k // 2), generator=draw, dtype=torch.uint8)
    scales = torch.arange(experts * n * k // 16) % 128
    scales = scales[torch.randperm(len(scales), generator=draw)].to(torch.uint8)
    return codes, scales.view(experts, n, k // 16).view(torch.float8_e4m3fn)


def bits(scales: torch.Tensor) -> torch.Tensor:
    return scales.view(torch.uint8)


def values(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    return nvfp4.dequantize(codes, scales).view(torch.int16)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("experts", "n", "k"), [(3, 128, 128), (2, 256, 384), (1, 640, 256)])
def test_unpack_is_the_inverse(experts, n, k, gated):
    codes, scales = checkpoint(experts, n, k)
    packed, nothing = sm90.pack(codes, scales, gated=gated)
    assert packed.shape == (experts, n // 128, k // 128, 9216)
    assert packed.dtype == torch.uint8
    assert nothing.numel() == 0
    codes_again, scales_again = sm90.unpack(packed, nothing, gated=gated)
    assert torch.equal(bits(scales_again), bits(scales))
    # Under a scale of zero the signs are kept, and so the weights' bits.
    zero = (bits(scales) == 0).repeat_interleave(8, dim=2)
    assert zero.any()
    assert torch.equal(codes_again, torch.where(zero, codes & 0x88, codes))
    finite = bits(scales) < 0x7F
    wrong = values(codes, scales) != values(codes_again, scales_again)
    assert not wrong.view(*scales.shape, 16)[finite].any()


@pytest.mark.parametrize("gated", [False, True])
def test_every_bit_is_where_the_description_says(gated):
    n, k, expert, slab, stage = 256, 384, 1, 1, 2
    codes, scales = checkpoint(2, n, k, seed=1)
    packed = sm90.pack(codes, scales, gated=gated)[0][expert, slab, stage].tolist()
    nibbles = nvfp4.unpack(codes)[expert].tolist()
    bytes_of_scale = bits(scales)[expert].tolist()

    def word_at(offset: int) -> int:
        return int.from_bytes(bytes(packed[offset : offset + 4]), "little")

    def checkpoint_row(strip: int, row: int) -> int:
        warp, j = divmod(row, 16)
        if not gated:
            return 128 * slab + 32 * warp + 4 * (j % 8) + 2 * (j // 8) + strip
        return 64 * slab + 16 * warp + 2 * (j % 8) + strip + (n // 2 if j >= 8 else 0)

    for block, strip, thread in itertools.product(range(2), range(2), range(128)):
        first = 16 * (thread // 32) + thread % 32 // 4
        columns = 128 * stage + 64 * block + 16 * (thread % 4)
        for step in range(4):
            word = word_at(4096 * block + 2048 * strip + 16 * thread + 4 * step)
            covered = 0
            for (down, right), places in BITS_AT.items():
                row = checkpoint_row(strip, first + down)
                for h in range(2):
                    column = columns + 4 * step + right + h
                    code = nibbles[row][column]
                    if bytes_of_scale[row][column // 16] == 0:
                        code &= 8
                    for bit, place in zip((3, 2, 1, 0), places, strict=True):
                        at = (place + 16 * h) % 32
                        assert word >> at & 1 == code >> bit & 1
                        covered |= 1 << at
            assert covered == 0xFFFF_FFFF
        word = word_at(8192 + 8 * thread + 4 * block)
        turned = (word >> 8 | word << 24) & 0xFFFF_FFFF if strip else word
        for at, down in ((4, 0), (20, 8)):
            byte = turned >> at & 0xFF
            row = checkpoint_row(strip, first + down)
            assert byte == packed_scale(bytes_of_scale[row][columns // 16])


def test_columns_by_lane_are_as_the_description_says():
    order = sm90.column_order(256).tolist()
    for block, c, j, i, h in itertools.product(range(4), range(4), range(4), range(2), range(2)):
        plain = 64 * block + 16 * c + 4 * j + 2 * i + h
        assert order[64 * block + 16 * j + 8 * i + 2 * c + h] == plain


def packed_scale(ue4m3: int) -> int:
    """By the definition: 2**(e - 22) * (1 + m / 8) is the value."""
    if ue4m3 in (0, 0x7F):
        return 0xFF if ue4m3 else 0
    value = float(torch.tensor([ue4m3], dtype=torch.uint8).view(torch.float8_e4m3fn).float())
    found = [
        e << 3 | m
        for e in range(13, 31)
        for m in range(8)
        if 2.0 ** (e - 22) * (1 + m / 8) == value
    ]
    (only,) = found
    return only


def test_packed_scale_is_a_bf16_worth_2_to_the_119_times_it():
    every = torch.arange(1, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    packed = torch.tensor([packed_scale(i) for i in range(1, 127)], dtype=torch.int16)
    assert torch.equal((packed << 4 | 0x7000).view(torch.bfloat16).double(), every * 2.0**119)
    assert torch.tensor([0xFF << 4 | 0x7000], dtype=torch.int16).view(torch.bfloat16).isnan()


@pytest.mark.parametrize(("n", "k"), [(64, 128), (192, 128), (128, 64), (128, 192)])
def test_other_sizes_are_refused(n, k):
    with pytest.raises(ArgumentError, match=rf"multiples of 128 .* got {n} x {k}"):
        sm90.pack(*checkpoint(1, n, k), gated=False)


def test_negative_scale_is_refused():
    codes, scales = checkpoint(1, 128, 128)
    bits(scales)[0, 5, 3] |= 0x80
    with pytest.raises(ArgumentError, match="scales must be positive or zero"):
        sm90.pack(codes, scales, gated=False)


def test_transform_takes_the_layout_where_the_sizes_allow_it(monkeypatch):
    monkeypatch.setattr(weights, "weight_layout", lambda device: "sm90")
    l1, l2 = checkpoint(2, 512, 128), checkpoint(2, 128, 256)
    made = transform_weights_for_nvfp4_mega_moe(l1, l2)
    assert [w.layout for w in made] == ["sm90", "sm90"]
    for weight, (codes, scales), gated in zip(made, (l1, l2), (True, False), strict=True):
        assert torch.equal(weight.codes, sm90.pack(codes, scales, gated=gated)[0])
    for n, k in ((480, 128), (512, 112)):
        l1, l2 = checkpoint(2, n, k), checkpoint(2, k, n // 2)
        with pytest.warns(UserWarning, match=f"multiples of 128; got {k} and {n // 2}"):
            made = transform_weights_for_nvfp4_mega_moe(l1, l2)
        assert [w.layout for w in made] == ["portable", "portable"]
