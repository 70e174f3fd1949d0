"""Two ways to spread a batch over the levels, compared in score and in time.

    MALLOC_MMAP_THRESHOLD_=1073741824 MALLOC_TRIM_THRESHOLD_=8589934592 OMP_NUM_THREADS=1 \\
        python -m benchmarks.level_draws --params params.yaml --work work --seeds 0 1 2 --out draws.json

``training.levels``: *all* gives every level its share of each batch, *one* gives a step to one level. The setting
{300, 600} of the params is trained both ways on the same images in the same order, sampled and scored. What is there is
kept.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.machine import machine
from benchmarks.study import metric, prepared, trained_and_scored
from dvdp.config import Params, read_params
from dvdp.errors import UserError
from dvdp.files import write_atomically


def main() -> None:
    """Train, sample and score both ways."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--params", required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    options = parser.parse_args()
    torch.set_num_threads(1)
    params = read_params(options.params)
    store = prepared(params, options.work / params.dataset.name, None)
    setting = next((s for s in params.settings if s.turning_points == (300, 600)), None)
    if setting is None:
        raise UserError(f"{options.params}: found no setting with turning points [300, 600], expected one; add it.")
    rows: list[dict[str, object]] = []
    for seed in options.seeds:
        run = params.run(setting, seed)
        usual = run.training
        for levels in ("one", "all"):
            found = trained_and_scored(
                params, replace(run, training=replace(usual, levels=levels)), store, options.work
            )
            rows.append({"levels": levels, "seed": seed, **found})
            print(json.dumps(rows[-1]), flush=True)
            content = {"machine": machine(), "metric": metric(params), "summary": _summary(params, rows)}
            write_atomically(options.out, json.dumps({**content, "runs": rows}, indent=2) + "\n")


def _summary(params: Params, rows: list[dict[str, object]]) -> list[dict[str, object]]:
    summary: list[dict[str, object]] = []
    for levels in ("one", "all"):
        alike = [row for row in rows if row["levels"] == levels]
        scores = [float(str(row[metric(params)])) for row in alike]
        if alike:
            spread = statistics.stdev(scores) if len(scores) > 1 else 0.0
            seconds = statistics.mean(float(str(row["training_seconds"])) for row in alike)
            about = {"mean": statistics.mean(scores), "spread": spread, "training_seconds": seconds}
            summary.append({"levels": levels, **about, "seeds": len(alike)})
    return summary


if __name__ == "__main__":
    main()
