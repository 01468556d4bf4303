"""The whole layer in one CUDA graph, replayed with other tokens, counts and delays, and compiled.

Runs in every rank of whatever started pytest:

    torchrun --nproc-per-node 2 -m pytest tests/gpu/test_layer_graph.py
"""

from __future__ import annotations

import importlib.util

import pytest
import torch

from megamoe_ep import MegaMoE, nvfp4_mega_moe, stage_activation
from megamoe_ep.bootstrap import Group
from megamoe_ep.kernels import gemm_kernels, library, portable, weight_layout
from megamoe_ep.shape import LayerShape
from megamoe_ep.symm_buffer import SymmBuffer
from megamoe_ep.weights import random_experts

TIMEOUT_S = 240.0  # compute-sanitizer makes NVSHMEM slow to start
REPLAYS = 10_000
HIDDEN, INTERMEDIATE, LOCAL_EXPERTS, TOP_K, TOKENS = 512, 256, 4, 4, 24


def why_not() -> str | None:
    if not torch.cuda.is_available():
        return "needs a GPU"
    if weight_layout(torch.device("cuda", 0)) == "portable":
        return f"no fast GEMMs for this GPU here: {library.why_unavailable()}"
    if importlib.util.find_spec("megamoe_ep.kernels.cuda") is None:
        return "no GEMM kernels in this installation"
    return None


pytestmark = [pytest.mark.gpu, pytest.mark.skipif(why_not() is not None, reason=f"{why_not()}")]


@pytest.fixture(scope="module")
def group():
    return Group.from_environment(device="cuda", timeout_s=TIMEOUT_S)


@pytest.fixture(scope="module")
def shape(group):
    return LayerShape(
        LOCAL_EXPERTS * group.world_size, TOKENS, TOP_K, HIDDEN, INTERMEDIATE, group.world_size
    )


@pytest.fixture
def layer(group, shape):
    """The layer over csrc's kernels."""
    with SymmBuffer(group, shape, timeout_s=TIMEOUT_S) as buffer:
        experts = random_experts(LOCAL_EXPERTS, HIDDEN, INTERMEDIATE, seed=group.rank)
        yield MegaMoE.from_experts(experts, buffer)


def tokens_of(shape: LayerShape, rank: int, seed: int):
    draw = torch.Generator().manual_seed(seed * 1000 + rank)
    n = [0, shape.max_num_tokens, 1, 7, 16][(seed + rank) % 5]
    x = torch.randn(shape.max_num_tokens, shape.hidden_size, generator=draw).bfloat16()
    hot = [shape.num_experts, 1, shape.experts_per_rank + 1][seed % 3]
    ids = torch.randint(-1, min(hot, shape.num_experts), (len(x), shape.top_k), generator=draw)
    weights = torch.rand(len(x), shape.top_k, generator=draw)
    return n, x.cuda(), ids.int().cuda(), weights.cuda()


def with_portable_exchange(layer: MegaMoE, buffer: SymmBuffer, tokens, combine: str):
    """The same GEMM kernels between the portable dispatch and combine."""
    n, x, ids, weights = tokens
    work, gemm = buffer.workspace, gemm_kernels(layer.l1_weights.layout)
    buffer.input_global_scale = layer.input_global_scale
    portable.stage(x[:n], ids[:n], weights[:n], buffer, n)
    portable.dispatch(buffer, combine=combine, columns=gemm.COLUMNS)
    gemm.l1(
        work.rows, work.row_scales, work.expert_offsets, layer.l1_weights, layer.l1_alpha,
        input_scale=layer.l2_input_scale, clamp=None, out=work.h,
    )  # fmt: skip
    gemm.l2(work.h, work.expert_offsets, layer.l2_weights, layer.l2_alpha, out=work.rows)
    y = torch.zeros_like(x)
    portable.combine(y, buffer, combine=combine)
    return y


@pytest.mark.parametrize("combine", ["exact", "fast"])
def test_replays_equal_the_portable_exchange(group, shape, layer, combine):
    sets = [tokens_of(shape, group.rank, seed) for seed in range(15)]
    with SymmBuffer(group, shape, timeout_s=TIMEOUT_S) as other:
        other.kernel_state = None
        expected = [with_portable_exchange(layer, other, tokens, combine) for tokens in sets]

    buffer = layer.buffer
    buffer.input_global_scale = layer.input_global_scale
    x, ids, weights = (torch.empty_like(t) for t in sets[0][1:])
    num_tokens = torch.zeros(1, dtype=torch.int32).cuda()
    counts = [torch.tensor([tokens[0]], dtype=torch.int32).cuda() for tokens in sets]
    y = torch.zeros_like(x)
    wrong = torch.zeros((), dtype=torch.int64).cuda()

    def set_inputs(which: int) -> None:
        for to, source in zip((x, ids, weights), sets[which][1:], strict=True):
            to.copy_(source)
        num_tokens.copy_(counts[which])

    def call() -> None:
        stage_activation(x, ids, weights, buffer, num_tokens)
        nvfp4_mega_moe(
            y, layer.l1_weights, layer.l2_weights, buffer, l1_alpha=layer.l1_alpha,
            l2_alpha=layer.l2_alpha, l2_input_scale=layer.l2_input_scale, combine=combine,
        )  # fmt: skip

    set_inputs(0)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        call()

    shared = group.local_world_size > torch.cuda.device_count()
    replays = 200 if shared else REPLAYS
    row = torch.arange(shape.max_num_tokens).cuda()
    order = torch.randint(len(sets), (replays,), generator=torch.Generator().manual_seed(5))
    delays = torch.rand(replays, generator=torch.Generator().manual_seed(6 + group.rank))
    for which, delay in zip(order.tolist(), delays.tolist(), strict=True):
        set_inputs(which)
        if delay < 0.1:
            torch.cuda._sleep(int(delay * 5e6))  # up to a quarter of a millisecond
        graph.replay()
        differs = y.view(torch.int16) != expected[which].view(torch.int16)
        wrong += (differs & (row < num_tokens)[:, None]).sum()
    torch.cuda.synchronize()
    buffer.check()
    assert int(wrong) == 0


def test_compiled_in_one_graph_it_gives_the_same_bits(group, shape, layer):
    _, x, ids, weights = tokens_of(shape, group.rank, 1)
    plain = layer(x, ids, weights)

    def model(x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return layer(x * 1, ids, weights) + 0

    compiled = torch.compile(model, fullgraph=True)
    for _ in range(3):
        assert torch.equal(compiled(x, ids, weights), plain)
