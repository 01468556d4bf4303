"""csrc's stage, dispatch and combine against the portable ones, with no GPU.

The kernels' own source is compiled for the host, where fibers stand for threads (see host_cuda/):
it shows where every row lies and what is added in which order, and what a rank says that waits in
vain. What can go wrong between threads that really run at the same time is for tests/gpu.
"""

from __future__ import annotations

import ctypes
import itertools
import shutil
import subprocess
import threading
from array import array
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megamoe_ep.kernels import portable
from megamoe_ep.shape import MAX_TOKENS, LayerShape
from megamoe_ep.symm_buffer import Workspace

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
BLOCKS = (1, 2, 5)  # with one, many tokens a warp; with five, many warps a token
ROUTINGS = 1000

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


@pytest.fixture(scope="session")
def kernels(tmp_path_factory):
    library = tmp_path_factory.mktemp("kernels") / "kernels.so"
    # No contraction: csrc rounds multiplications and additions apart, and says so to nvcc too.
    flags = ["-std=c++20", "-O2", "-ffp-contract=off", "-U_FORTIFY_SOURCE", "-shared", "-fPIC"]
    includes = [f"-I{HERE / 'host_cuda'}", f"-I{CSRC}"]
    source = HERE / "host_cuda" / "kernels.cpp"
    built = subprocess.run(
        ["g++", *flags, *includes, "-o", str(library), str(source)],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert built.returncode == 0, built.stderr
    loaded = ctypes.CDLL(str(library))
    loaded.comm_fields.restype = ctypes.c_char_p
    loaded.comm_num_latches.restype = ctypes.c_int64
    loaded.comm_status_words.restype = ctypes.c_int64
    word, pointer, number = ctypes.c_uint64, ctypes.c_void_p, ctypes.c_int
    loaded.flag_step.restype = word
    loaded.flag_last_step.restype = loaded.flag_before_steps.restype = word
    loaded.flag_last_step.argtypes = [word, word, number]
    loaded.flag_before_steps.argtypes = [word]
    loaded.run_stage.argtypes = [*[pointer] * 6, number]
    loaded.run_send.argtypes = [pointer, number]
    loaded.run_expand.argtypes = [pointer, number, number, number, pointer, number]
    loaded.run_send_home.argtypes = [pointer, number]
    loaded.run_sum.argtypes = [pointer, number, number, pointer, number]
    loaded.run_sum_given_up.argtypes = [pointer, pointer, number, number]
    loaded.run_flag_rounds.argtypes = [pointer, pointer, number, number, number]
    return loaded


def ranks_of(shape: LayerShape, timeout_s: float = 60.0) -> list[SimpleNamespace]:
    """What the kernels see of a SymmBuffer, for every rank, in this one process."""
    memory = [
        torch.zeros(shape.symmetric_nbytes + 256, dtype=torch.uint8)
        for _ in range(shape.world_size)
    ]
    memory = [m[-m.data_ptr() % 256 :][: shape.symmetric_nbytes] for m in memory]
    peers = [SimpleNamespace(**shape.tensors(m)) for m in memory]
    ranks = []
    for r in range(shape.world_size):
        work = Workspace.allocate(shape, torch.device("cpu"))
        # What no kernel of a call has written must not be looked at.
        work.rows.fill_(torch.nan)
        work.row_slot.fill_(2**30)
        peers[r].topk_idx.fill_(-1)
        ranks.append(
            SimpleNamespace(
                shape=shape, rank=r, local=peers[r], peers=peers, memory=memory[r], workspace=work,
                device=torch.device("cpu"), input_global_scale=None, timeout_s=timeout_s,
                bytes_put={"dispatch": [0] * shape.world_size, "combine": [0] * shape.world_size},
                experts_start_idx=r * shape.experts_per_rank,
                fence=lambda: None, check=lambda: None,
            )
        )  # fmt: skip
    return ranks


class HostKernels:
    """One rank's kernels of csrc, on the host."""

    def __init__(self, kernels, rank: SimpleNamespace, blocks: int = 2) -> None:
        self.kernels, self.rank, shape, work = kernels, rank, rank.shape, rank.workspace
        self.status = torch.zeros(kernels.comm_status_words(), dtype=torch.int64)
        self.latches = torch.zeros(kernels.comm_num_latches(), dtype=torch.int32)
        scratch = {
            "slot_row": torch.full((shape.max_rows,), 2**30, dtype=torch.int32),
            "chunk_counts": torch.full((blocks, shape.experts_per_rank), 2**30, dtype=torch.int32),
            "send_counts": torch.zeros(shape.world_size, dtype=torch.int32),
            "owners": torch.full((8, shape.max_num_tokens + 3), -1, dtype=torch.int32),
            "peers": torch.tensor([p.epoch.data_ptr() for p in rank.peers])
            - shape.regions["epoch"].offset,
            "rows": work.rows,
            "row_scales": work.row_scales,
            "row_home": torch.zeros(shape.max_rows, dtype=torch.int64),
            "expert_offsets": work.expert_offsets,
            "memory": rank.memory,
            "status": self.status,
            "latches": self.latches,
        }
        self.scratch = scratch
        values = {name: region.offset for name, region in shape.regions.items()}
        values |= {name: tensor.data_ptr() for name, tensor in scratch.items()}
        values |= {
            "world_size": shape.world_size, "rank": rank.rank, "num_experts": shape.num_experts,
            "experts_per_rank": shape.experts_per_rank,
            "max_tokens": shape.max_num_tokens, "top_k": shape.top_k,
            "hidden_size": shape.hidden_size, "nvfp4": int(shape.activation_format == "nvfp4"),
            "timeout_ns": round(rank.timeout_s * 1e9), "device": 0, "blocks": blocks,
        }  # fmt: skip
        fields = kernels.comm_fields().decode().split()
        self.view = array("q", (values.get(name, 0) for name in fields))

    def stage(self, x, topk_idx, topk_weights, num_tokens) -> None:
        scale = self.rank.input_global_scale
        on_device = isinstance(num_tokens, torch.Tensor)
        self._run(
            "run_stage",
            x.data_ptr(),
            topk_idx.data_ptr(),
            topk_weights.data_ptr(),
            0 if scale is None else scale.data_ptr(),
            num_tokens.data_ptr() if on_device else 0,
            x.shape[0] if on_device else num_tokens,
        )

    def send(self, combine: str) -> None:
        self._run("run_send", combine == "fast")

    def expand(
        self, count_here: bool, stats: torch.Tensor, columns: str = "plain", sharing_log2: int = 0
    ) -> None:
        how = [count_here, sharing_log2, columns == "by lane"]
        self._run("run_expand", *how, stats.data_ptr(), stats.element_size())

    def send_home(self, combine: str) -> None:
        self._run("run_send_home", combine == "exact")

    def sum(self, y: torch.Tensor, combine: str, *, raises: bool = False) -> None:
        self._run("run_sum", combine == "exact", raises, y.data_ptr(), y.shape[0])

    def _run(self, name: str, *arguments) -> None:
        getattr(self.kernels, name)(self.view.buffer_info()[0], *arguments)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """Its bits, with one NaN for all of them."""
    if tensor.is_floating_point() and tensor.element_size() > 1:
        tensor = torch.where(tensor.isnan(), torch.nan, tensor)
    size = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.contiguous().view(size)


def assert_same(ours: torch.Tensor, theirs: torch.Tensor, what: str) -> None:
    torch.testing.assert_close(bits(ours), bits(theirs), rtol=0, atol=0, msg=lambda m: what + m)


def drawn_shape(draw: torch.Generator, world_size: int) -> LayerShape:
    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=draw))

    return LayerShape(
        num_experts=world_size * number(1, 6),
        max_num_tokens=number(1, 9) if number(0, 3) else 40,
        top_k=number(1, 8) if number(0, 9) else 32,
        hidden_size=16 * number(1, 5) if number(0, 1) else 64 * number(1, 18),
        intermediate_size=16,
        world_size=world_size,
        activation_format="nvfp4" if number(0, 3) else "bf16",
    )


