"""The oracle against the layer's definition, spelled out by token with ml_dtypes and NumPy."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

from megamoe_ep import nvfp4
from megamoe_ep.errors import ArgumentError
from megamoe_ep.reference import moe_layer, relative_l2_error, swiglu
from megamoe_ep.weights import CheckpointExperts, random_experts

E, H, I, K = 5, 64, 48, 4  # noqa: E741


@pytest.fixture(scope="module")
def experts() -> CheckpointExperts:
    made = random_experts(E, H, I, seed=11)
    # Far apart, so that a scale applied to the wrong half or expert shows.
    spread = torch.tensor([[1.0, 3.0], [0.5, 1.0], [2.0, 0.7], [1.0, 1.0], [1.3, 0.2]])
    assert made.w2_input_scale is not None
    return replace(
        made,
        w13_scale_2=made.w13_scale_2 * spread,
        w2_scale_2=made.w2_scale_2 * spread[:, 1],
        w2_input_scale=made.w2_input_scale * 4,  # calibrated before the spread
    )


def tokens(n: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, H, generator=generator) * torch.logspace(-2, 2, max(n, 1))[:n, None]
    ids = torch.randint(-1, E, (n, K), generator=generator, dtype=torch.int32)
    return x.bfloat16(), ids, torch.rand(n, K, generator=generator)


# The definition, in NumPy: one token, one slot, one matrix at a time


def decode(codes: torch.Tensor, scales: torch.Tensor) -> np.ndarray:
    pairs = codes.numpy()
    nibbles = np.stack((pairs & 15, pairs >> 4), axis=-1).reshape(*pairs.shape[:-1], -1)
    values = nibbles.astype(np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float64)
    steps = scales.view(torch.uint8).numpy().view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    return values * np.repeat(steps, 16, axis=-1)


def quantised(row: np.ndarray, g: np.float32) -> np.ndarray:
    """Code x block scale of a row, as fp64."""
    result = []
    for block in row.astype(np.float32).reshape(-1, 16):
        ideal = np.clip(np.abs(block).max() / (np.float32(6) * g), 2.0**-9, 448.0)
        step = np.float32(ml_dtypes.float8_e4m3fn(ideal))
        codes = np.clip(block / (step * g), -6, 6).astype(ml_dtypes.float4_e2m1fn)
        result.append(codes.astype(np.float64) * np.float64(step))
    return np.concatenate(result)


def by_definition(
    x: torch.Tensor,
    topk_idx: torch.Tensor,
    topk_weights: torch.Tensor,
    experts: CheckpointExperts,
    activation_format: str,
    x_scale: float | None,
    clamp: float | None,
) -> torch.Tensor:
    f32, bf16 = np.float32, ml_dtypes.bfloat16
    y = np.zeros(x.shape, f32)
    for t, row in enumerate(x.float().numpy()):
        if activation_format == "bf16":
            inputs, g = row.astype(np.float64), f32(1)
        else:
            g = f32(x_scale) if x_scale else f32(np.abs(row).max()) / f32(6 * 448)
            inputs = quantised(row, g)
        for k, expert in enumerate(topk_idx[t].tolist()):
            if expert == -1:
                continue
            e = expert - experts.first_expert
            w13 = decode(experts.w13[e], experts.w13_scale[e])
            gate_scale, up_scale = (f32(s) for s in experts.w13_scale_2[e].tolist())
            gate = (w13[:I] @ inputs).astype(f32) * g * gate_scale
            up = (w13[I:] @ inputs).astype(f32) * g * up_scale
            if clamp is not None:
                gate, up = np.minimum(gate, f32(clamp)), np.clip(up, -f32(clamp), f32(clamp))
            h = (gate / (1 + np.exp(-gate.astype(np.float64)))).astype(f32) * up
            alpha = f32(experts.w2_scale_2[e].item())
            if activation_format == "nvfp4" and experts.w2_input_scale is not None:
                h_scale = f32(experts.w2_input_scale[e].item())
                hidden, alpha = quantised(h, h_scale), alpha * h_scale
            else:
                hidden = h.astype(bf16).astype(np.float64)
            w2 = decode(experts.w2[e], experts.w2_scale[e])
            o = ((w2 @ hidden).astype(f32) * alpha).astype(bf16).astype(f32)
            y[t] = y[t] + f32(topk_weights[t, k].item()) * o
    return torch.from_numpy(y).bfloat16()


@pytest.mark.parametrize(
    ("activation_format", "static_x", "static_h", "clamp"),
    [
        ("nvfp4", False, True, None),
        ("nvfp4", True, True, None),
        ("nvfp4", False, False, None),
        ("nvfp4", True, False, 0.8),
        ("nvfp4", False, True, 0.8),
        ("bf16", False, True, None),
        ("bf16", False, False, 0.8),
    ],
)
def test_equals_the_definition(
    experts: CheckpointExperts,
    activation_format: Any,
    static_x: bool,
    static_h: bool,
    clamp: float | None,
) -> None:
    assert experts.w13_input_scale is not None
    x_scale = float(experts.w13_input_scale.max()) if static_x else None
    given = replace(
        experts,
        w13_input_scale=experts.w13_input_scale if static_x else None,
        w2_input_scale=experts.w2_input_scale if static_h else None,
    )
    x, ids, weights = tokens(40)
    y = moe_layer(
        x, ids, weights, given, activation_format=activation_format, activation_clamp=clamp
    )
    expected = by_definition(x, ids, weights, given, activation_format, x_scale, clamp)
    assert y.dtype == torch.bfloat16
    # exp() of NumPy and of torch may differ in their last fp64 bit, seen once in 10**8 elements.
    assert relative_l2_error(y, expected) < 1e-5
    assert int((y != expected).sum()) <= 2


def test_options_matter(experts: CheckpointExperts) -> None:
    """So that an option without effect cannot pass for one that equals the definition."""
    x, ids, weights = tokens(40)
    dynamic = replace(experts, w13_input_scale=None)
    plain = moe_layer(x, ids, weights, dynamic)
    others = {
        "static x": moe_layer(x, ids, weights, experts),
        "other static x": moe_layer(x, ids, weights, experts, input_global_scale=0.01),
        "h in bf16": moe_layer(x, ids, weights, replace(dynamic, w2_input_scale=None)),
        "bf16": moe_layer(x, ids, weights, dynamic, activation_format="bf16"),
        "clamp": moe_layer(x, ids, weights, dynamic, activation_clamp=0.8),
    }
    results = [plain, *others.values()]
    for i, a in enumerate(results):
        for b in results[:i]:
            assert relative_l2_error(a, b) > 1e-3


def test_given_static_scale_takes_precedence(experts: CheckpointExperts) -> None:
    x, ids, weights = tokens(20)
    dynamic = replace(experts, w13_input_scale=None)
    expected = moe_layer(x, ids, weights, dynamic, input_global_scale=0.01)
    assert torch.equal(moe_layer(x, ids, weights, experts, input_global_scale=0.01), expected)
    as_tensor = torch.tensor([0.01])
    assert torch.equal(moe_layer(x, ids, weights, experts, input_global_scale=as_tensor), expected)


def test_close_to_the_layer_without_quantised_activations(experts: CheckpointExperts) -> None:
    """Every scale in its place: nothing but rounding separates the formats."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(64, H, generator=generator).bfloat16()
    _, ids, weights = tokens(64)
    exact = torch.zeros(64, H, dtype=torch.float64)
    for t in range(64):
        for k, e in enumerate(ids[t].tolist()):
            if e >= 0:
                scale_2 = experts.w13_scale_2[e].repeat_interleave(I)
                w13 = nvfp4.dequantize(experts.w13[e], experts.w13_scale[e], scale_2).double()
                w2 = nvfp4.dequantize(
                    experts.w2[e], experts.w2_scale[e], experts.w2_scale_2[e]
                ).double()
                gate, up = (w13 @ x[t].double()).chunk(2)
                exact[t] += weights[t, k] * (w2 @ (torch.nn.functional.silu(gate) * up))
    error = {
        name: relative_l2_error(moe_layer(x, ids, weights, experts, activation_format=name), exact)
        for name in ("bf16", "nvfp4")
    }
    assert 5e-4 < error["bf16"] < 5e-3
    assert 0.05 < error["nvfp4"] < 0.25


