"""How much processor time processes have had. On Linux, from /proc."""

from __future__ import annotations

from pathlib import Path


def processor_s(pid: int) -> float:
    """Return the processor time that all threads of a process and its children have had, to the nanosecond."""
    spent = 0.0
    for thread in Path(f"/proc/{pid}/task").iterdir():
        spent += int((thread / "schedstat").read_text().split()[0]) / 1e9
        spent += sum(map(processor_s, map(int, (thread / "children").read_text().split())))
    return spent