def drawn_tokens(draw: torch.Generator, shape: LayerShape):
    n = int(torch.randint(0, shape.max_num_tokens + 1, (), generator=draw))
    x = torch.randn(shape.max_num_tokens, shape.hidden_size, generator=draw).bfloat16()
    x *= 2.0 ** torch.randint(-12, 12, x.shape, generator=draw)
    if n and not torch.randint(0, 8, (), generator=draw):
        x[0, 3] = [torch.nan, torch.inf][n % 2]
    hot = int(torch.randint(1, shape.num_experts + 1, (), generator=draw))
    ids = torch.randint(-1, hot, (shape.max_num_tokens, shape.top_k), generator=draw).int()
    weights = torch.randn(shape.max_num_tokens, shape.top_k, generator=draw)
    return n, x, ids, weights


def together(ranks: list[SimpleNamespace], work) -> None:
    """Runs work(rank) of every rank at once: the portable kernels wait for one another."""
    failures = []

    def run(rank: SimpleNamespace) -> None:
        try:
            work(rank)
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=run, args=[rank], daemon=True) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert not failures, failures


def homes_of(cuda: HostKernels) -> list[tuple[int, int]]:
    """Of each row: the rank and the place in its home_rows that its address is of."""
    rank, nbytes = cuda.rank, 2 * cuda.rank.shape.hidden_size
    begins = [peer.home_rows.data_ptr() for peer in rank.peers]
    found = []
    for address in cuda.scratch["row_home"][: int(rank.workspace.expert_offsets[-1])].tolist():
        to = max((b, r) for r, b in enumerate(begins) if b <= address)[1]
        place, odd = divmod(address - begins[to], nbytes)
        assert odd == 0
        found.append((to, place))
    return found


