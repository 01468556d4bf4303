"""Groups and heaps under each launcher, and what is left when a rank or the launcher dies."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from megamoe_ep import bootstrap
from megamoe_ep.bootstrap import RankProcesses, spawn_ranks

pytestmark = pytest.mark.usefixtures("launcher_side")

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
MEET = str(HERE / "programs" / "meet.py")


def reports(output: str) -> dict[int, dict]:
    found = [json.loads(line) for line in output.splitlines() if line.startswith('{"rank"')]
    return {report["rank"]: report for report in found}


@pytest.mark.parametrize("launcher", ["spawner", "torchrun", "mpirun"])
def test_the_rank_side_tests_pass(launch_tests, launcher):
    """The tests that take ``group``, in three ranks."""
    files = [HERE / f"test_{what}.py" for what in ("group", "heap", "layer")]
    passed = launch_tests(launcher, 3, files)
    assert len(passed) == 3
    assert min(passed) > 40


@pytest.mark.parametrize("launcher", ["spawner", "torchrun", "mpirun"])
def test_ranks_of_one_machine_listen_on_loopback_only(launch, launcher):
    for report in reports(launch(launcher, 2, [MEET])).values():
        assert report["parts"] == [1, 2]
        assert set(report["listening"]) <= {"127.0.0.1"}


def test_rank_zero_serves_on_loopback_when_no_launcher_does():
    listener = bootstrap._listen_on_loopback(0)
    port = listener.getsockname()[1]
    listener.close()
    ranks = []
    for rank in range(2):
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "RANK": str(rank),
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "localhost",
            "MASTER_PORT": str(port),
        }
        ranks.append(
            subprocess.Popen(
                [sys.executable, MEET], env=environment, stdout=subprocess.PIPE, text=True
            )
        )
    found = reports("".join(rank.communicate(timeout=60)[0] for rank in ranks))
    assert found[0]["listening"] == ["127.0.0.1"]
    assert found[1]["listening"] == []
    assert found[0]["parts"] == found[1]["parts"] == [1, 2]


def test_a_store_that_does_not_answer_is_not_waited_for():
    """Rank 0 holds it, and is stopped rather than dead: its connections stay open."""
    body = (
        "import sys, time\n"
        "from megamoe_ep.bootstrap import Group\n"
        "from megamoe_ep.errors import BootstrapError\n"
        "group = Group.from_environment(device='cpu', timeout_s=1)\n"
        "print('met', flush=True)\n"
        "sys.stdin.readline()\n"
        "began = time.monotonic()\n"
        "try:\n"
        "    group.barrier()\n"
        "except BootstrapError as error:\n"
        "    print(time.monotonic() - began, error, flush=True)\n"
    )
    listener = bootstrap._listen_on_loopback(0)
    port = str(listener.getsockname()[1])
    listener.close()
    said = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", body], text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            env={**os.environ, **_path(), **said, "RANK": str(rank)},
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        for rank in ranks:
            assert rank.stdout is not None
            assert rank.stdout.readline() == "met\n"
        ranks[0].send_signal(signal.SIGSTOP)
        output, _ = ranks[1].communicate("go\n", timeout=30)
        seconds, sentence = output.split(maxsplit=1)
        assert float(seconds) < 6
        assert "the store that the ranks meet at does not answer rank 1" in sentence
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()


@pytest.mark.parametrize("victim", [0, 2])
@pytest.mark.parametrize("step", ["group", "heap", "end"])
@pytest.mark.parametrize("fate", ["die", "absent"])
def test_a_rank_missing_at_creation_is_named(fork_ranks, victim, step, fate):
    timeout = 2.0
    job = fork_ranks([MEET, "--timeout", str(timeout), f"--{fate}", f"{victim}:{step}"], 3)
    assert not job.wait(60, but=[victim]), job.log()
    for rank in {0, 1, 2} - {victim}:
        (report,) = job.said(rank)
        assert report["error"] == "BootstrapError", report
        assert f"rank {victim} did not come within timeout_s=2" in report["message"]
        assert report["seconds"] < timeout + 5
    job.end()


def test_an_absent_rank_is_named_under_mpirun(launch):
    output = launch(
        "mpirun", 3, [MEET, "--timeout", "2", "--absent", "1:heap"], check=False
    )  # the job is aborted as soon as one of the others ends
    found = reports(output)
    assert found
    for rank, report in found.items():
        assert rank != 1
        assert report["error"] == "BootstrapError"
        assert "rank 1 did not come within timeout_s=2" in report["message"]


def _path() -> dict[str, str]:
    return {"PYTHONPATH": str(ROOT)}


# The spawner


def test_exit_codes_and_output(capfd):
    body = "import os, sys; os.write(1, b'rank %s\\n' % os.environb[b'RANK']); sys.exit({code})"
    argv = [sys.executable, "-c", body.format(code="int(os.environ['RANK']) * 0")]
    assert spawn_ranks(argv, 3, timeout_s=30) == [0, 0, 0]
    assert sorted(capfd.readouterr().out.split("\n")) == ["", "rank 0", "rank 1", "rank 2"]
    argv = [sys.executable, "-c", body.format(code="3 + int(os.environ['RANK'])")]
    assert spawn_ranks(argv, 2, timeout_s=30) == [3, 4]


def test_the_rest_is_ended_when_one_fails(monkeypatch):
    monkeypatch.setattr(RankProcesses, "GRACE_S", 0.3)
    body = "import os, time; os.environ['RANK'] == '1' and os._exit(9); time.sleep(600)"
    began = time.monotonic()
    assert spawn_ranks([sys.executable, "-c", body], 3, timeout_s=60) == [-9, 9, -9]
    assert time.monotonic() - began < 20


def test_the_rest_runs_on_when_asked():
    body = "import os, time; os.environ['RANK'] == '1' and os._exit(9); time.sleep(1)"
    with RankProcesses([sys.executable, "-c", body], 2) as ranks:
        assert ranks.wait(30, kill_rest=False) == [0, 9]


def test_the_deadline_ends_all():
    began = time.monotonic()
    argv = [sys.executable, "-c", "import time; time.sleep(600)"]
    assert spawn_ranks(argv, 2, timeout_s=1) == [-9, -9]
    assert time.monotonic() - began < 20


def test_a_program_that_does_not_exist():
    assert all(code != 0 for code in spawn_ranks(["/nonexistent/program"], 2, timeout_s=30))


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_no_orphans_however_the_parent_ends(how):
    body = (
        # A shell that runs the tests in the background has SIGINT ignored.
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from megamoe_ep.bootstrap import spawn_ranks\n"
        "one_write = 'import os, time; os.write(1, b\"%d\\\\n\" % os.getpid()); time.sleep(600)'\n"
        "spawn_ranks([sys.executable, '-c', one_write], 2, timeout_s=600)"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", body],
        env={**os.environ, **_path()},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert parent.stdout is not None
        children = [int(parent.stdout.readline()) for _ in range(2)]
        assert all(psutil.pid_exists(child) for child in children)
        time.sleep(2 if how == signal.SIGINT else 0.1)  # SIGINT must find it waiting, not importing
        parent.send_signal(how)
        parent.wait(timeout=60)
        deadline = time.monotonic() + 60
        while any(_runs(child) for child in children):
            assert time.monotonic() < deadline, "a rank outlived the process that started it"
            time.sleep(0.05)
    finally:
        parent.kill()
        parent.wait()


def _runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
