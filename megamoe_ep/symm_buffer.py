"""SymmBuffer: the symmetric memory of one layer shape, as named views, and its local workspace."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from types import SimpleNamespace, TracebackType
from typing import TYPE_CHECKING, Protocol, cast

import torch

from megamoe_ep.errors import (
    ArgumentError,
    BufferDestroyedError,
    HeapTooSmallError,
    LayerMismatchError,
    PeerTimeoutError,
    check_timeout,
)
from megamoe_ep.heap import Heap, open_heap
from megamoe_ep.kernels import allocate_scratch, exchange_kernels, open_kernel_state
from megamoe_ep.shape import ActivationFormat, LayerShape

if TYPE_CHECKING:
    from megamoe_ep.bootstrap import Group

PHASES = ("dispatch", "combine")  # the two places of a call where a rank waits for others
MASK_WORDS = 4  # of 64 bits: the ranks that an abort record blames


@dataclass(frozen=True)
class Workspace:
    """Memory of one rank that no other rank sees.

    ``rows`` is what L1 reads and, once L1 is done with it, what L2 writes. What L1 and L2 read has
    its columns in the order that these want.
    """

    rows: torch.Tensor  # bf16 [R, H], R = world_size * max_num_tokens * top_k
    row_scales: torch.Tensor  # fp32 [R], global scale of the row's activation; 1 in bf16 format
    row_slot: torch.Tensor  # int32 [R], (source * T + index in its block) * K + slot; not csrc's
    expert_offsets: torch.Tensor  # int32 [L + 1], first row of each local expert
    h: torch.Tensor  # bf16 [R, I]

    @classmethod
    def allocate(cls, shape: LayerShape, device: torch.device) -> Workspace:
        r = shape.max_rows
        return cls(
            rows=torch.empty(r, shape.hidden_size, dtype=torch.bfloat16, device=device),
            row_scales=torch.ones(r, dtype=torch.float32, device=device),
            row_slot=torch.empty(r, dtype=torch.int32, device=device),
            expert_offsets=torch.zeros(
                shape.experts_per_rank + 1, dtype=torch.int32, device=device
            ),
            h=torch.empty(r, shape.intermediate_size, dtype=torch.bfloat16, device=device),
        )


class KernelState(Protocol):
    """What kernels that nobody waits for keep for a buffer, and how its host hears of failures."""

    def raise_bad_input(self) -> None:
        """Raises ArgumentError or LayerMismatchError, once, if a kernel came upon a bad input."""

    def abort_record(self) -> tuple[int, list[int]] | None:
        """The rank that gave up and its row of ``abort``, if some kernel of this rank saw one."""


class SymmBuffer:
    """Symmetric buffers of one rank for one layer shape; any number of layers may share it in turn.

    Creating and destroying one is collective: every rank of ``group`` does it, in the same order.

    Args:
        group: the ranks.
        shape: sizes of the layer, equal on all ranks.
        device: where the layer runs; None takes the group's own choice.
        timeout_s: deadline of every wait for another rank, in seconds.
        comm_sms: on how many SMs of this rank's GPU stage, dispatch and combine run, so that the
            others are left to other streams; None: all of them. Only csrc's kernels look at it.

    Attributes:
        x, x_sf, x_scales, topk_idx, topk_weights, num_tokens: the staged inputs (see
            ``LayerShape.regions`` for shapes); ``x_sf`` and ``x_scales`` only in "nvfp4" format.
        buffer: the whole allocation of this rank, uint8 [shape.symmetric_nbytes].
        local: namespace of all regions of this rank; ``peers[r]``: the same of rank ``r``.
        peer_ptrs: int64 [W], address of every rank's allocation as seen from this rank.
        experts_start_idx: the first expert that this rank owns.
        staged_rows: rows that the last ``stage_activation`` may have filled.
        input_global_scale: fp32 [1] tensor, the static global scale of the activations, or None:
            each token gets its own. Only in "nvfp4" format.
        kernel_state: what csrc's kernels keep for this buffer; None where the portable ones run.
        bytes_put: bytes that the portable kernels have written to each rank, by phase, since
            creation: {"dispatch": [..W..], "combine": [..W..]}.

    Raises:
        LayerMismatchError: the ranks gave different sizes, or some have csrc's kernels for the
            exchange and others have not; raised on every rank.
        HeapError, HeapTooSmallError: symmetric memory cannot be had on some rank.
    """

    def __init__(
        self,
        group: Group,
        shape: LayerShape,
        *,
        device: torch.device | str | None = None,
        timeout_s: float = 60.0,
        comm_sms: int | None = None,
    ) -> None:
        check_timeout(timeout_s)
        if comm_sms is not None and comm_sms < 1:
            raise ArgumentError(
                f"comm_sms must be at least 1, or None for all SMs; got {comm_sms}."
            )
        if shape.world_size != group.world_size:
            raise ArgumentError(
                f"shape.world_size must be the size of group, {group.world_size}; "
                f"got {shape.world_size}."
            )
        self.group = group
        self.shape = shape
        self.rank = group.rank
        self.device = group.device if device is None else group.device_of(device)
        self.timeout_s = float(timeout_s)
        self.experts_start_idx = self.rank * shape.experts_per_rank
        self.input_global_scale: torch.Tensor | None = None
        self.staged_rows = 0
        self.bytes_put = {phase: [0] * shape.world_size for phase in PHASES}
        self.kernel_state: KernelState | None = None
        self._failed = False
        self._check_agreement()

        self._heap: Heap | None = open_heap(
            group, self.device, shape.symmetric_nbytes, timeout_s=timeout_s
        )
        try:
            self.buffer = self._heap.alloc(shape.symmetric_nbytes)
            self.buffer.zero_()
            self.workspace = self._allocate_workspace()
            self.peers = [
                SimpleNamespace(**shape.tensors(self._heap.peer(r)))
                for r in range(shape.world_size)
            ]
            self.local = self.peers[self.rank]
            self.local.topk_idx.fill_(-1)
            self.peer_ptrs = self._heap.peer_ptrs
            self.kernel_state = open_kernel_state(self, comm_sms)
            self._heap.fence()
            # A peer may write here as soon as it is through this barrier: not before the zeroing.
            self._heap.barrier()
        except BaseException as error:
            # What does not fit is told to every rank.
            self._failed = not isinstance(error, HeapTooSmallError)
            self.destroy()
            raise

    @staticmethod
    def nbytes_for(
        world_size: int,
        num_experts: int,
        max_num_tokens: int,
        top_k: int,
        hidden_size: int,
        intermediate_size: int,
        *,
        activation_format: ActivationFormat = "nvfp4",
    ) -> int:
        """Bytes of symmetric memory that each rank will need, known before anything is allocated.

        The local workspace comes on top: ``LayerShape.workspace_nbytes``.
        """
        return LayerShape(
            num_experts,
            max_num_tokens,
            top_k,
            hidden_size,
            intermediate_size,
            world_size,
            activation_format,
        ).symmetric_nbytes

    def _check_agreement(self) -> None:
        mine = {
            **asdict(self.shape),
            "device type": self.device.type,
            "timeout_s": self.timeout_s,
            "kernels for the exchange": exchange_kernels(self.device),
        }
        everyone = self.group.all_gather_object(mine, timeout_s=self.timeout_s)
        for name in mine:
            values = [other[name] for other in everyone]
            if any(value != values[0] for value in values):
                raise LayerMismatchError(
                    f"every rank must create the buffer with the same {name}; got "
                    f"{dict(enumerate(values))} by rank. Give all ranks the same arguments; where "
                    f"csrc's kernels do not run, megamoe-ep doctor says why."
                )

    def _allocate_workspace(self) -> Workspace:
        failure, workspace = "", None
        try:
            workspace = Workspace.allocate(self.shape, self.device)
            allocate_scratch(workspace, self.shape, self.device)
        except RuntimeError as error:  # torch's for an allocation that fails, on CPU and GPU
            failure = str(error).splitlines()[0]
        failures = self.group.all_gather_object(failure, timeout_s=self.timeout_s)
        if workspace is None or any(failures):
            told = {rank: reason for rank, reason in enumerate(failures) if reason}
            raise HeapTooSmallError(
                f"the layer needs {self.shape.workspace_nbytes} bytes of workspace on each rank, "
                f"besides its symmetric memory, and some cannot have it: {told}; lower "
                f"max_num_tokens."
            )
        return workspace

    def __getattr__(self, name: str) -> torch.Tensor:
        # Reached only for what is not set: the regions of this rank, or anything after destroy().
        local = self.__dict__.get("local")
        if local is not None and hasattr(local, name):
            return cast(torch.Tensor, getattr(local, name))
        gone = "" if local is not None else "; its memory was given back by destroy()"
        raise AttributeError(f"SymmBuffer has no attribute {name!r}{gone}")

    def fence(self) -> None:
        """Orders this rank's stores before it against those after it, for every rank's eyes."""
        self._live_heap().fence()

    def _live_heap(self) -> Heap:
        if self._heap is None:
            raise BufferDestroyedError(
                "buffer was used after destroy(); create a new one with "
                "get_symm_buffer_for_nvfp4_mega_moe()."
            )
        return self._heap

    def check(self) -> None:
        """Raises if the buffer is destroyed, or if a call on it has failed on any rank.

        With csrc's kernels it waits for nothing and raises what they have come upon so far; after
        ``torch.cuda.synchronize()`` that is all of the calls made.

        Raises:
            ArgumentError: a kernel found an input of an earlier call out of range; raised once.
            LayerMismatchError: likewise, a rank combined in another mode.
            BufferDestroyedError: after ``destroy()``.
            PeerTimeoutError: a rank missed a deadline; the same error every time from then on.
        """
        self._live_heap()
        if self.kernel_state is not None:
            self.kernel_state.raise_bad_input()
            known = self.kernel_state.abort_record()
            records = [] if known is None else [known]
        else:
            records = list(enumerate(self.local.abort.tolist()))
        for found_by, record in records:
            if record[0]:
                self._failed = True
                raise self._read_abort(found_by, record)

    def abort(self, ranks: list[int], phase: str, epoch: int, seen: int) -> PeerTimeoutError:
        """Tells every rank that ``ranks`` missed the deadline, and returns the error to raise."""
        mask = [sum(1 << (r % 64) for r in ranks if r // 64 == word) for word in range(MASK_WORDS)]
        signed = [m - (1 << 64) if m >= 1 << 63 else m for m in mask]
        self._failed = True
        record = torch.tensor([1, PHASES.index(phase), epoch, seen, *signed], device=self.device)
        for peer in self.peers:
            peer.abort[self.rank, 1:] = record[1:]
        self.fence()
        for peer in self.peers:
            peer.abort[self.rank, :1] = record[:1]
        self.fence()
        return self._read_abort(self.rank, record.tolist())

    def _read_abort(self, found_by: int, record: list[int]) -> PeerTimeoutError:
        _, phase, epoch, seen, *mask = record
        ranks = [r for r in range(self.shape.world_size) if mask[r // 64] >> (r % 64) & 1]
        return PeerTimeoutError(ranks, PHASES[phase], epoch, seen, self.timeout_s, found_by)

    def destroy(self) -> None:
        """Gives the symmetric memory back; safe to call twice, and after a failed call.

        Collective on GPUs, except after a failed call: then it waits for nobody.
        """
        heap, self._heap = self.__dict__.get("_heap"), None
        self.__dict__.pop("local", None)
        self.__dict__.pop("peers", None)
        self.__dict__.pop("buffer", None)
        if heap is not None:
            heap.free(together=not self._failed)
        # Kernels of a call may still be at work on it.
        if self.device.type == "cuda" and "workspace" in self.__dict__:
            torch.cuda.synchronize(self.device)
        self.__dict__.pop("workspace", None)
        self.kernel_state = None

    def __enter__(self) -> SymmBuffer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # The other ranks may never get here when this one leaves by an error.
        self._failed = self._failed or error is not None
        self.destroy()


def get_symm_buffer_for_nvfp4_mega_moe(
    group: object,
    num_experts: int,
    max_num_tokens: int,
    top_k: int,
    hidden_size: int,
    intermediate_size: int,
    *,
    activation_format: ActivationFormat = "nvfp4",
    device: torch.device | str | None = None,
    timeout_s: float = 60.0,
    comm_sms: int | None = None,
) -> SymmBuffer:
    """Allocates the symmetric buffers of a layer; collective over ``group``.

    Args:
        group: the ranks, a ``Group``, a torch ``ProcessGroup``, an mpi4py communicator, or None for
            a lone process.
        num_experts: experts of the layer over all ranks.
        max_num_tokens: the most tokens that one rank brings to one call.
        top_k: expert slots of a token.
        hidden_size, intermediate_size: H and I of the layer.
        activation_format: "nvfp4" or "bf16", see ``LayerShape``.
        device: where the layer runs; None takes this rank's GPU if there is one, else the CPU.
        timeout_s: deadline of every wait for another rank, in seconds.
        comm_sms: SMs for stage, dispatch and combine; None: all. See ``SymmBuffer``.

    Raises:
        ArgumentError, LayerMismatchError, HeapError, HeapTooSmallError: see ``SymmBuffer``.
    """
    from megamoe_ep.bootstrap import Group

    ranks = Group.of(group, device=device, timeout_s=timeout_s)
    shape = LayerShape(
        num_experts,
        max_num_tokens,
        top_k,
        hidden_size,
        intermediate_size,
        ranks.world_size,
        activation_format,
    )
    return SymmBuffer(ranks, shape, device=device, timeout_s=timeout_s, comm_sms=comm_sms)
