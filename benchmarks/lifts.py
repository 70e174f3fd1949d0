"""What the data's variance in the lift does for trained networks: a preset's settings, sampled without it and with.

    OMP_NUM_THREADS=1 python -m benchmarks.lifts --params presets/fig4-small.yaml --root . --out lifts.json

Reads the networks that ``dvdp experiment`` trained, in ``runs/`` of the ``--root`` folder, and its data. Samples are
kept, so it may be stopped and started again.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import machine
from benchmarks.study import metric, sampled_metrics
from dvdp.config import Params, Run, read_params
from dvdp.errors import UserError
from dvdp.files import write_atomically
from dvdp.models.export import load_model
from dvdp.planning import lift_losses
from dvdp.training.budget import training_images


def main() -> None:
    """Sample and score, one setting and seed after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--params", required=True)
    parser.add_argument("--root", type=Path, required=True, help="where `dvdp experiment` ran: has runs/ and data/")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    params = read_params(options.params)
    trained = _trained(options.root / "runs")
    rows = []
    for run in params.runs():
        weights = trained.get((run.setting, run.seed))
        if weights is None or not run.turning_points:
            continue
        rows.append(_row(params, run, weights, options.root))
        print(json.dumps(rows[-1]), flush=True)
        content = {"machine": machine(), "metric": metric(params), "summary": _summary(rows), "runs": rows}
        write_atomically(options.out, json.dumps(content, indent=2) + "\n")
    if not rows:
        raise UserError(
            f"--root: found no trained run of a setting of '{options.params}' in '{options.root}/runs', expected those"
            " of `dvdp experiment`; run it first."
        )


def _trained(runs: Path) -> dict[tuple[str, int], Path]:
    """Weights by setting and seed."""
    found = {}
    for weights in sorted(runs.glob("*/weights.safetensors")):
        run = json.loads((weights.parent / "run.json").read_text())["run"]
        found[run["setting"], run["seed"]] = weights
    return found


def _row(params: Params, run: Run, weights: Path, root: Path) -> dict[str, Any]:
    model = load_model(weights)
    row = {
        "setting": run.setting,
        "seed": run.seed,
        "kind": run.kind,
        "turning_points": list(run.turning_points),
        "images": training_images(run),
        "nats": lift_losses(model.process.schedule, model.description["band_deviations"], run.side),
    }
    for lift in ("noise", "data"):
        way = replace(run.sampling, lift=lift)
        samples = weights.parent / f"lifts-{lift}"
        row[lift] = round(sampled_metrics(params, way, weights, samples, root / "data")[metric(params)], 4)
    return row


def _summary(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Means and spreads over seeds, by setting and lift."""
    result: dict[str, dict[str, float]] = {}
    for name in dict.fromkeys(row["setting"] for row in rows):
        for lift in ("noise", "data"):
            scores = [row[lift] for row in rows if row["setting"] == name]
            spread = statistics.stdev(scores) if len(scores) > 1 else 0.0
            result[f"{name}, lift {lift}"] = {
                "mean": round(statistics.mean(scores), 4),
                "spread": round(spread, 4),
                "seeds": len(scores),
            }
    return result


if __name__ == "__main__":
    main()
