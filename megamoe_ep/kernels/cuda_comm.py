"""csrc's stage, dispatch and combine: launched on the current stream, waited for by nobody.

Same arguments and same bits as in ``portable``. Nothing here allocates, sets memory or waits for
the device, so calls can be captured in a CUDA graph. What only the device can find out - an expert
id out of range, a rank that misses the deadline - comes back through pinned host memory, which
``SymmBuffer.check`` reads; ``y`` of a call that failed is filled with NaN.
"""

from __future__ import annotations

from array import array
from typing import Any

import torch

from megamoe_ep.errors import ArgumentError, HeapError
from megamoe_ep.kernels import ColumnOrder, library
from megamoe_ep.kernels.portable import combined_differently
from megamoe_ep.symm_buffer import SymmBuffer

_BLOCKS_PER_SM = 2  # as many as run at once; with few tokens one is quicker there

# csrc/comm/view.cuh: Status and BadInput
_ABORT_FINDER, _ABORT_WORDS = 0, 8
_BAD_INPUT, _BAD_TOKEN, _BAD_SLOT, _BAD_VALUE = 8, 9, 10, 11
_BAD_EXPERT, _BAD_NUM_TOKENS, _BAD_COMBINE = 1, 2, 3


class CommState:
    """What the kernels keep for one buffer: scratch memory, and the word from device to host.

    Args:
        buffer: its regions and workspace are there already.
        blocks: blocks of 512 threads in each kernel. They spread over the SMs, so fewer blocks than
            SMs leave SMs to other streams.
        most_blocks: the same in a kernel that has more tokens than ``blocks``.
    """

    def __init__(self, buffer: SymmBuffer, blocks: int, most_blocks: int | None = None) -> None:
        most_blocks = most_blocks or blocks
        self.functions: Any = library.load()
        shape, device, work = buffer.shape, buffer.device, buffer.workspace
        self._num_experts = shape.num_experts
        self._num_latches = int(self.functions.comm_num_latches())

        def scratch(*size: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.zeros(size, dtype=dtype, device=device)

        self._latches = scratch(self._num_latches)
        self.row_home = scratch(shape.max_rows, dtype=torch.int64)
        self._slot_row = scratch(shape.max_rows)
        self._owners = scratch((shape.world_size + 31) // 32, -(-shape.max_num_tokens // 4) * 4)
        self._chunk_counts = scratch(most_blocks, shape.experts_per_rank)
        self._send_counts = scratch(shape.world_size)
        self._status = torch.zeros(
            int(self.functions.comm_status_words()), dtype=torch.int64, pin_memory=True
        )
        self._peers = buffer.peer_ptrs
        self.status = self._status.numpy()

        values = {name: region.offset for name, region in shape.regions.items()}
        values |= {
            "world_size": shape.world_size,
            "rank": buffer.rank,
            "num_experts": shape.num_experts,
            "experts_per_rank": shape.experts_per_rank,
            "max_tokens": shape.max_num_tokens,
            "top_k": shape.top_k,
            "hidden_size": shape.hidden_size,
            "nvfp4": int(shape.activation_format == "nvfp4"),
            "memory": buffer.buffer.data_ptr(),
            "peers": self._peers.data_ptr(),
            "rows": work.rows.data_ptr(),
            "row_scales": work.row_scales.data_ptr(),
            "expert_offsets": work.expert_offsets.data_ptr(),
            "row_home": self.row_home.data_ptr(),
            "slot_row": self._slot_row.data_ptr(),
            "owners": self._owners.data_ptr(),
            "chunk_counts": self._chunk_counts.data_ptr(),
            "send_counts": self._send_counts.data_ptr(),
            "latches": self._latches.data_ptr(),
            "status": self._status.data_ptr(),
            "timeout_ns": round(buffer.timeout_s * 1e9),
            "device": torch.cuda.current_device() if device.index is None else device.index,
            "blocks": blocks,
            "most_blocks": most_blocks,
        }
        # Regions that the format has not are never looked at.
        for name in ("x_sf", "x_scales", "recv_x_sf", "recv_x_scales"):
            values.setdefault(name, 0)
        self._view = array("q", (values[name] for name in self.functions.comm_fields().split()))
        self.view = self._view.buffer_info()[0]
        # The scratch memory is zeroed on this stream; calls may come on any.
        torch.cuda.current_stream(device).synchronize()

    def abort_record(self) -> tuple[int, list[int]] | None:
        """The rank that gave up, and its record as in ``SymmBuffer.abort``; None if none is known.

        Reads host memory alone: known is what some kernel of this rank has come upon so far.
        """
        finder = int(self.status[_ABORT_FINDER])
        if finder == 0:
            return None
        return finder - 1, [1, *self.status[1:_ABORT_WORDS].tolist()]

    def raise_bad_input(self) -> None:
        """Raises what a kernel found wrong with the arguments of a call, once.

        Raises:
            ArgumentError: an expert id, or ``num_tokens`` on the device, was out of range.
            LayerMismatchError: a rank combined in another mode.
        """
        what = int(self.status[_BAD_INPUT])
        if what == 0:
            return
        token, slot, value = (int(self.status[i]) for i in (_BAD_TOKEN, _BAD_SLOT, _BAD_VALUE))
        self.status[_BAD_INPUT] = 0
        self._latches[-1:].zero_()
        if what == _BAD_COMBINE:
            raise combined_differently(token)
        if what == _BAD_NUM_TOKENS:
            raise ArgumentError(
                f"num_tokens must be 0 to the number of rows of x; got {value} on the device. As "
                f"many rows as there are were taken, or none."
            )
        raise ArgumentError(
            f"topk_idx must hold experts 0 to {self._num_experts - 1}, or -1 for none; got {value} "
            f"for token {token}, slot {slot}. It was taken for -1."
        )


def open_state(buffer: SymmBuffer, comm_sms: int | None) -> CommState:
    """The state for a new buffer, on ``comm_sms`` SMs of its GPU; None: all. Collective.

    Raises:
        HeapError: GPUs of two ranks cannot add to each other's memory; raised on every rank.
    """
    _check_links(buffer)
    available: int = torch.cuda.get_device_properties(buffer.device).multi_processor_count
    if comm_sms is None:
        return CommState(buffer, available, available * _BLOCKS_PER_SM)
    return CommState(buffer, min(comm_sms, available))


def _check_links(buffer: SymmBuffer) -> None:
    """As far as a rank sees the others' GPUs: it may have been given its own alone."""
    group, mine = buffer.group, buffer.device.index
    if group.world_size == 1:
        return
    numbers = group.all_gather_object(mine, timeout_s=buffer.timeout_s)
    seen = [r for r, n in enumerate(numbers) if n != mine and n < torch.cuda.device_count()]
    able = library.load().comm_adds_to_peer
    unable = [r for r in seen if not able(mine, numbers[r])]
    everyone = group.all_gather_object(unable, timeout_s=buffer.timeout_s)
    if any(everyone):
        told = {rank: others for rank, others in enumerate(everyone) if others}
        raise HeapError(
            f"the GPUs of all ranks must be able to add to one another's memory, as over NVLink; "
            f"these cannot, ranks by rank: {told}. Take GPUs that NVLink connects."
        )


def stage(
    x: torch.Tensor,
    topk_idx: torch.Tensor,
    topk_weights: torch.Tensor,
    buffer: SymmBuffer,
    num_tokens: int | torch.Tensor,
) -> None:
    """See ``portable.stage``. ``num_tokens`` on the device is clamped to the rows of ``x``."""
    state = _state(buffer)
    scale = buffer.input_global_scale
    on_device = isinstance(num_tokens, torch.Tensor)
    state.functions.comm_stage(
        state.view,
        x.data_ptr(),
        topk_idx.data_ptr(),
        topk_weights.data_ptr(),
        0 if scale is None or buffer.shape.activation_format == "bf16" else scale.data_ptr(),
        num_tokens.data_ptr() if isinstance(num_tokens, torch.Tensor) else 0,
        x.shape[0] if on_device else num_tokens,
        _stream(buffer),
    )


def dispatch(
    buffer: SymmBuffer, *, combine: str, recv_stats: torch.Tensor | None = None,
    columns: ColumnOrder = "plain",
) -> None:  # fmt: skip
    """See ``portable.dispatch``."""
    state = _state(buffer)
    state.functions.comm_dispatch(
        state.view,
        combine == "fast",
        columns == "by lane",
        0 if recv_stats is None else recv_stats.data_ptr(),
        0 if recv_stats is None else recv_stats.element_size(),
        _stream(buffer),
    )


def homes(buffer: SymmBuffer) -> torch.Tensor:
    """int64 [R]: where the rows of "exact" go, for an ``l2`` that stores them there itself. Filled
    by ``dispatch``."""
    return _state(buffer).row_home


def combine(
    y: torch.Tensor, buffer: SymmBuffer, *, combine: str, rows_are_home: bool = False
) -> None:
    """See ``portable.combine``; fills the tokens' rows of ``y`` with NaN where that would raise."""
    state = _state(buffer)
    state.functions.comm_combine(
        state.view, combine == "exact", rows_are_home, y.data_ptr(), y.shape[0], _stream(buffer)
    )


def flag_rounds(
    there: torch.Tensor, here: torch.Tensor, first: int, rounds: int, timeout_s: float
) -> None:
    """For measuring a flag: so many times in turn stores a number ``there``, from ``first`` on, and
    waits until as much has come ``here``. Where ``here`` is less than the last of them afterwards,
    the deadline passed.

    Args:
        there, here: int64 [1], of a peer's symmetric memory and of this GPU's.
    """
    library.load().comm_flag_rounds(
        there.data_ptr(),
        here.data_ptr(),
        first,
        rounds,
        round(timeout_s * 1e9),
        here.device.index,
        torch.cuda.current_stream(here.device).cuda_stream,
    )


def _state(buffer: SymmBuffer) -> CommState:
    state = buffer.kernel_state
    if not isinstance(state, CommState):
        raise ArgumentError(
            "buffer must have been made on a GPU that csrc's kernels serve; this one was made for "
            "the portable ones."
        )
    return state


def _stream(buffer: SymmBuffer) -> int:
    return int(torch.cuda.current_stream(buffer.device).cuda_stream)
