"""What the tests of the SM100 path share."""

from __future__ import annotations

import ctypes
import importlib.util
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"


@pytest.fixture(scope="session")
def host(tmp_path_factory) -> ctypes.CDLL:
    """csrc's preparation of the GEMMs, and CUTLASS's layouts and reference, as functions here."""
    found = importlib.util.find_spec("cutlass_library")
    if shutil.which("nvcc") is None or found is None or found.submodule_search_locations is None:
        pytest.skip("needs nvcc and the headers of nvidia-cutlass")
    cutlass = Path(found.submodule_search_locations[0]) / "source"
    library = tmp_path_factory.mktemp("sm100") / "sm100.so"
    # CUTLASS names functions of the device in templates that the host never uses: -fpermissive. No
    # contraction, as csrc rounds multiplications and additions apart.
    flags = ["-std=c++20", "-O2", "-Xcompiler", "-fPIC,-fpermissive,-w,-ffp-contract=off"]
    includes = [f"-I{path}" for path in (CSRC, cutlass / "include", cutlass / "tools/util/include")]
    built = subprocess.run(
        ["nvcc", *flags, *includes, "-shared", "-o", str(library), str(HERE / "host/sm100.cpp")],
        capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    loaded = ctypes.CDLL(str(library))
    pointer, number, wide = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
    sizes = [wide, *[number] * 4]  # rows, experts, hidden, intermediate, SMs
    loaded.cutlass_offsets.argtypes = [number, number, number, pointer, pointer]
    loaded.cutlass_offsets.restype = wide
    loaded.our_offsets.argtypes = [number, number, pointer]
    loaded.our_offsets.restype = wide
    loaded.remap.argtypes = [pointer, number, number, pointer]
    loaded.recover_blocks.argtypes = [pointer, wide, pointer, pointer]
    loaded.scratch_bytes.argtypes = sizes
    loaded.scratch_bytes.restype = wide
    loaded.scratch_places.argtypes = [wide, *sizes, pointer]
    loaded.l1_accumulators.argtypes = [wide, *sizes, *[pointer] * 4]
    loaded.activate.argtypes = [number, number, *[pointer] * 5, ctypes.c_float, pointer]
    loaded.l2_output.argtypes = [wide, *sizes, *[pointer] * 6, number]
    return loaded
