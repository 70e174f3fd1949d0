"""DDPM against DVDP at equal training FLOPs, over seeds, on this machine: is the score kept?

    MALLOC_MMAP_THRESHOLD_=1073741824 MALLOC_TRIM_THRESHOLD_=8589934592 OMP_NUM_THREADS=1 \\
        python -m benchmarks.study --params benchmarks/study_digits.yaml --work /tmp/study --out digits.json

Reads a params file like the pipeline does, but needs no Ray, Prefect or MLflow: one process, one run after the other.
Runs that are finished are kept, so it may be stopped and started again (``training_seconds`` of a run that was stopped
in the middle are those of its last part). Seeds go round before settings repeat, so that
a study that is cut short compares all settings.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch

from benchmarks.machine import machine
from dvdp.config import Params, Run, read_params
from dvdp.data.prepare import prepare
from dvdp.data.store import ImageStore
from dvdp.errors import UserError
from dvdp.evaluation.extractors import load_extractor, train_extractor
from dvdp.evaluation.reference import anchors, make_reference, read_reference
from dvdp.evaluation.samples import write_shard
from dvdp.evaluation.scores import score
from dvdp.files import write_atomically
from dvdp.identity import sampling_hash, training_hash
from dvdp.models.export import load_model
from dvdp.models.flops import training_images
from dvdp.training.loop import train
from dvdp.training.start import with_start
from pipelines.logs import to_terminal


def main() -> None:
    """Run the study and write its results after every run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--params", required=True)
    parser.add_argument("--path", type=Path, help="of the data set, in place of dataset.path")
    parser.add_argument("--work", type=Path, required=True, help="folder for data, runs and samples")
    parser.add_argument("--out", type=Path, required=True, help="results, JSON")
    options = parser.parse_args()
    to_terminal()
    torch.set_num_threads(1)
    params = read_params(options.params)
    store = prepared(params, options.work / params.dataset.name, options.path)
    results: list[dict[str, object]] = []
    for seed in params.seeds:
        for setting in params.settings:
            results.append(_result(params, with_start(params.run(setting, seed)), store, options.work))
            write_atomically(options.out, json.dumps(_summary(params, results, options.work), indent=2) + "\n")


def prepared(params: Params, folder: Path, path: Path | None) -> ImageStore:
    """The data set with extractor and reference, made where they are missing."""
    if not (folder / "store").exists():
        prepare(replace(params.dataset, path=path or params.dataset.path), folder / "store")
    store = ImageStore(folder / "store")
    if not (folder / "extractor" / "extractor.json").exists():
        epochs, task = params.evaluation.extractor_epochs, params.evaluation.extractor
        if task == "inception":
            raise UserError("evaluation.extractor: found 'inception', expected 'labels' or 'rotation' for a study.")
        print(train_extractor(store, task, epochs, store.metadata.digest, folder / "extractor"))
    if not (folder / "reference" / "reference.json").exists():
        extractor = load_extractor(folder / "extractor")
        make_reference(store, store.metadata.digest, extractor, folder / "reference")
    return store


def _result(params: Params, run: Run, store: ImageStore, work: Path) -> dict[str, object]:
    result = {"setting": run.setting, "seed": run.seed, "images": training_images(run)}
    result |= trained_and_scored(params, run, store, work)
    print(json.dumps(result), flush=True)
    return result


def trained(params: Params, settings: Sequence[str], work: Path, store: ImageStore) -> list[tuple[Run, Path]]:
    """The runs of some settings that are trained, with their folders, seed by seed.

    Raises:
        UserError: there is no such setting, or none is trained.
    """
    if unknown := [name for name in settings if name not in params.settings]:
        raise UserError(f"--settings: found {', '.join(unknown)}, expected some of {', '.join(params.settings)}.")
    found = []
    for seed in params.seeds:
        for run in (with_start(params.run(setting, seed)) for setting in params.settings if setting in settings):
            folder = work / "runs" / training_hash(run, store.metadata.digest, params.dataset.flip)
            if (folder / "weights.safetensors").exists():
                found.append((run, folder))
            else:
                print(f"{run.setting}, seed {run.seed}: not trained, left out", file=sys.stderr)
    if not found:
        raise UserError(
            f"--work: found no trained run of {', '.join(settings)} in '{work}', expected those of benchmarks/study.py;"
            " run it first."
        )
    return found


def over_seeds(scores: Sequence[float]) -> dict[str, float]:
    """Their mean and standard deviation, and how many they are."""
    spread = statistics.stdev(scores) if len(scores) > 1 else 0.0
    return {"mean": round(statistics.mean(scores), 4), "spread": round(spread, 4), "seeds": len(scores)}


def metric(params: Params) -> str:
    """The name of the Frechet distance."""
    return f"fd_{params.evaluation.extractor}"


def trained_and_scored(params: Params, run: Run, store: ImageStore, work: Path) -> dict[str, float]:
    """Seconds and scores of a run; what is trained or sampled already is kept."""
    trained = training_hash(run, store.metadata.digest, params.dataset.flip)
    folder = work / "runs" / trained
    start = time.perf_counter()
    told = store.metadata.model_metadata(len(run.turning_points))
    train(run, store, folder, trained, flip=params.dataset.flip, description=told)
    seconds = time.perf_counter() - start
    if not (folder / "seconds.json").exists():
        write_atomically(folder / "seconds.json", json.dumps(seconds))
    return {
        "training_seconds": round(json.loads((folder / "seconds.json").read_text()), 1),
        **sampled_metrics(params, run, folder, work),
    }


def sampled_metrics(params: Params, run: Run, folder: Path, work: Path) -> dict[str, float]:
    """Seconds and scores of the run trained in ``folder``, as its ``sampling`` says; images that are there are kept."""
    samples = folder / "samples" / sampling_hash(run, folder.name)
    if not (samples / "00000000.npy").exists():
        start = time.perf_counter()
        images = load_model(folder / "weights.safetensors", sampling=run.sampling).sample(run.sampling.count)
        write_atomically(samples / "seconds.json", json.dumps(time.perf_counter() - start))
        write_shard(samples / "00000000.npy", images)
    data = work / params.dataset.name
    extractor = load_extractor(data / "extractor")
    evaluation = params.evaluation
    metrics = score(samples, data / "reference", extractor, evaluation.samples, evaluation.kid_subset).metrics
    return {
        "sampling_seconds": round(json.loads((samples / "seconds.json").read_text()), 1),
        **{name: round(value, 4) for name, value in metrics.items()},
    }


def _summary(params: Params, results: list[dict[str, object]], work: Path) -> dict[str, object]:
    folder = work / params.dataset.name / "reference"
    reference, evaluation = read_reference(folder), params.evaluation
    means = {}
    for setting in params.settings:
        values = [float(str(r[metric(params)])) for r in results if r["setting"] == setting]
        if values:
            means[setting] = over_seeds(values)
    return {
        "machine": machine(),
        "data": {"name": params.dataset.name, "digest": reference.data_digest, "images": reference.count},
        "anchors": {k: asdict(v) for k, v in anchors(folder, evaluation.samples, evaluation.kid_subset).items()},
        "sampling": {"solver": params.sampling.solver, "steps": params.sampling.steps, "count": params.sampling.count},
        "metric": metric(params),
        "summary": means,
        "runs": results,
    }


if __name__ == "__main__":
    main()
