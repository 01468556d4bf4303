"""Files of measurements: where they come from, the machine's ceilings, and a row for each point."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megamoe_ep.roofline import Ceilings


@dataclass
class Results:
    """One run of one benchmark.

    Attributes:
        benchmark: what was run, as "scaling".
        machine: see ``measure.machine``.
        ceilings: measured in the same run.
        rows: see ``measure.result_row``.
    """

    benchmark: str
    machine: dict[str, Any]
    ceilings: Ceilings
    rows: list[dict[str, Any]] = field(default_factory=list)

    def file_name(self) -> str:
        """A name that says machine, ranks and launcher."""
        device = re.sub(r"[^a-z0-9]+", "-", str(self.machine["device"]).lower()).strip("-")
        return (
            f"{self.benchmark}-{device}-ep{self.machine['ranks']}-{self.machine['launcher']}.json"
        )

    def write(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        value = {
            "benchmark": self.benchmark,
            "machine": self.machine,
            "ceilings": asdict(self.ceilings),
            "rows": self.rows,
        }
        path.write_text(json.dumps(value, indent=1) + "\n")

    @classmethod
    def read(cls, path: Path) -> Results:
        value = json.loads(path.read_text())
        ceilings = Ceilings(**value["ceilings"])
        return cls(value["benchmark"], value["machine"], ceilings, value["rows"])
