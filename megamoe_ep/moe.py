"""The expert-parallel MoE layer: stage, dispatch, L1, L2, combine, in this order and no other."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import torch

from megamoe_ep import compiled
from megamoe_ep import weights as weight_files
from megamoe_ep.errors import ArgumentError, LayerMismatchError
from megamoe_ep.kernels import comm_kernels, gemm_kernels, homes_of
from megamoe_ep.symm_buffer import SymmBuffer, get_symm_buffer_for_nvfp4_mega_moe
from megamoe_ep.timing import PhaseTimer, phase
from megamoe_ep.weights import (
    CheckpointExperts,
    KernelWeights,
    transform_weights_for_nvfp4_mega_moe,
)

if TYPE_CHECKING:
    from megamoe_ep.shape import ActivationFormat

CombineMode = Literal["exact", "fast"]
_ALIGNMENT = 16  # bytes


def stage_activation(
    x: torch.Tensor,
    topk_idx: torch.Tensor,
    topk_weights: torch.Tensor,
    buffer: SymmBuffer,
    num_tokens: int | torch.Tensor | None = None,
    *,
    timer: PhaseTimer | None = None,
) -> None:
    """Puts this rank's tokens for the next call into symmetric memory, in one pass over ``x``.

    In "nvfp4" format a token is quantised with its own global scale, amax / (6 * 448), or with
    ``buffer.input_global_scale`` where that is set. A token that holds NaN or inf comes out as NaN
    and changes no other token.

    Args:
        x: bf16 [n, H], n at most max_num_tokens.
        topk_idx: int32 [n, K], ids of experts; -1 for none; an id may come twice.
        topk_weights: fp32 [n, K].
        buffer: the layer's buffer.
        num_tokens: how many of the n rows are tokens: None for all, an int, or an int32 tensor [1]
            on the device, read there, so that one CUDA graph serves any number.
        timer: measures "stage".

    Raises:
        ArgumentError: an argument has another dtype, shape, device or layout than said here, or an
            expert id is out of range. csrc's kernels find such an id on the GPU: they take it for
            -1, and the next ``buffer.check()`` raises.
        BufferDestroyedError, PeerTimeoutError: see ``SymmBuffer.check``.
    """
    buffer.check()
    shape = buffer.shape
    _check(x, "x", torch.bfloat16, (None, shape.hidden_size), buffer)
    for name, tensor in (("x", x), ("topk_weights", topk_weights)):
        if torch.is_grad_enabled() and isinstance(tensor, torch.Tensor) and tensor.requires_grad:
            raise ArgumentError(
                f"{name} must not require a gradient, since the layer has no backward; got one "
                f"that does. Call the layer under torch.no_grad() or torch.inference_mode()."
            )
    n = x.shape[0]
    if n > shape.max_num_tokens:
        raise ArgumentError(
            f"x must have at most max_num_tokens={shape.max_num_tokens} rows; got {n}. Create the "
            f"buffer with a larger max_num_tokens, or call the layer more often."
        )
    _check(topk_idx, "topk_idx", torch.int32, (n, shape.top_k), buffer)
    _check(topk_weights, "topk_weights", torch.float32, (n, shape.top_k), buffer)
    if isinstance(num_tokens, torch.Tensor):
        _check(num_tokens, "num_tokens", torch.int32, (1,), buffer)
    elif num_tokens is not None and not (isinstance(num_tokens, int) and 0 <= num_tokens <= n):
        raise ArgumentError(f"num_tokens must be 0 to {n}, the rows of x; got {num_tokens!r}.")
    scale = buffer.input_global_scale
    if scale is not None and shape.activation_format == "nvfp4":
        _check(scale, "buffer.input_global_scale", torch.float32, (1,), buffer)
    with phase("stage", buffer.device, timer):
        comm_kernels(buffer.device).stage(
            x, topk_idx, topk_weights, buffer, n if num_tokens is None else num_tokens
        )
    buffer.staged_rows = num_tokens if isinstance(num_tokens, int) else n


def nvfp4_mega_moe(
    y: torch.Tensor,
    l1_weights: KernelWeights,
    l2_weights: KernelWeights,
    buffer: SymmBuffer,
    *,
    l1_alpha: torch.Tensor,
    l2_alpha: torch.Tensor,
    l2_input_scale: torch.Tensor | None = None,
    activation_clamp: float | None = None,
    combine: CombineMode = "exact",
    cumulative_local_expert_recv_stats: torch.Tensor | None = None,
    timer: PhaseTimer | None = None,
) -> None:
    """The MoE layer over the tokens that every rank has staged; collective, with a deadline.

    For a token t with experts e_k and weights w_k::

        y[t] = bf16(sum over k of w_k * bf16(l2(h))),    h = silu(clamp(gate)) * clamp(up)

    Args:
        y: bf16 [n, H], at least as many rows as tokens were staged; further rows are not written.
        l1_weights: gate|up of this rank's experts, n = 2I, k = H.
        l2_weights: down of this rank's experts, n = H, k = I.
        buffer: holds the staged tokens.
        l1_alpha: fp32 [L, 2], global scales of the gate and of the up weights.
        l2_alpha: fp32 [L], global scale of the down weights, times ``l2_input_scale`` if given.
        l2_input_scale: fp32 [L], static global scale with which h is quantised to NVFP4; None
            leaves h in bf16, as "bf16" format must.
        activation_clamp: bounds gate from above, and up on both sides.
        combine: "exact": the same bits at every EP size; "fast": fewer bytes between ranks, and the
            same bits from run to run. Every rank gives the same.
        cumulative_local_expert_recv_stats: int32 or int64 [L]; the rows that each local expert
            received are added to it.
        timer: measures "dispatch", "l1", "l2" and "combine".

    Raises:
        ArgumentError: an argument has another dtype, shape, device or value than said here.
        BufferDestroyedError: the buffer was destroyed.
        PeerTimeoutError: a rank is missing; ``y`` is then not valid. csrc's kernels end in order on
            the GPU, and the next ``buffer.check()`` raises.
        LayerMismatchError: a rank gave another ``combine``; likewise.
    """
    buffer.check()
    _check_layer(y, l1_weights, l2_weights, buffer, l1_alpha, l2_alpha, l2_input_scale)
    if activation_clamp is not None and not activation_clamp > 0:
        raise ArgumentError(f"activation_clamp must be a positive number; got {activation_clamp}.")
    if combine not in get_args(CombineMode):
        raise ArgumentError(f"combine must be 'exact' or 'fast'; got {combine!r}.")
    stats = cumulative_local_expert_recv_stats
    if stats is not None:
        narrow = isinstance(stats, torch.Tensor) and stats.dtype == torch.int32
        dtype = torch.int32 if narrow else torch.int64
        name = "cumulative_local_expert_recv_stats"
        _check(stats, name, dtype, (buffer.shape.experts_per_rank,), buffer)

    comm, gemm, work = (
        comm_kernels(buffer.device),
        gemm_kernels(l1_weights.layout),
        buffer.workspace,
    )
    homes = homes_of(buffer, l2_weights.layout, combine)
    with phase("dispatch", buffer.device, timer):
        comm.dispatch(buffer, combine=combine, recv_stats=stats, columns=gemm.COLUMNS)
    with phase("l1", buffer.device, timer):
        gemm.l1(
            work.rows,
            work.row_scales,
            work.expert_offsets,
            l1_weights,
            l1_alpha,
            input_scale=l2_input_scale,
            clamp=activation_clamp,
            out=work.h,
        )
    with phase("l2", buffer.device, timer):
        gemm.l2(work.h, work.expert_offsets, l2_weights, l2_alpha, out=work.rows, homes=homes)
    with phase("combine", buffer.device, timer):
        comm.combine(y, buffer, combine=combine, rows_are_home=homes is not None)


def _check_layer(
    y: torch.Tensor,
    l1_weights: KernelWeights,
    l2_weights: KernelWeights,
    buffer: SymmBuffer,
    l1_alpha: torch.Tensor,
    l2_alpha: torch.Tensor,
    l2_input_scale: torch.Tensor | None,
) -> None:
    shape = buffer.shape
    _check(y, "y", torch.bfloat16, (None, shape.hidden_size), buffer)
    if y.shape[0] < buffer.staged_rows:
        raise ArgumentError(
            f"y must have a row for each of the {buffer.staged_rows} staged tokens; got "
            f"{list(y.shape)}."
        )
    local_experts, hidden, intermediate = (
        shape.experts_per_rank,
        shape.hidden_size,
        shape.intermediate_size,
    )
    for name, given, n, k in (
        ("l1_weights", l1_weights, 2 * intermediate, hidden),
        ("l2_weights", l2_weights, hidden, intermediate),
    ):
        if not isinstance(given, KernelWeights):
            raise ArgumentError(
                f"{name} must come from transform_weights_for_nvfp4_mega_moe(); got {type(given)}."
            )
        if (given.num_experts, given.n, given.k) != (local_experts, n, k):
            raise ArgumentError(
                f"{name} must be of {local_experts} local experts, each {n} x {k}; got "
                f"{given.num_experts} experts, each {given.n} x {given.k}."
            )
        if given.codes.device != buffer.device:
            raise ArgumentError(
                f"{name} must be on {buffer.device}, like buffer; got {given.codes.device}."
            )
    if l1_weights.layout != l2_weights.layout:
        raise ArgumentError(
            f"l1_weights and l2_weights must have the same layout; got {l1_weights.layout!r} and "
            f"{l2_weights.layout!r}. Transform both on one device."
        )
    _check(l1_alpha, "l1_alpha", torch.float32, (local_experts, 2), buffer)
    _check(l2_alpha, "l2_alpha", torch.float32, (local_experts,), buffer)
    if l2_input_scale is not None:
        _check(l2_input_scale, "l2_input_scale", torch.float32, (local_experts,), buffer)
        if shape.activation_format == "bf16":
            raise ArgumentError(
                "l2_input_scale must be None when activation_format is 'bf16', which leaves "
                "activations untouched; got a tensor. Then l2_alpha is the weight scale alone."
            )


def _check(
    tensor: torch.Tensor,
    name: str,
    dtype: torch.dtype,
    expected: tuple[int | None, ...],
    buffer: SymmBuffer,
) -> None:
    if not isinstance(tensor, torch.Tensor):
        raise ArgumentError(f"{name} must be a tensor; got {type(tensor).__name__}.")
    if tensor.dtype != dtype:
        raise ArgumentError(f"{name} must be {dtype}; got {tensor.dtype}. Convert it.")
    if tensor.ndim != len(expected) or any(
        size not in (None, given) for size, given in zip(expected, tensor.shape, strict=False)
    ):
        shape = ", ".join("n" if size is None else str(size) for size in expected)
        raise ArgumentError(f"{name} must have shape [{shape}]; got {list(tensor.shape)}.")
    if tensor.device != buffer.device:
        raise ArgumentError(f"{name} must be on {buffer.device}, like buffer; got {tensor.device}.")
    if not tensor.is_contiguous():
        raise ArgumentError(
            f"{name} must be contiguous; got strides {list(tensor.stride())} for shape "
            f"{list(tensor.shape)}. Call .contiguous() on it."
        )
    # Kernels read and write rows so many bytes at a time.
    if dtype == torch.bfloat16 and tensor.data_ptr() % _ALIGNMENT:
        raise ArgumentError(
            f"{name} must start at a multiple of {_ALIGNMENT} bytes; got a view that starts at "
            f"{tensor.data_ptr() % _ALIGNMENT} bytes past one. Call .clone() on it."
        )


class MegaMoE(torch.nn.Module):
    """One MoE layer, its local experts' weights and what it needs to run them.

    Made by ``from_checkpoint``, or by hand from transformed weights. Layers of one shape may share
    a buffer: they take turns.

    Args:
        l1_weights, l2_weights, l1_alpha, l2_alpha, l2_input_scale, activation_clamp, combine: see
            ``nvfp4_mega_moe``.
        buffer: symmetric memory of the layer's shape.
        input_global_scale: fp32 [1], static global scale of the layer's input; None: each token its
            own.
    """

    def __init__(
        self,
        l1_weights: KernelWeights,
        l2_weights: KernelWeights,
        buffer: SymmBuffer,
        *,
        l1_alpha: torch.Tensor,
        l2_alpha: torch.Tensor,
        l2_input_scale: torch.Tensor | None = None,
        input_global_scale: torch.Tensor | None = None,
        activation_clamp: float | None = None,
        combine: CombineMode = "exact",
    ) -> None:
        super().__init__()
        self.l1_weights = l1_weights
        self.l2_weights = l2_weights
        self.buffer = buffer
        # No buffers of the module: what casts or moves a whole model must leave these as they are.
        self.l1_alpha = l1_alpha
        self.l2_alpha = l2_alpha
        self.l2_input_scale = l2_input_scale
        self.input_global_scale = input_global_scale
        self.activation_clamp = activation_clamp
        self.combine: CombineMode = combine
        self._handle = compiled.register(self)
        self._order = compiled.order_of(buffer)

    def __deepcopy__(self, memo: object) -> MegaMoE:
        raise ArgumentError(
            "a MegaMoE cannot be copied: its memory is shared with the other ranks. Make another "
            "layer with from_checkpoint(..., buffer=layer.buffer)."
        )

    @classmethod
    def from_checkpoint(
        cls,
        path: str | Path,
        *,
        layer: int,
        max_num_tokens: int | None = None,
        top_k: int | None = None,
        group: object = None,
        buffer: SymmBuffer | None = None,
        activation_format: ActivationFormat = "nvfp4",
        activation_clamp: float | None = None,
        combine: CombineMode = "exact",
        device: torch.device | str | None = None,
        timeout_s: float = 60.0,
    ) -> MegaMoE:
        """Loads a layer of an NVFP4 checkpoint, as ModelOpt or compressed-tensors write it;
        collective over ``group``.

        A rank reads the bytes of its own experts only.

        Args:
            path: a safetensors file, or a folder with one or with ``model.safetensors.index.json``.
            layer: index of the layer in the model.
            max_num_tokens: the most tokens that one rank brings to one call.
            top_k: expert slots of a token.
            group: what ``Group.of`` takes; None for a lone process.
            buffer: another layer's of the same shape, to share; ``max_num_tokens``, ``top_k``,
                ``group`` and the rest are its, and left out.
            activation_format, device, timeout_s: see ``get_symm_buffer_for_nvfp4_mega_moe``.
            activation_clamp, combine: see ``nvfp4_mega_moe``.

        Raises:
            CheckpointError: a tensor is missing, truncated or mis-shaped; the message names it.
            ArgumentError: ``buffer`` is of another shape than the layer or what is given beside it;
                or neither it nor ``max_num_tokens`` and ``top_k`` are given.
        """
        size = weight_files.describe_layer(path, layer)
        shared = buffer is not None
        if buffer is None:
            if max_num_tokens is None or top_k is None:
                raise ArgumentError(
                    f"max_num_tokens and top_k must be given, unless buffer is; got "
                    f"{max_num_tokens} and {top_k}."
                )
            buffer = get_symm_buffer_for_nvfp4_mega_moe(
                group,
                size.num_experts,
                max_num_tokens,
                top_k,
                size.hidden_size,
                size.intermediate_size,
                activation_format=activation_format,
                device=device,
                timeout_s=timeout_s,
            )
        shape = buffer.shape
        wanted = {**size._asdict(), "max_num_tokens": max_num_tokens, "top_k": top_k}
        if any(
            getattr(shape, name) != value for name, value in wanted.items() if value is not None
        ):
            raise ArgumentError(
                f"buffer must be of the layer's shape, {wanted}; got one of {shape}. Share one "
                f"among layers of one shape only, or leave it out."
            )
        start = buffer.experts_start_idx
        try:
            experts = weight_files.read_modelopt_experts(
                path, layer, range(start, start + shape.experts_per_rank), device=buffer.device
            )
            return cls.from_experts(
                experts, buffer, activation_clamp=activation_clamp, combine=combine
            )
        except BaseException as error:
            if not shared:
                buffer.__exit__(type(error), error, error.__traceback__)
            raise

    @classmethod
    def from_experts(
        cls,
        experts: CheckpointExperts,
        buffer: SymmBuffer,
        *,
        activation_clamp: float | None = None,
        combine: CombineMode = "exact",
    ) -> MegaMoE:
        """The layer of this rank's ``experts``, in checkpoint format; collective over the buffer's
        group.

        In "nvfp4" format static input scales are used where the checkpoint has them. The layer's
        input is quantised before it is known which experts see it, so their largest scale over all
        ranks serves all of them.

        Raises:
            LayerMismatchError: some ranks' experts have static input scales and others' have not,
                or the ranks gave different ``activation_clamp`` or ``combine``.
        """
        device = buffer.device
        in_nvfp4 = buffer.shape.activation_format == "nvfp4" and experts.w2_input_scale is not None
        l1_weights, l2_weights = transform_weights_for_nvfp4_mega_moe(
            (experts.w13, experts.w13_scale),
            (experts.w2, experts.w2_scale),
            device=device,
            nvfp4_activations=in_nvfp4,
        )
        input_global_scale, l2_input_scale = None, None
        l2_alpha = experts.w2_scale_2.to(device)
        mine = experts.w13_input_scale
        said = buffer.group.all_gather_object(
            (combine, activation_clamp, None if mine is None else float(mine.max())),
            timeout_s=buffer.timeout_s,
        )
        options = {rank: given for rank, (*given, _) in enumerate(said)}
        scales = [scale for *_, scale in said]
        if any(given != options[0] for given in options.values()):
            raise LayerMismatchError(
                f"every rank must give the same combine and activation_clamp; got {options} by "
                f"rank."
            )
        if buffer.shape.activation_format == "nvfp4":
            if any((scale is None) != (scales[0] is None) for scale in scales):
                raise LayerMismatchError(
                    f"either all ranks' experts have a static input scale or none; got the largest "
                    f"{dict(enumerate(scales))} by rank. Is the checkpoint complete?"
                )
            if scales[0] is not None:
                input_global_scale = torch.tensor([max(scales)], device=device)
            if experts.w2_input_scale is not None:
                l2_input_scale = experts.w2_input_scale.to(device)
                l2_alpha = l2_alpha * l2_input_scale
        return cls(
            l1_weights,
            l2_weights,
            buffer,
            l1_alpha=experts.w13_scale_2.to(device),
            l2_alpha=l2_alpha,
            l2_input_scale=l2_input_scale,
            input_global_scale=input_global_scale,
            activation_clamp=activation_clamp,
            combine=combine,
        )

    def forward(
        self,
        x: torch.Tensor,
        topk_idx: torch.Tensor,
        topk_weights: torch.Tensor,
        *,
        num_tokens: int | torch.Tensor | None = None,
        timer: PhaseTimer | None = None,
    ) -> torch.Tensor:
        """Output of the layer for this rank's tokens, bf16 [n, H]; arguments as
        ``stage_activation``'s. Rows past ``num_tokens`` hold nothing of meaning. torch.compile sees
        one operator, and no ``timer``."""
        if not torch.compiler.is_compiling():
            return self.run(x, topk_idx, topk_weights, num_tokens=num_tokens, timer=timer)
        on_device = isinstance(num_tokens, torch.Tensor)
        output: torch.Tensor = torch.ops.megamoe_ep.moe_layer(
            x,
            topk_idx,
            topk_weights,
            num_tokens if on_device else None,
            None if on_device else num_tokens,
            self._order,
            self._handle,
        )
        return output

    def run(
        self,
        x: torch.Tensor,
        topk_idx: torch.Tensor,
        topk_weights: torch.Tensor,
        *,
        num_tokens: int | torch.Tensor | None = None,
        timer: PhaseTimer | None = None,
    ) -> torch.Tensor:
        """What ``forward`` does, outside of torch.compile."""
        self.buffer.input_global_scale = self.input_global_scale
        stage_activation(x, topk_idx, topk_weights, self.buffer, num_tokens, timer=timer)
        y = torch.empty_like(x)
        nvfp4_mega_moe(
            y,
            self.l1_weights,
            self.l2_weights,
            self.buffer,
            l1_alpha=self.l1_alpha,
            l2_alpha=self.l2_alpha,
            l2_input_scale=self.l2_input_scale,
            activation_clamp=self.activation_clamp,
            combine=self.combine,
            timer=timer,
        )
        return y
