"""``reports/``: what DVC tracks and people open. A page that needs no server, and its parts as files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dvdp.diffusion.spans import level_spans
from dvdp.evaluation import figures
from dvdp.evaluation.copies import copies_sentence, surely_copies
from dvdp.evaluation.reference import Anchor
from dvdp.evaluation.samples import SampleShards
from dvdp.files import write_atomically
from dvdp.training import ledger
from pipelines.jobs.job import Sampled
from pipelines.jobs.sample import draw_process
from pipelines.jobs.score import anchors_of
from pipelines.reports.comparison import Result, Row, best, legend, likelihoods, table, tied
from pipelines.reports.costs import budget, costs, total
from pipelines.reports.nearest import draw_nearest
from pipelines.reports.origin import Services, commands, facts, run_table
from pipelines.reports.sweeps import draw_sweeps, known_settings
from pipelines.reports.text_tables import as_csv, as_markdown, as_page

SHEET_IMAGES = 12


@dataclass(frozen=True)
class Report:
    """The files of a report folder that others show too."""

    folder: Path
    text: str
    """The table for a terminal or an artifact, as Markdown."""

    @property
    def page(self) -> Path:
        """The page to open."""
        return self.folder / "index.html"

    @property
    def pictures(self) -> Path:
        """Folder of the samples and the process pictures."""
        return self.folder / "pictures"

    @property
    def contact_sheet(self) -> Path:
        """Samples of all settings."""
        return self.pictures / "contact_sheet.png"


def draw_samples(job: Sampled, picture: Path, count: int = 64) -> Path:
    """The first samples of a job as one grid."""
    return figures.save_png(figures.grid(_samples(job, count)), picture)


def write_report(
    folder: Path,
    rows: Sequence[Row],
    results: Sequence[Result],
    failures: Mapping[str, str],
    services: Services,
    model: str,
) -> Report:
    """Write the whole folder: page, table, metrics and plots for DVC, pictures.

    Args:
        services: what shows the runs, for links.
        model: name of the registered model.
    """
    folder.mkdir(parents=True, exist_ok=True)
    record = results[0].record
    params = results[0].job.params
    headings, cells = table(rows, record.headline)
    anchors = anchors_of(params)
    report = Report(folder, as_markdown(headings, cells))

    write_atomically(folder / "table.csv", as_csv(headings, cells))
    write_atomically(folder / "table.md", report.text + "\n")
    for name, values in (("metrics", _scores(rows, record.headline)), ("timings", _timings(rows))):
        write_atomically(folder / f"{name}.json", json.dumps(values, indent=2) + "\n")
    plots = folder / "plots"
    plots.mkdir(exist_ok=True)
    _write_loss_csv(plots / "loss.csv", results)

    sheet = figures.contact_sheet({r.job.name: _samples(r.job, SHEET_IMAGES) for r in results}, columns=SHEET_IMAGES)
    figures.save_png(sheet, report.contact_sheet)
    curves = _draw_curves(plots, report.pictures, results)
    leader = best(rows).setting
    sweeps = draw_sweeps(report.pictures, known_settings(results), results[0].job.run, rows)
    grids, processes, nearest = [], [], []
    for r in results:
        path = draw_samples(r.job, report.pictures / f"samples_{r.job.name}.png")
        grids.append((path, _caption(r)))
        path = draw_nearest(r.job, report.pictures / f"nearest_{r.job.name}.png")
        nearest.append((path, f"{r.job.name}. {copies_sentence(r.record)}"))
        if r.job.run.seed == params.seeds[0]:
            path = report.pictures / f"process_{r.job.name}.png"
            write_atomically(path, draw_process(r.job).read_bytes())
            processes.append((path, _caption(r)))

    page = as_page(
        "report.html",
        title=f"DVDP on {params.dataset.name}",
        subtitle=f"{_count(len(rows), 'setting')}, {_count(len(params.seeds), 'seed')},"
        f" {params.dataset.resolution} px images"
        + (f", class-conditional with {params.model.num_classes} classes" if params.model.num_classes else ""),
        result=verdict(rows, record.headline) + _copying(results),
        headings=headings,
        cells=cells,
        legend=legend(rows, record, anchors["real"]),
        likelihoods=likelihoods(rows),
        failures=failures,
        contact_sheet=figures.data_url(report.contact_sheet),
        smoothing=f"A point is the mean since the one before, over {params.training.log_images:,} images (the last, of"
        " what is left); nothing else is smoothed."
        + (" Lines of one colour are seeds." if len(params.seeds) > 1 else ""),
        curves=[*map(figures.data_url, curves)],
        sweeps=_inline(sweeps),
        grids=_inline(grids),
        processes=_inline(processes),
        nearest=_inline(nearest),
        spent=[budget(results), total(results)],
        costs=costs(results),
        commands=commands(next(r.job for r in results if r.job.run.setting == leader), model, services.mlflow),
        anchors=_anchors(params.dataset.name, anchors, record.metrics),
        facts=facts(results, services),
        runs=run_table(results, services),
    )
    write_atomically(report.page, page)
    return report


def verdict(rows: Sequence[Row], primary: str) -> list[str]:
    """Which setting is best, and whether that is certain."""
    leader, compared = best(rows), [row for row in rows if row.same_terms]
    others = [row for row in tied(rows) if row is not leader]
    score = f"{primary} {leader.estimate.text}"
    if len(compared) == 1:
        lines = [f"{leader.setting} has {score}; there is no other setting to compare it with."]
    elif not others:
        lines = [f"{leader.setting} is best: its {score} is lower than every other's by more than chance explains."]
    else:
        names = " and ".join(f"{row.setting} ({row.estimate.text})" for row in others)
        lines = [
            f"No setting is certainly best. {leader.setting} has the lowest score, {score}, but chance may explain its"
            f" lead over {names}."
        ]
        if beaten := " and ".join(row.setting for row in compared if row is not leader and row not in others):
            lines.append(f"Its score is lower than that of {beaten} by more than chance explains.")
    apart = [row.setting for row in rows if not row.same_terms]
    return lines + ([f"Scored on other terms, and not compared: {', '.join(apart)}."] if apart else [])


def _copying(results: Sequence[Result]) -> list[str]:
    names = [result.job.name for result in results if surely_copies(result.record)]
    return [f"Some images are copies of training images: {', '.join(names)}, see there."] if names else []


def _samples(job: Sampled, count: int) -> np.ndarray:
    shards = SampleShards(job.samples)
    return np.stack([shards[i].numpy() for i in range(min(count, len(shards)))])


def _scores(rows: Sequence[Row], headline: str) -> dict[str, Any]:
    """By setting, the one that ranks first, as `dvc exp show` keeps the order."""
    return {
        row.setting: {
            headline: row.score,
            **({f"{headline}_spread": row.spread} if row.seeds > 1 else {}),
            **row.metrics,
        }
        for row in rows
    }


def _timings(rows: Sequence[Row]) -> dict[str, Any]:
    return {
        row.setting: {
            "training_images": row.images,
            **(
                {name: getattr(row.timing, name) for name in ("seconds_per_step", "seconds_per_sample")}
                if row.timing
                else {}
            ),
            "training_speedup": row.training_speedup,
            "sampling_speedup": row.sampling_speedup,
        }
        for row in rows
    }


def _write_loss_csv(path: Path, results: Sequence[Result]) -> None:
    lines = [
        f"{entry.images},{entry.metrics['loss']:.6f},{result.job.name}"
        for result in results
        for entry in ledger.read(result.job.folder / "metrics.jsonl")
    ]
    write_atomically(path, "\n".join(["images,loss,run", *lines]) + "\n")


def _draw_curves(plots: Path, pictures: Path, results: Sequence[Result]) -> list[Path]:
    """The loss of all settings, that of the levels of each, and both for narrow screens."""
    losses: dict[str, list[figures.Points]] = {}
    levels: dict[str, dict[str, list[figures.Points]]] = {}
    for result in results:
        run, entries = result.job.run, ledger.read(result.job.folder / "metrics.jsonl")
        losses.setdefault(run.setting, []).append([(e.images, e.metrics["loss"]) for e in entries])
        for level, (_, high) in enumerate(level_spans(run.turning_points, run.schedule.timesteps)):
            key = f"loss/level_{level}"
            points = [(e.images, e.metrics[key]) for e in entries if key in e.metrics]
            name = f"{run.resolution >> level} px, {'all t' if run.at_all_timesteps else f't ≤ {high}'}"
            levels.setdefault(run.setting, {}).setdefault(name, []).append(points)
    axes: dict[str, Any] = {"xlabel": "training images", "ylabel": "loss", "logy": True}
    return [
        figures.panels(plots / "loss.png", {"": losses}, **axes, size=(9, 4.5)),
        figures.panels(plots / "loss_levels.png", levels, **axes),
        figures.panels(pictures / "loss_narrow.png", {"": losses}, **axes),
        figures.panels(pictures / "loss_levels_narrow.png", levels, **axes, columns=1),
    ]


def _caption(result: Result) -> str:
    points = ", ".join(map(str, result.job.run.turning_points))
    return f"{result.job.name}: " + (f"turning points at t = {points}" if points else "no turning point")


def _anchors(
    dataset: str, anchors: Mapping[str, Anchor], metrics: Mapping[str, float]
) -> tuple[list[str], list[list[str]]]:
    """Headings and cells."""
    real = anchors["real"]
    # What is extrapolated from samples is no anchor's.
    names = [name for name in metrics if not name.endswith("_std") and name in real.metrics]

    def shown(anchor: Anchor, name: str) -> str:
        return f"{anchor.metrics[name]:.3f}" + (f" ± {anchor.spreads[name]:.3f}" if anchor.draws > 1 else "")

    return ["real images", "number", "against", *names], [
        [
            f"of {dataset}" if title == "real" else title,
            f"{anchor.samples:,}",
            f"{anchor.references:,}",
            *(shown(anchor, name) for name in names),
        ]
        for title, anchor in anchors.items()
    ]


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")


def _inline(pictures: Sequence[tuple[Path, str]]) -> list[tuple[str, str]]:
    """Files and captions -> addresses and captions."""
    return [(figures.data_url(path), caption) for path, caption in pictures]
