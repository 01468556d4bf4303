"""Tests of several ranks. Those that take ``group`` run in every rank of whatever started pytest:

    python -m pytest tests/multirank
    torchrun --nproc-per-node 3 -m pytest tests/multirank
    mpirun -n 3 python -m pytest --with-mpi tests/multirank

Those that take ``launcher_side`` start ranks of their own, and are skipped inside a rank.
"""

from __future__ import annotations

import os

import pytest

from megamoe_ep.bootstrap import Group, detect_launcher


@pytest.fixture(scope="session")
def group() -> Group:
    return Group.from_environment(device="cpu", timeout_s=60)


@pytest.fixture
def launcher_side() -> None:
    if detect_launcher(os.environ) is not None:
        pytest.skip("starts ranks itself; this process is one")