def store_home(cuda: list[HostKernels]) -> None:
    """What an L2 does that stores its rows at their homes."""
    for kernels in cuda:
        for row, (to, place) in enumerate(homes_of(kernels)):
            kernels.rank.peers[to].home_rows[place] = kernels.rank.workspace.rows[row]


def sum_and_tell(cuda: list[HostKernels], ys: list[torch.Tensor]) -> None:
    """combine_sum of all ranks, each of which raises its flags. They run one after another here, so
    a rank finds the flags of the others raised by the test."""
    ranks = [c.rank for c in cuda]
    before = [int(rank.local.combine_flags[r]) for r, rank in enumerate(ranks)]
    raised = int(ranks[0].local.epoch) << 32  # exact's number is 0
    for r, rank in enumerate(ranks):
        rank.local.combine_flags.fill_(raised)
        for other in ranks:
            other.local.combine_flags[r] = before[r]
        cuda[r].sum(ys[r], "exact", raises=True)
        assert all(int(other.local.combine_flags[r]) == raised for other in ranks)


def test_owner_of_an_expert(kernels) -> None:
    def check(num_experts: int, per_rank: int, expert: int) -> None:
        expected = expert // per_rank if 0 <= expert < num_experts else -1
        assert kernels.owner(num_experts, per_rank, expert) == expected

    for per_rank in (*range(1, 50), 255, 257, 21845, 21846, 32767, 32768, 65535, 65536):
        num_experts = 65536 // per_rank * per_rank
        for expert in (-(2**31), -1, num_experts, 2**31 - 1):
            check(num_experts, per_rank, expert)
        # A wrong quotient shows at the first or the last expert of a rank.
        for first in range(0, num_experts, per_rank):
            check(num_experts, per_rank, first)
            check(num_experts, per_rank, first + per_rank - 1)


def test_few_tokens_are_shared_by_blocks_that_exist(kernels) -> None:
    for blocks in range(1, 300):
        for received in (1, 2, 7, 8, 16, 128, 256, 4096):
            sharing = 1 << kernels.sharing_log2(received, blocks)
            assert sharing <= min(blocks, 8)
            assert received * sharing < 16 * blocks or sharing == 1
    assert 1 << kernels.sharing_log2(256, 264) == 8
    assert kernels.sharing_log2(4096, 264) == 0


