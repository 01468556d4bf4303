"""csrc's library: what is said where it is missing, stale, broken or for another GPU.

A small library stands in for csrc's, so that this needs a C++ compiler and no nvcc.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megamoe_ep.errors import LibraryError
from megamoe_ep.kernels import library

ROOT = Path(__file__).parents[2]
STAND_IN = """
#include <tvm/ffi/tvm_ffi.h>
static tvm::ffi::String source_hash() { return HASH; }
static tvm::ffi::String architectures() { return "90a"; }
TVM_FFI_DLL_EXPORT_TYPED_FUNC(source_hash, source_hash);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(architectures, architectures);
"""

look = library._open.__wrapped__


@pytest.fixture
def root(tmp_path):
    """A tree as that of the sources."""
    (tmp_path / "a tree" / "csrc" / "comm").mkdir(parents=True)
    root = tmp_path / "a tree"
    (root / "csrc" / "main.cu").write_text("int a;\n")
    (root / "csrc" / "comm" / "rows.cuh").write_text("int b;\n")
    (root / "CMakeLists.txt").write_text("project(x)\n")
    return root


@pytest.fixture
def build(tmp_path):
    """Builds a library that says it was made from sources with this hash."""
    pytest.importorskip("tvm_ffi")
    if shutil.which("g++") is None:
        pytest.skip("needs g++")

    def flags(which: str) -> list[str]:
        command = [sys.executable, "-m", "tvm_ffi.config", which]
        return subprocess.check_output(command, text=True).split()

    def build(source_hash: str) -> Path:
        source, path = tmp_path / "stand_in.cpp", tmp_path / f"lib{source_hash[:8]}.so"
        source.write_text(STAND_IN)
        command = ["g++", "-shared", "-fPIC", *flags("--cxxflags"), f'-DHASH="{source_hash}"']
        subprocess.run([*command, "-o", str(path), str(source), *flags("--ldflags"),
                        *flags("--libs")], check=True, timeout=120)  # fmt: skip
        return path

    return build


def test_a_stale_library_is_refused_with_the_command_that_rebuilds_it(root, build):
    fresh = build(library.source_hash(root))
    loaded, why = look(fresh, root)
    assert why is None
    assert loaded.architectures() == "90a"

    (root / "csrc" / "comm" / "rows.cuh").write_text("int c;\n")
    loaded, why = look(fresh, root)
    assert loaded is None
    assert "is stale" in why
    assert f"cmake -G Ninja -S '{root}' -B '{root}/build' -DMEGAMOE_CUDA=" in why
    assert f"&& cmake --build '{root}/build'" in why


def test_without_sources_beside_it_a_library_is_taken_as_it_is(tmp_path, build):
    loaded, why = look(build("0" * 64), tmp_path)
    assert why is None
    assert loaded.source_hash() == "0" * 64


def test_a_missing_library_is_explained(root, tmp_path):
    loaded, why = look(root / "libmegamoe_ep.so", root)
    assert loaded is None
    assert "libmegamoe_ep.so has not been built. Build it with: cmake -G Ninja -S" in why
    _, why = look(tmp_path / "libmegamoe_ep.so", tmp_path)
    assert "has not been built. Install megamoe_ep from its sources" in why


def test_a_broken_library_is_explained(root):
    pytest.importorskip("tvm_ffi")
    path = root / "libmegamoe_ep.so"
    path.write_bytes(b"\x7fELF, cut short")
    loaded, why = look(path, root)
    assert loaded is None
    assert "does not load: " in why
    assert "Build it with: cmake" in why


def test_load_raises_what_why_unavailable_says(monkeypatch, root):
    monkeypatch.setattr(library, "_LIBRARY", root / "none.so")
    why = library.why_unavailable()
    with pytest.raises(LibraryError) as raised:
        library.load()
    assert str(raised.value) == why
    assert library.why_unavailable((9, 0)) == why


def test_a_library_for_another_gpu_is_explained(monkeypatch, root, build):
    monkeypatch.setattr(library, "_LIBRARY", build(library.source_hash(root)))
    monkeypatch.setattr(library, "_PACKAGE", root / "megamoe_ep")
    assert library.why_unavailable() is None
    assert library.why_unavailable((9, 0)) is None
    why = library.why_unavailable((10, 0))
    assert "was built for sm_90a, not for this GPU's sm_100a. Build it with: cmake" in why


@pytest.mark.parametrize("change", ["edit", "add", "remove", "rename", "edit the build"])
def test_any_change_of_the_sources_changes_their_hash(root, change):
    before = library.source_hash(root)
    if change == "edit":
        (root / "csrc" / "main.cu").write_text("int a; \n")
    elif change == "add":
        (root / "csrc" / "groups.h").write_text("")
    elif change == "remove":
        (root / "csrc" / "comm" / "rows.cuh").unlink()
    elif change == "rename":
        (root / "csrc" / "main.cu").rename(root / "csrc" / "comm" / "main.cu")
    else:
        (root / "CMakeLists.txt").write_text("project(y)\n")
    assert library.source_hash(root) != before
    (root / "README.md").write_text("not built")


def test_cmake_computes_the_same_hash(tmp_path):
    """Configured only, from a copy: whatever has been built or edited since does not matter."""
    for command in ("cmake", "ninja", "nvcc"):
        if shutil.which(command) is None:
            pytest.skip(f"needs {command}")
    for package in ("tvm_ffi", "cutlass_library"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs {package}: pip install 'megamoe_ep[cuda-build]'")
    shutil.copy(ROOT / "CMakeLists.txt", tmp_path)
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    build = tmp_path / "build"
    command = ["cmake", "-G", "Ninja", "-S", str(tmp_path), "-B", str(build), "-DMEGAMOE_CUDA=ON"]
    done = subprocess.run(
        [*command, f"-DPython_EXECUTABLE={sys.executable}"],
        capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = re.findall(r"MEGAMOE_SOURCE_HASH=\\\"(\w+)", (build / "build.ninja").read_text())
    assert found == [library.source_hash(tmp_path)]
