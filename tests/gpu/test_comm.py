"""csrc's stage, dispatch and combine against the portable ones on the same GPUs, bit by bit.

Runs in every rank of whatever started pytest, with any number of ranks:

    torchrun --nproc-per-node 2 -m pytest tests/gpu/test_comm.py

In the place of the GEMMs stands something quick whose result depends on the row, its scale and its
expert alone.
"""

from __future__ import annotations

import pytest
import torch

from megamoe_ep.bootstrap import Group
from megamoe_ep.errors import ArgumentError
from megamoe_ep.kernels import library, portable
from megamoe_ep.shape import LayerShape
from megamoe_ep.symm_buffer import SymmBuffer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.skipif(
        library.why_unavailable() is not None, reason=f"{library.why_unavailable()}"
    ),
]

TIMEOUT_S = 240.0  # compute-sanitizer makes NVSHMEM slow to start
COMBINES = ("exact", "fast")


@pytest.fixture(scope="module")
def group():
    return Group.from_environment(device="cuda", timeout_s=TIMEOUT_S)


@pytest.fixture
def buffers(group):
    """Makes pairs of buffers of one shape, for csrc's kernels and for the portable ones."""
    made = []

    def make(shape: LayerShape, comm_sms: int | None = None) -> tuple[SymmBuffer, SymmBuffer]:
        pair = [SymmBuffer(group, shape, timeout_s=TIMEOUT_S, comm_sms=comm_sms)]
        made.append(pair[0])
        pair.append(SymmBuffer(group, shape, timeout_s=TIMEOUT_S))
        made.append(pair[1])
        pair[1].kernel_state = None
        return pair[0], pair[1]

    yield make
    for buffer in made:
        buffer.destroy()


def comm():
    from megamoe_ep.kernels import cuda_comm

    return cuda_comm