# Routing


def test_minus_one_is_no_expert(experts: CheckpointExperts) -> None:
    x, ids, weights = tokens(8)
    ids[3] = -1
    weights[ids == -1] = torch.nan
    y = moe_layer(x, ids, weights, experts)
    assert torch.equal(y[3], torch.zeros(H, dtype=torch.bfloat16))
    assert not torch.signbit(y[3]).any()
    assert bool(y.isfinite().all())


def test_repeated_expert_counts_twice(experts: CheckpointExperts) -> None:
    x, _, _ = tokens(6)
    twice = moe_layer(x, torch.full((6, 2), 3), torch.full((6, 2), 0.25), experts)
    once = moe_layer(x, torch.full((6, 1), 3), torch.full((6, 1), 0.5), experts)
    assert torch.equal(twice, once)
    assert bool(once.any())


def test_no_tokens(experts: CheckpointExperts) -> None:
    y = moe_layer(*tokens(0), experts)
    assert y.shape == (0, H)
    assert y.dtype == torch.bfloat16


def test_ids_count_from_the_first_expert(experts: CheckpointExperts) -> None:
    x, ids, weights = tokens(10)
    moved = replace(experts, first_expert=100)
    shifted = torch.where(ids >= 0, ids + 100, -1)
    assert torch.equal(moe_layer(x, shifted, weights, moved), moe_layer(x, ids, weights, experts))


