"""Ranks as streams of one process on one GPU: the flags under graph replay, ten thousand times.

Ranks in processes of their own share a GPU by time slices of milliseconds. Streams run side by
side, as GPUs do, if there is room for all their blocks: so each rank has few of them. Only the link
is missing.
"""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace

import pytest
import torch

from megamoe_ep.kernels import library, portable
from megamoe_ep.shape import LayerShape
from megamoe_ep.symm_buffer import Workspace

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.skipif(
        library.why_unavailable() is not None, reason=f"{library.why_unavailable()}"
    ),
]

BLOCKS = 48  # of all ranks together, for each of the few kernels of a rank that overlap
REPLAYS = 10_000
SETS = 12


def comm():
    from megamoe_ep.kernels import cuda_comm

    return cuda_comm


def ranks_of(shape: LayerShape, device: str, timeout_s: float = 20.0) -> list[SimpleNamespace]:
    """What the kernels see of a SymmBuffer, for every rank."""
    ranks = range(shape.world_size)
    memory = [torch.zeros(shape.symmetric_nbytes + 256, dtype=torch.uint8, device=device)
              for _ in ranks]  # fmt: skip
    memory = [m[-m.data_ptr() % 256 :][: shape.symmetric_nbytes] for m in memory]
    peers = [SimpleNamespace(**shape.tensors(m)) for m in memory]
    made = []
    for r in ranks:
        work = Workspace.allocate(shape, torch.device(device))
        work.rows.fill_(torch.nan)
        peers[r].topk_idx.fill_(-1)
        made.append(
            SimpleNamespace(
                shape=shape, rank=r, local=peers[r], peers=peers, buffer=memory[r], workspace=work,
                device=torch.device(device), input_global_scale=None, timeout_s=timeout_s,
                bytes_put={"dispatch": [0] * shape.world_size, "combine": [0] * shape.world_size},
                experts_start_idx=r * shape.experts_per_rank,
                peer_ptrs=torch.tensor([m.data_ptr() for m in memory], device=device),
                fence=lambda: None, check=lambda: None,
            )
        )  # fmt: skip
        if device == "cuda":
            made[r].kernel_state = comm().CommState(made[r], BLOCKS // shape.world_size)
            made[r].stream = torch.cuda.Stream()
    return made


def tokens_of(shape: LayerShape, rank: int, seed: int) -> SimpleNamespace:
    draw = torch.Generator().manual_seed(seed * 100 + rank)
    most = shape.max_num_tokens
    n = [0, most, 1, int(torch.randint(0, most + 1, (), generator=draw))][(seed + rank) % 4]
    hot = [shape.num_experts, 1, shape.experts_per_rank + 1][seed % 3]
    return SimpleNamespace(
        n=n,
        x=torch.randn(most, shape.hidden_size, generator=draw).bfloat16(),
        ids=torch.randint(
            -1, min(hot, shape.num_experts), (most, shape.top_k), generator=draw
        ).int(),
        weights=torch.randn(most, shape.top_k, generator=draw),
    )


def in_place_of_gemms(rank: SimpleNamespace) -> None:
    work, shape = rank.workspace, rank.shape
    row = torch.arange(shape.max_rows, device=rank.device, dtype=torch.int32)
    expert = torch.bucketize(row, work.expert_offsets[1:], right=True) + rank.experts_start_idx
    factor = work.row_scales * (1 + expert / 64)
    work.rows.copy_(work.rows.float() * factor[:, None])


def expected_of(ranks: list[SimpleNamespace], tokens, combine: str) -> list[torch.Tensor]:
    """The portable kernels' result on the CPU, for each rank."""
    y = [torch.zeros_like(t.x) for t in tokens]
    failures = []

    def run(r: int) -> None:
        try:
            n = tokens[r].n
            portable.stage(tokens[r].x[:n], tokens[r].ids[:n], tokens[r].weights[:n], ranks[r], n)
            portable.dispatch(ranks[r], combine=combine)
            in_place_of_gemms(ranks[r])
            portable.combine(y[r], ranks[r], combine=combine)
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=run, args=[r], daemon=True) for r in range(len(ranks))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert not failures, failures
    return y


@pytest.fixture(scope="module", autouse=True)
def loaded():
    """Every kernel used here has run before ranks wait for one another: its first launch loads it,
    and that waits for the GPU."""
    for sizes in ((1, 9, 1, 64), (1, 5000, 1, 64)):
        shape = LayerShape(*sizes, 16, 1)
        (rank,) = ranks_of(shape, "cuda")
        tokens = tokens_of(shape, 0, 1)
        y = torch.zeros_like(tokens.x).cuda()
        for combine in ("exact", "fast"):
            comm().stage(tokens.x.cuda(), tokens.ids.cuda(), tokens.weights.cuda(), rank, tokens.n)
            comm().dispatch(rank, combine=combine)
            in_place_of_gemms(rank)
            comm().combine(y, rank, combine=combine)
        n = torch.ones(1, dtype=torch.int32).cuda()
        n.copy_(n.clone())
        wrong = torch.zeros((), dtype=torch.int64).cuda()
        wrong += count_wrong(y, y.clone(), torch.arange(len(y)).cuda(), n)
        for tensor in (y, tokens.ids.cuda(), tokens.weights.cuda()):
            tensor.copy_(tensor.clone())
    torch.cuda._sleep(1)
    torch.cuda.synchronize()


def count_wrong(y, expected, row, num_tokens) -> torch.Tensor:
    differs = y.view(torch.int16) != expected.view(torch.int16)
    return (differs & (row < num_tokens)[:, None]).sum()


def capture(rank: SimpleNamespace, call) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=rank.stream):
        call(rank)
    return graph


