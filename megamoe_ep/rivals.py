"""What a user could run instead of this layer, on the same tokens and weights, timed beside it.

torch.distributed with ``torch._grouped_mm`` is always there. The others serve one rank, without an
exchange, where they are installed; see ``installed``.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

from megamoe_ep.measure import LayerWeights, Tokens
from megamoe_ep.shape import LayerShape
from megamoe_ep.weights import KernelWeights

Layer = Callable[[], torch.Tensor | None]


@dataclass(frozen=True)
class Setting:
    """One rank's part of a call. ``weights`` were made with their bf16 values."""

    shape: LayerShape
    rank: int
    weights: LayerWeights
    tokens: Tokens


@dataclass(frozen=True)
class Rival:
    """Something to compare with.

    Attributes:
        name: what it is, and in which precision.
        make: prepares its weights and returns the call to time; that returns its bf16 [n, H], or
            None where it computes something else.
        graph: the call can be captured as a CUDA graph.
    """

    name: str
    make: Callable[[Setting], Layer]
    graph: bool = False


def installed(device: torch.device, world_size: int) -> list[Rival]:
    """What this machine can compare with: torch, then what is importable and serves ``device``."""
    by = "NCCL" if device.type == "cuda" else "gloo"
    exchange = f"torch + {by}" if world_size > 1 else "torch"
    found = [
        Rival(f"{exchange}, bf16, once a rank", lambda s: _torch(s, TorchLayer.once_a_rank)),
        Rival(f"{exchange}, bf16, once an expert", lambda s: _torch(s, TorchLayer.once_an_expert)),
    ]
    if device.type != "cuda" or world_size > 1:
        return found
    hopper = torch.cuda.get_device_capability(device) == (9, 0)
    others = (
        ("deep_gemm", hopper, Rival("DeepGEMM, FP8, its two GEMMs alone", _deep_gemm, True)),
        ("flashinfer", True, Rival("FlashInfer cutlass_fused_moe, bf16", _flashinfer, True)),
        ("vllm", True, Rival("vLLM Marlin, NVFP4 weights, bf16", _marlin, True)),
    )
    return found + [r for name, serves, r in others if serves and importlib.util.find_spec(name)]


# torch


