"""Where the time of a call goes: phases as NVTX ranges, and their durations for whoever asks."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import torch


class PhaseTimer:
    """Measures the phases of calls, on the host's clock or with events of the GPU's stream.

    Pass it as ``timer=`` of ``nvfp4_mega_moe``. Not for use during graph capture.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._spans: list[tuple[str, float | torch.cuda.Event, float | torch.cuda.Event]] = []

    def _now(self) -> float | torch.cuda.Event:
        if self._device.type == "cpu":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event

    @contextlib.contextmanager
    def measure(self, phase: str) -> Iterator[None]:
        start = self._now()
        yield
        self._spans.append((phase, start, self._now()))

    def seconds(self) -> dict[str, float]:
        """Seconds spent in each phase since the timer was made, in the order of the phases."""
        total: dict[str, float] = {}
        for phase, start, end in self._spans:
            if isinstance(start, torch.cuda.Event) and isinstance(end, torch.cuda.Event):
                end.synchronize()
                elapsed = start.elapsed_time(end) / 1e3
            elif isinstance(start, float) and isinstance(end, float):
                elapsed = end - start
            total[phase] = total.get(phase, 0.0) + elapsed
        return total


@contextlib.contextmanager
def phase(name: str, device: torch.device, timer: PhaseTimer | None) -> Iterator[None]:
    """An arrow of the data path: an NVTX range of that name on GPUs, measured if asked for."""
    with contextlib.ExitStack() as stack:
        if device.type == "cuda":
            torch.cuda.nvtx.range_push(name)  # type: ignore[no-untyped-call]
            stack.callback(torch.cuda.nvtx.range_pop)
        if timer is not None:
            stack.enter_context(timer.measure(name))
        yield
