"""csrc/gemm/sm90 with no GPU: its decoding and its scheduler, compiled for the host."""

from __future__ import annotations

import ctypes
import importlib.util
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from megamoe_ep import nvfp4
from megamoe_ep.prepack import sm90

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
SCHEDULES = 1000
WIDTHS = set(range(8, 177, 8))  # that the kernel has instructions for


def build(folder: Path, source: str, compiler: list[str]) -> ctypes.CDLL:
    library = folder / f"{source}.so"
    command = [*compiler, "-std=c++20", f"-I{CSRC}", "-shared", "-o", str(library)]
    built = subprocess.run(
        [*command, str(HERE / "host_sm90" / source)],
        capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    return ctypes.CDLL(str(library))


@pytest.fixture(scope="module")
def fragments(tmp_path_factory):
    found = importlib.util.find_spec("cutlass_library")
    if shutil.which("nvcc") is None or found is None or found.submodule_search_locations is None:
        pytest.skip("needs nvcc and the headers of nvidia-cutlass")
    headers = Path(found.submodule_search_locations[0]) / "source" / "include"
    compiler = ["nvcc", "-Xcompiler", "-fPIC", f"-I{headers}", "-w", "-O1"]
    return build(tmp_path_factory.mktemp("fragments"), "fragments.cu", compiler)


@pytest.fixture(scope="module")
def schedule(tmp_path_factory):
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    compiler = ["g++", "-O2", "-fPIC", "-Wall", "-Werror"]
    return build(tmp_path_factory.mktemp("schedule"), "schedule.cpp", compiler)


def decoded(fragments: ctypes.CDLL, packed: torch.Tensor, gated: bool) -> torch.Tensor:
    """Weights of one expert, fp32 [N, K], rows in the checkpoint's order."""
    slabs, blocks, _ = packed.shape
    weights = torch.full((128 * slabs, 64 * blocks), torch.nan)
    fragments.decode_weights(
        ctypes.c_void_p(packed.data_ptr()), slabs, blocks, ctypes.c_void_p(weights.data_ptr())
    )
    in_order = torch.empty_like(weights)
    in_order[sm90.row_order(len(weights), gated)] = weights
    return in_order


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return torch.where(tensor.isnan(), torch.nan, tensor.float()).view(torch.int32)


@pytest.mark.parametrize("gated", [False, True])
def test_every_code_under_every_scale_comes_out_bit_for_bit(fragments, gated):
    """All 16 codes under all 128 scales, NaN's included, in every register, step and half."""
    n, k = 256, 1024
    draw = torch.Generator().manual_seed(0)
    codes = torch.randint(256, (n, k // 2), generator=draw, dtype=torch.uint8)
    scale = torch.randint(128, (n, k // 16), generator=draw)
    scales = scale.to(torch.uint8).view(torch.float8_e4m3fn)
    row, column = torch.arange(n)[:, None], torch.arange(k)
    row = row if not gated else sm90.row_order(n, gated).argsort()[:, None]  # as packed
    register = row // 8 % 2 + 2 * (column // 8 % 2)
    step = row // 64 % 2 + 2 * (column // 16 % 4)
    scale_of = scale.repeat_interleave(16, dim=1)
    assert len((nvfp4.unpack(codes).int() + 16 * (scale_of + 128 * register)).unique()) == 8192
    assert len((scale_of + 128 * (row // 8 % 2 + 2 * step)).unique()) == 2048
    packed, _ = sm90.pack(codes[None], scales[None], gated=gated)
    expected = nvfp4.dequantize(codes, scales)
    assert torch.equal(bits(decoded(fragments, packed[0], gated)), bits(expected))


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("n", "k"), [(128, 128), (384, 256), (640, 896), (1536, 384), (256, 2176)])
def test_random_weights_come_out_bit_for_bit(fragments, n, k, gated):
    draw = torch.Generator().manual_seed(n + k)
    codes = torch.randint(256, (2, n, k // 2), generator=draw, dtype=torch.uint8)
    scales = torch.randint(128, (2, n, k // 16), generator=draw, dtype=torch.uint8)
    scales = scales.view(torch.float8_e4m3fn)
    packed, _ = sm90.pack(codes, scales, gated=gated)
    for expert in range(2):
        expected = nvfp4.dequantize(codes[expert], scales[expert])
        assert torch.equal(bits(decoded(fragments, packed[expert], gated)), bits(expected))


def test_a_thread_has_gate_and_up_of_its_outputs(fragments):
    """What the epilogue takes accumulators v and v + 2 for: the same element's gate and up; and of
    the two strips, elements that are eight apart."""
    places = torch.empty(128, 88, dtype=torch.int32)
    fragments.accumulator_places(ctypes.c_void_p(places.data_ptr()))
    row, token = places.long() % 64, places.long() // 64
    inter = 256
    checkpoint_row = sm90.row_order(2 * inter, gated=True).view(-1, 2, 64)
    thread = torch.arange(128)[:, None]
    for v in range(0, 88, 4):
        for t in range(2):
            expected = (2 * v + 2 * (thread % 4) + t).expand(128, 1)
            assert torch.equal(token[:, [v + t]], expected)
            assert torch.equal(token[:, [v + t + 2]], expected)
            for slab in range(len(checkpoint_row)):
                for strip in range(2):
                    gate = checkpoint_row[slab, strip, row[:, v + t]]
                    up = checkpoint_row[slab, strip, row[:, v + t + 2]]
                    lane = torch.arange(128) % 32
                    element = 64 * slab + 16 * (torch.arange(128) // 32) + 8 * strip + lane // 4
                    assert torch.equal(gate, element)
                    assert torch.equal(up, element + inter)


def row_counts(draw: torch.Generator, seed: int) -> torch.Tensor:
    """Of up to 300 experts: some with none, few, many, or just about a tile's width."""
    most, largest = [(300, 3), (300, 40), (60, 200), (30, 2000)][seed % 4]
    experts = int(torch.randint(1, most + 1, (), generator=draw))
    counts = torch.randint(0, largest + 1, (experts,), generator=draw)
    special = torch.tensor([0, 1, 7, 8, 9, 63, 64, 65, 129, 175, 176, 177, 352, 353, 1000, 1057])
    pick = special[torch.randint(len(special), (experts,), generator=draw)]
    counts = torch.where(torch.rand(experts, generator=draw) < 0.3, pick, counts)
    if seed % 50 == 0:
        counts.zero_()
    return counts


def tiles_of(
    schedule: ctypes.CDLL, counts: torch.Tensor, weight_tiles: int, blocks: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """First row of each expert; tiles of each block; expert, first row, end row, width, weight tile
    of every tile."""
    offsets = torch.cat((torch.zeros(1, dtype=torch.long), counts.cumsum(0))).int()
    tiles = torch.empty(100_000, 5, dtype=torch.int32)
    per_block = torch.empty(blocks, dtype=torch.int32)
    found = schedule.walk(
        ctypes.c_void_p(offsets.data_ptr()), len(counts), weight_tiles, blocks,
        *(ctypes.c_void_p(tensor.data_ptr()) for tensor in (per_block, tiles)), len(tiles),
    )  # fmt: skip
    assert found >= 0
    return offsets.long(), per_block, tiles[:found].long()


def test_every_row_meets_every_weight_tile_once(schedule):
    widest = schedule.max_tokens()
    for seed in range(SCHEDULES):
        draw = torch.Generator().manual_seed(seed)
        counts = row_counts(draw, seed)
        weight_tiles = int(torch.randint(1, 30, (), generator=draw))
        blocks = [1, 7, 132, 1000][int(torch.randint(4, (), generator=draw))]
        offsets, per_block, tiles = tiles_of(schedule, counts, weight_tiles, blocks)
        assert per_block.max() - per_block.min() <= 1
        assert per_block.sum() == len(tiles)
        expert, first, end, width, weight_tile = tiles.unbind(1)

        assert set(width.tolist()) <= WIDTHS
        assert torch.equal(end, offsets[expert + 1])
        assert (first >= offsets[expert]).all()
        assert (first < end).all()
        assert len(tiles) == int(((counts + widest - 1) // widest).sum()) * weight_tiles
        # +1 where a tile's rows begin, -1 after its last one: each row is in one tile.
        edges = torch.zeros(weight_tiles, int(offsets[-1]) + 1, dtype=torch.long)
        one = torch.ones_like(first)
        edges.index_put_((weight_tile, first), one, accumulate=True)
        edges.index_put_((weight_tile, torch.minimum(first + width, end)), -one, accumulate=True)
        assert (edges.cumsum(1)[:, :-1] == 1).all()


def test_widths_waste_little(schedule):
    for rows in range(1, 2000):
        _, _, tiles = tiles_of(schedule, torch.tensor([rows]), 1, 1)
        width = int(tiles[0, 3])
        assert 0 <= len(tiles) * width - rows < 8 * len(tiles)
