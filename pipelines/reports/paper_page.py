"""The paper's tables with ours beside them, as files: a page, Markdown, a CSV file, and Fig. 4 as a picture."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from dvdp.config import Params
from dvdp.errors import UserError
from dvdp.evaluation.figures import data_url
from dvdp.files import write_atomically
from pipelines.reports.paper import FIGURE_4, Table
from pipelines.reports.paper_scores import Filled, Line, data_set, fill_tables
from pipelines.reports.sweep_figures import Scored, draw_over_first_turning_point
from pipelines.reports.text_tables import as_csv, as_markdown, as_page, markdown
from pipelines.tracking.runs import SETTING

TITLE = "The paper's tables, and ours"
CAPTION = "Fig. 4 of ours: score over T_1"
MARK = "†"
#: Metrics of MLflow that rank; others are made from them.
_SCORE = re.compile("fid|fd_[a-z]+")
#: Column of our score.
_OURS = 3

_COLUMNS = (
    "table", "data_set", "resolution", "setting", "paper_fid", "paper_seconds_per_iteration", "paper_training_speedup",
    "paper_seconds_per_sample", "paper_sampling_speedup", "metric", "score", "spread", "seeds", "samples", "references",
    "extractor", "solver", "steps", "training_images", "training_speedup", "sampling_speedup", "differs",
)  # fmt: skip


@dataclass(frozen=True)
class _Section:
    """A table as it is shown."""

    title: str
    headings: list[str]
    cells: list[list[str]]
    notes: list[str]

    @property
    def filled(self) -> list[list[str]]:
        """The lines with a score of ours."""
        return [line for line in self.cells if line[_OURS]]

    @property
    def empty(self) -> list[list[str]]:
        """The others."""
        return [line for line in self.cells if not line[_OURS]]


@dataclass(frozen=True)
class TablesReport:
    """What was written."""

    files: tuple[Path, ...]
    found: str
    """What of MLflow stands in the tables and what does not, in one line."""


def write_tables(params: Params, folder: Path) -> TablesReport:
    """Write ``tables.html``, ``tables.md``, ``tables.csv``, and ``figure4.png`` if both its processes ran.

    Raises:
        TrackingUnavailable: MLflow does not answer; nothing is written.
        UserError: ``folder`` is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out: found the file '{folder}', expected a folder or a new name.")
    filled = fill_tables(params)
    figure = _draw_figure(filled.lines[FIGURE_4], folder / "figure4.png")
    legend = _legend(filled)
    sections = [
        _Section(table.title, _headings(table), [_cells(table, line) for line in lines], _notes(table, lines))
        for table, lines in filled.lines.items()
    ]
    pictures = [(data_url(figure), CAPTION)] if figure else []
    own = _own(filled)
    numbers = [_numbers(table, line) for table, lines in filled.lines.items() for line in lines]
    contents = {
        "tables.html": as_page(
            "tables.html", title=TITLE, sections=sections, legend=legend, pictures=pictures, own=own
        ),
        "tables.md": _markdown(sections, legend, own, figure),
        "tables.csv": as_csv(_COLUMNS, [[str(line.get(name, "")) for name in _COLUMNS] for line in numbers]),
    }
    for name, content in contents.items():
        write_atomically(folder / name, content)
    return TablesReport((*(folder / name for name in contents), *([figure] if figure else [])), legend[-1])


def _draw_figure(lines: Sequence[Line], path: Path) -> Path | None:
    """Fig. 4 of ours, if both processes ran."""
    marks: dict[str, list[Scored]] = {}
    for line in lines:
        if line.seeds:
            mark = Scored(line.row.turning_points[0], *line.score)
            marks.setdefault(line.seeds[0].run.process, []).append(mark)
    path.unlink(missing_ok=True)
    if len(marks) < 2:
        return None
    metric = next(line.seeds[0].record.headline for line in lines if line.seeds)
    return draw_over_first_turning_point(path, marks, None, metric)


def _legend(filled: Filled) -> list[str]:
    """What all tables have in common; the last line is of what stands in them."""
    shown = sum(len(line.seeds) for lines in filled.lines.values() for line in lines)
    left_out = ", ".join(f"{count} of {name}" for name, count in sorted(filled.left_out.items()))
    return [
        "The paper's: FID of 50,000 samples (10,000 at 1024 px), T = 1000, seconds on one A100; its training length,"
        " network sizes, attenuation and floor are not known here.",
        "Ours: torch-fidelity on samples from the EMA weights, mean and standard deviation over seeds. In each table,"
        " all cells of a data set are of runs trained alike and scored on the same terms. A score without a mark is"
        " made as the paper's and, where the paper does not say how, as by our presets of its size; the network may be"
        " of another size all the same.",
        "Our speed-ups: over our DDPM in the same table, each run as it measured itself, perhaps beside other work; not"
        " on the paper's hardware.",
        f"Scored runs in the tables: {shown}, from MLflow's experiment '{filled.experiment}'. Left out, as they are of"
        f" another data set or setting, or not on the terms of those shown: {left_out or 'none'}.",
    ]


