"""The whole layer on one device, from checkpoint-format weights: what every other path must meet.

Knows nothing of ranks, symmetric memory, kernels or their layouts. Every number that the layer
holds in fp32 is fp32 here, worked in fp64 and rounded once, so that no order of additions is
favoured. Goes expert by expert: no more than one expert's weights are dequantised at a time.
"""

from __future__ import annotations

from typing import get_args

import torch

from megamoe_ep import nvfp4
from megamoe_ep.errors import ArgumentError
from megamoe_ep.shape import ActivationFormat
from megamoe_ep.weights import CheckpointExperts


def moe_layer(
    x: torch.Tensor,
    topk_idx: torch.Tensor,
    topk_weights: torch.Tensor,
    experts: CheckpointExperts,
    *,
    activation_format: ActivationFormat = "nvfp4",
    input_global_scale: torch.Tensor | float | None = None,
    activation_clamp: float | None = None,
) -> torch.Tensor:
    """Output of the layer for tokens ``x``.

    For a row r of ``x`` and an expert e that it is routed to::

        X, s   = nvfp4(x[r])                                     "bf16": X = x[r], s = 1
        gate   = (X @ Wgate[e].T) * s * w13_scale_2[e, 0]
        up     = (X @ Wup[e].T) * s * w13_scale_2[e, 1]
        h      = silu(min(gate, clamp)) * clip(up, -clamp, clamp)
        H, a   = nvfp4(h), w2_input_scale[e] * w2_scale_2[e]     without w2_input_scale, or "bf16":
                                                                 H = bf16(h), a = w2_scale_2[e]
        o      = bf16((H @ Wdown[e].T) * a)
        y[r]   = bf16(sum over slots k, ascending, of topk_weights[r, k] * o_k)

    X, H and W are code x block scale, without their global scales. A token that holds NaN or inf
    comes out as NaN wherever it goes to an expert at all, and changes no other.

    Args:
        x: bf16 [n, H].
        topk_idx: integers [n, K], ids within ``experts``, the first of which is
            ``experts.first_expert``; -1 for no expert; an id may come twice in a row.
        topk_weights: fp32 [n, K].
        experts: weights, on the device of ``x``.
        activation_format: "nvfp4" or "bf16".
        input_global_scale: static global scale of ``x``, one number for all tokens. None takes the
            largest of ``experts.w13_input_scale`` or, where that is None too, gives each token its
            own, amax / (6 * 448). Only for "nvfp4".
        activation_clamp: bounds gate from above, and up on both sides; None: no bounds.

    Returns:
        bf16 [n, H].

    Raises:
        ArgumentError: an argument has another dtype, shape or value than said here.
    """
    _check(x, topk_idx, topk_weights, experts, activation_format, activation_clamp)
    rows, row_scales = _layer_input(x, experts, activation_format, input_global_scale)
    outputs = torch.zeros(*topk_idx.shape, x.shape[1], dtype=torch.bfloat16, device=x.device)
    for e in range(experts.num_experts):
        token, slot = (topk_idx == experts.first_expert + e).nonzero(as_tuple=True)
        if len(token) == 0:
            continue
        acc = _product(rows[token], experts.w13[e], experts.w13_scale[e]) * row_scales[token, None]
        gate, up = acc.chunk(2, dim=1)
        h = swiglu(
            gate * experts.w13_scale_2[e, 0], up * experts.w13_scale_2[e, 1], activation_clamp
        )
        alpha = experts.w2_scale_2[e]
        if activation_format == "nvfp4" and experts.w2_input_scale is not None:
            q = nvfp4.quantize(h, experts.w2_input_scale[e])
            h = nvfp4.dequantize(q.codes, q.scales)
            alpha = alpha * experts.w2_input_scale[e]
        acc = _product(h.bfloat16(), experts.w2[e], experts.w2_scale[e])
        outputs[token, slot] = (acc * alpha).bfloat16()

    y = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for k in range(topk_idx.shape[1]):
        term = topk_weights[:, k, None] * outputs[:, k].float()
        y = torch.where(topk_idx[:, k, None] >= 0, y + term, y)
    return y.bfloat16()


