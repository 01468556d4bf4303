"""Checkpoints on disk: what is read, what is not, and every fault by its own sentence."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megamoe_ep import MegaMoE, nvfp4, reference, transform_weights_for_nvfp4_mega_moe
from megamoe_ep.errors import ArgumentError, BufferDestroyedError, CheckpointError
from megamoe_ep.weights import (
    CheckpointExperts,
    LayerSize,
    describe_layer,
    random_experts,
    read_modelopt_experts,
    write_modelopt_checkpoint,
)

E, H, I, LAYER = 6, 64, 32, 3  # noqa: E741
INDEX = "model.safetensors.index.json"
FILE = "model.safetensors"
PREFIX = f"model.layers.{LAYER}.mlp.experts"


@pytest.fixture(scope="module")
def experts() -> CheckpointExperts:
    made = random_experts(E, H, I, seed=5)
    # Gate and up far apart, and so are the experts: a scale read into the wrong place shows.
    spread = torch.linspace(0.5, 4, 2 * E).view(E, 2)
    return dataclasses.replace(made, w13_scale_2=made.w13_scale_2 * spread)


@pytest.fixture(scope="module")
def written(experts, tmp_path_factory) -> dict[int, Path]:
    """Checkpoints of ``experts``, by the number of files that they are spread over."""
    folders = {}
    for num_files in (1, 3):
        folders[num_files] = tmp_path_factory.mktemp(f"files{num_files}")
        write_modelopt_checkpoint(folders[num_files], LAYER, experts, num_files=num_files)
    return folders


@pytest.fixture(params=[1, 3])
def folder(request, written, tmp_path) -> Path:
    """A copy to damage, of one file or of three with an index."""
    return Path(shutil.copytree(written[request.param], tmp_path / "checkpoint"))


def assert_same(read: CheckpointExperts, experts: CheckpointExperts, rows: range) -> None:
    for field in dataclasses.fields(experts):
        got, expected = getattr(read, field.name), getattr(experts, field.name)
        if field.name == "first_expert":
            assert got == rows.start
        elif expected is None:
            assert got is None, field.name
        else:
            assert (got.dtype, got.shape[1:]) == (expected.dtype, expected.shape[1:]), field.name
            assert torch.equal(
                got.view(torch.uint8), expected[rows.start : rows.stop].view(torch.uint8)
            ), field.name


def file_of(folder: Path, tensor: str) -> Path:
    if (folder / INDEX).exists():
        return folder / json.loads((folder / INDEX).read_text())["weight_map"][tensor]
    return folder / FILE


def rewrite(folder: Path, tensor: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Path:
    """Puts ``change`` of a tensor in its place; the file."""
    file = file_of(folder, tensor)
    tensors = load_file(file)
    tensors[tensor] = change(tensors[tensor])
    save_file(tensors, file)
    return file


def rename_all(
    folder: Path, change: Callable[[str, torch.Tensor], tuple[str, torch.Tensor]]
) -> None:
    file = folder / FILE
    save_file(dict(change(name, t) for name, t in load_file(file).items()), file)


# What is read


@pytest.mark.parametrize("num_files", [1, 3])
@pytest.mark.parametrize("rows", [range(E), range(2), range(1, 5), range(E - 1, E)])
def test_what_was_written_is_read(written, experts, num_files, rows):
    folder = written[num_files]
    assert describe_layer(folder, LAYER) == LayerSize(E, H, I)
    assert_same(read_modelopt_experts(folder, LAYER, rows), experts, rows)


def test_a_file_by_its_own_path(written, experts):
    assert_same(read_modelopt_experts(written[1] / FILE, LAYER, range(E)), experts, range(E))
    index = written[3] / INDEX
    assert_same(read_modelopt_experts(index, LAYER, range(E)), experts, range(E))


def test_without_static_input_scales(experts, tmp_path):
    dynamic = dataclasses.replace(experts, w13_input_scale=None, w2_input_scale=None)
    write_modelopt_checkpoint(tmp_path, LAYER, dynamic)
    assert_same(read_modelopt_experts(tmp_path, LAYER, range(E)), dynamic, range(E))


def test_gate_and_up_share_the_larger_input_scale(folder, experts):
    rewrite(folder, f"{PREFIX}.1.up_proj.input_scale", lambda t: t * 5)
    rewrite(folder, f"{PREFIX}.2.up_proj.input_scale", lambda t: t / 5)
    scales = read_modelopt_experts(folder, LAYER, range(E)).w13_input_scale
    assert torch.equal(scales, experts.w13_input_scale * torch.tensor([1, 5, 1, 1, 1, 1.0]))


def test_scalars_of_one_element(folder, experts):
    rewrite(folder, f"{PREFIX}.0.gate_proj.weight_scale_2", lambda t: t.view(1))
    assert_same(read_modelopt_experts(folder, LAYER, range(E)), experts, range(E))


@pytest.mark.parametrize(
    "prefix",
    [
        "model.layers.3.block_sparse_moe.experts",
        "model.language_model.layers.3.feed_forward.experts",
        "layers.3.ffn.experts",
    ],
)
def test_names_of_other_models(written, experts, tmp_path, prefix):
    shutil.copytree(written[1], tmp_path, dirs_exist_ok=True)
    called = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}

    def change(name, tensor):
        for ours, theirs in called.items():
            name = name.replace(ours, theirs)
        return name.replace(PREFIX, prefix), tensor

    rename_all(tmp_path, change)
    assert_same(read_modelopt_experts(tmp_path, LAYER, range(E)), experts, range(E))
    assert_same(read_modelopt_experts(tmp_path, prefix, range(E)), experts, range(E))


def test_layers_do_not_mix(tmp_path, experts):
    """Layer 3 is not layer 13, nor 31; other tensors of the model are none of ours."""
    write_modelopt_checkpoint(tmp_path, LAYER, experts)
    tensors = load_file(tmp_path / FILE)
    others = random_experts(2, H, I, seed=6)
    for layer in (0, 13, 31):
        write_modelopt_checkpoint(tmp_path / "other", layer, others)
        tensors |= load_file(tmp_path / "other" / FILE)
    tensors["model.layers.3.mlp.gate.weight"] = torch.ones(E, H)
    tensors["model.layers.3.mlp.shared_experts.gate_proj.weight"] = torch.ones(2, 2)
    save_file(tensors, tmp_path / FILE)
    assert describe_layer(tmp_path, LAYER) == LayerSize(E, H, I)
    assert describe_layer(tmp_path, 13) == LayerSize(2, H, I)
    assert_same(read_modelopt_experts(tmp_path, LAYER, range(E)), experts, range(E))
    assert_same(read_modelopt_experts(tmp_path, 31, range(2)), others, range(2))


def test_compressed_tensors_store_reciprocals(written, experts, tmp_path):
    shutil.copytree(written[1], tmp_path, dirs_exist_ok=True)
    renamed = {
        ".weight": ".weight_packed",
        ".weight_scale_2": ".weight_global_scale",
        ".input_scale": ".input_global_scale",
    }

    def change(name, tensor):
        for ours, theirs in renamed.items():
            if name.endswith(ours):
                divides = tensor.dtype == torch.float32
                return name.removesuffix(ours) + theirs, tensor.reciprocal() if divides else tensor
        return name, tensor

    rename_all(tmp_path, change)
    read = read_modelopt_experts(tmp_path, LAYER, range(E))
    for name in ("w13", "w13_scale", "w2", "w2_scale"):
        assert torch.equal(
            getattr(read, name).view(torch.uint8), getattr(experts, name).view(torch.uint8)
        )
    for name in ("w13_scale_2", "w2_scale_2", "w13_input_scale", "w2_input_scale"):
        # A reciprocal of a reciprocal in fp32 is one or two units in the last place off.
        torch.testing.assert_close(
            getattr(read, name), getattr(experts, name), rtol=2**-22, atol=0.0
        )


# What is not read


@pytest.mark.parametrize("rows", [range(2), range(2, 4), range(4, 6)])
def test_files_of_other_experts_are_not_opened(written, experts, tmp_path, rows):
    folder = Path(shutil.copytree(written[3], tmp_path / "checkpoint"))
    own = {file_of(folder, f"{PREFIX}.{e}.gate_proj.weight") for e in rows}
    assert len(own) == 1
    for file in set(folder.glob("*.safetensors")) - own:
        file.unlink()
    assert_same(read_modelopt_experts(folder, LAYER, rows), experts, rows)


def test_bytes_of_other_experts_are_not_read(tmp_path):
    """By the kernel's own count of what this process has read."""
    hidden, inter, count = 512, 256, 16
    made = random_experts(count, hidden, inter)
    write_modelopt_checkpoint(tmp_path, LAYER, made)
    file = tmp_path / FILE
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    expert = (file.stat().st_size - header) // count

    def bytes_read_for(rows: range) -> int:
        before = _bytes_read()
        read = read_modelopt_experts(tmp_path, LAYER, rows)
        spent = _bytes_read() - before
        assert_same(read, made, rows)
        return spent

    slack = 16 << 10  # the header is read in pages; so is /proc
    assert bytes_read_for(range(0, 1)) <= header + expert + slack
    for rows in (range(5, 7), range(15, 16)):
        assert len(rows) * expert <= bytes_read_for(rows) <= len(rows) * expert + slack


