"""What the SM100 path prepares, fed to CUTLASS's own reference of a block-scaled GEMM.

csrc's code for packing rows, describing groups and laying out memory runs here on the host, the
very functions that the kernels call; CUTLASS's reference then multiplies from those buffers, by
those pointers, strides, scale layouts and alphas. What it returns must be what reference.py says.
"""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass

import pytest
import torch

from megamoe_ep import nvfp4, reference
from megamoe_ep.kernels import portable
from megamoe_ep.prepack import sm100
from megamoe_ep.weights import (
    CheckpointExperts,
    KernelWeights,
    random_experts,
    transform_weights_for_nvfp4_mega_moe,
)

SMS = 148


def every_block() -> torch.Tensor:
    """Values bf16 [n, 16] of every scale times every set of magnitudes that a block can hold."""
    scales = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn)
    draw = torch.Generator().manual_seed(0)
    blocks = []
    for held in range(1, 256):
        magnitudes = torch.tensor([m for m in range(8) if held >> m & 1])
        codes = magnitudes.repeat(16)[:16]  # each of them, in some place
        codes = codes[torch.randperm(16, generator=draw)]
        signs = torch.randint(2, (16,), generator=draw) * 8
        blocks.append((codes | signs).to(torch.uint8))
    values = nvfp4.decode_e2m1(torch.stack(blocks)).double()
    exact = values[None] * scales.double()[:, None, None]
    bf16 = exact.bfloat16()
    assert torch.equal(bf16.double(), exact)
    return bf16.flatten(0, 1)


