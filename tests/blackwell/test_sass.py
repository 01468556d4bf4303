"""What nvcc made of the SM100 GEMMs: block-scaled MMAs, their scales' copies, nothing spilled."""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from megamoe_ep.kernels import library

pytestmark = pytest.mark.skipif(
    library.why_unavailable((10, 0)) is not None, reason=f"{library.why_unavailable((10, 0))}"
)


@pytest.fixture(scope="module")
def kernels(cuobjdump: str) -> dict[str, Counter[str]]:
    """How often each instruction, with its modifiers, is in each of the sm_100a kernels."""
    sass = subprocess.run(
        [cuobjdump, "-sass", "-arch", "sm_100a", str(library._LIBRARY)],
        env={"PATH": f"{Path(cuobjdump).parent}:/usr/bin:/bin"},  # it calls nvdisasm
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    found: dict[str, Counter[str]] = {}
    for part in sass.split("Function : ")[1:]:
        code = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*\w)", part)
        found[part.split()[0]] = Counter(code)
    return found


def gemms_of(kernels: dict[str, Counter[str]]) -> dict[str, Counter[str]]:
    return {name: code for name, code in kernels.items() if "cutlass13device_kernel" in name}


def count(code: Counter[str], *parts: str) -> int:
    """Instructions whose first word is ``parts[0]`` and whose modifiers hold the others."""
    return sum(
        times
        for instruction, times in code.items()
        if (words := instruction.split("."))[0] == parts[0] and {*parts[1:]} <= {*words[1:]}
    )


def test_l1_and_l2_are_there_in_both_tiles(kernels):
    gemms = gemms_of(kernels)
    kinds = Counter(
        ("2 SMs" if count(code, "UTCOMMA", "2CTA") else "1 SM", "bfloat16" in name)
        for name, code in gemms.items()
    )
    assert kinds == {(sms, bf16): 1 for sms in ("1 SM", "2 SMs") for bf16 in (False, True)}


def test_each_multiplies_4_bits_with_a_scale_for_every_16_elements(kernels):
    for name, code in gemms_of(kernels).items():
        assert count(code, "UTCOMMA", "4X") > 0, name  # 4 scales along the K of one MMA, 64
        assert count(code, "UTCOMMA", "4X") == count(code, "UTCOMMA"), name
        assert count(code, "UTCCP") > 0, name  # scales to tensor memory
        assert count(code, "UTMALDG") >= 4, name  # both operands and their scales, by TMA
        assert count(code, "LDTM") > 0, name  # accumulators from tensor memory


def test_nothing_spills_into_local_memory(kernels):
    ours = {name: code for name, code in kernels.items() if "7megamoe5sm100" in name}
    assert {"prepare", "swiglu_and_requantise"} <= {
        kernel for kernel in ("prepare", "swiglu_and_requantise") for name in ours if kernel in name
    }
    for name, code in (gemms_of(kernels) | ours).items():
        assert count(code, "LDL") == count(code, "STL") == 0, name
