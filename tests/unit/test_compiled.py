"""torch.compile takes the layer as one operator: same bits, no graph break, no call lost."""

from __future__ import annotations

import pytest
import torch

from megamoe_ep import MegaMoE
from megamoe_ep.bootstrap import Group
from megamoe_ep.shape import LayerShape
from megamoe_ep.symm_buffer import SymmBuffer
from megamoe_ep.weights import random_experts

SHAPE = LayerShape(4, 6, 2, 32, 16, 1)


@pytest.fixture
def layer():
    with SymmBuffer(Group.of(None, device="cpu"), SHAPE) as buffer:
        yield MegaMoE.from_experts(random_experts(4, 32, 16), buffer)


def tokens(n: int):
    draw = torch.Generator().manual_seed(n)
    x = torch.randn(n, 32, generator=draw).bfloat16()
    ids = torch.randint(-1, 4, (n, 2), generator=draw).int()
    return x, ids, torch.rand(n, 2, generator=draw)


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_compiled_gives_the_same_bits(layer, backend):
    def model(x, ids, weights):
        return layer(x * 2, ids, weights) + x

    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for n in (6, 6, 3, 5):  # the third length makes it dynamic
        assert torch.equal(compiled(*tokens(n)), model(*tokens(n)))


def test_num_tokens_as_number_and_as_tensor(layer):
    x, ids, weights = tokens(6)
    compiled = torch.compile(
        lambda count: layer(x, ids, weights, num_tokens=count), backend="aot_eager", fullgraph=True
    )
    expected = layer(x, ids, weights)[:4]
    assert torch.equal(compiled(4)[:4], expected)
    assert torch.equal(compiled(torch.tensor([4], dtype=torch.int32))[:4], expected)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_call_whose_result_nobody_uses_is_still_made(layer, backend):
    def model(x, ids, weights):
        layer(x, ids, weights)
        layer(x, ids, weights)
        return x + 1

    before = int(layer.buffer.epoch)
    torch.compile(model, backend=backend, fullgraph=True)(*tokens(6))
    assert int(layer.buffer.epoch) == before + 2


def test_the_operator_keeps_torch_librarys_rules(layer):
    x, ids, weights = tokens(6)
    torch.library.opcheck(
        torch.ops.megamoe_ep.moe_layer.default,
        (x, ids, weights, None, None, layer._order, layer._handle),
    )