def _bytes_read() -> int:
    facts = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(facts["rchar"])


def test_a_description_reads_no_data(folder, experts):
    """Damage of the data alone is met by those who read it."""
    file = file_of(folder, f"{PREFIX}.5.down_proj.weight_scale")
    data = bytearray(file.read_bytes())
    tensor = load_file(file)[f"{PREFIX}.5.down_proj.weight_scale"].view(torch.uint8)
    at = data.find(tensor.numpy().tobytes())
    data[at + 7] = 0x7F  # NaN
    file.write_bytes(data)
    assert describe_layer(folder, LAYER) == LayerSize(E, H, I)
    assert_same(read_modelopt_experts(folder, LAYER, range(5)), experts, range(5))
    with pytest.raises(
        CheckpointError, match=r"5\.down_proj\.weight_scale.* element 7 is byte 0x7"
    ):
        read_modelopt_experts(folder, LAYER, range(4, 6))


# From disk to the layer's output


@pytest.mark.parametrize("activation_format", ["nvfp4", "bf16"])
@pytest.mark.parametrize("static", [True, False])
def test_from_checkpoint_to_the_oracle_s_output(experts, tmp_path, static, activation_format):
    given = experts
    if not static:
        given = dataclasses.replace(experts, w13_input_scale=None, w2_input_scale=None)
    write_modelopt_checkpoint(tmp_path, LAYER, given, num_files=2)
    layer = MegaMoE.from_checkpoint(
        tmp_path,
        layer=LAYER,
        max_num_tokens=12,
        top_k=3,
        activation_format=activation_format,
        activation_clamp=1.0,
        device="cpu",
    )
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(12, H, generator=generator).bfloat16()
    ids = torch.randint(-1, E, (12, 3), generator=generator, dtype=torch.int32)
    weights = torch.rand(12, 3, generator=generator)
    with layer.buffer:
        y = layer(x, ids, weights)
    oracle = reference.moe_layer(
        x, ids, weights, given, activation_format=activation_format, activation_clamp=1.0
    )
    assert reference.relative_l2_error(y, oracle) < 1e-5
    swapped = dataclasses.replace(given, w13_scale_2=given.w13_scale_2.flip(1))
    other = reference.moe_layer(
        x, ids, weights, swapped, activation_format=activation_format, activation_clamp=1.0
    )
    assert reference.relative_l2_error(y, other) > 0.05, "gate's and up's scales are told apart"


