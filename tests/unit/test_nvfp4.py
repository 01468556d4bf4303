"""The number format against its definition, ml_dtypes, and vectors made with NVIDIA ModelOpt."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megamoe_ep import nvfp4
from megamoe_ep.errors import ArgumentError

GOLDEN = Path(__file__).parents[1] / "golden"
MODELOPT = runpy.run_path(str(GOLDEN / "make_modelopt.py"))
CASES = MODELOPT["inputs"]()


@pytest.fixture(scope="module")
def vectors() -> dict[str, np.ndarray]:
    with np.load(MODELOPT["VECTORS"]) as stored:
        return dict(stored)


def ulp(x: float, n: int) -> float:
    """The fp32 number that is ``n`` steps above ``x``."""
    return float((np.float32(x).view(np.int32) + n).view(np.float32))


def all_scales() -> torch.Tensor:
    """The 127 finite UE4M3 numbers."""
    return torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn)


# E2M1


def test_all_sixteen_codes() -> None:
    codes = torch.arange(16, dtype=torch.uint8)
    expected = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    values = nvfp4.decode_e2m1(codes)
    assert values.dtype == torch.bfloat16
    assert values.tolist() == expected + [-v for v in expected]
    assert torch.signbit(values).tolist() == [False] * 8 + [True] * 8
    assert list(nvfp4.E2M1_VALUES) == expected
    assert torch.equal(nvfp4.encode_e2m1(values.float()), codes)
    assert np.array_equal(
        codes.numpy().view(ml_dtypes.float4_e2m1fn).astype(np.float32), values.float().numpy()
    )


@pytest.mark.parametrize(
    ("tie", "below", "at", "above"),
    [
        (0.25, 0, 0, 1),
        (0.75, 1, 2, 2),
        (1.25, 2, 2, 3),
        (1.75, 3, 4, 4),
        (2.5, 4, 4, 5),
        (3.5, 5, 6, 6),
        (5.0, 6, 6, 7),
    ],
)
def test_seven_ties_go_to_the_even_code(tie: float, below: int, at: int, above: int) -> None:
    x = torch.tensor([ulp(tie, -1), tie, ulp(tie, 1)])
    assert nvfp4.encode_e2m1(x).tolist() == [below, at, above]
    assert nvfp4.encode_e2m1(-x).tolist() == [below + 8, at + 8, above + 8]


def test_encode_zeros_saturation_and_nan() -> None:
    x = torch.tensor([0.0, -0.0, 1e-45, -1e-45, 6.0, 7.0, 3e38, torch.inf, -torch.inf])
    assert nvfp4.encode_e2m1(x).tolist() == [0, 8, 0, 8, 7, 7, 7, 7, 15]
    nans = np.array([0x7FC00000, 0xFFC00000, 0x7F800001], np.uint32).view(np.float32)
    assert nvfp4.encode_e2m1(torch.from_numpy(nans)).tolist() == [0, 0, 0]


def test_encode_equals_ml_dtypes_on_a_million_floats() -> None:
    words = np.arange(0, 2**32, 4093, dtype=np.uint64).astype(np.uint32)
    x = words.view(np.float32)
    x = x[np.isfinite(x)]
    assert x.size > 1_000_000
    expected = x.astype(ml_dtypes.float4_e2m1fn).view(np.uint8)
    assert np.array_equal(nvfp4.encode_e2m1(torch.from_numpy(x)).numpy(), expected)


@given(st.lists(st.integers(0, 15), min_size=2, max_size=64).filter(lambda c: len(c) % 2 == 0))
def test_pack_puts_even_k_in_the_low_nibble(codes: list[int]) -> None:
    tensor = torch.tensor([codes, codes[::-1]], dtype=torch.uint8)
    packed = nvfp4.pack(tensor)
    assert packed.dtype == torch.uint8
    assert packed[0].tolist() == [
        lo + 16 * hi for lo, hi in zip(codes[::2], codes[1::2], strict=True)
    ]
    assert torch.equal(nvfp4.unpack(packed), tensor)
    assert torch.equal(nvfp4.unpack(packed.view(torch.int8)), tensor)


# UE4M3


def test_torch_rounds_block_scales_as_ml_dtypes_does() -> None:
    words = np.arange(0, np.float32(448).view(np.uint32) + 1, 1009, dtype=np.uint32)
    x = words.view(np.float32)
    assert x.size > 1_000_000
    got = torch.from_numpy(x).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    assert np.array_equal(got, x.astype(ml_dtypes.float8_e4m3fn).view(np.uint8))


def test_every_code_times_every_scale_is_exact_in_bf16() -> None:
    scales = all_scales()
    codes = torch.arange(16, dtype=torch.uint8)[None].expand(127, 16)
    values = nvfp4.dequantize(nvfp4.pack(codes), scales[:, None])
    assert values.dtype == torch.bfloat16
    exact = nvfp4.decode_e2m1(codes).double() * scales.double()[:, None]
    assert torch.equal(values.double(), exact)
    assert torch.equal(torch.signbit(values), codes > 7)


# Quantise


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_quantise_equals_modelopt(case: Any, vectors: dict[str, np.ndarray]) -> None:
    assert case.sha256 == str(vectors[f"{case.name}.sha256"]), "the recipe made other inputs"
    x = torch.from_numpy(case.x)
    if case.bf16:
        x = x.bfloat16()
    expected_global_scale = torch.from_numpy(vectors[f"{case.name}.global_scale"])
    if case.scale == "token":
        got = nvfp4.quantize_per_token(x)
    elif case.scale == "tensor":
        got = nvfp4.quantize(x, nvfp4.global_scale_from_amax(x.abs().amax()))
    else:
        got = nvfp4.quantize(x, case.scale)
    assert torch.equal(got.global_scale.reshape(-1), expected_global_scale)

    assert np.array_equal(got.codes.numpy(), vectors[f"{case.name}.codes"])
    # A block of zeros may have any scale: ModelOpt's is 1.
    empty = case.x.reshape((*got.scales.shape, 16)).any(-1) == 0
    expected_scales = vectors[f"{case.name}.scales"]
    assert np.array_equal(got.scales.view(torch.uint8).numpy()[~empty], expected_scales[~empty])
    assert (got.scales.view(torch.uint8).numpy()[empty] == 1).all()


def test_golden_vectors_are_many_and_reach_the_corners(vectors: dict[str, np.ndarray]) -> None:
    codes = np.concatenate([vectors[f"{c.name}.codes"].ravel() for c in CASES])
    scales = np.concatenate([vectors[f"{c.name}.scales"].ravel() for c in CASES])
    assert 2 * codes.size > 1_000_000
    nibbles = set((codes & 15).tolist()) | set((codes >> 4).tolist())
    assert nibbles == set(range(16))
    assert set(scales.tolist()) == set(range(1, 127))  # every scale but 0


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_quantise_equals_its_definition(data: st.DataObject) -> None:
    """Against the formula in numpy and ml_dtypes, over drawn shapes, dtypes and global scales."""
    lead = data.draw(st.lists(st.integers(0, 3), max_size=2))
    k = 16 * data.draw(st.integers(1, 4))
    seed = data.draw(st.integers(0, 2**32 - 1))
    spread = data.draw(st.integers(0, 14))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    words = np.random.Philox(key=seed).random_raw(int(np.prod([*lead, k])))
    x = (words >> np.uint64(40)).astype(np.float32) / np.float32(2**23) - np.float32(1)
    x = x * np.ldexp(np.float32(1), ((words & np.uint64(255)) % np.uint64(spread + 1)).astype(int))
    x = torch.from_numpy(x.reshape([*lead, k])).to(dtype)
    per_row = data.draw(st.booleans())
    g = np.float32(data.draw(st.floats(2.0**-20, 2.0**10, width=32)))
    if per_row:
        g = g * np.arange(1, 1 + np.prod(lead, dtype=int), dtype=np.float32)
    g = np.array(g, np.float32).reshape(lead if per_row else [])
    rows = np.broadcast_to(g, lead)[..., None]

    got = nvfp4.quantize(x, torch.from_numpy(g))

    blocks = x.float().numpy().reshape(*lead, k // 16, 16)
    wanted = np.abs(blocks).max(-1) / (np.float32(6) * rows)
    scales = np.clip(wanted, np.float32(2.0**-9), np.float32(448)).astype(ml_dtypes.float8_e4m3fn)
    step = scales.astype(np.float32) * rows
    codes = (blocks / step[..., None]).astype(ml_dtypes.float4_e2m1fn).view(np.uint8)
    assert np.array_equal(got.scales.view(torch.uint8).numpy(), scales.view(np.uint8))
    assert np.array_equal(nvfp4.unpack(got.codes).numpy(), codes.reshape(*lead, k))

    values = codes.view(ml_dtypes.float4_e2m1fn).astype(np.float32) * scales[..., None].astype("f4")
    exact = nvfp4.dequantize(got.codes, got.scales)
    assert np.array_equal(exact.float().numpy(), values.reshape(*lead, k))
    scaled = nvfp4.dequantize(got.codes, got.scales, torch.from_numpy(g))
    assert scaled.dtype == torch.float32
    assert np.array_equal(scaled.numpy(), (values * rows[..., None]).reshape(*lead, k))


def test_error_of_a_value_is_at_most_half_a_step() -> None:
    x = torch.from_numpy(CASES[0].x)
    got = nvfp4.quantize_per_token(x)
    step = got.scales.float() * got.global_scale[:, None]
    # Between 4 and 6 neighbours are two steps apart; a scale rounds by at most 1/16.
    error = (nvfp4.dequantize(*got) - x).abs().view(*step.shape, 16)
    assert (error <= 1.0001 * step[..., None]).all()


def test_zero_rows_and_zero_blocks() -> None:
    x = torch.zeros(2, 48)
    x[1, 16] = 3.0
    x[1, 32] = -0.0
    got = nvfp4.quantize_per_token(x)
    assert got.global_scale.tolist() == [2.0**-117, np.float32(3) / np.float32(2688)]
    assert got.scales.view(torch.uint8).tolist() == [[1, 1, 1], [1, 126, 1]]
    assert nvfp4.unpack(got.codes)[1].tolist() == [0] * 16 + [7] + [0] * 15 + [8] + [0] * 15


def test_faint_blocks_keep_what_the_least_scale_can_hold() -> None:
    g = 1.0
    least = 2.0**-9
    x = torch.zeros(4, 16)
    x[:, 0] = torch.tensor([3 * least, 0.5 * least, ulp(0.25 * least, 1), 0.25 * least])
    got = nvfp4.quantize(x, g)
    assert got.scales.view(torch.uint8).tolist() == [[1]] * 4
    assert nvfp4.unpack(got.codes)[:, 0].tolist() == [5, 1, 1, 0]


@pytest.mark.parametrize("tiny", [2.0**-149, 2.0**-133, 2.0**-126, 1e-36])
def test_denormal_rows_stay_finite(tiny: float) -> None:
    x = torch.zeros(1, 32)
    x[0, :3] = torch.tensor([tiny, -tiny, 0.0])
    got = nvfp4.quantize_per_token(x)
    assert got.global_scale.item() == 2.0**-117
    values = nvfp4.dequantize(*got)
    assert values.isfinite().all()
    assert ((values - x).abs() <= max(tiny / 7, 2.0**-128)).all()


def test_saturation_when_the_global_scale_is_too_small() -> None:
    x = torch.linspace(-1e4, 1e4, 32)[None]
    got = nvfp4.quantize(x, 0.5)
    assert got.scales.float().tolist() == [[448.0, 448.0]]
    assert nvfp4.dequantize(got.codes, got.scales, torch.tensor(0.5)).abs().max() == 6 * 448 * 0.5
    assert set(nvfp4.unpack(got.codes)[0, [0, -1]].tolist()) == {15, 7}


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_non_finite_values_stay_in_their_block_or_token(bad: float, dtype: torch.dtype) -> None:
    clean = torch.from_numpy(CASES[0].x[:3, :64]).to(dtype)
    x = clean.clone()
    x[1, 20] = bad

    static, expected = nvfp4.quantize(x, 2.0**-12), nvfp4.quantize(clean, 2.0**-12)
    hit = torch.zeros(3, 4, dtype=torch.bool)
    hit[1, 1] = True
    for got, want in ((static.scales.view(torch.uint8), expected.scales.view(torch.uint8)),):
        assert torch.equal(got[~hit], want[~hit])
        assert got[hit].tolist() == [0x7F]
    assert torch.equal(static.codes.view(3, 4, 8)[~hit], expected.codes.view(3, 4, 8)[~hit])
    assert not static.codes.view(3, 4, 8)[hit].any()
    assert nvfp4.dequantize(static.codes, static.scales).isnan().view(3, 4, 16).all(-1).equal(hit)

    token, expected = nvfp4.quantize_per_token(x), nvfp4.quantize_per_token(clean)
    assert token.global_scale.isnan().tolist() == [False, True, False]
    assert not token.codes[1].any()
    assert (token.scales[1].view(torch.uint8) == 0x7F).all()
    for got, want in zip(token, expected, strict=True):
        assert torch.equal(
            got[::2].contiguous().view(torch.uint8), want[::2].contiguous().view(torch.uint8)
        )


def test_rows_do_not_depend_on_one_another() -> None:
    x = torch.from_numpy(CASES[2].x[:7])
    together = nvfp4.quantize_per_token(x)
    for row in range(7):
        alone = nvfp4.quantize_per_token(x[row])
        assert torch.equal(alone.codes, together.codes[row])
        assert torch.equal(alone.global_scale, together.global_scale[row])


def test_strided_input() -> None:
    x = torch.from_numpy(CASES[0].x[:32, :32])
    for got, want in zip(
        nvfp4.quantize_per_token(x.t()), nvfp4.quantize_per_token(x.t().contiguous()), strict=True
    ):
        assert torch.equal(got.view(torch.uint8), want.view(torch.uint8))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_same_bits_on_gpu(case: Any) -> None:
    x = torch.from_numpy(case.x).to(torch.bfloat16 if case.bf16 else torch.float32)
    for quantise in (nvfp4.quantize_per_token, lambda x: nvfp4.quantize(x, 0.0037)):
        here, there = quantise(x), quantise(x.cuda())
        for a, b in zip(here, there, strict=True):
            assert torch.equal(a.view(torch.uint8), b.cpu().view(torch.uint8))
        assert torch.equal(nvfp4.dequantize(*here), nvfp4.dequantize(*there).cpu())
        assert torch.equal(nvfp4.dequantize(*here[:2]), nvfp4.dequantize(*there[:2]).cpu())


# Bad input

X = torch.ones(2, 32)
Q = nvfp4.quantize(X, 1.0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: nvfp4.quantize(X.int(), 1.0), r"x must be bf16, fp16 or fp32; got torch.int32"),
        (lambda: nvfp4.quantize(X[:, :24], 1.0), r"x must have a multiple of 16 .* \[2, 24\]"),
        (lambda: nvfp4.quantize(torch.tensor(1.0), 1.0), r"x must have a multiple of 16"),
        (lambda: nvfp4.quantize(X, 0.0), r"global_scale must be positive and finite; got 0.0"),
        (lambda: nvfp4.quantize(X, float("nan")), r"global_scale must be positive and finite"),
        (lambda: nvfp4.quantize(X, torch.ones(3)), r"one per row \[2\]; got shape \[3\]"),
        (lambda: nvfp4.quantize(X, torch.ones(2).double()), r"global_scale must be fp32 on cpu"),
        (lambda: nvfp4.quantize_per_token(X[:, :0]), r"must have elements in its last dimension"),
        (lambda: nvfp4.quantize_per_token(X.long()), r"x must be bf16, fp16 or fp32"),
        (lambda: nvfp4.pack(torch.zeros(3, dtype=torch.uint8)), r"even number of elements"),
        (lambda: nvfp4.dequantize(Q.codes.int(), Q.scales), r"codes must be uint8 or int8"),
        (lambda: nvfp4.dequantize(Q.codes, Q.scales.float()), r"scales must be float8_e4m3fn"),
        (lambda: nvfp4.dequantize(Q.codes, Q.scales[:1]), r"codes \[2, 16\] and scales \[1, 2\]"),
        (lambda: nvfp4.dequantize(Q.codes[:, :9], Q.scales), r"scales must have one element for"),
        (lambda: nvfp4.dequantize(*Q[:2], torch.ones(5)), r"one per row \[2\]; got shape \[5\]"),
    ],
)
def test_bad_arguments_are_named(call: Any, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        call()
