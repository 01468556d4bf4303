"""Measuring on a GPU: the ceilings are near the table's, and a layer's phases add up to it."""

from __future__ import annotations

import pytest
import torch

from megamoe_ep.kernels import weight_layout
from megamoe_ep.measure import Case, measure_case, random_weights, ranks
from megamoe_ep.roofline import PHASES, known_ceilings, measure_ceilings

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
    pytest.mark.usefixtures("launcher_side"),
]


def test_ceilings_are_near_those_of_the_table():
    table = known_ceilings(torch.cuda.get_device_name())
    if table is None:
        pytest.skip("a GPU that the table does not have")
    with ranks("cuda:0") as meter:
        found = measure_ceilings(meter)
    assert found.copy_bytes_per_s == pytest.approx(table.copy_bytes_per_s, rel=0.15)
    assert found.flop_per_s == pytest.approx(table.flop_per_s, rel=0.20)
    assert 0.2e-6 < found.launch_s < 10e-6
    assert found.call_s is not None
    assert found.launch_s < found.call_s < 50e-6
    assert found.source.startswith("measured in this run")


@pytest.mark.parametrize("combine", ["exact", "fast"])
def test_phases_add_up_to_the_layer(combine):
    case = Case("2048/1024/8/4", "weak", 64, combine)
    with ranks("cuda:0") as meter:
        ceilings = measure_ceilings(meter)
        weights = random_weights(case.shape(1), 0, meter.device)
        row, y = measure_case(meter, case, weights, ceilings, calls=9)
        whole, _ = measure_case(meter, case, weights, ceilings, calls=9, by_phase=False)
        fast = weight_layout(meter.device) != "portable"
    assert y.isfinite().all()
    assert y.abs().max() > 0
    assert row["ours_us"] >= row["floor_us"]
    if fast:
        assert sum(row[f"{phase}_us"] for phase in PHASES) == pytest.approx(row["ours_us"])
        assert whole["ours_us"] == pytest.approx(row["ours_us"], rel=0.25)
