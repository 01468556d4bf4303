"""A rank is killed at a random moment: every other rank says so in time, and nothing is left."""

from __future__ import annotations

import random
import re
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

PROGRAM = str(Path(__file__).parent / "programs" / "kill_victim.py")
RUNS = 50
AT_ONCE = 3  # most of a run is waiting for the deadline
TIMEOUT_S = 4.0
GRACE_S = 5.0
ENDING_S = 30.0  # in which a busy machine ends a process with torch in it

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@dataclass(frozen=True)
class Plan:
    world_size: int
    victim: int
    when: str  # "creation", "calls" (one after another) or "between" (mostly pausing)
    delay_s: float  # after the start at "creation"; else after every rank was ready

    @classmethod
    def drawn(cls, run: int) -> Plan:
        rng = random.Random(run)
        world_size = rng.randint(2, 4)
        when = rng.choice(["creation", "calls", "calls", "between"])
        return cls(world_size, rng.randrange(world_size), when, rng.uniform(0, 0.4))


@dataclass(frozen=True)
class Outcome:
    plan: Plan
    killed_at: float
    said: list[list[dict]]  # by rank
    left: list[int]  # ranks that still ran ENDING_S after they had raised, or should have
    log: str


def carry_out(fork_ranks, plan: Plan) -> Outcome:
    pause = 0.3 if plan.when == "between" else 0.0
    job = fork_ranks([PROGRAM, "cpu", str(TIMEOUT_S), str(pause)], plan.world_size)
    if plan.when != "creation":
        deadline = time.monotonic() + 60
        while not all(job.said(r) for r in range(plan.world_size)):
            assert time.monotonic() < deadline, job.log()
            time.sleep(0.01)
    time.sleep(plan.delay_s)
    killed_at = time.monotonic()
    job.kill(plan.victim)
    left = job.wait(TIMEOUT_S + GRACE_S + ENDING_S)
    job.end()
    said = [job.said(r) for r in range(plan.world_size)]
    return Outcome(plan, killed_at, said, left, job.log())


@pytest.fixture(scope="module")
def outcomes(fork_ranks, left_in_shared_memory):
    with ThreadPoolExecutor(AT_ONCE) as pool:
        plans = [Plan.drawn(run) for run in range(RUNS)]
        return list(pool.map(lambda plan: carry_out(fork_ranks, plan), plans))


@pytest.mark.parametrize("run", range(RUNS))
def test_every_survivor_names_the_victim_in_time(outcomes, run):
    outcome = outcomes[run]
    plan, context = outcome.plan, f"{outcome.plan}\n{outcome.log}"
    assert not outcome.left, context
    for rank, said in enumerate(outcome.said):
        if rank == plan.victim:
            assert "error" not in [line["event"] for line in said], context
            continue
        events = [line for line in said if line["event"] != "ready"]
        errors, end = events[:-1], events[-1]
        assert end["event"] == "end", context
        first = errors[0]
        assert outcome.killed_at <= first["at"] <= outcome.killed_at + TIMEOUT_S + GRACE_S, context
        if first["type"] == "PeerTimeoutError":
            assert first["ranks"] == [plan.victim], context
            assert first["rank"] == plan.victim, context
            assert first["phase"] in ("dispatch", "combine"), context
            # The layer stays unusable, and says why without waiting once more.
            again = errors[1]
            assert [again[k] for k in ("ranks", "phase")] == [first[k] for k in ("ranks", "phase")]
            assert again["at"] - first["at"] < 1, context
        else:
            assert plan.when == "creation", context
            assert first["type"] in ("BootstrapError", "HeapError"), context
            named = re.search(r"rank (\d+) did not come within", first["message"])
            assert named is not None, context
            assert int(named[1]) == plan.victim, context


def test_every_moment_was_met(outcomes):
    met = Counter(
        line.get("phase", line["type"])
        for outcome in outcomes
        for said in outcome.said
        for line in said
        if line["event"] == "error"
    )
    assert {"BootstrapError", "dispatch", "combine"} <= set(met), met


def test_nothing_is_left_in_shared_memory(outcomes, left_in_shared_memory):
    assert not left_in_shared_memory()
