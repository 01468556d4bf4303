"""Every argument that a person can get wrong, each with its own sentence."""

from __future__ import annotations

import copy
import dataclasses
from types import SimpleNamespace

import pytest
import torch

from megamoe_ep import (
    MegaMoE,
    get_symm_buffer_for_nvfp4_mega_moe,
    nvfp4_mega_moe,
    stage_activation,
)
from megamoe_ep.errors import (
    ArgumentError,
    BufferDestroyedError,
    HeapError,
    HeapTooSmallError,
    LayerMismatchError,
    UnsupportedDeviceError,
)
from megamoe_ep.shape import LayerShape
from megamoe_ep.symm_buffer import SymmBuffer
from megamoe_ep.weights import random_experts

E, T, K, H, I = 4, 8, 2, 64, 32  # noqa: E741
SIZES = {
    "num_experts": E,
    "max_num_tokens": T,
    "top_k": K,
    "hidden_size": H,
    "intermediate_size": I,
    "world_size": 1,
}


def create(**changes):
    sizes = {**SIZES, **changes}
    sizes.pop("world_size")
    return get_symm_buffer_for_nvfp4_mega_moe(None, **{"device": "cpu", **sizes})


@pytest.fixture
def buffer():
    with create() as made:
        yield made


def tokens(n=3):
    generator = torch.Generator().manual_seed(n)
    return {
        "x": torch.randn(n, H, generator=generator).bfloat16(),
        "topk_idx": torch.randint(0, E, (n, K), generator=generator, dtype=torch.int32),
        "topk_weights": torch.rand(n, K, generator=generator),
    }


def odd(tensor: torch.Tensor) -> torch.Tensor:
    """As large, and two bytes past a multiple of 16."""
    return tensor.new_zeros(tensor.numel() + 1)[1:].view(tensor.shape)


# Shape of the layer


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts": 0}, r"num_experts must be an integer of at least 1; got 0"),
        ({"top_k": 2.0}, r"top_k must be an integer of at least 1; got 2\.0"),
        ({"max_num_tokens": -1}, r"max_num_tokens must be an integer of at least 1; got -1"),
        ({"top_k": 33}, r"top_k must be at most 32; got 33"),
        ({"max_num_tokens": 2**21}, r"max_num_tokens must be at most 2097151; got 2097152"),
        ({"num_experts": 65538}, r"num_experts must be at most 65536; got 65538"),
        ({"hidden_size": 72}, r"hidden_size must be a multiple of 16 .* got 72"),
        ({"intermediate_size": 40}, r"intermediate_size must be a multiple of 16 .* got 40"),
        ({"hidden_size": 65552}, r"hidden_size .* at most 65536; got 65552"),
        ({"world_size": 3}, r"num_experts must be a multiple of .* got 4 experts on 3 ranks"),
        ({"world_size": 257, "num_experts": 257}, r"group must have at most 256 ranks; got 257"),
        ({"activation_format": "fp8"}, r"activation_format must be 'nvfp4' or 'bf16'; got 'fp8'"),
        (
            {"max_num_tokens": 2**21 - 1, "top_k": 32, "world_size": 64, "num_experts": 64},
            r"max_num_tokens=2097151 .* more than a 32-bit index",
        ),
    ],
)
def test_shape(changes, message):
    with pytest.raises(ArgumentError, match=message):
        LayerShape(**{**SIZES, **changes})


def test_shape_of_another_group_size():
    from megamoe_ep.bootstrap import Group

    with pytest.raises(ArgumentError, match=r"shape\.world_size must be the size of group, 1"):
        SymmBuffer(Group.of(None), LayerShape(**{**SIZES, "world_size": 2}), device="cpu")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"timeout_s": 0.0}, ArgumentError, r"timeout_s must be a positive number .* got 0\.0"),
        (
            {"comm_sms": 0},
            ArgumentError,
            r"comm_sms must be at least 1, or None for all SMs; got 0",
        ),
        ({"device": "meta"}, UnsupportedDeviceError, r"device must be 'cpu' or 'cuda'; got 'meta'"),
        (
            {"max_num_tokens": 2**21 - 1, "hidden_size": 65536},
            HeapTooSmallError,
            r"the layer needs \d+ bytes of symmetric memory .* lower max_num_tokens",
        ),
    ],
)
def test_buffer(changes, error, message):
    with pytest.raises(error, match=message):
        create(**changes)


