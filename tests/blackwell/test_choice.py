"""Which kernels serve a device: the same entry points everywhere."""

from __future__ import annotations

import pytest
import torch

from megamoe_ep.errors import UnsupportedDeviceError
from megamoe_ep.kernels import gemm_kernels, library, weight_layout

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


def test_other_devices_are_told_what_is_supported():
    with pytest.raises(UnsupportedDeviceError, match=r"Hopper \(9.0\) and Blackwell \(10.0\)"):
        choose(torch.device("meta"))