def test_layers_share_a_buffer(experts, tmp_path):
    for layer in (0, 1):
        write_modelopt_checkpoint(tmp_path / str(layer), layer, experts)
    first = MegaMoE.from_checkpoint(
        tmp_path / "0", layer=0, max_num_tokens=4, top_k=2, device="cpu"
    )
    with first.buffer as buffer:
        second = MegaMoE.from_checkpoint(tmp_path / "1", layer=1, buffer=buffer)
        assert second.buffer is first.buffer
        with pytest.raises(ArgumentError, match=r"'top_k': 3}; got one of .*top_k=2"):
            MegaMoE.from_checkpoint(tmp_path / "1", layer=1, top_k=3, buffer=buffer)
        x = torch.ones(4, H, dtype=torch.bfloat16)
        ids, weights = torch.tensor([[0, 5]] * 4, dtype=torch.int32), torch.ones(4, 2)
        assert torch.equal(first(x, ids, weights), second(x, ids, weights))


def test_random_experts_do_not_depend_on_their_number(experts):
    few, many = random_experts(2, H, I, seed=9), random_experts(4, H, I, seed=9)
    assert torch.equal(few.w13, many.w13[:2])
    assert torch.equal(few.w2_scale_2, many.w2_scale_2[:2])
    assert not torch.equal(many.w13[0], many.w13[1])


