"""What the roofline says crosses between ranks is what the data path counts, byte for byte.

Rank-side: drawn routings, in every rank at once, at whatever number of ranks was launched.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megamoe_ep import stage_activation
from megamoe_ep.kernels import portable
from megamoe_ep.roofline import Load, bytes_put
from megamoe_ep.shape import LayerShape
from megamoe_ep.symm_buffer import SymmBuffer

TIMEOUT_S = 60.0


@pytest.mark.parametrize("activation_format", ["nvfp4", "bf16"])
@pytest.mark.parametrize("combine", ["exact", "fast"])
@pytest.mark.parametrize("seed", range(5))
def test_bytes_put_are_the_rooflines(group, seed, combine, activation_format):
    rng = np.random.default_rng([seed, combine == "fast", activation_format == "bf16"])
    w = group.world_size
    most, top_k = int(rng.integers(1, 20)), int(rng.integers(1, 10))
    experts = w * int(rng.integers(1, 9))
    shape = LayerShape(experts, most, top_k, 16 * int(rng.integers(1, 9)), 16, w, activation_format)
    calls = []
    for _ in range(3):
        # With repetitions, with slots that hold no expert, and with ranks that bring nothing.
        hot = int(rng.integers(1, experts + 1))
        calls.append(
            [
                torch.from_numpy(
                    np.where(
                        rng.random((n, top_k)) < rng.choice([0.0, 0.3, 1.0]),
                        -1,
                        rng.integers(0, hot, (n, top_k)),
                    )
                ).int()
                for n in rng.integers(0, most + 1, w)
            ]
        )
    expected = {phase: np.zeros(w, dtype=int) for phase in ("dispatch", "combine")}
    with SymmBuffer(group, shape, device="cpu", timeout_s=TIMEOUT_S) as buffer:
        for ids in calls:
            mine = ids[group.rank]
            x = torch.ones(len(mine), shape.hidden_size, dtype=torch.bfloat16)
            stage_activation(x, mine, torch.ones(len(mine), top_k), buffer)
            portable.dispatch(buffer, combine=combine)
            buffer.workspace.rows.fill_(1)
            portable.combine(torch.empty_like(x), buffer, combine=combine)
            for phase, matrix in bytes_put(shape, Load.of(shape, ids), combine).items():
                expected[phase] += np.array(matrix[group.rank])
        assert buffer.bytes_put == {phase: put.tolist() for phase, put in expected.items()}
    assert expected["dispatch"].sum() >= 3 * 8 * w