def tokens_of(
    shape: LayerShape, rank: int, seed: int, *, least: int = 0, broken: bool = True
) -> tuple[int, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens of a rank: how many count, x, ids and weights. The same at every call."""
    draw = torch.Generator().manual_seed(seed * 1000 + rank)
    n = int(torch.randint(least, shape.max_num_tokens + 1, (), generator=draw))
    if seed % 7 == 3:
        n = least
    if seed % 7 == 4:
        n = shape.max_num_tokens
    x = torch.randn(shape.max_num_tokens, shape.hidden_size, generator=draw)
    x = (x * 2.0 ** torch.randint(-9, 9, (x.shape[0], 1), generator=draw)).bfloat16()
    if n and broken:
        x[0, 5] = [torch.nan, torch.inf, 1.0][seed % 3]
    hot = [shape.num_experts, 1, shape.experts_per_rank + 1][seed % 3]
    hot = min(hot, shape.num_experts)
    ids = torch.randint(-1, hot, (shape.max_num_tokens, shape.top_k), generator=draw).int()
    weights = torch.randn(shape.max_num_tokens, shape.top_k, generator=draw)
    return n, x.cuda(), ids.cuda(), weights.cuda()


def in_place_of_gemms(buffer: SymmBuffer) -> None:
    work, shape = buffer.workspace, buffer.shape
    row = torch.arange(shape.max_rows, device=buffer.device, dtype=torch.int32)
    expert = torch.bucketize(row, work.expert_offsets[1:], right=True) + buffer.experts_start_idx
    factor = work.row_scales * (1 + expert / 64)
    work.rows.copy_(work.rows.float() * factor[:, None])


def layer(kernels, buffer, tokens, combine, y, num_tokens=None, stats=None) -> None:
    n, x, ids, weights = tokens
    kernels.stage(x, ids, weights, buffer, n if num_tokens is None else num_tokens)
    kernels.dispatch(buffer, combine=combine, recv_stats=stats)
    in_place_of_gemms(buffer)
    kernels.combine(y, buffer, combine=combine)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.is_floating_point() and tensor.element_size() > 1:
        tensor = torch.where(tensor.isnan(), torch.nan, tensor)
    size = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.contiguous().view(size)


def assert_same(ours: torch.Tensor, theirs: torch.Tensor, what: str) -> None:
    wrong = bits(ours) != bits(theirs)
    if wrong.any():
        first = wrong.nonzero()[0].tolist()
        at = tuple(first)
        pytest.fail(
            f"{what} {list(wrong.shape)}: {int(wrong.sum())} elements differ, the first at {first}:"
            f" {ours[at]} instead of {theirs[at]}"
        )


def shape_of(group: Group, *sizes: int, form: str = "nvfp4") -> LayerShape:
    """E per rank, T, K, H."""
    local, tokens, top_k, hidden = sizes
    return LayerShape(
        local * group.world_size, tokens, top_k, hidden, 16, group.world_size,
        "bf16" if form == "bf16" else "nvfp4",
    )  # fmt: skip


SIZES = {
    "small": (3, 7, 3, 48),
    "one token": (2, 1, 2, 7168),
    "T=128, dsv3": (32, 128, 8, 7168),
    "T=64, flash": (32, 64, 6, 4096),
    "T=700: counted by a kernel of its own": (5, 700, 4, 1024),
    "x does not stay in registers": (4, 33, 2, 9216),
    "32 slots": (40, 50, 32, 256),
    "more shared memory than 48 KiB": (6000, 40, 8, 512),
}


@pytest.mark.parametrize("form", ["nvfp4", "static", "bf16"])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
def test_every_arrow_equals_the_portable_one(group, buffers, sizes, form):
    shape = shape_of(group, *sizes, form=form)
    ours, theirs = buffers(shape)
    if form == "static":
        ours.input_global_scale = theirs.input_global_scale = torch.tensor([0.0031], device="cuda")
    for seed in range(6):
        combine = COMBINES[seed % 2]
        columns = "by lane" if seed % 3 and shape.hidden_size % 64 == 0 else "plain"
        tokens = tokens_of(shape, group.rank, seed)
        n = tokens[0]
        stats = [torch.ones(shape.experts_per_rank, dtype=torch.int64).cuda() for _ in range(2)]
        y = [torch.full((shape.max_num_tokens, shape.hidden_size), 7.0).bfloat16().cuda()
             for _ in range(2)]  # fmt: skip
        for kernels, buffer, counted in zip((comm(), portable), (ours, theirs), stats, strict=True):
            kernels.stage(*tokens[1:], buffer, n)
            kernels.dispatch(buffer, combine=combine, recv_stats=counted, columns=columns)
        torch.cuda.synchronize()
        ours.check()
        for name in ("x", "x_sf", "x_scales", "topk_idx", "topk_weights", "num_tokens"):
            if name in shape.regions:
                length = 1 if name == "num_tokens" else n
                assert_same(getattr(ours, name)[:length], getattr(theirs, name)[:length], name)
        assert_same(ours.dispatch_flags, theirs.dispatch_flags, "dispatch_flags")
        a, b = ours.workspace, theirs.workspace
        assert_same(a.expert_offsets, b.expert_offsets, "expert_offsets")
        rows = int(b.expert_offsets[-1])
        index, slot = b.row_slot[:rows] // shape.top_k, b.row_slot[:rows] % shape.top_k
        expected = ours.peer_ptrs[index // shape.max_num_tokens] + shape.regions["home_rows"].offset
        place = theirs.recv_token.flatten()[index] * shape.top_k + slot
        expected += place * 2 * shape.hidden_size
        assert_same(comm().homes(ours)[:rows], expected, "homes")
        assert_same(a.rows[:rows], b.rows[:rows], "rows")
        assert_same(a.row_scales[:rows], b.row_scales[:rows], "row_scales")
        assert_same(stats[0], stats[1], "recv_stats")
        for buffer in (ours, theirs):
            in_place_of_gemms(buffer)
        comm().combine(y[0], ours, combine=combine)
        portable.combine(y[1], theirs, combine=combine)
        torch.cuda.synchronize()
        ours.check()
        assert_same(y[0], y[1], f"y, seed {seed}, {combine}")


@pytest.mark.parametrize(("sms", "tokens"), [(1, 90), (7, 90), (2, 1), (5, 3)])
def test_few_sms_give_the_same_bits(group, buffers, sms, tokens):
    shape = shape_of(group, 4, tokens, 4, 512)
    ours, theirs = buffers(shape, comm_sms=sms)
    for seed in range(4):
        tokens = tokens_of(shape, group.rank, seed)
        y = [torch.zeros(shape.max_num_tokens, shape.hidden_size).bfloat16().cuda()
             for _ in range(2)]  # fmt: skip
        layer(comm(), ours, tokens, COMBINES[seed % 2], y[0])
        layer(portable, theirs, tokens, COMBINES[seed % 2], y[1])
        assert_same(y[0], y[1], "y")


def test_the_host_waits_for_nothing(group, buffers):
    shape = shape_of(group, 4, 16, 4, 512)
    ours, _ = buffers(shape)
    tokens = tokens_of(shape, group.rank, 1)
    y = torch.zeros(shape.max_num_tokens, shape.hidden_size).bfloat16().cuda()
    num_tokens = torch.tensor([tokens[0]], dtype=torch.int32).cuda()
    kernels = comm()
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        for combine in COMBINES:
            kernels.stage(*tokens[1:], ours, num_tokens)
            kernels.dispatch(ours, combine=combine)
            kernels.combine(y, ours, combine=combine)
            ours.check()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
    torch.cuda.synchronize()
    ours.check()


@pytest.mark.parametrize("combine", COMBINES)
def test_graph_replays_with_other_tokens_and_ranks_late(group, buffers, combine):
    """10,000 replays where each rank has a GPU of its own; fewer where ranks share one, since each
    exchange then takes milliseconds."""
    shared = group.local_world_size > torch.cuda.device_count()
    replays = 200 if shared else 10_000
    shape = shape_of(group, 4, 24, 4, 256)
    ours, theirs = buffers(shape)
    sets = [tokens_of(shape, group.rank, seed, broken=False) for seed in range(14)]
    expected = []
    for tokens in sets:
        y = torch.zeros(shape.max_num_tokens, shape.hidden_size).bfloat16().cuda()
        layer(portable, theirs, tokens, combine, y)
        expected.append(y)
    _, x, ids, weights = (torch.empty_like(t) if isinstance(t, torch.Tensor) else t
                          for t in sets[0])  # fmt: skip
    num_tokens = torch.zeros(1, dtype=torch.int32).cuda()
    counts = [torch.tensor([tokens[0]], dtype=torch.int32).cuda() for tokens in sets]
    y = torch.zeros(shape.max_num_tokens, shape.hidden_size).bfloat16().cuda()
    wrong = torch.zeros((), dtype=torch.int64).cuda()
    static = (0, x, ids, weights)

    def set_inputs(which: int) -> None:
        for to, source in zip(static[1:], sets[which][1:], strict=True):
            to.copy_(source)
        num_tokens.copy_(counts[which])

    set_inputs(0)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        layer(comm(), ours, static, combine, y, num_tokens)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        layer(comm(), ours, static, combine, y, num_tokens)

    row = torch.arange(shape.max_num_tokens).cuda()
    order = torch.randint(len(sets), (replays,), generator=torch.Generator().manual_seed(5))
    delays = torch.rand(replays, generator=torch.Generator().manual_seed(6 + group.rank))
    for which, delay in zip(order.tolist(), delays.tolist(), strict=True):
        set_inputs(which)
        if delay < 0.1:
            torch.cuda._sleep(int(delay * 5e6))  # up to a quarter of a millisecond
        graph.replay()
        counted = (row < num_tokens)[:, None]
        differs = y.view(torch.int16) != expected[which].view(torch.int16)
        wrong += (differs & counted).sum()
    torch.cuda.synchronize()
    ours.check()
    assert int(wrong) == 0


def test_exact_gives_the_same_bits_at_every_ep_size(group, buffers):
    """The rank's tokens once over all ranks, and once with every expert on this rank."""
    shape = shape_of(group, 8 // group.world_size or 1, 40, 4, 512)
    alone = LayerShape(
        shape.num_experts, shape.max_num_tokens, shape.top_k, shape.hidden_size, 16, 1
    )
    ours, _ = buffers(shape)
    lone = SymmBuffer(Group.of(None, device=group.device), alone, timeout_s=TIMEOUT_S)
    for seed in range(6):
        tokens = tokens_of(shape, group.rank, seed)
        y = [torch.zeros(shape.max_num_tokens, shape.hidden_size).bfloat16().cuda()
             for _ in range(2)]  # fmt: skip
        layer(comm(), ours, tokens, "exact", y[0])
        layer(comm(), lone, tokens, "exact", y[1])
        assert_same(y[0], y[1], "y")
    lone.destroy()


def test_bad_ids_come_back_as_an_error_once_and_count_as_none(group, buffers):
    shape = shape_of(group, 4, 16, 4, 256)
    ours, theirs = buffers(shape)
    _, x, ids, weights = tokens_of(shape, group.rank, 2)
    bad = ids.clone()
    bad[3, 1] = shape.num_experts
    good = ids.clone()
    good[3, 1] = -1
    y = [torch.zeros(shape.max_num_tokens, shape.hidden_size).bfloat16().cuda() for _ in range(2)]
    layer(comm(), ours, (16, x, bad, weights), "exact", y[0])
    layer(portable, theirs, (16, x, good, weights), "exact", y[1])
    torch.cuda.synchronize()
    with pytest.raises(ArgumentError, match=f"got {shape.num_experts} for token 3, slot 1"):
        ours.check()
    ours.check()
    assert_same(y[0], y[1], "y")

    too_many = torch.tensor([17], dtype=torch.int32).cuda()
    layer(comm(), ours, (16, x, good, weights), "exact", y[0], too_many)
    torch.cuda.synchronize()
    with pytest.raises(ArgumentError, match=r"num_tokens must be .* got 17"):
        ours.check()
    assert_same(y[0], y[1], "y")
