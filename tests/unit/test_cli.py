"""The command line in one process: its options, what it says of wrong ones, its exit status.

Demos over several ranks are in tests/multirank/test_demo.py.
"""

from __future__ import annotations

import importlib
import os
from pathlib import Path

import psutil
import pytest
import torch
from typer.testing import CliRunner

from megamoe_ep import MegaMoE
from megamoe_ep.bootstrap import Group
from megamoe_ep.cli import app
from megamoe_ep.cli.demo import Options, Report, inputs_of, layer_shape, tokens_of
from megamoe_ep.cli.report import bytes_text
from megamoe_ep.heap import host
from megamoe_ep.shape import LayerShape
from megamoe_ep.weights import random_experts, write_modelopt_checkpoint

# As attributes of the package these names are the commands.
demo_module = importlib.import_module("megamoe_ep.cli.demo")
doctor_module = importlib.import_module("megamoe_ep.cli.doctor")


@pytest.fixture
def run(monkeypatch):
    for name in list(os.environ):
        if name.startswith(("OMPI_", "PMIX_", "TORCHELASTIC_")) or name in ("RANK", "WORLD_SIZE"):
            monkeypatch.delenv(name)
    return lambda *arguments: CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    write_modelopt_checkpoint(folder, 2, random_experts(6, 64, 32))
    return folder


@pytest.fixture
def no_ranks(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("ranks were started for arguments that cannot be right")

    monkeypatch.setattr("megamoe_ep.bootstrap.spawn_ranks", refuse)


# Help


@pytest.mark.parametrize("command", [(), ("demo",), ("doctor",), ("bench",)])
def test_help(run, command):
    result = run(*command, "--help")
    assert result.exit_code == 0
    assert "Usage: megamoe-ep" in result.output


def test_unknown_command(run):
    assert run("dance").exit_code == 2


# demo: what is wrong is said before any rank is started


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--checkpoint", "/models/x"],
            r"--checkpoint and --layer must be given together; got /mo",
        ),
        (["--layer", "3"], "--checkpoint and --layer must be given together; got None and 3."),
        (["--combine", "sum"], "--combine must be exact or fast; got 'sum'."),
        (["--timeout", "0"], "--timeout must be a positive number of seconds, and finite; got 0."),
        (
            ["--timeout", "nan"],
            "--timeout must be a positive number of seconds, and finite; got nan.",
        ),
        (["--device", "tpu"], "--device must be cpu or cuda; got 'tpu'."),
        (["--plot", "traffic.pdf"], "--plot must be a file name that ends in .png"),
        (["--plot", "/nonexistent/traffic.png"], "in a folder that exists; got '/nonexistent/tra"),
        (["--ranks", "257"], "group must have at most 256 ranks; got 257."),
        (["--top-k", "33"], "top_k must be at most 32; got 33."),
    ],
)
def test_wrong_option(run, no_ranks, arguments, message):
    result = run("demo", *arguments)
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("ArgumentError: ")
    assert message in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize("option", ["--ranks", "--tokens", "--top-k"])
def test_nothing_of_what_there_must_be_some(run, no_ranks, option):
    result = run("demo", option, 0)
    assert result.exit_code == 2
    assert f"Invalid value for '{option}'" in result.output


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_no_gpu_to_run_on(run, no_ranks):
    result = run("demo", "--device", "cuda")
    assert result.exit_code == 2
    assert "torch sees no GPU; use device='cpu'." in result.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--layer", 7], 1, "CheckpointError: "),
        (["--layer", 7], 1, "...layers.7...experts.<id>."),
        (["--layer", 7], 1, "Experts it has: model.layers.2.mlp.experts."),
        (["--layer", 2, "--ranks", 4], 2, "got 6 experts on 4 ranks."),
        (["--layer", 2, "--ranks", 3, "--top-k", 7], 2, "at most the layer's 6 experts; got 7."),
    ],
)
def test_checkpoint_that_does_not_suit(run, no_ranks, checkpoint, arguments, code, message):
    result = run("demo", "--checkpoint", checkpoint, *arguments)
    assert result.exit_code == code
    assert message in result.stderr


def test_no_checkpoint_there(run, no_ranks, tmp_path):
    result = run("demo", "--checkpoint", tmp_path / "nowhere", "--layer", 0)
    assert result.exit_code == 1
    assert "CheckpointError: no checkpoint at " in result.stderr


def test_other_ranks_than_were_launched(run, monkeypatch):
    for name, value in {"RANK": 0, "WORLD_SIZE": 1, "MASTER_PORT": 0}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    result = run("demo", "--device", "cpu", "--ranks", 2)
    assert result.exit_code == 2
    assert "rank 0: ArgumentError: --ranks must be the number of ranks that were" in result.stderr