def test_gpus_that_nothing_fast_connects(monkeypatch):
    from megamoe_ep.kernels import cuda_comm, library

    def gather(mine, timeout_s):
        return [mine, 1] if isinstance(mine, int) else [mine, [0]]

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    able = SimpleNamespace(comm_adds_to_peer=lambda device, peer: False)
    monkeypatch.setattr(library, "load", lambda: able)
    buffer = SimpleNamespace(
        group=SimpleNamespace(world_size=2, all_gather_object=gather),
        device=torch.device("cuda", 0),
        timeout_s=1.0,
    )
    with pytest.raises(HeapError, match=r"must be able to add .* rank: \{0: \[1\], 1: "):
        cuda_comm._check_links(buffer)
    able.comm_adds_to_peer = lambda device, peer: True
    buffer.group.all_gather_object = lambda mine, timeout_s: [mine] * 2
    cuda_comm._check_links(buffer)


def test_group_of_something_else():
    with pytest.raises(ArgumentError, match=r"group must be a Group, a torch ProcessGroup"):
        get_symm_buffer_for_nvfp4_mega_moe("world", E, T, K, H, I, device="cpu")


# Staging


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("x", lambda t: t.float(), r"x must be torch\.bfloat16; got torch\.float32"),
        ("x", lambda t: t[:, :32], rf"x must have shape \[n, {H}\]; got \[3, 32\]"),
        ("x", lambda t: t[0], rf"x must have shape \[n, {H}\]; got \[{H}\]"),
        ("x", lambda t: t.tolist(), r"x must be a tensor; got list"),
        ("x", lambda t: t.t().contiguous().t(), r"x must be contiguous; got strides \[1, 3\]"),
        ("x", lambda t: t.to("meta"), r"x must be on cpu, like buffer; got meta"),
        ("x", lambda t: odd(t), r"x must start at a multiple of 16 bytes; got a view that starts"),
        ("topk_idx", lambda t: t.long(), r"topk_idx must be torch\.int32; got torch\.int64"),
        ("topk_idx", lambda t: t[:2], r"topk_idx must have shape \[3, 2\]; got \[2, 2\]"),
        ("topk_weights", lambda t: t.bfloat16(), r"topk_weights must be torch\.float32; got"),
        ("x", lambda t: t.requires_grad_(), "x must not require a gradient, since the layer has"),
        ("topk_weights", lambda t: t.requires_grad_(), "topk_weights must not require a gradient"),
        (
            "topk_weights",
            lambda t: t[:, :1],
            r"topk_weights must have shape \[3, 2\]; got \[3, 1\]",
        ),
    ],
)
def test_staged_tensor(buffer, name, change, message):
    given = tokens()
    given[name] = change(given[name])
    with pytest.raises(ArgumentError, match=message):
        stage_activation(**given, buffer=buffer)


def test_too_many_tokens(buffer):
    with pytest.raises(ArgumentError, match=rf"x must have at most max_num_tokens={T} rows; got 9"):
        stage_activation(**tokens(9), buffer=buffer)


@pytest.mark.parametrize("expert", [E, -2, 2**31 - 1])
def test_expert_out_of_range(buffer, expert):
    given = tokens()
    given["topk_idx"][1, 0] = expert
    message = (
        rf"topk_idx must hold experts 0 to 3, or -1 for none; got {expert} for token 1, slot 0"
    )
    with pytest.raises(ArgumentError, match=message):
        stage_activation(**given, buffer=buffer)


@pytest.mark.parametrize(
    ("num_tokens", "message"),
    [
        (4, r"num_tokens must be 0 to 3, the rows of x; got 4"),
        (-1, r"num_tokens must be 0 to 3, the rows of x; got -1"),
        (torch.tensor([4], dtype=torch.int32), r"num_tokens must be 0 to 3, .* got 4"),
        (2.5, r"num_tokens must be 0 to 3, the rows of x; got 2\.5"),
        (torch.tensor([2]), r"num_tokens must be torch\.int32; got torch\.int64"),
        (torch.tensor(2, dtype=torch.int32), r"num_tokens must have shape \[1\]; got \[\]"),
    ],
)
def test_num_tokens(buffer, num_tokens, message):
    with pytest.raises(ArgumentError, match=message):
        stage_activation(**tokens(), buffer=buffer, num_tokens=num_tokens)


@pytest.mark.parametrize("scale", [0.01, torch.ones(5), torch.ones(1, dtype=torch.float64)])
def test_static_scale(buffer, scale):
    buffer.input_global_scale = scale
    with pytest.raises(ArgumentError, match=r"buffer\.input_global_scale must"):
        stage_activation(**tokens(), buffer=buffer)


# The layer