def test_a_flag_is_raised_by_all_blocks_or_not_at_all(kernels) -> None:
    draw = torch.Generator().manual_seed(2)
    step, most = kernels.flag_step(), MAX_TOKENS
    for blocks in (1, 2, 3, 132, 264, 1022, 1023):
        for _ in range(20):
            counts = torch.randint(0, most + 1, (2,), generator=draw).tolist()
            call, missed = torch.randint(0, 3, (2,), generator=draw).tolist()
            # Also over the end of the call's 32 bits, and where calls went by without this flag.
            call += 2**32 - 1
            before, after = ((call << 32) + counts[0]) % 2**64, call + 1 + missed << 32
            after = (after + counts[1]) % 2**64
            last = kernels.flag_last_step(before, after, blocks)
            for others in {0, 1, blocks // 2, blocks - 2, blocks - 1} & set(range(blocks)):
                without = before + others * step
                assert without >> 32 == before >> 32
                assert kernels.flag_before_steps((call << 32) % 2**64 + others * step + 1) == (
                    (call << 32) % 2**64 + 1
                )
                flag = (without + last) % 2**64
                raised = flag >> 32 == after >> 32
                assert raised == (others == blocks - 1)
                assert flag == after or not raised


STAGED = ("x", "x_sf", "x_scales", "topk_idx", "topk_weights", "num_tokens")
WORKSPACE = ("rows", "row_scales")


def test_every_arrow_equals_the_portable_one(kernels) -> None:
    draw = torch.Generator().manual_seed(7)
    routings = 0
    # More ranks than a block has warps, and than a warp has lanes; then many times few.
    for world_size in itertools.chain((17, 33), itertools.cycle((1, 2, 3, 4))):
        if routings >= ROUTINGS:
            break
        shape = drawn_shape(draw, world_size)
        static = bool(torch.randint(0, 2, (), generator=draw)) and shape.activation_format != "bf16"
        theirs, ours = ranks_of(shape), ranks_of(shape)
        if static:
            for rank in (*theirs, *ours):
                rank.input_global_scale = torch.tensor([2.0**-9 * 1.7])
        blocks = BLOCKS[int(torch.randint(len(BLOCKS), (), generator=draw))]
        cuda = [HostKernels(kernels, rank, blocks) for rank in ours]
        # Several calls on one buffer: what an earlier one left behind must not matter.
        for call in range(2):
            combine = "exact" if (routings + call) % 2 else "fast"
            columns = (
                "plain" if shape.hidden_size % 64 else ("plain", "by lane", "by lane")[routings % 3]
            )
            tokens = [drawn_tokens(draw, shape) for _ in range(world_size)]
            outputs = [torch.full((shape.max_num_tokens, shape.hidden_size), 7.0).bfloat16()
                       for _ in range(2 * world_size)]  # fmt: skip
            stats = [torch.ones(shape.experts_per_rank, dtype=[torch.int32, torch.int64][call])
                     for _ in range(2 * world_size)]  # fmt: skip

            def dispatch_portable(
                rank, tokens=tokens, combine=combine, stats=stats, columns=columns
            ) -> None:
                n, x, ids, weights = tokens[rank.rank]
                portable.stage(x[:n], ids[:n], weights[:n], rank, n)
                portable.dispatch(
                    rank, combine=combine, recv_stats=stats[rank.rank], columns=columns
                )

            together(theirs, dispatch_portable)
            for r, (n, x, ids, weights) in enumerate(tokens):
                if call:
                    cuda[r].stage(x[:n], ids[:n], weights[:n], n)
                else:
                    cuda[r].stage(x, ids, weights, torch.tensor([n], dtype=torch.int32))
            for r in range(world_size):
                cuda[r].send(combine)
            for r in range(world_size):
                sharing_log2 = routings // 4 % blocks.bit_length() if call else 0
                cuda[r].expand(bool(call), stats[world_size + r], columns, sharing_log2)

            for r in range(world_size):
                n, rows = tokens[r][0], int(theirs[r].workspace.expert_offsets[-1])
                a, b = ours[r], theirs[r]
                for name in STAGED:
                    if name in shape.regions:
                        length = 1 if name == "num_tokens" else n
                        assert_same(
                            getattr(a.local, name)[:length], getattr(b.local, name)[:length], name
                        )
                assert_same(a.local.dispatch_flags, b.local.dispatch_flags, "flags")
                assert_same(a.local.epoch, b.local.epoch, "epoch")
                assert_same(a.workspace.expert_offsets, b.workspace.expert_offsets, "offsets")
                row_slot = b.workspace.row_slot[:rows]
                index, slot = row_slot // shape.top_k, row_slot % shape.top_k
                place = b.local.recv_token.flatten()[index] * shape.top_k + slot
                to = index // shape.max_num_tokens
                assert homes_of(cuda[r]) == list(zip(to.tolist(), place.tolist(), strict=True))
                for name in WORKSPACE:
                    if name != "row_scales" or shape.activation_format == "nvfp4":
                        assert_same(
                            getattr(a.workspace, name)[:rows],
                            getattr(b.workspace, name)[:rows],
                            name,
                        )
                assert_same(stats[world_size + r], stats[r], "stats")
                # What the GEMMs make of the rows: anything, the same for both.
                made = torch.randn(rows, shape.hidden_size, generator=draw).bfloat16()
                a.workspace.rows[:rows] = made
                b.workspace.rows[:rows] = made

            def combine_portable(rank, outputs=outputs, combine=combine) -> None:
                portable.combine(outputs[rank.rank], rank, combine=combine)

            together(theirs, combine_portable)
            ys = outputs[world_size:]
            if combine == "exact" and routings % 3 == 0:
                store_home(cuda)
                sum_and_tell(cuda, ys)
            else:
                for r in range(world_size):
                    cuda[r].send_home(combine)
                for r in range(world_size):
                    cuda[r].sum(ys[r], combine)
            for r in range(world_size):
                assert_same(outputs[world_size + r], outputs[r], f"y, {combine}")
                assert int(ours[r].local.progress) == 0
                assert not cuda[r].latches.any()
                assert not cuda[r].status.any()
            routings += world_size


@pytest.mark.parametrize("scale", [1.0, 1.7 * 2.0**-9, 3.0, 2.0**-120, 2.0**105, 0.0, torch.nan])
def test_stage_rounds_as_the_portable_one(kernels, scale: float) -> None:
    """Values at and beside the middles between two codes, and every bf16 that there is."""
    shape = LayerShape(1, 64, 1, 4096, 16, 1)
    ours, theirs = ranks_of(shape)[0], ranks_of(shape)[0]
    ours.input_global_scale = theirs.input_global_scale = torch.tensor([scale])
    draw = torch.Generator().manual_seed(3)
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16)
    order = torch.randperm(2**16, generator=draw)
    middles = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0]).view(1, -1, 1)
    beside = middles * torch.tensor([1.0, 1 + 2**-7, 1 - 2**-8, -1.0]) * torch.ones(512, 1, 1)
    powers = 2.0 ** torch.randint(-3, 4, (512, 1, 1), generator=draw)
    x = torch.stack(
        [
            *every.view(16, 4096),  # blocks with a scale of nearly the same sort ...
            *every[order].view(16, 4096),  # ... and of every other
            *(beside * powers).bfloat16().view(4, 4096),
            *torch.randn(28, 4096, generator=draw).bfloat16(),
        ]
    )
    # Rows with NaN or infinity come out as NaN as a whole; the others are what is looked at.
    x = torch.where(x.isfinite(), x, 0.5)
    ids, weights = torch.zeros(64, 1, dtype=torch.int32), torch.ones(64, 1)
    HostKernels(kernels, ours).stage(x, ids, weights, 64)
    portable.stage(x, ids, weights, theirs, 64)
    for name in ("x_sf", "x_scales", "x"):
        assert_same(getattr(ours.local, name), getattr(theirs.local, name), name)


