"""The files under launch/: scripts that parse, and manifests that say the same thing throughout."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
import yaml
from torch.distributed.run import get_args_parser
from typer.main import get_command

from megamoe_ep.cli import app

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
SCRIPTS = ["demo", "test", "torchrun.sh", "mpirun.sh", "slurm.sbatch", "environment.sh"]
MANIFESTS = sorted(LAUNCH.glob("kubernetes/*.yaml"))


def check_is_a_demo(words: list[str]) -> None:
    """That the words are a command of ours which the command line accepts."""
    assert words[:3] == ["-m", "megamoe_ep.cli", "demo"], words
    command = get_command(app).commands["demo"]
    command.make_context("demo", words[3:])  # exits on what it does not know


def stub(folder: Path, name: str, body: str) -> None:
    file = folder / name
    file.write_text(f"#!/bin/sh\n{body}\n")
    file.chmod(0o755)


# Scripts


def test_no_script_is_left_out():
    found = {f.name for f in LAUNCH.iterdir() if f.is_file()}
    assert found == set(SCRIPTS)


@pytest.mark.parametrize("name", SCRIPTS)
def test_script_parses(name):
    done = subprocess.run(["bash", "-n", LAUNCH / name], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("name", [name for name in SCRIPTS if name != "environment.sh"])
def test_script_stops_at_the_first_fault(name):
    lines = (LAUNCH / name).read_text().splitlines()
    assert lines[0] == "#!/usr/bin/env bash"
    first = next(line for line in lines if line and not line.startswith("#"))
    assert first == "set -euo pipefail"
    assert os.access(LAUNCH / name, os.X_OK) or name == "slurm.sbatch"


@pytest.mark.parametrize("name", ["torchrun.sh", "mpirun.sh"])
def test_launcher_without_a_number_of_ranks(name):
    done = subprocess.run([LAUNCH / name], capture_output=True, text=True)
    assert done.returncode != 0
    assert f"usage: launch/{name} RANKS" in done.stderr


@pytest.mark.parametrize("name", ["torchrun", "mpirun"])
def test_launcher_passes_everything_on(name, tmp_path):
    stub(tmp_path, name, 'printf "%s\\n" "$@"')
    arguments = ["--checkpoint", "/models/a b", "--layer", "3"]
    said = subprocess.run(
        [LAUNCH / f"{name}.sh", "8", *arguments],
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    if name == "torchrun":
        given = get_args_parser().parse_args(said)
        assert (given.standalone, given.nproc_per_node, given.module) == (True, "8", True)
    else:
        assert said[said.index("-n") + 1] == "8"
        assert said[said.index("-n") + 2] == "python"
    check_is_a_demo(said[said.index("-m") :])
    assert said[-4:] == arguments


# Slurm


def test_slurm_reads_the_directives():
    """It stops looking for them at the first line that is no comment."""
    lines = (LAUNCH / "slurm.sbatch").read_text().splitlines()
    last = max(i for i, line in enumerate(lines) if line.startswith("#SBATCH"))
    assert all(line.startswith("#") for line in lines[: last + 1])
    for line in lines[: last + 1]:
        if line.startswith("#SBATCH"):
            assert re.fullmatch(r"#SBATCH --[a-z-]+=\S+", line), line


@pytest.mark.parametrize("nodes", [1, 2])
def test_slurm_starts_a_rank_for_each_gpu(tmp_path, nodes):
    """With stand-ins for Slurm's commands and torchrun."""
    text = (LAUNCH / "slurm.sbatch").read_text()
    options = dict(re.findall(r"^#SBATCH --([a-z-]+)=(\S+)$", text, re.MULTILINE))
    (tmp_path / "bin").mkdir()
    (tmp_path / "home/megamoe_ep/.venv/bin").mkdir(parents=True)
    (tmp_path / "home/megamoe_ep/.venv/bin/activate").touch()
    stub(tmp_path / "bin", "srun", 'test "$1 $2" = "--cpus-per-task 64" && shift 2 && exec "$@"')
    stub(tmp_path / "bin", "scontrol", 'test "$*" = "show hostnames n[3-4]" && printf "n3\\nn4\\n"')
    stub(tmp_path / "bin", "torchrun", 'printf "%s\\n" "$@"')
    said = subprocess.run(
        ["bash", LAUNCH / "slurm.sbatch", "--tokens", "9"],
        env={
            "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
            "HOME": str(tmp_path / "home"),
            "SLURM_JOB_NODELIST": "n[3-4]",
            "SLURM_JOB_NUM_NODES": str(nodes),
            "SLURM_JOB_ID": "77",
            "SLURM_CPUS_PER_TASK": options["cpus-per-task"],
        },
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    given = get_args_parser().parse_args(said)
    assert (given.nnodes, given.nproc_per_node) == (str(nodes), options["gpus-per-node"])
    assert given.rdzv_endpoint == "n3:29500"
    assert given.rdzv_backend == "c10d"
    assert options["ntasks-per-node"] == "1"
    check_is_a_demo(said[said.index("-m") :])
    assert said[-2:] == ["--tokens", "9"]


# Kubernetes


def containers(job: dict, role: str) -> tuple[dict, dict]:
    """The one container of a role, and the pod it is in."""
    replicas = job["spec"][
        {"PyTorchJob": "pytorchReplicaSpecs", "MPIJob": "mpiReplicaSpecs"}[job["kind"]]
    ]
    replica = replicas[role]
    assert replica["replicas"] == 1, "one pod holds all GPUs of the layer"
    assert replica["restartPolicy"] == "Never"
    pod = replica["template"]["spec"]
    (container,) = pod["containers"]
    return container, pod


def check_pod(container: dict, pod: dict, gpus: int) -> None:
    assert container["resources"]["limits"]["nvidia.com/gpu"] == gpus
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert set(mounts) == set(volumes)
    assert mounts["shm"] == "/dev/shm"
    assert volumes["shm"]["emptyDir"]["medium"] == "Memory"
    assert all(isinstance(word, str) for word in container.get("command", []))


@pytest.mark.parametrize("file", MANIFESTS, ids=lambda file: file.name)
def test_manifest_is_one_job_that_ends(file):
    (job,) = yaml.safe_load_all(file.read_text())
    assert set(job) == {"apiVersion", "kind", "metadata", "spec"}
    assert re.fullmatch(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?", job["metadata"]["name"])
    policy = job["spec"]["runPolicy"]
    assert policy["activeDeadlineSeconds"] > 0
    assert policy["backoffLimit"] == 0, "a layer that gave a wrong result is not to be tried again"
    assert f"kubectl apply -f {file.relative_to(ROOT)}" in file.read_text()


def test_pytorchjob():
    job = yaml.safe_load((LAUNCH / "kubernetes/pytorchjob.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    container, pod = containers(job, "Master")
    assert container["name"] == "pytorch", "by which the operator finds the container"
    program, *arguments = container["command"]
    assert program == "torchrun"
    given = get_args_parser().parse_args(arguments)
    check_pod(container, pod, int(given.nproc_per_node))
    check_is_a_demo(arguments[arguments.index("-m") :])


def test_mpijob():
    job = yaml.safe_load((LAUNCH / "kubernetes/mpijob.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v2beta1", "MPIJob")
    assert job["spec"]["mpiImplementation"] == "OpenMPI"
    launcher, _ = containers(job, "Launcher")
    worker, pod = containers(job, "Worker")
    command = launcher["command"]
    assert command[0] == "mpirun"
    ranks = int(command[command.index("-n") + 1])
    assert ranks == job["spec"]["slotsPerWorker"]
    check_pod(worker, pod, ranks)
    assert launcher["image"] == worker["image"]
    assert command[command.index("-n") + 2] == "python"
    check_is_a_demo(command[command.index("-m") :])


@pytest.mark.parametrize("file", MANIFESTS, ids=lambda file: file.name)
def test_commented_options_are_ours(file):
    words = re.findall(r"# - (--\S+)", file.read_text())
    assert words
    check_is_a_demo(["-m", "megamoe_ep.cli", "demo", *words])
