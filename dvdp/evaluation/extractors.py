"""The small feature network that stands in for Inception where there is none.

A convolutional network learns the labels of the data set, or by how many quarter turns an image was rotated where
there are no labels. Its 64 pooled activations are the features of the Frechet distance, KID, precision and recall,
and the scores are named for the task (``fd_labels``, ..), never ``fid``.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from dvdp import tensors
from dvdp.data.loading import Images
from dvdp.diffusion.randomness import derive_seed, generator
from dvdp.errors import UserError
from dvdp.files import write_atomically

Task = Literal["labels", "rotation"]

#: Changes whenever the network or its preprocessing does: weights of another version are refused.
KIND = "dvdp extractor 1"
FEATURES = 64
FILE = "extractor.safetensors"
BATCH = 64
#: Standard deviation of the noise that training adds, of 255. It hides what compression leaves in the pixels. Without
#: it, rotated JPEGs are told by that alone (CIFAR-10: 98 % right instead of 64 %), and the features see little else.
NOISE = 8.0

#: Of weights-inception-2015-12-05-6726825d.pth, the file that torch-fidelity downloads.
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"


@dataclass(frozen=True)
class ExtractorInfo:
    """What a trained feature network is; kept in the header of its weights file."""

    task: Task
    classes: int
    """Outputs of the head that it was trained with; 4 for rotation."""
    resolution: int
    """Of the images it was trained on, in pixels."""
    data_digest: str
    """Digest of the data set it was trained on."""
    epochs: int
    seed: int
    accuracy: float = 0.0
    """Share of right answers on the held-out tenth."""


@dataclass(frozen=True)
class Extractor:
    """Weights that turn images into features, and all that a score says of them."""

    name: Literal["labels", "rotation", "inception"]
    path: Path
    """The weights file."""
    sha256: str
    """Of the weights file."""
    features: int
    """Numbers an image is turned into."""
    preprocessing: str
    """What is done to a uint8 image before the network sees it."""
    resolution: int | None
    """The only resolution it takes, in pixels; None takes all."""


class FeatureNetwork(nn.Module):
    """Strided convolutions down to about 4 x 4, pooled to 64 features, and a linear head.

    Sides of 128 and more are first folded into channels, which costs no detail and makes them as cheap as 64 px.
    Batch norm before a smooth activation keeps every feature alive; the last one gives all features the same weight
    in a distance. In evaluation mode each is a fixed affine map.
    """

    def __init__(self, resolution: int, classes: int) -> None:
        super().__init__()
        self.fold = 1
        while resolution % (2 * self.fold) == 0 and resolution // (2 * self.fold) >= 64:
            self.fold *= 2
        halvings = max(1, round(math.log2(resolution / self.fold / 4)))
        widths = [16, *(min(FEATURES, 32 * 2**i) for i in range(halvings - 1)), FEATURES]
        layers: list[nn.Module] = [_convolution(3 * self.fold**2, widths[0], stride=1)]
        layers += [_convolution(a, b, stride=2) for a, b in pairwise(widths)]
        self.body = nn.Sequential(*layers)
        self.standardize = nn.BatchNorm1d(FEATURES, affine=False)
        self.head = nn.Linear(FEATURES, classes)

    def features(self, images: Tensor) -> Tensor:
        """(n, 3, h, h) of 0 to 255 -> float32 (n, 64), each about standard on the training images."""
        folded = F.pixel_unshuffle(images.float() / 127.5 - 1, self.fold)
        return self.standardize(self.body(folded).mean(dim=(2, 3)))

    def forward(self, images: Tensor) -> Tensor:
        """(n, 3, h, h) of 0 to 255 -> logits (n, classes)."""
        return self.head(self.features(images))


def _convolution(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.SiLU()
    )


def train_extractor(images: Images, task: Task, epochs: int, digest: str, out: Path, seed: int = 0) -> ExtractorInfo:
    """Train the feature network and write ``extractor.safetensors`` and ``extractor.json`` into ``out``.

    A tenth of the images, drawn by the seed, is held out to measure the accuracy. The same arguments give the same
    file, bit for bit, on the same machine and number of threads.

    Args:
        digest: of the data set.

    Raises:
        UserError: ``labels`` on images without labels or of a single class; fewer than 20 images.
    """
    if len(images) < 20:
        raise UserError(
            f"dataset: found {len(images)} images, expected at least 20 to train a feature network on; add images."
        )
    resolution = images[0][0].shape[-1]
    classes = 4 if task == "rotation" else _count_classes(images)
    order = torch.randperm(len(images), generator=generator(seed, "extractor", "split")).tolist()
    held_out, kept = order[: len(order) // 10], order[len(order) // 10 :]

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "extractor", "weights"))
        network = FeatureNetwork(resolution, classes)
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3, weight_decay=1e-2)
    steps = epochs * (len(kept) // BATCH or 1)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps, pct_start=0.2)
    network.train()
    with tqdm(total=steps, desc=f"extractor ({task})", unit="step", disable=None) as bar:
        for epoch in range(epochs):
            source = generator(seed, "extractor", "epoch", epoch)
            shuffled = [kept[i] for i in torch.randperm(len(kept), generator=source).tolist()]
            for batch in _batches(shuffled):
                inputs, answers = _read(images, batch, task, source)
                noisy = inputs + NOISE * torch.randn(inputs.shape, generator=source)
                loss = F.cross_entropy(network(noisy), answers)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                rate.step()
                bar.update()

    info = ExtractorInfo(task, classes, resolution, digest, epochs, seed)
    info = replace(info, accuracy=_accuracy(network, images, held_out, task, seed))
    content = tensors.pack(KIND, asdict(info), network.state_dict())
    write_atomically(Path(out) / FILE, content)
    about = {**asdict(info), "sha256": hashlib.sha256(content).hexdigest()}
    write_atomically(Path(out) / "extractor.json", json.dumps(about, indent=2) + "\n")
    return info


def load_extractor(folder: Path) -> Extractor:
    """The extractor that :func:`train_extractor` wrote into ``folder``.

    Raises:
        UserError: see :func:`load_network`.
    """
    path = Path(folder) / FILE
    _, info = load_network(path)
    return Extractor(info.task, path, file_sha256(path), FEATURES, "uint8 RGB, scaled to [-1, 1]", info.resolution)


def inception_extractor(weights: Path | None = None) -> Extractor:
    """torch-fidelity's Inception: the extractor of ``fid``.

    Args:
        weights: a local copy of its weights; without one they are downloaded, once, into torch's cache.

    Raises:
        UserError: the file is missing, is another file, or cannot be downloaded.
    """
    path = _downloaded_inception() if weights is None else Path(weights)
    if not path.is_file():
        raise UserError(
            f"evaluation.inception_weights: found no file '{path}', expected torch-fidelity's Inception weights;"
            " give their path, or set evaluation.extractor to labels or rotation."
        )
    # torch-fidelity would unpickle this file: nothing but the known one may get there.
    found = file_sha256(path)
    if found != INCEPTION_SHA256:
        raise UserError(
            f"evaluation.inception_weights: found SHA-256 {found} of '{path}', expected {INCEPTION_SHA256};"
            " download weights-inception-2015-12-05-6726825d.pth of torch-fidelity again."
        )
    return Extractor("inception", path, found, 2048, "uint8 RGB, bilinear to 299 px as in TensorFlow 1", None)


def load_network(path: Path) -> tuple[FeatureNetwork, ExtractorInfo]:
    """A trained feature network in evaluation mode, from its weights file.

    Raises:
        UserError: the file is missing, damaged, no extractor, or of another version of the network.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"extractor: found no file '{path}', expected a feature network; run `dvdp extractor` first.")
    about, weights = tensors.read(path, KIND, "extractor", "run `dvdp extractor` again")
    info = ExtractorInfo(**about)
    network = FeatureNetwork(info.resolution, info.classes)
    network.load_state_dict(weights)
    return network.eval(), info


