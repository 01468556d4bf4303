"""The kernels beside the SM100 GEMMs, on any GPU: nothing in them is Blackwell's.

What they compute is tested on the host, by test_prepared.py; here it is which thread does what.
"""

from __future__ import annotations

import ctypes
import importlib.util
import math
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from megamoe_ep import nvfp4, reference
from megamoe_ep.kernels import portable
from megamoe_ep.prepack import sm100

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

COUNTS = {
    "few": [1, 0, 3, 0],
    "around a tile": [0, 127, 128, 129, 0],
    "skewed": [0, 1500, 2],
    "more experts than a block has threads": [e % 3 for e in range(300)],
    "all empty": [0, 0],
}


@pytest.fixture(scope="module")
def kernels(tmp_path_factory) -> ctypes.CDLL:
    found = importlib.util.find_spec("cutlass_library")
    if shutil.which("nvcc") is None or found is None or found.submodule_search_locations is None:
        pytest.skip("needs nvcc and the headers of nvidia-cutlass")
    headers = Path(found.submodule_search_locations[0]) / "source" / "include"
    library = tmp_path_factory.mktemp("kernels") / "kernels.so"
    flags = ["-std=c++20", "-O3", "-arch=native", "--expt-relaxed-constexpr", "-Xcompiler", "-fPIC"]
    built = subprocess.run(
        ["nvcc", *flags, "-w", f"-I{CSRC}", f"-I{headers}", "-shared", "-o", str(library),
         str(HERE / "host/kernels.cu")],
        capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    loaded = ctypes.CDLL(str(library))
    pointer, number, wide = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
    sizes = [wide, *[number] * 3]  # rows, experts, hidden, intermediate
    loaded.places.argtypes = [*sizes, pointer]
    loaded.run_prepare.argtypes = [wide, *sizes, number, pointer, pointer]
    loaded.describe.argtypes = [wide, wide, *sizes, pointer]
    loaded.run_swiglu.argtypes = [*[number] * 3, *[pointer] * 5, ctypes.c_float, pointer]
    return loaded


def rows_of(counts: list[int], hidden: int) -> torch.Tensor:
    x = torch.randn(sum(counts), hidden, generator=torch.Generator().manual_seed(0))
    x[:, : hidden // 2] *= 1e-3
    q = nvfp4.quantize_per_token(x)
    return nvfp4.dequantize(q.codes, q.scales)


@pytest.mark.parametrize("counts", list(COUNTS.values()), ids=list(COUNTS))
@pytest.mark.parametrize(("hidden", "blocks"), [(96, 1), (1024, 7), (7168, 200)])
def test_prepare(kernels, hidden, blocks, counts):
    intermediate, room, total = 64, sum(counts) + 5, sum(counts)
    sizes = (room, len(counts), hidden, intermediate)
    at = torch.zeros(4, dtype=torch.int64)
    kernels.places(*sizes, at.data_ptr())
    groups_end, codes_at, scales_at, nbytes = at.tolist()
    memory = torch.zeros(nbytes + 4096, dtype=torch.uint8, device="cuda")
    memory[groups_end:] = 0xA5
    rows = torch.full((room, hidden), torch.nan).bfloat16()
    rows[:total] = rows_of(counts, hidden)
    offsets = torch.tensor([0, *counts]).cumsum(0).int()
    x, offsets_there = rows.cuda(), offsets.cuda()
    torch.cuda.synchronize()
    assert kernels.run_prepare(
        memory.data_ptr(), *sizes, blocks, offsets_there.data_ptr(), x.data_ptr()
    ) == 0  # fmt: skip

    # Groups: what the host writes for the same addresses.
    given = memory.cpu()
    expected = torch.zeros(nbytes + 256, dtype=torch.uint8)
    start = -expected.data_ptr() % 256
    kernels.describe(expected.data_ptr() + start, memory.data_ptr(), *sizes, offsets.data_ptr())
    assert torch.equal(given[:groups_end], expected[start : start + groups_end])

    # Rows: codes and scales that are worth the same, zero in the rest of the tiles.
    codes = given[codes_at:][: room * hidden // 2].view(room, hidden // 2)
    assert (codes[total:] == 0xA5).all()
    ksf, first = hidden // 16, scales_at
    for e, count in enumerate(counts):
        tiles = given[first : first + sm100.scale_nbytes(count, ksf)]
        places = sm100.scale_offsets(count, ksf)
        span = slice(int(offsets[e]), int(offsets[e + 1]))
        values = nvfp4.dequantize(codes[span], tiles[places].view(torch.float8_e4m3fn))
        assert torch.equal(values, rows[span])
        padding = torch.ones(len(tiles), dtype=torch.bool)
        padding[places.flatten()] = False
        assert (tiles[padding] == 0).all()
        first += len(tiles)
    assert (given[first:][:256] == 0xA5).all()
    assert (given[nbytes:] == 0xA5).all()


@pytest.mark.parametrize("counts", list(COUNTS.values()), ids=list(COUNTS))
@pytest.mark.parametrize("clamp", [None, 0.5])
@pytest.mark.parametrize("blocks", [1, 150])
def test_swiglu_and_requantise(kernels, counts, clamp, blocks):
    experts, intermediate, total = len(counts), 96, sum(counts)
    draw = torch.Generator().manual_seed(1)
    acc = torch.randn(total + 5, 2 * intermediate, generator=draw)
    row_scales = torch.rand(total + 5, generator=draw) + 0.5
    alpha = torch.rand(experts, 2, generator=draw) + 0.5
    input_scale = (torch.rand(experts, generator=draw) + 0.5) / 500
    offsets = torch.tensor([0, *counts]).cumsum(0).int()
    out = torch.full((total + 5, intermediate), 7.0).bfloat16().cuda()
    given = [t.cuda() for t in (offsets, acc, row_scales, alpha, input_scale)]
    torch.cuda.synchronize()
    assert kernels.run_swiglu(
        experts, intermediate, blocks, *(t.data_ptr() for t in given),
        math.inf if clamp is None else clamp, out.data_ptr(),
    ) == 0  # fmt: skip

    expert = torch.repeat_interleave(torch.tensor(counts))
    gate, up = (acc[:total] * row_scales[:total, None]).chunk(2, dim=1)
    gate, up = gate * alpha[expert, :1], up * alpha[expert, 1:]
    if clamp is not None:
        gate, up = gate.clamp(max=clamp), up.clamp(-clamp, clamp)
    q = nvfp4.quantize(portable.silu(gate) * up, input_scale[expert])
    expected = nvfp4.dequantize(q.codes, q.scales)
    h = out.cpu()
    assert (h[total:] == 7).all()
    if total:
        # An exponential's last bit moves a value that lies on the border between two codes.
        assert (h[:total] != expected).float().mean() < 1e-3
        assert reference.relative_l2_error(h[:total], expected) < 1e-3