def test_options_reach_the_ranks(run, monkeypatch, checkpoint, tmp_path):
    """Whatever was asked for; and a rank understands it."""
    started = {}

    def spawn_ranks(argv, world_size, **options):
        started.update(argv=argv, world_size=world_size, **options)
        return [0] * world_size

    monkeypatch.setattr("megamoe_ep.bootstrap.spawn_ranks", spawn_ranks)
    asked = {
        "checkpoint": checkpoint,
        "layer": 2,
        "tokens": 9,
        "top_k": 3,
        "combine": "fast",
        "timeout": 7.5,
        "device": "cpu",
        "plot": tmp_path / "traffic.png",
    }
    flags = [word for k, v in asked.items() for word in (f"--{k.replace('_', '-')}", v)]
    assert run("demo", "--ranks", 3, *flags).exit_code == 0
    assert started["world_size"] == 3

    given = {}
    monkeypatch.setattr(demo_module, "_join", lambda options: given.update(vars(options)) or 0)
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "1")
    command = started["argv"][started["argv"].index("megamoe_ep.cli") + 1 :]
    assert CliRunner().invoke(app, command).exit_code == 0
    assert given == asked | {"ranks": None}


@pytest.mark.parametrize(("codes", "status"), [([0, 0], 0), ([0, 3], 1), ([-9, 0], 1)])
def test_exit_status_is_that_of_the_ranks(run, monkeypatch, codes, status):
    monkeypatch.setattr("megamoe_ep.bootstrap.spawn_ranks", lambda *_, **__: codes)
    result = run("demo", "--ranks", 2, "--device", "cpu")
    assert result.exit_code == status
    for rank, code in enumerate(codes):
        assert (f"rank {rank}: {code}" in result.stderr) == bool(code)


# demo: the numbers


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_ranks_bring_fewer_and_fewer_tokens(world_size):
    counts = [tokens_of(rank, world_size, 20) for rank in range(world_size)]
    assert counts[0] == 20
    assert counts == sorted(counts, reverse=True)
    assert world_size == 1 or counts[-1] == 0


def test_inputs_are_the_same_for_whoever_makes_them():
    shape = LayerShape(12, 8, 3, 64, 32, world_size=3)
    for rank in range(3):
        x, ids, weights = inputs_of(shape, rank, 8)
        assert (x.dtype, ids.dtype, weights.dtype) == (
            torch.bfloat16,
            torch.int32,
            torch.float32,
        )
        assert x.shape == (tokens_of(rank, 3, 8), 64)
        assert ids.shape == weights.shape == (len(x), 3)
        again = inputs_of(shape, rank, 8)
        assert all(torch.equal(a, b) for a, b in zip((x, ids, weights), again, strict=True))
    assert not torch.equal(inputs_of(shape, 0, 8)[0][:2], inputs_of(shape, 1, 8)[0][:2])


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "0.977 KiB"), (1536, "1.5 KiB"), (1 << 40, "1 TiB")],
)
def test_sizes_for_people(nbytes, text):
    assert bytes_text(nbytes) == text


@pytest.fixture(scope="module")
def verified(checkpoint):
    """What a demo of one rank verifies, to be called with its report."""
    options = Options(None, checkpoint, 2, 8, 3, "exact", 60.0, "cpu", None)
    group = Group.of(None, device="cpu")
    shape = layer_shape(options, 1)
    layer = MegaMoE.from_checkpoint(checkpoint, layer=2, max_num_tokens=8, top_k=3, device="cpu")
    with layer.buffer:
        y = layer(*inputs_of(shape, 0, 8))
    report = Report("cpu", 8, 24, {"stage": 0.1}, True, y)

    def verify(**changes):
        given = report._replace(**changes)
        return demo_module._verify(options, group, shape, checkpoint, 2, [given])

    return y, verify


def test_a_right_result(verified, capsys):
    _, verify = verified
    assert verify()
    said = capsys.readouterr().out
    assert "bits equal from call to call: yes\nbits equal to one rank: yes\n" in said
    assert "relative L2 error against the oracle: 0.00e+00 (limit 5e-03)" in said


def test_a_result_with_one_other_bit(verified, capsys):
    y, verify = verified
    y = y.clone()
    y.view(torch.int16)[3, 5] ^= 1
    assert not verify(y=y)
    assert "bits equal to one rank: no" in capsys.readouterr().out


def test_a_result_far_from_the_oracle(verified, capsys):
    y, verify = verified
    assert not verify(y=y * 1.25)
    assert "against the oracle: 2.5" in capsys.readouterr().out
    assert not verify(y=torch.full_like(y, torch.nan))
    assert "against the oracle: nan" in capsys.readouterr().out


