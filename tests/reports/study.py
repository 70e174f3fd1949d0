"""A finished study on disk, of settings and seeds, as the experiment leaves it: nothing is trained for it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dvdp.config import Params, parse_params
from dvdp.data.prepare import prepare
from dvdp.data.store import ImageStore
from dvdp.diffusion.process import Process
from dvdp.evaluation import figures
from dvdp.evaluation.copies import HEADINGS
from dvdp.evaluation.records import ScoreRecord
from dvdp.evaluation.reference import FILE, Anchor, Reference
from dvdp.files import write_atomically
from dvdp.identity import evaluation_hash
from dvdp.models.flops import mean_flops, training_images
from dvdp.models.pixels import to_float
from dvdp.training.memory import run_bytes
from pipelines.jobs.device import Machine
from pipelines.jobs.job import Job
from pipelines.jobs.paths import DataPaths
from pipelines.provenance import GIT_COMMIT
from pipelines.reports.comparison import Result
from pipelines.reports.nearest import nearest_table

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LOGS = 9
SCORES = {"ddpm": 2.2, "dvdp-600": 2.3, "dvdp-300-600": 2.0}
ANCHOR = Anchor(256, 1541, 5, {"fd_labels": 1.7, "precision_labels": 0.9}, {"fd_labels": 0.2, "precision_labels": 0.01})


def study(folder: Path, **changes: Any) -> list[Result]:
    """Three settings with two seeds on the digits, in ``folder``, which is the working directory.

    Args:
        changes: of params.yaml, by section.
    """
    training = {"images": 18_000, "learning_rate": 0.002, **changes.pop("training", {})}
    params = parse_params({"seeds": [0, 1], "cluster": {"storage": "runs"}, "training": training, **changes})
    places = DataPaths.of(params)
    prepare(params.dataset, places.store)
    store = ImageStore(places.store)
    _write_reference(params, store)
    return [_result(Job(params, run, store.metadata.digest), store) for run in params.runs()]


def _write_reference(params: Params, store: ImageStore) -> None:
    folder, digest = DataPaths.of(params).reference, hashlib.sha256(b"").hexdigest()
    about = Reference(
        "labels", "e", 64, store.metadata.digest, len(store), store.metadata.resolution, "none", "torch-fidelity",
        sha256=digest,
    )  # fmt: skip
    write_atomically(folder / FILE, b"")
    write_atomically(folder / "reference.json", json.dumps(dataclasses.asdict(about)))
    known = dict.fromkeys(("real", "blurred", "noised"), dataclasses.asdict(ANCHOR))
    name = evaluation_hash(params.evaluation, "anchors", digest)
    write_atomically(params.cluster.storage / "anchors" / f"{name}.json", json.dumps(known))


def _result(job: Job, store: ImageStore) -> Result:
    run, rate, total = job.run, 1e10 / mean_flops(job.run), training_images(job.run)
    levels = range(len(run.turning_points) + 1)
    lines = []
    for i in range(1, LOGS + 1):
        loss = {f"loss/level_{k}": 0.03 * (k + 1) + 0.2 * math.exp(-i / 2) + 0.001 * run.seed for k in levels}
        metrics = {**loss, "loss": sum(loss.values()) / len(loss), "images_per_second": rate, "memory_gib": 1.25}
        lines.append(json.dumps({"images": total * i // LOGS, "time": 1.75e9 + 60 * i, "metrics": metrics}) + "\n")
    write_atomically(job.folder / "metrics.jsonl", "".join(lines))
    said = {"seconds": 0.8 * total / rate, "memory_bytes": 3 << 29, "disk_bytes": run_bytes(run)}
    write_atomically(job.folder / "estimate.json", json.dumps(said))
    machine = Machine("AMD EPYC 9004", False, 1, "0.1.0", "2.11.0", "3.12.3")
    write_atomically(job.folder / "machine.json", json.dumps(dataclasses.asdict(machine)))
    write_atomically(job.folder / "run.json", json.dumps({GIT_COMMIT: COMMIT}))
    write_atomically(job.weights, bytes(2**21))
    write_atomically(job.folder / "checkpoints" / "000000018000.safetensors", bytes(2**23))
    count = min(run.sampling.count, len(store))
    job.samples.mkdir(parents=True, exist_ok=True)
    np.save(job.samples / "00000000.npy", np.stack([store[run.seed + i][0] for i in range(count)]))
    write_atomically(job.samples / "00000000.seconds", str(count * 10 / rate))
    image = to_float(torch.from_numpy(store[0][0]))
    process = Process(run.build_schedule())
    states = figures.diffused_states(process, image, figures.picture_times(process))
    picture = job.folder / "pictures" / f"process-{job.sampling_hash}.png"
    figures.save_png(figures.process_picture(process, states, states, job.name), picture)
    score = SCORES.get(run.setting, 3.0) + 0.1 * run.seed
    sampling = {**run.sampling.options(), "lift": run.sampling.lift}
    metrics = {"fd_labels": score, "fd_labels_error": 0.05, "precision_labels": 0.6, "recall_labels": 0.8}
    metrics["copies"] = 0.25 if (run.setting, run.seed) == ("dvdp-600", 1) else 0.0
    lines = [f"{i},{run.seed + i},0,{len(store) - 1 - i},0.5,1" for i in range(count)]
    write_atomically(nearest_table(job), "\n".join([HEADINGS, *lines]) + "\n")
    record = ScoreRecord(
        metrics, "labels", "e", count, len(store), store.metadata.digest, "none", run.resolution, 100,
        "torch-fidelity", sampling,
    )  # fmt: skip
    return Result(job, record)