@pytest.mark.parametrize("combine", ["exact", "fast"])
@pytest.mark.parametrize(
    ("world_size", "sizes"),
    [(2, (4, 24, 4, 256)), (3, (2, 9, 3, 48)), (4, (2, 24, 6, 512)), (2, (3, 600, 4, 64))],
    ids=["2 ranks", "3 ranks", "4 ranks", "2 ranks, counted by a kernel of its own"],
)
def test_replays_with_other_tokens_and_ranks_late(world_size, sizes, combine):
    local, most, top_k, hidden = sizes
    shape = LayerShape(local * world_size, most, top_k, hidden, 16, world_size)
    on_cpu, ranks = ranks_of(shape, "cpu"), ranks_of(shape, "cuda")
    sets = [[tokens_of(shape, r, seed) for r in range(world_size)] for seed in range(SETS)]
    expected = [expected_of(on_cpu, tokens, combine) for tokens in sets]

    def call(rank: SimpleNamespace) -> None:
        kernels, now = comm(), rank.inputs
        kernels.stage(now.x, now.ids, now.weights, rank, rank.num_tokens)
        kernels.dispatch(rank, combine=combine)
        in_place_of_gemms(rank)
        kernels.combine(rank.y, rank, combine=combine)

    for rank in ranks:
        r = rank.rank
        rank.sets = [
            SimpleNamespace(
                n=torch.tensor([tokens[r].n], dtype=torch.int32).cuda(), x=tokens[r].x.cuda(),
                ids=tokens[r].ids.cuda(), weights=tokens[r].weights.cuda(), y=y[r].cuda(),
            )
            for tokens, y in zip(sets, expected, strict=True)
        ]  # fmt: skip
        rank.inputs = SimpleNamespace(
            x=rank.sets[0].x.clone(), ids=rank.sets[0].ids.clone(),
            weights=rank.sets[0].weights.clone(),
        )  # fmt: skip
        rank.num_tokens = rank.sets[0].n.clone()
        rank.y = torch.zeros_like(rank.inputs.x)
        rank.wrong = torch.zeros((), dtype=torch.int64).cuda()
        rank.row = torch.arange(most).cuda()
    torch.cuda.synchronize()
    for rank in ranks:  # once without a graph, all of them before anybody waits
        with torch.cuda.stream(rank.stream):
            call(rank)
    torch.cuda.synchronize()
    graphs = [capture(rank, call) for rank in ranks]

    draw = torch.Generator().manual_seed(5)
    order = torch.randint(SETS, (REPLAYS,), generator=draw).tolist()
    delays = torch.rand(REPLAYS, world_size, generator=draw).tolist()
    for which, delay in zip(order, delays, strict=True):
        for rank, graph in zip(ranks, graphs, strict=True):
            with torch.cuda.stream(rank.stream):
                now = rank.sets[which]
                for name in ("x", "ids", "weights"):
                    getattr(rank.inputs, name).copy_(getattr(now, name))
                rank.num_tokens.copy_(now.n)
                if delay[rank.rank] < 0.1:
                    torch.cuda._sleep(int(delay[rank.rank] * 2e6))  # up to a tenth of a millisecond
                graph.replay()
                rank.wrong += count_wrong(rank.y, now.y, rank.row, rank.num_tokens)
    torch.cuda.synchronize()
    for rank in ranks:
        assert rank.kernel_state.abort_record() is None
        assert int(rank.local.epoch) == REPLAYS + 1
        assert int(rank.wrong) == 0


@pytest.mark.parametrize("phase", ["dispatch", "combine"])
def test_who_does_not_come_is_named_in_time_and_the_gpu_lives_on(phase):
    shape = LayerShape(6, 8, 2, 64, 16, 3)
    ranks = ranks_of(shape, "cuda", timeout_s=0.5)
    kernels, missing = comm(), 1
    tokens = [tokens_of(shape, r, 1) for r in range(3)]
    y = [torch.zeros_like(t.x).cuda() for t in tokens]
    inputs = [(t.x.cuda(), t.ids.cuda(), t.weights.cuda()) for t in tokens]
    torch.cuda.synchronize()
    began = time.monotonic()
    for rank in ranks:
        late = rank.rank == missing
        with torch.cuda.stream(rank.stream):
            if late and phase == "dispatch":
                continue
            kernels.stage(*inputs[rank.rank], rank, 8)
            kernels.dispatch(rank, combine="exact")
            if not late:
                kernels.combine(y[rank.rank], rank, combine="exact")
    torch.cuda.synchronize()
    assert time.monotonic() - began < 2.5
    for rank in ranks:
        if rank.rank != missing:
            _, record = rank.kernel_state.abort_record()
            assert record == [1, ["dispatch", "combine"].index(phase), 1, 0, 1 << missing, 0, 0, 0]
            assert y[rank.rank].isnan().all()
    a = torch.randn(256, 256).cuda()
    torch.testing.assert_close(a @ a.T, (a.double() @ a.double().T).float(), rtol=1e-2, atol=1e-1)


def test_flags_go_round():
    flags = torch.zeros(2, dtype=torch.int64, device="cuda")
    comm().flag_rounds(flags[:1], flags[:1], 1, 1, 1.0)  # loads the kernel
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(2)]
    for me, stream in enumerate(streams):
        with torch.cuda.stream(stream):
            comm().flag_rounds(flags[1 - me :][:1], flags[me:][:1], 2, 50, 5.0)
    torch.cuda.synchronize()
    assert flags.tolist() == [51, 51]
    comm().flag_rounds(flags[1:], flags[:1], 52, 50, 0.2)
    torch.cuda.synchronize()
    assert flags.tolist() == [51, 52], "told once, never answered"
