"""benchmarks/report.py: what it writes comes from the results alone, and is written once."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

from megamoe_ep.forecast import KERNELS, expected_load, forecast
from megamoe_ep.measure import MODELS, Case, result_row
from megamoe_ep.results import Results
from megamoe_ep.roofline import KNOWN

ROOT = Path(__file__).resolve().parents[2]
REPORT = ROOT / "benchmarks" / "report.py"
DOCUMENT = ROOT / "docs" / "performance.md"

spec = importlib.util.spec_from_file_location("report", REPORT)
assert spec is not None
assert spec.loader is not None
report = importlib.util.module_from_spec(spec)
sys.modules["report"] = report
spec.loader.exec_module(report)


def run(*arguments: object) -> int:
    return int(report.main([str(argument) for argument in arguments]))


def results_of(ranks: int, launcher: str, slower: float, device: str = "NVIDIA H200") -> Results:
    """As if every call took ``slower`` times the forecast."""
    ceilings = KNOWN["H200"]
    machine = {
        "device": device, "ranks": ranks, "launcher": launcher, "kernels": "sm90",
        "torch": "2.11", "commit": "0123abc", "command": "scaling.py", "time": launcher,
    }  # fmt: skip
    results = Results("scaling", machine, ceilings)
    for mode in ("weak", "strong"):
        for tokens in (1, 64, 2048):
            for combine in ("exact", "fast"):
                for skew in (1.0, 4.0):
                    case = Case("dsv3", mode, tokens, combine, skew)
                    shape = case.shape(ranks)
                    load = expected_load(shape, skew)
                    us = {
                        phase: s * 1e6 * slower
                        for phase, s in forecast(
                            shape, load, combine, ceilings, KERNELS["H200"]
                        ).items()
                    }
                    results.rows.append(
                        result_row(
                            case, shape, load, ceilings, sum(us.values()), us if skew == 1 else {}
                        )
                    )
    return results


@pytest.fixture
def folder(tmp_path):
    """Results of one and of two ranks, and the document to fill."""
    for ranks, launcher, slower in ((1, "alone", 1.1), (2, "mpirun", 1.1), (2, "torchrun", 1.12)):
        results = results_of(ranks, launcher, slower)
        results.write(tmp_path / "results" / results.file_name())
    shutil.copy(DOCUMENT, tmp_path / "performance.md")
    return tmp_path


def snapshot(folder: Path) -> dict[str, bytes]:
    files = [folder / "performance.md", *(folder / "images").iterdir()]
    return {path.name: path.read_bytes() for path in files}


def test_running_it_again_changes_nothing(folder):
    arguments = ["--results", folder / "results", "--document", folder / "performance.md"]
    before = (folder / "performance.md").read_text()
    assert run(*arguments, "--check") == 1
    assert (folder / "performance.md").read_text() == before, "--check writes nothing"
    assert run(*arguments) == 0
    first = snapshot(folder)
    assert run(*arguments, "--check") == 0
    assert run(*arguments) == 0
    assert snapshot(folder) == first
    assert {"latency-plot.png", "scaling-plot.png", "forecast-check-plot.png"} <= set(first)
    assert all(png[:4] == b"\x89PNG" for name, png in first.items() if name.endswith(".png"))

    # One figure in one file moves the document.
    path = folder / "results" / "scaling-nvidia-h200-ep1-alone.json"
    value = json.loads(path.read_text())
    value["rows"][0]["ours_us"] *= 2
    path.write_text(json.dumps(value))
    assert run(*arguments, "--check") == 1


def by_hand(text: str) -> list[str]:
    return re.split(r"<!-- report:(?!end).*?<!-- report:end -->", text, flags=re.S)


def test_what_is_written_by_hand_is_left_alone(folder):
    data = report.Data.read(folder / "results")
    before = DOCUMENT.read_text()
    after = report.render(before, data, lambda name, shown: None)
    assert after != before
    assert by_hand(after) == by_hand(before)


def test_every_table_and_picture_has_its_place_in_the_document():
    names = re.findall(r"<!-- report:(?!end)([\w-]+) -->", DOCUMENT.read_text())
    assert sorted(names) == sorted([*report.TABLES, *report.PICTURES])
    assert len(re.findall("<!-- report:end -->", DOCUMENT.read_text())) == len(names)


def test_a_section_that_is_not_known_is_an_error(folder):
    data = report.Data.read(folder / "results")
    with pytest.raises(KeyError, match="gossip"):
        report.render("<!-- report:gossip -->\n<!-- report:end -->", data, lambda *_: None)


def test_the_committed_document_is_what_the_committed_results_give():
    argv = [sys.executable, str(REPORT), "--check"]
    done = subprocess.run(argv, cwd=ROOT, timeout=200)
    assert done.returncode == 0, "run benchmarks/report.py and commit what it writes"
    pictures = re.findall(r"\]\((images/[\w.-]+)\)", DOCUMENT.read_text())
    assert pictures
    assert all((DOCUMENT.parent / picture).exists() for picture in pictures)


def test_tables_say_what_the_rows_say(folder):
    data = report.Data.read(folder / "results")
    row = data.rows("scaling", mode="weak", tokens=64, combine="exact", skew=1.0, ranks=1)[0]
    start = "| H200 | dsv3 | 1 | 64 |"
    (line,) = [x for x in report.latency(data).splitlines() if x.startswith(start)]
    assert f"| {row['ours_us']:.0f} |" in line
    assert f"| {row['over_floor']:.2f} |" in line
    assert report.skew(data).splitlines()[0].endswith("| 4x |")
    # mpirun's and torchrun's differ by 1.12 / 1.1.
    assert "24 points" in report.launchers(data)
    assert "24 differ by at most 5%" in report.launchers(data)


def test_no_line_mixes_two_gpus(folder):
    h200 = report.Data.read(folder / "results")
    h100 = report.Data({"h100.json": results_of(2, "mpirun", 1.5, "NVIDIA H100 80GB HBM3")})
    both = report.Data(h200.files | h100.files)
    for name in ("latency", "phases", "skew"):
        of_h100, of_h200, of_both = (
            report.TABLES[name](data).splitlines()[2:] for data in (h100, h200, both)
        )
        assert of_both == of_h100 + of_h200
        assert all(line.startswith("| H100 | dsv3 |") for line in of_h100)

    point = {"mode": "strong", "tokens": 64, "combine": "exact", "skew": 1.0}
    (two,) = h100.rows("scaling", **point)
    of_h200 = [report.only(h200.scaling, ranks=ranks, **point) for ranks in (1, 2)]
    lines = report.strong(both).splitlines()
    assert f"| H100 | dsv3 | 64 | exact | - | {report.us(two['ours_us'])} |" in lines
    cells = " | ".join(report.us(row["ours_us"]) for row in of_h200)
    assert f"| H200 | dsv3 | 64 | exact | {cells} |" in lines

    checked = report.checked(both)
    assert {round(c.ratio, 3) for c in checked if c.row["gpu"] == "H100"} == {round(1 / 1.5, 3)}
    labels = report.scaling_plot(both).axes[0].get_legend_handles_labels()[1]
    assert labels == [f"H200, {t}" for t in ("1 token", "64 tokens", "2048 tokens")]


def test_the_check_of_the_forecast_counts_what_is_near(folder):
    checked = report.checked(report.Data.read(folder / "results"))
    assert len(checked) == 48, "what two launchers measured counts once"
    assert all(c.within for c in checked)
    # Of mpirun's and torchrun's, torchrun's were measured later.
    ratios = {round(c.ratio, 3) for c in checked}
    assert ratios == {round(1 / 1.1, 3), round(1 / 1.12, 3)}
    far = results_of(1, "alone", 1.3)
    far.write(folder / "results" / far.file_name())
    checked = report.checked(report.Data.read(folder / "results"))
    assert sum(c.within for c in checked) == 24
    # One token a rank is left out of the summary; of the others none of one rank is near.
    lines = report.forecast_check(report.Data.read(folder / "results")).splitlines()
    assert "| H200 | 1 | all | 16 | 0% | 0.77 | 0.77 | 0.77 |" in lines
    (two,) = [line for line in lines if line.startswith("| H200 | 2 | all |")]
    assert "| 100% |" in two


def test_a_machine_without_tiles_is_not_held_to_the_forecast(tmp_path):
    results = results_of(1, "alone", 1.0)
    results.machine["device"] = "x86_64"
    results.write(tmp_path / "r.json")
    data = report.Data.read(tmp_path)
    assert report.checked(data) == []
    assert report.forecast_check(data).startswith("Nothing to hold the forecast to yet")


@pytest.mark.parametrize("name", ["latency", "phases", "skew", "strong", "rivals", "gemms"])
def test_without_results_a_section_says_so(tmp_path, name):
    assert report.TABLES[name](report.Data.read(tmp_path)) == report.NOTHING


def test_forecast_pads_experts_that_do_not_divide():
    assert report.deployed("dsv3", 64, 72).num_experts == 288
    assert report.deployed("qwen3-235b", 64, 64).num_experts == MODELS["qwen3-235b"].num_experts
