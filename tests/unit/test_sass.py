"""What nvcc made of csrc: the tensor cores' instructions, and registers that did not spill."""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from megamoe_ep.kernels import library

_LOCAL_MEMORY = ("LDL", "STL")


@pytest.fixture(scope="module")
def kernels(cuobjdump: str) -> dict[str, dict[str, Counter[str]]]:
    """Opcodes by architecture and kernel; an opcode's modifiers are left off."""
    path = {"PATH": f"{Path(cuobjdump).parent}:/usr/bin:/bin"}  # it calls nvdisasm
    command = [cuobjdump, "-sass", str(library._LIBRARY)]
    found: dict[str, dict[str, Counter[str]]] = {}
    architecture, opcodes = "", Counter[str]()
    # One instruction a line, as "        /*0080*/              @!P0 LDG.E R4, desc[UR4][R2.64] ;"
    instruction = re.compile(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)")
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=path) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if match := instruction.match(line):
                opcodes[match[1]] += 1
            elif match := re.match(r"\s*Function : (\S+)", line):
                opcodes = found.setdefault(architecture, {}).setdefault(match[1], Counter())
            elif match := re.match(r"arch = sm_(\S+)", line):
                architecture = match[1]
    assert process.returncode == 0
    return found


def of_namespace(kernels, architecture: str, name: str) -> dict[str, Counter[str]]:
    """Kernels of one architecture whose mangled names hold a namespace or template of this name."""
    if architecture not in kernels:
        pytest.skip(f"the library was not built for sm_{architecture}")
    found = {k: v for k, v in kernels[architecture].items() if name in k}
    assert found, f"no kernel of {name} in sm_{architecture}"
    return found


def test_every_kernel_was_taken_apart(kernels):
    for architecture in str(library.load().architectures()).split(","):
        comm = of_namespace(kernels, architecture, "7megamoe4comm")
        assert len(comm) >= 7
        assert all(opcodes["EXIT"] and sum(opcodes.values()) > 100 for opcodes in comm.values())


def test_hopper_gemms_feed_the_tensor_cores_and_do_not_spill(kernels):
    gemms = of_namespace(kernels, "90a", "7megamoe4sm90")
    multiply = {name: opcodes for name, opcodes in gemms.items() if opcodes["HGMMA"]}
    assert len(multiply) >= 2, "L1 and L2"
    spilled = {n: c for n, o in gemms.items() if (c := [o[x] for x in _LOCAL_MEMORY]) != [0, 0]}
    assert not spilled, f"loads from and stores to local memory: {spilled}"
    # TMA brings the operands in.
    assert all(opcodes["UTMALDG"] for opcodes in multiply.values())


def test_blackwell_gemms_multiply_nvfp4_with_its_scales(kernels):
    gemms = of_namespace(kernels, "100a", "cutlass")
    multiply = {name: opcodes for name, opcodes in gemms.items() if opcodes["UTCOMMA"]}
    assert multiply, "no block-scaled MMA of 4-bit operands"
    assert all(opcodes["UTCCP"] for opcodes in multiply.values()), "scales go to tensor memory"
    spilled = {n: c for n, o in multiply.items() if (c := [o[x] for x in _LOCAL_MEMORY]) != [0, 0]}
    assert not spilled, f"loads from and stores to local memory: {spilled}"


@pytest.mark.parametrize("kernel", ["stage_tokens", "dispatch_send", "combine_send_rows"])
def test_what_moves_rows_on_hopper_does_not_spill(kernels, kernel):
    """Not those that wait for flags: there, giving up keeps sets of ranks in local memory."""
    for name, opcodes in of_namespace(kernels, "90a", kernel).items():
        assert not any(opcodes[x] for x in _LOCAL_MEMORY), name
