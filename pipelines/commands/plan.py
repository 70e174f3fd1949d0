"""``dvdp plan``: what turning points cost and lose, before any training."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from dvdp.config import Params, Run
from dvdp.errors import UserError
from dvdp.models.export import load_model
from dvdp.models.pixels import to_float
from dvdp.planning.expectation import FEWEST, Fit, fit
from dvdp.planning.figure import draw_plan
from dvdp.planning.fisher import orthogonal_divergences
from dvdp.planning.planner import Plan, Planner
from dvdp.planning.search import PAPER_CHOICES, candidate_points, cheapest, frontier, most_levels, search
from pipelines.jobs.job import prepared_store
from pipelines.reports.text_tables import as_text
from pipelines.tracking.history import Trained, trained_settings
from pipelines.turning_points import band_std

LOWER_BOUND = "A lower bound: it ranks neither trained settings nor solvers."
#: Rows of the frontier that are printed.
_ROWS = 9
#: Images that a divergence is estimated from.
_IMAGES = 128


@dataclass(frozen=True)
class Question:
    """What ``dvdp plan`` is asked, beside the params."""

    steps: int | None = None
    """In place of ``sampling.steps``."""
    solver: str | None = None
    """In place of ``sampling.solver``."""
    tolerance: float = 0.01
    """Error that turning points may add to DDPM's; see :attr:`dvdp.planning.planner.Plan.excess`."""
    levels: int | None = None
    """Turning points at most; by default as many as resolution, network and steps allow."""
    seconds: tuple[float, ...] | None = None
    """Of the network at each level, finest first, in place of its FLOPs."""

    def sampling_of(self, run: Run) -> Run:
        """The run under the steps and the solver that are asked for."""
        steps = run.sampling.steps if self.steps is None else self.steps
        options = {
            "steps": steps,
            "solver": self.solver or run.sampling.solver,
            "share": run.sampling.options(steps)["share"],
        }
        try:
            sampling = dataclasses.replace(run.sampling, **options)
        except UserError as error:
            raise UserError(f"--{error}.") from None
        return dataclasses.replace(run, sampling=sampling)


def plan(params: Params, question: Question, out: Path) -> None:
    """Print the frontier of turning points for the params' data set, and settings to paste; draw the picture.

    Args:
        out: the picture, a .png.

    Raises:
        UserError: the data set is not prepared, or something in the question does not fit.
    """
    metadata = prepared_store(params).metadata
    std = band_std(metadata)
    run = question.sampling_of(_plain_run(params))
    levels = _levels(run, question, len(std))
    points = candidate_points(run.schedule.timesteps)
    paper_sets = [chosen for chosen in PAPER_CHOICES if len(chosen) <= levels and run.schedule.timesteps == 1000]
    own, foreign = _settings_of_file(params, question, std)
    planner = Planner(run, std, [*points, *(t for chosen in paper_sets for t in chosen)], question.seconds)
    plans = search(planner, levels, points)
    best, chosen = frontier(plans), cheapest(plans, question.tolerance)
    paper = [planner.plan(chosen) for chosen in paper_sets]

    how = f"{run.sampling.solver}, {run.sampling.steps} steps, {run.schedule.attenuation} to {run.schedule.floor:g}"
    print(f"{metadata.name}, {run.resolution} px: bands deviate by {', '.join(f'{d:.3g}' for d in std)}, finest first")
    print(f"{how}; {len(plans)} sets of up to {levels} turning points. {LOWER_BOUND}\n")
    notes: dict[Plan, list[str]] = {entry: [] for entry in [plans[0], *_some(best, _ROWS)]}
    notes[plans[0]].append("DDPM")
    for entry in paper:
        notes.setdefault(entry, []).append("the paper's")
    for name, entry in own.items():
        notes.setdefault(entry, []).append(name)
    notes.setdefault(chosen, []).append(f"<- the fastest within {question.tolerance:g}")
    trained = _trained(params, run, metadata.digest)
    model = _expectation(trained, run, std)
    expected = None if model is None else {e: None if e in foreign else model.expected(e) for e in notes}
    print(_table(notes, expected))
    print(
        "\nErrors of std, as shares of them: over all coefficients of an image, beyond DDPM's, and by band,"
        " finest first.\nNats lost: by all lifts, an image. Speed-ups over DDPM: bounds, by"
        f" {'seconds given' if question.seconds else 'counted FLOPs'}.\n"
    )
    _print_trained(trained, model)
    marks = {"the paper's choices": paper, "settings of the file": list(own.values())}
    title = f"{metadata.name}, {run.resolution} px, {how}"
    print(f"\npicture: {draw_plan(out, plans, best, marks, chosen, question.tolerance, title)}\n")
    print(settings_block(chosen))