# Faults


def drop(tensor: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        file = file_of(folder, tensor)
        tensors = load_file(file)
        del tensors[tensor]
        save_file(tensors, file)

    return damage


def change_of(tensor: str, change: Callable[[torch.Tensor], torch.Tensor]):
    return lambda folder: rewrite(folder, tensor, change)


def cut(nbytes: int) -> Callable[[Path], None]:
    """Takes the last bytes off the file of the last expert."""

    def damage(folder: Path) -> None:
        file = file_of(folder, f"{PREFIX}.{E - 1}.up_proj.weight")
        file.write_bytes(file.read_bytes()[:-nbytes])

    return damage


def header_of(change: Callable[[dict], None]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        file = file_of(folder, f"{PREFIX}.0.gate_proj.weight")
        data = file.read_bytes()
        length = int.from_bytes(data[:8], "little")
        described = json.loads(data[8 : 8 + length])
        change(described)
        header = json.dumps(described).encode()
        file.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])

    return damage


def shorten(name: str) -> Callable[[dict], None]:
    def change(described: dict) -> None:
        described[name]["data_offsets"][1] -= 1

    return change


FAULTS = {
    "missing tensor": (
        drop(f"{PREFIX}.4.up_proj.weight_scale"),
        rf"tensor '{PREFIX}\.4\.up_proj\.weight_scale' is missing from",
    ),
    "missing input scale": (
        drop(f"{PREFIX}.1.gate_proj.input_scale"),
        rf"tensor '{PREFIX}\.1\.gate_proj\.input_scale' is missing from",
    ),
    "missing global scale": (
        drop(f"{PREFIX}.0.down_proj.weight_scale_2"),
        rf"tensor '{PREFIX}\.0\.down_proj\.weight_scale_2' is missing from",
    ),
    "codes of another dtype": (
        change_of(f"{PREFIX}.2.gate_proj.weight", lambda t: t.bfloat16()),
        r"2\.gate_proj\.weight' in '.*' must be of dtype U8; got BF16\. Is this layer quantised",
    ),
    "scales of another dtype": (
        change_of(f"{PREFIX}.2.gate_proj.weight_scale", lambda t: t.float()),
        r"2\.gate_proj\.weight_scale' in '.*' must be of dtype F8_E4M3; got F32",
    ),
    "global scale of another dtype": (
        change_of(f"{PREFIX}.3.up_proj.weight_scale_2", lambda t: t.half()),
        r"3\.up_proj\.weight_scale_2' in '.*' must be of dtype F32; got F16",
    ),
    "codes of another shape": (
        change_of(f"{PREFIX}.2.down_proj.weight", lambda t: t.t().contiguous()),
        rf"2\.down_proj\.weight' in '.*' must have shape \[{H}, {I // 2}\]; got \[{I // 2}, {H}\]",
    ),
    "scales of another shape": (
        change_of(f"{PREFIX}.2.down_proj.weight_scale", lambda t: t[:-1].clone()),
        rf"2\.down_proj\.weight_scale' in '.*' must have shape \[{H}, 2\]; got \[{H - 1}, 2\]",
    ),
    "global scales of many": (
        change_of(f"{PREFIX}.0.gate_proj.weight_scale_2", lambda t: t.repeat(3)),
        r"0\.gate_proj\.weight_scale_2' in '.*' must have shape \[\]; got \[3\]",
    ),
    "expert of another size": (
        change_of(f"{PREFIX}.5.gate_proj.weight", lambda t: t[:16].clone()),
        rf"5\.gate_proj\.weight' in '.*' must have shape \[{I}, {H // 2}\]; got \[16, {H // 2}\]",
    ),
    "size that is no multiple of a block": (
        change_of(f"{PREFIX}.0.gate_proj.weight", lambda t: t[:, :-1].clone()),
        rf"must have shape \[I, H/2\], two codes a byte, I and H multiples of 16; got \[{I}, 31\]",
    ),
    "truncated data": (
        cut(100),
        r"tensor '.*experts\.5\..*' in '.*' is truncated: it ends at byte \d+, the file at \d+\.",
    ),
    "bytes that do not suit the shape": (
        header_of(shorten(f"{PREFIX}.0.up_proj.weight")),
        r"0\.up_proj\.weight' in '.*' must take 1024 bytes; the file's header gives it 1023",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_met_before_any_data_is_read(folder, fault):
    """By every rank, whichever experts are its own."""
    damage, message = FAULTS[fault]
    damage(folder)
    with pytest.raises(CheckpointError, match=message):
        describe_layer(folder, LAYER)
    with pytest.raises(CheckpointError, match=message):
        MegaMoE.from_checkpoint(folder, layer=LAYER, max_num_tokens=1, top_k=1, device="cpu")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("gate_proj.weight_scale_2", math.nan, r"positive and finite; got nan\. Is the file dam"),
        ("down_proj.weight_scale_2", math.inf, r"positive and finite; got inf"),
        ("up_proj.weight_scale_2", -1.0, r"positive and finite; got -1\.0"),
        ("down_proj.input_scale", 0.0, r"positive and finite; got 0\.0.* expert never calibrated"),
    ],
)
def test_number_out_of_range(folder, name, value, message):
    rewrite(folder, f"{PREFIX}.1.{name}", lambda t: torch.full_like(t, value))
    with pytest.raises(CheckpointError, match=rf"'{PREFIX}\.1\.{name}'.* must be {message}"):
        read_modelopt_experts(folder, LAYER, range(E))