def layer_arguments(buffer, n=3):
    layer = MegaMoE.from_experts(random_experts(E, H, I, seed=0), buffer)
    return {
        "y": torch.empty(n, H, dtype=torch.bfloat16),
        "l1_weights": layer.l1_weights,
        "l2_weights": layer.l2_weights,
        "l1_alpha": layer.l1_alpha,
        "l2_alpha": layer.l2_alpha,
    }


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("y", lambda t: t.float(), r"y must be torch\.bfloat16; got torch\.float32"),
        ("y", lambda t: t[:2], r"y must have a row for each of the 3 staged tokens; got \[2, 64\]"),
        ("y", lambda t: t[:, ::2], r"y must have shape \[n, 64\]; got \[3, 32\]"),
        ("y", lambda t: odd(t), r"y must start at a multiple of 16 bytes; got a view that starts"),
        (
            "l1_weights",
            lambda w: (w.codes, w.scales),
            r"l1_weights must come from transform_weights_for_nvfp4_mega_moe\(\); got",
        ),
        (
            "l1_weights",
            lambda w: dataclasses.replace(w, num_experts=3),
            r"l1_weights must be of 4 local experts, each 64 x 64; got 3 experts",
        ),
        (
            "l2_weights",
            lambda w: dataclasses.replace(w, n=I, k=H),
            r"l2_weights must be of 4 local experts, each 64 x 32; got 4 experts, each 32 x 64",
        ),
        (
            "l2_weights",
            lambda w: dataclasses.replace(w, codes=w.codes.to("meta")),
            r"l2_weights must be on cpu, like buffer; got meta",
        ),
        (
            "l2_weights",
            lambda w: dataclasses.replace(w, layout="sm90"),
            r"l1_weights and l2_weights must have the same layout; got 'portable' and 'sm90'",
        ),
        ("l1_alpha", lambda t: t[:, 0], r"l1_alpha must have shape \[4, 2\]; got \[4\]"),
        ("l1_alpha", lambda t: t.double(), r"l1_alpha must be torch\.float32; got torch\.float64"),
        ("l2_alpha", lambda t: t[:3], r"l2_alpha must have shape \[4\]; got \[3\]"),
    ],
)
def test_layer_tensor(buffer, name, change, message):
    stage_activation(**tokens(), buffer=buffer)
    given = layer_arguments(buffer)
    given[name] = change(given[name])
    with pytest.raises(ArgumentError, match=message):
        nvfp4_mega_moe(**given, buffer=buffer)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"combine": "sum"}, r"combine must be 'exact' or 'fast'; got 'sum'"),
        ({"activation_clamp": 0.0}, r"activation_clamp must be a positive number; got 0\.0"),
        (
            {"activation_clamp": float("nan")},
            r"activation_clamp must be a positive number; got nan",
        ),
        ({"l2_input_scale": torch.ones(3)}, r"l2_input_scale must have shape \[4\]; got \[3\]"),
        (
            {"cumulative_local_expert_recv_stats": torch.zeros(E)},
            r"cumulative_local_expert_recv_stats must be torch\.int64; got torch\.float32",
        ),
        (
            {"cumulative_local_expert_recv_stats": torch.zeros(5, dtype=torch.int32)},
            r"cumulative_local_expert_recv_stats must have shape \[4\]; got \[5\]",
        ),
    ],
)
def test_layer_option(buffer, extra, message):
    stage_activation(**tokens(), buffer=buffer)
    with pytest.raises(ArgumentError, match=message):
        nvfp4_mega_moe(**layer_arguments(buffer), buffer=buffer, **extra)


STAGED = ("x", "topk_idx", "topk_weights")
OPTIONAL = {
    "l2_input_scale": torch.ones(E),
    "cumulative_local_expert_recv_stats": torch.zeros(E, dtype=torch.int32),
}


@pytest.mark.parametrize("name", [*STAGED, "y", "l1_alpha", "l2_alpha", *OPTIONAL])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.tolist(), "must be a tensor; got list"),
        (lambda t: t.to("meta"), "must be on cpu, like buffer; got meta"),
        (lambda t: torch.stack((t, t), -1)[..., 0], "must be contiguous; got strides"),
        (lambda t: t.bool(), r"must be torch\.\w+; got torch\.bool"),
        (lambda t: t[None], r"must have shape \[.*\]; got \[1, "),
    ],
)
def test_every_tensor(buffer, name, change, message):
    """Of another type, device, layout, dtype or number of dimensions."""
    staged, given = tokens(), {**layer_arguments(buffer), **OPTIONAL}
    stage_activation(**staged, buffer=buffer)
    arguments, call = (staged, stage_activation) if name in STAGED else (given, nvfp4_mega_moe)
    arguments[name] = change(arguments[name])
    with pytest.raises(ArgumentError, match=f"^{name} {message}"):
        call(**arguments, buffer=buffer)