def recovered(host: ctypes.CDLL, blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    codes = torch.zeros(len(blocks), 8, dtype=torch.uint8)
    scales = torch.zeros(len(blocks), 1, dtype=torch.uint8)
    host.recover_blocks(blocks.data_ptr(), len(blocks), codes.data_ptr(), scales.data_ptr())
    return codes, scales.view(torch.float8_e4m3fn)


def test_codes_and_scales_are_recovered_from_every_block_that_there_is(host):
    """Exhaustive: whether a scale fits is asked of each value alone, and of its magnitude alone, so
    the set of magnitudes and the scale are all that matters."""
    blocks = every_block()
    assert len(blocks) == 127 * 255
    codes, scales = recovered(host, blocks)
    assert not (scales.view(torch.uint8) > 0x7E).any()
    again = nvfp4.dequantize(codes, scales)
    assert torch.equal(again.view(torch.int16), blocks.view(torch.int16))  # signs of zeros too


def test_a_block_of_nan_and_one_that_no_scale_fits_become_nan(host):
    blocks = torch.ones(4, 16).bfloat16()
    blocks[0, 3] = torch.nan
    blocks[1, 3] = 1 + 2**-7  # more significant bits than code x scale has beside a 1
    blocks[2, 3] = torch.inf
    blocks[3, 3] = 2**-20
    codes, scales = recovered(host, blocks)
    assert (scales.view(torch.uint8) == 0x7F).all()
    assert (codes == 0).all()


@dataclass
class Layer:
    """A small layer, and the memory that the product would give its GEMMs."""

    experts: CheckpointExperts
    l1: KernelWeights
    l2: KernelWeights
    x: torch.Tensor  # bf16 [R, H] as given, by expert
    rows: torch.Tensor  # bf16 [R, H], exact code x scale, as dispatch leaves them
    row_scales: torch.Tensor
    offsets: torch.Tensor
    scratch: torch.Tensor

    @classmethod
    def make(
        cls, hidden: int, intermediate: int, counts: list[int], *, seed: int = 0, room: int = 0
    ) -> Layer:
        experts = random_experts(len(counts), hidden, intermediate, seed=seed)
        # Gate's and up's global scales differ by far, as do the experts'.
        experts.w13_scale_2[:, 1] *= 3.25
        experts.w2_scale_2[:] *= torch.linspace(0.5, 2.0, len(counts))
        l1, l2 = transform_weights_for_nvfp4_mega_moe(
            (experts.w13, experts.w13_scale), (experts.w2, experts.w2_scale), layout="sm100"
        )
        draw = torch.Generator().manual_seed(seed)
        total = sum(counts)
        x = torch.randn(total, hidden, generator=draw)
        x *= torch.rand(total, 1, generator=draw) * 8  # rows of different size
        x[:, : hidden // 4] *= 1e-3  # and blocks
        x = x.bfloat16()
        q = nvfp4.quantize_per_token(x)
        layer = cls(
            experts, l1, l2, x, nvfp4.dequantize(q.codes, q.scales), q.global_scale,
            torch.tensor([0, *counts]).cumsum(0).int(), torch.empty(0),
        )  # fmt: skip
        layer.room = total + room
        return layer

    room: int = 0  # rows that the scratch memory is for; there may be fewer

    def sizes(self) -> tuple[int, int, int, int, int]:
        e = self.experts
        return self.room, e.num_experts, e.hidden_size, e.intermediate_size, SMS

    def run_l1(self, host: ctypes.CDLL) -> torch.Tensor:
        """L1's accumulators, fp32 [R, 2I]."""
        nbytes = host.scratch_bytes(*self.sizes())
        memory = torch.full((nbytes + 256 + 4096,), 0xA5, dtype=torch.uint8)
        self.scratch = memory[-memory.data_ptr() % 256 :]
        host.l1_accumulators(
            self.scratch.data_ptr(), *self.sizes(), self.rows.data_ptr(), self.offsets.data_ptr(),
            self.l1.codes.data_ptr(), self.l1.scales.data_ptr(),
        )  # fmt: skip
        assert (self.scratch[nbytes : nbytes + 1024] == 0xA5).all()
        gate_up = self.part(host, 2, len(self.rows) * self.l1.n * 4)
        return gate_up.view(torch.float32).view(-1, self.l1.n)

    def part(self, host: ctypes.CDLL, which: int, nbytes: int) -> torch.Tensor:
        places = torch.zeros(4, dtype=torch.int64)
        host.scratch_places(self.scratch.data_ptr(), *self.sizes(), places.data_ptr())
        start = int(places[which]) - self.scratch.data_ptr()
        return self.scratch[start : start + nbytes]

    def activate(
        self, host: ctypes.CDLL, gate_up: torch.Tensor, clamp: float | None
    ) -> torch.Tensor:
        e = self.experts
        h = torch.full((len(gate_up), e.intermediate_size), torch.nan).bfloat16()
        host.activate(
            e.num_experts, e.intermediate_size, self.offsets.data_ptr(), gate_up.data_ptr(),
            self.row_scales.data_ptr(), e.w13_scale_2.data_ptr(), e.w2_input_scale.data_ptr(),
            math.inf if clamp is None else clamp, h.data_ptr(),
        )  # fmt: skip
        return h

    def alpha2(self) -> torch.Tensor:
        return self.experts.w2_scale_2 * self.experts.w2_input_scale

    def run_l2(self, host: ctypes.CDLL, h: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        out = torch.full((len(h), self.l2.n), torch.nan, dtype=dtype)
        alpha = self.alpha2()
        host.l2_output(
            self.scratch.data_ptr(), *self.sizes(), h.data_ptr(), self.offsets.data_ptr(),
            self.l2.codes.data_ptr(), self.l2.scales.data_ptr(), alpha.data_ptr(), out.data_ptr(),
            out.element_size(),
        )  # fmt: skip
        return out

    def expected(self, rows: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor):
        """reference.py's accumulators of every row, and how far fp32 additions may be from them:
        K roundings, each of at most 2**-24 of the sum of magnitudes."""
        values, bounds = [], []
        for e in range(self.experts.num_experts):
            span = rows[int(self.offsets[e]) : int(self.offsets[e + 1])]
            values.append(reference._product(span, codes[e], scales[e]))
            weights = nvfp4.dequantize(codes[e], scales[e]).double().abs()
            bounds.append(span.double().abs() @ weights.t() * rows.shape[1] * 2.0**-24)
        return torch.cat(values), torch.cat(bounds)


LAYERS = [
    pytest.param(256, 128, [3, 0, 17, 1], 5, id="empty-expert"),
    pytest.param(96, 160, [130, 1, 128], 0, id="ragged-K-and-several-tiles"),
    pytest.param(512, 64, [0, 0, 9, 0], 100, id="one-expert-and-room"),
]


@pytest.mark.parametrize(("hidden", "intermediate", "counts", "room"), LAYERS)
def test_cutlass_on_the_prepared_buffers_has_the_references_accumulators(
    host, hidden, intermediate, counts, room
):
    layer = Layer.make(hidden, intermediate, counts, room=room)
    e = layer.experts
    acc = layer.run_l1(host)
    expected, bound = layer.expected(layer.rows, e.w13, e.w13_scale)
    assert ((acc.double() - expected.double()).abs() <= bound).all()
    assert reference.relative_l2_error(acc, expected) < 1e-6

    h = layer.activate(host, acc, None)
    assert not h.isnan().any()
    out = layer.run_l2(host, h, torch.float32)
    expected, bound = layer.expected(h, e.w2, e.w2_scale)
    expert_of_row = torch.repeat_interleave(torch.tensor(counts))
    alpha = layer.alpha2()[expert_of_row, None]
    # One rounding more, of the product with alpha.
    bound = (bound + expected.double().abs() * 2.0**-24) * alpha.double()
    assert ((out.double() - expected.double() * alpha.double()).abs() <= bound).all()
    assert reference.relative_l2_error(out, expected * alpha) < 1e-6
    assert torch.equal(layer.run_l2(host, h, torch.bfloat16), out.bfloat16())


@pytest.mark.parametrize(("hidden", "intermediate", "counts", "room"), LAYERS)
def test_packed_rows_are_the_rows_and_their_scales_padding_is_zero(
    host, hidden, intermediate, counts, room
):
    layer = Layer.make(hidden, intermediate, counts, room=room)
    layer.run_l1(host)
    total, ksf = sum(counts), hidden // 16
    codes = layer.part(host, 0, total * hidden // 2).view(total, hidden // 2)
    start = 0
    for e, count in enumerate(counts):
        nbytes = sm100.scale_nbytes(count, ksf)
        tiles = layer.part(host, 1, start + nbytes)[start:]
        offsets = sm100.scale_offsets(count, ksf)
        scales = tiles[offsets].view(torch.float8_e4m3fn)
        span = slice(int(layer.offsets[e]), int(layer.offsets[e + 1]))
        assert torch.equal(nvfp4.dequantize(codes[span], scales), layer.rows[span])
        padding = torch.ones(nbytes, dtype=torch.bool)
        padding[offsets.flatten()] = False
        assert (tiles[padding] == 0).all()
        start += nbytes


@pytest.mark.parametrize("clamp", [None, 0.5])
def test_activation_is_portables(host, clamp):
    """From portable's own accumulators: but for expf's last bit, which may move a value that lies
    on the border between two codes."""
    layer = Layer.make(256, 192, [40, 0, 25])
    e = layer.experts
    acc, _ = layer.expected(layer.rows, e.w13, e.w13_scale)
    h = layer.activate(host, acc, clamp)
    expected = torch.empty_like(h)
    weights = KernelWeights("portable", e.w13, e.w13_scale, e.num_experts, 2 * 192, 256, True)
    portable.l1(
        layer.rows, layer.row_scales, layer.offsets, weights, e.w13_scale_2,
        input_scale=e.w2_input_scale, clamp=clamp, out=expected,
    )  # fmt: skip
    assert (h != expected).float().mean() < 1e-3
    assert reference.relative_l2_error(h, expected) < 1e-3


def test_activation_of_a_row_with_nan_is_nan_and_no_other(host):
    layer = Layer.make(64, 64, [5])
    acc = torch.randn(5, 128)
    acc[2] = torch.nan
    layer.row_scales[4] = torch.nan
    h = layer.activate(host, acc, 1.0)
    assert h[[2, 4]].isnan().all()
    assert not h[[0, 1, 3]].isnan().any()


def test_a_row_of_nan_comes_out_as_nan_and_no_other(host):
    layer = Layer.make(128, 64, [4, 3])
    layer.rows[1, 16:32] = torch.nan
    acc = layer.run_l1(host)
    assert acc[1].isnan().all()
    assert not acc[[0, 2, 3, 4, 5, 6]].isnan().any()


@pytest.mark.parametrize("clamp", [None, 1.0])
def test_the_whole_layer_is_the_references(host, clamp):
    """With one expert a token and weights of 1, the layer's output is L2's."""
    counts = [9, 0, 20]
    layer = Layer.make(256, 128, counts)
    acc = layer.run_l1(host)
    out = layer.run_l2(host, layer.activate(host, acc, clamp), torch.bfloat16)
    expert = torch.repeat_interleave(torch.tensor(counts))[:, None]
    expected = reference.moe_layer(
        layer.x, expert, torch.ones(len(expert), 1), _without_static_input_scale(layer.experts),
        activation_clamp=clamp,
    )  # fmt: skip
    assert reference.relative_l2_error(out, expected) < 5e-3


def _without_static_input_scale(e: CheckpointExperts) -> CheckpointExperts:
    return CheckpointExperts(
        e.w13, e.w13_scale, e.w13_scale_2, e.w2, e.w2_scale, e.w2_scale_2, None, e.w2_input_scale
    )
