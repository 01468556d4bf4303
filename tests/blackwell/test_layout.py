"""SM100's scale-factor layout: CuTe's, csrc's closed form and remap, and prepack/sm100.py's."""

from __future__ import annotations

import pytest
import torch

from megamoe_ep.errors import ArgumentError
from megamoe_ep.prepack import sm100
from megamoe_ep.weights import transform_weights_for_nvfp4_mega_moe

# Rows and scales of a row (K / 16): below, at and above whole tiles of 128 x 4, and real layers'.
RAGGED = [
    (rows, ksf)
    for rows in (1, 2, 31, 32, 33, 127, 128, 129, 255, 256, 257, 300)
    for ksf in (1, 2, 3, 4, 5, 8, 13)
]
LAYERS = [(4096, 448), (7168, 128), (4096, 256), (6144, 448), (7168, 192), (96, 6), (640, 20)]
SHAPES = RAGGED + LAYERS


def offsets_of(host, operand: str, rows: int, ksf: int) -> tuple[torch.Tensor, torch.Tensor, int]:
    asked = torch.empty(rows, ksf, dtype=torch.int64)
    filtered = torch.empty_like(asked)
    size = host.cutlass_offsets(operand == "SFB", rows, ksf, asked.data_ptr(), filtered.data_ptr())
    return asked, filtered, size


def test_there_are_enough_shapes():
    assert len(set(SHAPES)) >= 40
    assert sum(rows % 128 != 0 or ksf % 4 != 0 for rows, ksf in SHAPES) >= 20


@pytest.mark.parametrize(("rows", "ksf"), SHAPES)
def test_every_scale_has_the_byte_that_cute_gives_it(host, rows, ksf):
    ours = torch.empty(rows, ksf, dtype=torch.int64)
    size = host.our_offsets(rows, ksf, ours.data_ptr())
    for operand in ("SFA", "SFB"):
        asked, filtered, cosize = offsets_of(host, operand, rows, ksf)
        assert torch.equal(ours, asked)
        assert torch.equal(ours, filtered)
        assert size == cosize  # the allocation
    assert len(ours.unique()) == ours.numel()
    assert int(ours.min()) >= 0
    assert int(ours.max()) < size
    assert torch.equal(sm100.scale_offsets(rows, ksf), ours)
    assert sm100.scale_nbytes(rows, ksf) == size


@pytest.mark.parametrize(("rows", "ksf"), SHAPES)
def test_the_remaps_put_every_scale_there_and_zero_elsewhere(host, rows, ksf):
    draw = torch.Generator().manual_seed(rows * 1000 + ksf)
    scales = torch.randint(1, 127, (rows, ksf), generator=draw, dtype=torch.uint8)
    offsets, _, cosize = offsets_of(host, "SFA", rows, ksf)
    expected = torch.zeros(cosize, dtype=torch.uint8)
    expected[offsets.flatten()] = scales.flatten()

    by_csrc = torch.zeros(cosize, dtype=torch.uint8)
    host.remap(scales.data_ptr(), rows, ksf, by_csrc.data_ptr())
    assert torch.equal(by_csrc, expected)
    if rows % 32 == 0 and ksf % 2 == 0:
        codes = torch.zeros(1, rows, ksf * 8, dtype=torch.uint8)
        _, packed = sm100.pack(codes, scales[None].view(torch.float8_e4m3fn), gated=False)
        assert torch.equal(packed[0], expected)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("n", "k"), [(32, 32), (96, 160), (256, 512)])
def test_unpack_is_the_inverse_of_pack(n, k, gated):
    draw = torch.Generator().manual_seed(n + k)
    codes = torch.randint(256, (3, n, k // 2), generator=draw, dtype=torch.uint8)
    scales = torch.randint(128, (3, n, k // 16), generator=draw, dtype=torch.uint8)
    packed = sm100.pack(codes, scales.view(torch.float8_e4m3fn), gated=gated)
    assert packed[0] is codes
    assert packed[1].shape == (3, sm100.scale_nbytes(n, k // 16))
    again = sm100.unpack(*packed, gated=gated)
    assert torch.equal(again[0], codes)
    assert torch.equal(again[1].view(torch.uint8), scales)


def test_codes_that_tma_could_not_load_from_where_they_are_are_copied():
    memory = torch.arange(32 * 16 + 8).to(torch.uint8)
    codes = memory[memory.data_ptr() % 16 + 8 :][: 32 * 16].view(1, 32, 16)
    scales = torch.ones(1, 32, 2).to(torch.float8_e4m3fn)
    packed, _ = sm100.pack(codes, scales, gated=False)
    assert packed.data_ptr() % 16 == 0
    assert torch.equal(packed, codes)


@pytest.mark.parametrize(("n", "k"), [(48, 64), (64, 48)])
def test_sizes_that_tma_cannot_load_are_refused(n, k):
    codes = torch.zeros(1, n, k // 2, dtype=torch.uint8)
    scales = torch.zeros(1, n, k // 16, dtype=torch.uint8).view(torch.float8_e4m3fn)
    with pytest.raises(ArgumentError, match=f"multiples of 32 in the sm100 layout; got {n} x {k}"):
        sm100.pack(codes, scales, gated=False)


def test_a_negative_scale_is_refused():
    codes = torch.zeros(1, 32, 16, dtype=torch.uint8)
    scales = torch.full((1, 32, 2), -1.0).to(torch.float8_e4m3fn)
    with pytest.raises(ArgumentError, match="positive or zero"):
        sm100.pack(codes, scales, gated=False)


def test_the_weight_transform_takes_the_layout():
    """What the layer's own entry point makes, from checkpoint tensors; on a CPU too."""
    hidden, intermediate = 96, 64
    l1 = torch.zeros(2, 2 * intermediate, hidden // 2, dtype=torch.uint8)
    l2 = torch.zeros(2, hidden, intermediate // 2, dtype=torch.uint8)
    sf1 = torch.ones(2, 2 * intermediate, hidden // 16).to(torch.float8_e4m3fn)
    sf2 = torch.ones(2, hidden, intermediate // 16).to(torch.float8_e4m3fn)
    w1, w2 = transform_weights_for_nvfp4_mega_moe((l1, sf1), (l2, sf2), layout="sm100")
    assert (w1.layout, w1.n, w1.k, w1.gated) == ("sm100", 2 * intermediate, hidden, True)
    assert w1.scales.shape == (2, 128 * 8)
    assert w2.scales.shape == (2, 128 * 4)