def test_a_token_does_not_depend_on_the_others(experts: CheckpointExperts) -> None:
    x, ids, weights = tokens(33)
    y = moe_layer(x, ids, weights, replace(experts, w13_input_scale=None))
    for t in (0, 7, 32):
        one = slice(t, t + 1)
        alone = moe_layer(x[one], ids[one], weights[one], replace(experts, w13_input_scale=None))
        assert relative_l2_error(alone, y[one]) < 1e-5


# The weighted sum, over experts that give o exactly


def experts_that_give(*outputs: float) -> tuple[CheckpointExperts, torch.Tensor]:
    """Experts of H = I = 16 with output ``outputs[e]`` (bf16) in all elements, for token x."""
    count = len(outputs)
    ones = torch.full((1, 16), 0x22, dtype=torch.uint8).repeat(16, 1)[:, :8]  # code 2 is 1.0
    unit = torch.ones(16, 1).to(torch.float8_e4m3fn)
    experts = CheckpointExperts(
        w13=ones.repeat(count, 2, 1),
        w13_scale=unit.repeat(count, 2, 1),
        w13_scale_2=torch.ones(count, 2),
        w2=ones.repeat(count, 1, 1),
        w2_scale=unit.repeat(count, 1, 1),
        w2_scale_2=torch.ones(count),
    )
    x = torch.full((1, 16), 0.5).bfloat16()
    unscaled = 16 * float(torch.tensor(8 / (1 + math.exp(-8)) * 8).bfloat16())
    return replace(experts, w2_scale_2=torch.tensor(outputs) / unscaled), x


@pytest.mark.parametrize(
    ("weights", "expected"),
    [([2.0**30, -(2.0**30), 1.0], 1.0), ([1.0, 2.0**30, -(2.0**30)], 0.0)],
)
def test_slots_are_added_in_order(weights: list[float], expected: float) -> None:
    experts, x = experts_that_give(1.0, 1.0, 1.0)
    y = moe_layer(
        x, torch.tensor([[0, 1, 2]]), torch.tensor([weights]), experts, activation_format="bf16"
    )
    assert y.tolist() == [[expected] * 16]


def test_products_are_rounded_before_they_are_added() -> None:
    o = 1 + 2**-7
    experts, x = experts_that_give(1.0, o)
    rounded = 1 + 2**-7 + 2**-23  # of (1 + 2**-23) * o; a fused multiply-add would leave 2**-30
    weights = torch.tensor([[-rounded, 1 + 2**-23]])
    y = moe_layer(x, torch.tensor([[0, 1]]), weights, experts, activation_format="bf16")
    assert y.tolist() == [[0.0] * 16]


def test_expert_output_is_rounded_to_bf16() -> None:
    experts, x = experts_that_give(1.0, 1 + 2**-10)
    weights = torch.tensor([[-(2.0**12), 2.0**12]])
    y = moe_layer(x, torch.tensor([[0, 1]]), weights, experts, activation_format="bf16")
    assert y.tolist() == [[0.0] * 16]  # unrounded: 4


