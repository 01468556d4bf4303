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
from megamoe_ep.forecast import KERNELS
from megamoe_ep.kernels import cuda
from megamoe_ep.prepack import sm90
from megamoe_ep.shape import LayerShape
from megamoe_ep.symm_buffer import Workspace

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
SCHEDULES = 1000
WIDTHS = {few: set(range(8, widest + 1, 8)) for few, widest in ((True, 48), (False, 176))}


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
    """Weights of one expert, fp32 [N, K], rows and columns in the checkpoint's order."""
    slabs, stages, _ = packed.shape
    n, k = 128 * slabs, 128 * stages
    weights = torch.full((n, k), torch.nan)
    fragments.decode_weights(
        ctypes.c_void_p(packed.data_ptr()), slabs, stages, ctypes.c_void_p(weights.data_ptr())
    )
    in_order = torch.empty_like(weights)
    in_order[sm90.row_order(n, gated)[:, None], sm90.column_order(k)] = weights
    return in_order


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return torch.where(tensor.isnan(), torch.nan, tensor.float()).view(torch.int32)


@pytest.mark.parametrize("gated", [False, True])
def test_every_code_under_every_scale_comes_out_bit_for_bit(fragments, gated):
    """All 16 codes under all 128 scales, NaN's included, in every register; all scales at every
    place in a thread's words."""
    n, k = 256, 1024
    draw = torch.Generator().manual_seed(0)
    codes = torch.randint(256, (n, k // 2), generator=draw, dtype=torch.uint8)
    scale = torch.randint(128, (n, k // 16), generator=draw)
    scales = scale.to(torch.uint8).view(torch.float8_e4m3fn)
    column = torch.arange(k)
    row = sm90.row_order(n, gated).argsort()[:, None]  # as packed
    register = row // 8 % 2 + 2 * (column // 2 % 2)
    word = row // 64 % 2 + 2 * (column // 64 % 2)
    scale_of = scale.repeat_interleave(16, dim=1)
    assert len((nvfp4.unpack(codes).int() + 16 * (scale_of + 128 * register)).unique()) == 8192
    assert len((scale_of + 128 * (row // 8 % 2 + 2 * word)).unique()) == 1024
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
    """What the epilogue takes accumulators v and v + 2 for: the same element's gate and up; and
    what it takes the two strips for: elements that are neighbours, also by lane, where they are
    stored."""
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
                    warp = torch.arange(128) // 32
                    element = 64 * slab + 16 * warp + 2 * (lane // 4) + strip
                    assert torch.equal(gate, element)
                    assert torch.equal(up, element + inter)
                    stored_at = 64 * slab + 8 * (lane // 4) + 2 * warp + strip
                    assert torch.equal(sm90.column_order(inter)[stored_at], element)


def row_counts(draw: torch.Generator, seed: int) -> torch.Tensor:
    """Of up to 300 experts: some with none, few, many, or just about a tile's width."""
    most, largest = [(300, 3), (300, 40), (60, 200), (30, 2000)][seed % 4]
    experts = int(torch.randint(1, most + 1, (), generator=draw))
    counts = torch.randint(0, largest + 1, (experts,), generator=draw)
    special = torch.tensor(
        [0, 1, 7, 8, 9, 47, 48, 49, 63, 64, 65, 97, 129, 175, 176, 177, 353, 1000, 1057]
    )
    pick = special[torch.randint(len(special), (experts,), generator=draw)]
    counts = torch.where(torch.rand(experts, generator=draw) < 0.3, pick, counts)
    if seed % 50 == 0:
        counts.zero_()
    return counts


def parts_of(
    schedule: ctypes.CDLL, few: bool, counts: torch.Tensor, slabs: int, blocks: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """First row of each expert; of every part of every tile: block, tile, expert, first row, end
    row, width, slab, slabs."""
    offsets = torch.cat((torch.zeros(1, dtype=torch.long), counts.cumsum(0))).int()
    parts = torch.empty(200_000, 8, dtype=torch.int32)
    found = schedule.walk(
        few, ctypes.c_void_p(offsets.data_ptr()), len(counts), slabs, blocks,
        ctypes.c_void_p(parts.data_ptr()), len(parts),
    )  # fmt: skip
    assert found >= 0
    return offsets.long(), parts[:found].long()


@pytest.mark.parametrize("few", [True, False])
def test_every_row_meets_every_slab_once(schedule, few):
    most_slabs = schedule.slabs_of_tile(few)
    for seed in range(SCHEDULES):
        draw = torch.Generator().manual_seed(seed)
        counts = row_counts(draw, seed)
        slabs = int(torch.randint(1, 60, (), generator=draw))
        blocks = [1, 7, 132, 1000][int(torch.randint(4, (), generator=draw))]
        offsets, parts = parts_of(schedule, few, counts, slabs, blocks)
        block, tile, expert, first, end, width, slab, of_part = parts.unbind(1)

        assert set(width.tolist()) <= WIDTHS[few]
        assert (first >= offsets[expert]).all()
        assert (end <= offsets[expert + 1]).all()
        assert ((first < end) & (end <= first + width) & (of_part > 0)).all()
        # +1 where a part's rows and slabs begin, -1 after them, both ways: each pair is met once.
        edges = torch.zeros(slabs + 1, int(offsets[-1]) + 1, dtype=torch.long)
        one = torch.ones_like(first)
        for slab_edge, row_edge, sign in (
            (slab, first, 1), (slab, end, -1), (slab + of_part, first, -1), (slab + of_part, end, 1)
        ):  # fmt: skip
            edges.index_put_((slab_edge, row_edge), sign * one, accumulate=True)
        assert (edges.cumsum(0).cumsum(1)[:-1, :-1] == 1).all()

        number = block * (int(tile.max()) + 1 if len(tile) else 1) + tile
        _, inverse, of_tile = number.unique(return_inverse=True, return_counts=True)
        assert (of_tile <= (2 if few else 1)).all()
        summed = torch.zeros(len(of_tile), dtype=torch.long).index_add_(0, inverse, of_part)
        assert (summed <= most_slabs).all()
        work = torch.bincount(block, weights=of_part.double() if few else None, minlength=blocks)
        assert work.max() - work.min() <= 1


@pytest.mark.parametrize("few", [True, False])
def test_widths_waste_little(schedule, few):
    most = schedule.max_tokens(few)
    tiles = KERNELS["H200"].few if few else KERNELS["H200"].many
    for rows in range(1, 2000):
        _, parts = parts_of(schedule, few, torch.tensor([rows]), 1, 1)
        width = parts[:, 5]
        assert len(parts) == -(-rows // most)
        assert 0 <= int(width.sum()) - rows < 8
        assert int(width.max()) - int(width.min()) in (0, 8)
        assert tiles.of_expert(rows) == (len(parts), int(width.max()), float(width.double().mean()))


def test_no_block_has_wide_tiles_alone(schedule):
    """Also where a block has the same token tile of all slabs, 12 of one expert on 132 SMs."""
    most = schedule.max_tokens(False)
    for rows in range(11 * most + 8, 12 * most, 8):  # of two widths
        _, parts = parts_of(schedule, False, torch.full((32,), rows), 32, 132)
        block, width = parts[:, 0], parts[:, 5].double()
        count = torch.bincount(block, minlength=132)
        mean = torch.bincount(block, weights=width, minlength=132) / count
        assert float((mean - width.mean()).abs().max()) < 2


def test_tiles_for_few_rows_are_full_to_the_last(schedule):
    """A block's slabs are of as few tiles as can be where experts have one token tile each."""
    most = schedule.slabs_of_tile(True)
    for rows, experts, slabs in ((16, 32, 32), (8, 48, 56), (48, 7, 20), (1, 5, 5)):
        counts = torch.full((experts,), rows)
        _, parts = parts_of(schedule, True, counts, slabs, 132)
        for block in parts[:, 0].unique():
            mine = parts[parts[:, 0] == block]
            assert int(mine[:, 1].max()) + 1 == -(-int(mine[:, 7].sum()) // most)


def test_the_cut_goes_by_the_rows_that_an_expert_can_expect():
    """Those that are there or, in a layer, those of even routing: a workspace has room for more."""
    offsets = torch.zeros(9, dtype=torch.int32)
    assert cuda.cut_for_few(offsets, 8 * cuda.FEW_ROWS)
    assert not cuda.cut_for_few(offsets, 8 * cuda.FEW_ROWS + 1)
    tokens = cuda.FEW_ROWS  # of eight experts of a rank, each with as many rows
    for more, few in ((0, True), (1, False)):
        shape = LayerShape(16, tokens + more, 8, 128, 128, 2)
        workspace = Workspace.allocate(shape, torch.device("cpu"))
        assert len(workspace.rows) == 2 * 8 * (tokens + more)
        assert not cuda.cut_for_few(workspace.expert_offsets, len(workspace.rows))
        cuda.allocate_scratch(workspace, shape)
        assert cuda.cut_for_few(workspace.expert_offsets, len(workspace.rows)) == few


@pytest.mark.parametrize("few", [True, False])
def test_the_forecast_takes_slabs_in_the_scheduler_s_order(schedule, few):
    tiles = KERNELS["H200"].few if few else KERNELS["H200"].many
    for seed in range(60):
        draw = torch.Generator().manual_seed(seed)
        counts = row_counts(draw, seed)[:40]
        slabs = schedule.slabs_of_tile(few) * int(torch.randint(1, 15, (), generator=draw))
        _, parts = parts_of(schedule, few, counts, slabs, tiles.blocks)
        block, tile, expert, *_, of_part = parts.unbind(1)
        if few:
            last_first = block.argsort(descending=True, stable=True)
            order = expert[last_first].repeat_interleave(of_part[last_first])
            sizes = torch.zeros(tiles.blocks, dtype=torch.long).index_add(0, block, of_part)
            assert tiles.shares(len(order)) == sizes.flip(0).tolist()
        else:
            # Two slabs of one tile of the last round have the same rows.
            whole, slab = of_part == 2, parts[:, 6]
            again = ~whole & (slab % 2 == 1)
            assert torch.equal(parts[again, 2:6], parts[~whole & ~again, 2:6])
            assert not len(of_part) or (tile[~whole] == tile.max()).all()
            assert bool(again.any()) == (
                0 < 2 * (int((~again).sum()) % tiles.blocks) <= tiles.blocks
            )
            order = expert[~again][(tile * tiles.blocks + block)[~again].argsort()]
        experts = []
        for number, rows in enumerate(counts.tolist()):
            token_tiles, widest, _ = tiles.of_expert(rows)
            experts.append((widest, float(number), token_tiles * slabs * 128 // tiles.weight_rows))
        assert tiles.in_order(experts) == order.tolist()
