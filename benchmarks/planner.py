"""Does the planner rank settings that it was not fitted to? Trained scores beside expected ones.

    dvdp prepare --params presets/plan-small.yaml  (and extractor, reference, experiment)
    python -m benchmarks.planner --params presets/plan-small.yaml --out planner.json --picture planner.png

Reads from MLflow, in the folder it is started in, what the settings of the params scored. The first eight are fitted;
what the fit expects of the others is compared with what they scored, in rank (Spearman). Beside it what is fitted to
nothing: the exact recursion, the loss at the lifts, the cost of training, and T_1.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from scipy.stats import spearmanr

from benchmarks.machine import machine
from dvdp.config import read_params
from dvdp.data.store import ImageStore
from dvdp.errors import UserError
from dvdp.evaluation.figures import save_figure
from dvdp.files import write_atomically
from dvdp.planning.expectation import FEWEST, fit
from dvdp.planning.planner import Plan, Planner
from pipelines.jobs.paths import DataPaths
from pipelines.tracking.history import Trained, trained_settings
from pipelines.turning_points import band_std


def main() -> None:
    """Fit, compare, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--params", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--picture", type=Path, required=True)
    options = parser.parse_args()
    params = read_params(options.params)
    metadata = ImageStore(DataPaths.of(params).store).metadata
    runs = [params.run(setting, params.seeds[0]) for setting in params.settings]
    known = trained_settings(params, runs[-1], metadata.digest)
    found = {(entry.process, entry.turning_points): entry for entry in known}
    missing = [run.setting for run in runs if (run.process, run.turning_points) not in found]
    if missing:
        raise UserError(f"{options.params}: found no scores of {', '.join(missing)} in MLflow; train them first.")
    trained = [found[run.process, run.turning_points] for run in runs]
    points = [t for run in runs for t in run.turning_points]
    planner = Planner(runs[-1], band_std(metadata), points)
    plans = [planner.plan(run.turning_points) for run in runs]
    model = fit(plans[:FEWEST], [entry.mean for entry in trained[:FEWEST]])
    everything = fit(plans, [entry.mean for entry in trained])

    def expect(plan: Plan) -> float:
        score = model.expected(plan)
        if score is None:
            raise UserError(f"{options.params}: found turning points {plan.turning_points} unlike all fitted ones.")
        return score

    def ranked(measure: Callable[[Plan], float]) -> float:
        held = slice(FEWEST, None)
        scores = [entry.mean for entry in trained[held]]
        return float(spearmanr([measure(plan) for plan in plans[held]], scores).statistic)

    content = {
        "machine": machine(),
        "metric": trained[0].record.headline,
        "seeds": min(len(entry.scores) for entry in trained),
        "spearman": {
            "held out": ranked(expect),
            "left out one at a time": everything.rank_correlation,
            "held out, by the recursion's error alone": ranked(lambda plan: plan.error),
            "held out, by the nats lost alone": ranked(lambda plan: sum(plan.lift_losses)),
            "held out, by the cost of training alone": ranked(lambda plan: 1 / plan.training_speedup),
            "held out, by T_1 alone": ranked(lambda plan: plan.shares[0]),
        },
        "settings": [
            {
                "turning_points": list(plan.turning_points),
                "role": "fitted" if i < FEWEST else "held out",
                "expected": round(expect(plan), 3),
                "scores": [round(score, 4) for score in entry.scores],
            }
            for i, (plan, entry) in enumerate(zip(plans, trained, strict=True))
        ],
    }
    write_atomically(options.out, json.dumps(content, indent=2) + "\n")
    print(json.dumps(content, indent=2))
    _draw(options.picture, trained, [expect(plan) for plan in plans], trained[0].record.headline)


def _draw(path: Path, trained: Sequence[Trained], expected: Sequence[float], metric: str) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 5), layout="constrained")
    axes = figure.subplots()
    for name, part, colour in (("fitted", slice(FEWEST), "#5b6578"), ("held out", slice(FEWEST, None), "#D55E00")):
        means = [entry.mean for entry in trained[part]]
        spreads = [entry.spread for entry in trained[part]]
        axes.errorbar(expected[part], means, spreads, fmt="o", color=colour, capsize=3, label=name)
    for i, j in enumerate(sorted(range(len(trained)), key=expected.__getitem__)):
        # Above and below by turns, as neighbours lie close.
        way, align = (-1, "top") if i % 2 else (1, "bottom")
        label = ", ".join(map(str, trained[j].turning_points)) or "none"
        end = (expected[j], trained[j].mean + way * trained[j].spread)
        axes.annotate(
            label, end, (0, 5 * way), textcoords="offset points", va=align, ha="center", rotation=90, fontsize=8
        )
    low, high = min(expected), max(expected)
    axes.plot([low, high], [low, high], color="#5b6578", linestyle="--", linewidth=1)
    axes.set(xlabel=f"expected {metric}", ylabel=f"{metric} over seeds (lower is better)")
    axes.legend(frameon=False)
    save_figure(figure, path)


if __name__ == "__main__":
    main()