def _own(filled: Filled) -> tuple[list[str], list[list[str]]] | None:
    """Headings and cells of what stands in no table; None if all does."""
    headings = ["data set", "setting", "turning points", "seed", "score", "training images", "finished"]
    cells = [
        [
            data_set(entry),
            entry.data.tags.get(SETTING, entry.info.run_name),
            entry.data.params.get("turning_points", "[]").strip("[]") or "none",
            entry.data.params.get("seed", "-"),
            ", ".join(f"{name} {value:.2f}" for name, value in entry.data.metrics.items() if _SCORE.fullmatch(name)),
            f"{int(entry.data.params.get('training.total_images', 0)):,}",
            f"{datetime.fromtimestamp((entry.info.end_time or 0) / 1000, UTC):%Y-%m-%d %H:%M} UTC",
        ]
        for entry in filled.own
    ]
    return (headings, cells) if cells else None


def _markdown(
    sections: Sequence[_Section],
    legend: Sequence[str],
    own: tuple[list[str], list[list[str]]] | None,
    figure: Path | None,
) -> str:
    parts = [f"# {TITLE}", *map(markdown, legend), *(["## Your own runs", as_markdown(*own)] if own else [])]
    for section in sections:
        parts += [f"## {section.title}", as_markdown(section.headings, section.cells), *map(markdown, section.notes)]
    if figure:
        parts.append(f"![{CAPTION}]({figure.name})")
    return "\n\n".join(parts) + "\n"


def _headings(table: Table) -> list[str]:
    speeds = ["s / iteration, paper", "training speed-up, ours", "s / sample, paper", "sampling speed-up, ours"]
    return ["data set", "setting", "FID, paper", "score, ours", *(speeds if _has_speeds(table) else []), "ours is"]


def _cells(table: Table, line: Line) -> list[str]:
    row, ours = line.row, ""
    if line.seeds:
        mean, spread = line.score
        ours = f"{mean:.2f}" + f" ± {spread:.2f}" * (len(line.seeds) > 1) + f" {MARK}" * bool(line.differs)
    speeds = [
        _speed(row.seconds_per_iteration, row.training_speedup),
        f"{line.training_speedup:.2f}x" if line.training_speedup else "",
        _speed(row.seconds_per_sample, row.sampling_speedup),
        f"{line.sampling_speedup:.2f}x" if line.sampling_speedup else "",
    ]
    where = f"{row.data_set}, {row.resolution} px"
    return [where, row.setting, row.fid, ours, *(speeds if _has_speeds(table) else []), _terms(line)]


def _has_speeds(table: Table) -> bool:
    return any(row.training_speedup for row in table.rows)


def _speed(seconds: str, speedup: str) -> str:
    parts = [f"{seconds} s"] * bool(seconds) + [f"{speedup}x"] * bool(speedup)
    return ", ".join(parts)


def _terms(line: Line) -> str:
    if not line.seeds:
        return ""
    record, sampling = line.seeds[0].record, line.seeds[0].run.sampling
    return (
        f"{record.headline} ({record.extractor}), {record.samples:,} samples against {record.references:,},"
        f" {sampling.solver}, {sampling.steps} steps; seeds: {len(line.seeds)}; trained on {line.images:,} images"
    )


def _notes(table: Table, lines: Sequence[Line]) -> list[str]:
    """What the marks mean, once for rows of a data set that differ alike, and what else is to be said."""
    differing = dict.fromkeys((line.row.data_set, line.row.resolution, line.differs) for line in lines if line.differs)
    marks = [
        f"{MARK} {data_set}, {resolution} px: does not compare with the paper's ({'; '.join(differs)})."
        for data_set, resolution, differs in differing
    ]
    return [*marks, table.note] if table.note else marks


def _numbers(table: Table, line: Line) -> Mapping[str, object]:
    """A line of the CSV file; what we do not know is left out."""
    row = line.row
    numbers: dict[str, object] = {
        "table": table.title.split(":")[0],
        "data_set": row.data_set,
        "resolution": row.resolution,
        "setting": row.setting,
        "paper_fid": row.fid,
        "paper_seconds_per_iteration": row.seconds_per_iteration,
        "paper_training_speedup": row.training_speedup,
        "paper_seconds_per_sample": row.seconds_per_sample,
        "paper_sampling_speedup": row.sampling_speedup,
    }
    if not line.seeds:
        return numbers
    record, sampling = line.seeds[0].record, line.seeds[0].run.sampling
    mean, spread = line.score
    return {
        **numbers,
        "metric": record.headline,
        "score": mean,
        "spread": spread if len(line.seeds) > 1 else "",
        "seeds": len(line.seeds),
        "samples": record.samples,
        "references": record.references,
        "extractor": record.extractor,
        "solver": sampling.solver,
        "steps": sampling.steps,
        "training_images": line.images,
        "training_speedup": line.training_speedup or "",
        "sampling_speedup": line.sampling_speedup or "",
        "differs": "; ".join(line.differs),
    }
