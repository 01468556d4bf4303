"""Every error that a person can cause: what was expected, what was given, what to do."""

from __future__ import annotations

import math
from collections.abc import Sequence


class MegaMoEError(Exception):
    """Base of all errors of this package."""


class ArgumentError(MegaMoEError, ValueError):
    """An argument has a value that the layer cannot take."""


class LayerMismatchError(MegaMoEError):
    """The ranks of a group do not agree on the layer that they are creating."""


class CheckpointError(MegaMoEError):
    """A checkpoint lacks a tensor, or holds one that is truncated or of another shape."""


class HeapError(MegaMoEError):
    """Symmetric memory cannot be had, or a peer's part of it cannot be reached."""


class HeapTooSmallError(HeapError):
    """The layer needs more symmetric memory than there is."""


class BootstrapError(MegaMoEError):
    """The ranks cannot find one another, or one did not come within the deadline."""


class BufferDestroyedError(MegaMoEError):
    """A SymmBuffer was used after destroy()."""


class UnsupportedDeviceError(MegaMoEError):
    """No kernels for this device."""


class LibraryError(MegaMoEError):
    """The compiled CUDA library is missing, stale, or does not load."""


class PeerTimeoutError(MegaMoEError):
    """A rank did not do its part of a call within the deadline.

    Attributes:
        ranks: the ranks that are held responsible, ascending; a rank that itself waits for one of
            them is not among them.
        rank: the first of ``ranks``.
        phase: "dispatch" or "combine".
        epoch_expected: number of the call (1 is the first) whose flag was waited for.
        epoch_seen: number of the last call of which ``rank`` did this phase.
        timeout_s: the deadline, in seconds.
        found_by: the rank whose deadline passed first; the others learned it from that rank.
    """

    def __init__(
        self,
        ranks: Sequence[int],
        phase: str,
        epoch_expected: int,
        epoch_seen: int,
        timeout_s: float,
        found_by: int,
    ) -> None:
        self.ranks = tuple(sorted(ranks))
        self.rank = self.ranks[0]
        self.phase = phase
        self.epoch_expected = epoch_expected
        self.epoch_seen = epoch_seen
        self.timeout_s = timeout_s
        self.found_by = found_by
        who = f"rank {self.rank}" if len(self.ranks) == 1 else f"ranks {list(self.ranks)}"
        super().__init__(
            f"{who} did not finish {phase} of call {epoch_expected} within timeout_s={timeout_s:g} "
            f"(last finished: call {epoch_seen}; found by rank {found_by}). The process is dead, "
            f"stuck, or slower than the deadline: look at its log, destroy() this buffer, and "
            f"create a new one once every rank is back."
        )

    def __reduce__(self) -> tuple[type[PeerTimeoutError], tuple[object, ...]]:
        return type(self), (
            self.ranks,
            self.phase,
            self.epoch_expected,
            self.epoch_seen,
            self.timeout_s,
            self.found_by,
        )


def check_timeout(timeout_s: float, name: str = "timeout_s") -> None:
    """Raises ArgumentError unless ``timeout_s`` is a deadline: every wait must end."""
    if not 0 < timeout_s < math.inf:
        raise ArgumentError(
            f"{name} must be a positive number of seconds, and finite; got {timeout_s}."
        )
