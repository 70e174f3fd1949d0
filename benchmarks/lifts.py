"""What the data's variance in the lift does for trained networks: a study's settings, sampled without it and with.

    OMP_NUM_THREADS=1 python -m benchmarks.lifts --params presets/fig4-small.yaml --work /tmp/study --out lifts.json

Reads the networks that benchmarks/study.py trained, in its ``--work`` folder. Samples are kept, so it may be stopped
and started again.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import machine
from benchmarks.study import metric, over_seeds, prepared, sampled_metrics, trained
from dvdp.config import Params, Run, read_params
from dvdp.files import write_atomically
from dvdp.models.export import load_model
from dvdp.models.flops import training_images
from dvdp.planning.planner import lift_losses


def main() -> None:
    """Sample and score, one setting and seed after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--params", required=True)
    parser.add_argument("--work", type=Path, required=True, help="of benchmarks/study.py")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    params = read_params(options.params)
    store = prepared(params, options.work / params.dataset.name, None)
    settings = [name for name, setting in params.settings.items() if setting.turning_points]
    rows = []
    for run, folder in trained(params, settings, options.work, store):
        rows.append(_row(params, run, folder, options.work))
        print(json.dumps(rows[-1]), flush=True)
        content = {"machine": machine(), "metric": metric(params), "summary": _summary(rows), "runs": rows}
        write_atomically(options.out, json.dumps(content, indent=2) + "\n")


def _row(params: Params, run: Run, folder: Path, work: Path) -> dict[str, Any]:
    model = load_model(folder / "weights.safetensors")
    row = {
        "setting": run.setting,
        "seed": run.seed,
        "process": run.process,
        "turning_points": list(run.turning_points),
        "images": training_images(run),
        "nats": lift_losses(model.process.schedule, model.description["band_std"], run.resolution),
    }
    for lift in ("noise", "data"):
        way = replace(run.sampling, lift=lift)
        row[lift] = sampled_metrics(params, replace(run, sampling=way), folder, work)[metric(params)]
    return row


def _summary(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Means and spreads over seeds, by setting and lift."""
    return {
        f"{name}, lift {lift}": over_seeds([row[lift] for row in rows if row["setting"] == name])
        for name in dict.fromkeys(row["setting"] for row in rows)
        for lift in ("noise", "data")
    }


if __name__ == "__main__":
    main()
