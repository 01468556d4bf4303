"""The flag protocol, every interleaving of it, checked by spin."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

MODEL = Path(__file__).with_name("flags.pml")

pytestmark = pytest.mark.skipif(
    shutil.which("spin") is None or shutil.which("cc") is None,
    reason="spin and a C compiler are not installed (Debian: apt-get install spin gcc)",
)


def explore(folder: Path, defines: list[str]) -> tuple[int, int, str]:
    """Errors found, distinct states seen, and all that the checker printed."""

    def run(*command: str) -> str:
        done = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run("spin", "-a", *(f"-D{d}" for d in defines), str(MODEL))
    # 1.5 GB is a bound, not a need: the largest case below takes 0.3.
    run("cc", "-O2", "-DSAFETY", "-DCOLLAPSE", "-DMEMLIM=1500", "-o", "pan", "pan.c")
    said = run("./pan", "-m200000")
    errors = re.search(r"errors: (\d+)", said)
    states = re.search(r"(\d+) states, stored", said)
    assert errors, said
    assert states, said
    for cut_short in ("max search depth too small", "out of memory", "Search not completed"):
        if not int(errors[1]):
            assert cut_short not in said, said
    return int(errors[1]), int(states[1]), said


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize(
    "what",
    [
        pytest.param([], id="healthy: nobody gives up, every call ends"),
        pytest.param(["KILLS=1"], id="one rank dies at any step"),
        pytest.param(["KILLS=2"], id="two ranks die at any steps"),
        pytest.param(["LAG"], id="any wait may run into its deadline"),
        pytest.param(["KILLS=2", "LAG"], id="deaths and deadlines"),
    ],
)
def test_protocol_holds(tmp_path: Path, ranks: int, what: list[str]) -> None:
    errors, states, said = explore(tmp_path, [f"RANKS={ranks}", "CALLS=3", *what])
    assert errors == 0, said
    assert states > 4000, "the search saw next to nothing"
    # Statements that no path reached: only those that the case itself rules out.
    unreached = set(re.findall(r'flags\.pml:\d+, state \d+, "([^"]+)"', said))
    if "LAG" in what and "KILLS=2" in what:
        assert not unreached, unreached


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize(
    ("fault", "found"),
    [
        (["BREAK_FLAG_BEFORE_DATA"], "assertion violated"),
        (["BREAK_HALF_A_FLAG"], "assertion violated"),
        (["BREAK_COMBINE_FLAG_BEFORE_READ"], "assertion violated"),
        (["BREAK_NO_COMBINE_WAIT", "LAG"], "assertion violated"),
        (["BREAK_NO_DEADLINE", "KILLS=1"], "invalid end state"),
        (["BREAK_ABORT_STAYS_LOCAL", "LAG"], "assertion violated"),
    ],
)
def test_fault_is_found(tmp_path: Path, ranks: int, fault: list[str], found: str) -> None:
    errors, _, said = explore(tmp_path, [f"RANKS={ranks}", "CALLS=2", *fault])
    assert errors > 0, said
    assert found in said, said
