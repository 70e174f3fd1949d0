"""Does bf16 hold? The loss of the same training in bf16 and in fp32, from the same seeds.

    MALLOC_MMAP_THRESHOLD_=1073741824 MALLOC_TRIM_THRESHOLD_=8589934592 OMP_NUM_THREADS=1 \\
        python -m benchmarks.precision --params params.yaml --images 8000 --work /tmp/precision \\
        --out benchmarks/results/precision.json --picture docs/pictures/precision.png

Trains every setting of the params in both, with ``--images`` of DDPM, and scores both. Images, timesteps and noise of a
step are the same, so the curves differ by rounding and by what follows from it. What is finished is kept, so it may be
stopped and started again.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import machine
from benchmarks.steps import PRECISIONS
from benchmarks.study import metric, prepared, trained_and_scored
from dvdp.config import read_params
from dvdp.evaluation.figures import curves
from dvdp.files import write_atomically
from dvdp.identity import training_hash
from dvdp.training import ledger


def main() -> None:
    """Train, compare, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--params", required=True)
    parser.add_argument("--images", type=int, required=True, help="in place of training.images")
    parser.add_argument("--work", type=Path, required=True, help="folder for data, runs and samples")
    parser.add_argument("--out", type=Path, required=True, help="results, JSON")
    parser.add_argument("--picture", type=Path, required=True, help="the curves, a .png")
    options = parser.parse_args()
    torch.set_num_threads(1)
    params = read_params(options.params)
    training = replace(params.training, images=options.images, preview_images=0, log_images=options.images // 20)
    params = replace(params, training=training)
    store = prepared(params, options.work / params.dataset.name, None)
    cases: list[dict[str, Any]] = []
    for setting in params.settings:
        losses: dict[str, dict[int, float]] = {}
        case: dict[str, Any] = {"setting": setting, "seed": params.seeds[0]}
        for precision in PRECISIONS:
            run = params.run(setting, params.seeds[0])
            run = replace(run, training=replace(run.training, precision=precision))
            found = trained_and_scored(params, run, store, options.work)
            trained = training_hash(run, store.metadata.digest, params.dataset.flip)
            entries = ledger.read(options.work / "runs" / trained / "metrics.jsonl")
            losses[precision] = {entry.images: entry.metrics["loss"] for entry in entries}
            case[precision] = {"loss": losses[precision], "score": found[metric(params)]}
        apart = [abs(losses["bf16"][images] / loss - 1) for images, loss in losses["fp32"].items()]
        case |= {"mean_difference": sum(apart) / len(apart), "largest_difference": max(apart)}
        cases.append(case)
        print(
            f"{setting}: losses {case['mean_difference']:.2%} apart on average,"
            f" {case['largest_difference']:.2%} at most; {metric(params)} {case['bf16']['score']:.2f} in bf16,"
            f" {case['fp32']['score']:.2f} in fp32",
            flush=True,
        )
    result = {"machine": machine(), "images": options.images, "metric": metric(params), "cases": cases}
    write_atomically(options.out, json.dumps(result, indent=2) + "\n")
    lines = {
        f"{case['setting']}, {precision}": list(case[precision]["loss"].items())
        for case in cases
        for precision in PRECISIONS
    }
    curves(options.picture, lines, "The same training in bf16 and in fp32", "images", "loss", logy=True)


if __name__ == "__main__":
    main()
