"""Experts' weights: from an NVFP4 checkpoint on disk to the layout the kernels read.

Checkpoints are safetensors as NVIDIA ModelOpt or compressed-tensors write them, one expert's
projection after another. The two differ in names and in the sense of the global scales:

    ModelOpt              weight         weight_scale   weight_scale_2        input_scale
    compressed-tensors    weight_packed  weight_scale   weight_global_scale   input_global_scale

ModelOpt's global scales, amax / (6 * 448), multiply, like all of this package's;
compressed-tensors', 6 * 448 / amax, divide, and are inverted on reading.
"""

from __future__ import annotations

import importlib
import json
import math
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple, get_args

import torch
from safetensors.torch import save_file

from megamoe_ep import nvfp4
from megamoe_ep.errors import ArgumentError, CheckpointError
from megamoe_ep.kernels import WeightLayout, weight_layout
from megamoe_ep.prepack import MAX_EXPERTS


@dataclass(frozen=True)
class CheckpointExperts:
    """A contiguous range of one layer's experts, as checkpoints hold them: L experts, stacked.

    Every global scale multiplies. Rows of ``w13`` are gate, then up.
    """

    w13: torch.Tensor  # uint8 [L, 2I, H/2], two E2M1 codes a byte
    w13_scale: torch.Tensor  # float8_e4m3fn [L, 2I, H/16]
    w13_scale_2: torch.Tensor  # fp32 [L, 2], global scales of gate and of up
    w2: torch.Tensor  # uint8 [L, H, I/2]
    w2_scale: torch.Tensor  # float8_e4m3fn [L, H, I/16]
    w2_scale_2: torch.Tensor  # fp32 [L]
    w13_input_scale: torch.Tensor | None = None  # fp32 [L], static global scale of x
    w2_input_scale: torch.Tensor | None = None  # fp32 [L], static global scale of h
    first_expert: int = 0  # id in the layer of the first of them

    @property
    def num_experts(self) -> int:
        return self.w13.shape[0]

    @property
    def hidden_size(self) -> int:
        return self.w2.shape[1]

    @property
    def intermediate_size(self) -> int:
        return self.w13.shape[1] // 2


@dataclass(frozen=True)
class KernelWeights:
    """One GEMM's weights of all local experts, as the kernels of ``layout`` read them.

    "portable" is the checkpoint's own layout; the others are said in ``megamoe_ep.prepack``.
    """

    layout: WeightLayout
    codes: torch.Tensor  # portable: uint8 [num_experts, n, k/2]
    scales: torch.Tensor  # portable: float8_e4m3fn [num_experts, n, k/16]
    num_experts: int
    n: int  # outputs; 2I for L1, whose rows are gate, then up
    k: int
    gated: bool  # L1