def test_negative_block_scale(folder):
    rewrite(
        folder,
        f"{PREFIX}.1.up_proj.weight_scale",
        lambda t: (t.view(torch.uint8) | 0x80).view(torch.float8_e4m3fn),
    )
    with pytest.raises(CheckpointError, match=r"1\.up_proj\.weight_scale'.* numbers and not negat"):
        read_modelopt_experts(folder, LAYER, range(E))


def test_global_scale_of_a_matrix_of_zeros(folder):
    rewrite(folder, f"{PREFIX}.1.up_proj.weight_scale_2", torch.zeros_like)
    assert read_modelopt_experts(folder, LAYER, range(E)).w13_scale_2[1, 1] == 0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"must be a safetensors file; its header cannot be read.* Is it truncated"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", r"or a pointer of git-lfs"),
        ((1 << 40).to_bytes(8, "little") + b"{}", r"header of 1099511627776 bytes in a file of 10"),
        ((5).to_bytes(8, "little") + b"hello", r"must be a safetensors file; its header cannot be"),
        ((2).to_bytes(8, "little") + b"[]", r"must be a safetensors file; its header cannot be re"),
    ],
)
def test_file_of_something_else(tmp_path, content, message):
    (tmp_path / FILE).write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        describe_layer(tmp_path, LAYER)