def _count_classes(images: Images) -> int:
    # Every label is looked at: one image without is enough to spoil the training.
    labels = [images[i][1] for i in range(len(images))]
    missing = sum(label < 0 for label in labels)
    if missing:
        raise UserError(
            f"extractor: found 'labels' on a data set in which {missing} of {len(labels)} images have no label,"
            " expected a label for each; set evaluation.extractor to rotation."
        )
    if len(set(labels)) < 2:
        raise UserError(
            "extractor: found 'labels' on a data set of a single class, expected at least two;"
            " set evaluation.extractor to rotation."
        )
    return max(labels) + 1


def _batches(indices: Sequence[int]) -> Iterator[Sequence[int]]:
    # The last, shorter batch is dropped unless it is the only one: batch norm dislikes batches of one.
    for start in range(0, max(len(indices) - BATCH, 0) + 1, BATCH):
        yield indices[start : start + BATCH]


def _read(images: Images, indices: Sequence[int], task: Task, source: torch.Generator) -> tuple[Tensor, Tensor]:
    pairs = [images[i] for i in indices]
    pixels = torch.from_numpy(np.stack([image for image, _ in pairs]))
    if task == "labels":
        return pixels, torch.tensor([label for _, label in pairs])
    turns = torch.randint(4, (len(pairs),), generator=source)
    turned = [torch.rot90(x, int(k), (1, 2)) for x, k in zip(pixels, turns, strict=True)]
    return torch.stack(turned), turns


def _accuracy(network: FeatureNetwork, images: Images, indices: Sequence[int], task: Task, seed: int) -> float:
    network.eval()
    source = generator(seed, "extractor", "held out")
    right = 0
    with torch.inference_mode():
        for start in range(0, len(indices), BATCH):
            inputs, answers = _read(images, indices[start : start + BATCH], task, source)
            right += int((network(inputs).argmax(1) == answers).sum())
    return right / len(indices)


def _downloaded_inception() -> Path:
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    path = Path(torch.hub.get_dir()) / "checkpoints" / Path(URL_INCEPTION_V3).name
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(URL_INCEPTION_V3, str(path), hash_prefix=INCEPTION_SHA256)
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"evaluation.extractor: found 'inception', whose weights cannot be downloaded ({error}), expected a"
                " way to them; set evaluation.inception_weights to a local file, or evaluation.extractor to labels"
                " or rotation."
            ) from None
    return path


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
