"""Is what `dvdp check --trial` says of a run what it then takes? Eight small configurations on a CPU.

    OMP_NUM_THREADS=1 python -m benchmarks.estimates --out benchmarks/results/estimates.json

Of each, a trial in a process of its own, as `dvdp check --trial` makes it, and the memory that a plain `dvdp check`
counts, beside a training and sampling in another process: processor seconds, so that other work on the machine hardly
counts, and the peak of memory, with what Ray adds in a worker added to both. Six minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.machine import machine
from dvdp.config import Params, Run, parse_params
from dvdp.data.loading import ArrayImages
from dvdp.files import write_atomically
from dvdp.models.export import load_model
from dvdp.training import ledger
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
    parser.add_argument("--batches", type=int, default=30, help="of a training")
    parser.add_argument("--out", type=Path, required=True, help="results, JSON")
    options = parser.parse_args()
    torch.set_num_threads(1)
    cases: list[dict[str, Any]] = []
    for resolution, points, model, training in CASES:
        params = case(resolution, points, model, training, options.batches)
        cases.append({"resolution": resolution, "turning_points": points, **model, **training, **compared(params)})
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
        }
    )


def compared(params: Params) -> dict[str, float]:
    """What is said of a run, what it took, and how far that is apart, as a share of what it took."""
    (run,) = params.runs()
    trial = trial_of(run, params, Path("none"))
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.estimates", "--work"],
        input=json.dumps(run.describe()),
        capture_output=True,
        text=True,
        env={**os.environ, **WORKER_ENVIRONMENT, "OMP_NUM_THREADS": "1"},
        check=True,
    )
    took = json.loads(done.stdout.splitlines()[-1])
    said = {
        "training_seconds": trial.step_seconds * run.training.images / run.training.batch,
        "sampling_seconds": trial.sample_seconds * run.sampling.count,
        "mib": trial.memory_bytes / 2**20,
    }
    pairs = {name: {"said": value, "took": took[name]} for name, value in said.items()}
    pairs["mib_counted"] = {"said": worker_memory(run, ranks=1, gpu=False) / 2**20, "took": took["mib"]}
    return {
        **{f"{name}_{key}": pair[key] for name, pair in pairs.items() for key in pair},
        **{f"{name}_error": pair["said"] / pair["took"] - 1 for name, pair in pairs.items()},
    }


def worked(run: Run) -> dict[str, float]:
    """Seconds of training by its log, seconds of sampling, and peak MiB while training, of this process."""
    torch.set_num_threads(1)
    random, classes, cpu = np.random.default_rng(0), run.model.num_classes, torch.device("cpu")
    images = ArrayImages(
        random.integers(0, 256, (256, 3, run.resolution, run.resolution), dtype=np.uint8),
        random.integers(0, classes, 256),
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        train(run, images, folder, "estimates", description={"label_counts": [1] * classes + [0]})
        (entry,) = ledger.read(folder / "metrics.jsonl")
        mib = (peak_memory(cpu) + RAY) / 2**20
        model = load_model(folder / "weights.safetensors")
        start = clock(cpu)
        model.draw(run.sampling.count, options=run.sampling.options())
        sampling = clock(cpu) - start
    seconds = run.training.images / entry.metrics["images_per_second"]
    return {"training_seconds": seconds, "sampling_seconds": sampling, "mib": mib}


if __name__ == "__main__":
    main()
