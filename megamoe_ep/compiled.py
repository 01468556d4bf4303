"""The layer as one operator of torch.library, so that torch.compile traces through it."""

from __future__ import annotations

import itertools
import weakref
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from megamoe_ep.moe import MegaMoE
    from megamoe_ep.symm_buffer import SymmBuffer

# Handles, since an operator takes tensors and numbers only.
_layers: weakref.WeakValueDictionary[int, MegaMoE] = weakref.WeakValueDictionary()
_numbers = itertools.count()
_orders: weakref.WeakKeyDictionary[SymmBuffer, torch.Tensor] = weakref.WeakKeyDictionary()


def register(layer: MegaMoE) -> int:
    """The handle by which ``moe_layer`` finds ``layer`` for as long as it lives."""
    handle = next(_numbers)
    _layers[handle] = layer
    return handle


def order_of(buffer: SymmBuffer) -> torch.Tensor:
    """A tensor that stands for the buffer's memory among an operator's arguments, int32 [1].

    The memory itself would be copied by whatever cannot prove that it may be written in place.
    """
    if buffer not in _orders:
        _orders[buffer] = torch.zeros(1, dtype=torch.int32, device=buffer.device)
    return _orders[buffer]


# Every rank must make the same calls in the same order: as a write to ``order``, no call can be
# dropped, doubled, or exchanged with another one on the same buffer.
@torch.library.custom_op("megamoe_ep::moe_layer", mutates_args=("order",))
def moe_layer(
    x: torch.Tensor,
    topk_idx: torch.Tensor,
    topk_weights: torch.Tensor,
    num_tokens: torch.Tensor | None,
    count: int | None,
    order: torch.Tensor,
    layer: int,
) -> torch.Tensor:
    """``MegaMoE.forward`` of the layer with handle ``layer``.

    Args:
        x, topk_idx, topk_weights: as in ``stage_activation``.
        num_tokens: its ``num_tokens`` where that is a tensor.
        count: its ``num_tokens`` where that is a number; None where there is none.
        order: ``order_of`` the layer's buffer.
        layer: what ``register`` returned.

    Raises:
        KeyError: the layer is gone.
        And what ``stage_activation`` and ``nvfp4_mega_moe`` raise.
    """
    return _layers[layer].run(
        x, topk_idx, topk_weights, num_tokens=count if num_tokens is None else num_tokens
    )


@moe_layer.register_fake
def _(
    x: torch.Tensor,
    topk_idx: torch.Tensor,
    topk_weights: torch.Tensor,
    num_tokens: torch.Tensor | None,
    count: int | None,
    order: torch.Tensor,
    layer: int,
) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)
