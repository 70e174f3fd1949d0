"""Is what `dvdp check --trial` says of a run what it then takes? Eight small configurations on a CPU.

    OMP_NUM_THREADS=1 python -m benchmarks.estimates --out benchmarks/results/estimates.json

Of each, a trial in a process of its own, as `dvdp check --trial` makes it, and the memory that a plain `dvdp check`
counts, beside a training and sampling in another process. Times are processor seconds, so that other work on the
machine hardly counts, of a training step after the first ones and of a sample; trial and training take turns, as
the speed of a shared processor changes by a third within minutes, and medians of the turns are compared. Memory is
the peak, with what Ray adds in a worker added to both. A quarter of an hour on one core.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.machine import machine
from dvdp.config import Params, Run, parse_params
from dvdp.data.loading import ArrayImages
from dvdp.files import write_atomically
from dvdp.models.export import load_model
from dvdp.training.estimate import clock, peak_memory
from dvdp.training.loop import train
from dvdp.training.memory import RAY, worker_memory
from pipelines.commands.trial import trial_of
from pipelines.jobs.cluster import WORKER_ENVIRONMENT

#: What differs from the defaults: (resolution, turning points, model, training).
CASES: list[tuple[int, list[int], dict[str, Any], dict[str, Any]]] = [
    (32, [], {}, {}),
    (32, [300, 600], {}, {}),
    (32, [300, 600], {}, {"levels": "one", "batch": 16}),
    (16, [600], {"channel_mult": [1, 2], "attention_factors": [2]}, {"batch": 64}),
    (64, [300, 600], {}, {"batch": 16}),
    (32, [], {"model_channels": 32}, {"batch": 16, "accumulation": 4}),
    (32, [600], {"model_channels": 32, "num_res_blocks": 2}, {"batch": 16, "optimizer": "adamw"}),
    (32, [300], {}, {"activation_checkpointing": True, "batch": 64}),
]
SAMPLES = 16


def main() -> None:
    """Estimate, train and sample, compare, write."""
    if sys.argv[1:] == ["--work"]:
        print(json.dumps(worked(Run.from_description(json.loads(sys.stdin.read())))))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=30, help="of a training, a third of which are not timed")
    parser.add_argument("--turns", type=int, default=3, help="of trial and training")
    parser.add_argument("--out", type=Path, required=True, help="results, JSON")
    options = parser.parse_args()
    torch.set_num_threads(1)
    cases: list[dict[str, Any]] = []
    for resolution, points, model, training in CASES:
        params = case(resolution, points, model, training, options.batches)
        cases.append(
            {"resolution": resolution, "turning_points": points, **model, **training, **compared(params, options.turns)}
        )
        print(json.dumps(cases[-1]), flush=True)
    worst = {name: max(abs(case[name]) for case in cases) for name in cases[0] if name.endswith("_error")}
    write_atomically(options.out, json.dumps({"machine": machine(), "worst": worst, "cases": cases}, indent=2) + "\n")
    print(worst)


def case(resolution: int, points: list[int], model: dict[str, Any], training: dict[str, Any], batches: int) -> Params:
    """The params of a configuration."""
    images = batches * training.get("batch", 32)
    whole = {"images": images, "budget": "images", "preview_images": 0, "log_images": images, "precision": "fp32"}
    return parse_params(
        {
            "dataset": {"name": "none", "resolution": resolution},
            "settings": {"x": {"process": "dvdp" if points else "ddpm", "turning_points": points}},
            "model": model,
            "training": {**whole, "checkpoint_images": images, **training},
            "sampling": {"count": SAMPLES, "batch": SAMPLES},
            "evaluation": {"samples": SAMPLES, "kid_subset": SAMPLES},
        }
    )


def compared(params: Params, turns: int) -> dict[str, float]:
    """What is said of a run, what it took, and how far that is apart, as a share of what it took."""
    (run,) = params.runs()
    said: dict[str, list[float]] = {"seconds_per_step": [], "seconds_per_sample": [], "mib": []}
    took: dict[str, list[float]] = {name: [] for name in said}
    for _ in range(turns):
        trial = trial_of(run, params, Path("none"))
        for name, value in zip(
            said, (trial.step_seconds, trial.sample_seconds, trial.memory_bytes / 2**20), strict=True
        ):
            said[name].append(value)
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.estimates", "--work"],
            input=json.dumps(run.describe()),
            capture_output=True,
            text=True,
            env={**os.environ, **WORKER_ENVIRONMENT, "OMP_NUM_THREADS": "1"},
            check=True,
        )
        for name, value in json.loads(done.stdout.splitlines()[-1]).items():
            took[name].append(value)
    pairs = {name: (statistics.median(said[name]), statistics.median(took[name])) for name in said}
    pairs["mib_counted"] = (worker_memory(run, ranks=1, gpu=False) / 2**20, pairs["mib"][1])
    return {
        **{f"{name}_said": pair[0] for name, pair in pairs.items()},
        **{f"{name}_took": pair[1] for name, pair in pairs.items()},
        **{f"{name}_error": pair[0] / pair[1] - 1 for name, pair in pairs.items()},
    }


def worked(run: Run) -> dict[str, float]:
    """Seconds of a training step and of a sample, and peak MiB while training, of this process."""
    torch.set_num_threads(1)
    random, classes, cpu = np.random.default_rng(0), run.model.num_classes, torch.device("cpu")
    images = ArrayImages(
        random.integers(0, 256, (256, 3, run.resolution, run.resolution), dtype=np.uint8),
        random.integers(0, classes, 256),
    )
    batches = run.training.images // run.training.batch

    def trained(count: int, folder: Path) -> float:
        images_seen = count * run.training.batch
        short = replace(run.training, images=images_seen, log_images=images_seen, checkpoint_images=images_seen)
        start = clock(cpu)
        train(
            replace(run, training=short), images, folder, "estimates", description={"label_counts": [1] * classes + [0]}
        )
        return clock(cpu) - start

    with tempfile.TemporaryDirectory() as name:
        # The first training pays for what a process does once; the difference of the others is without their starts.
        third = batches // 3
        _, short, long = (trained(count, Path(name) / str(i)) for i, count in enumerate((third, third, batches)))
        mib = (peak_memory(cpu) + RAY) / 2**20
        model = load_model(Path(name) / "2" / "weights.safetensors")
        start = clock(cpu)
        model.draw(run.sampling.count, options=run.sampling.options())
        sampling = clock(cpu) - start
    step = (long - short) / (batches - third)
    return {"seconds_per_step": step, "seconds_per_sample": sampling / run.sampling.count, "mib": mib}


if __name__ == "__main__":
    main()
