"""scikit-build-core, and what only a build of csrc needs on top of it."""

from __future__ import annotations

import shutil
import tomllib
from pathlib import Path

from scikit_build_core import build as _build
from scikit_build_core.build import build_editable, build_sdist, build_wheel

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
]

Settings = dict[str, str | list[str]] | None

get_requires_for_build_sdist = _build.get_requires_for_build_sdist


def get_requires_for_build_wheel(settings: Settings = None) -> list[str]:
    return _build.get_requires_for_build_wheel(settings) + _for_csrc(settings)


def get_requires_for_build_editable(settings: Settings = None) -> list[str]:
    return _build.get_requires_for_build_editable(settings) + _for_csrc(settings)


def _for_csrc(settings: Settings) -> list[str]:
    """The extra "cuda-build" where CMakeLists.txt may go on to build csrc."""
    option = (settings or {}).get("cmake.define.MEGAMOE_CUDA", "AUTO")
    likely = shutil.which("nvidia-smi") and (
        shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    )
    if option != "ON" and not (option == "AUTO" and likely):
        return []
    project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
    return list(project["optional-dependencies"]["cuda-build"])
