"""The process that measures one task: ``bench_child.py FOLDER``, started by ``bench_children.run``."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

from bench_task import Task, save_records


def main() -> int:
    """Measure, print the table, and write the records."""
    folder = Path(sys.argv[1])
    task = Task.load(folder / "task.json")
    try:
        records = import_module(task.module).measure(task)
    except KeyboardInterrupt:
        return 130
    save_records(folder / "records.json", records)
    return 0


if __name__ == "__main__":
    sys.exit(main())
