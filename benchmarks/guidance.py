"""What a guidance scale does to the score and to the class of images: at all levels, or at the coarsest alone.

    OMP_NUM_THREADS=1 python -m benchmarks.guidance --params benchmarks/guidance_digits.yaml --work /tmp/study \\
        --scales 0 1 1.5 2 3 5 --out guidance.json

Reads the networks that benchmarks/study.py trained, in its ``--work`` folder. Every network and scale has the same
labels and noise. The accuracy is the share of images that the network behind the score takes for the class asked for;
that of real images is the one on images that were held out from it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Subset

from benchmarks.machine import machine
from benchmarks.study import metric, over_seeds, prepared, trained
from dvdp.config import read_params
from dvdp.evaluation.extractors import load_extractor, load_network
from dvdp.evaluation.reference import measure, read_features, read_reference
from dvdp.files import write_atomically
from dvdp.models.export import TrainedModel, load_model


def main() -> None:
    """Measure one network and scale after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--params", required=True)
    parser.add_argument("--work", type=Path, required=True, help="of benchmarks/study.py")
    parser.add_argument("--scales", type=float, nargs="+", required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    params = read_params(options.params)
    data = options.work / params.dataset.name
    store = prepared(params, data, None)
    extractor, (network, info) = (
        load_extractor(data / "extractor"),
        load_network(data / "extractor" / "extractor.safetensors"),
    )
    real, count = read_features(data / "reference", read_reference(data / "reference")), params.evaluation.samples
    rows: list[dict[str, Any]] = []
    for run, folder in trained(params, list(params.settings), options.work, store):
        model = load_model(folder / "weights.safetensors", sampling=run.sampling)
        labels = model.labels(run.sampling.seed, 0, count)
        if labels is None:
            raise SystemExit("model.num_classes: found 0, expected a class-conditional network.")
        for where, scale in [(where, scale) for scale in options.scales for where in ("all levels", "coarsest level")]:
            images = _drawn(model, where, scale, count)
            pictures: Any = images
            found = measure(
                Subset(pictures, range(count)), real, extractor, min(params.evaluation.kid_subset, count), False
            )
            with torch.no_grad():
                right = (network(images).argmax(1) == labels).double().mean().item()
            row = {"setting": run.setting, "seed": run.seed, "where": where, "scale": scale}
            rows.append(row | {metric(params): round(found[metric(params)], 4), "accuracy": round(right, 4)})
            print(json.dumps(rows[-1]), flush=True)
            content = {
                "machine": machine(),
                "samples": count,
                "accuracy of real images": info.accuracy,
                "sampling": run.sampling.options(),
                "means": _means(rows, metric(params)),
                "runs": rows,
            }
            write_atomically(options.out, json.dumps(content, indent=2) + "\n")


def _drawn(model: TrainedModel, where: str, scale: float, count: int) -> Tensor:
    scales = [
        scale if where == "all levels" or level == model.process.levels else 1.0
        for level in range(model.process.levels + 1)
    ]
    return model.sample(count, guidance=scales)


def _means(rows: list[dict[str, Any]], name: str) -> dict[str, dict[str, Any]]:
    """Over seeds, by setting, levels and scale."""
    means = {}
    for key in dict.fromkeys((row["setting"], row["where"], row["scale"]) for row in rows):
        same = [row for row in rows if (row["setting"], row["where"], row["scale"]) == key]
        means[", ".join(map(str, key))] = {each: over_seeds([row[each] for row in same]) for each in (name, "accuracy")}
    return means


if __name__ == "__main__":
    main()
