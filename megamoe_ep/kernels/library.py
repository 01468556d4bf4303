"""csrc's library: looked at once, loaded, or the reason why not. See docs/building.md."""

from __future__ import annotations

import hashlib
import shlex
from functools import cache
from pathlib import Path
from typing import Any

import torch

from megamoe_ep.errors import LibraryError

_PACKAGE = Path(__file__).resolve().parents[1]
_LIBRARY = _PACKAGE / "lib" / "libmegamoe_ep.so"
_SOURCES = ("csrc/**/*.cu", "csrc/**/*.cuh", "csrc/**/*.h", "csrc/**/*.hpp", "CMakeLists.txt")


def load() -> Any:
    """The library, as a module of tvm_ffi: its exported functions are its attributes.

    Raises:
        LibraryError: what ``why_unavailable`` says.
    """
    library, why = _open(_LIBRARY, _PACKAGE.parent)
    if why is not None:
        raise LibraryError(why)
    return library


def why_unavailable(capability: tuple[int, int] | None = None) -> str | None:
    """Why csrc's kernels cannot be used, in a sentence that says what to do; None if they can.

    Args:
        capability: of the GPU that they are to run on, as (9, 0); None: of no matter which.
    """
    library, why = _open(_LIBRARY, _PACKAGE.parent)
    if why is not None or capability is None:
        return why
    wanted, served = "{}{}a".format(*capability), str(library.architectures()).split(",")
    if wanted in served:
        return None
    return (
        f"csrc's library {_LIBRARY} was built for sm_{', sm_'.join(served)}, not for this GPU's "
        f"sm_{wanted}. {_how_to_build(_PACKAGE.parent)}"
    )


def source_hash(root: Path) -> str | None:
    """The hash of csrc under ``root``, as CMakeLists.txt computes it; None where no csrc is."""
    if not (root / "csrc").is_dir():
        return None
    paths = sorted(path.relative_to(root).as_posix() for p in _SOURCES for path in root.glob(p))
    sums = [f"{hashlib.sha256((root / path).read_bytes()).hexdigest()}  {path}\n" for path in paths]
    return hashlib.sha256("".join(sums).encode()).hexdigest()


@cache
def _open(path: Path, root: Path) -> tuple[Any, str | None]:
    """The library and None, or None and why not."""
    if not path.exists():
        return None, f"csrc's library {path} has not been built. {_how_to_build(root)}"
    try:
        import tvm_ffi
    except ImportError as error:
        return None, (
            f"csrc's library needs tvm_ffi, which does not import ({error}): "
            f"pip install 'megamoe_ep[cuda]'."
        )
    try:
        library = tvm_ffi.load_module(str(path))
        built_from = str(library.source_hash())
    except (OSError, RuntimeError, AttributeError) as error:
        return None, f"csrc's library {path} does not load: {error}. {_how_to_build(root)}"
    here = source_hash(root)
    if here not in (None, built_from):
        return None, (
            f"csrc's library {path} is stale: it was built from other sources (hash "
            f"{built_from[:12]}) than those beside it ({str(here)[:12]}). {_how_to_build(root)}"
        )
    return library, None


def _how_to_build(root: Path) -> str:
    if not (root / "csrc").is_dir():
        return (
            "Install megamoe_ep from its sources where nvcc and the GPU are, or with "
            "--config-settings=cmake.define.MEGAMOE_CUDA=ON."
        )
    option = "AUTO" if torch.cuda.is_available() else "ON"
    source, build = shlex.quote(str(root)), shlex.quote(str(root / "build"))
    return (
        f"Build it with: cmake -G Ninja -S {source} -B {build} -DMEGAMOE_CUDA={option} && "
        f"cmake --build {build}"
    )
