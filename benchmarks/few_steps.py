"""What few steps cost: scores of trained settings under every solver, beside those of the many steps of the study.

    OMP_NUM_THREADS=1 python -m benchmarks.few_steps --params benchmarks/study_digits.yaml --work /tmp/study \\
        --settings ddpm dvdp-300-600 --out few_steps.json

Reads the networks that benchmarks/study.py trained, in its ``--work`` folder. Samples are kept, so it may be stopped
and started again. The result holds, for every solver, the score at few steps over that of the study's own sampling.
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
from benchmarks.study import metric, prepared, sampled_metrics, trained
from dvdp.config import Run, SamplingParams, read_params
from dvdp.files import write_atomically

#: Ways to spend few steps: (solver, timestep_spacing, lift).
WAYS = (
    ("ddpm", "uniform", "noise"),
    ("ddpm", "quadratic", "noise"),
    ("ddim", "uniform", "noise"),
    ("ddim", "quadratic", "noise"),
    ("dpm++2m", "uniform", "noise"),
    ("dpm++2m", "quadratic", "noise"),
    ("dpm++2m", "quadratic", "data"),
    ("sde-dpm++2m", "uniform", "noise"),
    ("sde-dpm++2m", "quadratic", "noise"),
    ("sde-dpm++2m", "logsnr", "noise"),
    ("deis3", "uniform", "noise"),
    ("deis3", "quadratic", "noise"),
)


def main() -> None:
    """Sample and score, one setting, seed and way after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--params", required=True)
    parser.add_argument("--work", type=Path, required=True, help="of benchmarks/study.py")
    parser.add_argument("--settings", nargs="+", required=True)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    params = read_params(options.params)
    store = prepared(params, options.work / params.dataset.name, None)
    rows: list[dict[str, object]] = []
    for run, folder in trained(params, options.settings, options.work, store):
        many = sampled_metrics(params, run, folder, options.work)[metric(params)]
        rows.append(_row(run, run.sampling, many, many))
        for solver, timestep_spacing, lift in WAYS:
            changes: dict[str, Any] = {"solver": solver, "timestep_spacing": timestep_spacing, "lift": lift}
            way = replace(run.sampling, steps=options.steps, **changes)
            if lift == "data" and not run.turning_points:
                continue
            few = sampled_metrics(params, replace(run, sampling=way), folder, options.work)[metric(params)]
            rows.append(_row(run, way, few, many))
            print(json.dumps(rows[-1]), flush=True)
            content = {"machine": machine(), "metric": metric(params), "summary": _summary(rows), "runs": rows}
            write_atomically(options.out, json.dumps(content, indent=2) + "\n")


def _row(run: Run, way: SamplingParams, found: float, many: float) -> dict[str, object]:
    return {
        "setting": run.setting,
        "seed": run.seed,
        "steps": way.steps,
        "solver": way.solver,
        "timestep_spacing": way.timestep_spacing,
        "lift": way.lift,
        "score": round(found, 4),
        "over_many_steps": round(found / many, 4),
    }


def _summary(rows: list[dict[str, object]]) -> dict[str, dict[str, float]]:
    """Means over seeds, by setting and way."""
    grouped: dict[str, list[dict[str, object]]] = {}
    for row in rows:
        name = f"{row['setting']}, {row['steps']} x {row['solver']}, {row['timestep_spacing']}, lift {row['lift']}"
        grouped.setdefault(name, []).append(row)
    return {
        name: {
            key: round(statistics.mean(float(str(r[key])) for r in group), 4) for key in ("score", "over_many_steps")
        }
        | {"seeds": len(group)}
        for name, group in grouped.items()
    }


if __name__ == "__main__":
    main()