def test_input_scale_with_bf16_activations():
    with create(activation_format="bf16") as buffer:
        stage_activation(**tokens(), buffer=buffer)
        with pytest.raises(ArgumentError, match=r"l2_input_scale must be None when activation_for"):
            nvfp4_mega_moe(**layer_arguments(buffer), buffer=buffer, l2_input_scale=torch.ones(E))


def test_unknown_layout(buffer):
    stage_activation(**tokens(), buffer=buffer)
    given = layer_arguments(buffer)
    for name in ("l1_weights", "l2_weights"):
        given[name] = dataclasses.replace(given[name], layout="sm75")
    with pytest.raises(ArgumentError, match=r"layout must be 'portable', 'sm90' or 'sm100'"):
        nvfp4_mega_moe(**given, buffer=buffer)


def test_use_after_destroy():
    buffer = create()
    given = layer_arguments(buffer)
    buffer.destroy()
    buffer.destroy()
    with pytest.raises(BufferDestroyedError, match=r"buffer was used after destroy\(\); create a"):
        stage_activation(**tokens(), buffer=buffer)
    with pytest.raises(BufferDestroyedError, match=r"buffer was used after destroy\(\)"):
        nvfp4_mega_moe(**given, buffer=buffer)


def test_buffer_of_another_layer(buffer, tmp_path):
    from megamoe_ep.weights import write_modelopt_checkpoint

    write_modelopt_checkpoint(tmp_path, 0, random_experts(8, H, I))
    with pytest.raises(ArgumentError, match=r"buffer must be of the layer's shape"):
        MegaMoE.from_checkpoint(tmp_path, layer=0, max_num_tokens=T, top_k=K, buffer=buffer)


# What is not an error


def test_a_device_by_its_number():
    with create(device="cpu:0") as made:
        assert made.device == torch.device("cpu")
        stage_activation(**tokens(), buffer=made)


def test_bytes_are_known_before_anything_is_allocated(buffer):
    sizes = {name: size for name, size in SIZES.items() if name != "world_size"}
    assert SymmBuffer.nbytes_for(1, **sizes) == len(buffer.buffer)
    assert SymmBuffer.nbytes_for(2, **sizes) > SymmBuffer.nbytes_for(1, **sizes)


def test_broken_tokens_stay_alone(buffer):
    given = tokens()
    stage_activation(**given, buffer=buffer)
    arguments = layer_arguments(buffer)
    nvfp4_mega_moe(**arguments, buffer=buffer)
    sound = arguments["y"].clone()

    given["x"][0, 5] = float("nan")
    given["x"][2, 7] = float("-inf")
    stage_activation(**given, buffer=buffer)
    nvfp4_mega_moe(**arguments, buffer=buffer)
    y = arguments["y"]
    assert y[0].isnan().all()
    assert y[2].isnan().all()
    assert torch.equal(y[1], sound[1])


def test_no_tokens(buffer):
    stage_activation(**tokens(0), buffer=buffer)
    nvfp4_mega_moe(**layer_arguments(buffer, n=0), buffer=buffer)


def test_rows_past_num_tokens_are_not_written(buffer):
    stage_activation(**tokens(3), buffer=buffer, num_tokens=2)
    arguments = layer_arguments(buffer, n=5)
    arguments["y"].fill_(7)
    nvfp4_mega_moe(**arguments, buffer=buffer)
    assert (arguments["y"][2:] == 7).all()
    assert not (arguments["y"][:2] == 7).all(1).any()


def test_ranks_that_combine_differently(buffer, monkeypatch):
    others = [("exact", None, None), ("fast", None, None)]
    monkeypatch.setattr(buffer.group, "all_gather_object", lambda mine, timeout_s: others)
    with pytest.raises(LayerMismatchError, match="every rank must give the same combine and activ"):
        MegaMoE.from_experts(random_experts(E, H, I), buffer)


def test_a_copy_of_a_layer(buffer):
    layer = MegaMoE.from_experts(random_experts(E, H, I), buffer)
    with pytest.raises(ArgumentError, match="a MegaMoE cannot be copied"):
        copy.deepcopy(torch.nn.Sequential(layer))


def test_what_is_done_to_a_whole_model_leaves_the_layer_as_it_is(buffer):
    layer = MegaMoE.from_experts(random_experts(E, H, I), buffer)
    before = layer(**tokens())
    torch.nn.Sequential(layer).bfloat16().half().float().to("meta")
    assert torch.equal(layer(**tokens()), before)


def test_nothing_of_the_buffer_after_destroy():
    made = create()
    made.destroy()
    assert made.kernel_state is None
    for name in ("x", "peers", "workspace"):
        with pytest.raises(AttributeError, match=f"'{name}'; its memory was given back by destroy"):
            getattr(made, name)
