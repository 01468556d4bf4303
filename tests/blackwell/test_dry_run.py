"""The library's SM100 GEMMs asked, with no GPU, whether they can do a layer and what they need."""

from __future__ import annotations

import gc
import weakref
from types import SimpleNamespace

import pytest
import torch

from megamoe_ep.errors import ArgumentError
from megamoe_ep.kernels import cuda_sm100, gemm_kernels, library
from megamoe_ep.shape import LayerShape
from megamoe_ep.symm_buffer import Workspace
from megamoe_ep.weights import random_experts, transform_weights_for_nvfp4_mega_moe

SMS = 148  # of a B200
# hidden size, intermediate size, experts of one rank, top-k: dsv3, flash, pro
LAYERS = [(7168, 2048, 32, 8), (4096, 2048, 32, 6), (7168, 3072, 48, 6)]

needs_library = pytest.mark.skipif(
    library.why_unavailable((10, 0)) is not None, reason=f"{library.why_unavailable((10, 0))}"
)


@needs_library
@pytest.mark.parametrize("tokens", [1, 128, 4096])
@pytest.mark.parametrize(("hidden", "intermediate", "experts", "top_k"), LAYERS)
def test_every_kernel_can_do_the_benchmarks_layers(
    host, hidden, intermediate, experts, top_k, tokens
):
    """Asks can_implement and the workspace size of all four; raises if one says no."""
    rows = 8 * tokens * top_k  # of 8 ranks
    sizes = (rows, experts, hidden, intermediate, SMS)
    nbytes = library.load().gemm_sm100_scratch_bytes(*sizes)
    assert nbytes == host.scratch_bytes(*sizes)
    row = hidden // 2 + hidden // 16 + 8 * intermediate  # codes, scales, accumulators
    padding = min(rows, experts) * 127 * hidden // 16
    assert rows * row < nbytes < rows * row + padding + 2**19


@needs_library
def test_what_cutlass_cannot_do_is_refused():
    with pytest.raises(ValueError, match="outputs of K = 7176; both must be multiples of 32"):
        library.load().gemm_sm100_scratch_bytes(64, 8, 7176, 2048, SMS)
    with pytest.raises(ValueError, match="up to 6143 experts on one rank; got 7000"):
        library.load().gemm_sm100_scratch_bytes(64, 7000, 7168, 2048, SMS)


@needs_library
def test_the_fields_of_a_layer_are_those_that_python_packs():
    names = library.load().gemm_sm100_fields().split()
    assert set(names) == {
        "scratch", "rows", "experts", "hidden", "intermediate", "wide", "sms", "device",
    }  # fmt: skip


@needs_library
def test_scratch_memory_comes_with_the_workspace_and_goes_with_it(monkeypatch):
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda _: SimpleNamespace(multi_processor_count=SMS)
    )
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    shape = LayerShape(4, 1024, 2, 64, 32, 1)
    work = Workspace.allocate(shape, torch.device("cpu"))
    cuda_sm100.allocate_scratch(work, shape)
    scratch = cuda_sm100._scratch[work.expert_offsets]
    fields = library.load().gemm_sm100_fields().split()
    values = dict(zip(fields, scratch._layer, strict=True))
    assert values.pop("scratch") % 64 == 0
    assert values == {
        "rows": 2048, "experts": 4, "hidden": 64, "intermediate": 32, "wide": 1, "sms": SMS,
        "device": 3,
    }  # fmt: skip
    # The call of a layer finds it again, and makes none.
    assert cuda_sm100._scratch_of(work.expert_offsets, 2048, 64, 32) is scratch
    gone = weakref.ref(scratch)
    del scratch, work
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize(("hidden", "activation_format"), [(64, "bf16"), (48, "nvfp4")])
def test_no_scratch_memory_where_the_portable_gemms_serve(hidden, activation_format):
    shape = LayerShape(4, 8, 2, hidden, 32, 1, activation_format)
    work = Workspace.allocate(shape, torch.device("cpu"))
    cuda_sm100.allocate_scratch(work, shape)
    assert work.expert_offsets not in cuda_sm100._scratch


def layer_weights():
    experts = random_experts(2, 64, 32)
    return transform_weights_for_nvfp4_mega_moe(
        (experts.w13, experts.w13_scale), (experts.w2, experts.w2_scale), layout="sm100"
    )


def test_h_in_bf16_is_refused_with_what_is_supported():
    l1, _ = layer_weights()
    rows = torch.zeros(3, 64, dtype=torch.bfloat16)
    with pytest.raises(ArgumentError, match="activation_format='nvfp4' with a static scale") as e:
        gemm_kernels("sm100").l1(
            rows, torch.ones(3), torch.tensor([0, 1, 3]).int(), l1, torch.ones(2, 2),
            input_scale=None, clamp=None, out=rows[:, :32].contiguous(),
        )  # fmt: skip
    assert "nvfp4_activations=False" in str(e.value)


def test_weights_of_the_other_gemm_or_on_a_cpu_are_refused():
    l1, l2 = layer_weights()
    rows, offsets = torch.zeros(3, 64, dtype=torch.bfloat16), torch.tensor([0, 1, 3]).int()
    with pytest.raises(ArgumentError, match="L2's in layout 'sm100'; got L1's"):
        cuda_sm100.l2(rows, offsets, l1, torch.ones(2), out=rows)
    with pytest.raises(ArgumentError, match="must be on a GPU; got cpu"):
        cuda_sm100.l2(rows, offsets, l2, torch.ones(2), out=rows)
