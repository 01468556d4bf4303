"""The arrows of the data path, one module per implementation, all with the same contracts.

``portable`` is torch on any device and says what each function means. ``cuda`` and ``cuda_sm100``
are csrc's grouped GEMMs, ``cuda_comm`` its stage, dispatch and combine.
"""

from __future__ import annotations

import importlib
import warnings
from functools import cache
from types import ModuleType
from typing import TYPE_CHECKING, Literal

import torch

from megamoe_ep.errors import ArgumentError, UnsupportedDeviceError

if TYPE_CHECKING:
    from megamoe_ep.shape import LayerShape
    from megamoe_ep.symm_buffer import KernelState, SymmBuffer, Workspace

WeightLayout = Literal["portable", "sm90", "sm100"]
# Of the rows that L1 and L2 read: as they are, or as megamoe_ep/prepack/sm90.py says.
ColumnOrder = Literal["plain", "by lane"]

_GEMM_MODULES = {"portable": "portable", "sm90": "cuda", "sm100": "cuda_sm100"}
_LAYOUT_OF_CAPABILITY: dict[tuple[int, int], WeightLayout] = {(9, 0): "sm90", (10, 0): "sm100"}


@cache
def weight_layout(device: torch.device) -> WeightLayout:
    """The weight layout of the fastest GEMMs that ``device`` and this installation have.

    Raises:
        UnsupportedDeviceError: ``device`` is neither a CPU nor a CUDA GPU.
    """
    if device.type == "cpu":
        return "portable"
    if device.type != "cuda":
        raise UnsupportedDeviceError(
            f"device must be 'cpu' or 'cuda': csrc's kernels serve Hopper (9.0) and Blackwell "
            f"(10.0), the portable ones every other GPU and the CPU; got '{device}'."
        )
    capability = torch.cuda.get_device_capability(device)
    layout = _LAYOUT_OF_CAPABILITY.get(capability)
    if layout is None:
        return "portable"
    if why := _module("library").why_unavailable(capability):
        warnings.warn(f"the portable kernels, which are slow, serve {device}: {why}", stacklevel=2)
        return "portable"
    return layout


def gemm_kernels(layout: WeightLayout) -> ModuleType:
    """The module whose ``l1`` and ``l2`` read weights in ``layout``, and rows with their columns in
    the order of its ``COLUMNS``; ``STORES_HOME`` says whether its ``l2`` takes ``homes``."""
    if layout not in _GEMM_MODULES:
        raise ArgumentError(
            f"the weights' layout must be 'portable', 'sm90' or 'sm100'; got {layout!r}. Make the "
            f"weights with transform_weights_for_nvfp4_mega_moe()."
        )
    return _module(_GEMM_MODULES[layout])


def exchange_kernels(device: torch.device) -> Literal["portable", "csrc"]:
    """Which ones ``comm_kernels`` gives; "portable" also where it raises."""
    return "csrc" if device.type == "cuda" and weight_layout(device) != "portable" else "portable"


def comm_kernels(device: torch.device) -> ModuleType:
    """The module whose ``stage``, ``dispatch`` and ``combine`` serve tensors on ``device``."""
    return _module("portable" if weight_layout(device) == "portable" else "cuda_comm")


def homes_of(buffer: SymmBuffer, layout: WeightLayout, combine: str) -> torch.Tensor | None:
    """Where ``l2`` of these kernels is to store its rows instead of in the workspace, or None.

    None for "fast", which adds rows up before it sends them, and for GEMMs that do not store at
    other ranks.
    """
    if combine != "exact" or not gemm_kernels(layout).STORES_HOME:
        return None
    homes: torch.Tensor = comm_kernels(buffer.device).homes(buffer)
    return homes


def open_kernel_state(buffer: SymmBuffer, comm_sms: int | None) -> KernelState | None:
    """What the kernels for ``buffer`` keep for it; None where they keep nothing."""
    module = comm_kernels(buffer.device)
    if not hasattr(module, "open_state"):
        return None
    state: KernelState = module.open_state(buffer, comm_sms)
    return state


def allocate_scratch(workspace: Workspace, shape: LayerShape, device: torch.device) -> None:
    """Lets the GEMMs for ``device`` allocate what they want beside the workspace, or note what to
    expect of it; those that want nothing are not asked."""
    module = gemm_kernels(weight_layout(device))
    if hasattr(module, "allocate_scratch"):
        module.allocate_scratch(workspace, shape)


@cache
def _module(name: str) -> ModuleType:
    return importlib.import_module(f"{__name__}.{name}")
