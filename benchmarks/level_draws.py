"""Two ways to spread a batch over the levels, compared in score and in time.

    MALLOC_MMAP_THRESHOLD_=1073741824 MALLOC_TRIM_THRESHOLD_=8589934592 OMP_NUM_THREADS=1 \\
        python -m benchmarks.level_draws --params params.yaml --work work --seeds 0 1 2 --out draws.json

``training.levels``: *all* gives every level its share of each batch, *one* gives a step to one level. The setting
{300, 600} of the params is trained both ways on the same images in the same order, sampled and scored; with more than
one batch size, each is tried with a learning rate that goes with the root of the batch. What is there is kept.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.machine import machine
from benchmarks.study import prepared, sampled_metrics
from dvdp.config import Params, Run, read_params
from dvdp.data.store import ImageStore
from dvdp.errors import UserError
from dvdp.files import write_atomically
from dvdp.identity import sampling_hash, training_hash
from dvdp.training.loop import train


def main() -> None:
    """Train, sample and score both ways."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--params", required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--batches", type=int, nargs="+", help="default: that of the params")
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
        for batch in options.batches or [usual.batch]:
            rate = usual.learning_rate * (batch / usual.batch) ** 0.5
            for levels in ("one", "all"):
                training = replace(usual, levels=levels, batch=batch, learning_rate=rate)
                rows.append(_row(params, replace(run, training=training), store, options.work))
                print(json.dumps(rows[-1]), flush=True)
                content = {"machine": machine(), "metric": _metric(params), "summary": _summary(params, rows)}
                write_atomically(options.out, json.dumps({**content, "runs": rows}, indent=2) + "\n")


def _metric(params: Params) -> str:
    return f"fd_{params.evaluation.extractor}"


def _row(params: Params, run: Run, store: ImageStore, work: Path) -> dict[str, object]:
    trained = training_hash(run, store.metadata.digest, params.dataset.flip, 1)
    folder = work / "runs" / trained
    start = time.perf_counter()
    deviations = {"band_deviations": store.metadata.band_deviations(len(run.turning_points))}
    train(run, store, folder, trained, flip=params.dataset.flip, description=deviations)
    seconds = folder / "seconds.json"
    if not seconds.exists():
        write_atomically(seconds, json.dumps(time.perf_counter() - start))
    samples = folder / "samples" / sampling_hash(run, trained)
    metrics = sampled_metrics(params, run.sampling, folder / "weights.safetensors", samples, work)
    return {
        "levels": run.training.levels,
        "batch": run.training.batch,
        "seed": run.seed,
        "training_seconds": round(json.loads(seconds.read_text()), 1),
        **{name: round(value, 4) for name, value in metrics.items()},
    }


def _summary(params: Params, rows: list[dict[str, object]]) -> list[dict[str, object]]:
    found: dict[tuple[object, object], list[dict[str, object]]] = {}
    for row in rows:
        found.setdefault((row["batch"], row["levels"]), []).append(row)
    return [
        {
            "batch": batch,
            "levels": levels,
            "mean": statistics.mean(scores := [float(str(row[_metric(params)])) for row in alike]),
            "spread": statistics.stdev(scores) if len(scores) > 1 else 0.0,
            "training_seconds": statistics.mean(float(str(row["training_seconds"])) for row in alike),
            "seeds": len(alike),
        }
        for (batch, levels), alike in found.items()
    ]


if __name__ == "__main__":
    main()