# NaN and infinity


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("activation_format", ["nvfp4", "bf16"])
@pytest.mark.parametrize("static", [False, True])
def test_bad_token_comes_out_as_nan_and_alone(
    experts: CheckpointExperts, bad: float, activation_format: Any, static: bool
) -> None:
    given = experts if static else replace(experts, w13_input_scale=None, w2_input_scale=None)
    x, ids, weights = tokens(12)
    ids[5] = torch.tensor([-1, 2, -1, 0])
    clean = moe_layer(x, ids, weights, given, activation_format=activation_format)
    x[5, 17] = bad
    y = moe_layer(x, ids, weights, given, activation_format=activation_format)
    assert bool(y[5].isnan().all())
    others = torch.arange(12) != 5
    assert torch.equal(y[others], clean[others])
    assert bool(clean.isfinite().all())


# Bad input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation_format": "fp8"}, "activation_format must be 'nvfp4' or 'bf16'; got 'fp8'"),
        ({"activation_clamp": 0.0}, "activation_clamp must be a positive number; got 0.0"),
        ({"x": torch.zeros(3, H)}, r"x must be bf16 \[n, 64\].*got torch.float32 \[3, 64\]"),
        (
            {"x": torch.zeros(3, 32).bfloat16()},
            r"x must be bf16 \[n, 64\], the experts' hidden size; got torch.bfloat16 \[3, 32\]",
        ),
        (
            {"topk_idx": torch.zeros(3, K)},
            r"topk_idx must be int32 or int64 \[n, K\]; got torch.float32 \[3, 4\]",
        ),
        (
            {"topk_idx": torch.zeros(2, K, dtype=torch.int32)},
            r"topk_idx must have a row for each of the 3 tokens of x; got \[2, 4\]",
        ),
        (
            {"topk_weights": torch.zeros(3, 2)},
            r"topk_weights must be fp32 \[3, 4\], like topk_idx; got torch.float32 \[3, 2\]",
        ),
        (
            {"topk_idx": torch.full((3, K), E)},
            "topk_idx must hold experts 0 to 4, those given, or -1 for none; got 5",
        ),
        ({"topk_idx": torch.full((3, K), -2)}, "or -1 for none; got -2"),
        (
            {"activation_format": "bf16", "input_global_scale": 0.1},
            "input_global_scale must be None when activation_format is 'bf16'.*got 0.1",
        ),
        ({"input_global_scale": -1.0}, "global_scale must be positive and finite; got -1.0"),
    ],
)
def test_bad_argument(experts: CheckpointExperts, change: dict[str, Any], message: str) -> None:
    x, ids, weights = tokens(3)
    arguments = {"x": x, "topk_idx": ids, "topk_weights": weights, "experts": experts, **change}
    with pytest.raises(ArgumentError, match=message):
        moe_layer(**arguments)


# Parts


def test_swiglu_clamps_gate_from_above_and_up_on_both_sides() -> None:
    gate = torch.tensor([10.0, -10.0, 1.0, 1.0, 0.0])
    up = torch.tensor([1.0, 1.0, 10.0, -10.0, 3.0])
    silu = [v / (1 + math.exp(-v)) for v in (10, -10, 1, 1, 0)]
    free = [s * u for s, u in zip(silu, up.tolist(), strict=True)]
    assert swiglu(gate, up).tolist() == pytest.approx(free, rel=1e-6)
    at_two = 2 / (1 + math.exp(-2))
    clamped = [at_two, silu[1], silu[2] * 2, silu[3] * -2, 0.0]
    assert swiglu(gate, up, 2.0).tolist() == pytest.approx(clamped, rel=1e-6)


def test_relative_l2_error() -> None:
    assert relative_l2_error(torch.tensor([3.0, 4.4]), torch.tensor([3.0, 4.0])) == (
        pytest.approx(0.08)
    )
    zeros = torch.zeros(2)
    assert relative_l2_error(zeros, zeros) == 0.0
    assert relative_l2_error(torch.ones(2), zeros) == math.inf
    assert math.isnan(relative_l2_error(torch.tensor([math.nan]), torch.ones(1)))
