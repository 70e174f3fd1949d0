"""Which variance of ancestral steps suits which number of them: exact denoisers of Gaussian data, and trained networks.

    OMP_NUM_THREADS=1 python -m benchmarks.variances --params params.yaml --work /tmp/study \\
        --settings ddpm dvdp-300-600 --out benchmarks/results/variances.json

Reads the networks that benchmarks/study.py trained, in its ``--work`` folder. Samples are kept, so it may be stopped
and started again. Of Gaussian data with the deviations of the data set's bands the result holds the error of the finest
band's deviation, of networks their score.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import torch

from benchmarks.machine import machine
from benchmarks.study import metric, prepared, sampled_metrics, trained
from dvdp.config import read_params
from dvdp.diffusion.process import Variance
from dvdp.files import write_atomically
from dvdp.models.export import load_model
from dvdp.planning.planner import band_errors


def main() -> None:
    """Compute and sample, one setting and number of steps after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--params", required=True)
    parser.add_argument("--work", type=Path, required=True, help="of benchmarks/study.py")
    parser.add_argument("--settings", nargs="+", required=True)
    parser.add_argument("--steps", type=int, nargs="+", default=[20, 50, 100, 250])
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    params = read_params(options.params)
    store = prepared(params, options.work / params.dataset.name, None)
    rows: list[dict[str, object]] = []
    for run, folder in trained(params, options.settings, options.work, store):
        model = load_model(folder / "weights.safetensors")
        for steps in options.steps:
            row: dict[str, object] = {"setting": run.setting, "seed": run.seed, "steps": steps}
            for variance in get_args(Variance):
                way = replace(run.sampling, solver="ddpm", steps=steps, variance=variance)
                errors = band_errors(model.process.schedule, model.description["band_std"], steps, variance=variance)
                found: dict[str, Any] = {"finest_band": round(errors[0], 5)}
                found["score"] = sampled_metrics(params, replace(run, sampling=way), folder, options.work)[
                    metric(params)
                ]
                row[variance] = found
            rows.append(row)
            print(json.dumps(row), flush=True)
            content = {"machine": machine(), "metric": metric(params), "count": params.sampling.count, "runs": rows}
            write_atomically(options.out, json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
