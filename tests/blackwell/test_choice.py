"""Which kernels serve a device: the same entry points everywhere."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
import torch

from megamoe_ep import moe, weights
from megamoe_ep.errors import UnsupportedDeviceError
from megamoe_ep.kernels import gemm_kernels, library, weight_layout
from megamoe_ep.moe import MegaMoE
from megamoe_ep.prepack import MAX_EXPERTS
from megamoe_ep.symm_buffer import get_symm_buffer_for_nvfp4_mega_moe
from megamoe_ep.weights import random_experts, transform_weights_for_nvfp4_mega_moe

choose = weight_layout.__wrapped__  # not its cache


@pytest.fixture
def gpu(monkeypatch):
    """Makes a GPU of a capability out of nothing, with csrc's library built for what is said."""

    def make(capability: tuple[int, int], built_for: str = "90a,100a") -> torch.device:
        def why_unavailable(asked: tuple[int, int] | None = None) -> str | None:
            return None if "{}{}a".format(*asked or ()) in built_for.split(",") else "not built"

        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(library, "why_unavailable", why_unavailable)
        return torch.device("cuda", 0)

    return make


@pytest.mark.parametrize(
    ("capability", "layout", "module"),
    [
        ((9, 0), "sm90", "cuda"),
        ((10, 0), "sm100", "cuda_sm100"),
        ((8, 0), "portable", "portable"),
        ((10, 3), "portable", "portable"),  # sm_100a's code runs on 10.0 alone
        ((12, 0), "portable", "portable"),
    ],
)
def test_the_device_says_which_gemms_serve_it(gpu, capability, layout, module):
    assert choose(gpu(capability)) == layout
    gemm = gemm_kernels(layout)
    assert gemm.__name__ == f"megamoe_ep.kernels.{module}"
    assert callable(gemm.l1)
    assert callable(gemm.l2)


def test_a_library_without_sm100_leaves_blackwell_to_the_portable_ones_with_a_warning(gpu):
    device = gpu((10, 0), built_for="90a")
    with pytest.warns(UserWarning, match="portable kernels, which are slow, serve cuda:0: not bui"):
        assert choose(device) == "portable"


@pytest.mark.parametrize(
    ("size", "nvfp4_activations", "layout", "why"),
    [
        (64, True, "sm100", None),
        (48, True, "portable", "multiples of 32; got 48 and 48"),
        (64, False, "portable", "need 'nvfp4' activations and a static scale for h"),
    ],
)
def test_weights_get_the_layout_that_can_serve_them(
    monkeypatch, size, nvfp4_activations, layout, why
):
    monkeypatch.setattr(weights, "weight_layout", lambda device: "sm100")
    experts = random_experts(1, size, size)
    with pytest.warns(UserWarning, match=why) if why else contextlib.nullcontext():
        made = transform_weights_for_nvfp4_mega_moe(
            (experts.w13, experts.w13_scale), (experts.w2, experts.w2_scale),
            nvfp4_activations=nvfp4_activations,
        )  # fmt: skip
    assert [w.layout for w in made] == [layout, layout]


def test_more_experts_than_csrc_s_gemms_take_are_left_to_the_portable_ones(monkeypatch):
    monkeypatch.setattr(weights, "weight_layout", lambda device: "sm90")
    experts = random_experts(MAX_EXPERTS + 1, 128, 128)
    with pytest.warns(UserWarning, match=f"at most {MAX_EXPERTS} experts of a rank; got"):
        made = transform_weights_for_nvfp4_mega_moe(
            (experts.w13, experts.w13_scale), (experts.w2, experts.w2_scale)
        )
    assert [w.layout for w in made] == ["portable", "portable"]
    source = (Path(weights.__file__).parents[1] / "csrc/gemm/sm90/gemm.cuh").read_text()
    assert f"kMostExperts = {MAX_EXPERTS};" in source


@pytest.mark.parametrize("activation_format", ["nvfp4", "bf16"])
@pytest.mark.parametrize("static", [False, True])
def test_a_layer_says_whether_its_activations_are_nvfp4(monkeypatch, activation_format, static):
    asked = []

    def transform(*matrices, nvfp4_activations, device):
        asked.append(nvfp4_activations)
        return transform_weights_for_nvfp4_mega_moe(*matrices, device=device)

    monkeypatch.setattr(moe, "transform_weights_for_nvfp4_mega_moe", transform)
    experts = random_experts(2, 64, 32, static_input_scales=static)
    with get_symm_buffer_for_nvfp4_mega_moe(
        None, 2, 4, 1, 64, 32, activation_format=activation_format, device="cpu"
    ) as buffer:
        MegaMoE.from_experts(experts, buffer)
    assert asked == [static and activation_format == "nvfp4"]


def test_other_devices_are_told_what_is_supported():
    with pytest.raises(UnsupportedDeviceError, match=r"Hopper \(9.0\) and Blackwell \(10.0\)"):
        choose(torch.device("meta"))