def settings_block(chosen: Plan) -> str:
    """YAML for params.yaml: DDPM beside the plan."""
    points = list(chosen.turning_points)
    name = f"dvdp-{'-'.join(map(str, points))}"
    return f"settings:\n  ddpm: {{process: ddpm}}\n  {name}: {{process: dvdp, turning_points: {points}}}"


def print_divergences(params: Params, weights: Path) -> None:
    """Print the orthogonal Fisher divergence of a trained network for every candidate of a turning point."""
    store = prepared_store(params)
    model = load_model(weights)
    if model.resolution != store.metadata.resolution:
        raise UserError(
            f"--fisher: found a network for {model.resolution} px in '{weights}', expected"
            f" {store.metadata.resolution} px as in '{store.path}'; give another file or other params."
        )
    halvings = len(store.metadata.detail_std)
    count = min(_IMAGES, len(store))
    indices = [i * len(store) // count for i in range(count)]
    images = to_float(torch.from_numpy(store.images(indices)))
    labels = torch.tensor([store[index][1] for index in indices]) if model.run.model.num_classes else None
    times = candidate_points(model.process.schedule.timesteps)
    rows = orthogonal_divergences(model.process, model.denoiser, images, times, halvings, labels=labels)
    cells = [
        [str(t), *("dropped" if value is None else f"{value:.4f}" for value in row)]
        for t, row in zip(times, rows, strict=True)
    ]
    print(f"orthogonal Fisher divergence of '{weights}', by what a turning point at T would drop ({count} images):\n")
    print(as_text(["T", *(f"band {band}" for band in range(halvings))], cells))


def _plain_run(params: Params) -> Run:
    """What the sections say without any setting."""
    sampling = params.sampling
    if not isinstance(sampling.share, str):
        # Network calls that are given level by level are those of one number of levels.
        sampling = dataclasses.replace(sampling, share="length")
    return Run(
        setting="plan",
        seed=params.seeds[0],
        process="dvdp",
        turning_points=(),
        resolution=params.dataset.resolution,
        schedule=params.schedule,
        model=params.model,
        training=params.without_auto(params.training),
        sampling=sampling,
        reference_model=params.model,
    )


def _levels(run: Run, question: Question, bands: int) -> int:
    most = most_levels(run, bands)
    if question.seconds is not None:
        if len(question.seconds) < 2 or not all(0 < s < math.inf for s in question.seconds):
            raise UserError(
                f"--seconds: found {list(question.seconds)}, expected numbers above 0, one for each of at least 2"
                " levels, finest first."
            )
        most = min(most, len(question.seconds) - 1)
    if question.levels is None:
        return most
    if not 1 <= question.levels <= most:
        raise UserError(
            f"--levels: found {question.levels}, expected 1 to {most}, as many turning points as {run.resolution} px, a"
            f" network of {len(run.model.channel_mult)} stages, {run.sampling.steps} steps, and costs that are given,"
            " allow."
        )
    return question.levels


def _settings_of_file(params: Params, question: Question, std: Sequence[float]) -> tuple[dict[str, Plan], set[Plan]]:
    """Plans by name, each under its own overrides, and those of them that no fit to other settings speaks of.

    DDPM, and settings whose turning points are ``auto``, are left out.
    """
    plans, foreign = {}, set()
    for name, setting in params.settings.items():
        if not setting.turning_points or isinstance(setting.turning_points, str):
            continue
        run = question.sampling_of(params.run(name, params.seeds[0]))
        if question.seconds is not None and len(question.seconds) <= len(run.turning_points):
            raise UserError(
                f"--seconds: found {len(question.seconds)} numbers, expected at least {len(run.turning_points) + 1},"
                f" one for each level of {name}."
            )
        name = name if run.process == "dvdp" else f"{name} ({run.process})"
        plans[name] = Planner(run, std, run.turning_points, question.seconds).plan(run.turning_points)
        if (run.process, run.schedule, run.model) != ("dvdp", params.schedule, params.model):
            foreign.add(plans[name])
    return plans, foreign


def _some(plans: Sequence[Plan], count: int) -> list[Plan]:
    """About ``count`` of the frontier, evenly in the logarithm of their speed-ups."""
    last = math.log(plans[-1].training_speedup)
    wanted = [math.exp(last * i / (count - 1)) for i in range(count)]
    return list(dict.fromkeys(min(plans, key=lambda p: abs(p.training_speedup - speed)) for speed in wanted))


def _table(notes: Mapping[Plan, Sequence[str]], expected: Mapping[Plan, float | None] | None) -> str:
    headings = ["turning points", "error", "beyond DDPM", "bands", "nats lost", "training", "sampling", "expected", ""]
    cells = [
        [
            _points(entry.turning_points),
            f"{entry.error:.4f}",
            f"{entry.excess:+.4f}",
            " ".join(f"{error:+.3f}" for error in entry.band_errors),
            f"{sum(entry.lift_losses):.1g}" if entry.lift_losses else "-",
            f"{entry.training_speedup:.2f}x",
            f"{entry.sampling_speedup:.2f}x",
            "-" if not expected or (score := expected[entry]) is None else f"{score:.2f}",
            ", ".join(texts),
        ]
        for entry, texts in sorted(notes.items(), key=lambda item: item[0].training_speedup)
    ]
    if expected is None:
        headings, *cells = [[*line[:-2], line[-1]] for line in [headings, *cells]]
    return as_text(headings, cells)


def _trained(params: Params, run: Run, digest: str) -> list[Trained]:
    try:
        return trained_settings(params, run, digest)
    except UserError as error:
        print(error)
        return []


def _expectation(trained: Sequence[Trained], run: Run, std: Sequence[float]) -> Fit | None:
    """Of the scores of further settings, where there are enough to learn from."""
    ours = [entry for entry in trained if entry.process in (run.process, "ddpm")]
    if len(ours) < FEWEST:
        return None
    planner = Planner(run, std, [t for entry in ours for t in entry.turning_points])
    return fit([planner.plan(entry.turning_points) for entry in ours], [entry.mean for entry in ours])


def _print_trained(trained: Sequence[Trained], model: Fit | None) -> None:
    if trained:
        record = trained[0].record
        print(
            f"Trained so, by MLflow: {record.headline} of {record.samples} images by {record.sampling.get('solver')},"
            f" {record.sampling.get('steps')} steps.\n"
        )
        cells = [
            [
                entry.process,
                _points(entry.turning_points),
                str(len(entry.scores)),
                f"{entry.mean:.2f}",
                f"{entry.spread:.2f}",
            ]
            for entry in trained
        ]
        print(as_text(["process", "turning points", "seeds", "mean", "spread"], cells) + "\n")
    if model is None:
        count = sum(entry.process != "subspace" for entry in trained)
        print(
            f"Found {count} settings in MLflow that were trained with this network and training; an expected"
            f" score needs {FEWEST}."
        )
    else:
        print(
            f"Expected: fitted to these; left out one at a time, they are ranked with a correlation (Spearman) of"
            f" {model.rank_correlation:.2f}."
        )


def _points(turning_points: Sequence[int]) -> str:
    return ", ".join(map(str, turning_points)) or "none"
