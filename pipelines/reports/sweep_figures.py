"""Scores over turning points, as the paper's Fig. 4 and Table 3 have them, each drawn into a PNG file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dvdp.evaluation.figures import BLUE, GREEN, SOFT, VERMILION, chart, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class Scored(NamedTuple):
    """A mark of a figure."""

    x: float
    """T_1, or K."""
    mean: float
    spread: float
    """Standard deviation over seeds; 0 for one seed."""
    label: str = ""
    """Written beside the mark."""


def draw_over_first_turning_point(
    path: Path, lines: Mapping[str, Sequence[Scored]], ddpm: Scored | None, metric: str
) -> Path:
    """Score against T_1, a line for each process (Fig. 4), with DDPM's score across."""
    figure, axes = chart("Score over the first turning point", "T_1", f"{metric} (lower is better)")
    for (name, marks), colour, shape in zip(lines.items(), (BLUE, VERMILION), "os", strict=False):
        _draw(axes, sorted(marks), color=colour, marker=shape, linewidth=1.6, label=name)
    if ddpm:
        axes.axhline(ddpm.mean, color=SOFT, linestyle="--", linewidth=1.2, label="ddpm")
        axes.axhspan(ddpm.mean - ddpm.spread, ddpm.mean + ddpm.spread, color=SOFT, alpha=0.15, linewidth=0)
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    return save_figure(figure, path)


def draw_over_levels(
    path: Path, scores: Sequence[Scored], bounds: Sequence[Scored], speedups: Sequence[Scored], metric: str
) -> Path:
    """Score and training speed-up against K, the number of turning points (Table 3).

    Args:
        bounds: of the speed-ups, by their FLOPs.
        speedups: where they were measured.
    """
    figure, axes = chart("Score and speed-up over the number of turning points", "K", f"{metric} (lower is better)")
    _draw(axes, scores, color=BLUE, marker="o", linestyle="", label="score")
    for mark in scores:
        axes.annotate(mark.label, (mark.x, mark.mean), (7, 5), textcoords="offset points", fontsize=9, color=BLUE)
    axes.set_ylim(bottom=0, top=1.15 * max(m.mean + m.spread for m in scores))
    axes.set_xlim(-0.3, max(m.x for m in scores) + 0.8)
    axes.set_xticks(sorted({m.x for m in scores}))
    right = axes.twinx()
    _draw(right, bounds, color=GREEN, marker="^", markerfacecolor="none", linestyle="", label="bound by FLOPs")
    if speedups:
        _draw(right, speedups, color=GREEN, marker="^", linestyle="", label="measured speed-up")
    right.set_ylim(bottom=0, top=1.15 * max(m.mean for m in bounds))
    right.set_ylabel("training speed-up", color=GREEN)
    right.spines["top"].set_visible(False)
    handles, labels = (
        a + b for a, b in zip(axes.get_legend_handles_labels(), right.get_legend_handles_labels(), strict=True)
    )
    axes.legend(handles, labels, frameon=False, loc="lower right")
    return save_figure(figure, path)


def _draw(axes: Axes, marks: Sequence[Scored], **style: Any) -> None:
    axes.errorbar([m.x for m in marks], [m.mean for m in marks], [m.spread for m in marks], capsize=3, **style)