class TorchLayer:
    """All-to-all and ``torch._grouped_mm`` in bf16: what a user writes without this package."""

    def __init__(self, shape: LayerShape, rank: int, weights: LayerWeights) -> None:
        self.shape, self.rank = shape, rank
        assert weights.w13 is not None
        assert weights.w2 is not None
        self.w13, self.w2 = weights.w13, weights.w2

    def experts(self, rows: torch.Tensor, local_expert: torch.Tensor) -> torch.Tensor:
        """The two GEMMs of rows sorted by expert."""
        experts = self.shape.experts_per_rank
        ends = torch.bincount(local_expert, minlength=experts).cumsum(0).int()
        gate, up = torch._grouped_mm(rows, self.w13, offs=ends).chunk(2, dim=-1)
        return torch._grouped_mm(torch.nn.functional.silu(gate) * up, self.w2, offs=ends)

    def exchange_counts(self, counts: torch.Tensor) -> tuple[list[int], list[int]]:
        """How much goes to each rank, and how much comes from it; a lone rank need not know."""
        if self.shape.world_size == 1:
            return [], []
        received = torch.empty_like(counts)
        dist.all_to_all_single(received, counts)
        there, here = torch.stack((counts, received)).tolist()
        return there, here

    def all_to_all(self, rows: torch.Tensor, there: list[int], here: list[int]) -> torch.Tensor:
        if self.shape.world_size == 1:
            return rows
        received = rows.new_empty(sum(here), *rows.shape[1:])
        dist.all_to_all_single(received, rows, here, there)
        return received

    def once_a_rank(self, tokens: Tokens) -> torch.Tensor:
        """Each token goes once to each rank with one of its experts, which adds up its rows."""
        x, ids, w = tokens.x, tokens.topk_idx, tokens.topk_weights
        ranks, per_rank = self.shape.world_size, self.shape.experts_per_rank
        goes = torch.zeros(len(x), ranks, dtype=torch.bool, device=x.device)
        goes.scatter_(1, (ids // per_rank).long(), True)
        _, token = goes.t().nonzero(as_tuple=True)
        there, here = self.exchange_counts(goes.sum(0))
        rows = self.all_to_all(x[token], there, here)
        routing = torch.cat((ids[token].view(torch.float32), w[token]), dim=1)
        routing = self.all_to_all(routing, there, here)
        experts = routing[:, : ids.shape[1]].contiguous().view(torch.int32) - self.rank * per_rank
        mine = (experts >= 0) & (experts < per_rank)
        row, slot = mine.nonzero(as_tuple=True)
        expert, order = experts[row, slot].sort()
        row, slot = row[order], slot[order]
        out = self.experts(rows[row], expert)
        out *= routing[row, ids.shape[1] + slot, None].bfloat16()
        back = self.all_to_all(torch.zeros_like(rows).index_add_(0, row, out), here, there)
        return torch.zeros_like(x).index_add_(0, token, back)

    def once_an_expert(self, tokens: Tokens) -> torch.Tensor:
        """Each token goes once for each of its experts."""
        x, ids, w = tokens.x, tokens.topk_idx, tokens.topk_weights
        ranks, per_rank = self.shape.world_size, self.shape.experts_per_rank
        expert, order = ids.flatten().sort(stable=True)
        there, here = self.exchange_counts(torch.bincount(expert // per_rank, minlength=ranks))
        rows = self.all_to_all(x[order // ids.shape[1]], there, here)
        local = self.all_to_all(expert, there, here) - self.rank * per_rank
        local, by_expert = local.sort(stable=True)
        out = torch.empty_like(rows)
        out[by_expert] = self.experts(rows[by_expert], local)
        back = self.all_to_all(out, here, there)
        home = torch.empty_like(back)
        home[order] = back
        return torch.bmm(w[:, None].bfloat16(), home.view(*ids.shape, -1)).squeeze(1)


def _torch(setting: Setting, variant: Callable[[TorchLayer, Tokens], torch.Tensor]) -> Layer:
    layer = TorchLayer(setting.shape, setting.rank, setting.weights)
    return lambda: variant(layer, setting.tokens)


# What may be installed. Written from the published sources of each, and not yet run.


def _deep_gemm(setting: Setting) -> Layer:
    deep_gemm: Any = importlib.import_module("deep_gemm")
    utils: Any = importlib.import_module("deep_gemm.utils")
    shape, ids, x = setting.shape, setting.tokens.topk_idx, setting.tokens.x
    w13, w2 = setting.weights.w13, setting.weights.w2
    assert w13 is not None
    assert w2 is not None

    def cast_weights(matrices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        # [E, K, N] to FP8 [E, N, K], a scale for each 128 x 128.
        pairs = [utils.per_block_cast_to_fp8(m.t().contiguous(), use_ue8m0=False) for m in matrices]
        return torch.stack([p[0] for p in pairs]), torch.stack([p[1] for p in pairs])

    def cast_rows(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        codes, scales = utils.per_token_cast_to_fp8(rows.flatten(0, 1), use_ue8m0=False)
        return codes.view(rows.shape), scales.view(*rows.shape[:2], -1)

    counts = ids.flatten().bincount(minlength=shape.num_experts).int()
    most = -(-int(counts.max()) // 128) * 128
    mean = -(-ids.numel() // shape.num_experts)
    draw = torch.randint(0, len(x), (shape.num_experts, most), device=x.device)
    up_in = cast_rows(x[draw])
    down_in = cast_rows(torch.randn_like(x[:1, :1].expand(shape.num_experts, most, w2.shape[1])))
    up, down = cast_weights(w13), cast_weights(w2)
    up_out = x.new_empty(shape.num_experts, most, w13.shape[2])
    down_out = x.new_empty(shape.num_experts, most, w2.shape[2])

    def call() -> None:
        deep_gemm.m_grouped_fp8_gemm_nt_masked(up_in, up, up_out, counts, mean)
        deep_gemm.m_grouped_fp8_gemm_nt_masked(down_in, down, down_out, counts, mean)

    return call


def _flashinfer(setting: Setting) -> Layer:
    fused_moe: Any = importlib.import_module("flashinfer.fused_moe")
    tokens = setting.tokens
    w13, w2 = setting.weights.w13, setting.weights.w2
    assert w13 is not None
    assert w2 is not None
    gate, up = w13.transpose(1, 2).chunk(2, dim=1)
    up_gate = torch.cat((up, gate), dim=1)  # its order
    down = w2.transpose(1, 2).contiguous()
    y = torch.empty_like(tokens.x)

    def call() -> torch.Tensor:
        fused_moe.cutlass_fused_moe(
            tokens.x,
            tokens.topk_idx,
            tokens.topk_weights,
            up_gate,
            down,
            torch.bfloat16,
            quant_scales=[],
            output=y,
        )
        return y

    return call


def _marlin(setting: Setting) -> Layer:
    base = "vllm.model_executor.layers"
    moe: Any = importlib.import_module(f"{base}.fused_moe.fused_marlin_moe")
    prepare: Any = importlib.import_module(f"{base}.quantization.utils.marlin_utils_fp4")
    types: Any = importlib.import_module("vllm.scalar_type").scalar_types
    shape, weights, tokens = setting.shape, setting.weights, setting.tokens
    sizes = SimpleNamespace(
        num_experts=shape.num_experts,
        hidden_size=shape.hidden_size,
        intermediate_size_per_partition=shape.intermediate_size,
        params_dtype=torch.bfloat16,
    )
    w13, w13_scale, w13_scale_2, w2, w2_scale, w2_scale_2 = (
        prepare.prepare_nvfp4_moe_layer_for_marlin(
            sizes,
            *_checkpoint_matrix(weights.l1),
            weights.l1_alpha[:, 0].contiguous(),
            *_checkpoint_matrix(weights.l2),
            weights.l2_alpha / weights.l2_input_scale,
            is_act_and_mul=True,
        )
    )
    arguments = {
        "hidden_states": tokens.x,
        "w1": w13,
        "w2": w2,
        "bias1": None,
        "bias2": None,
        "w1_scale": w13_scale,
        "w2_scale": w2_scale,
        "gating_output": None,
        "topk_weights": tokens.topk_weights,
        "topk_ids": tokens.topk_idx,
        "quant_type_id": types.float4_e2m1f.id,
        "global_num_experts": shape.num_experts,
        "global_scale1": w13_scale_2,
        "global_scale2": w2_scale_2,
        "workspace": sizes.workspace,
    }
    known = inspect.signature(moe.fused_marlin_moe).parameters  # they differ by version
    arguments = {name: value for name, value in arguments.items() if name in known}
    return lambda: moe.fused_marlin_moe(**arguments)


def _checkpoint_matrix(weights: KernelWeights) -> tuple[torch.Tensor, torch.Tensor]:
    if weights.layout == "portable":
        return weights.codes, weights.scales
    module = importlib.import_module(f"megamoe_ep.prepack.{weights.layout}")
    codes, scales = module.unpack(weights.codes, weights.scales, gated=weights.gated)
    return codes, scales
