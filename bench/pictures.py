"""Pictures of the results, as SVG; the same results give the same bytes, and a store has the same colour in all."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from bench.peers import PEERS
from bench.turns import Place, Round, typical

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_STYLE: Final[dict[Any, Any]] = {
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888888",
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "grid.color": "#e6e6e6",
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "figure.facecolor": "white",
    "legend.frameon": False,
    # Text stays text, and names inside the file are drawn from this instead of from chance.
    "svg.fonttype": "none",
    "svg.hashsalt": "logstore",
}
_OURS: Final = "logstore"
_OTHER_COLOUR: Final = "#333333"
_WINDOW: Final = 8
"""Looks over which a rate is taken: one alone shows each checkpoint."""


def draw_lines(
    rounds: Sequence[Round], panels: dict[str, list[str]], rows: dict[int, str], axis: str, path: Path
) -> list[Path]:
    """Draw events a second over a number, one line a store.

    Args:
        rounds: The results.
        panels: Names of the tasks, by what their panel is called.
        rows: Names of the rows, by the number.
        axis: What the number is.
        path: Where to.
    """
    with _drawn(len(panels), path, sharey=True) as axes:
        for each, (title, names) in zip(axes, panels.items(), strict=True):
            for name in names:
                found = {
                    number: value
                    for number, row in rows.items()
                    if (value := typical(rounds, Place(name, row, "events_s"))) is not None
                }
                if not found:
                    continue
                width = 2.2 if name.startswith(_OURS) else 1.2
                each.plot(list(found), list(found.values()), "o-", color=colour(name), lw=width, ms=3, label=name)
            each.set(title=title, xscale="log", yscale="log", xlabel=axis)
            each.set_xticks(list(rows), [f"{number:,}" for number in rows])
            each.minorticks_off()
            each.legend(fontsize=7, loc="upper left", bbox_to_anchor=(0, -0.16), ncols=2)
        axes[0].set_ylabel("events a second")
    return [path]


def draw_bars(
    rounds: Sequence[Round], panels: dict[str, Place], names: Sequence[str], path: Path, *, logarithmic: bool = False
) -> list[Path]:
    """Draw one figure of each store as bars.

    Args:
        rounds: The results.
        panels: Row and figure, by what their panel is called; the task is the store.
        names: The stores.
        path: Where to.
        logarithmic: Whether the scale is, for figures that are far apart.
    """
    with _drawn(len(panels), path, sharey=True) as axes:
        for each, (title, place) in zip(axes, panels.items(), strict=True):
            values = {name: typical(rounds, place._replace(task=name)) for name in names}
            known = {name: value for name, value in values.items() if value is not None}
            each.barh(list(known), list(known.values()), color=[colour(name) for name in known], height=0.7)
            for place_y, value in enumerate(known.values()):
                each.text(
                    value, place_y, f" {value:,.3g}" if value < 100 else f" {value:,.0f}", va="center", fontsize=7
                )
            each.set(title=title)
            each.margins(x=0.2)
            if logarithmic and known:
                # A bar of a logarithmic scale has no natural beginning.
                each.set(xscale="log", xlim=(min(known.values()) / 3, max(known.values()) * 3))
                each.minorticks_off()
            each.grid(visible=False, axis="y")
        axes[0].invert_yaxis()
    return [path]


def draw_course(rounds: Sequence[Round], courses: dict[str, str], limit_mb: float, path: Path) -> list[Path]:
    """Draw the rate and the memory of long runs over the number of events.

    Args:
        rounds: The results; the first round that has a run is drawn.
        courses: Names of the tasks, by what they are called.
        limit_mb: Where the memory must stay.
        path: Where to.
    """
    with _drawn(2, path) as (rate, memory):
        for (words, task), shade in zip(courses.items(), ("#1b5e9e", "#ef6c00"), strict=True):
            row: dict[str, Any] = next((results[task][""] for results in rounds if task in results), {})
            if not row:
                continue
            millions = [events / 1e6 for events in row["events"]]
            points = list(zip(row["seconds"], millions, strict=True))[::_WINDOW]
            rates = [(to - since) * 1e6 / (end - begin) for (begin, since), (end, to) in pairwise(points)]
            rate.plot([to for _, to in points[1:]], rates, color=shade, label=words)
            memory.plot(millions, row["memory_mb"], color=shade, label=words)
        rate.set(title="events a second", xlabel="million events", ylim=(0, None))
        memory.set(title="resident memory, MB", xlabel="million events", ylim=(0, limit_mb * 1.1))
        memory.axhline(limit_mb, color="#c62828", lw=1, ls="--")
        rate.legend(fontsize=7, loc="lower right")
    return [path]


def colour(name: str) -> str:
    """Return the colour of a store; ways of using this one have its own."""
    if name not in PEERS and name.startswith(_OURS):
        name = "logstore always"
    return PEERS[name].colour if name in PEERS else _OTHER_COLOUR


@contextmanager
def _drawn(panels: int, path: Path, **options: Any) -> Generator[list[Axes]]:
    """Give the panels of a new picture, which is written after the block."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with rc_context(_STYLE):
        figure = Figure(figsize=(4.4 * panels, 3.6), layout="constrained")
        FigureCanvasSVG(figure)
        axes: list[Axes] = list(figure.subplots(1, panels, squeeze=False, **options)[0])
        yield axes
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={"Date": None, "Creator": None})