def test_stage_of_rows_that_threads_do_not_keep(kernels) -> None:
    """More blocks of 16 than twice the threads; the largest magnitude is in one of any round."""
    shape = LayerShape(1, 7, 1, 16 * 1030, 16, 1)
    ours, theirs = ranks_of(shape)[0], ranks_of(shape)[0]
    x = torch.randn(7, shape.hidden_size, generator=torch.Generator().manual_seed(4)).bfloat16()
    for token, (column, value) in enumerate(
        [(3, 40), (16 * 700, -40), (-1, 40), (16 * 600, torch.nan), (-2, -torch.inf), (2, 0)]
    ):
        x[token, column] = value
    ids, weights = torch.zeros(7, 1, dtype=torch.int32), torch.ones(7, 1)
    HostKernels(kernels, ours).stage(x, ids, weights, 7)
    portable.stage(x, ids, weights, theirs, 7)
    for name in ("x_sf", "x_scales", "x"):
        assert_same(getattr(ours.local, name), getattr(theirs.local, name), name)


def shape_of(world_size: int) -> LayerShape:
    return LayerShape(2 * world_size, 4, 3, 32, 16, world_size)


def stage_some(cuda: list[HostKernels]) -> None:
    for c in cuda:
        shape = c.rank.shape
        x = torch.ones(2, shape.hidden_size).bfloat16()
        ids = torch.arange(2 * shape.top_k, dtype=torch.int32).view(2, -1) % shape.num_experts
        c.stage(x, ids, torch.ones(2, shape.top_k), 2)


