"""How many generated images a classifier is sure of, beside real ones: are the digits of the demo legible?

    python -m benchmarks.legibility --project .

Reads what `make repro` left in a project folder: the extractor, which is a classifier of the data set's labels, the
real images, and the samples of every run. Prints, for real images and each setting, the share whose likeliest class has
a probability above 0.5 and above 0.9, and the share for which it is the class that the image has or was drawn for.
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
from dvdp.evaluation.samples import SampleShards
from dvdp.models.export import load_model


def main() -> None:
    """Print a line for real images and one for the samples of every run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--project", type=Path, required=True, help="folder of the params.yaml")
    project = parser.parse_args().project
    params = read_params(project / "params.yaml")
    data = project / "data" / params.dataset.name
    network, _ = load_network(data / "extractor" / "extractor.safetensors")
    store = ImageStore(data / "store")
    labels = torch.tensor([store[i][1] for i in range(len(store))])
    print(f"real: {_sure(network, torch.from_numpy(store.images(range(len(store)))), labels)}")
    for file in sorted((project / params.cluster.storage).glob("*/run.json")):
        about = json.loads(file.read_text())["run"]
        for folder in sorted(file.parent.glob("samples/*")):
            shards = SampleShards(folder)
            model = load_model(file.with_name("weights.safetensors"))
            drawn = model.labels(about["sampling"]["seed"], 0, len(shards))
            print(f"{about['setting']}: {_sure(network, torch.stack([shards[i] for i in range(len(shards))]), drawn)}")


def _sure(network: FeatureNetwork, images: Tensor, labels: Tensor | None = None) -> str:
    with torch.no_grad():
        likeliest = torch.cat([network(part.float()).softmax(1) for part in images.split(256)]).max(1)
    shares = [f"{(likeliest.values > p).float().mean():.3f} above {p}" for p in (0.5, 0.9)]
    if labels is not None:
        shares.append(f"{(likeliest.indices == labels).float().mean():.3f} of their class")
    return f"{len(images):,} images, {', '.join(shares)}"


if __name__ == "__main__":
    main()