@pytest.mark.parametrize("name", [FILE, "model-00001.safetensors"])
def test_folder_in_the_place_of_a_file(tmp_path, name):
    (tmp_path / name).mkdir()
    with pytest.raises(CheckpointError, match=r"header cannot be read: IsADirectoryError"):
        describe_layer(tmp_path, LAYER)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"must be JSON with a 'weight_map' from tensors to files"),
        ("[]", r"must be JSON with a 'weight_map'"),
        ('{"weight_map": {"a": 1}}', r"must be JSON with a 'weight_map'"),
        (
            '{"weight_map": {"a": "../model.safetensors"}}',
            r"must name files of its own folder; got '\.\./model\.safetensors' for tensor 'a'",
        ),
        ('{"weight_map": {"a": "/etc/passwd"}}', r"must name files of its own folder; got '/etc"),
    ],
)
def test_index_of_something_else(tmp_path, content, message):
    (tmp_path / INDEX).write_text(content)
    with pytest.raises(CheckpointError, match=message):
        describe_layer(tmp_path, LAYER)


def test_file_of_the_index_is_missing(written, tmp_path):
    folder = Path(shutil.copytree(written[3], tmp_path / "checkpoint"))
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(
        CheckpointError, match=r"'.*model-00002-of-00003\.safetensors' is missing, though the check"
    ):
        describe_layer(folder, LAYER)


def test_tensor_is_not_where_the_index_says(written, tmp_path):
    folder = Path(shutil.copytree(written[3], tmp_path / "checkpoint"))
    index = json.loads((folder / INDEX).read_text())
    name = f"{PREFIX}.5.gate_proj.weight"
    index["weight_map"][name] = "model-00001-of-00003.safetensors"
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=rf"'{name}' is missing from '.*00001-.*', where '.*"):
        describe_layer(folder, LAYER)


def test_no_such_layer(folder):
    with pytest.raises(
        CheckpointError, match=rf"layers\.7\.\.\.experts.* found none\. Experts it has: {PREFIX}\."
    ):
        describe_layer(folder, 7)
    with pytest.raises(
        CheckpointError, match=r"tensors 'mtp\.experts\.<id>.* Experts it has: mode"
    ):
        describe_layer(folder, "mtp.experts")


def test_several_layers_of_one_number(written, tmp_path):
    tensors = load_file(written[1] / FILE)
    tensors |= {f"mtp.{name}": tensor.clone() for name, tensor in tensors.items()}
    save_file(tensors, tmp_path / FILE)
    with pytest.raises(CheckpointError, match=r"has several layers 3: .* Give one of these names"):
        describe_layer(tmp_path, LAYER)
    assert describe_layer(tmp_path, f"mtp.{PREFIX}") == LayerSize(E, H, I)


def test_no_checkpoint_at_all(tmp_path):
    with pytest.raises(CheckpointError, match=r"no checkpoint at '.*nowhere': there is no such"):
        describe_layer(tmp_path / "nowhere", LAYER)
    with pytest.raises(CheckpointError, match=r"must hold '.*' or one safetensors file; it has 0"):
        describe_layer(tmp_path, LAYER)


def test_two_files_and_no_index(written, tmp_path):
    for name in ("a.safetensors", "b.safetensors"):
        shutil.copy(written[1] / FILE, tmp_path / name)
    with pytest.raises(CheckpointError, match=r"or one safetensors file; it has 2 of those"):
        describe_layer(tmp_path, LAYER)


@pytest.mark.parametrize("rows", [range(0), range(4, 7), range(-1, 2), range(0, 4, 2)])
def test_experts_that_are_not_there(folder, rows):
    with pytest.raises(ArgumentError, match=r"experts must be consecutive ids within 0 to 5"):
        read_modelopt_experts(folder, LAYER, rows)


def test_one_file_written_over_two_is_what_is_read(experts, tmp_path):
    write_modelopt_checkpoint(tmp_path, LAYER, experts, num_files=2)
    others = random_experts(E, H, I, seed=9)
    write_modelopt_checkpoint(tmp_path, LAYER, others)
    assert torch.equal(read_modelopt_experts(tmp_path, LAYER, range(E)).w2, others.w2)


