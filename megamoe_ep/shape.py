"""The shape of a layer over a group of ranks, and where each region lies in symmetric memory."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Literal, get_args

import torch

from megamoe_ep.errors import ArgumentError

ActivationFormat = Literal["nvfp4", "bf16"]

MAX_RANKS = 256  # the abort record names ranks in a mask of four 64-bit words
MAX_EXPERTS = 65536  # csrc/comm/offsets.cuh: an expert's rank in one multiplication
MAX_TOKENS = 2**21 - 1  # csrc/comm/offsets.cuh: what a flag counts
MAX_TOP_K = 32  # one lane of a warp per slot
MAX_DIMENSION = 65536  # portable.exact_matmul: every partial sum stays below 2**53
REGION_ALIGNMENT = 256  # bytes; a region starts on a fresh pair of cache lines


@dataclass(frozen=True)
class Region:
    """One named array inside the symmetric allocation: the same place on every rank."""

    offset: int  # bytes from the start of the allocation
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class LayerShape:
    """Sizes of one expert-parallel layer, equal on all ranks.

    Args:
        num_experts: E, experts of the layer over all ranks; a multiple of ``world_size``.
        max_num_tokens: T, the most tokens that one rank brings to one call.
        top_k: K, expert slots of a token, 1 to 32.
        hidden_size: H, a multiple of 16.
        intermediate_size: I, a multiple of 16.
        world_size: W, ranks of the group, 1 to 256.
        activation_format: "nvfp4" (activations are quantised before L1) or "bf16" (left alone).

    Raises:
        ArgumentError: a size is out of its range.
    """

    num_experts: int
    max_num_tokens: int
    top_k: int
    hidden_size: int
    intermediate_size: int
    world_size: int
    activation_format: ActivationFormat = "nvfp4"

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "activation_format":
                if value not in get_args(ActivationFormat):
                    raise ArgumentError(
                        f"activation_format must be 'nvfp4' or 'bf16'; got {value!r}."
                    )
            elif not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ArgumentError(
                    f"{field.name} must be an integer of at least 1; got {value!r}."
                )
        if self.world_size > MAX_RANKS:
            raise ArgumentError(
                f"group must have at most {MAX_RANKS} ranks; got {self.world_size}."
            )
        if self.num_experts > MAX_EXPERTS:
            raise ArgumentError(
                f"num_experts must be at most {MAX_EXPERTS}; got {self.num_experts}."
            )
        if self.num_experts % self.world_size:
            raise ArgumentError(
                f"num_experts must be a multiple of the number of ranks, so that every rank owns "
                f"as many; got {self.num_experts} experts on {self.world_size} ranks."
            )
        if self.max_num_tokens > MAX_TOKENS:
            raise ArgumentError(
                f"max_num_tokens must be at most {MAX_TOKENS}; got {self.max_num_tokens}. Call the "
                f"layer more often."
            )
        if self.top_k > MAX_TOP_K:
            raise ArgumentError(f"top_k must be at most {MAX_TOP_K}; got {self.top_k}.")
        for name in ("hidden_size", "intermediate_size"):
            value = getattr(self, name)
            if value % 16 or value > MAX_DIMENSION:
                raise ArgumentError(
                    f"{name} must be a multiple of 16 (one NVFP4 block) and at most "
                    f"{MAX_DIMENSION}; got {value}."
                )
        if self.max_rows >= 2**31:
            raise ArgumentError(
                f"max_num_tokens={self.max_num_tokens} with top_k={self.top_k} on "
                f"{self.world_size} ranks makes {self.max_rows} rows on one rank, more than a "
                f"32-bit index holds; lower max_num_tokens and call the layer more often."
            )

    @property
    def experts_per_rank(self) -> int:
        return self.num_experts // self.world_size

    @property
    def max_rows(self) -> int:
        """Rows that one rank's experts receive when every token of every rank goes there."""
        return self.world_size * self.max_num_tokens * self.top_k

    @cached_property
    def regions(self) -> dict[str, Region]:
        """Every region of a rank's symmetric allocation, by name.

        Inputs are written by this rank's ``stage``. Block ``s`` of a ``recv_`` region, and entry
        ``s`` of the flags and of ``abort``, is written by rank ``s`` alone. ``home_rows`` is where
        the experts' rows of this rank's tokens come back to.
        """
        w, t, k, h = self.world_size, self.max_num_tokens, self.top_k, self.hidden_size
        token: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        if self.activation_format == "nvfp4":
            token["x"] = ((h // 2,), torch.int8)
            token["x_sf"] = ((h // 16,), torch.float8_e4m3fn)
            token["x_scales"] = ((), torch.float32)
        else:
            token["x"] = ((h,), torch.bfloat16)
        token["topk_idx"] = ((k,), torch.int32)
        token["topk_weights"] = ((k,), torch.float32)

        plan = [(name, (t, *shape), dtype) for name, (shape, dtype) in token.items()]
        plan += [(f"recv_{name}", (w, t, *shape), dtype) for name, (shape, dtype) in token.items()]
        plan += [
            ("recv_token", (w, t), torch.int32),
            ("home_rows", (t * k, h), torch.bfloat16),
            ("num_tokens", (1,), torch.int32),
            ("epoch", (1,), torch.int64),
            ("dispatch_flags", (w,), torch.int64),
            ("combine_flags", (w,), torch.int64),
            ("progress", (1,), torch.int64),
            ("abort", (w, 8), torch.int64),
        ]
        regions = {}
        offset = 0
        for name, shape, dtype in plan:
            regions[name] = Region(offset, shape, dtype)
            offset += -(-regions[name].nbytes // REGION_ALIGNMENT) * REGION_ALIGNMENT
        return regions

    @cached_property
    def symmetric_nbytes(self) -> int:
        """Bytes of symmetric memory on each rank."""
        last = list(self.regions.values())[-1]
        return -(-(last.offset + last.nbytes) // REGION_ALIGNMENT) * REGION_ALIGNMENT

    @property
    def workspace_nbytes(self) -> int:
        """Bytes of ordinary device memory on each rank: rows, row scales, row slots, h, offsets."""
        per_row = 2 * self.hidden_size + 2 * self.intermediate_size + 4 + 4
        return self.max_rows * per_row + 4 * (self.experts_per_rank + 1)

    def tensors(self, memory: torch.Tensor) -> dict[str, torch.Tensor]:
        """Views of every region over ``memory``, uint8 [symmetric_nbytes]."""
        return {
            name: memory[r.offset : r.offset + r.nbytes].view(r.dtype).view(r.shape)
            for name, r in self.regions.items()
        }