@pytest.mark.parametrize("count_here", [False, True])
def test_who_waits_in_vain_names_the_missing_rank_to_everyone(kernels, count_here: bool) -> None:
    ranks = ranks_of(shape_of(4), timeout_s=1e-3)
    cuda = [HostKernels(kernels, rank) for rank in ranks]
    for rank in ranks:
        rank.local.epoch.fill_(2**32 + 5)  # also past the 32 bits that a flag holds
        rank.local.dispatch_flags.fill_(5 << 32)
    stage_some(cuda)
    missing = 2
    for r in (0, 1, 3):
        cuda[r].send("exact")
    # Rank 1 says that it waits as well: rank 2 alone is held responsible.
    ranks[1].local.progress.fill_((2**32 + 6) << 8 | 1)
    stats = torch.zeros(2, dtype=torch.int64)
    cuda[0].expand(count_here, stats)
    for rank in ranks:
        expected = [1, 0, 2**32 + 6, 2**32 + 5, 1 << missing, 0, 0, 0]
        assert rank.local.abort[0].tolist() == expected
    assert cuda[0].status[:8].tolist() == [1, 0, 2**32 + 6, 2**32 + 5, 1 << missing, 0, 0, 0]
    assert ranks[0].workspace.expert_offsets.tolist() == [0, 0, 0]
    assert stats.tolist() == [0, 0]

    # The others hear of it at their next wait, and from then on nothing is sent.
    cuda[3].expand(count_here, stats)
    assert cuda[3].status[:8].tolist() == cuda[0].status[:8].tolist()
    assert not ranks[0].local.abort[1:].any()
    y = torch.ones(4, 32).bfloat16()
    cuda[3].send_home("exact")
    cuda[3].sum(y, "exact")
    assert y[:2].isnan().all()
    assert (y[2:] == 1).all()
    assert not ranks[0].local.combine_flags.any()


def test_a_rank_that_waits_for_another_is_excused(kernels) -> None:
    """0 waits for the combine of 1, which waits for the dispatch of 2, which does nothing."""
    ranks = ranks_of(shape_of(3), timeout_s=1e-3)
    cuda = [HostKernels(kernels, rank) for rank in ranks]
    stage_some(cuda)
    for c in cuda:
        c.send("fast")
    stats = torch.zeros(2, dtype=torch.int64)
    cuda[0].expand(True, stats)
    cuda[0].send_home("fast")
    ranks[1].local.dispatch_flags[2] = 0
    ranks[1].local.progress.fill_(1 << 8 | 1)
    cuda[0].sum(torch.zeros(4, 32).bfloat16(), "fast")
    assert ranks[2].local.abort[0].tolist() == [1, 1, 1, 0, 1 << 2, 0, 0, 0]
    assert ranks[0].local.progress.item() == 1 << 8 | 2


