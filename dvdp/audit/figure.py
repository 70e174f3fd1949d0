"""The chart of an audit: what each part of sampling adds to the score, and how far the states are off on the way."""

from __future__ import annotations

import math
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dvdp.audit.result import FREE, REAL, SOLVER, Audit
from dvdp.evaluation.figures import BLUE, GREEN, INK, ORANGE, PURPLE, SKY, SOFT, VERMILION, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: Of lines that only guide the eye.
_FAINT = "#d9d9d9"
#: Of levels, lifts and the solver.
_LEVEL, _LIFT, _SOLVER = BLUE, ORANGE, PURPLE
#: Of bands 0, 1, ..
_BANDS = (SKY, BLUE, GREEN, VERMILION, PURPLE)


def draw_audit(audit: Audit, path: Path, title: str) -> Path:
    """Draw an audit into a PNG file.

    On the left the score from real images to samples, part by part in the order of sampling; on the right, if there
    are turning points, each band of the generated states beside the true ones.

    Args:
        title: names the model.
    """
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    parts = len(audit.attribution.costs)
    height = 2.6 + 0.42 * (parts + 2 + (audit.solver is not None))
    size = (12.5 if audit.states else 8, max(4.4, height))
    figure = Figure(figsize=size, dpi=120, layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.08))
    said = "\n".join(textwrap.wrap(f"{title}: {audit.verdict}", 112 if audit.states else 74))
    figure.suptitle(said, x=0.012, ha="left", fontsize=13, color=INK)
    if audit.states:
        left, right = figure.subplots(1, 2, width_ratios=(5, 4))
        _states(right, audit)
    else:
        left = figure.subplots()
    _waterfall(left, audit)
    return save_figure(figure, path)


def _waterfall(axes: Axes, audit: Audit) -> None:
    found = audit.attribution
    real, free = audit.scores[REAL].value, audit.scores[FREE].value
    rows: list[tuple[str, float, float, str]] = []
    at = real
    for part, cost in found.costs.items():
        rows.append((part, at, cost, _LIFT if part.startswith("lift") else _LEVEL))
        at += cost
    reach = [
        real,
        free,
        *(start + cost + 2 * side for _, start, cost, _ in rows for side in (-found.error, found.error)),
    ]
    if audit.solver is not None:
        reach.append(audit.scores[SOLVER].value)
    span = max(reach) - min(reach) or 1.0

    labels = ["as many real images"]
    axes.plot([real], [0], "o", color=INK, markersize=6)
    axes.annotate(f"{real:.3g}", (real, 0), (9, 0), textcoords="offset points", va="center", color=INK)
    for row, (part, start, cost, colour) in enumerate(rows, start=1):
        labels.append(_capital(audit.title(part)))
        _bar(axes, row, start, cost, colour, found.error, bold=part == audit.worst)
        axes.plot([start, start], [row - 1, row + 0.36], color=SOFT, linewidth=0.8, zorder=1)
    last = len(rows) + 1.0
    labels.append(f"samples ({_sampling(audit.sampling)})")
    axes.plot([free, free], [last - 1, last], color=SOFT, linewidth=0.8, zorder=1)
    axes.plot([free], [last], "o", color=INK, markersize=6)
    axes.annotate(
        f"{free:.3g}", (free, last), (9, 0), textcoords="offset points", va="center", color=INK, weight="bold"
    )
    if audit.solver is not None and found.solver is not None:
        last += 1.5
        labels.append(f"of which the solver\n(against {_sampling(audit.solver)})")
        _bar(axes, last, free - found.solver, found.solver, _SOLVER, found.error, bold=audit.worst == SOLVER)
        axes.axhline(last - 0.75, color=_FAINT, linewidth=0.8)
    axes.axvline(real, color=_FAINT, linewidth=1, zorder=0)
    axes.set_yticks([*range(len(rows) + 2), *([last] if audit.solver is not None else [])], labels)
    for label, part in zip(axes.get_yticklabels()[1:], [*found.costs, "", SOLVER], strict=False):
        label.set_fontweight("bold" if part == audit.worst else "normal")
    axes.set_ylim(last + 0.6, -0.6)
    axes.set_xlim(min(reach) - 0.06 * span, max(reach) + 0.2 * span)
    axes.set_xlabel(f"{audit.metric} of {audit.images:,} images, lower is better (whiskers: two standard errors)")
    axes.set_title("Where the score is lost, in the order of sampling", loc="left", fontsize=11, color=INK)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)


def _bar(axes: Axes, row: float, start: float, cost: float, colour: str, error: float, bold: bool) -> None:
    axes.barh(row, cost, 0.72, start, color=colour, alpha=1.0 if bold else 0.55, zorder=2)
    axes.errorbar(start + cost, row, xerr=2 * error, color=INK, linewidth=1, capsize=2.5, zorder=3)
    axes.annotate(
        _signed(cost, error),
        (max(start, start + cost + 2 * error), row),
        (6, 0),
        textcoords="offset points",
        va="center",
        color=INK,
        weight="bold" if bold else "normal",
        zorder=4,
    )


def _states(axes: Axes, audit: Audit) -> None:
    levels = len(audit.turning_points)
    ticks: dict[float, str] = {}
    heads, row = [], 0.0
    # In the order of sampling, as on the left.
    for state in reversed(audit.states):
        heads.append(row)
        ticks[row] = f"T$_{{{state.level}}}$ = {state.turning_point}, {audit.resolution >> state.level} px"
        remark = f"Fréchet distance {state.distance:.2f} (two true halves: {state.distance_floor:.2f})"
        axes.annotate(
            remark,
            (0.01, row),
            xycoords=("axes fraction", "data"),
            va="center",
            color=SOFT,
            fontsize=9,
            zorder=3,
            backgroundcolor="white",
        )
        # The coarsest band first: it holds most of what is seen.
        for band in range(levels, state.level - 1, -1):
            row += 0.8
            ours, true, error = (each[band - state.level] for each in (state.generated, state.true, state.errors))
            at, colour = 100 * (ours / true - 1), _BANDS[band % len(_BANDS)]
            axes.errorbar(at, row, xerr=200 * error, fmt="o", color=colour, capsize=2.5, markersize=6, zorder=2)
            ticks[row] = f"{'all' if band == levels else 'detail'} of {audit.resolution >> band} px"
        row += 1.2
    axes.axvline(0, color=SOFT, linewidth=1, zorder=0)
    widest = max(1.0, 1.1 * max(map(abs, axes.get_xlim())))
    axes.set_xlim(-widest, widest)
    axes.set_ylim(row - 0.4, -0.6)
    axes.set_yticks(list(ticks), list(ticks.values()))
    for at, label in zip(ticks, axes.get_yticklabels(), strict=True):
        label.set_fontweight("bold" if at in heads else "normal")
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("generated band smaller (−) or larger than true, %")
    axes.set_title("How far the states are off just before each lift", loc="left", fontsize=11, color=INK)
    axes.spines[["top", "right", "left"]].set_visible(False)


def _sampling(sampling: dict[str, Any]) -> str:
    return f"{sampling['solver']}, {sampling['steps']} steps"


def _signed(cost: float, error: float) -> str:
    """With two digits of the error."""
    digits = 2 if error <= 0 else max(0, 1 - math.floor(math.log10(error)))
    return f"{cost:+.{digits}f}".replace("-", "−")


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
