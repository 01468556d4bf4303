"""A layer of several ranks: who does not agree on it is found when it is made, and every rank is
told; and the bytes that a call sends are those that it is said to send.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch

from megamoe_ep import MegaMoE, get_symm_buffer_for_nvfp4_mega_moe, symm_buffer
from megamoe_ep.bootstrap import Group
from megamoe_ep.cli.demo import inputs_of
from megamoe_ep.errors import ArgumentError, BufferDestroyedError, LayerMismatchError
from megamoe_ep.roofline import Load, bytes_put
from megamoe_ep.weights import random_experts

HIDDEN, INTERMEDIATE, LOCAL_EXPERTS = 64, 32, 2


@pytest.fixture
def ranks(group: Group) -> Group:
    if group.world_size == 1:
        pytest.skip("needs several ranks; tests/multirank/test_launch.py starts them")
    return group


def sizes(group: Group) -> dict:
    return {
        "num_experts": LOCAL_EXPERTS * group.world_size,
        "max_num_tokens": 4,
        "top_k": 2,
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
    }


def local_experts(group: Group, **options):
    made = random_experts(LOCAL_EXPERTS, HIDDEN, INTERMEDIATE, seed=group.rank, **options)
    return dataclasses.replace(made, first_expert=LOCAL_EXPERTS * group.rank)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_experts", 48),
        ("max_num_tokens", 5),
        ("top_k", 1),
        ("hidden_size", 128),
        ("intermediate_size", 16),
        ("activation_format", "bf16"),
        ("timeout_s", 61.0),
    ],
)
def test_another_size_on_one_rank(ranks, name, value):
    usual = {**sizes(ranks), "activation_format": "nvfp4", "timeout_s": 60.0}
    last = ranks.world_size - 1
    by_rank = {r: value if r == last else usual[name] for r in range(ranks.world_size)}
    if name == "num_experts":  # a multiple of the number of ranks, whatever that is
        by_rank[last] = value = 24 * ranks.world_size
    given = usual | {name: by_rank[ranks.rank]}
    with pytest.raises(LayerMismatchError) as caught:
        get_symm_buffer_for_nvfp4_mega_moe(ranks, **given, device="cpu")
    message = f"every rank must create the buffer with the same {name}; got {by_rank} by rank."
    assert str(caught.value).startswith(message)


def test_other_kernels_on_one_rank(ranks, monkeypatch):
    last = ranks.world_size - 1
    by_rank = {r: "csrc" if r == last else "portable" for r in range(ranks.world_size)}
    monkeypatch.setattr(symm_buffer, "exchange_kernels", lambda device: by_rank[ranks.rank])
    with pytest.raises(
        LayerMismatchError, match=r"the same kernels .*'csrc'\} by rank\. .* doctor"
    ):
        get_symm_buffer_for_nvfp4_mega_moe(ranks, **sizes(ranks), device="cpu")


def test_the_ranks_can_go_on_after_a_disagreement(ranks):
    given = sizes(ranks) | {"top_k": 1 + ranks.rank}
    with pytest.raises(LayerMismatchError, match="the same top_k"):
        get_symm_buffer_for_nvfp4_mega_moe(ranks, **given, device="cpu")
    with get_symm_buffer_for_nvfp4_mega_moe(ranks, **sizes(ranks), device="cpu") as buffer:
        layer = MegaMoE.from_experts(local_experts(ranks), buffer)
        x = torch.ones(4, HIDDEN, dtype=torch.bfloat16)
        ids = torch.tensor([[0, -1]] * 4, dtype=torch.int32)
        y = layer(x, ids, torch.ones(4, 2))
        assert y.isfinite().all()
        assert len({row.numpy().tobytes() for row in y.view(torch.int16)}) == 1
    with pytest.raises(BufferDestroyedError):
        layer(x, ids, torch.ones(4, 2))


def test_experts_that_do_not_divide(ranks):
    given = sizes(ranks) | {"num_experts": LOCAL_EXPERTS * ranks.world_size + 1}
    message = rf"got {given['num_experts']} experts on {ranks.world_size} ranks"
    with pytest.raises(ArgumentError, match=message):
        get_symm_buffer_for_nvfp4_mega_moe(ranks, **given, device="cpu")


def test_static_input_scales_on_some_ranks_only(ranks):
    with get_symm_buffer_for_nvfp4_mega_moe(ranks, **sizes(ranks), device="cpu") as buffer:
        experts = local_experts(ranks, static_input_scales=ranks.rank != 0)
        with pytest.raises(LayerMismatchError, match=r"a static input scale or none; .*\{0: None"):
            MegaMoE.from_experts(experts, buffer)


def test_ranks_that_combine_differently(ranks):
    mode = "fast" if ranks.rank == 1 else "exact"
    with get_symm_buffer_for_nvfp4_mega_moe(ranks, **sizes(ranks), device="cpu") as buffer:
        with pytest.raises(LayerMismatchError, match=r"same combine and .*1: \['fast', None\]"):
            MegaMoE.from_experts(local_experts(ranks), buffer, combine=mode)
        layer = MegaMoE.from_experts(local_experts(ranks), buffer)
        layer.combine = mode
        given = inputs_of(buffer.shape, ranks.rank, buffer.shape.max_num_tokens)
        with pytest.raises(
            LayerMismatchError, match=rf"rank {0 if ranks.rank == 1 else 1} gave an"
        ):
            layer(*given)
        layer.combine = "exact"  # nothing of it stays behind
        layer(*given)


def test_static_input_scale_of_the_layer_is_the_largest(ranks):
    experts = local_experts(ranks)
    assert experts.w13_input_scale is not None
    experts = dataclasses.replace(
        experts, w13_input_scale=experts.w13_input_scale * (1 + ranks.rank)
    )
    everyone = ranks.all_gather_object(float(experts.w13_input_scale.max()))
    with get_symm_buffer_for_nvfp4_mega_moe(ranks, **sizes(ranks), device="cpu") as buffer:
        layer = MegaMoE.from_experts(experts, buffer)
        assert layer.input_global_scale.tolist() == [max(everyone)]


@pytest.mark.parametrize("activation_format", ["nvfp4", "bf16"])
@pytest.mark.parametrize("combine", ["exact", "fast"])
def test_bytes_sent_are_those_that_the_demo_shows(ranks, combine, activation_format):
    given = {**sizes(ranks), "max_num_tokens": 9, "activation_format": activation_format}
    with get_symm_buffer_for_nvfp4_mega_moe(ranks, **given, device="cpu") as buffer:
        layer = MegaMoE.from_experts(local_experts(ranks), buffer, combine=combine)
        everyone = [inputs_of(buffer.shape, rank, 9) for rank in range(ranks.world_size)]
        layer(*everyone[ranks.rank])
        load = Load.of(buffer.shape, [ids for _, ids, _ in everyone])
        for phase, put in bytes_put(buffer.shape, load, combine).items():
            assert buffer.bytes_put[phase] == put[ranks.rank]
