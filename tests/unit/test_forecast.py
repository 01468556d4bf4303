"""The forecast against what it must become in the limit, and its expectations against draws."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megamoe_ep.forecast import KERNELS, GemmKernels, GemmTiles, expected_load, forecast
from megamoe_ep.measure import MODELS, route
from megamoe_ep.roofline import KNOWN, Load, layer_floor, phase_floors

ROOT = Path(__file__).resolve().parents[2]
H200 = KNOWN["H200"]
# So fine that no tile is ever wider than its rows, and one block has all the work.
NO_TILE = GemmTiles(256, 1 << 30, 2, blocks=1)
NO_TILES = GemmKernels(NO_TILE, NO_TILE, lambda shape: True, fused=True)
FREE = replace(H200, launch_s=0.0, flag_s=0.0, peer_bytes_per_s=1e30, network_bytes_per_s=1e30)


def seconds(shape, load, combine="exact", ceilings=H200, kernels=KERNELS["H200"]):
    return sum(forecast(shape, load, combine, ceilings, kernels).values())


@pytest.mark.parametrize("tokens", [1, 64, 8192])
def test_without_launches_wire_and_tiles_it_is_the_floor_of_every_kernel(tokens):
    shape = MODELS["dsv3"].layer(32, tokens, 1)
    load = expected_load(shape)
    found = forecast(shape, load, "exact", FREE, NO_TILES)
    floors = phase_floors(shape, load, "exact", FREE)
    # An expert is either read or multiplied: by expert no less than by sum, and by what the rows'
    # own bytes add no more than a little.
    for phase in ("stage", "dispatch", "combine"):
        assert found[phase] == pytest.approx(floors[phase])
    for phase in ("l1", "l2"):
        assert floors[phase] * 0.999 <= found[phase] <= floors[phase] * 1.10


@pytest.mark.parametrize("machine", ["H200", "B200"])
@pytest.mark.parametrize("model", ["dsv3", "flash", "pro", "qwen3-235b"])
def test_never_below_the_floor_and_never_shorter_for_more_tokens(machine, model):
    ceilings, kernels = KNOWN[machine], KERNELS[machine]
    for ranks in (1, 2, 8):
        before = 0.0
        for tokens in (1, 8, 64, 128, 512, 2048, 8192):
            shape = MODELS[model].layer(MODELS[model].rank_experts * ranks, tokens, ranks)
            load = expected_load(shape)
            found = seconds(shape, load, "fast", ceilings, kernels)
            assert found > layer_floor(shape, load, ceilings).seconds
            assert found > 0.98 * before, "tiles may fit a little better with more tokens"
            before = found


def test_fast_sends_less_and_takes_less():
    shape = MODELS["dsv3"].layer(256, 2048, 8)
    load = expected_load(shape)
    sends = replace(KERNELS["H200"], stores_home=False)
    exact, fast = (forecast(shape, load, mode, H200, sends) for mode in ("exact", "fast"))
    assert fast["combine"] < 0.8 * exact["combine"]
    assert fast["l1"] == exact["l1"]


def test_the_network_costs_where_the_domain_ends():
    shape = MODELS["dsv3"].layer(256, 128, 16)
    load = expected_load(shape)
    within = seconds(shape, load, ceilings=replace(H200, domain=16))
    assert seconds(shape, load) > within


def test_skew_costs_the_rank_that_has_the_hot_expert():
    shape = MODELS["dsv3"].layer(64, 2048, 2)
    even, hot = expected_load(shape), expected_load(shape, 7.0)
    assert hot.rows.sum(0)[0] > hot.rows.sum(0)[1]
    assert seconds(shape, hot) > seconds(shape, even)
    # A lone rank has all rows anyway.
    lone = MODELS["dsv3"].layer(32, 2048, 1)
    assert expected_load(lone, 7.0).busiest_rows == pytest.approx(2048 * 8)


@pytest.mark.parametrize("skew", [1.0, 4.0])
@pytest.mark.parametrize(("ranks", "tokens", "top_k"), [(1, 40, 6), (2, 64, 8), (4, 32, 2)])
def test_expectations_are_the_means_of_drawn_routings(ranks, tokens, top_k, skew):
    shape = replace(MODELS["flash"].layer(16 * ranks, tokens, ranks), top_k=top_k)
    draw = torch.Generator().manual_seed(ranks)
    draws = 300
    loads = [
        Load.of(shape, [route(tokens, 16 * ranks, top_k, skew, draw) for _ in range(ranks)])
        for _ in range(draws)
    ]
    expected = expected_load(shape, skew)
    sent = torch.stack([load.sent for load in loads]).double().mean(0)
    torch.testing.assert_close(sent, expected.sent, rtol=0.03, atol=0.1)
    busiest = sum(load.busiest_rows for load in loads) / draws
    assert expected.busiest_rows == pytest.approx(busiest, rel=0.04)
    hottest = torch.stack([load.expert_rows[0, 0] for load in loads]).double().mean()
    if skew != 1:
        assert float(expected.expert_rows[0, 0]) == pytest.approx(float(hottest), rel=0.05)
    # Quantiles of the experts' rows have the spread of what is drawn.
    drawn = torch.stack([load.expert_rows[-1] for load in loads]).double()
    assert float(expected.expert_rows[-1].mean()) == pytest.approx(float(drawn.mean()), rel=0.10)
    assert float(expected.expert_rows[-1].std()) == pytest.approx(
        float(drawn.std(dim=1).mean()), rel=0.20
    )


def test_tiles_are_those_of_the_kernels():
    source = (ROOT / "csrc/gemm/sm90/schedule.cuh").read_text()
    constants = dict(re.findall(r"constexpr int (\w+) = (\d+);", source))
    few, many = KERNELS["H200"].few, KERNELS["H200"].many
    cuts = dict(re.findall(r"using (\w+) = Cut<(\d+, \d+, \w+)>;", source))
    assert cuts == {
        "Few": f"{few.run}, {few.max_tokens}, true",
        "Many": f"{many.weight_rows // 128}, {many.max_tokens}, false",
    }
    assert many.run == 0
    assert few.alike == int(constants["kAlike"])
    assert few.weight_rows == int(constants["kSlabRows"]) == 128
    assert few.token_step == many.token_step == int(constants["kTokenStep"])
    assert [many.of_expert(rows) for rows in (0, 1, 8, 9, 16, 17, 176, 177, 353)] == [
        (0, 0, 0), (1, 8, 8), (1, 8, 8), (1, 16, 16), (1, 16, 16), (1, 24, 24), (1, 176, 176),
        (2, 96, 92), (3, 120, 120),
    ]  # fmt: skip

    source = (ROOT / "csrc/gemm/sm100/grouped_gemm.cuh").read_text()
    cut = re.findall(r"using Tile = cute::Shape<cute::_(\d+), cute::_(\d+), cute::_\d+>;", source)
    narrow, wide = KERNELS["B200"].few, KERNELS["B200"].many
    assert cut == [(str(t.weight_rows), str(t.max_tokens)) for t in (narrow, wide)]
    assert [narrow.of_expert(rows) for rows in (0, 1, 64, 65)] == [
        (0, 0, 0),
        (1, 64, 64),
        (1, 64, 64),
        (2, 64, 64),
    ]
    assert wide.of_expert(257) == (2, 256, 256)


def test_a_share_is_of_neighbours_and_a_round_of_one_tile_a_block():
    seconds = torch.tensor([9.0, 8, 1, 1, 1, 1, 1], dtype=torch.float64)
    tiles = GemmTiles(128, 48, 8, blocks=3)
    assert replace(tiles, run=4).busiest_block(seconds) == 9 + 8  # of 2, 2 and 3 tiles
    assert tiles.busiest_block(seconds) == 9 + 1 + 1  # tiles 0, 3 and 6
    assert replace(tiles, parts=2).busiest_block(seconds) == 9 + 1 + 0.5
    for way in (tiles, replace(tiles, run=4)):
        assert way.busiest_block(seconds[:2]) == 9
        assert way.busiest_block(seconds[:0]) == 0


def test_a_call_has_a_launch_of_its_own():
    shape = MODELS["dsv3"].layer(32, 64, 1)
    load = expected_load(shape)
    more = replace(H200, call_s=H200.launch_s + 3e-6)
    assert seconds(shape, load, ceilings=more) - seconds(shape, load) == pytest.approx(3e-6)


def test_rows_that_l2_stores_home_are_sent_while_it_multiplies():
    shape = MODELS["dsv3"].layer(64, 2048, 2)
    load = expected_load(shape)
    sends = replace(KERNELS["H200"], stores_home=False)
    stores, sends = (forecast(shape, load, "exact", H200, k) for k in (KERNELS["H200"], sends))
    assert stores["l2"] == sends["l2"]
    assert stores["combine"] < 0.5 * sends["combine"]
    # As long as the link takes, if that is longer.
    slow = replace(H200, peer_bytes_per_s=1e10)
    stored = 2048 * 8 / 2 * 7168 * 2 / 1e10
    found = forecast(shape, load, "exact", slow, KERNELS["H200"])
    assert found["l2"] == pytest.approx(stored + slow.launch_s, rel=0.01)


def test_separate_passes_cost_their_bytes():
    shape = MODELS["dsv3"].layer(32, 2048, 1)
    load = expected_load(shape)
    fused, apart = (
        forecast(shape, load, "exact", FREE, replace(KERNELS["H200"], fused=fused))
        for fused in (True, False)
    )
    rows = 2048 * 8
    more = rows * ((2 + 9 / 16) * 7168 + 10 * 2048) / H200.copy_bytes_per_s
    assert apart["l1"] - fused["l1"] == pytest.approx(more)
    assert apart["l2"] - fused["l2"] == pytest.approx(
        rows * (2 + 9 / 16) * 2048 / H200.copy_bytes_per_s
    )
    assert apart["combine"] == fused["combine"]
