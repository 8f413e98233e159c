"""What one process of a benchmark measures, and the records that it returns."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Record = dict[str, Any]
"""One measurement, as it stands in the JSON file."""

Allocator = Literal["default", "tuned"]


@dataclass(frozen=True)
class Task:
    """One table: everything in it is measured in one process, whose threads and allocator are set when it starts.

    Attributes
    ----------
    benchmark, module : str
        Its name on the command line, and the module whose ``measure(task)`` does it.
    model : str
        Such as ``2x1500``; empty where the benchmark knows only one.
    batch : int
        Columns; 0 for the benchmark's own.
    threads : int
    allocator : {"default", "tuned"}
        The C library's as installed, or told to keep the memory that it has (see ``bench_children.TUNED``).
    sparsity : tuple of float
    seconds : float
        About how long to measure.
    peers : tuple of str
        Packages to compare with that can be imported.
    """

    benchmark: str
    module: str
    model: str
    batch: int
    threads: int
    allocator: Allocator
    sparsity: tuple[float, ...]
    seconds: float
    peers: tuple[str, ...]

    @property
    def case(self) -> str:
        """Name of the case, such as ``lstm-2x1500``."""
        return f"{self.benchmark}-{self.model}" if self.model else self.benchmark

    @property
    def setting(self) -> str:
        """What the machine was told, for the titles of tables."""
        kind = "tuned" if self.allocator == "tuned" else "as installed"
        return f"{self.threads} thread{'s' * (self.threads > 1)}, allocator {kind}"

    def record(self, implementation: str, sparsity: float, median_ms: float, samples: int, **setting: Any) -> Record:
        """Return the record of one measurement of this task."""
        own = {"case": self.case, "sparsity": sparsity, "threads": self.threads, "implementation": implementation}
        return {**own, "median_ms": median_ms, "samples": samples, "allocator": self.allocator, **setting}

    def save(self, path: Path) -> None:
        """Write the task for another process."""
        path.write_text(json.dumps(dataclasses.asdict(self)), "utf-8")

    @classmethod
    def load(cls, path: Path) -> Task:
        """Read what :meth:`save` wrote."""
        fields: dict[str, Any] = json.loads(path.read_text("utf-8"))
        return cls(**{**fields, "sparsity": tuple(fields["sparsity"]), "peers": tuple(fields["peers"])})


def save_records(path: Path, records: Iterable[Record]) -> None:
    """Write a list with one record a measurement; a reader never finds half a file."""
    lines = ",\n".join(json.dumps(record) for record in records)
    part = path.with_name(path.name + ".part")
    part.write_text(f"[\n{lines}\n]\n" if lines else "[]\n", "utf-8")
    part.replace(path)