@pytest.mark.parametrize("block", range(5))
def test_no_row_of_a_call_that_some_blocks_see_fail_is_left_as_it_was(kernels, block) -> None:
    shape = LayerShape(2, 64, 2, 512, 16, 1)
    (rank,) = ranks_of(shape)
    cuda = HostKernels(kernels, rank, blocks=4)
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(64, 512, generator=draw).bfloat16()
    ids = torch.randint(0, 2, (64, 2), generator=draw).int()
    cuda.stage(x, ids, torch.ones(64, 2), 64)
    cuda.send("exact")
    cuda.expand(True, torch.zeros(2, dtype=torch.int64))
    rank.workspace.rows.copy_(torch.randn(rank.workspace.rows.shape, generator=draw))
    cuda.send_home("exact")
    expected = torch.zeros_like(x)
    cuda.sum(expected, "exact")
    y = torch.full_like(x, 7)
    cuda._run("run_sum_given_up", y.data_ptr(), 64, block)
    lost = y.isnan()
    assert torch.equal(y[~lost], expected[~lost])
    assert lost.all() == (block == 0)
    assert lost.any() == (block < 4)


def test_a_rank_in_the_other_mode_is_found_by_all(kernels) -> None:
    shape = shape_of(2)
    ranks = ranks_of(shape)
    cuda = [HostKernels(kernels, rank) for rank in ranks]
    stage_some(cuda)
    for c in cuda:
        c.send("fast")
    for c in cuda:
        c.expand(True, torch.zeros(2, dtype=torch.int64))
        c.rank.workspace.rows.fill_(1)
    modes = ("exact", "fast")
    for c, mode in zip(cuda, modes, strict=True):
        c.send_home(mode)
    for r, (c, mode) in enumerate(zip(cuda, modes, strict=True)):
        y = torch.zeros(4, shape.hidden_size).bfloat16()
        c.sum(y, mode)
        assert y[:2].isnan().all()
        assert not y[2:].any()
        assert c.status[8:10].tolist() == [3, 1 - r]


def test_ranks_that_wait_for_each_other_are_named_both(kernels) -> None:
    ranks = ranks_of(shape_of(3), timeout_s=1e-3)
    cuda = [HostKernels(kernels, rank) for rank in ranks]
    stage_some(cuda)
    cuda[0].send("exact")
    for r in (1, 2):
        ranks[r].local.dispatch_flags.copy_(torch.tensor([1 << 32, 0, 0]))
        ranks[r].local.progress.fill_(1 << 8 | 1)
    cuda[0].expand(True, torch.zeros(2, dtype=torch.int64))
    assert ranks[1].local.abort[0, 4].item() == 0b110


def test_bad_inputs_are_reported_and_left_out(kernels) -> None:
    (rank,) = ranks_of(shape_of(1))
    cuda = HostKernels(kernels, rank)
    x = torch.ones(3, 32).bfloat16()
    ids = torch.tensor([[0, 1, -1], [1, 2, 0], [0, 0, 1]], dtype=torch.int32)
    cuda.stage(x, ids, torch.ones(3, 3), 3)
    assert cuda.status[8:12].tolist() == [1, 1, 1, 2]
    assert rank.local.topk_idx[:3].tolist() == [[0, 1, -1], [1, -1, 0], [0, 0, 1]]

    cuda.status.zero_()
    cuda.stage(x, ids, torch.ones(3, 3), 3)
    assert not cuda.status.any(), "said once, until the host has taken note"
    cuda.latches.zero_()
    cuda.stage(x, ids[:1].expand(3, 3).contiguous(), torch.ones(3, 3),
               torch.tensor([-4], dtype=torch.int32))  # fmt: skip
    assert cuda.status[[8, 11]].tolist() == [2, -4]
    assert rank.local.num_tokens.item() == 0


def test_flags_go_round_until_the_deadline(kernels):
    flags = torch.zeros(2, dtype=torch.int64)
    here, there = flags[:1], flags[1:]
    kernels.run_flag_rounds(here.data_ptr(), here.data_ptr(), 1, 50, 1000)
    assert flags.tolist() == [50, 0]
    kernels.run_flag_rounds(there.data_ptr(), here.data_ptr(), 51, 50, 1000)
    assert flags.tolist() == [50, 51], "told once, never answered"