def test_a_result_that_changes_from_call_to_call(verified, capsys):
    _, verify = verified
    assert not verify(repeatable=False)
    assert "bits equal from call to call: no" in capsys.readouterr().out


# doctor


def test_doctor_of_this_machine(run, left_in_shared_memory):
    before = set(psutil.Process().children(recursive=True))
    result = run("doctor", "--device", "cpu")
    assert set(psutil.Process().children(recursive=True)) <= before
    assert not left_in_shared_memory()
    assert result.exit_code == 0, result.output
    assert result.stdout.rstrip().endswith("the layer can run here on cpu with 4 rank(s): yes")
    for what in ("software", "GPU", "host heap", "mpirun", "mpi4py", "nvcc", "csrc library"):
        assert what in result.stdout
    heap = LayerShape(32, 64, 6, 512, 256, world_size=4).symmetric_nbytes
    assert f"({heap} bytes)" in result.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_doctor_of_gpus_that_are_not_there(run):
    result = run("doctor", "--device", "cuda")
    assert result.exit_code == 1
    assert result.stdout.rstrip().endswith("no (GPUs)")


def test_doctor_of_a_layer_that_does_not_fit(run, monkeypatch):
    wanted = LayerShape(256, 8192, 8, 7168, 2048, world_size=8)
    sizes = ["--experts", 256, "--tokens", 8192, "--top-k", 8]
    sizes += ["--hidden", 7168, "--intermediate", 2048, "--ranks", 8, "--device", "cpu"]
    monkeypatch.setattr(host, "available_memory", lambda: 1 << 50)
    result = run("doctor", *sizes)
    assert result.exit_code == 0, result.stdout
    assert f"({wanted.symmetric_nbytes} bytes)" in result.stdout
    monkeypatch.setattr(host, "available_memory", lambda: 64 << 30)
    result = run("doctor", *sizes)
    assert result.exit_code == 1
    assert "too little; lower --tokens" in " ".join(result.stdout.split())
    assert result.stdout.rstrip().endswith("no (layer)")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "tpu"], "--device must be cpu or cuda; got 'tpu'."),
        (
            ["--timeout", "-1"],
            "--timeout must be a positive number of seconds, and finite; got -1.",
        ),
        (["--timeout", "inf"], "--timeout must be a positive number of seconds, and finite; got"),
        (["--experts", "30"], "--experts must be a multiple of the 4 ranks; got 30."),
        (["--experts", "4"], "--top-k must be at most the layer's 4 experts; got 6."),
        (["--hidden", "100"], "hidden_size must be a multiple of 16"),
        (["--activation-format", "fp8"], "activation_format must be 'nvfp4' or 'bf16'; got 'fp8'."),
    ],
)
def test_doctor_with_a_wrong_option(run, arguments, message):
    result = run("doctor", "--ranks", 4, *arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith("ArgumentError: ")
    assert message in result.stderr


def test_doctor_with_a_number_of_ranks_that_does_not_divide_its_layer(run):
    result = run("doctor", "--device", "cpu", "--ranks", 3)
    assert result.exit_code == 0, result.output
    assert "with 3 rank(s): yes" in result.stdout


def test_doctor_of_weights_that_do_not_fit(run):
    sizes = ["--experts", 65536, "--tokens", 1, "--hidden", 7168, "--intermediate", 2048]
    result = run("doctor", "--device", "cpu", "--ranks", 1, *sizes)
    assert result.exit_code == 1
    assert "the weights alone do not fit" in " ".join(result.stdout.replace("│", "").split())


def test_doctor_where_ranks_of_mpirun_do_not_meet(run, monkeypatch):
    """mpirun of one MPI, mpi4py over another: every rank believes to be alone."""
    answers = {"--version": (True, "mpirun (Open MPI) 5"), "-c": (True, "Open MPI v5")}
    monkeypatch.setattr(doctor_module.shutil, "which", lambda *_, **__: "/usr/bin/mpirun")
    monkeypatch.setattr(doctor_module, "_version", lambda _: "4.1")
    monkeypatch.setattr(
        doctor_module, "_call", lambda argv: answers.get(argv[1], (True, "ranks seen: 1"))
    )
    findings = {finding.what: finding for finding in doctor_module._mpi()}
    assert findings["MPI"].state == "note"
    assert findings["MPI"].text.startswith("2 ranks do not find one another")
    assert not findings["MPI"].needed, "torchrun and demo do without"


def test_doctor_s_calls_end():
    worked, said = doctor_module._call(["/nonexistent/mpirun", "--version"])
    assert not worked
    assert "/nonexistent/mpirun" in said
