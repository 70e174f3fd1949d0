"""The picture of a plan: what sets of turning points lose against what they save."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dvdp.evaluation.figures import ACCENT, BLACK, BLUE, GREEN, INK, ORANGE, PURPLE, SKY, VERMILION, save_figure
from dvdp.planning.planner import Plan

#: By the number of turning points, from none.
COLOURS = (BLACK, SKY, ORANGE, GREEN, PURPLE)
#: Of marks: shape, size in square points, and colour.
MARKS = (("D", 78, BLUE), ("s", 26, VERMILION))
#: Excess, in percent, up to which the axis is linear: a logarithmic one has no place for DDPM's 0.
_LINEAR = 0.1
#: Where a label may stand beside its point, in points: the first place that is free is taken.
_PLACES = [(dx, dy) for dy in (-13, 8, -26, 21, -39, 34, -52) for dx in (8, -8)]


def draw_plan(
    path: Path,
    plans: Sequence[Plan],
    frontier: Sequence[Plan],
    marks: Mapping[str, Sequence[Plan]],
    chosen: Plan,
    tolerance: float,
    title: str,
) -> Path:
    """Excess error over DDPM against training speed-up, into a PNG file.

    Args:
        plans: a faint dot each, coloured by the number of turning points.
        frontier: joined by a line.
        marks: plans that are marked and labelled, by what the legend calls them; two kinds at most.
        chosen: a star.
        tolerance: a line; what is above it is shaded.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    figure = Figure(figsize=(9.4, 5.6), dpi=110, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for count in sorted({len(plan.turning_points) for plan in plans}):
        group = [plan for plan in plans if len(plan.turning_points) == count]
        name = ("DDPM", "1 turning point")[count] if count < 2 else f"{count} turning points"
        size, alpha = (44, 1.0) if count == 0 else (9, 0.4)
        axes.scatter(*_places(group), size, COLOURS[count % len(COLOURS)], alpha=alpha, linewidths=0, label=name)
    axes.plot(*_places(frontier), color=INK, linewidth=1.3, label="nothing better")
    for (name, marked), (shape, size, colour) in zip(marks.items(), MARKS, strict=False):
        look: dict[str, Any] = {"facecolor": "white", "edgecolor": colour, "linewidths": 1.7, "zorder": 5}
        axes.scatter(*_places(marked), size, marker=shape, label=name, **look)
    star: dict[str, Any] = {"color": ACCENT, "edgecolor": "white", "linewidths": 0.8, "zorder": 6}
    axes.scatter(*_places([chosen]), 210, marker="*", label=f"fastest within {100 * tolerance:g} %", **star)

    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator([1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))
    axes.set_yscale("symlog", linthresh=_LINEAR, linscale=0.6)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    _, errors = _places(plans)
    low, high = min(1.5 * min(errors), -_LINEAR / 3), 1.5 * max(*errors, 100 * tolerance, _LINEAR)
    axes.axhspan(100 * tolerance, high, color=ACCENT, alpha=0.06, linewidth=0)
    axes.axhline(100 * tolerance, color=ACCENT, linewidth=0.9, linestyle=(0, (4, 3)))
    axes.set_ylim(low, high)
    axes.set_title(title, loc="left", fontsize=12.5)
    axes.set_xlabel("training speed-up over DDPM")
    axes.set_ylabel("error of the process beyond DDPM's\n(% of a coefficient's std)")
    axes.grid(color="#e4e4e4", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    legend = axes.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1, 1))
    for handle in filter(None, legend.legend_handles):
        handle.set_alpha(1)
    canvas.draw()
    _label(axes, canvas, chosen, [plan for marked in marks.values() for plan in marked])
    return save_figure(figure, path)


def _places(plans: Sequence[Plan]) -> tuple[list[float], list[float]]:
    return [plan.training_speedup for plan in plans], [100 * plan.excess for plan in plans]


def _label(axes: Any, canvas: Any, chosen: Plan, marked: Sequence[Plan]) -> None:
    """The turning points beside their marks, without one text on another or on a mark."""
    from matplotlib.patheffects import withStroke
    from matplotlib.transforms import Bbox

    at = {plan.turning_points: (plan.training_speedup, 100 * plan.excess) for plan in [*marked, chosen]}
    taken = [Bbox.from_bounds(x - 8, y - 8, 16, 16) for x, y in axes.transData.transform(list(at.values()))]
    for points, place in sorted(at.items(), key=lambda item: item[1]):
        colour = ACCENT if points == chosen.turning_points else INK
        style = {"textcoords": "offset points", "fontsize": 9, "color": colour, "zorder": 7}
        text = axes.annotate(", ".join(map(str, points)), place, _PLACES[0], **style)
        text.set_path_effects([withStroke(linewidth=2.5, foreground="white")])
        for dx, dy in _PLACES:
            text.set_position((dx, dy))
            text.set_horizontalalignment("left" if dx > 0 else "right")
            box = text.get_window_extent(canvas.get_renderer())
            if not any(box.overlaps(other) for other in taken):
                break
        taken.append(box)