def swiglu(gate: torch.Tensor, up: torch.Tensor, clamp: float | None = None) -> torch.Tensor:
    """silu(gate) * up, fp32; with ``clamp``, gate is bounded from above and up on both sides."""
    if clamp is not None:
        gate, up = gate.clamp(max=clamp), up.clamp(-clamp, clamp)
    exact = gate.double()
    return (exact / (1 + (-exact).exp())).float() * up


def relative_l2_error(y: torch.Tensor, expected: torch.Tensor) -> float:
    """|y - expected| / |expected| over all elements, in fp64.

    0 where both are all zeros, NaN where either holds NaN.
    """
    difference = (y.double() - expected.double()).norm()
    return 0.0 if difference == 0 else float(difference / expected.double().norm())


def _layer_input(
    x: torch.Tensor,
    experts: CheckpointExperts,
    activation_format: ActivationFormat,
    input_global_scale: torch.Tensor | float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What L1 multiplies, bf16 [n, H], and the global scale of each row, fp32 [n]."""
    ones = torch.ones(x.shape[0], dtype=torch.float32, device=x.device)
    if activation_format == "bf16":
        if input_global_scale is not None:
            raise ArgumentError(
                f"input_global_scale must be None when activation_format is 'bf16', which does not "
                f"quantise x; got {input_global_scale}."
            )
        return x, ones
    if input_global_scale is None and experts.w13_input_scale is not None:
        input_global_scale = experts.w13_input_scale.max()
    if input_global_scale is None:
        q = nvfp4.quantize_per_token(x)
    else:
        q = nvfp4.quantize(x, input_global_scale)
    return nvfp4.dequantize(q.codes, q.scales), ones * q.global_scale


def _product(rows: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """bf16 [R, K] times one expert's weights without their global scale, fp32 [R, N].

    A row that holds NaN or inf gives NaN throughout: inf times a weight of zero is NaN, and which
    weights are zero is chance.
    """
    product = (rows.double() @ nvfp4.dequantize(codes, scales).double().t()).float()
    return torch.where(rows.isfinite().all(1, keepdim=True), product, torch.nan)


def _check(
    x: torch.Tensor,
    topk_idx: torch.Tensor,
    topk_weights: torch.Tensor,
    experts: CheckpointExperts,
    activation_format: str,
    activation_clamp: float | None,
) -> None:
    if activation_format not in get_args(ActivationFormat):
        raise ArgumentError(
            f"activation_format must be 'nvfp4' or 'bf16'; got {activation_format!r}."
        )
    if activation_clamp is not None and not activation_clamp > 0:
        raise ArgumentError(f"activation_clamp must be a positive number; got {activation_clamp}.")
    if x.dtype != torch.bfloat16 or x.ndim != 2 or x.shape[1] != experts.hidden_size:
        raise ArgumentError(
            f"x must be bf16 [n, {experts.hidden_size}], the experts' hidden size; got {x.dtype} "
            f"{list(x.shape)}."
        )
    if topk_idx.dtype not in (torch.int32, torch.int64) or topk_idx.ndim != 2:
        raise ArgumentError(
            f"topk_idx must be int32 or int64 [n, K]; got {topk_idx.dtype} {list(topk_idx.shape)}."
        )
    if topk_idx.shape[0] != x.shape[0]:
        raise ArgumentError(
            f"topk_idx must have a row for each of the {x.shape[0]} tokens of x; got "
            f"{list(topk_idx.shape)}."
        )
    if topk_weights.dtype != torch.float32 or topk_weights.shape != topk_idx.shape:
        raise ArgumentError(
            f"topk_weights must be fp32 {list(topk_idx.shape)}, like topk_idx; got "
            f"{topk_weights.dtype} {list(topk_weights.shape)}."
        )
    first, last = experts.first_expert, experts.first_expert + experts.num_experts - 1
    wrong = topk_idx[(topk_idx != -1) & ((topk_idx < first) | (topk_idx > last))]
    if len(wrong):
        raise ArgumentError(
            f"topk_idx must hold experts {first} to {last}, those given, or -1 for none; got "
            f"{int(wrong[0])}."
        )
