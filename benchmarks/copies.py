"""How many planted copies of training images are found, and how many new images are taken for copies?

    python -m benchmarks.copies --archive cifar10-images.tar.xz --out benchmarks/results/copies.json

On the digits and, where an archive of images is given, on those: 1,000 training images changed in several ways play
copies, and real images that the training set does not have play new ones. The extractors are those of the pipeline, of
digits and of quarter turns. Four minutes on two cores.
"""

from __future__ import annotations

import argparse
import io
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor

from benchmarks.machine import machine
from dvdp.config import DatasetParams
from dvdp.data.loading import ArrayImages
from dvdp.data.prepare import prepare
from dvdp.data.store import ImageStore
from dvdp.evaluation.copies import Seen, find_copies
from dvdp.evaluation.extractors import Extractor, load_extractor, train_extractor
from dvdp.evaluation.fidelity import features_of
from dvdp.evaluation.samples import SampleShards, write_shard
from dvdp.files import write_atomically

COPIES, NEW = 1000, 2000


def main() -> None:
    """Measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--archive", help="of images of 32 px, for a second data set")
    parser.add_argument("--out", type=Path, required=True, help="results, JSON")
    options = parser.parse_args()
    sets = {"digits": DatasetParams(name="digits")}
    if options.archive:
        sets["archive"] = DatasetParams(name="archive", source="image_folder", path=options.archive)
    found = {"machine": machine(), "data_sets": {name: measured(params) for name, params in sets.items()}}
    write_atomically(options.out, json.dumps(found, indent=2) + "\n")


def measured(params: DatasetParams) -> dict[str, Any]:
    """Shares of images that are taken for copies."""
    random = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(params, folder / "store")
        store = ImageStore(folder / "store")
        order = random.permutation(len(store))
        new, known = np.split(order, [min(NEW, len(store) // 5)])
        pixels = {part: np.stack([store[i][0] for i in places]) for part, places in (("new", new), ("known", known))}
        labels = np.array([store[i][1] for i in known])
        training = ArrayImages(pixels["known"], labels)
        if params.source == "digits":
            train_extractor(training, "labels", 10, "benchmark", folder / "extractor")
        else:
            train_extractor(training, "rotation", 2, "benchmark", folder / "extractor")
        extractor = load_extractor(folder / "extractor")
        planted = pixels["known"][:COPIES]
        real = seen(pixels["known"], extractor, folder / "known")
        shares = {}
        for title, images in {"new": pixels["new"], **{t: change(planted) for t, change in CHANGES.items()}}.items():
            found = find_copies(*seen(images, extractor, folder / title), *real)
            taken = {"pixels": found.pixels.copies, "features": found.features.copies, "either": found.found}
            shares[title] = {measure: float(each.double().mean()) for measure, each in taken.items()}
            print(params.name, title, shares[title], flush=True)
    return {"training_images": len(known), "new_images": len(new), "copies": len(planted), "taken_for_copies": shares}


def seen(pixels: np.ndarray, extractor: Extractor, folder: Path) -> tuple[Tensor, Tensor]:
    """Thumbnails and features."""
    write_shard(folder / "00000000.npy", torch.from_numpy(np.ascontiguousarray(pixels)))
    images = Seen(SampleShards(folder))
    features = features_of(images, extractor).pooled
    return images.thumbnails, features


def noised(deviation: float) -> Callable[[np.ndarray], np.ndarray]:
    """White noise added."""
    noise = np.random.default_rng(1)
    return lambda pixels: (pixels + noise.normal(0, deviation, pixels.shape)).round().clip(0, 255).astype(np.uint8)


def each(change: Callable[[Image.Image], Image.Image]) -> Callable[[np.ndarray], np.ndarray]:
    """A change of pictures, as one of arrays."""
    return lambda pixels: np.stack(
        [np.asarray(change(Image.fromarray(image.transpose(1, 2, 0)))).transpose(2, 0, 1) for image in pixels]
    )


def jpeg(quality: int) -> Callable[[Image.Image], Image.Image]:
    """Compressed and read again."""

    def change(image: Image.Image) -> Image.Image:
        content = io.BytesIO()
        image.save(content, "JPEG", quality=quality)
        return Image.open(content)

    return change


CHANGES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "equal": lambda pixels: pixels,
    "mirrored": lambda pixels: pixels[..., ::-1],
    "noise of 5": noised(5),
    "noise of 10": noised(10),
    "noise of 20": noised(20),
    "JPEG of quality 75": each(jpeg(75)),
    "JPEG of quality 40": each(jpeg(40)),
    "blurred, 3 x 3 pixels": each(lambda image: image.filter(ImageFilter.BoxBlur(1))),
    "a tenth brighter": lambda pixels: (pixels * 1.1).clip(0, 255).astype(np.uint8),
    "moved by a pixel": lambda pixels: np.roll(pixels, 1, axis=-1),
}


if __name__ == "__main__":
    main()
