"""Expert-parallel MoE layer for NVFP4 checkpoints: the public names."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megamoe_ep.bootstrap import Group
    from megamoe_ep.errors import MegaMoEError, PeerTimeoutError
    from megamoe_ep.moe import MegaMoE, nvfp4_mega_moe, stage_activation
    from megamoe_ep.symm_buffer import SymmBuffer, get_symm_buffer_for_nvfp4_mega_moe
    from megamoe_ep.weights import transform_weights_for_nvfp4_mega_moe

__version__ = "0.1.0"

_HOME = {
    "Group": "bootstrap",
    "MegaMoE": "moe",
    "MegaMoEError": "errors",
    "PeerTimeoutError": "errors",
    "SymmBuffer": "symm_buffer",
    "get_symm_buffer_for_nvfp4_mega_moe": "symm_buffer",
    "nvfp4_mega_moe": "moe",
    "stage_activation": "moe",
    "transform_weights_for_nvfp4_mega_moe": "weights",
}

__all__ = [
    "Group",
    "MegaMoE",
    "MegaMoEError",
    "PeerTimeoutError",
    "SymmBuffer",
    "get_symm_buffer_for_nvfp4_mega_moe",
    "nvfp4_mega_moe",
    "stage_activation",
    "transform_weights_for_nvfp4_mega_moe",
]


def __getattr__(name: str) -> Any:
    # torch takes a second to import: a name's module is loaded when the name is first used.
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
