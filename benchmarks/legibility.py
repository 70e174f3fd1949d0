"""How many generated images a classifier is sure of, beside real ones: are the digits of the demo legible?

    python -m benchmarks.legibility --project .

Reads what `make repro` left in a project folder: the extractor, which is a classifier of the data set's labels, the
real images, and the samples of every run. Prints, for real images and each setting, the share whose likeliest class has
a probability above 0.5 and above 0.9.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor

from dvdp.config import read_params
from dvdp.data.store import ImageStore
from dvdp.evaluation.extractors import FeatureNetwork, load_network
from dvdp.evaluation.scores import SampleShards


def main() -> None:
    """Print a line for real images and one for the samples of every run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--project", type=Path, required=True, help="folder of the params.yaml")
    project = parser.parse_args().project
    params = read_params(project / "params.yaml")
    data = project / "data" / params.dataset.name
    network, _ = load_network(data / "extractor" / "extractor.safetensors")
    store = ImageStore(data / "store")
    print(f"real: {_sure(network, torch.from_numpy(store.images(range(len(store)))))}")
    for file in sorted((project / params.cluster.storage).glob("*/run.json")):
        name = json.loads(file.read_text())["run"]["setting"]
        for folder in sorted(file.parent.glob("samples/*")):
            shards = SampleShards(folder)
            print(f"{name}: {_sure(network, torch.stack([shards[i] for i in range(len(shards))]))}")


def _sure(network: FeatureNetwork, images: Tensor) -> str:
    with torch.no_grad():
        likeliest = torch.cat([network(part.float()).softmax(1).max(1).values for part in images.split(256)])
    shares = ", ".join(f"{(likeliest > p).float().mean():.3f} above {p}" for p in (0.5, 0.9))
    return f"{len(images):,} images, {shares}"


if __name__ == "__main__":
    main()