def transform_weights_for_nvfp4_mega_moe(
    l1: tuple[torch.Tensor, torch.Tensor],
    l2: tuple[torch.Tensor, torch.Tensor],
    *,
    device: torch.device | str | None = None,
    layout: WeightLayout | None = None,
    nvfp4_activations: bool = True,
) -> tuple[KernelWeights, KernelWeights]:
    """Brings the experts' weights from checkpoint layout to the kernels', once, at load.

    Args:
        l1: codes uint8 [L, 2I, H/2] and block scales float8_e4m3fn [L, 2I, H/16]; gate rows, then
            up rows.
        l2: codes uint8 [L, H, I/2] and block scales float8_e4m3fn [L, H, I/16].
        device: where the layer will run; None: where ``l1``'s codes are.
        layout: None takes the fastest that ``device`` has kernels for. Those of csrc serve sizes
            that are multiples of ``prepack``'s SIZE_MULTIPLE (128 on Hopper), and at most its
            MAX_EXPERTS of a rank; others are left "portable", with a warning.
        nvfp4_activations: rows come in NVFP4 and h is to be requantised with a static scale, as
            csrc's kernels for Blackwell demand; where that is False they leave the layer to the
            portable ones. Hopper's serve both.

    Returns:
        Weights of L1 and of L2. In "portable" layout they share memory with the arguments that are
        on ``device`` already.

    Raises:
        ArgumentError: a tensor has another dtype or shape than said here, or there is no such
            layout.
        UnsupportedDeviceError: ``device`` is neither a CPU nor a CUDA GPU.
    """
    if layout is not None and layout not in get_args(WeightLayout):
        raise ArgumentError(
            f"layout must be one of {', '.join(map(repr, get_args(WeightLayout)))}, or None; got "
            f"{layout!r}."
        )
    _check_matrix(*l1, "l1")
    _check_matrix(*l2, "l2")
    experts, n1, _ = l1[0].shape
    hidden, intermediate = 2 * l1[0].shape[2], n1 // 2
    if n1 % 2 or tuple(l2[0].shape) != (experts, hidden, intermediate // 2):
        raise ArgumentError(
            f"l1 and l2 must be the two projections of one layer, codes [L, 2I, H/2] and "
            f"[L, H, I/2]; got {list(l1[0].shape)} and {list(l2[0].shape)}."
        )
    target = torch.device(device) if device is not None else l1[0].device
    if layout is None:
        layout = _layout_for(target, experts, hidden, intermediate, nvfp4_activations)
    return _to_layout(*l1, target, layout, gated=True), _to_layout(*l2, target, layout, gated=False)


def _layout_for(
    device: torch.device, experts: int, hidden: int, intermediate: int, nvfp4_activations: bool
) -> WeightLayout:
    layout = weight_layout(device)
    if layout == "portable":
        return layout
    multiple = importlib.import_module(f"megamoe_ep.prepack.{layout}").SIZE_MULTIPLE
    if hidden % multiple or intermediate % multiple:
        why = (
            f"csrc's need a hidden and an intermediate size that are multiples of {multiple}; got "
            f"{hidden} and {intermediate}"
        )
    elif experts > MAX_EXPERTS:
        why = f"csrc's serve at most {MAX_EXPERTS} experts of a rank; got {experts}"
    elif layout == "sm100" and not nvfp4_activations:
        why = "csrc's for Blackwell need 'nvfp4' activations and a static scale for h"
    else:
        return layout
    warnings.warn(f"the portable kernels, which are slow, serve this layer: {why}.", stacklevel=3)
    return "portable"


def _to_layout(
    codes: torch.Tensor,
    scales: torch.Tensor,
    device: torch.device,
    layout: WeightLayout,
    *,
    gated: bool,
) -> KernelWeights:
    experts, n, half_k = codes.shape
    codes, scales = codes.to(device).contiguous(), scales.to(device).contiguous()
    if layout != "portable":
        module = importlib.import_module(f"megamoe_ep.prepack.{layout}")
        codes, scales = module.pack(codes, scales, gated=gated)
    return KernelWeights(layout, codes, scales, experts, n, 2 * half_k, gated)


def _check_matrix(codes: torch.Tensor, scales: torch.Tensor, name: str) -> None:
    if codes.dtype != torch.uint8:
        raise ArgumentError(f"{name}'s codes must be uint8, two a byte; got {codes.dtype}.")
    if scales.dtype != torch.float8_e4m3fn:
        raise ArgumentError(f"{name}'s block scales must be float8_e4m3fn; got {scales.dtype}.")
    if codes.ndim != 3 or codes.shape[-1] % (nvfp4.BLOCK // 2):
        raise ArgumentError(
            f"{name}'s codes must have shape [L, N, K/2] with K a multiple of {nvfp4.BLOCK}; got "
            f"{list(codes.shape)}."
        )
    expected = [*codes.shape[:2], codes.shape[2] // (nvfp4.BLOCK // 2)]
    if list(scales.shape) != expected:
        raise ArgumentError(
            f"{name}'s block scales must have shape {expected}, one for every {nvfp4.BLOCK} "
            f"weights; got {list(scales.shape)}."
        )


# Checkpoints


class LayerSize(NamedTuple):
    """What a checkpoint says of one MoE layer before any of its data is read."""

    num_experts: int
    hidden_size: int
    intermediate_size: int


def describe_layer(path: str | Path, layer: int | str) -> LayerSize:
    """Size of a layer in a checkpoint; reads the files' headers and no data.

    Every tensor of every expert is checked for presence, dtype, shape and length, so that of ranks
    that each read their own experts afterwards either all or none find a fault.

    Args:
        path: a safetensors file, or a folder with ``model.safetensors.index.json`` or with one such
            file.
        layer: index K of the layer, whose tensors are named ``...layers.K...experts.E.``; or, where
            several layers bear that number, the name up to and with ``experts``.

    Raises:
        CheckpointError: a file or tensor is missing, truncated, or of another dtype or shape; the
            message names both.
    """
    found = _Layer.find(path, layer)
    size = found.size(0)
    for expert in range(size.num_experts):
        for _ in found.tensors(expert, size):
            pass
    return size


def read_modelopt_experts(
    path: str | Path,
    layer: int | str,
    experts: range,
    device: torch.device | str = "cpu",
) -> CheckpointExperts:
    """Reads some experts of a layer; of the others not a byte, nor the files that hold only them.

    The input scale of L1 is the larger of gate's and up's, which share their input. Input scales
    are None where no expert of the layer has any.

    Args:
        path, layer: see ``describe_layer``.
        experts: ids of consecutive experts.
        device: where the tensors shall be; data goes there matrix by matrix.

    Raises:
        CheckpointError: see ``describe_layer``; or a scale is NaN, infinite or negative.
        ArgumentError: ``experts`` is not a part of the layer's.
    """
    found = _Layer.find(path, layer)
    if experts.step != 1 or not 0 <= experts.start < experts.stop <= found.num_experts:
        raise ArgumentError(
            f"experts must be consecutive ids within 0 to {found.num_experts - 1}, the layer's; "
            f"got {experts}."
        )
    size = found.size(experts.start)
    count, hidden, inter = len(experts), size.hidden_size, size.intermediate_size

    def empty(dtype: torch.dtype, *shape: int) -> torch.Tensor:
        return torch.empty(count, *shape, dtype=dtype, device=device)

    w13 = empty(torch.uint8, 2 * inter, hidden // 2)
    w13_scale = empty(torch.float8_e4m3fn, 2 * inter, hidden // nvfp4.BLOCK)
    w2 = empty(torch.uint8, hidden, inter // 2)
    w2_scale = empty(torch.float8_e4m3fn, hidden, inter // nvfp4.BLOCK)
    codes = {"gate": w13[:, :inter], "up": w13[:, inter:], "down": w2}
    scales = {"gate": w13_scale[:, :inter], "up": w13_scale[:, inter:], "down": w2_scale}
    matrices = {"codes": codes, "scales": scales}
    numbers: dict[tuple[str, str], list[float]] = {}
    reciprocal = found.convention.reciprocal
    for row, expert in enumerate(experts):
        for projection, part, tensor in found.tensors(expert, size):
            if part in matrices:
                tensor.read_into(matrices[part][projection][row])
            else:
                zero_allowed = part == "global_scale"  # of a matrix of zeros
                number = tensor.read_number(reciprocal=reciprocal, zero_allowed=zero_allowed)
                numbers.setdefault((projection, part), []).append(number)

    def fp32(projection: str, part: str) -> torch.Tensor:
        return torch.tensor(numbers[projection, part], device=device)

    w13_input_scale, w2_input_scale = None, None
    if ("gate", "input_scale") in numbers:
        w13_input_scale = torch.maximum(fp32("gate", "input_scale"), fp32("up", "input_scale"))
    if ("down", "input_scale") in numbers:
        w2_input_scale = fp32("down", "input_scale")
    return CheckpointExperts(
        w13=w13,
        w13_scale=w13_scale,
        w13_scale_2=torch.stack((fp32("gate", "global_scale"), fp32("up", "global_scale")), dim=1),
        w2=w2,
        w2_scale=w2_scale,
        w2_scale_2=fp32("down", "global_scale"),
        w13_input_scale=w13_input_scale,
        w2_input_scale=w2_input_scale,
        first_expert=experts.start,
    )


def random_experts(
    num_experts: int,
    hidden_size: int,
    intermediate_size: int,
    *,
    seed: int = 0,
    static_input_scales: bool = True,
) -> CheckpointExperts:
    """Experts with normal weights of variance 1/K, quantised as ModelOpt does, on the CPU.

    With unit normal inputs, gate and up are of about unit size. The static input scales come from
    64 such inputs, like a calibration's. Expert e is the same whatever ``num_experts`` is.
    """
    w13, w13_scale, w13_scale_2, w13_input_scale = [], [], [], []
    w2, w2_scale, w2_scale_2, w2_input_scale = [], [], [], []
    for expert in range(num_experts):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + expert)
        x = torch.randn(64, hidden_size, generator=generator)
        matrices = []
        for n, k in ((intermediate_size, hidden_size),) * 2 + ((hidden_size, intermediate_size),):
            weight = torch.randn(n, k, generator=generator) / math.sqrt(k)
            scale = nvfp4.global_scale_from_amax(weight.abs().amax())
            matrices.append(nvfp4.quantize(weight, scale))
        gate, up, down = matrices
        products = [x @ nvfp4.dequantize(*matrix).t() for matrix in (gate, up)]
        h = torch.nn.functional.silu(products[0]) * products[1]
        w13.append(torch.cat((gate.codes, up.codes)))
        w13_scale.append(torch.cat((gate.scales, up.scales)))
        w13_scale_2.append(torch.stack((gate.global_scale, up.global_scale)))
        w13_input_scale.append(nvfp4.global_scale_from_amax(x.abs().amax()))
        w2.append(down.codes)
        w2_scale.append(down.scales)
        w2_scale_2.append(down.global_scale)
        w2_input_scale.append(nvfp4.global_scale_from_amax(h.abs().amax()))
    return CheckpointExperts(
        w13=torch.stack(w13),
        w13_scale=torch.stack(w13_scale),
        w13_scale_2=torch.stack(w13_scale_2),
        w2=torch.stack(w2),
        w2_scale=torch.stack(w2_scale),
        w2_scale_2=torch.stack(w2_scale_2),
        w13_input_scale=torch.stack(w13_input_scale) if static_input_scales else None,
        w2_input_scale=torch.stack(w2_input_scale) if static_input_scales else None,
    )


def write_modelopt_checkpoint(
    path: str | Path, layer: int, experts: CheckpointExperts, *, num_files: int = 1
) -> None:
    """Writes one layer's experts into folder ``path``, as ModelOpt exports a model.

    Tensors are named ``model.layers.{layer}.mlp.experts.{e}.{gate,up,down}_proj.``, e from
    ``experts.first_expert`` on.

    Args:
        path: folder, made if need be; files of the same names are overwritten.
        num_files: over how many files the experts are spread; with more than one an index is
            written.
    """
    if not 1 <= num_files <= experts.num_experts:
        raise ArgumentError(
            f"num_files must be 1 to {experts.num_experts}, the number of experts; got {num_files}."
        )
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    weight_map = {}
    for i in range(num_files):
        first, last = (experts.num_experts * j // num_files for j in (i, i + 1))
        tensors: dict[str, torch.Tensor] = {}
        for row in range(first, last):
            prefix = f"model.layers.{layer}.mlp.experts.{experts.first_expert + row}"
            for projection, parts in _projections_of(experts, row).items():
                for part, value in parts.items():
                    tensors[f"{prefix}.{projection}.{part}"] = value.cpu().contiguous()
        file = _SINGLE_FILE if num_files == 1 else f"model-{i + 1:05}-of-{num_files:05}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, file))
    if len(list(folder.glob("*.safetensors"))) > 1:  # some perhaps of an earlier checkpoint
        nbytes = sum((folder / file).stat().st_size for file in set(weight_map.values()))
        index = {"metadata": {"total_size": nbytes}, "weight_map": weight_map}
        (folder / _INDEX_FILE).write_text(json.dumps(index, indent=2))
    else:
        (folder / _INDEX_FILE).unlink(missing_ok=True)
    quantization = {"quant_algo": "NVFP4", "kv_cache_quant_algo": None, "group_size": nvfp4.BLOCK}
    about = {"producer": {"name": "megamoe_ep"}, "quantization": quantization}
    (folder / "hf_quant_config.json").write_text(json.dumps(about, indent=2))


def _projections_of(experts: CheckpointExperts, row: int) -> dict[str, dict[str, torch.Tensor]]:
    gate_codes, up_codes = experts.w13[row].chunk(2)
    gate_scales, up_scales = experts.w13_scale[row].chunk(2)
    gate_scale_2, up_scale_2 = experts.w13_scale_2[row]
    result = {}
    for name, codes, scales, scale_2, input_scale in (
        ("gate_proj", gate_codes, gate_scales, gate_scale_2, experts.w13_input_scale),
        ("up_proj", up_codes, up_scales, up_scale_2, experts.w13_input_scale),
        ("down_proj", experts.w2[row], experts.w2_scale[row], experts.w2_scale_2[row],
         experts.w2_input_scale),
    ):  # fmt: skip
        result[name] = {"weight": codes, "weight_scale": scales, "weight_scale_2": scale_2}
        if input_scale is not None:
            # A copy: safetensors refuses tensors that share memory.
            result[name]["input_scale"] = input_scale[row].clone()
    return result


_SINGLE_FILE = "model.safetensors"
_INDEX_FILE = "model.safetensors.index.json"
_DTYPES = {"U8": torch.uint8, "F8_E4M3": torch.float8_e4m3fn, "F32": torch.float32}
_MAX_HEADER = 100_000_000  # bytes, safetensors' own bound
_EXPERT_TENSOR = re.compile(
    r"(?P<prefix>.+)\.(?P<expert>\d+)\."
    r"(?P<kind>(?:gate_proj|up_proj|down_proj|w1|w2|w3)\.\w+)"
)


class _Convention(NamedTuple):
    """How a writer of checkpoints names a projection's tensors."""

    codes: str
    global_scale: str
    input_scale: str
    reciprocal: bool  # global scales divide


_MODELOPT = _Convention("weight", "weight_scale_2", "input_scale", False)
_COMPRESSED_TENSORS = _Convention(
    "weight_packed", "weight_global_scale", "input_global_scale", True
)


class _Entry(NamedTuple):
    """One tensor of a safetensors header; start and end in bytes from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


class _Tensor(NamedTuple):
    """One tensor of a file, of which name, dtype, shape and length have been checked."""

    name: str
    file: Path
    start: int

    def read_into(self, destination: torch.Tensor) -> None:
        """Fills a contiguous tensor; block scales must be numbers, and not negative."""
        memory = destination
        if destination.device.type != "cpu":
            memory = torch.empty_like(destination, device="cpu")
        flat = memory.view(-1).view(torch.uint8)
        self._read(flat.numpy().data)
        if memory.dtype == torch.float8_e4m3fn and int(flat.max()) >= 0x7F:
            raise CheckpointError(
                f"{self} must hold block scales that are numbers and not negative; element "
                f"{int(flat.argmax())} is byte 0x{int(flat.max()):02X}. Is the file damaged?"
            )
        if memory is not destination:
            destination.copy_(memory)

    def read_number(self, *, reciprocal: bool, zero_allowed: bool) -> float:
        stored = torch.empty(1)
        self._read(stored.view(torch.uint8).numpy().data)
        value = float(stored.reciprocal() if reciprocal else stored)
        if not (0 < value < math.inf or (value == 0 and zero_allowed)):
            raise CheckpointError(
                f"{self} must be positive and finite; got {float(stored)}. Is the file damaged, or "
                f"was the expert never calibrated?"
            )
        return value

    def _read(self, memory: memoryview) -> None:
        with self.file.open("rb", buffering=0) as file:
            file.seek(self.start)
            done = 0
            while done < len(memory):
                got = file.readinto(memory[done:])
                if not got:
                    raise CheckpointError(f"{self} is truncated: the file ended while it was read.")
                done += got

    def __str__(self) -> str:
        return f"tensor '{self.name}' in '{self.file}'"


@dataclass(frozen=True)
class _Layer:
    """One layer's experts in a checkpoint, by name."""

    files: Mapping[str, Path]  # of every tensor of the checkpoint
    source: Path  # the index, or the one file
    prefix: str  # of the experts' names, up to and with "experts"
    num_experts: int
    projections: Mapping[str, str]  # gate, up, down: as the checkpoint calls them
    convention: _Convention
    kinds: frozenset[str]  # "gate_proj.weight" and so on, of any expert

    @classmethod
    def find(cls, path: str | Path, layer: int | str) -> _Layer:
        source = _source(Path(path))
        files, groups = _names(source, *_version(source))
        if isinstance(layer, str):
            wanted = [prefix for prefix in groups if prefix == layer]
        else:
            numbered = re.compile(rf"(.*\.)?layers\.{layer}\.(.*\.)?experts")
            wanted = [prefix for prefix in groups if numbered.fullmatch(prefix)]
        if not wanted:
            raise CheckpointError(
                f"'{source}' must hold tensors '...layers.{layer}...experts.<id>.<projection>."
                f"<tensor>', the projections called gate_proj, up_proj, down_proj or w1, w3, w2; "
                f"found none. Experts it has: {', '.join(groups) or 'none'}."
                if isinstance(layer, int)
                else f"'{source}' must hold tensors '{layer}.<id>.<projection>.<tensor>'; found "
                f"none. Experts it has: {', '.join(groups) or 'none'}."
            )
        if len(wanted) > 1:
            raise CheckpointError(
                f"'{source}' has several layers {layer}: {', '.join(wanted)}. Give one of these "
                f"names as layer."
            )
        ids, kinds = groups[wanted[0]]
        called = {kind.split(".")[0] for kind in kinds}
        names = ("w1", "w3", "w2") if called <= {"w1", "w2", "w3"} else (
            "gate_proj", "up_proj", "down_proj"
        )  # fmt: skip
        packed = any(kind.endswith(f".{_COMPRESSED_TENSORS.codes}") for kind in kinds)
        return cls(
            files,
            source,
            wanted[0],
            max(ids) + 1,
            dict(zip(("gate", "up", "down"), names, strict=True)),
            _COMPRESSED_TENSORS if packed else _MODELOPT,
            kinds,
        )

    def size(self, expert: int) -> LayerSize:
        """Of the layer, going by the shape of one expert's gate."""
        name = self._name(expert, "gate", self.convention.codes)
        file, entry = self._entry(name)
        if len(entry.shape) != 2 or entry.shape[0] % nvfp4.BLOCK or entry.shape[1] % 8:
            raise CheckpointError(
                f"tensor '{name}' in '{file}' must have shape [I, H/2], two codes a byte, I and H "
                f"multiples of {nvfp4.BLOCK}; got {list(entry.shape)}."
            )
        return LayerSize(self.num_experts, 2 * entry.shape[1], entry.shape[0])

    def tensors(self, expert: int, size: LayerSize) -> Iterator[tuple[str, str, _Tensor]]:
        """(projection, part, tensor) for all tensors of an expert, each checked."""
        for projection in ("gate", "up", "down"):
            n, k = size.intermediate_size, size.hidden_size
            if projection == "down":
                n, k = k, n
            names = self.convention
            yield (
                projection,
                "codes",
                self._tensor(expert, projection, names.codes, "U8", (n, k // 2)),
            )
            yield (
                projection,
                "scales",
                self._tensor(expert, projection, "weight_scale", "F8_E4M3", (n, k // nvfp4.BLOCK)),
            )
            yield (
                projection,
                "global_scale",
                self._tensor(expert, projection, names.global_scale, "F32", ()),
            )
            # Gate and up have one input, so one of them with a static scale calls for the other's.
            siblings = ("down",) if projection == "down" else ("gate", "up")
            if any(f"{self.projections[p]}.{names.input_scale}" in self.kinds for p in siblings):
                yield (
                    projection,
                    "input_scale",
                    self._tensor(expert, projection, names.input_scale, "F32", ()),
                )

    def _name(self, expert: int, projection: str, tensor: str) -> str:
        return f"{self.prefix}.{expert}.{self.projections[projection]}.{tensor}"

    def _entry(self, name: str) -> tuple[Path, _Entry]:
        if name not in self.files:
            raise CheckpointError(
                f"tensor '{name}' is missing from '{self.source}'. Is the checkpoint complete, and "
                f"this layer quantised to NVFP4?"
            )
        file = self.files[name]
        header = _header(file, *_version(file))
        if name not in header:
            raise CheckpointError(
                f"tensor '{name}' is missing from '{file}', where '{self.source}' says it is."
            )
        return file, header[name]

    def _tensor(
        self, expert: int, projection: str, tensor: str, dtype: str, shape: tuple[int, ...]
    ) -> _Tensor:
        name = self._name(expert, projection, tensor)
        file, entry = self._entry(name)
        what = f"tensor '{name}' in '{file}'"
        if entry.dtype != dtype:
            raise CheckpointError(
                f"{what} must be of dtype {dtype}; got {entry.dtype}. Is this layer quantised to "
                f"NVFP4?"
            )
        if entry.shape != shape and not (shape == () and entry.shape == (1,)):
            raise CheckpointError(f"{what} must have shape {list(shape)}; got {list(entry.shape)}.")
        nbytes = math.prod(shape) * _DTYPES[dtype].itemsize
        if entry.end - entry.start != nbytes:
            raise CheckpointError(
                f"{what} must take {nbytes} bytes; the file's header gives it "
                f"{entry.end - entry.start}. Write the file anew."
            )
        _, length = _version(file)
        if entry.end > length:
            raise CheckpointError(
                f"{what} is truncated: it ends at byte {entry.end}, the file at {length}. Copy or "
                f"download the file again."
            )
        return _Tensor(name, file, entry.start)


def _source(path: Path) -> Path:
    """The file that says which tensors a checkpoint has."""
    if path.is_file():
        return path
    if not path.is_dir():
        raise CheckpointError(f"no checkpoint at '{path}': there is no such file or folder.")
    if (path / _INDEX_FILE).is_file():
        return path / _INDEX_FILE
    files = sorted(path.glob("*.safetensors"))
    if len(files) != 1:
        raise CheckpointError(
            f"'{path}' must hold '{_INDEX_FILE}' or one safetensors file; it has "
            f"{len(files)} of those and no index."
        )
    return files[0]


def _version(file: Path) -> tuple[int, int]:
    """Time of the last change, and size in bytes."""
    try:
        status = file.stat()
    except (FileNotFoundError, ValueError):  # there can be none of that name
        raise CheckpointError(
            f"file {str(file)!r} is missing, though the checkpoint's index names it."
        ) from None
    return status.st_mtime_ns, status.st_size


@lru_cache(maxsize=8)
def _names(
    source: Path, _changed: int, _nbytes: int
) -> tuple[Mapping[str, Path], Mapping[str, tuple[frozenset[int], frozenset[str]]]]:
    """Each tensor's file; and by prefix of experts' names, their ids and kinds of tensors.

    A checkpoint names some 10**5 tensors, and a model's layers ask one after another.
    """
    if source.suffix == ".json":
        files = _index(source)
    else:
        files = dict.fromkeys(_header(source, *_version(source)), source)
    groups: dict[str, tuple[set[int], set[str]]] = {}
    for name in files:
        if match := _EXPERT_TENSOR.fullmatch(name):
            ids, kinds = groups.setdefault(match["prefix"], (set(), set()))
            ids.add(int(match["expert"]))
            kinds.add(match["kind"])
    return files, {prefix: (frozenset(i), frozenset(k)) for prefix, (i, k) in groups.items()}


def _index(source: Path) -> dict[str, Path]:
    try:
        weight_map = json.loads(source.read_bytes())["weight_map"]
        files = {name: Path(file) for name, file in weight_map.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"'{source}' must be JSON with a 'weight_map' from tensors to files; {error!r}."
        ) from None
    for name, file in files.items():
        if len(file.parts) != 1 or file.name == "..":
            raise CheckpointError(
                f"'{source}' must name files of its own folder; got '{file}' for tensor '{name}'."
            )
    return {name: source.parent / file for name, file in files.items()}


@lru_cache(maxsize=512)
def _header(file: Path, _changed: int, nbytes: int) -> Mapping[str, _Entry]:
    """The tensors of a safetensors file: 8 bytes of length, then as much JSON, then data."""
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if not 2 <= length <= min(nbytes - 8, _MAX_HEADER):
                raise ValueError(f"header of {length} bytes in a file of {nbytes}")
            described = json.loads(stream.read(length))
        described.pop("__metadata__", None)
        return {
            name: _Entry(
                about["dtype"],
                tuple(map(int, about["shape"])),
                8 + length + int(about["data_offsets"][0]),
                8 + length + int(about["data_offsets"][1]),
            )
            for name, about in described.items()
        }
    except (
        OSError, ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError,
    ) as error:  # fmt: skip
        raise CheckpointError(
            f"'{file}' must be a safetensors file; its header cannot be read: {error!r}. Is it "
            f"truncated, or a pointer of git-lfs?"
        ) from None
