"""The results as a table."""

from __future__ import annotations

from tabulate import tabulate

from bench.claims import shown
from bench.turns import Place, Round, typical


def results_table(rounds: list[Round]) -> str:
    """Return the median of each figure over the rounds, one line for each row of a task."""
    places = list(dict.fromkeys((task, row) for results in rounds for task, rows in results.items() for row in rows))
    # In the order in which the first round had the tasks; the second goes backwards.
    figures = list(
        dict.fromkeys(
            name
            for results in rounds
            for rows in results.values()
            for measured in rows.values()
            for name, value in measured.items()
            if not isinstance(value, list)
        )
    )
    lines: list[list[str]] = []
    for task, row in places:
        values = [typical(rounds, Place(task, row, figure)) for figure in figures]
        lines.append([task, row, *("" if value is None else shown(value) for value in values)])
    aligned = ("left", "left", *("right" for _ in figures))
    return tabulate(lines, headers=["", "", *figures], disable_numparse=True, colalign=aligned)
