"""Counts of the roofline against their definitions, floors against hand-made numbers."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from megamoe_ep.cli.doctor import _floor
from megamoe_ep.errors import ArgumentError
from megamoe_ep.measure import MODELS
from megamoe_ep.roofline import (
    KNOWN,
    Load,
    bytes_put,
    known_ceilings,
    layer_floor,
    phase_floors,
    step_floor,
    steps,
    token_nbytes,
    weight_nbytes,
    wire_bytes,
    wire_seconds,
)
from megamoe_ep.shape import LayerShape

SHAPE = LayerShape(4, 3, 2, 32, 16, 2)
IDS = [torch.tensor([[0, 1], [0, 3], [-1, -1]]), torch.tensor([[2, 2]])]


def test_counts_of_a_routing_done_by_hand():
    load = Load.of(SHAPE, IDS)
    assert load.tokens.tolist() == [3, 1]
    assert load.sent.tolist() == [[2, 1], [0, 1]]
    assert load.rows.tolist() == [[3, 1], [0, 2]]
    assert load.expert_rows.tolist() == [[2, 1], [2, 1]]
    assert load.experts_hit.tolist() == [2, 2]
    assert load.busiest_rows == 3


def test_bytes_between_ranks_done_by_hand():
    load = Load.of(SHAPE, IDS)
    token = 32 // 2 + 32 // 16 + 4 + 2 * 4 + 4  # codes, scales, x_scale, ids, index
    assert token_nbytes(SHAPE, "exact") == token
    assert token_nbytes(SHAPE, "fast") == token + 2 * 4
    assert token_nbytes(replace(SHAPE, activation_format="bf16"), "exact") == 64 + 8 + 4
    assert bytes_put(SHAPE, load, "exact") == {
        "dispatch": [[2 * token + 8, token + 8], [8, token + 8]],
        "combine": [[3 * 64 + 8, 8], [64 + 8, 2 * 64 + 8]],
    }
    assert bytes_put(SHAPE, load, "fast")["combine"] == [[2 * 64 + 8, 8], [64 + 8, 64 + 8]]


def test_a_row_of_dsv3_is_as_long_as_the_design_says():
    shape = MODELS["dsv3"].layer(256, 128, 8)
    assert token_nbytes(shape, "exact") == 4032 + 4 + 4 * 8 + 4
    assert weight_nbytes(shape, 32) / 4.16e12 == pytest.approx(190e-6, rel=0.01)


def test_flops_are_two_for_each_weight_of_each_row():
    shape = MODELS["flash"].layer(64, 16, 2)
    draw = torch.Generator().manual_seed(0)
    load = Load.of(shape, [torch.randint(0, 64, (16, 6), generator=draw) for _ in range(2)])
    flops = sum(step.flops for step in steps(shape, load, "fast"))
    assert flops.tolist() == (load.rows.sum(0) * 6 * 4096 * 2048).tolist()


def test_the_layers_floor_is_the_larger_of_reading_and_multiplying():
    shape = MODELS["dsv3"].layer(32, 64, 1)
    even = torch.arange(64 * 8).view(64, 8) % 32
    few, many = Load.of(shape, [even[:1]]), Load.of(shape, [even.repeat(200, 1)])
    ceilings = KNOWN["H200"]
    floor = layer_floor(shape, few, ceilings)
    assert floor.seconds == floor.weights_s == weight_nbytes(shape, 8) / 4.1e12
    floor = layer_floor(shape, many, ceilings)
    assert floor.seconds == floor.flops_s
    assert floor.flops_s == 6 * 12800 * 8 * 7168 * 2048 / 765e12


def test_a_phase_takes_at_least_what_its_gemm_takes():
    shape = MODELS["pro"].layer(96, 512, 2)
    draw = torch.Generator().manual_seed(0)
    load = Load.of(shape, [torch.randint(0, 96, (512, 6), generator=draw) for _ in range(2)])
    ceilings = KNOWN["H200"]
    phases = phase_floors(shape, load, "exact", ceilings)
    assert list(phases) == ["stage", "dispatch", "l1", "l2", "combine"]
    assert phases["l1"] + phases["l2"] >= layer_floor(shape, load, ceilings).seconds
    # Twice the bandwidth of everything halves everything.
    twice = replace(
        ceilings,
        copy_bytes_per_s=2 * ceilings.copy_bytes_per_s,
        flop_per_s=2 * ceilings.flop_per_s,
        peer_bytes_per_s=2 * ceilings.peer_bytes_per_s,
    )
    halved = phase_floors(shape, load, "exact", twice)
    assert halved == pytest.approx({phase: s / 2 for phase, s in phases.items()})


def test_only_bytes_between_ranks_are_on_the_wire():
    put = torch.tensor([[100, 7, 1], [2, 100, 3], [4, 30, 100]])
    assert wire_bytes(put) == 37  # rank 1 receives 7 + 30
    ceilings = replace(KNOWN["H200"], domain=2, peer_bytes_per_s=1.0, network_bytes_per_s=0.5)
    # Within the domain of ranks 0 and 1 at most 7; across, rank 2 sends 34.
    assert wire_seconds(put, ceilings) == 34 / 0.5
    assert wire_seconds(put, replace(ceilings, domain=3)) == 37


def test_no_wire_for_a_lone_rank():
    shape = MODELS["tiny"].layer(4, 8, 1)
    load = Load.of(shape, [torch.randint(0, 4, (8, 2))])
    slow = replace(KNOWN["H200"], peer_bytes_per_s=1.0)
    for step in steps(shape, load, "exact"):
        assert step_floor(step, slow) == step_floor(step, KNOWN["H200"])


def test_the_kernel_that_counts_runs_for_many_entries_only():
    def kernels(tokens: int) -> list[str]:
        shape = MODELS["dsv3"].layer(64, tokens, 2)
        ids = [torch.randint(0, 64, (tokens, 8))] * 2
        found = steps(shape, Load.of(shape, ids), "fast")
        assert sum(step.waits for step in found) == 2
        return [step.kernel for step in found]

    assert "dispatch_count" not in kernels(256)
    assert "dispatch_count" in kernels(257)


def test_known_machines():
    assert known_ceilings("NVIDIA H200") is KNOWN["H200"]
    assert known_ceilings("NVIDIA A100-SXM4-80GB") is None
    for ceilings in KNOWN.values():
        assert ceilings.source
        assert all(
            v > 0 and math.isfinite(v)
            for v in vars(ceilings).values()
            if not isinstance(v, str | None)
        )


def test_doctor_tells_the_floor(monkeypatch):
    finding = _floor(MODELS["dsv3"].layer(256, 64, 8))
    assert "at least 193 us on H200s: weights 193 us, FLOPs 62.6 us" in finding.text
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA B200")
    assert "on B200s" in _floor(MODELS["dsv3"].layer(256, 64, 8)).text


def test_bad_arguments_are_named():
    load = Load.of(SHAPE, IDS)
    with pytest.raises(ArgumentError, match="combine must be 'exact' or 'fast'; got 'slow'"):
        steps(SHAPE, load, "slow")
    with pytest.raises(ArgumentError, match="one tensor for each of the 2 ranks; got 1"):
        Load.of(SHAPE, IDS[:1])
