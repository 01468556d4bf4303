"""What nvcc made of csrc: the tensor cores' instructions, and registers that did not spill."""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from megamoe_ep.forecast import KERNELS
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
        assert len(comm) >= 8
        assert all(opcodes["EXIT"] and sum(opcodes.values()) > 20 for opcodes in comm.values())


def test_hopper_gemms_feed_the_tensor_cores(kernels):
    gemms = of_namespace(kernels, "90a", "7megamoe4sm90")
    multiply = {name: opcodes for name, opcodes in gemms.items() if opcodes["HGMMA"]}
    assert len(multiply) == 2, "for few rows an expert, and for many"
    # TMA brings the operands in.
    assert all(opcodes["UTMALDG"] for opcodes in multiply.values())


def main_loops(code: list[tuple[int, str, int | None]]) -> list[list[str]]:
    """Opcodes of the loops around HGMMA, for each the innermost, of (address, opcode, target)."""
    loops = {(target, at) for at, _, target in code if target is not None and target <= at}
    found = set()
    for at, opcode, _ in code:
        if opcode == "HGMMA":
            around = [(first, last) for first, last in loops if first <= at <= last]
            found.add(min(around, key=lambda loop: loop[1] - loop[0]))
    return [
        [opcode for at, opcode, _ in code if first <= at <= last] for first, last in sorted(found)
    ]


def test_main_loops_of_hopper_gemms_do_not_spill(kernels, cuobjdump):
    of_namespace(kernels, "90a", "7megamoe4sm90")  # skips where there is none
    path = {"PATH": f"{Path(cuobjdump).parent}:/usr/bin:/bin"}
    command = [cuobjdump, "-sass", "-arch", "sm_90a", str(library._LIBRARY)]
    text = subprocess.run(command, capture_output=True, text=True, check=True, env=path).stdout
    instruction = re.compile(
        r"\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)(?:\S*\s+(?:!?U?P\w+,\s*)?(0x[0-9a-f]+))?"
    )
    checked = {"Few": 0, "Many": 0}
    few, many = KERNELS["H200"].few, KERNELS["H200"].many
    # Of two k64 blocks of a slab: the forecast's are of one block of a tile.
    most = {"Few": 2 * few.instructions, "Many": 2 * many.instructions * 128 // many.weight_rows}
    for body in text.split("Function : ")[1:]:
        if "7megamoe4sm90" not in body.splitlines()[0]:
            continue
        code = [
            (int(m[1], 16), m[2], int(m[3], 16) if m[3] and m[2] == "BRA" else None)
            for m in map(instruction.match, body.splitlines())
            if m
        ]
        for loop in main_loops(code):
            cut = "Few" if f"CutILi4ELi{few.max_tokens}E" in body.splitlines()[0] else "Many"
            assert sum(opcode == "HGMMA" for opcode in loop) == 16, "two k64 blocks of a slab"
            assert not {"LDL", "STL"} & set(loop)
            assert len(loop) <= most[cut], "the main loop has grown"
            checked[cut] += 1
    assert checked == {"Few": 6, "Many": 22}, "each tile width"


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
