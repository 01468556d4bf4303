"""What the README says can be done: its example runs, and what it names is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megamoe_ep.weights import random_experts, write_modelopt_checkpoint

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("launcher", ["spawner", "torchrun", "mpirun"])
def test_the_example_runs(launch, launcher, tmp_path):
    (example,) = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    (tmp_path / "example.py").write_text(example)
    write_modelopt_checkpoint(tmp_path / "checkpoint", 0, random_experts(32, 512, 256))
    output = launch(launcher, 2, [str(tmp_path / "example.py"), str(tmp_path / "checkpoint")])
    for rank in range(2):
        assert re.search(rf"rank {rank} of 2: \[100, 512\] on (cpu|cuda)", output), output


def test_links_lead_somewhere():
    links = re.findall(r"\]\(([^)#:]+)\)", README)
    assert len(links) > 5
    for link in links:
        assert (ROOT / link).exists(), link


def test_documents_link_to_what_is_there():
    for document in (ROOT / "docs").glob("*.md"):
        for link in re.findall(r"\]\(([^)#:]+)\)", document.read_text()):
            assert (document.parent / link).exists(), f"{document.name}: {link}"