@pytest.mark.parametrize(
    "header", ['{"a": ' + "[" * 100_000, '{"a": {"dtype": "U8", "shape": [Infinity]}}']
)
def test_a_header_that_no_reader_can_take(tmp_path, header):
    data = header.encode()
    (tmp_path / "model.safetensors").write_bytes(len(data).to_bytes(8, "little") + data)
    with pytest.raises(CheckpointError, match="its header cannot be read"):
        describe_layer(tmp_path, LAYER)


def test_a_name_that_no_file_can_have(written, tmp_path):
    folder = Path(shutil.copytree(written[3], tmp_path / "checkpoint"))
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"][f"{PREFIX}.0.up_proj.weight"] = "a\0b"
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="is missing, though the checkpoint's index names"):
        describe_layer(folder, LAYER)


@pytest.mark.parametrize("num_files", [0, E + 1])
def test_files_to_write(experts, tmp_path, num_files):
    with pytest.raises(ArgumentError, match=rf"num_files must be 1 to {E}, .*; got {num_files}"):
        write_modelopt_checkpoint(tmp_path, LAYER, experts, num_files=num_files)


# To the kernels' layout


def test_portable_layout_is_the_checkpoint_s(experts):
    l1, l2 = transform_weights_for_nvfp4_mega_moe(
        (experts.w13, experts.w13_scale), (experts.w2, experts.w2_scale)
    )
    assert (l1.layout, l1.num_experts, l1.n, l1.k, l1.gated) == ("portable", E, 2 * I, H, True)
    assert (l2.layout, l2.num_experts, l2.n, l2.k, l2.gated) == ("portable", E, H, I, False)
    assert l1.codes.data_ptr() == experts.w13.data_ptr(), "copied for nothing"
    assert torch.equal(l2.codes, experts.w2)
    assert l2.scales.shape == (E, H, I // nvfp4.BLOCK)


def test_no_such_layout(experts):
    with pytest.raises(ArgumentError, match=r"layout must be one of 'portable', .* got 'sm75'"):
        transform_weights_for_nvfp4_mega_moe(
            (experts.w13, experts.w13_scale), (experts.w2, experts.w2_scale), layout="sm75"
        )


def test_a_buffer_of_its_own_goes_with_the_layer_that_cannot_be_made(folder, experts, monkeypatch):
    with pytest.raises(ArgumentError, match="max_num_tokens and top_k must be given, unless buf"):
        MegaMoE.from_checkpoint(folder, layer=LAYER, top_k=1, device="cpu")
    made = []

    def fail(experts, buffer, **options):
        made.append(buffer)
        raise CheckpointError("as if")

    monkeypatch.setattr(MegaMoE, "from_experts", fail)
    with pytest.raises(CheckpointError, match="as if"):
        MegaMoE.from_checkpoint(folder, layer=LAYER, max_num_tokens=1, top_k=1, device="cpu")
    with pytest.raises(BufferDestroyedError):
        made[0].check()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a, b, c, d: ((a.int(), b), (c, d)), r"l1's codes must be uint8.* got torch\.int32"),
        (
            lambda a, b, c, d: ((a, b), (c, d.float())),
            r"l2's block scales must be float8_e4m3fn; got torch\.float32",
        ),
        (lambda a, b, c, d: ((a[0], b[0]), (c, d)), r"l1's codes must have shape \[L, N, K/2\]"),
        (
            lambda a, b, c, d: ((a, b), (c, d[:, 1:])),
            rf"l2's block scales must have shape \[{E}, {H}, 2\].*; got \[{E}, {H - 1}, 2\]",
        ),
        (
            lambda a, b, c, d: ((c, d), (a, b)),
            r"l1 and l2 must be the two projections of one layer.* got \[6, 64, 16\] and",
        ),
        (
            lambda a, b, c, d: ((a, b), (c[:5], d[:5])),
            r"l1 and l2 must be the two projections of one layer",
        ),
    ],
)
def test_weights_of_something_else(experts, change, message):
    l1, l2 = change(experts.w13, experts.w13_scale, experts.w2, experts.w2_scale)
    with pytest.raises(ArgumentError, match=message):
        transform_weights_for_nvfp4_mega_moe(l1, l2)
